"""The command `data`: looks at a set of images before anything is trained on it."""

import argparse
import os
from pathlib import Path

from ..config.command_line import build_parser, parse_arguments
from ..config.config import Config, flag_groups
from ..config.folders import check_folders
from ..config.places import expanded
from ..errors import UserError
from .parsing import PROGRAM

FLAGS = (
    *("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column", "caption_column"),
    *("caption_from", "default_caption", "instance_prompt", "resolution", "aspect_ratio_buckets", "upscale"),
    *("center_crop", "image_interpolation_mode"),
    *("max_image_pixels", "skip_bad_images", "seed", "cache_dir"),
)


def data_command(argv: list[str]) -> str:
    """Runs `iet-finetune data` with the arguments after that word; returns what to print.

    Raises:
        UserError: the arguments are wrong, or something is wrong with the data: all of it.
    """
    if argv and not argv[0].startswith("-"):
        argv = ["--train_data_dir", *argv]
    given = parse_arguments(data_parser(), argv, [*FLAGS, "config", "page"])
    page = given.pop("page", None)
    config = Config.layered(given)
    data = config.data
    if data.train_data_dir is None and data.dataset_name is None:
        raise UserError(f"no images: name their folder, as in `{PROGRAM} data my_photos`, or give `--dataset_name`.")
    check_folders(config)
    from ..data.survey import lines, survey, write_survey

    found = survey(data, seed=config.training.seed, cache_dir=config.model.cache_dir)
    name = os.path.basename(os.path.abspath(data.train_data_dir or str(data.dataset_name)))
    path = Path(f"{name}.html" if page is None else expanded(page, "`--page`"))
    return "\n".join([*lines(found), f"page: {write_survey(path, name, found)}"])


def data_parser() -> argparse.ArgumentParser:
    """The parser of its arguments."""
    parser = build_parser(
        f"Look at a set of images before training: what is wrong with it, which images show the same, what their "
        f"captions are and how they are cropped. The first argument may be the folder: `{PROGRAM} data my_photos`.",
        flag_groups(),
        f"{PROGRAM} data",
        only=FLAGS,
    )
    parser.usage = "%(prog)s FOLDER [--FLAG VALUE ...]"
    parser.add_argument("--page", metavar="FILE", help="Where to write the page. (default: FOLDER.html, here)")
    return parser

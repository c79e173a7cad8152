"""Writes a split of a data set into a folder of images, which `iet-finetune audit --holdout_data_dir` can be given.

An audit finds its training images by the name of their data set, but held-out ones only in a folder.
"""

import json
import sys
from pathlib import Path

from iet_finetune import Config, UserError
from iet_finetune.config.command_line import build_parser, parse_arguments
from iet_finetune.config.config import flag_groups
from iet_finetune.data.dataset import load_images
from iet_finetune.files import written_beside

FLAGS = ("dataset_name", "dataset_split", "image_column", "class_column", "cache_dir", "output_dir")
LAST = "metadata.jsonl"


def save(config: Config) -> Path:
    """Writes the images as PNG files, and last a `metadata.jsonl` with their classes, if there are any.

    Raises:
        UserError: the data set, the split or a column is missing or unreadable.
    """
    data, folder = config.data, config.output_path
    images, _ = load_images(data, cache_dir=config.model.cache_dir, seed=0, needs_captions=False)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(len(images)):
        name = f"{number:05d}.png"
        images.load(number).save(folder / name)
        # So that the images stand in the column of that name here too.
        row = {f"{data.image_column}_file_name": name}
        if images.classes is not None and images.class_names is not None:
            row[str(data.class_column)] = images.class_names[images.classes[number]]
        rows.append(json.dumps(row))
    with written_beside(folder / LAST) as partial:
        partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def read(argv: list[str]) -> Config:
    """The configuration that the arguments describe.

    Raises:
        UserError: an unknown flag or a wrong value.
    """
    parser = build_parser(str(__doc__).splitlines()[0], flag_groups(), "heldout.py", only=FLAGS)
    return Config.layered(parse_arguments(parser, argv, [*FLAGS]))


def main(argv: list[str]) -> int:
    """Write the split that the arguments name; returns the exit code, 2 after an error of the user."""
    try:
        print(f"held-out images: {save(read(argv))}")
    except UserError as error:
        print(f"heldout.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A recipe shrunk until it runs in seconds anywhere: a tiny random model of its kind, made-up images, a few steps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.config import Config, all_flags
from ..config.flags import KEPT
from ..config.registry import SKIP_RULES
from ..config.sizes import AUTO
from ..errors import UserError, one_line

IMAGES_A_SHARD, IMAGES_OF_CLASS = 2, 2
LONGEST_PROMPT = 9
# Pipelines of recipes by their ids on the Hub, which need not be reached then.
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-2-1": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3-medium-diffusers": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
}


def shrink(config: Config, folder: Path) -> Config:
    """The recipe with its own method, columns and kind of model, and with everything that takes time made small.

    Args:
        config: the recipe.
        folder: an existing folder for the model and the images; what is made there follows from the recipe alone.

    Raises:
        UserError: the kind of model is not known, or cannot be found out.
    """
    changes = {name: spec.smoke for name, spec in all_flags().items() if spec.smoke is not KEPT}
    changes |= {"output_dir": f"{config.training.output_dir}-smoke", "cache_dir": str(folder / "cache")}
    if config.model.model_config is not None:
        from .scratch import small_recipe

        model, resolution = small_recipe(config.model.model_config)
        (folder / "model.json").write_text(json.dumps(model), encoding="utf-8")
        changes |= {"model_config": str(folder / "model.json"), "resolution": resolution}
        needs_captions = False
    else:
        from .tiny import RESOLUTION, TINY, save_tiny_pipeline

        kind = _pipeline_class(config)
        if kind not in TINY:
            raise UserError(f"`--smoke` has no small {kind}; it has {', '.join(sorted(TINY))}.")
        save_tiny_pipeline(kind, folder / "model")
        changes |= {"pretrained_model_name_or_path": str(folder / "model"), "resolution": RESOLUTION}
        changes |= {"base_config": None, "revision": None, "variant": None}
        changes |= {"prediction_type": config.model.prediction_type}
        needs_captions = kind not in ("DDPMPipeline", "DDIMPipeline")
    changes |= _images(config, folder / "images", changes["resolution"], needs_captions)
    if config.prior.is_on:
        changes |= {"class_data_dir": None, "num_class_images": IMAGES_OF_CLASS}
    if config.data.aspect_ratio_buckets is not None:
        changes["aspect_ratio_buckets"] = AUTO
    # Names of classes are those of the recipe's own data.
    prompts = config.validation.validation_prompts[:1] if config.data.class_column is None else ()
    # A tiny model reads a few letters, and of a longer prompt the pipeline would say that it was cut off.
    changes["validation_prompts"] = [prompt[:LONGEST_PROMPT] for prompt in prompts]
    if config.prior.class_prompt is not None:
        changes["class_prompt"] = config.prior.class_prompt.strip()[:LONGEST_PROMPT]
    return replace(Config.from_flags(**(config.to_flags() | changes)), is_smoke=True)


def _pipeline_class(config: Config) -> str:
    from .inputs import TEXT_TO_IMAGE
    from .single_file import inferred, is_file, read_checkpoint

    name = str(config.model.pretrained_model_name_or_path)
    if is_file(name):
        name = config.model.base_config or inferred(read_checkpoint(config.model))
    if name in KNOWN:
        return KNOWN[name]
    try:
        index = Path(name) / "model_index.json"
        if not index.is_file():
            from huggingface_hub import hf_hub_download

            model = config.model
            index = Path(hf_hub_download(name, "model_index.json", revision=model.revision, cache_dir=model.cache_dir))
        kind = str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
        return TEXT_TO_IMAGE.get(kind, kind)
    except Exception as error:  # the Hub's client raises whatever comes
        raise UserError(
            f"`--smoke` cannot find out what `--pretrained_model_name_or_path {name}` is: "
            f"{one_line(error).rstrip('.')}."
        ) from None


def _images(config: Config, folder: Path, resolution: int, needs_captions: bool) -> dict[str, Any]:
    """Makes images with the recipe's columns, in a folder or as a table as there; returns the flags that name them."""
    data = config.data
    count = max(IMAGES_A_SHARD * config.ensemble.num_shards, 4)
    heldout = getattr(config.chosen(SKIP_RULES)[0].load(), "least_heldout", 0)
    count, flags = count + heldout, {"holdout_fraction": heldout / (count + heldout)}
    rng = np.random.default_rng(0)
    sizes = rng.integers(resolution, 2 * resolution, (count, 2))
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    texts: dict[str, Callable[[int], Any]] = {}
    if needs_captions:
        texts[data.caption_column] = lambda i: f"picture {i}"
    for column in {data.class_column, config.ensemble.shard_by_column} - {None}:
        texts[str(column)] = lambda i: i % 2
    rows = [{column: text(i) for column, text in texts.items()} for i in range(count)]
    if data.train_data_dir is not None:
        _save_folder(folder, pictures, rows)
        return {**flags, "train_data_dir": str(folder)}
    _save_table(folder, data.image_column, data.dataset_split, pictures, rows)
    return {**flags, "dataset_name": str(folder), "dataset_config_name": None}


def _save_folder(folder: Path, pictures: list[Image.Image], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03d}.png")
    if rows[0]:
        lines = [json.dumps({"file_name": f"{number:03d}.png", **row}) for number, row in enumerate(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _save_table(
    folder: Path, image_column: str, split: str, pictures: list[Image.Image], rows: list[dict[str, Any]]
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    kinds = {
        name: ClassLabel(names=["one", "two"]) if isinstance(v[0], int) else Value("string")
        for name, v in columns.items()
    }
    features = Features({image_column: ImageFeature(), **kinds})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict({image_column: pictures, **columns}, features=features)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")

"""The images of a run: loaded, split into shards, scheduled, and made ready to be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..audit.inputs.dataset import load_heldout
from ..cache.caching import encode_data
from ..config.config import Config
from ..config.registry import SHARDINGS, SKIP_RULES
from ..config.settings import DEFAULT_MERGE_EPOCHS
from ..data.buckets import Buckets, numbers_of
from ..data.dataset import TrainingImages, load_images
from ..data.dedup import LeftOut, nothing_left_out, without_copies
from ..data.encoded import EncodedData
from ..data.loader import BesideShard, Shard
from ..data.transforms import ImageTransform
from ..distributed.groups import Ranks
from ..errors import UserError
from ..families import Family
from ..method.schedule import Schedule
from ..method.sharding import checked_shards
from .class_images import ClassImages

S = TypeVar("S", bound=Shard)
# Fewer held-out images say too little of when to stop, and more need not be looked at.
LEAST_HELDOUT, MOST_WATCHED = 8, 128


@dataclass(frozen=True)
class Data:
    """What the clones learn from, and when.

    Attributes:
        images, heldout: the training images, and those kept out.
        left_out: copies of training images that are not trained on.
        watched: held-out images that are looked at while training.
        indices: which images are in each shard.
        shards: the same as what a data loader reads.
        others: so too the first of the watched images, `MOST_WATCHED` at most.
        schedule: when each clone steps and when the clones are merged.
        beside: the class images that are trained beside them; None without prior preservation.
    """

    images: TrainingImages
    heldout: TrainingImages
    left_out: LeftOut
    watched: TrainingImages
    indices: tuple[np.ndarray, ...]
    shards: list[Shard]
    others: Shard
    schedule: Schedule
    beside: ClassImages | None = None


class Found(NamedTuple):
    """The images that a run was given.

    Attributes:
        images, heldout: the training images, and those kept out.
        left_out: copies of training images that are not trained on.
        watched: held-out images that are looked at while training: of `--holdout_data_dir` or else `heldout`.
    """

    images: TrainingImages
    heldout: TrainingImages
    left_out: LeftOut
    watched: TrainingImages


def find_images(config: Config, needs_captions: bool, dataset: Any = None, heldout_images: Any = None) -> Found:
    """Loads the images, and looks for copies if that is wanted.

    Args:
        dataset: a `datasets.Dataset` to take them from, or None for what the flags name.
        heldout_images: another one, in the place of `--holdout_data_dir`.

    Raises:
        UserError: they cannot be read, or there are too few for the shards or the skip rule.
    """
    images, heldout = load_images(
        config.data,
        cache_dir=config.model.cache_dir,
        seed=config.training.seed,
        shard_by_column=config.ensemble.shard_by_column,
        needs_captions=needs_captions,
        table=dataset,
        table_name="dataset",
    )
    watched = heldout
    if compares_with(config) or config.audit.holdout_data_dir is not None:
        watched = load_heldout(config, images, needs_captions, heldout_images) or heldout
    elif heldout_images is not None:
        raise UserError("`heldout_images`: neither `--skip_rule` nor `--stop_when` compares with them.")
    left_out = nothing_left_out(images)
    if config.data.dedup != "none":
        cache_dir, resolution = config.model.cache_dir, config.data.resolution
        images, left_out = without_copies(images, config.data.dedup, resolution, cache_dir)
    _check_enough(config, len(images), len(watched))
    return Found(images, heldout, left_out, watched)


def compares_with(config: Config) -> int:
    """How many held-out images the run needs while it trains."""
    of_rule = config.chosen(SKIP_RULES)[0].load().least_heldout
    return max(of_rule, LEAST_HELDOUT if config.training.stop_when == "auto" else 0)


def split(config: Config, images: TrainingImages) -> tuple[np.ndarray, ...]:
    """Which images are in each shard: their indices.

    Raises:
        UserError: the sharding leaves images out, or uses them twice.
    """
    entry, settings = config.chosen(SHARDINGS)
    clones, seed = config.ensemble.num_shards, config.training.seed
    parts = entry.load()(images, clones, seed, *([] if settings is None else [settings]))
    try:
        return checked_shards(parts, len(images), clones)
    except ValueError as error:
        raise UserError(f"`--shard_strategy {entry.name}`: {error}.") from None


def _check_enough(config: Config, images: int, watched: int) -> None:
    num_shards = config.ensemble.num_shards
    if images < num_shards:
        raise UserError(
            f"`--num_shards {num_shards}` needs at least {num_shards} images, but there are {images}. "
            "Lower `--num_shards` or add images."
        )
    if watched < (least := compares_with(config)):
        asks = f"--skip_rule {config.training.skip_rule} --stop_when {config.training.stop_when}"
        raise UserError(
            f"`{asks}` compares with held-out images, {least} at least, and there are {watched}: give a higher "
            "`--holdout_fraction`, or a folder of others as `--holdout_data_dir`."
        )


def schedule_of(
    config: Config, images: TrainingImages, indices: tuple[np.ndarray, ...], buckets: Buckets | None = None
) -> Schedule:
    """When each clone steps and when the clones are merged.

    Args:
        indices: the images of each shard.
        buckets: the sizes of images, which follow from the pipeline; None if all have one.

    Raises:
        UserError: an image is too small for every size.
    """
    training, ensemble, bucket_sizes = config.training, config.ensemble, None
    if buckets is not None and len(buckets.sizes) > 1:
        numbers = numbers_of(images, buckets)
        bucket_sizes = tuple(tuple(np.bincount(numbers[part]).tolist()) for part in indices)
    return Schedule.plan(
        tuple(len(part) for part in indices),
        training.train_batch_size * training.gradient_accumulation_steps,
        num_train_epochs=training.num_train_epochs,
        max_train_steps=training.max_train_steps,
        total_train_steps=training.total_train_steps,
        merge_every_epochs=ensemble.merge_every_epochs or DEFAULT_MERGE_EPOCHS,
        merge_every_steps=ensemble.merge_every_steps,
        bucket_sizes=bucket_sizes,
        seed=training.seed,
    )


def read_shards(
    config: Config,
    family: Family,
    found: Found,
    indices: tuple[np.ndarray, ...],
    buckets: Buckets,
    ranks: Ranks,
    device: torch.device,
    beside: TrainingImages | None = None,
) -> tuple[list[Shard], Shard]:
    """What the clones read; encodes the data if it is to be cached, while nothing else is on the device.

    Args:
        indices: the training images of each shard.
        buckets: the sizes of images.
        beside: class images, one of which is read beside each sample of every shard, all as squares; None for none.

    Returns:
        the shards, and the watched images, as `Data` has them.

    Raises:
        UserError: an image cannot be read.
    """
    if config.data.cache_latents:
        family.freeze()

    def encoded_with(transform: ImageTransform, images: TrainingImages) -> EncodedData | None:
        cached = config.data.cache_latents and len(images) > 0
        return encode_data(config, family, images, transform, ranks, device) if cached else None

    def made(kind: type[S], images: TrainingImages, parts: Sequence[np.ndarray], buckets: Buckets) -> list[S]:
        transform = ImageTransform(
            buckets,
            center_crop=config.data.center_crop,
            interpolation=config.data.image_interpolation_mode,
            seed=config.training.seed,
        )
        encoded = encoded_with(transform, images)
        return [
            kind(
                images,
                part,
                transform,
                config.data,
                number=number,
                seed=config.training.seed,
                latent_shapes={size: family.latent_shape_of(size) for size in buckets.sizes},
                noise_offset=config.training.noise_offset,
                encoded=encoded,
                samples_per_step=config.training.train_batch_size * config.training.gradient_accumulation_steps,
            )
            for number, part in enumerate(parts)
        ]

    shards = made(Shard, found.images, indices, buckets)
    watched = found.watched.subset(range(min(len(found.watched), MOST_WATCHED)))
    others = shards[0].of_others(watched, encoded_with(shards[0].transform, watched))
    if beside is not None:
        everything = [np.arange(len(beside))] * len(shards)
        square = Buckets.square(config.data.resolution)
        for shard, companions in zip(shards, made(BesideShard, beside, everything, square), strict=True):
            shard.beside = companions
    return shards, others

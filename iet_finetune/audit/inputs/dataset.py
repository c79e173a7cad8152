"""The real images of an audit: training images without duplicates, and held-out ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset

from ...config.config import Config
from ...data.columnar import Numbers
from ...data.dataset import TrainingImages, load_folder, load_images, load_table
from ...data.duplicates import METHOD, find_duplicates
from ...errors import UserError
from .images import Pixels, digest, image_array, training_transform
from .work import Work


@dataclass(frozen=True)
class AuditData:
    """The real images.

    Attributes:
        training, heldout: all training images; held-out ones that are not among them in any form.
        references: the training images without their duplicates; what anything is compared with.
        members: for each reference the numbers of the training images that it stands for, itself first.
        exact, near: how many training images were left out because the reference has their pixels, or looks like them.
        warnings: what the reader should know.
    """

    training: TrainingImages
    heldout: TrainingImages
    references: Pixels
    heldout_pixels: Pixels
    members: tuple[np.ndarray, ...]
    exact: int
    near: int
    warnings: tuple[str, ...]

    @property
    def firsts(self) -> np.ndarray:
        """The number of each reference among the training images, (N,) int64."""
        return np.array([numbers[0] for numbers in self.members], dtype=np.int64)

    @property
    def repeats(self) -> np.ndarray:
        """How many training images each reference stands for, (N,) int64."""
        return np.array([len(numbers) for numbers in self.members], dtype=np.int64)


def load_real_images(
    config: Config, needs_captions: bool, tables: Mapping[str, Dataset] | None = None
) -> tuple[TrainingImages, TrainingImages]:
    """The training images, and those held out: a fraction of the same data, or a folder of their own.

    With both, the fraction is part of neither.

    Args:
        tables: images in memory, by the name of the flag whose folder they replace.

    Raises:
        UserError: the data is missing or wrong.
    """
    data = config.data
    table = (tables := tables or {}).get("train_data_dir")
    if table is None and data.train_data_dir is None and data.dataset_name is None:
        raise UserError("no training images: give `--train_data_dir FOLDER` or `--dataset_name NAME`.")
    cache_dir, seed = config.model.cache_dir, config.training.seed
    training, heldout = load_images(data, cache_dir=cache_dir, seed=seed, needs_captions=needs_captions, table=table)
    others = load_heldout(config, training, needs_captions, tables.get("holdout_data_dir"))
    return training, heldout if others is None else others


def load_heldout(
    config: Config, training: TrainingImages, needs_captions: bool, table: Dataset | None = None
) -> TrainingImages | None:
    """The images of `--holdout_data_dir`; None without it.

    Args:
        table: images in memory that take the folder's place.

    Raises:
        UserError: they cannot be read, or one has a class that no training image has.
    """
    data, folder = config.data, config.audit.holdout_data_dir
    if table is not None:
        heldout = load_table("heldout_images", table, data, captions=needs_captions)
    elif folder is not None:
        cache_dir = config.model.cache_dir
        heldout = load_folder("holdout_data_dir", folder, data, captions=needs_captions, cache_dir=cache_dir)
    else:
        return None
    return _numbered_alike(heldout, training, data.class_column)


def _numbered_alike(heldout: TrainingImages, training: TrainingImages, column: str | None) -> TrainingImages:
    """Numbers the classes of held-out images as the training images do; a folder alone would number only its own.

    Raises:
        UserError: a class by name that no training image has.
    """
    if heldout.classes is None:
        return heldout
    theirs, ours = heldout.class_names or (), {name: i for i, name in enumerate(training.class_names or ())}
    numbers = []
    for number in heldout.classes:
        name = theirs[number]
        # A number keeps its meaning even if no training image has it.
        if name not in ours and name != str(number):
            raise UserError(
                f"`--holdout_data_dir`: no training image has the class {name!r} of `--class_column {column}`."
            )
        numbers.append(ours.get(name, number))
    return replace(heldout, classes=Numbers.of(numbers), class_names=training.class_names)


def prepare(config: Config, work: Work, training: TrainingImages, heldout: TrainingImages, grey: bool) -> AuditData:
    """Resizes the images as in training, and finds duplicates."""
    transform = training_transform(config)
    everything, key = image_array(work, "real images", (training, heldout), transform, grey)
    representative = work.array(
        "duplicates",
        {"images": key, "method": str(METHOD)},
        lambda advance: find_duplicates(everything, advance).representative,
    )
    count = len(training)
    members = _groups(representative[:count])
    known = representative[count:] < count
    kept = np.flatnonzero(~known)
    # Duplicate held-out images count once.
    kept = kept[representative[count:][kept] == kept + count]
    firsts = np.array([numbers[0] for numbers in members])
    copies = np.flatnonzero(representative[:count] != np.arange(count))
    exact = sum(_exact(everything, int(number), int(representative[number])) for number in copies)
    return AuditData(
        training,
        heldout.subset([int(number) for number in kept]),
        _chosen(work, "references", everything, firsts, key),
        _chosen(work, "held-out images", everything, kept + count, key),
        members,
        exact=exact,
        near=len(copies) - exact,
        warnings=tuple(_warnings(int(known.sum()), len(kept))),
    )


def _exact(images: np.ndarray, number: int, reference: int) -> bool:
    """Whether two images have the same pixels, as they are or mirrored."""
    image, other = images[number], images[reference]
    return np.array_equal(image, other) or np.array_equal(image, other[:, ::-1])


def _groups(representative: np.ndarray) -> tuple[np.ndarray, ...]:
    """The members of each group in ascending order, groups by their first members."""
    order = np.argsort(representative, kind="stable")
    starts = np.flatnonzero(np.diff(representative[order], prepend=-1))
    return tuple(np.split(order, starts[1:]))


def _chosen(work: Work, name: str, everything: np.ndarray, indices: np.ndarray, key: str) -> Pixels:
    """Some of the images: a view if they are consecutive, else a copy in a file of its own."""
    key = digest([key, name, *map(str, indices)])
    if len(indices) and np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
        return Pixels(everything[indices[0] : indices[0] + len(indices)], key)

    def fill(row: np.ndarray, number: int) -> None:
        row[:] = everything[indices[number]]

    chosen = work.filled(name, {"images": key}, (len(indices), *everything.shape[1:]), fill)
    return Pixels(chosen, key)


def _warnings(known: int, heldout: int) -> list[str]:
    lines = []
    if known:
        lines.append(
            f"left out {known} held-out image{'s' * (known > 1)} that the training data have too, exactly or nearly: "
            "such images are no baseline."
        )
    if known and not heldout:
        lines.append("no held-out images are left.")
    return lines

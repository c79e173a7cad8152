"""The micro-batches of a shard: images, captions and random draws of each visit, prefetched."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config.settings import DataConfig
from ..config.sizes import Size
from ..errors import UserError
from ..method.bucketing import bucketed_order
from ..method.schedule import Step
from ..method.seeding import SampleDraws, beside_draws, pass_order, sample_draws
from .buckets import size_of
from .dataset import TrainingImages
from .encoded import Encoded, EncodedData
from .transfer import copies_ahead
from .transforms import ImageTransform

Shape = tuple[int, int, int]


class Visit(NamedTuple):
    """One visit of one sample: a pass over the shard and a position in it."""

    pass_: int
    position: int


class Visits:
    """The visits of each micro-batch of a clone's steps, generated lazily.

    Args:
        steps: the clone's steps.
        size: samples per micro-batch.
        local_slice: selects this rank's positions of a micro-batch. If there are none, the first position is read
            anyway, because every rank of a group runs every micro-batch.
    """

    def __init__(
        self, steps: Sequence[Step], size: int, local_slice: Callable[[range], range] = lambda all_: all_
    ) -> None:
        self._steps = steps
        self._size = size
        self._local_slice = local_slice

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in self._steps:
            for part in step.micro_batches(self._size):
                yield [Visit(step.pass_, position) for position in self._local_slice(part) or part[:1]]


class MicroBatch(NamedTuple):
    """The inputs of one forward pass of a clone.

    Attributes:
        pixel_values: (B, 3, R, R) fp32 in [-1, 1], or of another size than the square; None with the cache.
        encoded: the encoded images and captions; None without the cache.
        captions: B texts, "" for a dropped caption.
        noise, posterior_noise: (B, C, H, W) fp32.
        uniform: (B,) float64 in [0, 1) on the host, determines the timestep.
        members: (B,) int64, indices within the shard.
        sizes: (B, 6) int64: height and width of the stored image; top and left of the crop (`ImageTransform.place`);
            height and width of the crop.
        labels: (B,) int64, the class; 0 without `--class_column`.
    """

    pixel_values: Tensor | None
    encoded: Encoded | None
    captions: list[str]
    noise: Tensor
    posterior_noise: Tensor
    uniform: Tensor
    members: Tensor
    sizes: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Copies the batch to the device asynchronously; `uniform` stays, because not every device has float64."""
        staying, ahead = ["captions", "uniform"], copies_ahead(device)
        return MicroBatch(**send_to_device(self._asdict(), device, non_blocking=ahead, skip_keys=staying))


class Shard(Dataset):
    """One shard's samples by visit; all randomness of a visit is a function of (seed, shard, visit).

    Args:
        images: the whole training data.
        indices: the images of the shard, int64.
        latent_shapes: (C, H, W) of the noise, by the (width, height) of an image.
        noise_offset: scale of noise that is constant over each channel.
        encoded: the cached rows of all images and captions; without them, images are read and captions passed on.
        samples_per_step: of the schedule, for images of several sizes: those of a step have one.

    Attributes:
        transform: of images.
        beside: the class images to train beside the samples, at the same visits; None without prior preservation.
    """

    def __init__(
        self,
        images: TrainingImages,
        indices: np.ndarray,
        transform: ImageTransform,
        data: DataConfig,
        *,
        number: int,
        seed: int,
        latent_shapes: Mapping[Size, Shape],
        noise_offset: float,
        encoded: EncodedData | None = None,
        samples_per_step: int = 1,
    ) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform
        self._data = data
        self._number = number
        self._seed = seed
        self._latent_shapes = latent_shapes
        self._noise_offset = noise_offset
        self.encoded = encoded
        self._samples_per_step = samples_per_step
        self.beside: BesideShard | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, visit: Visit) -> "MicroBatch | UserError":
        member, draws = self._drawn(visit)
        index = int(self.indices[member])
        flip, caption = self._data.random_flip and draws.flip < 0.5, self._caption(index, draws)
        noise = draws.noise + self._noise_offset * draws.offset if self._noise_offset else draws.noise
        return self._read(index, member, flip, caption, noise, draws.posterior, draws.timestep)

    def _drawn(self, visit: Visit) -> tuple[int, SampleDraws]:
        """Which member of the shard a visit is of, and its draws."""
        member = int(self._pass_order(visit.pass_)[visit.position])
        shape = self._latent_shape(int(self.indices[member]))
        return member, sample_draws(self._seed, self._number, visit.pass_, visit.position, shape)

    def of_others(self, images: TrainingImages, encoded: EncodedData | None) -> "Shard":
        """Other images, all of them, read in the same way; `encoded` are their cached rows."""
        other = copy(self)
        other.images, other.indices, other.encoded = images, np.arange(len(images)), encoded
        return other

    def size(self, index: int) -> Size:
        """(width, height) in pixels of one of `images` as it is trained on."""
        return size_of(self.images, index, self.transform.buckets)

    def _latent_shape(self, index: int) -> Shape:
        return self._latent_shapes[self.size(index)]

    def plain(self, index: int) -> "MicroBatch | UserError":
        """One of `images` with its first caption, not mirrored, and with noise of 0."""
        zeros = np.zeros(self._latent_shape(index), dtype=np.float32)
        return self._read(index, 0, False, self.images.captions[index][0], zeros, zeros, 0.0)

    def _read(
        self,
        index: int,
        member: int,
        flip: bool,
        caption: str,
        noise: np.ndarray,
        posterior: np.ndarray,
        uniform: float,
    ) -> "MicroBatch | UserError":
        pixel_values = encoded = None
        try:
            if self.encoded is not None:
                encoded, place = self.encoded(index, flip, caption)
            else:
                pixel_values, place = self.transform.at(self.size(index)).load(self.images, index, flip)
        except UserError as error:
            # Returned as a value: a worker process would wrap an exception in its own traceback.
            return error
        return MicroBatch(
            pixel_values,
            encoded,
            [caption],
            torch.from_numpy(noise),
            torch.from_numpy(posterior),
            torch.tensor(uniform, dtype=torch.float64),
            torch.tensor(member),
            with_size(place, self.size(index)),
            torch.tensor(self.images.classes[index] if self.images.classes is not None else 0),
        )

    def _pass_order(self, pass_: int) -> np.ndarray:
        if self._order is None or self._order[0] != pass_:
            self._order = pass_, self._new_order(pass_)
        return self._order[1]

    def _new_order(self, pass_: int) -> np.ndarray:
        buckets = self.transform.buckets
        if len(buckets.sizes) == 1:
            return pass_order(self._seed, self._number, pass_, len(self))
        assert self.images.sizes is not None
        numbers = buckets.numbers(self.images.sizes[self.indices])
        return bucketed_order(self._seed, self._number, pass_, numbers, self._samples_per_step)

    def _caption(self, index: int, draws: SampleDraws) -> str:
        if draws.caption_dropout < self._data.caption_dropout:
            return ""
        captions = self.images.captions[index]
        return captions[int(draws.caption * len(captions))]


class BesideShard(Shard):
    """The class images that are trained beside one shard's samples: one at each visit, drawn anew each time.

    Takes the arguments of `Shard`, `images` being the class images, which all have one size.
    """

    def _drawn(self, visit: Visit) -> tuple[int, SampleDraws]:
        where = self._seed, self._number, visit.pass_, visit.position
        return beside_draws(*where, self._latent_shape(0), len(self))


def with_size(place: Tensor, size: Size) -> Tensor:
    """An image's `ImageTransform.place` (4,) and (width, height) as `Family.details` takes them, (6,) int64."""
    return torch.cat([place, torch.tensor([size[1], size[0]])])


def collate(samples: list["MicroBatch | UserError"]) -> "MicroBatch | UserError":
    """Collates samples into a micro-batch, or returns the first error among them."""
    good: list[MicroBatch] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    captions = [caption for sample in good for caption in sample.captions]
    return stacked([sample._replace(captions=[]) for sample in good])._replace(captions=captions)


def stacked(samples: list[Any]) -> Any:
    """Stacks the tensors of equally structured named tuples and dicts."""
    first = samples[0]
    if isinstance(first, Tensor):
        return torch.stack(samples)
    if isinstance(first, dict):
        return {key: stacked([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple):
        return type(first)(*map(stacked, map(list, zip(*samples, strict=True))))
    return first


def micro_batches(
    shard: Shard, visits: Iterable[list[Visit]], *, num_workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    """Yields the micro-batches of the visits, in order, prefetched by `num_workers` processes.

    Raises:
        UserError: an image cannot be read.
    """
    loader = DataLoader(
        shard,
        batch_sampler=visits,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interrupts_to_parent,
        # Without its own generator, the loader would draw a number from torch's global one.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _leave_interrupts_to_parent(worker: int) -> None:
    """A terminal sends Ctrl-C to workers too, which must live until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

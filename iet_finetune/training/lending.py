"""What skip rules may ask about a run: frozen denoisers without a second network, and losses by image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loader import Shard, collate
from ..distributed.groups import Ranks
from ..ensemble.budget import Need
from ..ensemble.merger import MergesClones
from ..errors import UserError
from ..families.base import evaluating
from ..families.encoding import ENCODE_CHUNK
from ..method.objective import per_sample_loss
from ..method.rules import SkipRule
from ..method.seeding import image_noise
from .data import Data
from .model import Model
from .noising import Noising, calling

# What `Run.lend` lends, by the name of the merger whose result it is; the base comes from none.
MERGERS = {"merged": "denoiser", "ema": "ema"}


class Lent:
    """The denoiser with other weights, which take the place of the live ones for the time of a call.

    Attributes:
        values: live parameter or buffer -> what stands in for it, on its device.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self.values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copies what these live tensors hold now; memory of earlier copies is used again."""
        for tensor in tensors:
            if tensor in self.values and self.values[tensor].shape == tensor.shape:
                self.values[tensor].copy_(tensor.detach())
            else:
                self.values[tensor] = tensor.detach().clone()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output, without gradient or dropout."""
        # The tensors that a pending backward pass has saved are the live ones: they are back in place before it.
        own = [tensor.data for tensor in self.values]
        try:
            for tensor, value in self.values.items():
                tensor.data = value
            with evaluating(self._denoiser):
                return self._denoiser(*args, **kwargs)
        finally:
            for tensor, data in zip(self.values, own, strict=True):
                tensor.data = data


class Lender:
    """The `Run` that skip rules see.

    To lend what a merge made, or to compute its losses, it is put into the live denoiser: a round then begins with
    check-outs, which overwrite all of that.

    Args:
        model: on the device, as it came.
        mergers: of the "denoiser", and of the "ema" where there is one.
        noising: of the run.
        ranks: all of them.
        borrows: of the rule.
        batch_size: of a micro-batch.

    Attributes:
        round: rounds completed so far.

    Raises:
        UserError: the rule borrows a moving average that is not kept.
    """

    def __init__(
        self,
        data: Data,
        model: Model,
        mergers: Mapping[str, MergesClones],
        noising: Noising,
        ranks: Ranks,
        borrows: Sequence[str],
        batch_size: int,
    ) -> None:
        if "ema" in borrows and "ema" not in mergers:
            raise UserError("the skip rule compares with the moving average of the weights: it needs `--use_ema`.")
        self._family, self._trainable, self._adapter = model.family, model.trainable, model.adapter
        self._mergers, self._noising, self._ranks = mergers, noising, ranks
        # By whether they are the held-out ones.
        self._images = {False: data.shards[0], True: data.others}
        # Always as many at once, on any number of ranks: a loss's bits may depend on it.
        self._chunk = min(ENCODE_CHUNK, batch_size)
        self._visits = data.schedule.visits_a_round
        self.round = 0
        self._lent = {which: Lent(self._family.denoiser) for which in borrows}
        self._asking = False
        self._current: set[str] = set()
        self._losses: dict[tuple[Any, ...], Tensor] = {}
        if "base" in borrows and self._adapter is None:
            self._lent["base"].take(self._live)

    @property
    def visits(self) -> int:
        """See `Run`."""
        return self._visits

    @property
    def content_hashes(self) -> Sequence[str]:
        """See `Run`."""
        return self._images[False].images.content_hashes

    @property
    def heldout_hashes(self) -> Sequence[str]:
        """See `Run`."""
        return self._images[True].images.content_hashes

    @property
    def _live(self) -> list[Tensor]:
        return [*self._trainable.parameters.values(), *self._trainable.buffers.values()]

    def begin_round(self, rules: Sequence[SkipRule], round_: int) -> None:
        """Lets every clone's rule compute what they share. Every rank takes part, before any clone is checked out."""
        self.round = round_
        self._current.clear()
        self._losses.clear()
        self._asking = True
        for rule in rules:
            rule.begin_round(self)
        self._asking = False

    def lend(self, which: str) -> Lent:
        """See `Run`.

        Raises:
            ValueError: the rule does not name it in `borrows`, or asks outside `begin_round`.
        """
        self._check(which)
        lent = self._lent[which]
        if which not in self._current and (which, self._adapter) != ("base", None):
            self._put(which)
            lent.take([*self._live, *self._frozen_below(which)])
        self._current.add(which)
        return lent

    def _check(self, which: str) -> None:
        if which not in self._lent:
            raise ValueError(f"a skip rule that asks for {which!r} must name it in `borrows`")
        self._check_asking()

    def _check_asking(self) -> None:
        if not self._asking:
            # It would overwrite the weights of the clone that is training.
            raise ValueError("a skip rule may only ask for networks and their losses in `begin_round`")

    def _frozen_below(self, which: str) -> list[Tensor]:
        """Frozen weights below an adapter that differ from those that the clones of this round train on."""
        if self._adapter is None or which == "merged":
            return []
        mergers = [self._mergers[name] for name in ("denoiser", "ema") if name in (MERGERS.get(which), "denoiser")]
        names = {name for merger in mergers for name in getattr(merger, "remainders", ())}
        below = [layer.holds_remainder for name, layer in self._adapter.layers.items() if name in names]
        return [tensor for tensors in below for tensor in tensors]

    @torch.no_grad()
    def _put(self, which: str) -> None:
        """Puts these weights into the live denoiser."""
        if which in MERGERS:
            self._mergers[MERGERS[which]].load_into(self._trainable)
        elif self._adapter is not None:
            self._adapter.fold_remainders({})
            for layer in self._adapter.layers.values():
                layer.up_weight.zero_()
        else:
            for tensor, value in self._lent["base"].values.items():
                tensor.copy_(value)

    def losses(
        self, which: str, images: Sequence[int], timesteps: Sequence[int], seed: int, *, heldout: bool = False
    ) -> Tensor:
        """See `Run`. Every rank takes part.

        Raises:
            UserError: an image cannot be read.
            ValueError: as `lend`.
        """
        if which == "base":
            self._check(which)
        elif which == "result":
            which = "ema" if "ema" in self._mergers else "merged"
        self._check_asking()
        if MERGERS.get(which) not in self._mergers and which != "base":
            raise ValueError(f"there are no losses of {which!r}: ask for base, merged, ema or result")
        key = which, tuple(images), tuple(timesteps), seed, heldout
        if key not in self._losses:
            self._put(which)
            self._losses[key] = self._spread(self._images[heldout], *key[1:4])
        return self._losses[key]

    def heldout_losses(self, images: Sequence[int], timesteps: Sequence[int], seed: int) -> Tensor:
        """Of what would be saved, as `losses`, while no clone is checked out. Every rank takes part."""
        self._put("ema" if "ema" in self._mergers else "merged")
        return self._spread(self._images[True], tuple(images), tuple(timesteps), seed)

    def _spread(self, source: Shard, images: tuple[int, ...], timesteps: tuple[int, ...], seed: int) -> Tensor:
        """What `losses` returns, each rank having computed some chunks of it; images of a chunk have one size."""
        by_size: dict[Any, list[int]] = {}
        for place, index in enumerate(images):
            by_size.setdefault(source.size(index), []).append(place)
        places = [
            same[start : start + self._chunk]
            for same in by_size.values()
            for start in range(0, len(same), self._chunk)
        ]
        chunks = [tuple(images[place] for place in part) for part in places]
        turns = -(-len(chunks) // self._ranks.size)
        own = torch.zeros(turns, self._chunk, len(timesteps))
        family = self._family
        # Encoders of what is cached are not on the device.
        encoders = (*family.image_encoders, *family.caption_encoders) if source.encoded is None else ()
        with torch.no_grad(), calling(family, family.denoiser), family.lent(encoders, self._noising.device):
            for turn, chunk in enumerate(chunks[self._ranks.rank :: self._ranks.size]):
                own[turn] = self._of_chunk(source, chunk, timesteps, seed)
        gathered = self._ranks.all_gather(own.view(-1).to(self._ranks.device)).cpu()
        by_turn = gathered.view(self._ranks.size, *own.shape).transpose(0, 1)
        losses = torch.empty(len(images), len(timesteps))
        for part, rows in zip(places, by_turn.reshape(-1, self._chunk, len(timesteps)), strict=False):
            losses[part] = rows[: len(part)]
        return losses

    def _of_chunk(self, source: Shard, chunk: tuple[int, ...], timesteps: tuple[int, ...], seed: int) -> Tensor:
        """(chunk, J) fp32; a shorter chunk is padded with its last image."""
        device = self._noising.device
        padded = [*chunk, *[chunk[-1]] * (self._chunk - len(chunk))]
        batch = collate([source.plain(index) for index in padded])
        if isinstance(batch, UserError):
            raise batch
        latents, conditions = self._noising.inputs(batch.to(device))
        hashes = [source.images.content_hashes[index] for index in padded]
        shape = tuple(latents.shape[1:])
        noise = torch.from_numpy(np.stack([image_noise(seed, hash_, len(timesteps), shape) for hash_ in hashes], 1))
        losses = []
        for draw, timestep in zip(noise, timesteps, strict=True):
            everywhere = torch.full((len(padded),), timestep, device=device)
            noised = self._noising.at(latents, conditions, draw.to(device), everywhere)
            losses.append(per_sample_loss(noised.predict(), noised.target))
        return torch.stack(losses, dim=1).cpu()

    def release(self) -> None:
        """Frees the weights that were lent: nothing can be trained any more."""
        for lent in self._lent.values():
            lent.values.clear()


def need_of_rule(rule: type[SkipRule], weights: int, below: int) -> Need:
    """What a rule takes: the networks that it borrows, and gradients of what skipped samples learn instead.

    Args:
        weights: bytes of the trained tensors.
        below: of the frozen weights below adapters that are merged exactly, which change from round to round.
    """
    changed = sum(which != "merged" for which in rule.borrows)
    return Need(device=(len(rule.borrows) + rule.teaches()) * weights + changed * below)

"""What skip rules may ask about a run: frozen denoisers, and losses by image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.loader import Shard, collate
from ..distributed.groups import Ranks
from ..ensemble.checkpoint import Checkpoint
from ..ensemble.merger import MergesClones
from ..ensemble.pieces import Piece, tensors_piece
from ..errors import UserError
from ..families.encoding import ENCODE_CHUNK
from ..method.objective import per_sample_loss
from ..method.rules import SkipRule
from ..method.seeding import image_noise
from .data import Data
from .lent import Lent
from .model import Model
from .noising import Noising, calling

# What `Run.lend` lends, by the name of the merger whose result it is; the base comes from none.
MERGERS = {"merged": "denoiser", "ema": "ema"}
REFERENCE = "reference"
# A backward pass takes as long as two forward passes, or as one where most weights have no gradient.
PASSES_A_VISIT, WITH_ADAPTER = 3, 2


class Looks(NamedTuple):
    """At which timesteps losses are looked at, with which of an image's draws of noise, and the seed of these."""

    timesteps: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int


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
        passes_a_visit: forward passes that take as long as a sample's visit in training.
        round: rounds completed so far.
        rounds_left: still to come if the run goes on to its limit.

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
        self._num_shards = len(data.shards)
        self.passes_a_visit = PASSES_A_VISIT if model.adapter is None else WITH_ADAPTER
        self.round, self.rounds_left = 0, 0
        self._lent = {which: Lent(self._family.denoiser) for which in borrows}
        self._asking = False
        self._current: set[str] = set()
        # After which round the reference was kept, as the version of its file in checkpoints.
        self._kept: str | None = None
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

    def begin_round(self, rules: Sequence[SkipRule], round_: int, rounds_left: int) -> None:
        """Lets every clone's rule compute what they share. Every rank takes part, before any clone is checked out."""
        self.round, self.rounds_left = round_, rounds_left
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
        if which == REFERENCE:
            if self._kept is None:
                raise ValueError("a skip rule must ask for `keep_reference` before the reference can be lent")
            return lent
        if which not in self._current and (which, self._adapter) != ("base", None):
            self._put(which)
            lent.take([*self._live, *self._frozen_below(which)])
        self._current.add(which)
        return lent

    def keep_reference(self) -> None:
        """See `Run`.

        Raises:
            ValueError: as `lend`.
        """
        self._check(REFERENCE)
        if self._kept != f"round {self.round}":
            self._put("ema" if "ema" in self._mergers else "merged")
            self._lent[REFERENCE].take([*self._live, *self._may_change])
            self._kept = f"round {self.round}"

    @property
    def _may_change(self) -> list[Tensor]:
        """Frozen weights below an adapter that later rounds may train on otherwise than this one."""
        merges_exactly = any(hasattr(merger, "remainders") for merger in self._mergers.values())
        if self._adapter is None or not merges_exactly or self._num_shards == 1:
            return []
        return [tensor for layer in self._adapter.layers.values() for tensor in layer.holds_remainder]

    def pieces(self) -> dict[str, Piece]:
        """What this rank writes of the reference into a checkpoint: the main one all, the others nothing."""
        if self._kept is None or not self._ranks.is_main:
            return {}
        return {f"{REFERENCE}.safetensors": tensors_piece(self._kept, self._lent[REFERENCE].named)}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up the reference that a checkpoint holds, if the rule borrows one."""
        name = f"{REFERENCE}.safetensors"
        if REFERENCE in self._lent and checkpoint.has(name):
            self._lent[REFERENCE].restore(checkpoint.tensors(name))
            self._kept = checkpoint.manifest["pieces"][name]

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
        self,
        which: str,
        images: Sequence[int],
        timesteps: Sequence[int],
        seed: int,
        *,
        heldout: bool = False,
        draws: Sequence[int] | None = None,
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
        wanted = Looks(tuple(timesteps), tuple(range(len(timesteps)) if draws is None else draws), seed)
        key = which, tuple(images), wanted, heldout
        if key not in self._losses:
            self._put(which)
            self._losses[key] = self._spread(self._images[heldout], key[1], wanted)
        return self._losses[key]

    def heldout_losses(self, images: Sequence[int], timesteps: Sequence[int], seed: int) -> Tensor:
        """Of what would be saved, as `losses`, while no clone is checked out. Every rank takes part."""
        self._put("ema" if "ema" in self._mergers else "merged")
        return self.live_losses(images, timesteps, seed, heldout=True)

    def live_losses(
        self, images: Sequence[int], timesteps: Sequence[int], seed: int, *, heldout: bool = False
    ) -> Tensor:
        """Of the live weights, which must be the same on all ranks, as `losses`. Every rank takes part."""
        wanted = Looks(tuple(timesteps), tuple(range(len(timesteps))), seed)
        return self._spread(self._images[heldout], tuple(images), wanted)

    def _spread(self, source: Shard, images: tuple[int, ...], looks: Looks) -> Tensor:
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
        own = torch.zeros(turns, self._chunk, len(looks.timesteps))
        family = self._family
        # Encoders of what is cached are not on the device.
        encoders = (*family.image_encoders, *family.caption_encoders) if source.encoded is None else ()
        with torch.no_grad(), calling(family, family.denoiser), family.lent(encoders, self._noising.device):
            for turn, chunk in enumerate(chunks[self._ranks.rank :: self._ranks.size]):
                own[turn] = self._of_chunk(source, chunk, looks)
        gathered = self._ranks.all_gather(own.view(-1).to(self._ranks.device)).cpu()
        by_turn = gathered.view(self._ranks.size, *own.shape).transpose(0, 1)
        losses = torch.empty(len(images), len(looks.timesteps))
        for part, rows in zip(places, by_turn.reshape(-1, self._chunk, len(looks.timesteps)), strict=False):
            losses[part] = rows[: len(part)]
        return losses

    def _of_chunk(self, source: Shard, chunk: tuple[int, ...], looks: Looks) -> Tensor:
        """(chunk, J) fp32; a shorter chunk is padded with its last image."""
        device = self._noising.device
        padded = [*chunk, *[chunk[-1]] * (self._chunk - len(chunk))]
        batch = collate([source.plain(index) for index in padded])
        if isinstance(batch, UserError):
            raise batch
        latents, conditions = self._noising.inputs(batch.to(device))
        hashes = [source.images.content_hashes[index] for index in padded]
        shape = tuple(latents.shape[1:])
        count = max(looks.draws) + 1
        noise = torch.from_numpy(np.stack([image_noise(looks.seed, each, count, shape) for each in hashes], 1))
        losses = []
        for number, timestep in zip(looks.draws, looks.timesteps, strict=True):
            draw = noise[number]
            everywhere = torch.full((len(padded),), timestep, device=device)
            noised = self._noising.at(latents, conditions, draw.to(device), everywhere)
            losses.append(per_sample_loss(noised.predict(), noised.target))
        return torch.stack(losses, dim=1).cpu()

    def release(self) -> None:
        """Frees the weights that were lent: nothing can be trained any more."""
        for lent in self._lent.values():
            lent.values.clear()

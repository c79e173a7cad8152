"""A card without a card: steps on torch's meta device, and a watch for whatever would make the host wait for it.

The meta device knows shapes only, and shares no memory with the host: as with a GPU, what goes to it or comes from it
is a copy, which torch's dispatcher sees. "Pinned" is what would be on a machine with a GPU.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import iet_finetune
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.data import loader, transfer
from iet_finetune.data.loader import Shard, micro_batches
from iet_finetune.distributed.groups import Group
from iet_finetune.ensemble.clone import Clone
from iet_finetune.ensemble.ema import EMA
from iet_finetune.ensemble.ledger import ShardLedger
from iet_finetune.ensemble.meter import RoundMeter
from iet_finetune.ensemble.optimizers import build_optimizer
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.training import local as local_training
from iet_finetune.training.lending import Lent
from iet_finetune.training.local import LocalTraining
from iet_finetune.training.noising import Noising
from iet_finetune.training.trainer import Trainer

META = torch.device("meta")
PACKAGE = Path(iet_finetune.__file__).parent
aten = torch.ops.aten
MAKING = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
SENDS = "copies to the device, and waits"
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Read(Exception):
    """The host asked for a value of the device, of which there is none here."""


class Watch(TorchDispatchMode):
    """Notes what waits for the device, with the line that asked for it; raises `Read` where the host wants a value.

    Attributes:
        found: what waits, in the order in which it came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        # Kept, so that no other tensor gets their memory.
        self._pinned: list[Tensor] = []

    def pin(self, value: Any) -> Any:
        """The value, of which all tensors of the host count as pinned."""
        self._pinned += [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(each.is_meta for each in given) and (why := _reads(func, args, kwargs)):
            self.note(func, why)
            raise Read(self.found[-1])
        result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        on_card = any(each.is_meta for each in (*given, *made))
        if on_card and any(self._waits(func, each, args, kwargs) for each in given if not each.is_meta):
            self.note(func, SENDS)
        return result

    def _waits(self, func: Any, source: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether a tensor of the host that an operation on the device takes has to be waited for."""
        if func not in (aten._to_copy.default, aten.copy_.default):
            return source.ndim > 0  # a single number goes along with the call
        ahead = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return not (ahead and self._is_pinned(source))

    def _is_pinned(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(each.untyped_storage().data_ptr() == place for each in self._pinned)

    def note(self, func: Any, what: str) -> None:
        """Notes what an operation does."""
        self.found.append(f"{func} {what}, at {_line()}")


class Numbers(TorchFunctionMode):
    """Notes numbers of Python that are sent to the device, which the dispatcher does not see on this one."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in MAKING and result.is_meta
        chosen = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta and _has_list(args[1])
        if made or chosen:
            self._watch.note(func.__name__, SENDS)
        return result


def _has_list(index: Any) -> bool:
    return any(isinstance(each, list | np.ndarray) for each in (index if isinstance(index, tuple) else (index,)))


def _reads(func: Any, args: Any, kwargs: Any) -> str:
    """Why an operation on the device needs the host to know its values; nothing if it does not."""
    if func in INDEXING:
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        filled = func is not aten.index.Tensor and args[2].numel() == 1
        return "counts what is chosen" if masks and not filled else ""
    to_host = func is aten._to_copy.default and torch.device(kwargs.get("device") or META) != META
    if to_host or (func is aten.copy_.default and not args[0].is_meta):
        return "reads from the device"
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return "needs values of the device"
    return ""


def _line() -> str:
    """The innermost line of the package; below a backward pass there is none."""
    ours = [each for each in traceback.extract_stack() if Path(each.filename).is_relative_to(PACKAGE)]
    return f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else "no line of the package"


@contextmanager
def meta_is_a_card(watch: Watch) -> Iterator[None]:
    """Inside, the program takes the meta device for one that copies from pinned memory while the host goes on."""

    def read(*args: Any, pin_memory: bool, **kwargs: Any) -> Iterator[Any]:
        for batch in micro_batches(*args, pin_memory=False, **kwargs):
            yield watch.pin(batch) if pin_memory else batch

    with ExitStack() as stack:
        for module in (transfer, loader, local_training):
            stack.enter_context(mock.patch.object(module, "copies_ahead", lambda device: device == META))
        stack.enter_context(mock.patch.object(local_training, "micro_batches", read))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self: watch.pin(self.clone())))
        # Fused AdamW has an implementation there, but does not say so.
        kinds = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(mock.patch(kinds, return_value=["meta"]))
        yield


class OfTwo(Group):
    """The second of two ranks; the other one, and what connects them, is missing."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    def all_gather(self, values: Tensor) -> Tensor:
        """Something of the right shape."""
        return values.new_empty((self.size, *values.shape))

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module: what DDP does is torch's own."""
        return module

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Nothing."""


class Asked:
    """What a skip rule may ask of a run before its first round, on the meta device."""

    round, visits = 0, 100

    def __init__(self, trainer: Trainer) -> None:
        self._denoiser = trainer.model.family.denoiser
        self.content_hashes = trainer.data.images.content_hashes
        self.heldout_hashes: Sequence[str] = ()

    def lend(self, which: str) -> Lent:
        """The denoiser with copies of its weights."""
        lent = Lent(self._denoiser)
        lent.take(list(self._denoiser.parameters()))
        return lent


def waits_of(trainer: Trainer, group: Group, *, cached: bool = True) -> list[str]:
    """What would make the host wait for the device in a pass of the first clone, after one in which things are made.

    Args:
        trainer: its denoiser is put onto the meta device, and has to be trained as it is by now.
        cached: whether images and captions were encoded before.
    """
    config, family = trainer.config, trainer.model.family
    torch.nn.Module.to(family.denoiser, META)
    family.network, family.objective = family.denoiser, family.objective.to(META)
    if not cached:
        family.place(META)
        family.denoiser.train()
    shard = copy(trainer.data.shards[0])
    shard.encoded = shard.encoded if cached else None
    watch = Watch()
    with meta_is_a_card(watch):
        clone, local = _clone(trainer, shard), _local(trainer, group)
        clone.rule.begin_round(Asked(trainer))  # type: ignore[arg-type]  # it does not say what no rule asks then
        a_pass = -(-len(shard) // (config.training.train_batch_size * config.training.gradient_accumulation_steps))
        steps = local.run(clone, shard, trainer.data.schedule.steps(0, 0, 2 * a_pass), lambda step: 1e-4)
        try:
            with watch, Numbers(watch):
                for _ in range(a_pass):
                    next(steps)
                # What is sent once may be waited for.
                watch.found.clear()
                assert len(list(steps)) == a_pass
        except Read:
            pass
    return watch.found


def _clone(trainer: Trainer, shard: Shard) -> Clone:
    entry, settings = trainer.config.chosen(SKIP_RULES)
    # On the host, where rules look at it before the first step.
    objective = trainer.model.family.make_objective()
    facts: dict[str, Any] = {"objective": objective, "num_images": len(shard), "device": META}
    return Clone(0, 1, entry.load()(settings, **facts), ShardLedger(len(shard)).to(META), RoundMeter(META))


def _local(trainer: Trainer, group: Group) -> LocalTraining:
    config, family = trainer.config, trainer.model.family
    trainable = Trainable(family.denoiser)
    optimizer = build_optimizer(trainable.parameters.values(), config.optimizer, config.training)
    ema = EMA(trainable.parameters, config.optimizer.ema_max_decay)
    noising = Noising(family, config, META, -(-config.training.train_batch_size // group.size))
    return LocalTraining(family, trainable, optimizer, ema, config, META, group, noising)

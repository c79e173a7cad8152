"""What a trained adapter is saved as: a LoRA file of its rank or a higher one, or a whole pipeline."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import AdaptedLayer, Adapter
from .factors import as_weights
from .layer import LoraLayer
from .low_rank import combine, compress
from .spectra import LowRank, Matrix, energy
from .splitting import split

# Without `--lora_export` a LoRA file may have up to so many times the rank that was trained.
MOST_TIMES_RANK = 4
# A share of the energy below which what is lost is rounding.
NOTHING = 1e-12


class Export(NamedTuple):
    """What is saved of an adapter.

    Attributes:
        layers: of the LoRA file, by component and module; None if a whole pipeline is saved.
        words: what that is and what it lost, for the card and the terminal.
    """

    layers: dict[str, LoraLayer] | None
    words: str


def plan_export(adapter: Adapter, component: str, form: str | None, dtype: torch.dtype = torch.float32) -> Export:
    """The live adapter, with the remainders below it, in the form that `--lora_export` asks for.

    Args:
        component: of the pipeline, such as "unet".
        form: "truncate", "full_rank" or "fuse"; None chooses full_rank if no layer needs more than 4 r, else fuse.
        dtype: of the LoRA file.
    """
    if form == "fuse" or (form is None and not _is_within(adapter, MOST_TIMES_RANK * adapter.rank)):
        return Export(None, "a whole pipeline, the adapter's update added to its weights")
    make = _truncated if form == "truncate" else _exact
    made = {name: make(adapter, name) for name in adapter.layers}
    lost, whole = (sum(energies) for energies in zip(*(layer.energies for layer in made.values()), strict=True))
    layers = {f"{component}.{name}": layer.lora.folded(dtype) for name, layer in made.items()}
    words = _words(adapter.rank, max(layer.rank for layer in layers.values()), lost, whole)
    rounded = "" if dtype == torch.float32 else f", rounded to {str(dtype).removeprefix('torch.')}"
    return Export(layers, words + rounded)


def _words(trained: int, saved: int, lost: float, whole: float) -> str:
    if lost > NOTHING * whole:
        return f"a LoRA file of rank {saved}, which lost {100 * lost / whole:.3g} % of the update's energy"
    return f"a LoRA file of rank {saved}" + (f", exact: more than the {trained} trained" if saved > trained else "")


class _Made(NamedTuple):
    """One layer of a LoRA file, and the energies of what it lost and of the exact update."""

    lora: LoraLayer
    energies: tuple[float, float]


def _exact(adapter: Adapter, name: str) -> _Made:
    return _made(adapter, name, _compressed)


def _compressed(total: Matrix) -> LowRank:
    kept = compress(total)
    # An adapter and a remainder that cancel leave nothing, but a file's layers have a rank of at least 1.
    return kept if kept.rank else split(total, 1)[0]


def _truncated(adapter: Adapter, name: str) -> _Made:
    return _made(adapter, name, lambda total: split(total, adapter.rank)[0])


def _made(adapter: Adapter, name: str, reduce: Callable[[Matrix], LowRank]) -> _Made:
    layer = adapter.layers[name]
    if name not in adapter.folded:
        # As it was trained, to the bit.
        lora = LoraLayer(layer.up_weight.detach().cpu(), layer.down_weight.detach().cpu(), layer.scaling)
        return _Made(lora, (0.0, layer.update(adapter.live).energy()))
    total = _total(adapter, name)
    kept = reduce(total)
    whole = energy(total)
    return _Made(_as_layer(kept, layer), (max(whole - kept.energy(), 0.0), whole))


def _total(adapter: Adapter, name: str) -> Matrix:
    update = adapter.layers[name].update(adapter.live)
    return combine([(1.0, update), (1.0, adapter.folded[name])])


def _as_layer(update: LowRank, layer: AdaptedLayer) -> LoraLayer:
    return LoraLayer(*as_weights(update, layer.up_weight.detach().cpu(), layer.down_weight.detach().cpu()), 1.0)


def _is_within(adapter: Adapter, most: int) -> bool:
    """Whether no layer's exact update has a higher rank."""
    return all(_rank_is_within(_total(adapter, name), most) for name in adapter.folded)


def _rank_is_within(matrix: Matrix, most: int) -> bool:
    if not isinstance(matrix, Tensor):
        return matrix.rank <= most
    # What is dense has a rank above half the smaller side.
    return min(matrix.shape) < 2 * most and compress(matrix).rank <= most

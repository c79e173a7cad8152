"""What a trained adapter is saved as: a LoRA file of its rank or a higher one, or a whole pipeline."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from .adapted import AdaptedLayer
from .adapters import Adapter
from .factors import as_weights
from .layer import LoraLayer
from .low_rank import combine, compress
from .quantised import QuantisedLinear
from .spectra import LowRank, Matrix, energy
from .splitting import split

# Without `--lora_export` the update is cut to the rank that was trained if that loses no more of its energy.
MOST_LOST = 0.01
# A share of the energy below which what is lost is rounding.
NOTHING = 1e-12


class Export(NamedTuple):
    """What is saved of an adapter.

    Attributes:
        layers: of the LoRA file, by component and module; None if a whole pipeline is saved.
        words: what that is and what it lost, for the card and the terminal.
        cut: whether something was lost.
        higher: whether the file has a higher rank than was trained.
    """

    layers: dict[str, LoraLayer] | None
    words: str
    cut: bool = False
    higher: bool = False


def plan_export(adapter: Adapter, component: str, form: str | None, dtype: torch.dtype = torch.float32) -> Export:
    """The live adapter, with the remainders below it, in the form that `--lora_export` asks for.

    Args:
        component: of the pipeline, such as "unet".
        form: "truncate", "full_rank" or "fuse"; None chooses truncate where that loses 1 % of the energy at most, else
            full_rank.
        dtype: of the LoRA file.
    """
    if form == "fuse":
        return Export(None, "a whole pipeline, the adapter's update added to its weights")
    made, lost, would_lose = {}, 0.0, 0.0
    if form != "full_rank":
        made = {name: _truncated(adapter, name) for name in adapter.layers}
        lost = would_lose = _share_lost(made.values())
    if form == "full_rank" or (form is None and lost > MOST_LOST):
        made = {name: _exact(adapter, name) for name in adapter.layers}
        lost = _share_lost(made.values())
    layers = {f"{component}.{name}": layer.lora.folded(dtype) for name, layer in made.items()}
    saved = max(layer.rank for layer in layers.values())
    words = _words(adapter.rank, saved, lost, would_lose)
    rounded = "" if dtype == torch.float32 else f", rounded to {str(dtype).removeprefix('torch.')}"
    return Export(layers, words + rounded, cut=lost > NOTHING, higher=saved > adapter.rank)


def plain_shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a denoiser's tensors by the names that they have without the adapter that it has.

    Those of quantised layers are as they were before.
    """
    state = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantisedLinear):
            state[f"{name}.weight"] = module.shape
            del state[f"{name}.scale"]
    return {name.replace(".base_layer.", "."): shape for name, shape in state.items() if ".lora_" not in name}


def _share_lost(made: "Iterable[_Made]") -> float:
    lost, whole = (sum(energies) for energies in zip(*(layer.energies for layer in made), strict=True))
    return lost / whole if whole else 0.0


def _words(trained: int, saved: int, lost: float, would_lose: float) -> str:
    """What a file is; `would_lose` is what it would lose if it were cut to the rank that was trained, if known."""
    if lost > NOTHING:
        share = f"{100 * lost:.3g} %" if lost >= 1e-4 else "less than 0.01 %"
        return f"a LoRA file of rank {saved}, which lost {share} of the update's energy"
    if saved <= trained:
        return f"a LoRA file of rank {saved}"
    if would_lose:
        return (
            f"a LoRA file of rank {saved}, exact: cut to the {trained} trained it would lose "
            f"{100 * would_lose:.3g} % of the update's energy"
        )
    return f"a LoRA file of rank {saved}, exact: more than the {trained} trained"


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

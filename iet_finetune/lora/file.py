"""The layers of LoRA files in diffusers' format: merged exactly, and written."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import written_beside
from .factors import as_matrix, as_weights, fold_scaling
from .low_rank import compress, weighted_sum
from .spectra import LowRank

HEADER = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")


class LoraLayer(NamedTuple):
    """One layer of an adapter; its update is scaling · up · down.

    Attributes:
        up: (out, r) of a linear layer or (out, r, 1, 1) of a convolution; peft's lora_B, of any floating dtype.
        down: (r, in) or (r, in, kh, kw); peft's lora_A.
        scaling: alpha / r, or alpha / √r with rsLoRA; positive.
    """

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """r, the width of the factors."""
        return self.down.shape[0]

    def update(self) -> LowRank:
        """The update as the factors of one matrix (out, in·kh·kw), float64, the scaling in it."""
        return fold_scaling(as_matrix(self.up, self.down), self.scaling)


class MergedLora(NamedTuple):
    """What `merge_loras` gives.

    Attributes:
        layers: the merged adapter, fp32, scaling 1.
        lost: for each layer the energy (squared Frobenius norm) that `rank` cut off and that of the exact update.
    """

    layers: dict[str, LoraLayer]
    lost: dict[str, tuple[float, float]]


@torch.no_grad()
def merge_loras(
    files: Sequence[Mapping[str, LoraLayer]], weights: Sequence[float], rank: int | None = None
) -> MergedLora:
    """Σ_k w_k update_k / Σ_k w_k of every layer, exactly; a layer that an adapter does not have is 0 there.

    Args:
        files: at least one; a layer has the same shape wherever it occurs, whatever its rank and scaling.
        weights: one positive number each.
        rank: the best approximation of this rank where more would be needed; None keeps all that is needed, which is
            at most the sum of the ranks.

    Raises:
        ValueError: other number of weights, a weight that is not positive, or different shapes.
    """
    total, layers, lost = sum(weights), {}, {}
    for name in dict.fromkeys(chain(*files)):
        present = [(file[name], weight) for file, weight in zip(files, weights, strict=True) if name in file]
        updates = [layer.update() for layer, _ in present]
        exact = compress(weighted_sum(updates, [weight for _, weight in present], total))
        # The columns of balanced factors have the length √σ.
        energies = exact.up.square().sum(dim=0).square()
        kept = LowRank(exact.up[:, :rank], exact.down[:rank])
        lost[name] = energies[kept.rank :].sum().item(), energies.sum().item()
        like = present[0][0]
        layers[name] = LoraLayer(*as_weights(_at_least_one(kept), like.up.float(), like.down.float()), 1.0)
    return MergedLora(layers, lost)


def write_lora(path: Path, layers: Mapping[str, LoraLayer]) -> None:
    """Writes layers, named as `read_lora` names them, for `pipeline.load_lora_weights`; complete or absent.

    Rank and alpha stand in the header, with patterns where layers differ. Dtypes stay as they are. The tensors have
    the names that diffusers' training scripts give them.

    Args:
        path: the file; its folder exists.
        layers: at least one, each of a rank of at least 1.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for name, layer in layers.items():
        down, up = _names_of_factors(name)
        tensors[down], tensors[up] = layer.down.detach().contiguous(), layer.up.detach().contiguous()
    tensors = _named_as_scripts_do(tensors)
    for component in dict.fromkeys(name.split(".")[0] for name in layers):
        own = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{component}.")}
        header |= {f"{component}.{key}": value for key, value in _lora_config(component, own).items()}
    with written_beside(path) as partial:
        text = json.dumps(header, indent=2, sort_keys=True)
        save_file(tensors, partial, metadata={"format": "pt", HEADER: text})
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Puts a safetensors file's metadata in order: it is written in another one each time, and so in other bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the same words in another order"
        file.seek(8)
        file.write(text.ljust(size))


def _at_least_one(matrix: LowRank) -> LowRank:
    # An update of 0 stays in the file, so that the adapter keeps its layers.
    if matrix.rank:
        return matrix
    return LowRank(matrix.up.new_zeros(matrix.up.shape[0], 1), matrix.down.new_zeros(1, matrix.down.shape[1]))


def _names_of_factors(layer: str) -> tuple[str, str]:
    """The tensors' names: down, up."""
    if layer.startswith("text_encoder"):
        # diffusers reads lora_A and lora_B in a text encoder only if it has attention layers among them.
        return f"{layer}.lora_linear_layer.down.weight", f"{layer}.lora_linear_layer.up.weight"
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def _named_as_scripts_do(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's attention projections as `to_q.lora.down`, as the scripts name them, which train nothing else there.

    Not where the UNet has other layers too, which the same converter leaves as `lora_A`: diffusers takes the style of
    all from the first tensor, and silently loads only those named in that.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    converted = convert_state_dict_to_diffusers(unet) if unet else {}
    if any(".lora_A." in key for key in converted):
        return tensors
    return converted | {key: tensor for key, tensor in tensors.items() if key not in unet}


def _lora_config(component: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The arguments of a `LoraConfig` that gives every layer its rank and scaling, as diffusers and peft read them."""
    names = {name: _header_name(component, name) for name in layers}
    ranks = {names[name]: layer.rank for name, layer in layers.items()}
    alphas = {names[name]: _whole(layer.rank * layer.scaling) for name, layer in layers.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    anchor = "" if component.startswith("text_encoder") else "^"
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"{anchor}{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"{anchor}{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(names.values()),
        "use_dora": False,
        "lora_bias": False,
    }


def _header_name(component: str, module: str) -> str:
    # peft matches from any dot on, so this holds in encoders with `text_model.` and without.
    return module.removeprefix("text_model.") if component.startswith("text_encoder") else module


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]

"""The layers of LoRA files: merged exactly, and written."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ..files import written_beside
from .factors import as_weights
from .formats import DIFFUSERS, KOHYA, common_format, named_tensors
from .kohya import is_xl
from .layer import LoraLayer
from .low_rank import compress, weighted_sum
from .spectra import LowRank

HEADER = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY


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


def write_lora(path: Path, layers: Mapping[str, LoraLayer], form: str | None = None) -> None:
    """Writes layers, named as `read_lora` names them, for `pipeline.load_lora_weights` and other tools.

    The scaling is moved into the matrices, as `LoraLayer.folded` says, so that a tool needs no alpha to load them at
    full strength. Ranks stand in the header as diffusers writes it, with an alpha of each layer's rank. The file
    is complete or absent.

    Args:
        path: the file; its folder exists.
        layers: at least one, each of a rank of at least 1.
        form: "diffusers" or "kohya" names; None takes those that diffusers, ComfyUI and A1111 all match.

    Raises:
        UserError: kohya's format has no names for a layer.
    """
    form = form or common_format(layers)
    folded = {name: layer.folded() for name, layer in layers.items()}
    tensors = named_tensors(folded, form)
    metadata = {"format": "pt"}
    # Where kohya has several layers as one, ranks are no longer those of diffusers' modules.
    if form == DIFFUSERS or not any(name.startswith("transformer.") for name in layers):
        metadata[HEADER] = json.dumps(_header(folded), indent=2, sort_keys=True)
    if form == KOHYA and is_xl(layers):
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"  # as kohya's scripts; A1111 lists a file by it
    with written_beside(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        _sort_metadata(partial)


def _header(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    for component in dict.fromkeys(name.split(".")[0] for name in layers):
        own = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{component}.")}
        header |= {f"{component}.{key}": value for key, value in _lora_config(component, own).items()}
    return header


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


def _lora_config(component: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """The arguments of a `LoraConfig` that gives every layer its rank and the scaling 1, as diffusers and peft do."""
    ranks = {_header_name(component, name): layer.rank for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    anchor = "" if component.startswith("text_encoder") else "^"
    others = {f"{anchor}{name}": value for name, value in ranks.items() if value != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "lora_bias": False,
    }


def _header_name(component: str, module: str) -> str:
    # peft matches from any dot on, so this holds in encoders with `text_model.` and without.
    return module.removeprefix("text_model.") if component.startswith("text_encoder") else module

"""LoRA files in diffusers' format: read in every style of names that it loads, merged exactly, written in one."""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError, one_line
from ..files import written_beside
from .low_rank import LowRank, as_matrix, as_weights, compress, fold_scaling, lora_scaling, weighted_sum

HEADER = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")
# The styles of diffusers and peft, of years: x.lora_A, x.lora.down, x.lora_linear_layer.down, x_lora.down.
_KEY = re.compile(r"(.+?)(?:(_lora)\.(down|up)|\.lora(?:_linear_layer)?\.(down|up)|\.lora_([AB]))\.weight")
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(down|up)\.weight|(alpha))")
# What diffusers' converter knows the names of without the configuration of the UNet.
_KOHYA_LAYER = re.compile(r"lora_(unet_(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb)|te[12]?_text_)")
_DORA = ("lora_magnitude_vector", "dora_scale")
# The attention projections of a text encoder, in the oldest style, which named them like a UNet's.
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


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


def read_lora(path: Path) -> dict[str, LoraLayer]:
    """The layers of a LoRA file by name: component and module, as in `unet.mid_block.attentions.0.proj_in`.

    Any style of names that diffusers loads for a whole pipeline, and kohya's for Stable Diffusion. Layers of CLIP text
    encoders are named with `text_model.`, as transformers before 5 has them. The scaling follows from the header, or
    from kohya's `alpha` tensors; without either it is 1, as in diffusers.

    Raises:
        UserError: not a safetensors file, not a LoRA of a pipeline, DoRA, a factor or pair that does not fit, a number
            that is not finite, or a header that cannot be read.
    """
    tensors, header = _load(path)
    if dora := next((key for key in tensors if any(word in key for word in _DORA)), None):
        raise UserError(f"`{path}` is a DoRA adapter (`{dora}`), whose update is not low-rank: it cannot be merged.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, part = _place(path, key)
        if parts.setdefault(layer, {}).setdefault(part, tensor) is not tensor:
            raise UserError(f"`{path}` holds the {part} of `{layer}` twice, in two styles of names.")
    settings = {component: _settings(header, component) for component in COMPONENTS}
    return {layer: _layer(path, layer, parts[layer], settings[layer.split(".")[0]]) for layer in parts}


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


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it cannot be iterated
            header = json.loads((file.metadata() or {}).get(HEADER) or "{}")
    except (OSError, SafetensorError) as error:
        raise UserError(f"`{path}` is not a safetensors file: {one_line(error)}.") from None
    except ValueError as error:
        raise UserError(f"the header of `{path}` is not JSON: {one_line(error)}.") from None
    if not tensors or not isinstance(header, dict):
        raise UserError(f"`{path}` is not a LoRA file: it holds no tensors, or its header is not a mapping.")
    return tensors, header


def _place(path: Path, key: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and `down`, `up` or `alpha`."""
    if kohya := _KOHYA.fullmatch(key):
        if not _KOHYA_LAYER.match(key):
            raise UserError(
                f"`{path}` names its layers as the original code of another model does (`{key}`): load it in "
                "diffusers, save it with `save_lora_weights`, and merge that."
            )
        return _kohya_layer(kohya[1]), kohya[2] or kohya[3]
    layer, part = key.removesuffix(".alpha").removesuffix(".lora"), "alpha"
    if not key.endswith(".alpha"):
        found = _KEY.fullmatch(key)
        if found is None:
            raise UserError(f"`{path}` is not a LoRA file that can be merged: it has the tensor `{key}`.")
        layer, part = found[1], _SIDES[found[3] or found[4] or found[5]]
        layer = _modern(layer) if found[2] else layer
    if layer.split(".")[0] not in COMPONENTS:
        raise UserError(
            f"`{path}` does not say which component `{key}` belongs to (`unet.`, `transformer.`, `text_encoder.`): "
            "save the adapter with the pipeline's `save_lora_weights`."
        )
    return _with_text_model(layer.replace(".processor.", ".")), part


def _modern(layer: str) -> str:
    head, _, last = layer.rpartition(".")
    if layer.startswith("text_encoder"):
        return f"{head}.{_TEXT_NAMES.get(last, last)}"
    return f"{layer}.0" if last == "to_out" else layer


def _with_text_model(layer: str) -> str:
    # Files from transformers 5 lack it, and diffusers takes it out again where the encoder does.
    return re.sub(r"^(text_encoder\w*)\.(?=(encoder\.layers|embeddings|final_layer_norm)\.)", r"\1.text_model.", layer)


@functools.cache
def _kohya_layer(name: str) -> str:
    """The layer that kohya's scripts call `name`, by diffusers' own converter, which only looks at the names."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    pair = {f"{name}.lora_{side}.weight": torch.empty(0) for side in ("down", "up")}
    converted, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(pair)
    return _place(Path(name), next(iter(converted)))[0]


def _settings(header: Mapping[str, Any], component: str) -> dict[str, Any]:
    """A component's part of the header: the arguments of its `LoraConfig`."""
    start = f"{component}."
    return {key.removeprefix(start): value for key, value in header.items() if key.startswith(start)}


def _layer(path: Path, name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraLayer:
    if not {"down", "up"} <= parts.keys():
        raise UserError(f"`{path}` holds only one of the two factors of `{name}`.")
    up, down = parts["up"], parts["down"]
    try:
        if min(up.dim(), down.dim()) < 2 or not down.numel():
            raise ValueError(f"factors of shape {tuple(up.shape)} and {tuple(down.shape)} make no update")
        as_matrix(up, down)
        scaling = _scaling(name, down.shape[0], parts.get("alpha"), settings)
    except (ValueError, TypeError, AttributeError, RuntimeError, re.error) as error:
        raise UserError(f"`{path}` cannot be read at `{name}`: {one_line(error)}.") from None
    if not all(factor.is_floating_point() and factor.float().isfinite().all() for factor in (up, down)):
        raise UserError(f"`{path}` has numbers in `{name}` that are not finite or not floating-point.")
    return LoraLayer(up, down, scaling)


def _scaling(name: str, rank: int, own_alpha: Tensor | None, settings: Mapping[str, Any]) -> float:
    if own_alpha is not None:
        alpha, use_rslora = own_alpha.item(), False
    elif settings:
        if settings.get("use_dora"):
            raise ValueError("its header says DoRA, whose update is not low-rank")
        # 8 is what `LoraConfig` takes where the header is silent.
        patterns, default = settings.get("alpha_pattern") or {}, settings.get("lora_alpha", 8)
        alpha, use_rslora = _by_pattern(patterns, name, default), bool(settings.get("use_rslora"))
    else:
        return 1.0
    if not 0 < alpha < math.inf:
        raise ValueError(f"its alpha must be positive, not {alpha}")
    return lora_scaling(rank, alpha, use_rslora)


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """peft's rule: the first pattern that matches the module's name from a dot on to its end."""
    module = name.partition(".")[2]
    for pattern, value in patterns.items():
        for candidate in (module, module.removeprefix("text_model.")):
            if re.match(rf"(.*\.)?({pattern})$", candidate):
                return value
    return default


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

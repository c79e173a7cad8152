"""LoRA files of pipelines read, in every style of names that diffusers loads."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, one_line
from .factors import as_matrix, lora_scaling
from .file import HEADER
from .formats import DIFFUSERS, named_tensors
from .kohya import diffusers_key
from .layer import COMPONENTS, LoraLayer
from .original import from_original, is_original

# The styles of diffusers and peft, of years: x.lora_A, x.lora.down, x.lora_linear_layer.down, x_lora.down, and
# x.lora_down of other trainers.
_KEY = re.compile(r"(.+?)(?:(_lora)\.(down|up)|\.lora(?:_linear_layer)?\.(down|up)|\.lora_([AB]|down|up))\.weight")
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# A layer of the original code, with underscores as kohya's scripts write it or with dots as BFL and ComfyUI do.
_KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(down|up|A|B)\.weight|(alpha))")
_ORIGINAL = re.compile(r"((?:model\.)?diffusion_model\.)?(.+?)\.(?:lora_(down|up|A|B)\.weight|(alpha))")
_FUSED = "original code: "  # begins the name of a layer that may be several in diffusers
_DORA = ("lora_magnitude_vector", "dora_scale")
# The attention projections of a text encoder, in the oldest style, which named them like a UNet's.
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read_lora(path: Path) -> dict[str, LoraLayer]:
    """The layers of a LoRA file by name: component and module, as in `unet.mid_block.attentions.0.proj_in`.

    Any style of names that diffusers loads for a whole pipeline; kohya's for Stable Diffusion, Flux and SD 3; and the
    original code's for Flux, SD 3 and Stable Diffusion XL. Layers of CLIP text encoders are named with `text_model.`,
    as transformers before 5 has them. The scaling follows from the header, or from kohya's `alpha` tensors; without
    either it is 1, as in diffusers.

    Raises:
        UserError: not a safetensors file, not a LoRA of a pipeline, DoRA, a factor or pair that does not fit, a number
            that is not finite, or a header that cannot be read.
    """
    tensors, header = _load(path)
    if dora := next((key for key in tensors if any(word in key for word in _DORA)), None):
        raise UserError(f"`{path}` is a DoRA adapter (`{dora}`), whose update is not low-rank: it cannot be merged.")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        place, part = _place(path, key)
        if parts.setdefault(place, {}).setdefault(part, tensor) is not tensor:
            raise UserError(f"`{path}` holds the {part} of `{place}` twice, in two styles of names.")
    settings = {component: _settings(header, component) for component in COMPONENTS}
    layers: dict[str, LoraLayer] = {}
    for name, own in parts.items():
        for module, layer in _in_diffusers(path, name, _layer(path, name, own, settings.get(name.split(".")[0], {}))):
            if module in layers:
                raise UserError(f"`{path}` holds `{module}` twice, in two styles of names.")
            layers[module] = layer
    return layers


def foreign_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a LoRA file that diffusers does not load, or not all of, under names that it does.

    None for a file in names that diffusers loads itself, which is not looked at further.

    Raises:
        UserError: as `read_lora`.
    """
    tensors, _ = _load(path)
    if not any(_is_foreign(key) for key in tensors):
        return None
    return named_tensors({name: layer.folded() for name, layer in read_lora(path).items()}, DIFFUSERS)


def _is_foreign(key: str) -> bool:
    # It leaves these out, or their alpha.
    styles = r"(model\.)?diffusion_model\.|(unet|transformer|text_encoder\w*)\..+\.lora_(down|up)\."
    return _original_layer(key) is not None or re.match(styles, key) is not None


def _original_layer(key: str) -> str | None:
    """The layer of Flux or SD 3 that kohya's or an original key belongs to, with underscores; None for other keys."""
    found = _KOHYA.fullmatch(key) or _ORIGINAL.fullmatch(key)
    layer = re.sub(r"^lora_unet_", "", found[1] if found.re is _KOHYA else found[2]).replace(".", "_") if found else ""
    # `x_embedder` and others are also modules of diffusers, whose names begin with the component.
    return layer if is_original(layer) else None


def _in_diffusers(path: Path, name: str, layer: LoraLayer) -> Iterable[tuple[str, LoraLayer]]:
    if not name.startswith(_FUSED):
        return [(name, layer)]
    try:
        modules = from_original(name.removeprefix(_FUSED), layer)
    except ValueError as error:
        raise UserError(f"`{path}` cannot be read at `{name.removeprefix(_FUSED)}`: {one_line(error)}.") from None
    return [(f"transformer.{module}", part) for module, part in modules.items()]


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
    if original := _original_layer(key):
        return _FUSED + original, _part(key)
    if name := _kohya_name(key):
        converted = diffusers_key(name)
        if converted is None:
            raise UserError(
                f"`{path}` names its layers as the original code of another model does (`{key}`): load it in "
                "diffusers, save it with `save_lora_weights`, and give that."
            )
        return _place(path, converted)[0], _part(key)
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


def _kohya_name(key: str) -> str | None:
    """kohya's name of the layer, if the key has it or is the original code's behind `diffusion_model.`."""
    if found := _KOHYA.fullmatch(key):
        return found[1]
    found = _ORIGINAL.fullmatch(key)
    return f"lora_unet_{found[2].replace('.', '_')}" if found and found[1] else None


def _part(key: str) -> str:
    return "alpha" if key.endswith(".alpha") else _SIDES[key.removesuffix(".weight").rpartition("lora_")[2]]


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

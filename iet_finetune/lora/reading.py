"""LoRA files of pipelines read, in every style of names that diffusers loads."""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, one_line
from .factors import as_matrix, lora_scaling
from .file import COMPONENTS, HEADER, LoraLayer

# The styles of diffusers and peft, of years: x.lora_A, x.lora.down, x.lora_linear_layer.down, x_lora.down.
_KEY = re.compile(r"(.+?)(?:(_lora)\.(down|up)|\.lora(?:_linear_layer)?\.(down|up)|\.lora_([AB]))\.weight")
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_KOHYA = re.compile(r"(lora_(?:unet|te|te1|te2)_[^.]+)\.(?:lora_(down|up)\.weight|(alpha))")
# What diffusers' converter knows the names of without the configuration of the UNet.
_KOHYA_LAYER = re.compile(r"lora_(unet_(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb)|te[12]?_text_)")
_DORA = ("lora_magnitude_vector", "dora_scale")
# The attention projections of a text encoder, in the oldest style, which named them like a UNet's.
_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


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

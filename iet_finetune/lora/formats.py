"""The formats of a LoRA file: which names its tensors have, and which tools match them (docs/lora-files.md)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from .kohya import is_xl, kohya_name
from .layer import LoraLayer
from .original import can_be_original, to_original

DIFFUSERS, KOHYA = "diffusers", "kohya"
_TRANSFORMER = "transformer."


def common_format(layers: Iterable[str]) -> str:
    """The format that diffusers, ComfyUI and A1111 match, each as far as it knows the model: kohya's for a UNet.

    With transformers they match diffusers' names. Of a text encoder whose output projections have no adapter diffusers
    reads no other.
    """
    components = {name.split(".")[0] for name in layers}
    if "unet" not in components or not components <= {"unet", "text_encoder", "text_encoder_2"}:
        return DIFFUSERS
    for component in components - {"unet"}:
        last = {name.rpartition(".")[2] for name in layers if name.startswith(f"{component}.")}
        if last & {"q_proj", "k_proj", "v_proj"} and "out_proj" not in last:
            return DIFFUSERS
    return KOHYA


def check_kohya(layers: Iterable[str], subject: str) -> None:
    """Raises a `UserError` that begins with `subject` if kohya's format has no names for one of these layers."""
    names = list(layers)
    modules = [name.removeprefix(_TRANSFORMER) for name in names if name.startswith(_TRANSFORMER)]
    strange = {name.split(".")[0] for name in names} - {"unet", "transformer", "text_encoder", "text_encoder_2"}
    if strange or not can_be_original(modules):
        lacking = f"{min(strange)}s" if strange else "this transformer: it has them for those of Flux and SD 3"
        raise UserError(f"{subject}: kohya's format has no names for {lacking}. Choose `diffusers`.")


def named_tensors(layers: Mapping[str, LoraLayer], form: str) -> dict[str, Tensor]:
    """The file's tensors.

    Args:
        layers: named as `read_lora` names them, with scaling 1.
        form: "diffusers" or "kohya".

    Raises:
        UserError: kohya's format has no names for a layer.
    """
    if form == DIFFUSERS:
        named = {_factors_in_diffusers(name): layer for name, layer in layers.items()}
    else:
        check_kohya(layers, "the LoRA file")
        named = {(f"{name}.lora_down", f"{name}.lora_up"): layer for name, layer in _as_kohya(layers).items()}
    tensors: dict[str, Tensor] = {}
    for (down, up), layer in named.items():
        tensors[f"{down}.weight"] = layer.down.detach().contiguous()
        tensors[f"{up}.weight"] = layer.up.detach().contiguous()
    return tensors | (_alphas(tensors) if form == KOHYA and _of_transformer(layers) else {})


def _factors_in_diffusers(layer: str) -> tuple[str, str]:
    """The factors' names: down, up."""
    if layer.startswith("text_encoder"):
        # diffusers reads lora_A and lora_B in a text encoder only if it has attention layers among them.
        return f"{layer}.lora_linear_layer.down", f"{layer}.lora_linear_layer.up"
    return f"{layer}.lora_A", f"{layer}.lora_B"


def _of_transformer(layers: Iterable[str]) -> bool:
    return any(name.startswith(_TRANSFORMER) for name in layers)


def _alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An alpha of its rank for every layer: without one kohya's script for SD 3 ends (networks/lora_sd3.py).

    A UNet's file has none: where ranks differ, diffusers takes the most common alpha for all layers.
    """
    end = ".lora_down.weight"
    return {
        f"{name.removesuffix(end)}.alpha": torch.tensor(float(down.shape[0]))
        for name, down in tensors.items()
        if name.endswith(end)
    }


def _as_kohya(layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    inside = {name.removeprefix(_TRANSFORMER): each for name, each in layers.items() if name.startswith(_TRANSFORMER)}
    others = {name: layer for name, layer in layers.items() if not name.startswith(_TRANSFORMER)}
    original = is_xl(layers)
    two = original or bool(inside) or any(name.startswith("text_encoder_2.") for name in layers)
    return {
        **{kohya_name(name, original, two): layer for name, layer in others.items()},
        **{f"lora_unet_{name}": layer for name, layer in to_original(inside).items()},
    }

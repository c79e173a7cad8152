"""kohya's names of a UNet's and CLIP text encoders' layers, which diffusers, ComfyUI and A1111 all match.

A name is `lora_unet_`, `lora_te_`, `lora_te1_` or `lora_te2_` and the module's path with underscores. For Stable
Diffusion XL it is the path in the original code, as in kohya's scripts: of `up_blocks.0.upsamplers.0.conv` A1111 knows
no other (`convert_diffusers_name_to_compvis` in extensions-builtin/Lora/networks.py), and of `add_embedding` diffusers
does not (`_convert_unet_lora_key` in loaders/lora_conversion_utils.py). diffusers has no converter in this direction
for them: `convert_state_dict_to_kohya` only writes underscores.
"""

import functools
import re
from collections.abc import Mapping
from types import SimpleNamespace

import torch

from .layer import LoraLayer

_UNET, _TEXT = "lora_unet_", {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
}
_ADDED = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
_IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)")
_IN_MIDDLE = re.compile(r"mid_block\.(resnet|attention)s\.(\d+)\.(.+)")
# Attention that Stable Diffusion XL has and 1 and 2 do not, and its width there.
_XL_ATTENTION, _XL_WIDTH = re.compile(r"unet\.(up_blocks\.0\.attentions|.*transformer_blocks\.[1-9])"), 1280
_LAYERS_PER_BLOCK = 2  # of the UNets of Stable Diffusion 1, 2 and XL
# What diffusers' converter has names for: its own paths, and the original code's.
_KNOWN = re.compile(
    r"lora_(unet_(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_emb|input_blocks|middle_block|output_blocks"
    r"|label_emb|out_2)|te[12]?_text_)"
)


def is_xl(layers: Mapping[str, LoraLayer]) -> bool:
    """Whether the layers show that they are of Stable Diffusion XL, at its real size."""
    return any(
        _XL_ATTENTION.match(name) and _XL_WIDTH in (layer.up.shape[0], layer.down.shape[1])
        for name, layer in layers.items()
    )


def kohya_name(layer: str, original: bool, two_encoders: bool) -> str:
    """kohya's name of a layer.

    Args:
        layer: component and module, as `read_lora` names them.
        original: whether a UNet's layers have the original code's paths, which are those of Stable Diffusion XL here.
        two_encoders: whether a text encoder is the first of two.

    Raises:
        ValueError: kohya has no names for this component; the text is its name.
    """
    component, _, module = layer.partition(".")
    if component == "unet":
        return _UNET + _ADDED.get(module, _original(module) if original else module.replace(".", "_"))
    if component not in _TEXT:
        raise ValueError(component)
    return (_TEXT[component] if two_encoders else "lora_te_") + module.replace(".", "_")


def _original(module: str) -> str:
    """A module of the XL UNet in the original code: counted through, three to a block, resnet before attention."""
    if found := _IN_BLOCK.fullmatch(module):
        side, block, kind, place, rest = found.groups()
        first = 3 * int(block) + (side == "down")
        if kind == "downsampler":
            return f"input_blocks_{first + 2}_0_op"
        if kind == "upsampler":
            return f"output_blocks_{first + 2}_2_conv"
        name = f"{'input' if side == 'down' else 'output'}_blocks_{first + int(place)}_{int(kind == 'attention')}"
    elif found := _IN_MIDDLE.fullmatch(module):
        kind, place, rest = found.groups()
        name = f"middle_block_{1 if kind == 'attention' else 2 * int(place)}"
    else:
        return _OUTSIDE_BLOCKS.get(module, module.replace(".", "_"))
    return f"{name}_{_IN_RESNET.get(rest, rest.replace('.', '_')) if kind == 'resnet' else rest.replace('.', '_')}"


@functools.cache
def diffusers_key(name: str) -> str | None:
    """What diffusers' own converter makes of the key of kohya's layer `name`; None if it does not know it."""
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    for module, original in _ADDED.items():  # which it does not know by their own path
        name = name.replace(f"{_UNET}{module.replace('.', '_')}", _UNET + original)
    if not _KNOWN.match(name):
        return None
    # It takes what stands second in a block for attention, but Stable Diffusion 1 has an upsampler there too.
    name = re.sub(r"^(lora_unet_output_blocks_\d+)_1_conv$", r"\1_2_conv", name)
    pair = {f"{name}.lora_{side}.weight": torch.empty(0) for side in ("down", "up")}
    config = SimpleNamespace(layers_per_block=_LAYERS_PER_BLOCK)
    try:
        converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(pair, unet_config=config)
    except (ValueError, IndexError):
        return None
    return next(iter(converted))

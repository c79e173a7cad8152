"""Stable Diffusion 1.x and XL as one checkpoint file in the layout of the original code (CompVis, Stability AI).

Written from the names of the modules in the original code, and not from a converter: `ldm/modules/diffusionmodules/
openaimodel.py` and `model.py` in CompVis/latent-diffusion, and `src/open_clip/transformer.py` in
mlfoundations/open_clip.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET_OF_UNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS_OF_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ATTENTION_OF_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, unet: Any) -> str:
    """`model.diffusion_model` without its beginning; blocks of a level are counted through, a down-sampling too."""
    module, kind = name.rsplit(".", 1)
    if module in ENDS_OF_UNET:
        return f"{ENDS_OF_UNET[module]}.{kind}"
    side, rest = re.fullmatch(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(.*)", name).groups()
    part, number, inner = re.fullmatch(r"(\w+)\.(\d+)\.(.*)", rest).groups()
    if part == "resnets":
        layer, of_layer = inner.split(".", 1)
        inner = f"{RESNET_OF_UNET[layer]}.{of_layer}"
    level, per_level = int(side.split(".")[-1]) if "." in side else 0, unet.config.layers_per_block + 1
    if side == "mid_block":
        return f"middle_block.{2 * int(number) if part == 'resnets' else 1}.{inner}"
    if side.startswith("down"):
        place = 1 + level * per_level + int(number)
        if part == "downsamplers":
            return f"input_blocks.{(level + 1) * per_level}.0.{inner.replace('conv', 'op')}"
        return f"input_blocks.{place}.{0 if part == 'resnets' else 1}.{inner}"
    if part == "upsamplers":
        after = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
        return f"output_blocks.{(level + 1) * per_level - 1}.{after}.{inner}"
    return f"output_blocks.{level * per_level + int(number)}.{0 if part == 'resnets' else 1}.{inner}"


def vae_name(name: str, levels: int) -> str:
    """`first_stage_model` without its beginning; levels of the decoder are counted from the finest."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}.block.{found[2]}", name
    )
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for ours, original in ATTENTION_OF_VAE.items():
            name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{original}.")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
}


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """SDXL's second text encoder: queries, keys and values in one matrix, the projection on its side."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    made = {"text_projection": tensors.pop("text_projection.weight").T}
    for name, tensor in tensors.items():
        for ours, original in OPEN_CLIP.items():
            name = name.replace(ours, original)
        if ".q_proj." in name:
            place, kind = name.split(".self_attn.q_proj.")
            start = name.replace("transformer.resblocks", "encoder.layers").removesuffix(f".q_proj.{kind}")
            parts = [tensors[f"{start}.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{place}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            made[name] = tensor
    return made


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint of Stable Diffusion 1.x, or of XL where there are two text encoders."""
    tensors = {
        f"model.diffusion_model.{unet_name(name, pipeline.unet)}": tensor
        for name, tensor in pipeline.unet.state_dict().items()
    }
    levels = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        original = f"first_stage_model.{vae_name(name, levels)}"
        # Attention of the VAE is made of convolutions there.
        is_matrix = "attn_1" in original and tensor.ndim == 2
        tensors[original] = tensor[:, :, None, None] if is_matrix else tensor
    is_xl = "text_encoder_2" in pipeline.components
    first = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"{first}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if is_xl:
        second = open_clip(pipeline.text_encoder_2)
        tensors |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def save_original(
    pipeline: Any, file: Path, changed: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Writes a checkpoint file and returns it; `changed` are tensors beside or instead of the pipeline's own."""
    tensors = {**original_layout(pipeline), **(changed or {})}
    save_file({name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}, file)
    return file

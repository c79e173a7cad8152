"""What the benchmarks train: Stable Diffusion pipelines with random weights and folders of noise images."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from iet_finetune.families.tiny import tiny_tokenizer

_WORD_LENGTH, _TEXT_WIDTH = 16, 32


def build_unet(channels: tuple[int, ...]) -> UNet2DConditionModel:
    """A UNet with random weights; so many channels at each level, multiples of 8; all levels but the first attend."""
    deeper = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deeper),
        up_block_types=(*["CrossAttnUpBlock2D"] * deeper, "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def save_pipeline(folder: Path, channels: tuple[int, ...], vae_channels: tuple[int, ...] = (8, 8, 8)) -> int:
    """Saves a pipeline, and returns its UNet's number of parameters.

    Args:
        channels: of the UNet at each level.
        vae_channels: of the VAE at each level; each but the last halves the side, so that 3 make a quarter of it.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(_WORD_LENGTH)
    unet = build_unet(channels)
    pipeline = StableDiffusionPipeline(
        vae=_vae(vae_channels),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return sum(parameter.numel() for parameter in unet.parameters())


def save_tiny_sd(folder: Path) -> Path:
    """A tiny Stable Diffusion for images of 64 pixels: a UNet of 1 M parameters, latents of an eighth of the side."""
    save_pipeline(folder, (32, 64), vae_channels=(16, 32, 64, 64))
    return folder


def save_small_sd(folder: Path) -> Path:
    """Stable Diffusion in small, for images of 64 pixels: latents of an eighth of the side, a VAE of four levels.

    Its widths are such that encoding an image takes about as much of a step's arithmetic as with Stable Diffusion 1.5
    at 512 pixels; `operations` counts it.
    """
    save_pipeline(folder, (56, 112), vae_channels=(16, 32, 64, 64))
    return folder


def operations(vae: AutoencoderKL, unet: UNet2DConditionModel, resolution: int) -> tuple[float, float]:
    """Floating-point operations of encoding one image, and of the UNet's forward and backward pass over it."""
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    device = unet.device
    with FlopCounterMode(display=False) as encode, torch.no_grad():
        vae.encode(torch.zeros(1, 3, resolution, resolution, device=device))
    text = torch.zeros(1, _WORD_LENGTH, unet.config.cross_attention_dim, device=device)
    with FlopCounterMode(display=False) as denoise:
        unet(torch.zeros(1, 4, side, side, device=device), 0, text, return_dict=False)[0].sum().backward()
    unet.zero_grad()
    return encode.get_total_flops(), denoise.get_total_flops()


def sd15() -> tuple[AutoencoderKL, UNet2DConditionModel]:
    """The VAE and the UNet of Stable Diffusion 1.5 without numbers, to count their operations at 512 pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        return vae, UNet2DConditionModel(cross_attention_dim=768, sample_size=64)


def save_photos(folder: Path, source: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """The first images of an imagefolder in the size of photos, with grain, as JPEG; returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    for number, row in enumerate(rows):
        with Image.open(source / row["file_name"]) as file:
            pixels = np.asarray(file.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        grain = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        row["file_name"] = f"{number:04d}.jpg"
        Image.fromarray(grain).save(folder / row["file_name"], quality=92)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def save_images(folder: Path, count: int, size: int) -> Path:
    """An imagefolder of so many square pictures of noise with captions; returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"noise {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=_WORD_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _vae(channels: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=4,
        sample_size=32,
    )

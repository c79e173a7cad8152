"""Small image models with random weights, saved as people save real ones, and images to show them."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from iet_finetune.families.tiny import tiny_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def noise(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    """Images (count, size, size, 3) uint8 of coloured noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_processor(folder: Path, kind: str, side: int, mean: float = 0.5, **settings: Any) -> None:
    """The file of an image processor that scales to a square, bicubic, and normalises."""
    values = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
        "do_normalize": True,
        "image_mean": [mean] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values | settings))


def save_model(model: Any, folder: Path, kind: str, size: int, mean: float = 0.5) -> Path:
    """Saves a model with its processor and returns the folder."""
    model.save_pretrained(folder)
    save_processor(folder, kind, size, mean)
    return folder


def _drawn(make: Any, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def save_dinov2(folder: Path, seed: int = 0, mean: float = 0.5) -> Path:
    """A DINOv2 for images of 28 pixels."""
    model = _drawn(lambda: Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **SMALL)), seed)
    return save_model(model, folder, "BitImageProcessor", 28, mean)


def save_vit(folder: Path, with_pooler: bool) -> Path:
    """A ViT; without a pooler where it was trained to classify."""
    kind = ViTModel if with_pooler else ViTForImageClassification
    model = _drawn(lambda: kind(ViTConfig(image_size=28, patch_size=14, **SMALL)), 0)
    return save_model(model, folder, "ViTImageProcessor", 28)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP for images of 28 pixels and captions of 12 tokens, with features of 8 dimensions."""
    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, projection_dim=8, **ends, **SMALL)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=8, **SMALL)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = _drawn(lambda: CLIPModel(config), seed)
    with torch.no_grad():  # as drawn, both projections are so small that all captions look alike
        model.text_projection.weight.mul_(50)
    tokenizer.save_pretrained(folder)
    return save_model(model, folder, "CLIPImageProcessor", 28)


def save_torchscript(file: Path, module: torch.nn.Module) -> Path:
    """A module traced with images of 288 pixels, as SSCD is stored; returns the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(module.eval(), torch.zeros(2, 3, 288, 288), check_trace=False).save(str(file))
    return file

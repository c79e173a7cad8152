"""Small pipelines of the larger text-to-image families, as the tests name them."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from iet_finetune.families.tiny import T5_WIDTH as T5_WIDTH
from iet_finetune.families.tiny import WIDTH as WIDTH
from iet_finetune.families.tiny import tiny_flux, tiny_pixart, tiny_sd3, tiny_sdxl

PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3 without t5": lambda: tiny_sd3(with_t5=False),
    "sd35": lambda: tiny_sd3(newer=True),
    "flux dev": tiny_flux,
    "flux schnell": lambda: tiny_flux(guidance_embeds=False),
    "pixart alpha": tiny_pixart,
    "pixart sigma": lambda: tiny_pixart(sigma=True),
}


def tiny_pipeline(name: str, seed: int = 0, **settings: Any) -> DiffusionPipeline:
    """One of `PIPELINES`, without dropout as `from_pretrained` gives it; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = PIPELINES[name](**settings)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

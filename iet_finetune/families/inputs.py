"""Whether a denoiser is that of a text-to-image model, and not of one that also begins from a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

# Classes of diffusers that draw from a picture with the models of a text-to-image pipeline -> that pipeline.
TEXT_TO_IMAGE = {
    "FluxImg2ImgPipeline": "FluxPipeline",
    "FluxInpaintPipeline": "FluxPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}


def check_inputs(model: str, part: str, taken: int, given: int) -> None:
    """Raises a `UserError` if the denoiser takes other channels than those of the noisy latents.

    The weights of the other channels were trained on a mask and a masked image, or on a picture to edit. A run has
    neither, and zeros in their place would be images that the model never saw.

    Args:
        model: begins the error.
        part: `unet` or `transformer`.
        taken: the denoiser's channels.
        given: the channels of the latents, as the denoiser gets them.
    """
    if taken != given:
        kind = "an inpainting model" if taken == 2 * given + 1 else "no text-to-image model"
        raise UserError(
            f"{model} is {kind}: its {part} takes {taken} channels, and only {given} of them are the noisy image. It "
            "cannot be trained from images and captions alone: give the text-to-image model that it was made from."
        )


def check_stored_inputs(model: str, folder: Path, part: str, factor: int) -> None:
    """As `check_inputs`, from the configuration files of a pipeline, where they say it.

    Args:
        folder: of the pipeline.
        factor: the denoiser's channels by one of the latents, which Flux packs.
    """
    _check(model, part, factor, _read(folder / part), _read(folder / "vae"))


def check_loaded_inputs(pipeline: Any, part: str, factor: int) -> None:
    """As `check_stored_inputs`, of a pipeline in memory."""
    denoiser, vae = (getattr(pipeline.components.get(name), "config", {}) for name in (part, "vae"))
    _check("the pipeline", part, factor, denoiser, vae)


def _check(model: str, part: str, factor: int, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    taken, given = denoiser.get("in_channels"), vae.get("latent_channels")
    if isinstance(taken, int) and isinstance(given, int):
        check_inputs(model, part, taken, factor * given)


def _read(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}

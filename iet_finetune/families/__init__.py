"""One file per pipeline family, and the table that maps pipelines to families."""

import importlib
from dataclasses import replace
from typing import Any

import torch

from ..config.config import Config
from ..config.settings import ModelConfig
from ..errors import UserError
from . import finding
from .base import Conditions, Family, in_chunks
from .finding import PipelineSource, source_of
from .inputs import TEXT_TO_IMAGE, check_loaded_inputs, check_stored_inputs
from .loading import amend_saved, load_as_stored, load_pipeline, move_pipeline, save_pipeline
from .precision import restored, round_pipeline, widen
from .scratch import build_pipeline, scratch_source

__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "PipelineSource",
    "amend_saved",
    "family_class",
    "find_pipeline",
    "in_chunks",
    "load_as_stored",
    "load_family",
    "load_pipeline",
    "move_pipeline",
    "register_family",
    "restored",
    "round_pipeline",
    "save_pipeline",
    "source_of",
    "widen",
]

# Pipeline class in model_index.json -> module and class of its family, or a class from elsewhere.
FAMILIES: dict[str, tuple[str, str] | type[Family]] = {
    "DDIMPipeline": ("unconditional", "Unconditional"),
    "DDPMPipeline": ("unconditional", "Unconditional"),
    "FluxPipeline": ("flux", "Flux"),
    "PixArtAlphaPipeline": ("pixart", "PixArt"),
    "PixArtSigmaPipeline": ("pixart", "PixArt"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3"),
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
}


def register_family(pipeline_class: str, family: type[Family]) -> None:
    """Registers a family from outside this package for pipelines whose model_index.json names this class."""
    FAMILIES[pipeline_class] = family


def find_pipeline(model: ModelConfig) -> PipelineSource:
    """Finds the pipeline on the Hub or on disk, or the recipe to train from scratch; loads no weights.

    Raises:
        UserError: as `finding.find_pipeline` and `scratch.read_recipe`.
    """
    if model.model_config is not None:
        return scratch_source(model.model_config)
    source = finding.find_pipeline(model)
    own = source.class_name
    # SDXL's refiner, which has a class of these, begins from a picture alone.
    if own in FAMILIES or own not in TEXT_TO_IMAGE or source.index.get("requires_aesthetics_score"):
        return source
    return replace(source, class_name=TEXT_TO_IMAGE[own], saved_as=own)


def family_class(source: PipelineSource, model: ModelConfig) -> type[Family]:
    """Returns the family of a pipeline.

    Raises:
        UserError: no family supports this pipeline.
    """
    given = model.pretrained_model_name_or_path
    name = f"`--pretrained_model_name_or_path {given}`" if given else "the pipeline"
    if source.class_name not in FAMILIES:
        raise UserError(
            f"{name} is a {source.class_name}; the families that can be trained are {', '.join(sorted(FAMILIES))}"
            f"{_instead(source)}; docs/add-a-family.md shows how to add one."
        )
    kind = _family(source.class_name)
    if source.folder is not None and kind.channels_per_latent is not None:
        check_stored_inputs(name, source.folder, kind.denoiser_name, kind.channels_per_latent)
    return kind


def _instead(source: PipelineSource) -> str:
    """What would work with a class that draws from a picture."""
    if source.index.get("requires_aesthetics_score"):
        return ", and this is SDXL's refiner: give the base model of SDXL"
    if source.folder is None and (text := TEXT_TO_IMAGE.get(source.class_name)):
        return f": pass `{text}.from_pipe(pipeline)`, which has the same models"
    return ""


def _family(class_name: str) -> type[Family]:
    found = FAMILIES[class_name]
    if isinstance(found, type):
        return found
    module, name = found
    return getattr(importlib.import_module(f".{module}", __name__), name)


def load_family(source: PipelineSource, config: Config, pipeline: Any = None) -> Family:
    """Loads the pipeline as it is stored, or initializes its weights, and wraps it in its family.

    Args:
        pipeline: a pipeline in memory, whose models are moved to the host; None: load it.

    Raises:
        UserError: no family supports this pipeline, or it cannot be loaded.
    """
    kind, name = family_class(source, config.model), config.model.model_config
    if pipeline is not None:
        if kind.channels_per_latent is not None:
            check_loaded_inputs(pipeline, kind.denoiser_name, kind.channels_per_latent)
        move_pipeline(pipeline, torch.device("cpu"))
        return kind(pipeline, config)
    if name is None:
        return kind(load_as_stored(source, config.model), config)
    return kind(build_pipeline(name, config.data.resolution, config.training.seed), config)

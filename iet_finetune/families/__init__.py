"""One file per pipeline family, and the table that maps pipelines to families."""

import importlib
from typing import Any

import torch

from ..config.config import Config
from ..config.settings import ModelConfig
from ..errors import UserError
from . import loading
from .base import Conditions, Family, in_chunks
from .loading import PipelineSource, load_as_stored, load_pipeline, move_pipeline, save_pipeline, source_of
from .precision import round_pipeline, widen
from .scratch import build_pipeline, scratch_source

__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "PipelineSource",
    "family_class",
    "find_pipeline",
    "in_chunks",
    "load_as_stored",
    "load_family",
    "load_pipeline",
    "move_pipeline",
    "register_family",
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
        UserError: as `loading.find_pipeline` and `scratch.read_recipe`.
    """
    return loading.find_pipeline(model) if model.model_config is None else scratch_source(model.model_config)


def family_class(source: PipelineSource, model: ModelConfig) -> type[Family]:
    """Returns the family of a pipeline.

    Raises:
        UserError: no family supports this pipeline.
    """
    if source.class_name not in FAMILIES:
        name = model.pretrained_model_name_or_path
        raise UserError(
            f"{f'`--pretrained_model_name_or_path {name}`' if name else 'the pipeline'} is a {source.class_name}; "
            f"the families that can be trained are {', '.join(sorted(FAMILIES))}; docs/add-a-family.md shows how to "
            "add one."
        )
    found = FAMILIES[source.class_name]
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
        move_pipeline(pipeline, torch.device("cpu"))
        return kind(pipeline, config)
    if name is None:
        return kind(load_as_stored(source, config.model), config)
    return kind(build_pipeline(name, config.data.resolution, config.training.seed), config)

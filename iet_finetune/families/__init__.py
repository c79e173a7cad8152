"""One file a pipeline family, and the table that says which pipeline belongs to which."""

import importlib

from ..config import Config
from ..errors import UserError
from ..settings import ModelConfig
from .base import Conditions, Family, in_chunks
from .loading import PipelineSource, find_pipeline, load_pipeline, save_pipeline

__all__ = [
    "FAMILIES",
    "Conditions",
    "Family",
    "PipelineSource",
    "family_class",
    "find_pipeline",
    "in_chunks",
    "load_family",
    "load_pipeline",
    "save_pipeline",
]

# Pipeline class in model_index.json -> module and class of its family.
FAMILIES = {"StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion")}


def family_class(source: PipelineSource, model: ModelConfig) -> type[Family]:
    """The family that a pipeline belongs to.

    Raises:
        UserError: none knows this pipeline.
    """
    if source.class_name not in FAMILIES:
        raise UserError(
            f"`--pretrained_model_name_or_path {model.pretrained_model_name_or_path}` is a {source.class_name}; "
            f"the families that can be trained are {', '.join(sorted(FAMILIES))}."
        )
    module, name = FAMILIES[source.class_name]
    return getattr(importlib.import_module(f".{module}", __name__), name)


def load_family(source: PipelineSource, config: Config) -> Family:
    """Loads the pipeline and puts it behind its family.

    Raises:
        UserError: no family knows this pipeline, or it cannot be loaded.
    """
    return family_class(source, config.model)(load_pipeline(source, config.model), config)

"""Adapters of tiny pipelines for tests: made by peft, saved by diffusers, with their updates as dense weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_sd
from torch import Tensor, nn

from iet_finetune.config.settings import AdapterConfig
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.lora.adapters import Adapter, add_adapter

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv_in", "linear_1", "ff.net.2"]
TEXT = ["q_proj", "v_proj", "fc1"]

Deltas = dict[str, Tensor]


def add_random_adapter(model: Any, seed: int, **settings: Any) -> None:
    """A LoRA adapter whose factors are drawn from the seed; `settings` are those of `LoraConfig`."""
    model.add_adapter(LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


def adapted_unet(seed: int = 0, **settings: Any) -> tuple[Any, Adapter, Trainable]:
    """The UNet of `tiny_sd()` with a fresh adapter for training, and what is trained; `settings` are the flags'."""
    unet = tiny_sd().unet
    adapter = add_adapter(unet, AdapterConfig(use_lora=True, **settings), ATTENTION, seed)
    return unet, adapter, Trainable(unet, buffers=False)


def deltas_of(model: nn.Module, component: str) -> Deltas:
    """peft's own dense updates of all layers, by component and module."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {f"{component}.{name}": layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def save_adapter(
    folder: Path,
    seed: int,
    unet: Mapping[str, Any] | None = None,
    text_encoder: Mapping[str, Any] | None = None,
    header: bool = True,
) -> Deltas:
    """An adapter of `tiny_sd()` in `folder`, as diffusers saves it; returns its dense updates."""
    pipeline = tiny_sd()
    saved: dict[str, Any] = {}
    deltas: Deltas = {}
    for name, settings in (("unet", unet), ("text_encoder", text_encoder)):
        if settings is not None:
            model = getattr(pipeline, name)
            add_random_adapter(model, seed, **settings)
            deltas |= deltas_of(model, name)
            saved[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
            if header:
                saved |= _collate_lora_metadata({name: model})
    StableDiffusionPipeline.save_lora_weights(folder, **saved)
    return deltas


def with_dense(updates: Sequence[Deltas], weights: Sequence[float]) -> StableDiffusionPipeline:
    """`tiny_sd()` with base + Σ w_k update_k as its weights; a layer without an update counts as 0."""
    pipeline = tiny_sd()
    for deltas, weight in zip(updates, weights, strict=True):
        for name, delta in deltas.items():
            with torch.no_grad():
                module_of(pipeline, name).weight.add_(delta, alpha=weight)
    return pipeline


def module_of(pipeline: StableDiffusionPipeline, name: str) -> Any:
    """A module by component and name in it."""
    component, _, module = name.partition(".")
    return getattr(pipeline, component).get_submodule(module)


@torch.no_grad()
def answer_of(unet: Any) -> Tensor:
    """What a UNet gives for one fixed input."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    hidden = torch.randn(2, 12, 16, generator=generator)
    return unet(latents, torch.tensor([10, 700]), hidden).sample


@torch.no_grad()
def answers(pipeline: StableDiffusionPipeline) -> tuple[Tensor, Tensor]:
    """What the text encoder and the UNet give for one fixed input each."""
    text = pipeline.text_encoder(torch.arange(24).reshape(2, 12)).last_hidden_state
    return text, answer_of(pipeline.unet)


def assert_same_answers(actual: StableDiffusionPipeline, expected: StableDiffusionPipeline) -> None:
    """The forward passes of both agree to 1e-5."""
    for one, other in zip(answers(actual), answers(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

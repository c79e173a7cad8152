"""The pipeline of a run: loaded, checked against the settings, and made ready to be trained."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config.config import Config
from ..config.registry import SKIP_RULES
from ..data.dataset import TrainingImages
from ..distributed.groups import Group
from ..ensemble.trainable import Trainable
from ..errors import UserError
from ..families import Family, PipelineSource, load_family, move_pipeline, round_pipeline, widen
from ..families.precision import HALF
from ..families.prompts import EncodedPrompts
from ..lora.adapted import cast_inputs
from ..lora.adapters import Adapter, add_adapter
from ..lora.beginning import Beginning, begin_from
from ..lora.formats import check_kohya
from ..lora.quantised import layers_to_quantise, quantise
from .compiling import compile_denoiser


@dataclass(frozen=True)
class Model:
    """The pipeline and what of it is trained.

    Attributes:
        source: where the pipeline came from.
        family: the pipeline, behind what is particular to its kind.
        adapter: the LoRA layers of the denoiser, or None if all of it is trained.
        trainable: the tensors that are trained, live on the device.
        beginning: what the adapter began from; None for an update of 0.
        prompts: of the validation images, encoded; None where there are none, or on other ranks than the main one.
    """

    source: PipelineSource
    family: Family
    adapter: Adapter | None
    trainable: Trainable
    beginning: Beginning | None = None
    prompts: EncodedPrompts | None = None


def load_model(
    source: PipelineSource, config: Config, images: TrainingImages, device: torch.device, pipeline: Any = None
) -> Family:
    """Loads the pipeline onto the host, unless it is in memory already; text encoders may be quantised there.

    Args:
        device: on which weights are quantised, one at a time.

    Raises:
        UserError: it cannot be loaded, or takes neither these images nor these settings.
    """
    family = load_family(source, config, pipeline)
    family.take_classes(images.class_names, max(images.classes or (0,)))
    _check_validation(config, family)
    _check_export(config, family)
    _check_quantised(config, source, family)
    if (kind := config.adapter.quantize_encoders) is not None:
        for encoder in _text_encoders(family):
            quantise(encoder, kind, device)
            encoder.to("cpu")
    return family


def prepare_model(
    source: PipelineSource,
    family: Family,
    config: Config,
    accelerator: Accelerator,
    group: Group,
    beginning: Beginning | None = None,
    prompts: EncodedPrompts | None = None,
) -> Model:
    """Puts onto the device what training needs of the pipeline, with an adapter or compiled if the settings say so.

    Args:
        beginning: what the adapter begins from; None for an update of 0.
        prompts: of the validation images.

    Raises:
        UserError: the adapter cannot be that of `--lora_layers`, `--lora_format` or `--init_lora`.
    """
    adapter = _prepare_denoiser(source, family, config, accelerator, group, beginning)
    return Model(source, family, adapter, Trainable(family.denoiser, buffers=adapter is None), beginning, prompts)


def hand_back(model: Model, accelerator: Accelerator, device: torch.device) -> None:
    """Leaves a pipeline that is somebody else's on their device, in its own precision, and ready to draw."""
    family = model.family
    accelerator.unwrap_model(family.denoiser, keep_fp32_wrapper=False)
    cast_inputs(family.denoiser, True)
    family.take_back()
    round_pipeline(family.pipeline, model.source.dtypes)
    family.denoiser.eval()
    move_pipeline(family.pipeline, device)


def _check_validation(config: Config, family: Family) -> None:
    steps = config.validation.validation_inference_steps
    if family.prompts(config.validation) and steps > len(family.objective):
        raise UserError(
            f"`--validation_inference_steps {steps}` is more than the {len(family.objective)} steps of the pipeline's "
            "noise schedule: lower it."
        )


def _check_export(config: Config, family: Family) -> None:
    form = config.adapter.lora_export
    if form not in (None, "fuse") and not family.loads_lora:
        raise UserError(
            f"`--lora_export {form}`: a {type(family.pipeline).__name__} loads no LoRA files: choose `fuse`, or leave "
            "it out."
        )


def _check_quantised(config: Config, source: PipelineSource, family: Family) -> None:
    """Raises a `UserError` unless what is to be quantised can be, and can be read again as it was."""
    wanted = {
        "quantize_base": (config.adapter.quantize_base, [family.denoiser]),
        "quantize_encoders": (config.adapter.quantize_encoders, _text_encoders(family)),
    }
    for name, (kind, modules) in wanted.items():
        if kind is not None and source.folder is None:
            raise UserError(f"`--{name} {kind}` needs a pretrained pipeline, in files: leave it out.")
        if kind is not None and not any(True for module in modules for _ in layers_to_quantise(module)):
            raise UserError(
                f"`--{name} {kind}`: the {type(family.pipeline).__name__} has no linear layers in blocks: leave it "
                "out."
            )


def _text_encoders(family: Family) -> list[nn.Module]:
    found = (getattr(family.pipeline, name, None) for name in family.caption_encoders)
    return [encoder for encoder in found if isinstance(encoder, nn.Module)]


def _check_format(config: Config, family: Family, adapter: Adapter) -> None:
    if config.adapter.lora_format == "kohya" and family.loads_lora and config.adapter.lora_export != "fuse":
        check_kohya([f"{family.denoiser_name}.{name}" for name in adapter.layers], "`--lora_format kohya`")


def _prepare_denoiser(
    source: PipelineSource,
    family: Family,
    config: Config,
    accelerator: Accelerator,
    group: Group,
    beginning: Beginning | None,
) -> Adapter | None:
    # What is cached is not encoded again: the encoders stay on the host.
    family.place(accelerator.device, encoders=not config.data.cache_latents)
    adapter, rounded = None, []
    if (kind := config.adapter.quantize_base) is not None:
        half = HALF.get(accelerator.mixed_precision, torch.float32)
        quantise(family.denoiser, kind, accelerator.device, half)
    if config.adapter.use_lora:
        adapter = add_adapter(family.denoiser, config.adapter, family.lora_layers, config.training.seed)
        _check_format(config, family, adapter)
        if beginning is not None:
            begin_from(adapter, family.denoiser_name, beginning)
        if accelerator.mixed_precision in HALF and not config.adapter.lora_dropout:
            # Dropout would be computed in half precision.
            cast_inputs(family.denoiser, False)
        # What is rounded must be read again to be saved.
        if accelerator.mixed_precision in HALF and source.folder is not None:
            rounded = adapter.round_frozen(HALF[accelerator.mixed_precision])
        if config.merges_exactly and config.ensemble.num_shards > 1 and accelerator.device.type != "cpu":
            part = source.stored.get(family.denoiser_name)
            adapter.keep_originals(mapped=part is not None and part.stays_mapped)
    # It has come in the precision in which it is stored; what is not rounded computes in fp32.
    family.denoiser.to(accelerator.device)
    widen(family.denoiser, but=frozenset(map(id, rounded)))
    if config.training.gradient_checkpointing:
        family.pipeline.components[family.denoiser_name].enable_gradient_checkpointing()
    if config.training.channels_last:
        family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    family.denoiser.train()
    # Evaluation mode gives placement and autocast without DistributedDataParallel, which would average clones.
    accelerator.prepare_model(family.denoiser, evaluation_mode=True)
    if config.training.compile:
        entry, settings = config.chosen(SKIP_RULES)
        twice, sizes = entry.load().teaches(settings), len(family.buckets(config.data).sizes)
        compile_denoiser(family.denoiser, backward_twice=twice, sizes=sizes)
    family.network = group.wrap(family.denoiser)
    return adapter

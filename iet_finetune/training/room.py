"""Whether a machine's memory suffices for a run, counted before a weight is read."""

from typing import Any

import diffusers
import torch

from ..config.config import Config
from ..distributed.groups import Placement, Ranks
from ..ensemble.budget import check_memory
from ..ensemble.ema import EMA
from ..ensemble.trainable import Trainable
from ..families import Family, PipelineSource, family_class
from ..families.finding import part_folder
from ..families.quiet import quiet_loading
from ..families.stored import Stored
from ..lora.adapters import add_adapter
from ..lora.quantised import quantise, quantised_bytes
from ..publish.base_files import header_of
from .needs import need_of_run


def check_room(
    config: Config, source: PipelineSource, placement: Placement, ranks: Ranks, device: torch.device
) -> None:
    """Compares what the ranks of this machine will need with what it has; a pipeline in memory is not looked at.

    Weights that stay mapped from their files do not count: the ranks share them, and where memory is short the system
    drops them and reads them again.

    Raises:
        UserError: it is too much; says what can be done.
    """
    if source.folder is None:
        return
    offloaded, on_host = config.ensemble.offload_dir is not None, device.type == "cpu"
    family = family_class(source, config.model)
    needed = sum(part.own_bytes for part in source.stored.values())
    if config.adapter.quantize_encoders is not None:
        needed += sum(_quantised(source, name, config.adapter.quantize_encoders) for name in family.caption_encoders)
    needed += bytes_computed_with(config, source, family) if on_host else 0
    needed += _bytes_kept(config, source, family, placement, on_host, offloaded)
    check_memory(
        needed,
        ranks.local_size,
        can_offload=not offloaded,
        can_reset=config.ensemble.optimizer_across_rounds == "keep",
    )


def bytes_computed_with(config: Config, source: PipelineSource, family: type[Family]) -> int:
    """Bytes of models on the host in the precision in which they compute; with a cache, encoders compute first."""
    stored = source.stored
    images, captions = (
        sum(_fp32_copy(stored[name]) for name in names if name in stored)
        for names in (family.image_encoders, family.caption_encoders)
    )
    if config.adapter.quantize_encoders is not None:
        captions = 0  # they compute as they are held
    part = stored.get(family.denoiser_name, Stored())
    if (kind := config.adapter.quantize_base) is not None:
        denoiser = _quantised(source, family.denoiser_name, kind)
    elif not config.adapter.use_lora:
        # Training writes to it, also where it is mapped.
        denoiser = 4 * part.numbers
    elif config.training.mixed_precision == "bf16":
        denoiser = 0 if part.loads_in == torch.bfloat16 else 2 * part.numbers
    else:
        denoiser = _fp32_copy(part)
    return max(images, captions, denoiser) if config.data.cache_latents else images + captions + denoiser


def _quantised(source: PipelineSource, name: str, kind: str) -> int:
    """Bytes of a component with quantised blocks; of whole fp32 weights where the files do not tell."""
    if name not in source.stored:
        return 0
    shapes = {tensor: shape for tensor, (_, shape) in header_of(source, name).items()}
    return quantised_bytes(shapes, kind) if shapes else 4 * source.stored[name].numbers


def _fp32_copy(part: Stored) -> int:
    return 0 if part.loads_in == torch.float32 else 4 * part.numbers


def _bytes_kept(
    config: Config, source: PipelineSource, kind: type[Family], placement: Placement, on_host: bool, offloaded: bool
) -> int:
    """What training keeps on a rank, as `need_of_run` counts it, on a denoiser without values."""
    denoiser = _without_values(source, kind.denoiser_name)
    if denoiser is None:
        return 0
    adapter = None
    if config.adapter.quantize_base is not None:
        quantise(denoiser, config.adapter.quantize_base, torch.device("meta"))
    if config.adapter.use_lora:
        adapter = add_adapter(denoiser, config.adapter, kind.lora_layers, config.training.seed)
        adapter.originals_are_mapped = not on_host and source.stored[kind.denoiser_name].stays_mapped
    trainable = Trainable(denoiser, buffers=adapter is None)
    ema = None
    if config.optimizer.use_ema:
        ema = EMA(trainable.parameters, config.optimizer.ema_max_decay, start_share=config.merges_exactly)
    needs = [need_of_run(config, trainable, adapter, ema, placement, rank) for rank in range(placement.num_ranks)]
    return max(need.memory(device_is_host=on_host, offloaded=offloaded) for need in needs)


def _without_values(source: PipelineSource, name: str) -> Any:
    """The component on torch's meta device, which knows shapes only; None if it is no model of diffusers."""
    library, class_name = source.classes.get(name, ("", ""))
    kind: Any = getattr(diffusers, class_name, None) if library == "diffusers" else None
    if kind is None or source.folder is None:
        return None
    with quiet_loading(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind.from_config(kind.load_config(part_folder(source.folder, name)))

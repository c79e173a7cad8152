"""Training at the sizes that people train: what it takes and how fast it is. Weights and images are random."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ...config.config import Config
from ...families.tiny import RESOLUTION, tiny_flux, tiny_sd, tiny_sdxl
from ...training.validation import merged_pipeline
from .. import shapes
from ..checks import Machine, expect
from ..trials import (
    Memory,
    StepClock,
    UnsavedTrainer,
    fresh_accelerator,
    host_peak,
    pictures,
    settings,
    timed,
    wait,
    where_it_fits,
)
from .plain import plain_loop

# GB on the device, in every phase.
SD15_GB, SDXL_LORA_GB, FLUX_CUT_GB = 20, 12.5, 28


def sd15_full(machine: Machine, found: dict[str, Any]) -> None:
    """All weights of SD 1.5, against a plain loop in the same process; the tiny one without a card."""
    large, memory = _stands_for(machine, found), Memory()
    size, batch = (512, 4) if large else (RESOLUTION, 2)
    make = (lambda: shapes.sd15("cuda")) if large else tiny_sd
    common = {
        "resolution": size, "train_batch_size": batch, "use_ema": True, "learning_rate": 1e-5,
        "mixed_precision": "bf16" if large else "no", "cache_dir": str(machine.scratch / "cache"),
    }  # fmt: skip
    # Enough for the largest batch of both clones.
    images = pictures(8 * batch, size)
    checkpointing = {"gradient_checkpointing": True}
    _sd15_run(machine, make(), images, common | checkpointing, found, memory, "")
    if large:
        with where_it_fits(found, "plain loop"):
            clock = StepClock(machine.device)
            plain_loop(make(), 10, batch, size, clock.note)
            found["plain loop, images/s"] = batch / clock.seconds()
            found["plain loop, training, GB"] = memory.peak()
            found["over the plain loop"] = found["images/s"] / found["plain loop, images/s"]
        found["parts of a step, ms"] = _kernels(machine, make(), images, common | checkpointing)
    with where_it_fits(found, "no checkpointing"):
        _sd15_run(machine, make(), images, common, found, memory, ", no checkpointing")
    if large:
        with where_it_fits(found, "no checkpointing, batch 16"):
            more = common | {"train_batch_size": 4 * batch}
            _sd15_run(machine, make(), images, more, found, memory, ", no checkpointing, batch 16")
    _expect_room(found, SD15_GB)


def _sd15_run(
    machine: Machine, pipeline: Any, images: Dataset, flags: dict[str, Any], found: dict[str, Any], memory: Memory,
    words: str,
) -> None:  # fmt: skip
    pipeline.to("cpu")
    memory.peak()
    folder = machine.scratch / f"run{words}"
    config = settings(folder, num_shards=2, merge_every_steps=8, max_train_steps=8, **flags)
    with fresh_accelerator():
        _train(machine, pipeline, images, config, found, memory, words, draws=not words)
    memory.peak()


def sdxl_lora(machine: Machine, found: dict[str, Any]) -> None:
    """SDXL with LoRA, from a folder in half precision; the tiny one without a card."""
    large, memory = _stands_for(machine, found), Memory()
    pipeline = shapes.sdxl("cuda", torch.bfloat16) if large else tiny_sdxl()
    size = 1024 if large else RESOLUTION
    _adapter(machine, pipeline, found, memory, size, SDXL_LORA_GB, lora_export="truncate")


def flux_cut(machine: Machine, found: dict[str, Any]) -> None:
    """Some blocks of Flux.1 with LoRA, from load to a fused pipeline; the tiny one without a card."""
    large, memory = _stands_for(machine, found), Memory()
    pipeline = shapes.flux("cuda", torch.bfloat16) if large else tiny_flux()
    size = 512 if large else RESOLUTION
    _adapter(machine, pipeline, found, memory, size, FLUX_CUT_GB, lora_export="fuse")


def _stands_for(machine: Machine, found: dict[str, Any]) -> bool:
    """Whether the real sizes are used; without a card a tiny model goes the same way, and it is said."""
    if not machine.has_card:
        found["without a card"] = "a tiny model of the kind"
    return machine.has_card


def _adapter(
    machine: Machine, pipeline: Any, found: dict[str, Any], memory: Memory, size: int, most: float, **flags: Any
) -> None:
    large, folder = machine.has_card, machine.scratch / "base"
    began = time.perf_counter()
    pipeline.to("cpu", torch.bfloat16 if large else torch.float32).save_pretrained(folder)
    found["made, s"] = time.perf_counter() - began
    del pipeline
    memory.peak()
    config = settings(
        machine.scratch, pretrained_model_name_or_path=str(folder), resolution=size, train_batch_size=1, num_shards=2,
        merge_every_steps=6, max_train_steps=12, use_lora=True, rank=16 if large else 2, learning_rate=1e-4,
        mixed_precision="bf16" if large else "no", gradient_checkpointing=True, **flags,
    )  # fmt: skip
    with fresh_accelerator():
        _train(machine, None, pictures(4, size), config, found, memory, "", draws=True, saves=True)
    found["host, GB"] = host_peak()
    _expect_room(found, most)


def _train(
    machine: Machine,
    pipeline: Any,
    images: Dataset,
    config: Config,
    found: dict[str, Any],
    memory: Memory,
    words: str,
    *,
    draws: bool,
    saves: bool = False,
) -> None:
    """Trains, and notes peaks by phase, images a second and the seconds of what comes between steps."""
    clock, spent = StepClock(machine.device), dict[str, list[float]]()
    began = time.perf_counter()
    trainer = UnsavedTrainer(config, [clock], pipeline=pipeline, dataset=images)
    wait()
    found[f"start and caching{words}, s"] = time.perf_counter() - began
    found[f"start and caching{words}, GB"] = memory.peak()
    for name in ("checkout", "collect", "merge"):
        times = spent[name] = []
        setattr(trainer.ensemble, name, timed(getattr(trainer.ensemble, name), times))
    trainer.train_rounds()
    found[f"images/s{words}"] = clock.images_per_second()
    found[f"training{words}, GB"] = memory.peak()
    for name, times in spent.items():
        found[f"{name}{words}, s"] = max(times)
    if draws:
        family, size = trainer.model.family, config.data.resolution
        began = time.perf_counter()
        with merged_pipeline(trainer.ensemble, family) as drawing, torch.no_grad():
            drawing.set_progress_bar_config(disable=True)
            with torch.autocast(machine.device, torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
                drawing(["a picture"] * 4, num_inference_steps=4, height=size, width=size)
        wait()
        found["drawing 4 images in 4 steps, s"] = time.perf_counter() - began
        found["drawing, GB"] = memory.peak()
    if saves:
        began = time.perf_counter()
        trainer.finish()
        found["saving, s"] = time.perf_counter() - began
        found["saving, GB"] = memory.peak()
        expect(any(Path(trainer.output).glob("*.json")), "nothing was saved")


def _kernels(machine: Machine, pipeline: Any, images: Dataset, common: dict[str, Any]) -> dict[str, float]:
    """Of three steps: wall time, and time in which the device computes, in ms a step."""
    config = settings(
        machine.scratch / "profiled", num_shards=1, merge_every_steps=20, max_train_steps=20,
        **common,
    )  # fmt: skip
    with fresh_accelerator():
        trainer = UnsavedTrainer(config, pipeline=pipeline, dataset=images)
        clone = trainer.ensemble.checkout([0])
        steps = trainer._steps(clone, 8)
        for _ in range(5):
            next(steps)
        wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            began = time.perf_counter()
            for _ in range(3):
                next(steps)
            queued = time.perf_counter() - began
            wait()
            wall = time.perf_counter() - began
    events = profiler.key_averages()
    parts: dict[str, float] = {}
    for event in events:
        name = event.key.removeprefix("void ")[:50]
        parts[name] = parts.get(name, 0.0) + event.self_device_time_total / 3e3
    longest = dict(sorted(parts.items(), key=lambda each: -each[1])[:12])
    busy = sum(parts.values())
    return {"wall": 1000 * wall / 3, "queued": 1000 * queued / 3, "busy": busy, **longest}


def _expect_room(found: dict[str, Any], most: float) -> None:
    peaks = {name: value for name, value in found.items() if name.endswith(", GB") and "host" not in name}
    ours = {name: value for name, value in peaks.items() if "plain" not in name and "no check" not in name}
    over = [name for name, value in ours.items() if value is not None and value > most]
    expect(not over, f"more than {most} GB: {', '.join(over)}")

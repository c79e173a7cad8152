"""Starts Accelerate: the device, precision, process group and trackers of this rank."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, parse_flag_from_env

from ..config.config import Config
from ..environment import allow_tf32, has_bf16
from ..errors import UserError, one_line
from .card import check_card, check_driver, refused


def start_accelerator(config: Config) -> Accelerator:
    """Starts Accelerate on this rank, with the trackers of `--report_to`.

    Raises:
        UserError: a tracker is not installed, the device is not to be had or lacks the precision, the engine splits
            models, or other ranks do not come.
    """
    report_to = config.logging.report_to
    available = [str(tracker.value) for tracker in get_available_trackers()]
    if report_to not in ("none", "all", *available):
        raise UserError(f"`--report_to {report_to}` needs a package: `pip install {report_to}`.")
    check_driver()
    # torchrun lets NCCL end a rank that has lost another one, perhaps before it has said so: `Watchdog` does both.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            mixed_precision=config.training.mixed_precision,
            log_with=None if report_to == "none" else report_to,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.training.ddp_timeout))],
            project_config=ProjectConfiguration(
                project_dir=str(config.output_path), logging_dir=str(config.output_path / config.logging.logging_dir)
            ),
        )
    except ValueError as error:
        precision = config.training.mixed_precision
        raise UserError(f"Accelerate cannot run with `--mixed_precision {precision}`: {one_line(error)}") from None
    except torch.distributed.DistError as error:
        timeout, reason = config.training.ddp_timeout, one_line(error).rstrip(".")
        raise UserError(
            f"the ranks did not come together within `--ddp_timeout {timeout}` ({reason}): look for an error of "
            "another rank, and whether all machines were started and reach the first one."
        ) from None
    except RuntimeError as error:
        if (line := refused(error)) is None:
            raise
        raise line from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate itself, whose own configuration may ask for it, would train in fp32 without a word.
        raise UserError("`--mixed_precision fp16` needs a GPU: use `--mixed_precision bf16` or `no` on a CPU.")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"Accelerate's configuration asks for {accelerator.distributed_type.value}, and each rank must hold a "
            "whole clone: launch with `--config_file configs/accelerate/several_gpus.yaml`, or `--multi_gpu`."
        )
    check_card(accelerator.device, accelerator.mixed_precision)
    if accelerator.device.type == "cuda":
        disable_cudnn_attention()
    if config.training.allow_tf32:
        allow_tf32()
    return accelerator


def disable_cudnn_attention() -> None:
    """Leaves attention to torch's other kernels than cuDNN's, for all that this process computes from now on.

    With cuDNN's, gradients of a network of which nothing else is not finite were NaN: bf16, 496 and 16 tokens, on an
    H200 with torch 2.11 and cuDNN 9.19 (docs/gpu.md). With masks that is known up to torch 2.13
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class Device(NamedTuple):
    """Where a run of one process would train: bytes of the GPU, None without one; and whether it computes in bf16."""

    memory: int | None
    has_bf16: bool


def first_device() -> Device:
    """The device that Accelerate would choose for a single process."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return Device(None, True)
    return Device(torch.cuda.get_device_properties(0).total_memory, has_bf16(torch.device("cuda")))

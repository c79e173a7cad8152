"""How long a merge of K clones takes beside a plain copy of the same tensors; under torchrun, over its ranks."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pipelines import build_unet
from torch import Tensor

from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.ensemble.merger import Merger

TIMEOUT = 60.0


def time_merge(
    ranks: Ranks, device: torch.device, channels: tuple[int, ...], clones: int, repeats: int
) -> dict[str, float]:
    """Medians, in seconds, over repetitions in which all of them take turns; on several ranks all call it.

    Args:
        channels: of the UNet whose tensors are copied and merged; its weights are random.
        clones: K, a multiple of the number of ranks.

    Returns:
        bytes: of one clone.
        collect: adding one wave of clones, one of each rank, to the sums.
        merge: the mean.
        copy: `{name: tensor.clone()}`. All copies are kept, so that each needs new memory of the system.
        overwrite: copying over such a copy instead, in memory that the process has already.
        all: K collects and the merge.
    """
    torch.manual_seed(0)
    tensors = {name: p.detach().to(device) for name, p in build_unet(channels).named_parameters()}
    merger = Merger("denoiser", tensors, ranks, HostMemory(device))
    for tensor in tensors.values():
        # A clone that has not moved would be a special case.
        tensor.mul_(1 + 1e-3 * (ranks.rank + 1))
    copies: list[dict[str, Tensor]] = []
    seconds: dict[str, list[float]] = {name: [] for name in ("collect", "merge", "copy", "overwrite", "all")}
    for repeat in range(repeats + 1):
        waves = clones // ranks.size
        collects = [_timed(lambda: merger.collect(tensors, [1] * ranks.size), device) for _ in range(waves)]
        merge = _timed(merger.merge, device)
        copy = _timed(lambda: copies.append({name: tensor.clone() for name, tensor in tensors.items()}), device)
        overwrite = _timed(lambda: _overwrite(copies[-1], tensors), device)
        if repeat:  # the first touches the sums' memory for the first time
            seconds["collect"] += collects
            for name, value in (("merge", merge), ("copy", copy), ("overwrite", overwrite)):
                seconds[name].append(value)
            seconds["all"].append(sum(collects) + merge)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"bytes": size, **{name: statistics.median(values) for name, values in seconds.items()}}


def _overwrite(copy: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        copy[name].copy_(tensor)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(report: Path, channels: tuple[int, ...], clones: int, repeats: int) -> None:
    """One rank of several; rank 0 writes the report."""
    on_gpu = not os.environ.get("ACCELERATE_USE_CPU")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=TIMEOUT))
    ranks = Ranks.join(TIMEOUT)
    with ranks.report_errors_once():
        seconds = time_merge(ranks, device, channels, clones, repeats)
        ranks.leave()
    if ranks.is_main:
        report.write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), tuple(map(int, sys.argv[2].split(","))), int(sys.argv[3]), int(sys.argv[4]))

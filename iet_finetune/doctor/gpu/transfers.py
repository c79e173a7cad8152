"""Copies between host and device, and the collectives' library."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from ...distributed.trial import try_collectives
from ...ensemble.host import HostMemory
from ...families.tiny import RESOLUTION, tiny_sd
from ..checks import Machine, expect
from ..trials import GB, UnsavedTrainer, fresh_accelerator, pictures, settings

_NUMBERS = 1 << 28  # 1 GiB of fp32


def transfers(machine: Machine, found: dict[str, Any]) -> None:
    """GB/s of copies of 1 GiB: from and to where idle clones are kept, which is pinned, and ordinary memory."""
    machine.need_card()
    device = torch.device("cuda")
    on_card = torch.randn(_NUMBERS, device=device)
    kept = HostMemory(device).empty((_NUMBERS,), torch.float32)
    plain = torch.empty(_NUMBERS)
    plain.zero_()
    expect(kept.is_pinned(), "where idle clones are kept is not pinned")
    back = torch.empty_like(on_card)
    found["to the host, pinned, GB/s"] = _rate(lambda: kept.copy_(on_card, non_blocking=True))
    found["to the device, pinned, GB/s"] = _rate(lambda: back.copy_(kept, non_blocking=True))
    expect(torch.equal(back, on_card), "what went to pinned memory and back is not the same")
    host, part = HostMemory(device), on_card[: _NUMBERS // 4]
    expect(torch.equal(host.fetched(part), kept[: _NUMBERS // 4]), "what is fetched is not the same")
    found["to the host, fetched, GB/s"] = _rate(lambda: host.fetched(part), len(part))
    back.zero_()
    found["to the host, pageable, GB/s"] = _rate(lambda: plain.copy_(on_card))
    found["to the device, pageable, GB/s"] = _rate(lambda: back.copy_(plain))
    expect(torch.equal(back, on_card), "what went to ordinary memory and back is not the same")


def _rate(copy: Callable[[], object], numbers: int = _NUMBERS) -> float:
    times = []
    for _ in range(4):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        copy()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1000)
    return 4 * numbers / GB / min(times[1:])


def one_rank(machine: Machine, found: dict[str, Any]) -> None:
    """A run of one rank that has joined a process group, NCCL's with a card, gloo's without; then its collectives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if not machine.has_card:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    config = settings(
        machine.scratch, resolution=RESOLUTION, train_batch_size=2, num_shards=2, merge_every_steps=2,
        max_train_steps=4, use_ema=True,
    )  # fmt: skip
    with fresh_accelerator():
        trainer = UnsavedTrainer(config, pipeline=tiny_sd(), dataset=pictures(8, RESOLUTION))
        trainer.train_rounds()
        found["backend"] = torch.distributed.get_backend() if torch.distributed.is_initialized() else "none"
        expect(found["backend"] == ("nccl" if machine.has_card else "gloo"), "no process group was joined")
        # A run of one rank does without them.
        try_collectives(torch.device("cuda", 0) if machine.has_card else torch.device("cpu"))
        found["collectives"] = "exchanged"

"""A base in 4 or 8 bits on a card: the same bits as on the host, and a run on each."""

from pathlib import Path
from typing import Any

import torch

from ...families.quiet import quiet_loading
from ...families.tiny import RESOLUTION, tiny_flux
from ...lora.quantised import QuantisedLinear
from ..checks import Machine, expect
from ..trials import StepClock, UnsavedTrainer, fresh_accelerator, pictures, settings

KINDS = ("nf4", "int8")
# Of products in fp32, by the largest.
CLOSE = 1e-4


def quantised(machine: Machine, found: dict[str, Any]) -> None:
    """One layer of each kind on both devices, then a tiny Flux: two clones, two rounds, saved as a LoRA file."""
    for kind in KINDS:
        found[f"{kind}, unlike on the host"] = _unlike(machine, kind)
        expect(found[f"{kind}, unlike on the host"] <= CLOSE, f"{kind} is another number than on the host")
    pipeline: Any = tiny_flux()
    with quiet_loading():
        pipeline.save_pretrained(machine.scratch / "base")
    for kind in KINDS:
        found[f"{kind}, step, s"] = _train(machine, kind)


@torch.no_grad()
def _unlike(machine: Machine, kind: str) -> float:
    """How far products are apart; infinite if the numbers that are held differ."""
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(192, 320), torch.randn(7, 192)
    host = QuantisedLinear(linear, kind, torch.float32)
    expected = host(inputs)
    ours = QuantisedLinear(linear.to(machine.device), kind, torch.float32)
    same = torch.equal(ours.weight.cpu(), host.weight) and torch.equal(ours.scale.cpu(), host.scale)
    apart = (ours(inputs.to(machine.device)).cpu() - expected).abs().max() / expected.abs().max()
    return apart.item() if same else float("inf")


def _train(machine: Machine, kind: str) -> float:
    """Seconds of a step."""
    config = settings(
        machine.scratch / kind, pretrained_model_name_or_path=str(machine.scratch / "base"), resolution=RESOLUTION,
        train_batch_size=2, num_shards=2, merge_every_steps=3, max_train_steps=6, use_lora=True, rank=2,
        learning_rate=1e-3, quantize_base=kind, quantize_encoders=kind, lora_export="full_rank",
        mixed_precision="bf16" if machine.has_card else "no",
    )  # fmt: skip
    clock = StepClock(machine.device)
    with fresh_accelerator():
        trainer = UnsavedTrainer(config, [clock], dataset=pictures(8, RESOLUTION))
        trainer.train_rounds()
        trainer.finish()
    expect(any(Path(trainer.output).glob("*.safetensors")), f"{kind}: no LoRA file was saved")
    return clock.seconds()

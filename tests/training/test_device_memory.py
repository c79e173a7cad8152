"""Out of memory on the device is one line that names what helps; what it says of a resumed run is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.doctor.trials import fresh_accelerator
from iet_finetune.training.callbacks import Callback, StepFacts
from iet_finetune.training.validation import sampling

# As torch says it, cut short.
SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1 GiB is free."
)


class OutOfMemory(Callback):
    """Raises what torch raises, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, facts: StepFacts) -> None:
        """At its step."""
        if facts.step == self.step:
            raise torch.OutOfMemoryError(SAID)


def config(folder: Path, **flags) -> Config:
    if not (folder / "data").is_dir():
        save_images(folder / "data", 8)
    defaults = {
        "train_data_dir": str(folder / "data"),
        "output_dir": str(folder / "run"),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 2,
        "num_train_epochs": 4,
        "merge_every_epochs": 2,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def the_line(config: Config, step: int) -> str:
    with pytest.raises(UserError) as error:
        Trainer(config, [OutOfMemory(step)], pipeline=tiny_sd()).train()
    line = str(error.value)
    assert "\n" not in line
    return line


def test_what_costs_least_is_named_first(tmp_path):
    assert the_line(config(tmp_path), 1) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB: add `--gradient_checkpointing`, halve `--train_batch_size 2` "
        "and double `--gradient_accumulation_steps 1`, use `--mixed_precision bf16`, or `fp16` on older cards, add "
        f"`--use_8bit_adam`, train a LoRA with `--use_lora` or lower `--resolution {RESOLUTION}`."
    )


def test_what_is_done_already_is_not_named(tmp_path):
    flags = {"train_batch_size": 1, "gradient_checkpointing": True, "mixed_precision": "bf16", "use_lora": True}
    line = the_line(config(tmp_path, **flags), 1)
    assert line.endswith(f"2.00 GiB: lower `--resolution {RESOLUTION}`.")


class OutOfMemoryIn(Callback):
    """Raises what torch raises when a phase begins."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def on_phase(self, phase: str) -> None:
        """In its phase."""
        if phase == self.phase:
            raise torch.OutOfMemoryError(SAID)


@pytest.mark.parametrize(
    ("phase", "flags", "ways"),
    [
        (
            "encoding",
            {},
            "lower `--train_batch_size 2`, as so many (at most 8) are encoded at once or lower `--resolution "
            f"{RESOLUTION}`.",
        ),
        (
            "encoding",
            {"train_batch_size": 1, "use_lora": True, "pretrained_model_name_or_path": "BASE"},
            f"add `--quantize_encoders nf4` or lower `--resolution {RESOLUTION}`.",
        ),
        (
            "training",
            {"train_batch_size": 1, "use_lora": True, "pretrained_model_name_or_path": "BASE"}
            | {"gradient_checkpointing": True, "mixed_precision": "bf16"},
            f"add `--quantize_base nf4` or lower `--resolution {RESOLUTION}`.",
        ),
        (
            "drawing",
            {"validation_prompts": ["a cat"], "num_validation_images": 3},
            "lower `--num_validation_images 3`, leave out `--validation_prompts` or lower `--resolution "
            f"{RESOLUTION}`.",
        ),
    ],
)
def test_each_phase_has_its_own_ways(phase, flags, ways, tmp_path):
    given: dict[str, Any] = {"pipeline": tiny_sd()}
    if "pretrained_model_name_or_path" in flags:
        save_tiny_sd(tmp_path / "base")
        flags, given = {**flags, "pretrained_model_name_or_path": str(tmp_path / "base")}, {}
    with pytest.raises(UserError) as error:
        Trainer(config(tmp_path, **flags), [OutOfMemoryIn(phase)], **given).train()
    assert str(error.value) == f"CUDA out of memory. Tried to allocate 2.00 GiB: {ways}"


def test_a_run_goes_on_from_its_checkpoint_with_what_it_is_told(tmp_path):
    line = the_line(config(tmp_path), 10)
    assert "go on from checkpoint-8 with `--resume_from_checkpoint latest` and add `--gradient_checkpointing`" in line
    first, anew = line.split("; or start over in another `--output_dir` and ")
    assert set(re.findall(r"`--(\w+)", anew)) == {"use_8bit_adam", "use_lora", "resolution"}
    told = set(re.findall(r"`--(\w+)", first)) - {"resume_from_checkpoint"}
    changes = {
        "gradient_checkpointing": True,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
    }
    assert told == set(changes)
    with fresh_accelerator():
        Trainer(config(tmp_path, resume_from_checkpoint="latest", **changes), pipeline=tiny_sd()).train()
    assert (tmp_path / "run" / "model_index.json").is_file()


class Family:
    """What `sampling` asks of a family whose VAE is on a GPU that is not there."""

    def __init__(self, device: str) -> None:
        self.pipeline = tiny_sd()
        self.denoiser = torch.nn.Linear(1, 1, device=device)
        self.beside_denoiser: list[str] = []

    def lent(self, names, device):
        return torch.no_grad()

    def sampling_pipeline(self):
        return self

    def to(self, device):
        return self.pipeline


@pytest.mark.parametrize(("device", "sliced"), [("meta", True), ("cpu", False)])
@pytest.mark.parametrize("before", [False, True])
def test_images_are_decoded_one_by_one_except_on_a_cpu_and_the_setting_is_put_back(device, sliced, before):
    family = Family(device)
    family.pipeline.vae.use_slicing = before
    with sampling(family) as pipeline:
        assert pipeline.vae.use_slicing == (sliced or before)
    assert family.pipeline.vae.use_slicing == before

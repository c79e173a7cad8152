"""No step of training waits for the device: nothing is read from it, and what it is sent comes from pinned memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_meta import OfTwo, waits_of
from torch import Tensor

from iet_finetune import Config
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.config.settings import AdapterConfig
from iet_finetune.distributed.groups import Group
from iet_finetune.doctor.trials import UnsavedTrainer, pictures, settings
from iet_finetune.families.tiny import RESOLUTION, TINY
from iet_finetune.lora.adapters import add_adapter
from iet_finetune.method.agc_rule import AGCRule
from iet_finetune.method.rules import Samples

# With steps of 3: a group of two has unequal parts, and once an empty one.
IMAGES = 4


def config(folder: Path, **flags) -> Config:
    defaults = {"resolution": RESOLUTION, "train_batch_size": 3, "num_shards": 1, "use_ema": True}
    return settings(folder, **defaults, max_train_steps=8, merge_every_steps=8, **flags)


def trainer_of(folder: Path, name: str = "StableDiffusionPipeline") -> UnsavedTrainer:
    pipeline, images = TINY[name](), pictures(IMAGES, RESOLUTION)
    return UnsavedTrainer(config(folder), pipeline=pipeline, dataset=images)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", TINY)
def test_no_step_of_any_family_waits_full_and_lora_alone_and_in_a_group_cached_and_not(name, tmp_path):
    trainer = trainer_of(tmp_path, name)
    family = trainer.model.family
    assert waits_of(trainer, Group()) == []
    assert waits_of(trainer, OfTwo()) == []
    add_adapter(family.denoiser, AdapterConfig(use_lora=True, rank=2), family.lora_layers, 0)
    assert waits_of(trainer, Group()) == []
    assert waits_of(trainer, OfTwo()) == []
    if "PixArt" not in name:
        # Where T5 has a mask, transformers asks whether anything is masked.
        assert waits_of(trainer, Group(), cached=False) == []


@pytest.mark.parametrize("rule", SKIP_RULES.entries)
def test_no_skip_rule_makes_a_step_wait(rule, tmp_path, monkeypatch, alone):
    monkeypatch.setattr(alone, "config", config(tmp_path, skip_rule=rule, snr_gamma=5.0))
    assert waits_of(alone, OfTwo()) == []


def asks(question: Callable[[Samples], object]) -> Callable[[AGCRule, Samples], Tensor]:
    """`AGCRule.keep`, which asks something first."""
    keep = AGCRule.keep

    def asking(rule: AGCRule, samples: Samples) -> Tensor:
        question(samples)
        return keep(rule, samples)

    return asking


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (lambda samples: samples.loss.sum().item(), "_local_scalar_dense.default needs values"),
        (lambda samples: bool(samples.loss.sum() > 0), "needs values"),
        (lambda samples: samples.loss.cpu(), "_to_copy.default reads from the device"),
        (lambda samples: samples.loss[samples.loss > 0], "counts what is chosen"),
        (lambda samples: samples.loss.nonzero(), "nonzero.default needs values"),
    ],
    ids=["item", "bool", "cpu", "mask", "nonzero"],
)
def test_the_watch_sees_what_is_read(question, words, monkeypatch, alone):
    monkeypatch.setattr(AGCRule, "keep", asks(question))
    assert words in waits_of(alone, Group())[-1]


def test_the_watch_sees_what_is_sent_and_waited_for(monkeypatch, alone):
    def question(samples: Samples) -> None:
        device = samples.loss.device
        torch.tensor([0, 1], device=device)
        torch.zeros(2).to(device, non_blocking=True)  # from ordinary memory
        torch.zeros(2).pin_memory().to(device)
        torch.zeros(2).pin_memory().to(device, non_blocking=True)  # as it should be
        samples.loss[[0, 0]]

    monkeypatch.setattr(AGCRule, "keep", asks(question))
    found = waits_of(alone, Group())
    steps = 2
    assert len(found) == 4 * steps
    assert all("copies to the device, and waits" in each for each in found)
    assert {each.split()[0] for each in found} == {"tensor", "aten._to_copy.default", "__getitem__"}

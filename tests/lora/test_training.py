"""Training LoRA adapters: what is promised of whole denoisers holds for them, and what is promised of them alone."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lora_runs import LATEST, LORA, config, fused, train
from peft.utils import get_peft_model_state_dict
from reference import OneRoundOfAdapters, Reference, with_adapter
from runs import AtStepEnd, assert_close, assert_equal, samples
from safetensors.torch import load_file
from tiny import save_images, save_tiny_sd, tiny_sd

from iet_finetune import Trainer
from iet_finetune.lora.adapters import Adapter
from iet_finetune.lora.reading import read_lora
from iet_finetune.training.callbacks import StepFacts

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
MERGES = ["exact", "average", "freeze_a"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, so that each is visited often enough for skips, and 12 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    return folder


@pytest.mark.parametrize(("merge", "shards"), [("exact", 1), ("exact", 4), ("average", 4), ("freeze_a", 4)])
def test_learning_rate_zero_returns_the_base_bit_for_bit(world, tmp_path, merge, shards):
    flags = {"num_shards": shards, "learning_rate": 0.0, "use_ema": True, "lora_merge": merge}
    flags |= {"num_train_epochs": 2, "merge_every_epochs": 1}
    output = tmp_path / "out"
    assert_equal(fused(world, output, **flags), tiny_sd().unet.state_dict())
    # Nothing is left to train: the same adapter is saved in another form.
    adapter = load_file(train(world, output, lora_export="full_rank", **flags, **LATEST) / LORA)
    assert all(bool(tensor.any()) == (".lora_down." in name) for name, tensor in adapter.items())


@pytest.mark.parametrize("merge", MERGES)
def test_with_one_shard_the_merge_interval_changes_no_bit(world, tmp_path, merge):
    flags = {"num_shards": 1, "num_train_epochs": 3, "use_ema": True, "lora_merge": merge}
    often = train(world, tmp_path / "often", merge_every_epochs=1, **flags)
    never = train(world, tmp_path / "never", merge_every_epochs=3, **flags)
    steps = train(world, tmp_path / "steps", merge_every_epochs=None, merge_every_steps=5, **flags)
    assert (often / LORA).read_bytes() == (never / LORA).read_bytes() == (steps / LORA).read_bytes()


@pytest.mark.parametrize("alpha", [None, 7])
def test_one_shard_equals_a_plain_loop_with_peft_bit_for_bit(world, tmp_path, alpha):
    settings = {"num_train_epochs": 3, "merge_every_epochs": 1, "seed": 3, "lora_alpha": alpha}
    settings |= {"num_shards": 1, "agc_threshold": 0.0, "lora_format": "diffusers"}
    ours = load_file(train(world, tmp_path / "out", **settings) / LORA)
    pipeline = with_adapter(tiny_sd(timesteps=10), 3, r=2, lora_alpha=alpha or 2, target_modules=ATTENTION)
    reference = Reference(pipeline, samples(world), batch=2, lr=1e-2, seed=3)
    pipeline.unet.load_state_dict(reference.train(passes=3, passes_per_round=3))
    theirs = get_peft_model_state_dict(pipeline.unet)
    # What is saved has the scaling, 7 / 2, in it.
    scaling = (alpha or 2) / 2
    expected = {name: tensor * scaling if "lora_B" in name else tensor for name, tensor in theirs.items()}
    assert_equal(ours, {f"unet.{name}": tensor for name, tensor in expected.items()})
    assert all(tensor.any() for tensor in theirs.values())


def test_the_format_changes_the_names_alone(world, tmp_path):
    flags = {"num_train_epochs": 1, "merge_every_epochs": 1, "lora_alpha": 3, "lora_export": "full_rank"}
    one = train(world, tmp_path / "one", lora_format="diffusers", **flags) / LORA
    other = train(world, tmp_path / "other", lora_format="kohya", **flags) / LORA
    assert not load_file(one).keys() & load_file(other).keys()
    ours, theirs = read_lora(one), read_lora(other)
    for part in ("up", "down"):
        assert_equal(*({name: getattr(each, part) for name, each in file.items()} for file in (ours, theirs)))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_round_of_three_shards_is_the_mean_of_what_three_plain_loops_learn(world, tmp_path, ema_decay):
    ema = {} if ema_decay is None else {"use_ema": True, "ema_max_decay": ema_decay}
    settings = {"num_train_epochs": 6, "merge_every_epochs": 6, "adam_epsilon": 1e-4, "learning_rate": 1e-3}
    ours = fused(world, tmp_path / "out", lora_alpha=8, use_rslora=True, max_train_samples=11, **settings, **ema)
    lora = {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION}
    reference = OneRoundOfAdapters(
        with_adapter(tiny_sd(timesteps=10), **lora),
        [samples(world)[i] for i in _kept(tmp_path / "out")],
        scaling=8 / 2**0.5,
        shards=3,
        batch=2,
        lr=1e-3,
        eps=1e-4,
        threshold=0.99,
        decay=0.1,
        ema_decay=ema_decay,
    )
    expected = reference.train(passes=6, passes_per_round=6)
    assert len(reference.skipped) > 5
    assert sum(pq.read_table(tmp_path / "out" / "ledger.parquet")["skipped"].to_pylist()) == len(reference.skipped)
    assert_close(ours, expected, tolerance=2e-5)
    base = tiny_sd().unet.state_dict()
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if name.endswith(tuple(f".{layer}.weight" for layer in ATTENTION))}
    assert max((ours[name] - base[name]).abs().max().item() for name in base) > 1e-2


def _kept(output: Path) -> list[int]:
    """Which images were trained on, by their place in the folder."""
    return [int(Path(name).stem) for name in pq.read_table(output / "ledger.parquet")["image"].to_pylist()]


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_four_micro_batches_of_two_equal_one_batch_of_eight(world, tmp_path, threshold):
    settings = {"agc_threshold": threshold, "agc_decay": 0.0, "num_train_epochs": 3, "adam_epsilon": 1e-4}
    settings |= {"num_shards": 1, "learning_rate": 1e-3, "merge_every_epochs": 1}
    whole = fused(world, tmp_path / "whole", train_batch_size=8, **settings)
    parts = fused(world, tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert_close(whole, parts)
    base = tiny_sd().unet.state_dict()
    assert max((whole[name] - base[name]).abs().max().item() for name in base) > 1e-3


def test_gradient_checkpointing_changes_memory_and_not_the_weights(world, tmp_path):
    plain = fused(world, tmp_path / "plain", num_train_epochs=1)
    assert_close(plain, fused(world, tmp_path / "less", num_train_epochs=1, gradient_checkpointing=True), 1e-6)


def test_options_of_the_adapter_change_what_is_learnt(world, tmp_path):
    flags = {"num_train_epochs": 1, "use_ema": True, "ema_max_decay": 0.5}
    options = [
        {},
        {"lora_merge": "average"},
        {"lora_merge": "freeze_a"},
        {"lora_dropout": 0.5},
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"lora_layers": "to_q,to_v"},
        {"use_ema": False},
    ]
    results = [fused(world, tmp_path / str(i), **{**flags, **option}) for i, option in enumerate(options)]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    for i, result in enumerate(results):
        assert not any(torch.equal(result[name], other[name]) for other in results[:i]), options[i]
    key = name.replace("to_q", "to_k")
    assert torch.equal(results[6][key], tiny_sd().unet.state_dict()[key])


def test_the_device_holds_one_base_and_one_adapter_whatever_the_number_of_clones(world, tmp_path):
    pipeline = with_adapter(tiny_sd(), r=2, lora_alpha=2, target_modules=ATTENTION)
    expected = {name: parameter.shape for name, parameter in pipeline.unet.named_parameters()}
    seen = []

    def look(facts: StepFacts) -> None:
        seen.append({name: parameter.shape for name, parameter in denoiser.named_parameters()})
        assert list(denoiser.peft_config) == ["default"]
        moments = trainer.run.local._optimizer.state
        assert sum(state["exp_avg"].numel() for state in moments.values()) <= trained

    settings = config(world, tmp_path / "out", num_shards=4, num_train_epochs=4, use_ema=True)
    trainer = Trainer(settings, callbacks=[AtStepEnd(look)])
    denoiser = trainer.model.family.denoiser
    trained = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
    trainer.train()
    assert len(seen) == 32
    assert all(shapes == expected for shapes in seen)
    frozen = [name for name, parameter in denoiser.named_parameters() if not parameter.requires_grad]
    assert all("lora_" not in name for name in frozen)


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_a_base_in_half_precision_is_trained_in_full_and_saved_as_asked(world, tmp_path, save_dtype):
    tiny_sd(timesteps=10).to(torch.float16).save_pretrained(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": str(tmp_path / "base"), "save_dtype": save_dtype}
    flags |= {"num_train_epochs": 1, "merge_every_epochs": 1, **LATEST}
    adapter = load_file(train(world, tmp_path / "out", lora_export="full_rank", **flags) / LORA)
    assert {tensor.dtype for tensor in adapter.values()} == {getattr(torch, save_dtype or "float32")}
    denoiser = fused(world, tmp_path / "out", **flags)
    assert {tensor.dtype for tensor in denoiser.values()} == {getattr(torch, save_dtype or "float16")}


@pytest.mark.parametrize("form", ["truncate", "full_rank", "fuse"])
def test_the_card_says_what_was_saved_and_what_it_lost(world, tmp_path, form):
    output = train(world, tmp_path / "out", num_train_epochs=2, merge_every_epochs=1, lora_export=form)
    card = (output / "README.md").read_text()
    words = {
        "truncate": "a LoRA file of rank 2, which lost",
        "full_rank": "exact: more than the 2 trained",
        "fuse": "a whole pipeline, the adapter's update added to its weights",
    }
    assert [key for key, text in words.items() if text in card] == [form]
    assert ("load_lora_weights" in card) == (form != "fuse")


def test_a_base_held_in_half_precision_changes_no_bit_of_a_run_in_mixed_precision(world, tmp_path, monkeypatch):
    settings = {"mixed_precision": "bf16", "num_shards": 2, "merge_every_epochs": 1, "num_train_epochs": 2}
    half = fused(world, tmp_path / "half", **settings)
    monkeypatch.setattr(Adapter, "round_frozen", lambda self, dtype: [])
    whole = fused(world, tmp_path / "whole", **settings)
    assert_equal(half, whole)
    base = tiny_sd().unet.state_dict()
    changed = {name for name in base if not torch.equal(half[name], base[name])}
    assert changed
    assert all(".attn" in name for name in changed)

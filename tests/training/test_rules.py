"""What a run does with a skip rule: decisions, other targets, frozen references, and state of its own."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rules
import torch
from accelerate.state import AcceleratorState
from reference import TeachingOddOnes, rng
from rules import SEED, TIMESTEPS, Asking, Borrowing
from runs import assert_close, assert_equal, run_until, samples, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_sd_of_one_width, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.config.registry import SKIP_RULES
from iet_finetune.method.rules import Run
from iet_finetune.training.needs import need_of_rule

IMAGES = 12
REGISTER = f"sys.path.append({str(Path(rules.__file__).parent)!r}); import rules; rules.register()"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the pipeline `base`, and `data`: 12 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base")
    save_images(folder / "data", IMAGES)
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The rules of tests, for the time of a test."""
    monkeypatch.setattr(SKIP_RULES, "entries", SKIP_RULES.entries | rules.RULES)


def config(world: Path, output: Path, rule: str, **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "skip_rule": rule,
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 2,
        "num_train_epochs": 3,
        "merge_every_epochs": 1,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-2,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


# --- the decision ----------------------------------------------------------------------------------------------------


def test_a_rule_that_skips_by_image_skips_these_images_in_every_step(world, tmp_path):
    Trainer(config(world, tmp_path / "out", "SkipOdd")).train()
    ledger = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pydict()
    assert ledger["seen"] == [3] * IMAGES
    assert ledger["skipped"] == [0, 3] * (IMAGES // 2)
    assert ledger["mean_log_ratio"] == [None] * IMAGES


# 5 images to a shard's step of 4: the last step is shorter, and its last micro-batch, too.
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_what_is_not_kept_learns_something_else_whose_gradient_is_not_rescaled(world, tmp_path, batch, accumulate):
    flags = {"train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_train_samples": 10}
    trainer = Trainer(config(world, tmp_path / "out", "TeachOdd", **flags))
    chosen = [samples(world)[int(name.removesuffix(".png")[-3:])] for name in trainer.data.images.names]
    trainer.train()
    slow = TeachingOddOnes(tiny_sd(), chosen, shards=2, batch=4, lr=1e-3, eps=1e-2)
    assert_close(weights(tmp_path / "out"), slow.train(passes=3, passes_per_round=1), tolerance=2e-6)


def test_ranks_that_train_a_clone_together_learn_the_same_instead(world, tmp_path):
    flags = {"num_shards": 1, "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_samples": 10}
    settings = config(world, tmp_path / "two", "TeachOdd", **flags)
    for ended in train_on_ranks(2, settings, REGISTER):
        assert ended.code == 0, ended.stderr
    Trainer(config(world, tmp_path / "one", "TeachOdd", **flags)).train()
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), tolerance=2e-6)


def test_a_step_that_keeps_nothing_still_learns_what_there_is_instead(world, tmp_path):
    def trained(rule, **flags):
        output = tmp_path / rule
        Trainer(config(world, output, rule, num_train_epochs=1, **flags)).train()
        return weights(output)

    assert_equal(trained("Nothing"), tiny_sd().unet.state_dict())
    # Everything learns the true target with weight 1: plain training.
    assert_close(trained("OnlyInstead"), trained("agc", agc_threshold=0.0), tolerance=1e-6)


@pytest.mark.slow
def test_a_compiled_denoiser_learns_the_same_instead(world, tmp_path, monkeypatch):
    compile_ = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    torch._dynamo.reset()
    base = str(save_sd_of_one_width(tmp_path / "base"))
    for name in ("compiled", "plain"):
        flags = {"num_train_epochs": 1, "compile": name == "compiled", "pretrained_model_name_or_path": base}
        Trainer(config(world, tmp_path / name, "TeachOdd", **flags)).train()
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), tolerance=1e-6)


# --- what is lent ----------------------------------------------------------------------------------------------------

LORA = {"use_lora": True, "rank": 1, "lora_export": "fuse"}


@pytest.mark.parametrize("extra", [{}, {**LORA, "learning_rate": 0.1}], ids=["full", "lora"])
def test_what_is_lent_is_the_network_as_it_came_as_the_round_starts_and_on_average(
    world, tmp_path, monkeypatch, extra
):
    borrowed = ("base", "ema", "merged", "reference")
    monkeypatch.setattr(Asking, "borrows", borrowed)
    trainer = Trainer(config(world, tmp_path / "out", "Asking", use_ema=True, num_train_epochs=2, **extra))
    trainer.train_rounds()
    unet = trainer.model.family.denoiser
    lent = answer(trainer, lambda run: run.keep_reference() or {which: run.lend(which) for which in borrowed})
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 12, 16)
    found = {which: network(*inputs).sample for which, network in lent.items()}
    assert torch.equal(found["base"], tiny_sd().unet.eval()(*inputs).sample)
    for which, name in (("merged", "denoiser"), ("ema", "ema")):
        trainer.ensemble._mergers[name].load_into(trainer.model.trainable)
        assert torch.equal(found[which], unet(*inputs).sample)
    assert torch.equal(found["reference"], found["ema"])
    assert len({float(each.sum()) for each in found.values()}) == 3, "they do not differ"
    # Later rounds have other weights, and the same reference.
    for tensor in trainer.ensemble._mergers["ema"].tensors.values():
        tensor.mul_(1.5)
    ema, reference = answer(trainer, lambda run: (run.lend("ema"), run.lend("reference")))
    assert torch.equal(reference(*inputs).sample, found["reference"])
    assert not torch.equal(ema(*inputs).sample, found["ema"])


def answer(trainer: Trainer, question: Callable[[Run], Any]) -> Any:
    """What the run answers a rule when its next round begins."""
    rule = trainer.ensemble.clones[0].rule
    rule.question = question
    trainer.run.lender.begin_round([rule], trainer.ensemble.round, 1)
    return rule.answer


def bytes_alive() -> int:
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    storages = {(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("extra", [{}, {**LORA, "learning_rate": 0.1}], ids=["full", "lora"])
def test_lent_networks_take_the_memory_that_was_counted_and_are_no_second_denoiser(world, tmp_path, extra):
    trainer = Trainer(config(world, tmp_path / "out", "Borrowing", **extra))
    trainer.train_rounds()
    model = trainer.model
    trained = sum(parameter.nbytes for parameter in model.trainable.parameters.values())
    whole = sum(parameter.nbytes for parameter in model.family.denoiser.parameters())
    with_them = bytes_alive()
    trainer.run.lender.release()
    took = with_them - bytes_alive()
    if extra:
        # The adapter twice, and what was folded into the frozen weights below it.
        assert 2 * trained < took <= need_of_rule(Borrowing, None, trained, model.adapter.nbytes).device
        assert took < whole / 2
    else:
        assert took == 2 * whole == need_of_rule(Borrowing, None, trained, 0).device


def test_a_moving_average_that_is_not_kept_cannot_be_lent(world, tmp_path):
    with pytest.raises(UserError, match="needs `--use_ema`"):
        Trainer(config(world, tmp_path / "out", "Averaged"))


def test_a_rule_that_compares_with_the_moving_average_skips(world, tmp_path):
    Trainer(config(world, tmp_path / "out", "Averaged", use_ema=True, num_train_epochs=4)).train()
    skipped = sum(pq.read_table(tmp_path / "out" / "ledger.parquet")["skipped"].to_pylist())
    assert 0 < skipped < 4 * IMAGES


def test_a_rule_that_asks_for_what_it_does_not_borrow_or_too_late_is_told_so(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", "Asking"))
    with pytest.raises(ValueError, match="'ema' must name it in `borrows`"):
        answer(trainer, lambda run: run.lend("ema"))
    # Losses need no network beside the live one, but there must be a moving average.
    with pytest.raises(ValueError, match="no losses of 'ema': ask for base, merged, ema or result"):
        answer(trainer, lambda run: run.losses("ema", [0], TIMESTEPS, SEED))
    ours, theirs = answer(
        trainer, lambda run: [run.losses(which, [0], TIMESTEPS, SEED) for which in ("result", "merged")]
    )
    assert torch.equal(ours, theirs)
    run = answer(trainer, lambda run: run)
    with pytest.raises(ValueError, match="only ask for networks and their losses in `begin_round`"):
        run.lend("base")


# --- losses by image -------------------------------------------------------------------------------------------------


def test_losses_by_image_are_those_of_the_formula_with_noise_that_follows_from_the_content(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", "Asking"))
    chosen = [11, 2, 5]
    found, hashes = answer(trainer, lambda run: (run.losses("merged", chosen, TIMESTEPS, SEED), run.content_hashes))
    pipeline = tiny_sd()
    for row, index in zip(found, chosen, strict=True):
        image, caption = samples(world)[index]
        words = [int(hashes[index][i : i + 8], 16) for i in range(0, 32, 8)]
        noise = torch.from_numpy(rng(SEED, 6, *words).standard_normal((3, 4, 8, 8), dtype=np.float32))
        latents = pipeline.vae.encode(image[None]).latent_dist.mean * pipeline.vae.config.scaling_factor
        tokens = pipeline.tokenizer(caption, padding="max_length", max_length=12, return_tensors="pt")
        hidden = pipeline.text_encoder(tokens.input_ids)[0]
        for value, draw, timestep in zip(row, noise, torch.tensor(TIMESTEPS), strict=True):
            noisy = pipeline.scheduler.add_noise(latents, draw[None], timestep[None])
            with torch.no_grad():
                error = pipeline.unet(noisy, timestep[None], hidden).sample - draw
            assert value.item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    # Training has moved the live weights, but not the base.
    trainer.train_rounds()
    assert torch.equal(answer(trainer, lambda run: run.losses("base", chosen, TIMESTEPS, SEED)), found)
    assert not torch.equal(answer(trainer, lambda run: run.losses("merged", chosen, TIMESTEPS, SEED)), found)


# --- ranks and stops -------------------------------------------------------------------------------------------------


def what_is_left(output: Path) -> dict[str, bytes]:
    names = ("unet/diffusion_pytorch_model.safetensors", "metrics.jsonl", "ledger.parquet")
    return {name: (output / name).read_bytes() for name in names}


@pytest.mark.parametrize("extra", [{}, {"use_lora": True, "rank": 1, "lora_export": "fuse"}], ids=["full", "lora"])
def test_references_and_state_of_a_rule_are_the_same_on_two_ranks_and_after_stops(world, tmp_path, extra):
    flags = {"checkpointing_steps": 2, "resume_from_checkpoint": "latest", "holdout_fraction": 0.25, **extra}
    flags["num_train_epochs"] = 2
    Trainer(config(world, tmp_path / "whole", "Remembering", **flags)).train()
    ledger = pq.read_table(tmp_path / "whole" / "ledger.parquet")
    assert 3 < sum(ledger["skipped"].to_pylist()) < sum(ledger["seen"].to_pylist()) - 3
    for steps in (3, 6):  # in the middle of the first round, and of the second
        AcceleratorState._reset_state(reset_partial_state=True)
        run_until(config(world, tmp_path / "stopped", "Remembering", **flags), steps)
    Trainer(config(world, tmp_path / "stopped", "Remembering", **flags)).train()
    assert what_is_left(tmp_path / "stopped") == what_is_left(tmp_path / "whole")
    settings = config(world, tmp_path / "two", "Remembering", **flags)
    for ended in train_on_ranks(2, settings, REGISTER):
        assert ended.code == 0, ended.stderr
    assert what_is_left(tmp_path / "two") == what_is_left(tmp_path / "whole")

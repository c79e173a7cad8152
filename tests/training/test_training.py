"""What training promises, checked on a real pipeline and real images, exactly where exactness is promised."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from reference import Reference
from runs import assert_close, assert_equal, samples
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer

IMAGES = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with pipelines `epsilon` and `v_prediction`, and `data`: 12 images of 16 pixels."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "epsilon")
    save_tiny_sd(folder / "v_prediction", prediction_type="v_prediction")
    save_tiny_sd(folder / "short", timesteps=10)
    tiny_sd().to(torch.float16).save_pretrained(folder / "half")
    save_images(folder / "data", IMAGES)
    return folder


def config(world: Path, output: Path, base: str = "epsilon", **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / base),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 4,
        "num_shards": 1,
        "num_train_epochs": 2,
        "merge_every_epochs": 1,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def train(world: Path, output: Path, base: str = "epsilon", **flags) -> dict[str, torch.Tensor]:
    """Trains and returns the saved denoiser."""
    return saved(Trainer(config(world, output, base, **flags)).train())


def saved(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("extra", [{}, {"use_ema": True, "merge_weighting": "uniform"}])
def test_learning_rate_zero_returns_the_denoiser_bit_for_bit(world, tmp_path, shards, extra):
    result = train(world, tmp_path / "out", num_shards=shards, learning_rate=0.0, **extra)
    assert_equal(result, tiny_sd().unet.state_dict())


@pytest.mark.parametrize("base", ["epsilon", "v_prediction"])
def test_one_shard_without_agc_equals_a_plain_loop_bit_for_bit(world, tmp_path, base):
    result = train(world, tmp_path / "out", base, agc_threshold=0.0, num_train_epochs=3)
    plain = Reference(tiny_sd(base), samples(world)).train(passes=3, passes_per_round=3)
    assert_equal(result, plain)


@pytest.mark.parametrize("threshold", [0.0, 0.8])
def test_four_micro_batches_of_two_equal_one_batch_of_eight(world, tmp_path, threshold):
    settings = {"agc_threshold": threshold, "agc_decay": 0.0, "num_train_epochs": 3, "adam_epsilon": 1e-4}
    whole = train(world, tmp_path / "whole", train_batch_size=8, **settings)
    parts = train(world, tmp_path / "parts", train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert_close(whole, parts)
    assert not torch.equal(whole["conv_in.weight"], tiny_sd().unet.conv_in.weight)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_three_shards_with_agc_equal_the_method_written_from_the_paper(world, tmp_path, ema_decay):
    output = tmp_path / "out"
    ema = {} if ema_decay is None else {"use_ema": True, "ema_max_decay": ema_decay}
    settings = {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "agc_decay": 0.1, "seed": 4, "lr_warmup_steps": 3}
    # On a schedule of 10 timesteps each of them is visited often enough for skips.
    result = train(
        world,
        output,
        "short",
        num_shards=3,
        agc_threshold=0.99,
        num_train_epochs=9,
        merge_every_epochs=3,
        train_batch_size=2,
        lr_scheduler="constant_with_warmup",
        **settings,
        **ema,
    )
    reference = Reference(
        tiny_sd(timesteps=10),
        samples(world),
        shards=3,
        batch=2,
        lr=1e-3,
        eps=1e-4,
        threshold=0.99,
        decay=0.1,
        seed=4,
        warmup=3,
        ema_decay=ema_decay,
    )
    expected = reference.train(passes=9, passes_per_round=3)
    assert len(reference.skipped) > 5
    ledger = pq.read_table(output / "ledger.parquet")
    assert sum(ledger["skipped"].to_pylist()) == len(reference.skipped)
    assert_close(result, expected, tolerance=2e-5)


def test_with_one_shard_the_merge_interval_changes_no_bit(world, tmp_path):
    settings = {"num_train_epochs": 4, "use_ema": True}
    often = train(world, tmp_path / "often", merge_every_epochs=1, **settings)
    assert_equal(often, train(world, tmp_path / "never", merge_every_epochs=4, **settings))
    assert_equal(often, train(world, tmp_path / "steps", merge_every_epochs=None, merge_every_steps=5, **settings))


def test_reading_ahead_with_workers_changes_no_bit(world, tmp_path):
    settings = {"num_shards": 2, "random_flip": True, "caption_dropout": 0.5, "noise_offset": 0.1}
    alone = train(world, tmp_path / "alone", **settings)
    assert_equal(alone, train(world, tmp_path / "workers", dataloader_num_workers=2, **settings))


def test_options_that_change_what_is_learnt_change_the_weights(world, tmp_path):
    plain = train(world, tmp_path / "plain")
    options = [
        {"random_flip": True},
        {"caption_dropout": 0.5},
        {"noise_offset": 0.1},
        {"snr_gamma": 5.0},
        {"seed": 1},
        {"prediction_type": "v_prediction"},
        {"max_grad_norm": 0.01, "adam_epsilon": 1e-3},
        {"scale_lr": True},
        {"lr_scheduler": "cosine"},
        {"optimizer_across_rounds": "reset"},
        {"mixed_precision": "bf16"},
        {"merge_every_epochs": 2, "num_shards": 2},
    ]
    for number, option in enumerate(options):
        AcceleratorState._reset_state(reset_partial_state=True)
        result = train(world, tmp_path / str(number), **option)
        assert not torch.equal(result["conv_in.weight"], plain["conv_in.weight"]), option


def test_gradient_checkpointing_changes_memory_and_not_the_weights(world, tmp_path):
    plain = train(world, tmp_path / "plain")
    assert_close(plain, train(world, tmp_path / "less", gradient_checkpointing=True), tolerance=1e-6)


@pytest.mark.parametrize("base", ["epsilon", "v_prediction", "half"])
def test_the_result_loads_and_draws(world, tmp_path, base):
    train(world, tmp_path / "out", base, num_shards=2)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == base.replace("half", "epsilon")
    image = pipeline("a thing", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (RESOLUTION, RESOLUTION, 3)
    assert image.std() > 0


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_components_keep_the_bits_and_precision_they_came_in(world, tmp_path, save_dtype):
    base = tiny_sd().to(torch.float16)
    base.vae.to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    flags = {"save_dtype": save_dtype, "learning_rate": 0.0, "pretrained_model_name_or_path": str(tmp_path / "base")}
    train(world, tmp_path / "out", **flags)
    for component in ("vae", "text_encoder"):
        file = next((tmp_path / "base" / component).glob("*.safetensors")).relative_to(tmp_path / "base")
        assert_equal(load_file(tmp_path / "out" / file), load_file(tmp_path / "base" / file))
    denoiser = saved(tmp_path / "out")
    assert {tensor.dtype for tensor in denoiser.values()} == {getattr(torch, save_dtype or "float16")}
    scheduler = "scheduler/scheduler_config.json"
    assert json.loads((tmp_path / "out" / scheduler).read_text()) == json.loads(
        (tmp_path / "base" / scheduler).read_text()
    )


def test_the_saved_folder_names_no_path_of_this_machine(world, tmp_path):
    train(world, tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.json"):
        if "checkpoint" not in str(file):
            assert str(world) not in file.read_text(), file


def test_the_ledger_counts_every_visit_of_every_image(world, tmp_path):
    train(world, tmp_path / "out", num_shards=3, num_train_epochs=3, holdout_fraction=0.25)
    ledger = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    assert len(ledger) == IMAGES
    trained = [row for row in ledger if row["split"] == "train"]
    assert len(trained) == 9
    assert all(row["seen"] == 3 for row in trained)
    assert sorted({row["shard"] for row in trained}) == [0, 1, 2]
    heldout = [row for row in ledger if row["split"] == "heldout"]
    assert all(row["seen"] == 0 and row["shard"] is None for row in heldout)


def test_metrics_have_one_line_a_round_with_what_happened(world, tmp_path):
    train(world, tmp_path / "out", num_shards=3, num_train_epochs=3, merge_every_epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [6, 9]
    assert all(len(line["shard_loss"]) == 3 and line["loss"] > 0 for line in lines)
    assert all(drift > line["merge_drift"] > 0 for line in lines for drift in line["clone_drift"])


def test_validation_draws_the_same_noise_before_and_after(world, tmp_path):
    output = tmp_path / "out"
    flags = {"validation_prompts": ["one", "two"], "num_validation_images": 2, "validation_inference_steps": 2}
    drawn = train(world, output, num_train_epochs=3, validation_rounds=2, **flags)
    assert sorted(path.name for path in (output / "validation").glob("round-*")) == [
        "round-0000.png", "round-0002.png", "round-0003.png",
    ]  # fmt: skip
    assert_equal(drawn, train(world, tmp_path / "silent", num_train_epochs=3))
    frozen = tmp_path / "frozen"
    train(world, frozen, learning_rate=0.0, **flags)
    pictures = [Image.open(path) for path in sorted((frozen / "validation").glob("round-*"))]
    assert len(pictures) == 3
    assert all(np.array_equal(pictures[0], picture) for picture in pictures)
    assert np.asarray(Image.open(frozen / "validation" / "before_after.png")).std() > 0


def test_a_step_that_is_not_finite_or_keeps_nothing_changes_nothing(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", use_ema=True))
    ensemble, local = trainer.ensemble, trainer.run.local
    clone = ensemble.checkout([0])
    steps = list(trainer.data.schedule.steps(0, 0, 3))
    run = local.run(clone, trainer.data.shards[0], steps, trainer.run.learning_rates[0])
    next(run)
    before = {name: tensor.clone() for name, tensor in trainer.model.trainable.tensors.items()}
    average = {name: tensor.clone() for name, tensor in ensemble._ema.tensors.items()}
    moments = {i: {k: v.clone() for k, v in s.items()} for i, s in local._optimizer.state_dict()["state"].items()}
    bank = clone.rule.agc.bank.clone()
    clone.rule.agc.bank.fill_(1e9)
    next(run)
    clone.rule.agc.bank.copy_(bank)
    trainer.model.family.objective.alphas_cumprod.fill_(float("nan"))
    next(run)
    assert clone.step == 3
    assert clone.meter.read().broken_step == 2
    assert_equal(before, trainer.model.trainable.tensors)
    assert_equal(average, ensemble._ema.tensors)
    for i, state in local._optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[i][name]) for name, value in state.items())
    assert torch.equal(clone.rule.agc.bank, bank)

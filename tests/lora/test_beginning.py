"""`--init_lora`: an adapter begins with a file's update, of whatever format, rank and scaling."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from lora_runs import LORA, config, train
from loras import ATTENTION, save_adapter
from runs import assert_close, run_until
from tiny import save_images, save_tiny_sd

from iet_finetune import Trainer, UserError
from iet_finetune.lora.file import write_lora
from iet_finetune.lora.reading import read_lora

STILL = {"learning_rate": 0.0, "num_train_epochs": 1, "merge_every_epochs": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, 12 images, and adapters of it: `plain` of rank 2, `scaled` by 3 and `wide` of 5."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    for number, (name, rank, alpha) in enumerate([("plain", 2, 2), ("scaled", 2, 6), ("wide", 5, 5)]):
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": ATTENTION}
        save_adapter(folder / name, number, unet=settings)
    return folder


def begun(world: Path, output: Path, name: str, **flags: Any) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trainer(config(world, output, init_lora=str(world / name), **flags))


@pytest.mark.parametrize("flags", [{"use_ema": True}, {"lora_merge": "freeze_a"}])
def test_with_a_learning_rate_of_0_the_adapter_comes_back_to_the_bit(world, tmp_path, flags):
    output = train(world, tmp_path / "out", init_lora=str(world / "plain" / LORA), **STILL, **flags)
    ours, theirs = read_lora(output / LORA), read_lora(world / "plain" / LORA)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].up, theirs[name].up) for name in theirs)
    assert all(torch.equal(ours[name].down, theirs[name].down) for name in theirs)
    card = (output / "README.md").read_text()
    assert "| began from | a LoRA file of rank 2 |" in card
    assert str(world) not in card


def test_a_scaling_is_folded_as_in_a_converted_file_whatever_its_names(world, tmp_path):
    layers = read_lora(world / "scaled" / LORA)
    write_lora(tmp_path / "kohya.safetensors", layers, "kohya")
    expected = {name: layer.folded(torch.float32) for name, layer in layers.items()}
    for number, file in enumerate(("scaled", str(tmp_path / "kohya.safetensors"))):
        layers = begun(world, tmp_path / f"{number}", file).model.adapter.layers
        assert all(torch.equal(layer.up_weight, expected[f"unet.{name}"].up) for name, layer in layers.items())
        assert all(torch.equal(layer.down_weight, expected[f"unet.{name}"].down) for name, layer in layers.items())


@pytest.mark.parametrize("flags", [{"rank": 4}, {"rank": 3, "lora_alpha": 5}, {"lora_alpha": 1, "use_rslora": True}])
def test_another_rank_or_scaling_of_the_run_keeps_the_update(world, tmp_path, flags):
    adapter = begun(world, tmp_path / "out", "scaled", **flags).model.adapter
    found = {f"unet.{name}": update.dense().float() for name, update in adapter.updates(adapter.live).items()}
    theirs = {name: layer.update().dense().float() for name, layer in read_lora(world / "scaled" / LORA).items()}
    assert_close(found, theirs, 1e-6)


def test_a_rank_beyond_the_files_and_layers_that_it_lacks_can_still_learn(world, tmp_path):
    trainer = begun(world, tmp_path / "out", "plain", rank=3, lora_layers="to_q,to_k,to_v,to_out.0,proj_in")
    layers = trainer.model.adapter.layers
    for name, layer in layers.items():
        new = 0 if name.endswith("proj_in") else 2
        assert layer.up_weight[:, new:].count_nonzero() == 0
        assert layer.down_weight[new:].count_nonzero() > 0
        assert (layer.up_weight[:, :new].count_nonzero() > 0) == (new > 0)


def test_it_draws_what_the_file_draws(world, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    pipeline.load_lora_weights(world / "plain")
    noisy, at, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 7]), torch.randn(2, 12, 16)
    unet = begun(world, tmp_path / "out", "plain").model.family.denoiser
    with torch.no_grad():
        assert torch.equal(unet(noisy, at, text).sample, pipeline.unet(noisy, at, text).sample)


def test_the_base_of_a_rule_is_the_pipeline_without_the_adapter(world, tmp_path):
    rule = {"skip_rule": "calibrated_agc", "agc_threshold": 0.8, "agc_decay": 0.8}
    losses = []
    for trainer in (begun(world, tmp_path / "a", "plain", **rule), begun(world, tmp_path / "b", "scaled", **rule)):
        lender = trainer.run.lender
        lender._asking = True
        losses.append(lender.losses("base", range(4), [1, 5], 0))
        assert not torch.equal(losses[-1], lender.losses("merged", range(4), [1, 5], 0))
    assert torch.equal(*losses)


def test_a_run_goes_on_with_the_same_adapter_alone(world, tmp_path):
    shutil.copytree(world / "plain", tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)
    run_until(config(world, tmp_path / "out", init_lora=str(tmp_path / "plain")), 3)
    for other in (None, str(world / "scaled")):
        with pytest.raises(UserError, match="the adapter of `--init_lora` has changed. Put it back"):
            Trainer(config(world, tmp_path / "out", resume_from_checkpoint="latest", init_lora=other))
    # Another place is not another adapter.
    (tmp_path / "plain").rename(tmp_path / "moved")
    again = {"resume_from_checkpoint": "latest", "init_lora": str(tmp_path / "moved" / LORA)}
    assert Trainer(config(world, tmp_path / "out", **again)).ensemble.step == 2


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("nothing", {}, "nothing`: there is no such LoRA file, nor a folder with pytorch_lora_weights.safetensors."),
        ("data/000.png", {}, "`--init_lora`: `"),
        ("wide", {}, "wide` has rank 5, and `--rank` is 2: give `--rank 5`."),
        (
            "plain",
            {"lora_layers": "to_q"},
            "others, which have no adapter here: give `--lora_layers to_k,to_out.0,to_q",
        ),
        ("text", {}, "changes `text_encoder."),
        ("narrow", {}, "it was made for another model."),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line(world, tmp_path, name, flags, words):
    if name == "text":
        save_adapter(
            world / name,
            5,
            unet={"r": 2, "target_modules": ["to_q"]},
            text_encoder={"r": 2, "target_modules": ["q_proj"]},
        )
    if name == "narrow":
        layers = read_lora(world / "plain" / LORA)
        (world / name).mkdir()
        write_lora(world / name / LORA, {key: each._replace(up=each.up[:-1]) for key, each in layers.items()})
    with pytest.raises(UserError) as caught:
        begun(world, tmp_path / "out", name, **flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

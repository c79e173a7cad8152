"""`--save_every_rounds`: a round is saved as the result of a run that ends there is, and that changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from runs import assert_equal, files, run_until
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, tiny_sd

from iet_finetune import Config, Trainer
from iet_finetune.publish import outputs
from iet_finetune.publish.result import Result
from iet_finetune.publish.upload_list import upload_list

LORA = "pytorch_lora_weights.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    # In the order of memory and the precision that files do not have.
    "whole": {"use_ema": True, "channels_last": True, "save_dtype": "float16", "cache_latents": False},
    "LoRA file": {"use_lora": True, "rank": 2},
    "LoRA fused": {"use_lora": True, "rank": 2, "lora_export": "fuse"},
    "LoRA fused, in halves": {"use_lora": True, "rank": 2, "lora_export": "fuse", "mixed_precision": "bf16"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline stored in half precision but for its UNet, and 4 images."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = tiny_sd()
    pipeline.vae.to(torch.float16)
    pipeline.text_encoder.to(torch.float16)
    pipeline.save_pretrained(folder / "base")
    save_images(folder / "data", 4)
    return folder


def config(world: Path, output: Path, **flags: Any) -> Config:
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "output_dir": str(output), "resolution": RESOLUTION, "train_batch_size": 2, "num_shards": 2,
        "num_train_epochs": 2, "merge_every_epochs": 1, "lr_warmup_steps": 0, "learning_rate": 1e-2,
        "report_to": "none", "checkpoints_total_limit": 1,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def saved(folder: Path) -> dict[str, bytes]:
    """The files of a pipeline or of a LoRA file."""
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json", LORA)
    return {name: (folder / name).read_bytes() for name in files(folder) if name.split("/")[0] in parts}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_round_is_the_result_of_a_run_that_ends_there_and_changes_nothing(world, tmp_path, kind):
    Trainer(config(world, tmp_path / "out", save_every_rounds=1, **KINDS[kind])).train()
    Trainer(config(world, tmp_path / "plain", **KINDS[kind])).train()
    rounds = tmp_path / "out" / "rounds"
    assert sorted(path.name for path in rounds.iterdir()) == ["round-1", "round-2"]
    expected = saved(tmp_path / "plain")
    for found in (saved(rounds / "round-2"), saved(tmp_path / "out")):
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
    assert saved(rounds / "round-1") != expected
    if "model_index.json" in expected:
        DiffusionPipeline.from_pretrained(rounds / "round-1", safety_checker=None)
    else:
        DiffusionPipeline.from_pretrained(world / "base").load_lora_weights(rounds / "round-1")
    assert not any(name.startswith("rounds") for name in upload_list(tmp_path / "out"))


def test_a_pipeline_in_memory_is_trained_on_after_its_round_was_saved(world, tmp_path):
    flags = {"pretrained_model_name_or_path": None, "save_every_rounds": 2, **KINDS["LoRA fused"]}
    Trainer(config(world, tmp_path / "out", **flags), pipeline=tiny_sd()).train()
    assert [path.name for path in (tmp_path / "out" / "rounds").iterdir()] == ["round-2"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(tmp_path / "out" / "rounds" / "round-2" / weights), load_file(tmp_path / "out" / weights))


def test_a_round_is_saved_once_also_if_the_run_was_stopped_while_it_was(world, tmp_path, monkeypatch):
    flags = {"num_train_epochs": 3, "save_every_rounds": 1, "resume_from_checkpoint": "latest", **KINDS["LoRA file"]}
    Trainer(config(world, tmp_path / "whole", **flags)).train()
    save, calls = Result.save_copy, []

    def cut_short(self, folder):
        save(self, folder)
        calls.append(folder)
        if len(calls) == 2:
            # As a killed process leaves it.
            shutil.copytree(folder, tmp_path / "kept")
            raise KeyboardInterrupt

    monkeypatch.setattr(Result, "save_copy", cut_short)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(world, tmp_path / "out", **flags)).train()
    rounds = tmp_path / "out" / "rounds"
    shutil.copytree(tmp_path / "kept", rounds / ".round-2.partial")
    (first,) = (path for path in rounds.iterdir() if path.name == "round-1")
    written = (first / LORA).stat().st_mtime_ns
    run_until(config(world, tmp_path / "out", **flags), 1)
    assert [path.name for path in calls[2:]] == [".round-2.partial"]
    Trainer(config(world, tmp_path / "out", **flags)).train()
    assert [path.name for path in calls[3:]] == [".round-3.partial"]
    assert (first / LORA).stat().st_mtime_ns == written
    assert files(rounds) == files(tmp_path / "whole" / "rounds")
    assert all(
        (rounds / name).read_bytes() == (tmp_path / "whole" / "rounds" / name).read_bytes() for name in files(rounds)
    )


def test_what_is_trained_again_replaces_what_was_saved_of_it(tmp_path):
    for text, again in (("a", True), ("b", False), ("c", True)):

        def save(folder: Path, text: str = text) -> None:
            folder.mkdir()
            (folder / "file").write_text(text)

        outputs.publish_round(tmp_path, 3, save, again=again)
        assert (tmp_path / "rounds" / "round-3" / "file").read_text() == {"b": "a"}.get(text, text)
    assert files(tmp_path) == ["rounds/round-3/file"]

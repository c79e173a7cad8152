"""An audit on a GPU has on it only what each phase needs; told to do so on a CPU, it gives the same bits there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_runs import run_audit, save_mosaic
from tiny import RESOLUTION, save_images
from tiny_families import tiny_pipeline
from torch import nn

from iet_finetune.audit.inputs import pipelines
from iet_finetune.audit.inputs.batches import images_at_once, rows_together
from iet_finetune.families import base, precision

SMALL = {"num_images": 6, "num_inference_steps": 2, "eval_batch_size": 4, "resolution": RESOLUTION}
GB = 10**9


@pytest.fixture(scope="module", params=["sd3", "pixart alpha"])
def world(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_images(folder / "train", 9)
    save_images(folder / "held", 5, seed=1)
    save_mosaic(folder)
    for seed, name in enumerate(("model", "base")):
        tiny_pipeline(request.param, seed=seed).save_pretrained(folder / name)
    return folder


def audited(world: Path, output: Path, **flags: Any) -> dict[str, Any]:
    folders = {"train_data_dir": world / "train", "holdout_data_dir": world / "held"}
    names = {"model": world / "model", "reference_model": world / "base", "features": world / "mosaic.pt"}
    return run_audit(output, **folders, **names, **SMALL, **flags)


@pytest.fixture
def visits(monkeypatch) -> list[list[str]]:
    """Lets models travel on a CPU, and notes which kinds are on the device at once."""
    there: list[str] = []
    seen: list[list[str]] = []
    computing = precision.computing

    @contextmanager
    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
        there.append(type(module).__name__)
        seen.append(list(there))
        with computing(module, *args, **kwargs):
            yield
        there.pop()

    for user in (base, precision):
        monkeypatch.setattr(user, "computing", noting)
    monkeypatch.setattr(pipelines, "_travels", lambda class_name, device: True)
    return seen


@pytest.mark.parametrize("given", ["no", None])
def test_models_travel_one_after_the_other_and_change_no_bit_in_full_precision(world, tmp_path, visits, given):
    travelled = audited(world, tmp_path / "out", **({} if given is None else {"mixed_precision": given}))
    predicting = [each for each in visits if any("Transformer2DModel" in name for name in each)]
    # With the VAE to draw, and alone to predict losses.
    assert {len(each) for each in predicting} == {1, 2}
    assert all("AutoencoderKL" in each for each in predicting if len(each) == 2)
    assert ["AutoencoderKL"] in visits
    assert any("T5EncoderModel" in each for each in visits)
    assert travelled["settings"]["mixed_precision"] == (given or "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        patch.setattr(pipelines, "_travels", lambda class_name, device: False)
        plain = audited(world, tmp_path / "plain")
    assert plain["settings"]["mixed_precision"] == "no"
    assert {"mia_ref_auc", "heldout_loss", "prompt_memorization"} <= plain["metrics"].keys()
    same = travelled["metrics"] == plain["metrics"]
    assert same is (given == "no")
    loss = [each["metrics"]["heldout_loss"]["value"] for each in (travelled, plain)]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)


def test_half_precision_is_for_denoisers_of_latents_on_a_gpu(world, monkeypatch):
    from iet_finetune import Config

    gpu, cpu = torch.device("cuda"), torch.device("cpu")

    def chosen(device: torch.device, class_name: str = "FluxPipeline", has_vae: bool = True, **flags: Any) -> str:
        return pipelines.precision_on(device, Config.from_flags(**flags), class_name, has_vae=has_vae)

    for supported, half in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, is_=supported: is_)
        assert chosen(gpu) == half
    assert chosen(gpu, mixed_precision="no") == chosen(gpu, has_vae=False) == chosen(gpu, "OtherPipeline") == "no"
    assert chosen(cpu) == "no"
    assert chosen(cpu, mixed_precision="bf16") == "bf16"


def test_fewer_images_at_once_are_drawn_on_a_smaller_card():
    sdxl = 5_300_000_000
    assert images_at_once(16, 1024, sdxl, 80 * GB) == 16
    assert 1 < images_at_once(16, 1024, sdxl, 12 * GB) < 8
    assert images_at_once(16, 1024, sdxl, 4 * GB) == 1
    assert images_at_once(2, 64, 0, 12 * GB) == 2


def test_batches_are_whole_where_several_are_encoded_together():
    assert rows_together(16, travels=True) == 64
    assert rows_together(24, travels=True) == 48
    assert rows_together(100, travels=True) == 100
    assert rows_together(16, travels=False) == 16

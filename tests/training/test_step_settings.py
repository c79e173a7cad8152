"""`--compile` and `--channels_last` change how a step is computed, not what is learnt."""

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from runs import assert_close, assert_equal, run_until
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_sd_of_one_width, save_tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import Config, Trainer, UserError
from iet_finetune.method.merging import Layout
from iet_finetune.training.compiling import check_gradients, compile_denoiser, failure_explained

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pipelines `base`, `sd3` and `flux`, 8 images in `data`, and `plain`: what a run leaves that sets nothing."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base")
    tiny_pipeline("sd3").save_pretrained(folder / "sd3")
    tiny_pipeline("flux dev").save_pretrained(folder / "flux")
    save_images(folder / "data", 8)
    Trainer(config(folder, folder / "plain")).train()
    return folder


def config(world: Path, output: Path, base: str = "base", **flags: Any) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / base),
        "train_data_dir": str(world / "data"),
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 2,
        "num_train_epochs": 4,
        "merge_every_epochs": 2,
        "lr_warmup_steps": 0,
        # So that a rounding of a gradient near zero is not made a step of the learning rate.
        "adam_epsilon": 1e-2,
        "learning_rate": 1e-3,
        "use_ema": True,
        "outer_momentum": 0.5,
        "optimizer_across_rounds": "average",
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


@pytest.fixture
def light_compiler(monkeypatch):
    """Everything of torch.compile but the generation of code, which takes long."""
    compile_ = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


# --- the layout of memory --------------------------------------------------------------------------------------------


def test_channels_last_learns_the_same_and_leaves_files_in_the_usual_order(world, tmp_path):
    Trainer(config(world, tmp_path / "out", channels_last=True)).train()
    assert_close(load_file(tmp_path / "out" / WEIGHTS), load_file(world / "plain" / WEIGHTS))
    unet = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    assert all(parameter.is_contiguous() for parameter in unet.parameters())


def test_with_channels_last_a_stopped_run_goes_on_to_the_same_bits(world, tmp_path):
    flags = {"channels_last": True, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    Trainer(config(world, tmp_path / "whole", **flags)).train()
    for steps in (2, 5):
        run_until(config(world, tmp_path / "stopped", **flags), steps)
    Trainer(config(world, tmp_path / "stopped", **flags)).train()
    assert_equal(load_file(tmp_path / "stopped" / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS))


def test_the_weights_of_a_run_with_channels_last_lie_so_from_merge_to_merge(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", channels_last=True))
    trainer.train_rounds()
    last = {"memory_format": torch.channels_last}
    for tensors in (trainer.model.trainable.tensors, trainer.ensemble.denoiser, trainer.ensemble.average):
        kernels = [tensor for tensor in tensors.values() if tensor.dim() == 4 and min(tensor.shape[1:3]) > 1]
        assert kernels
        assert all(kernel.is_contiguous(**last) for kernel in kernels)


def test_another_layout_is_another_run(world, tmp_path):
    run_until(config(world, tmp_path / "out", checkpointing_steps=1), 2)
    with pytest.raises(UserError, match=r"`--channels_last` has changed \(False then, True now\)"):
        Trainer(config(world, tmp_path / "out", channels_last=True, resume_from_checkpoint="latest"))


def test_numbers_are_found_where_they_lie_whatever_the_order_in_memory():
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (5,), (2, 6), (3, 4, 1, 1), (), (2, 3, 4, 5)]
    tensors = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    tensors["0"], tensors["5"] = (tensors[name].to(memory_format=torch.channels_last) for name in ("0", "5"))
    tensors["2"] = tensors["2"].T
    layout = Layout(tensors)
    vector = torch.full((layout.size + 7,), math.nan)
    for start in range(0, len(vector), 11):
        layout.read(tensors, start, vector[start : start + 11])
    assert_equal(layout.views(vector), tensors)
    assert vector[: tensors["0"].numel()].tolist() == tensors["0"].permute(0, 2, 3, 1).flatten().tolist()
    assert vector[layout.size :].tolist() == [0.0] * 7


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with a C++ compiler")
def test_a_compiled_run_learns_the_same_with_one_graph_for_all_clones_and_rounds(world, tmp_path):
    base = save_sd_of_one_width(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": str(base), "num_train_epochs": 6}
    trainer = Trainer(config(world, tmp_path / "out", compile=True, **flags))
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert before > 0, "nothing was compiled"
    trainer.train()
    assert graphs["unique_graphs"] == before, "the clones were compiled anew"
    Trainer(config(world, tmp_path / "plain", **flags)).train()
    assert_close(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS))


@pytest.mark.parametrize(("base", "lora"), [("base", True), ("sd3", False), ("flux", True)])
def test_shorter_batches_and_pictures_need_few_graphs(world, tmp_path, light_compiler, base, lora):
    # Batches of 3 and 1: shards have 4 images.
    shared = {"base": base, "train_batch_size": 3, "validation_prompts": ["a"], "num_validation_images": 1}
    shared |= {"validation_inference_steps": 1, "use_lora": lora, "optimizer_across_rounds": "reset"}
    shared |= {"outer_momentum": 0.0, "lora_export": "fuse"} if lora else {}
    trainer = Trainer(config(world, tmp_path / "out", compile=True, **shared))
    graphs = torch._dynamo.utils.counters["stats"]
    first = graphs["unique_graphs"]
    assert first > 0
    trainer.train()
    assert first <= graphs["unique_graphs"] <= 2 * first, "more than those of another batch size"
    Trainer(config(world, tmp_path / "plain", **shared)).train()
    name = "unet" if base == "base" else "transformer"
    files = [tmp_path / run / name / "diffusion_pytorch_model.safetensors" for run in ("out", "plain")]
    assert_close(*map(load_file, files))


def test_a_network_without_blocks_that_repeat_is_compiled_as_a_whole(light_compiler):
    class Network(torch.nn.Linear):
        def forward(self, values):
            return super().forward(values).tanh()

    network = Network(3, 3)
    compile_denoiser(network)
    network(torch.ones(1, 3)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_dropout_does_not_seem_a_wrong_gradient(world, tmp_path, light_compiler):
    dropping = save_sd_of_one_width(tmp_path / "dropping", dropout=0.5)
    flags = {"pretrained_model_name_or_path": str(dropping)}
    Trainer(config(world, tmp_path / "out", compile=True, **flags))


GRADIENTS = [torch.tensor([3.0, 4.0]), torch.tensor([0.5]), torch.tensor([1e-9, 0.0])]


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ([torch.tensor([3.0, 4.0]), torch.tensor([0.5]), torch.tensor([0.0, 0.0])], True),
        ([torch.tensor([3.01, 4.0]), torch.tensor([0.501]), torch.tensor([0.0, 1e-6])], True),
        ([torch.tensor([3.0, 4.0]), torch.tensor([0.0]), torch.tensor([1e-9, 0.0])], False),
        ([torch.tensor([3.0, -4.0]), torch.tensor([0.5]), torch.tensor([1e-9, 0.0])], False),
        ([torch.tensor([3.0, math.nan]), torch.tensor([0.5]), torch.tensor([1e-9, 0.0])], False),
    ],
)
def test_a_compiled_denoiser_with_other_gradients_is_refused(found, right):
    answers = iter((GRADIENTS, found))
    if right:
        check_gradients(lambda: next(answers), 0.01)
        return
    with pytest.raises(UserError, match="`--compile`: torch .* to one with other gradients .* leave it out"):
        check_gradients(lambda: next(answers), 0.01)


def test_what_cannot_be_compiled_ends_in_one_line():
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler\nand more")

    torch._dynamo.reset()
    network = torch.compile(torch.nn.Linear(2, 2), backend=broken)
    with pytest.raises(UserError) as caught, failure_explained():
        network(torch.ones(1, 2))
    text = str(caught.value)
    assert text.startswith("`--compile`: torch cannot compile the denoiser: ")
    assert text.endswith(". Leave it out.")
    assert "\n" not in text
    with pytest.raises(ValueError, match="another"), failure_explained():
        raise ValueError("another")

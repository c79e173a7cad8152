"""Adapters on a frozen base in 4 or 8 bits: what the layers compute, and what runs on them promise."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from e2e.command import assert_same, repeatable
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_runs import LORA, UNET, config, metrics, train
from runs import assert_equal, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import save_images, save_tiny_sd, tiny_sd
from torch import nn

from iet_finetune import Trainer, UserError
from iet_finetune.config.settings import AdapterConfig
from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.lora.adapters import add_adapter
from iet_finetune.lora.merger import ExactMerger
from iet_finetune.lora.quantised import BLOCK, NF4, QuantisedLinear, quantise
from iet_finetune.lora.reading import read_lora

CPU = torch.device("cpu")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    return folder


def linear(rows: int, columns: int, seed: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(10 ** torch.randn(rows, 1))
        layer.weight[0] = 0
    return layer


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(0, 99))
def test_nf4_gives_each_number_the_nearest_code_of_its_block(rows, columns, seed):
    weight = linear(rows, columns, seed).weight.detach()
    ours = QuantisedLinear(linear(rows, columns, seed), "nf4", torch.float32).plain_weight().flatten()
    for start in range(0, weight.numel(), BLOCK):
        block = weight.flatten()[start : start + BLOCK]
        codes = block.abs().max() * torch.tensor(NF4)
        distances = (block[:, None] - codes).abs().min(dim=1).values
        torch.testing.assert_close((block - ours[start : start + BLOCK]).abs(), distances, rtol=1e-5, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(0, 99))
def test_int8_is_off_by_half_a_step_of_its_row_at_most(rows, columns, seed):
    weight = linear(rows, columns, seed).weight.detach()
    off = (QuantisedLinear(linear(rows, columns, seed), "int8", torch.float32).plain_weight() - weight).abs()
    assert (off <= weight.abs().amax(dim=1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_layer_and_its_gradient_are_those_of_a_linear_layer_with_its_weight(kind, autocast):
    layer = QuantisedLinear(linear(48, 72, 0), kind, torch.float32)
    layer.put(torch.randn(48, 3), torch.randn(3, 72))
    plain = linear(48, 72, 0)
    plain.weight.data = layer.plain_weight()
    x, gradient = torch.randn(2, 5, 72, requires_grad=True), torch.randn(2, 5, 48)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = layer(x), plain(x) + nn.functional.linear(nn.functional.linear(x, layer.down), layer.up)
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if autocast else torch.float32)
    found, expected = (torch.autograd.grad(y, x, gradient.to(y.dtype))[0] for y in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item() * autocast + 1e-5)


def test_layers_in_blocks_are_quantised_and_those_at_the_ends_are_not():
    unet = tiny_sd().unet
    assert quantise(unet, "nf4", CPU)
    kinds = {name: type(module) for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    assert kinds["time_embedding.linear_1"] is nn.Linear
    assert kinds["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] is QuantisedLinear
    assert not quantise(nn.Linear(3, 4), "nf4", CPU)


@pytest.mark.parametrize(("most", "exact"), [(None, True), (1, False)])
def test_a_merge_is_the_mean_of_the_updates_but_for_what_it_says_it_cut(most, exact):
    unet = tiny_sd().unet
    quantise(unet, "nf4", CPU)
    flags = AdapterConfig(use_lora=True, rank=2, quantize_base="nf4", lora_remainder_rank=most)
    adapter = add_adapter(unet, flags, ATTENTION, 0)
    trainable = Trainable(unet, buffers=False)
    merger = ExactMerger("denoiser", adapter, trainable.tensors, Ranks.alone(), HostMemory(CPU))
    weights, clones = (3, 5), []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        draws = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in merger.tensors.items()}
        clones.append({n: layer.update(draws).dense() for n, layer in adapter.layers.items()})
        merger.collect(draws, [weights[seed]])
    merger.merge()
    merger.load_into(trainable)
    lost = whole = 0.0
    for name, layer in adapter.layers.items():
        mean = sum(w * clone[name] for w, clone in zip(weights, clones, strict=True)) / sum(weights)
        base = layer.base
        live = base.up.double() @ base.down.double() + layer.update(adapter.live).dense()
        lost, whole = lost + (mean - live).square().sum().item(), whole + mean.square().sum().item()
    assert lost / whole == pytest.approx(merger.facts["remainder_cut"], rel=1e-4, abs=1e-12)
    assert (lost / whole < 1e-12) == exact


FLAGS = {
    "quantize_base": "nf4",
    "num_shards": 2,
    "num_train_epochs": 6,
    "use_ema": True,
    "lora_dropout": 0.1,
    "lora_export": "full_rank",
    "resume_from_checkpoint": "latest",
}


@pytest.fixture(scope="module")
def trained(world) -> Path:
    return train(world, world / "trained", **FLAGS)


def test_training_lowers_the_loss_and_the_result_is_a_lora_file_for_the_plain_base(world, trained):
    losses = [line["loss"] for line in metrics(trained)]
    assert losses[-1] < losses[0]
    assert all(line["remainder_share"] > line["remainder_cut"] >= 0 for line in metrics(trained))
    pipeline = tiny_sd(timesteps=10)
    draw = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 1.0}
    before = pipeline("a cat", generator=torch.Generator().manual_seed(0), **draw).images
    pipeline.load_lora_weights(trained, weight_name=LORA)
    after = pipeline("a cat", generator=torch.Generator().manual_seed(0), **draw).images
    assert abs(after - before).max() > 1e-3
    assert "its blocks in nf4" in (trained / "README.md").read_text()


def test_a_run_stopped_twice_and_resumed_leaves_the_same_files(world, trained):
    for stop in (7, 14):  # amid the first round, and on what a merge has left
        AcceleratorState._reset_state(reset_partial_state=True)
        run_until(config(world, world / "stopped", **FLAGS), stop)
    assert_same(repeatable(train(world, world / "stopped", **FLAGS)), repeatable(trained))
    with pytest.raises(UserError, match=r"`--quantize_base` has changed \(nf4 then, int8 now\)"):
        train(world, world / "stopped", **{**FLAGS, "quantize_base": "int8"})


def test_two_ranks_leave_the_bits_of_one(world, trained):
    Path(world / "ranks").mkdir()
    ranks = train_on_ranks(2, config(world, world / "ranks" / "out", **FLAGS))
    assert all(ended.code == 0 for ended in ranks), ranks
    assert (world / "ranks" / "out" / LORA).read_bytes() == (trained / LORA).read_bytes()


def test_fusing_adds_the_update_to_the_base_as_it_is_stored(world, trained):
    """The finished run again, in another form: the LoRA file's update on the plain base, encoders as they came."""
    flags = {**FLAGS, "lora_export": "fuse"}
    update = read_lora(trained / LORA)
    fused = load_file(train(world, trained, **flags) / UNET)
    for name, weight in tiny_sd(timesteps=10).unet.state_dict().items():
        layer = update.get(f"unet.{name.removesuffix('.weight')}")
        expected = weight if layer is None else weight + layer.update().dense().float()
        torch.testing.assert_close(fused[name], expected, rtol=1e-5, atol=1e-6)


def test_quantised_encoders_come_back_as_they_were(world):
    flags = {"quantize_base": "int8", "quantize_encoders": "nf4", "num_shards": 1, "lora_export": "fuse"}
    flags |= {"num_train_epochs": 1, "mixed_precision": "bf16", "cache_dir": str(world / "cache")}
    output = train(world, world / "encoders", **flags)
    name = "text_encoder/model.safetensors"
    assert_equal(load_file(output / name), load_file(world / "base" / name))
    names = json.loads((output / "card.json").read_text())["facts"]["flags"]
    assert (names["quantize_base"], names["quantize_encoders"]) == ("int8", "nf4")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            {"use_lora": False, "rank": 4, "quantize_base": "nf4"},
            "`--quantize_base nf4` does nothing without",
        ),
        ({"quantize_base": "fp4"}, "`--quantize_base` must be one of nf4, int8"),
        ({"lora_remainder_rank": 3}, "`--lora_remainder_rank 3` does nothing without `--quantize_base`"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(world, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        config(world, tmp_path / "out", **flags)


def test_a_pipeline_in_memory_is_refused(world, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = config(world, tmp_path / "out", quantize_base="nf4", pretrained_model_name_or_path=None)
    with pytest.raises(UserError, match="`--quantize_base nf4` does not go with a pipeline that is passed as an obje"):
        Trainer(flags, pipeline=tiny_sd())

"""What training gives a denoiser for an adapter, and how remainders come into the frozen weights and out again."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from loras import ATTENTION, EVERYTHING, adapted_unet, answer_of, deltas_of
from runs import assert_equal
from tiny import tiny_sd
from torch import nn

from iet_finetune import UserError
from iet_finetune.config.settings import AdapterConfig
from iet_finetune.distributed.groups import Placement
from iet_finetune.ensemble.trainable import Trainable
from iet_finetune.lora.adapted import cast_inputs
from iet_finetune.lora.adapters import add_adapter
from iet_finetune.lora.spectra import LowRank

ALL_LAYERS = ",".join(EVERYTHING)


def drawn(start, seed, scale=0.1):
    """Tensors beside those of `start`, as a clone's after training."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def base_weights(unet):
    """The frozen weights that have an adapter, by module."""
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "get_base_layer")}
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}


def factors_of(unet, side):
    return {name: tensor for name, tensor in unet.state_dict().items() if f".lora_{side}." in name}


@pytest.mark.parametrize("layers", [None, ALL_LAYERS])
def test_a_fresh_adapter_changes_nothing_and_only_its_matrices_are_trained(layers):
    unet, adapter, trainable = adapted_unet(rank=3, lora_layers=layers)
    names = [name for name, _ in unet.named_parameters() if ".lora_" in name]
    assert list(trainable.parameters) == names
    assert set(names) == {key for layer in adapter.layers.values() for key in (layer.up, layer.down)}
    assert not trainable.buffers
    assert all(not tensor.any() for tensor in factors_of(unet, "B").values())
    assert all(tensor.any() for tensor in factors_of(unet, "A").values())
    assert torch.equal(answer_of(unet), answer_of(tiny_sd().unet))


def test_by_default_the_attention_projections_have_an_adapter_and_no_other_layer():
    _, adapter, _ = adapted_unet()
    expected = [name for name, module in tiny_sd().unet.named_modules() if name.endswith(tuple(ATTENTION))]
    assert list(adapter.layers) == expected
    assert len(expected) == 4 * 8  # four projections, two attentions a block, four blocks


def test_the_matrices_follow_from_the_seed_and_the_global_generator_stays_where_it_is():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (factors_of(adapted_unet(seed=seed)[0], "A") for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    later = factors_of(adapted_unet(seed=5)[0], "A")
    assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], later[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rank": 4}, 1),
        ({"rank": 4, "lora_alpha": 2}, 0.5),
        ({"rank": 4, "use_rslora": True}, 2),
        ({"rank": 4, "lora_alpha": 3, "use_rslora": True}, 1.5),
    ],
)
def test_alpha_is_the_rank_unless_it_is_given_and_is_divided_as_peft_does(settings, scaling):
    unet, adapter, trainable = adapted_unet(lora_layers=ALL_LAYERS, **settings)
    assert {layer.scaling for layer in adapter.layers.values()} == {scaling}
    trainable.load(drawn(trainable.tensors, 1))
    updates, deltas = adapter.updates(adapter.live), deltas_of(unet, "unet")
    assert len(updates) == len(deltas) > 50
    for name, update in updates.items():
        torch.testing.assert_close(update.dense(), deltas[f"unet.{name}"].double().flatten(1), rtol=1e-5, atol=1e-7)


def test_factors_of_an_update_are_the_matrices_it_was_made_of():
    _, adapter, trainable = adapted_unet(rank=3, lora_alpha=7, lora_layers=ALL_LAYERS)
    tensors = drawn(trainable.tensors, 1)
    for layer in adapter.layers.values():
        up, down = layer.factors(layer.update(tensors))
        assert torch.equal(up, tensors[layer.up].flatten(1))
        assert torch.equal(down, tensors[layer.down].flatten(1))


def test_dropout_and_a_frozen_a_are_as_asked():
    unet, adapter, trainable = adapted_unet(rank=2, lora_dropout=0.5, lora_merge="freeze_a")
    assert list(trainable.parameters) == [layer.up for layer in adapter.layers.values()]
    assert {name for name in adapter.live if ".lora_A." in name} == set(factors_of(unet, "A"))
    rates = {module.p for name, module in unet.named_modules() if "lora_dropout" in name and hasattr(module, "p")}
    assert rates == {0.5}


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ("to_q,to_w", "`--lora_layers`: the UNet2DConditionModel has no layer named to_w."),
        ("o_q", "has no layer named o_q."),
        ("norm1", "norm1 is a LayerNorm"),
        ("to_out", "to_out is a ModuleList"),
        ("down_blocks.0", "down_blocks.0 is a CrossAttnDownBlock2D"),
    ],
)
def test_a_layer_that_is_not_there_or_cannot_be_merged_is_named_in_one_line(layers, named):
    with pytest.raises(UserError) as caught:
        adapted_unet(lora_layers=layers)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_convolution_with_groups_is_refused():
    unet = tiny_sd().unet
    unet.conv_in = nn.Conv2d(4, 16, 3, padding=1, groups=2)
    with pytest.raises(UserError, match="`--lora_layers`: conv_in is a Conv2d, and only .* without groups"):
        add_adapter(unet, AdapterConfig(use_lora=True, lora_layers="conv_in"), ATTENTION, 0)
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_a_model_that_diffusers_gives_no_adapters_gets_them_from_peft_and_loses_them_again():
    model = UNet2DModel(
        block_out_channels=(8,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not hasattr(model, "add_adapter")
    torch.manual_seed(5)
    following = torch.rand(1)
    torch.manual_seed(5)
    adapters = [add_adapter(copy.deepcopy(model), AdapterConfig(use_lora=True, rank=2), ATTENTION, 1)]
    assert torch.equal(torch.rand(1), following)
    adapters.append(adapter := add_adapter(model, AdapterConfig(use_lora=True, rank=2), ATTENTION, 1))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter.live)
    assert len(trained) == 2 * len(ATTENTION)
    assert_equal(*(one.live for one in adapters))
    adapter.remove()
    assert_equal(model.state_dict(), before)
    add_adapter(model, AdapterConfig(use_lora=True, rank=3), ATTENTION, 1)


def test_the_norm_is_that_of_the_weights_with_an_adapter():
    unet, adapter, _ = adapted_unet(lora_layers=ALL_LAYERS)
    expected = torch.cat([weight.flatten() for weight in base_weights(unet).values()]).double().norm().item()
    assert adapter.norm == pytest.approx(expected, rel=1e-12)


def test_distances_are_those_of_the_dense_updates():
    unet, adapter, trainable = adapted_unet(rank=3, lora_alpha=5, lora_layers=ALL_LAYERS)
    deltas, updates = [], []
    for seed in (1, 2):
        tensors = drawn(trainable.tensors, seed)
        trainable.load(tensors)
        deltas.append(torch.cat([delta.double().flatten() for delta in deltas_of(unet, "unet").values()]))
        updates.append(adapter.updates(tensors))
    expected = (deltas[0] - deltas[1]).norm().item() / adapter.norm
    assert adapter.distance(*updates) == pytest.approx(expected, rel=1e-5)
    assert adapter.distance(updates[0], updates[0]) == pytest.approx(0, abs=1e-12)


def some_remainders(adapter, seed):
    """One as factors, one dense, and none of the other layers."""
    generator = torch.Generator().manual_seed(seed)
    (one, first), (other, second) = list(adapter.layers.items())[:2]
    (m, n), shape = first.weight.flatten(1).shape, second.weight.flatten(1).shape
    factors = LowRank(torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator))
    return {one: factors, other: torch.randn(shape, generator=generator)}


def test_a_remainder_is_shown_in_the_frozen_weight_and_taken_out_of_it_again_to_the_bit():
    unet, adapter, _ = adapted_unet(rank=2, lora_layers=ALL_LAYERS)
    came = base_weights(unet)
    first, second = (some_remainders(adapter, seed) for seed in (1, 2))
    for remainders in (first, second, {next(iter(first)): first[next(iter(first))]}, first):
        adapter.fold_remainders(remainders)
        assert adapter.folded is remainders
        for name, weight in base_weights(unet).items():
            rest = remainders.get(name, torch.zeros(()))
            rest = rest.double() if isinstance(rest, torch.Tensor) else rest.up.double() @ rest.down.double()
            expected = came[name].double() + (rest.view(weight.shape) if rest.dim() else rest)
            assert torch.equal(weight, expected.float())
    adapter.fold_remainders({})
    assert all(torch.equal(weight, came[name]) for name, weight in base_weights(unet).items())


def test_fusing_keeps_the_answers_and_removing_leaves_the_layers_that_came():
    unet, adapter, trainable = adapted_unet(rank=2, lora_alpha=3, lora_layers=ALL_LAYERS)
    trainable.load(drawn(trainable.tensors, 1))
    adapter.fold_remainders(some_remainders(adapter, 2))
    before = answer_of(unet)
    adapter.fuse()
    adapter.remove()
    assert {n: t.shape for n, t in unet.state_dict().items()} == {
        n: t.shape for n, t in tiny_sd().unet.state_dict().items()
    }
    torch.testing.assert_close(answer_of(unet), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_matrices_in_half_precision_answer_under_autocast_as_those_in_fp32_to_the_bit(dtype):
    answers, rounded = [], None
    for is_rounded in (False, True):
        unet, adapter, trainable = adapted_unet(rank=2, lora_alpha=3, lora_layers=ALL_LAYERS)
        if is_rounded:
            adapter.round_frozen(dtype)
            rounded = unet
        trainable.load(drawn(trainable.tensors, 3))
        for remainders in (some_remainders(adapter, 4), {}, some_remainders(adapter, 5)):
            adapter.fold_remainders(remainders)
            with torch.autocast("cpu", dtype):
                answers.append(answer_of(unet))
    for exact, half in zip(answers[:3], answers[3:], strict=True):
        assert torch.equal(exact, half)
    assert all(p.dtype == torch.float32 for p in rounded.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in rounded.parameters() if not p.requires_grad)
    assert held < 0.55 * sum(p.nbytes for p in tiny_sd().unet.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_on_a_base_in_half_precision_is_the_same_as_on_one_in_fp32(dtype):
    half, whole = tiny_sd().unet.to(dtype), tiny_sd().unet.to(dtype).to(torch.float32)
    frozen = {name: tensor.data_ptr() for name, tensor in half.named_parameters()}
    names = [add_adapter(unet, AdapterConfig(use_lora=True, rank=2), ATTENTION, 0) for unet in (half, whole)]
    assert_equal(factors_of(half, "A"), factors_of(whole, "A"))
    assert {tensor.dtype for side in "AB" for tensor in factors_of(half, side).values()} == {torch.float32}
    assert names[0].norm == names[1].norm > 0
    kept = {
        name.replace(".base_layer", ""): p.data_ptr() for name, p in half.named_parameters() if not p.requires_grad
    }
    assert kept == frozen
    # Rounding to bf16 loses bits of fp16, which wait on the host, and none of bf16.
    for adapter in names:
        adapter.round_frozen(torch.bfloat16)
    assert_equal(base_weights(half), base_weights(whole))
    assert bool(names[0]._original) == bool(names[1]._original) == (dtype == torch.float16)
    remainders = some_remainders(names[0], 4)
    for adapter in names:
        adapter.fold_remainders(remainders)
    assert_equal(base_weights(half), base_weights(whole))
    assert {tensor.dtype for tensor in names[0]._original.values()} == {dtype}


def test_originals_that_stay_on_the_host_are_not_copied_and_come_back_to_the_bit():
    (unet, adapter, _), (other, plain, _) = (adapted_unet(rank=2, lora_layers=ALL_LAYERS) for _ in range(2))
    before = {name: layer.weight.data for name, layer in adapter.layers.items()}
    adapter.keep_originals(mapped=True)
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()  # as on another device
    came = base_weights(unet)
    for remainders in (some_remainders(adapter, 4), some_remainders(adapter, 2), {}):
        for each in (adapter, plain):
            each.fold_remainders(remainders)
            if remainders:
                each.forget_folded()
        assert_equal(base_weights(unet), base_weights(other))
    assert_equal(base_weights(unet), came)
    assert all(adapter._original[name].data_ptr() == weight.data_ptr() for name, weight in before.items())
    counted, copied = adapter.need(Placement(2, 1)), plain.need(Placement(2, 1))
    assert (counted.host, copied.host) == (0, plain.nbytes)


def test_what_was_rounded_is_fused_into_a_model_that_was_not():
    unet, adapter, trainable = adapted_unet(rank=2, lora_layers=ALL_LAYERS)
    adapter.round_frozen(torch.bfloat16)
    trainable.load(drawn(trainable.tensors, 3))
    adapter.fold_remainders(some_remainders(adapter, 4))
    fused = tiny_sd().unet
    adapter.fuse(fused)
    exact, plain, again = adapted_unet(rank=2, lora_layers=ALL_LAYERS)
    again.load(trainable.tensors)
    plain.fold_remainders(adapter.folded)
    plain.fuse()
    plain.remove()
    assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in exact.state_dict().items())


def test_a_whole_denoiser_is_trained_with_its_buffers():
    model = nn.BatchNorm1d(3)
    trainable = Trainable(model)
    assert list(trainable.tensors) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    trainable.load({"running_mean": torch.ones(3)})
    assert torch.equal(model.running_mean, torch.ones(3))
    assert "running_mean" not in Trainable(model, buffers=False).tensors


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_below_autocast_it_changes_no_bit_whether_peft_casts_the_inputs(half):
    unet, adapter, trainable = adapted_unet(lora_layers=ALL_LAYERS)
    trainable.load(drawn(trainable.tensors, 1))
    adapter.round_frozen(half)
    latents, hidden, found = torch.randn(2, 4, 8, 8), torch.randn(2, 12, 16), []
    for cast in (True, False):
        cast_inputs(unet, cast)
        unet.zero_grad()
        with torch.autocast("cpu", half):
            answer = unet(latents, torch.tensor([10, 700]), hidden).sample
        answer.float().square().mean().backward()
        found.append({"answer": answer, **{name: each.grad for name, each in trainable.parameters.items()}})
    assert_equal(*found)
    assert all(tensor.any() for tensor in found[0].values())

"""What a trained adapter is saved as: exact where it says so, and as much lost as it says, loaded by diffusers."""

import pytest
import torch
from lora.test_adapters import drawn
from loras import EVERYTHING, adapted_unet, answer_of, assert_same_answers, with_dense
from tiny import tiny_sd
from torch import Tensor

from iet_finetune.lora.export import MOST_LOST, plan_export
from iet_finetune.lora.file import write_lora
from iet_finetune.lora.layer import LoraLayer
from iet_finetune.lora.reading import read_lora
from iet_finetune.lora.spectra import LowRank

LAYERS = ",".join(EVERYTHING)


def trained(widths, rank=2, dense=False, seed=1, **flags):
    """A live adapter, trained, with remainders of these widths below its first layers."""
    unet, adapter, trainable = adapted_unet(rank=rank, lora_layers=LAYERS, **flags)
    trainable.load(drawn(trainable.tensors, seed))
    generator = torch.Generator().manual_seed(seed)
    remainders = {}
    for (name, layer), width in zip(adapter.layers.items(), widths, strict=False):
        m, n = layer.weight.flatten(1).shape
        factors = LowRank(
            0.2 * torch.randn(m, width, generator=generator), 0.2 * torch.randn(width, n, generator=generator)
        )
        remainders[name] = factors.dense().float() if dense else factors
    adapter.fold_remainders(remainders)
    return unet, adapter


def dense_updates(adapter):
    """The update of every layer as it lies in the live denoiser: remainder + scaling · B A, (out, in·kh·kw)."""
    updates = {}
    for name, layer in adapter.layers.items():
        product = layer.scaling * (layer.up_weight.double().flatten(1) @ layer.down_weight.double().flatten(1))
        rest = adapter.folded.get(name, torch.zeros_like(product))
        updates[name] = (product + (rest if isinstance(rest, Tensor) else rest.dense())).detach()
    return updates


def dense_of(export):
    """The update that a file gives every layer, float64."""
    return {
        name.removeprefix("unet."): layer.scaling * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))
        for name, layer in export.layers.items()
    }


def energy(updates):
    return sum(update.square().sum().item() for update in updates.values())


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return {name: ours[name] - theirs[name] for name in theirs}


def loaded(export, folder):
    """A pipeline that diffusers has loaded the file into."""
    write_lora(folder / "pytorch_lora_weights.safetensors", export.layers)
    pipeline = tiny_sd()
    pipeline.load_lora_weights(folder)
    return pipeline


def expected_pipeline(updates):
    shapes = {name: module.weight.shape for name, module in tiny_sd().unet.named_modules() if name in updates}
    return with_dense([{f"unet.{name}": update.view(shapes[name]).float() for name, update in updates.items()}], [1.0])


@pytest.mark.parametrize("form", [None, "truncate", "full_rank"])
@pytest.mark.parametrize("flags", [{}, {"lora_alpha": 5, "use_rslora": True}], ids=["plain", "rslora"])
def test_without_remainders_the_file_holds_the_matrices_as_trained_bit_for_bit(tmp_path, form, flags):
    unet, adapter = trained([], rank=3, **flags)
    export = plan_export(adapter, "unet", form)
    assert export.words == "a LoRA file of rank 3"
    assert len(export.layers) == len(adapter.layers)
    pipeline = loaded(export, tmp_path)
    torch.testing.assert_close(answer_of(pipeline.unet), answer_of(unet), rtol=1e-6, atol=1e-6)
    read = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    for name, layer in adapter.layers.items():
        ours = read[f"unet.{name}"]
        trained_as = LoraLayer(layer.up_weight.detach(), layer.down_weight.detach(), layer.scaling).folded()
        assert torch.equal(ours.up, trained_as.up)
        assert torch.equal(ours.down, trained_as.down)
        assert ours.scaling == 1


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
def test_full_rank_is_exact_and_says_so(tmp_path, dense):
    unet, adapter = trained([4, 1, 5, 3, 2, 6], lora_alpha=3, dense=dense)
    before = dense_updates(adapter)
    export = plan_export(adapter, "unet", "full_rank")
    assert energy(difference(dense_of(export), before)) < 1e-12 * energy(before)
    saved = max(layer.rank for layer in export.layers.values())
    assert export.words == f"a LoRA file of rank {saved}, exact: more than the 2 trained"
    assert saved == 8 or dense
    assert_same_answers(loaded(export, tmp_path), expected_pipeline(before))
    torch.testing.assert_close(answer_of(loaded(export, tmp_path).unet), answer_of(unet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "dense"])
def test_truncate_is_the_best_file_of_the_rank_and_says_what_it_lost(tmp_path, dense):
    _, adapter = trained([4, 1, 5, 3, 2, 6], rank=3, dense=dense)
    before = dense_updates(adapter)
    export = plan_export(adapter, "unet", "truncate")
    assert {layer.rank for layer in export.layers.values()} == {3}
    lost = sum(torch.linalg.svdvals(update)[3:].square().sum().item() for update in before.values())
    assert energy(difference(dense_of(export), before)) == pytest.approx(lost, rel=1e-5)
    share = 100 * lost / energy(before)
    assert 0.1 < share < 99
    assert export.words == f"a LoRA file of rank 3, which lost {share:.3g} % of the update's energy"
    assert_same_answers(loaded(export, tmp_path), expected_pipeline(dense_of(export)))


@pytest.mark.parametrize(
    ("form", "dense"),
    [(None, False), ("truncate", False), ("full_rank", False), ("truncate", True), ("full_rank", True)],
)
def test_where_the_rank_suffices_nothing_is_said_to_be_lost(form, dense):
    _, adapter, trainable = adapted_unet(rank=4, lora_layers=LAYERS)
    trainable.load(drawn(trainable.tensors, 1))
    # Half of the adapter once more: another basis, but no new direction.
    halves = {}
    for name, layer in adapter.layers.items():
        update = layer.update(adapter.live)
        halves[name] = LowRank(0.5 * update.up, update.down)
    adapter.fold_remainders({name: half.dense() if dense else half for name, half in halves.items()})
    export = plan_export(adapter, "unet", form)
    before = dense_updates(adapter)
    assert export.words == "a LoRA file of rank 4"
    assert energy(difference(dense_of(export), before)) < 1e-12 * energy(before)


@pytest.mark.parametrize(("share", "cut"), [(0.9, True), (1.1, False)])
def test_by_default_a_file_is_cut_where_that_loses_little_and_else_has_the_rank_that_it_needs(share, cut):
    _, adapter, trainable = adapted_unet(rank=2, lora_layers="down_blocks.0.attentions.0.proj_in")
    trainable.load(drawn(trainable.tensors, 1))
    (name,) = adapter.layers
    update = adapter.layers[name].update(adapter.live).dense()
    left, values, right = torch.linalg.svd(update)
    # Another direction, with that share of what may be lost of the energy of all.
    lost = share * MOST_LOST
    third = (lost / (1 - lost) * values.square().sum()).sqrt()
    adapter.fold_remainders({name: LowRank(third * left[:, 2:3], right[2:3])})
    export, before = plan_export(adapter, "unet", None), dense_updates(adapter)
    assert (export.cut, export.higher) == (cut, not cut)
    assert max(layer.rank for layer in export.layers.values()) == (2 if cut else 3)
    share_lost = energy(difference(dense_of(export), before)) / energy(before)
    assert share_lost == pytest.approx(lost, rel=1e-3) if cut else share_lost < 1e-12
    begins = "a LoRA file of rank 2, which lost 0.9 %" if cut else "a LoRA file of rank 3, exact: cut to the 2 trained"
    assert export.words.startswith(begins)


def test_by_default_a_dense_remainder_goes_into_a_file_too():
    _, adapter, trainable = adapted_unet(rank=3, lora_layers="down_blocks.0.attentions.0.proj_in")
    trainable.load(drawn(trainable.tensors, 1))
    (name,) = adapter.layers
    adapter.fold_remainders({name: torch.randn(16, 16, generator=torch.Generator().manual_seed(2))})
    assert plan_export(adapter, "unet", None).words.startswith("a LoRA file of rank 16, exact: cut to the 3 trained")


def test_fused_weights_are_those_of_the_live_denoiser():
    unet, adapter = trained([4, 1, 5], lora_alpha=3)
    before = dense_updates(adapter)
    assert plan_export(adapter, "unet", "fuse").layers is None
    adapter.fuse()
    adapter.remove()
    expected = expected_pipeline(before).unet
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_an_update_that_cancels_leaves_a_file_that_loads(tmp_path):
    _, adapter = trained([])
    name = next(iter(adapter.layers))
    update = adapter.layers[name].update(adapter.live)
    adapter.fold_remainders({name: LowRank(-update.up, update.down)})
    export = plan_export(adapter, "unet", "full_rank")
    assert export.layers[f"unet.{name}"].rank == 1
    assert_same_answers(loaded(export, tmp_path), expected_pipeline(dense_updates(adapter)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_has_the_dtype_that_is_asked_for(tmp_path, dtype):
    _, adapter = trained([3])
    export = plan_export(adapter, "unet", "full_rank", dtype)
    assert {tensor.dtype for layer in export.layers.values() for tensor in layer[:2]} == {dtype}
    before, eps = dense_updates(adapter), torch.finfo(dtype).eps
    assert energy(difference(dense_of(export), before)) < 4 * eps**2 * energy(before)
    write_lora(tmp_path / "lora.safetensors", export.layers)
    read = read_lora(tmp_path / "lora.safetensors")
    assert all(torch.equal(read[name].up, layer.up) for name, layer in export.layers.items())


def test_the_live_adapter_is_left_as_it_is():
    unet, adapter = trained([4, 1, 5])
    before, tensors = answer_of(unet), {name: tensor.clone() for name, tensor in adapter.live.items()}
    for form in (None, "truncate", "full_rank", "fuse"):
        plan_export(adapter, "unet", form)
    assert torch.equal(answer_of(unet), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter.live.items())

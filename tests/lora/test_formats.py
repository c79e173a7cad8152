"""The two formats of LoRA files: other tools match every layer, at full strength, and either becomes the other."""

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from hypothesis import given
from hypothesis import strategies as st
from lora_tools import a1111_sd3, a1111_unet, comfy_flux, comfy_sd3, comfy_unet, original_unet, without_end
from loras import ATTENTION, assert_same_answers, save_adapter, with_dense
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import UserError
from iet_finetune.lora.file import write_lora
from iet_finetune.lora.formats import check_kohya, common_format, named_tensors
from iet_finetune.lora.layer import LoraLayer
from iet_finetune.lora.original import from_original, to_original
from iet_finetune.lora.reading import foreign_tensors, read_lora

NAME = "pytorch_lora_weights.safetensors"
XL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24}
SD3 |= {"caption_projection_dim": 1536, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}


def sd15():
    return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)


def sdxl():
    return UNet2DConditionModel(**XL_UNET)


def sd3():
    return SD3Transformer2DModel(**SD3, pos_embed_max_size=192)


def sd35_medium():
    return SD3Transformer2DModel(
        **SD3, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    )


def flux():
    return FluxTransformer2DModel(guidance_embeds=True)


def adapted(make, component, rank=1, only=None):
    """Layers for every linear layer and convolution of a model without numbers."""
    with torch.device("meta"):
        model = make()
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or (only and not name.endswith(only)):
            continue
        out, *rest = module.weight.shape
        up = torch.randn(out, rank, *[1] * len(rest[1:]), generator=generator)
        layers[f"{component}.{name}"] = LoraLayer(up, torch.randn(rank, *rest, generator=generator), 1.0)
    return model, layers


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert torch.equal(ours[name].up, layer.up)
        assert torch.equal(ours[name].down, layer.down)
        assert ours[name].scaling == layer.scaling


@pytest.mark.parametrize("make", [sd15, sdxl])
@pytest.mark.parametrize("form", [None, "kohya"])
def test_every_layer_of_a_unet_is_matched_by_comfyui_a1111_and_diffusers(make, form):
    unet, layers = adapted(make, "unet")
    form = form or common_format(layers)
    homes = {f"unet.{path}": home for path, home in original_unet(unet).items()}
    assert layers.keys() <= homes.keys()
    tensors = named_tensors(layers, form)
    names, wanted = without_end(tensors), {homes[name] for name in layers}
    assert len(wanted) == len(names) == len(layers)
    table = comfy_unet(original_unet(unet))
    assert {table[name] for name in names} == wanted
    assert {a1111_unet(name, original_unet(unet)) for name in names} == wanted
    pipeline = StableDiffusionPipeline if make is sd15 else StableDiffusionXLPipeline
    state, alphas = pipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    read = convert_unet_state_dict_to_peft(state)
    assert not alphas
    assert read.keys() == {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    assert all(torch.equal(read[f"{name}.lora_B.weight"], layer.up) for name, layer in layers.items())


def test_of_a_unet_under_diffusers_names_comfyui_misses_attention_and_a1111_all():
    unet, layers = adapted(sd15, "unet", only=(*ATTENTION, "conv1", "proj_in", "ff.net.2", "linear_1"))
    names = without_end(named_tensors(layers, "diffusers"))
    missed = names - comfy_unet(original_unet(unet)).keys()
    assert missed == {name for name in layers if name.endswith(tuple(f".{layer}" for layer in ATTENTION))}
    assert not any(a1111_unet(name.partition(".")[0], original_unet(unet)) for name in names)


@pytest.mark.parametrize(
    ("make", "table"),
    [(sd3, comfy_sd3(24)), (sd35_medium, comfy_sd3(24)), (flux, comfy_flux(19, 38))],
    ids=["sd3", "sd35", "flux"],
)
def test_every_layer_of_a_transformer_is_matched_by_comfyui_in_both_formats(make, table):
    model, layers = adapted(make, "transformer")
    assert common_format(layers) == "diffusers"
    names = without_end(named_tensors(layers, "diffusers"))
    assert names == layers.keys()
    assert names <= table.keys()
    whole = {home if isinstance(home, str) else home[0] for home in map(table.__getitem__, names)}
    tensors = named_tensors(layers, "kohya")
    kohya = without_end(tensors)
    assert {table[name] for name in kohya} == whole
    assert len(kohya) == len(whole)
    # Every original layer is as high as its parts are together.
    heights = dict.fromkeys(whole, 0)
    for name in names:
        home = table[name] if isinstance(table[name], str) else table[name][0]
        heights[home] += layers[name].up.shape[0]
    assert all(tensors[f"{name}.lora_up.weight"].shape[0] == heights[table[name]] for name in kohya)
    assert all(tensors[f"{name}.alpha"] == tensors[f"{name}.lora_down.weight"].shape[0] for name in kohya)


def test_a1111_matches_the_attention_of_images_in_sd3():
    _, layers = adapted(sd3, "transformer", only=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"))
    tensors = named_tensors(layers, common_format(layers))
    assert without_end(tensors) == a1111_sd3(24).keys()
    assert not any(key.endswith(".alpha") for key in tensors)


def test_diffusers_own_converter_makes_of_flux_in_kohya_s_format_what_was_written():
    _, layers = adapted(flux, "transformer", rank=2, only=BLOCKS_0)
    state = FluxPipeline.lora_state_dict(dict(named_tensors(layers, "kohya")))
    # It leaves out the component before the layers outside blocks.
    state = {key if key.startswith("transformer.") else f"transformer.{key}": value for key, value in state.items()}
    expected = named_tensors(layers, "diffusers")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


BLOCKS_0 = tuple(
    f"{block}.0.{layer}"
    for block, layers in {
        "single_transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"),
        "transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v", "ff.net.2", "ff_context.net.0.proj"),
    }.items()
    for layer in layers
) + ("time_text_embed.guidance_embedder.linear_1", "x_embedder", "norm_out.linear")


@pytest.mark.parametrize(("make", "component"), [(sd15, "unet"), (sdxl, "unet"), (sd3, "transformer")])
def test_either_format_becomes_the_other_and_itself_again_bit_for_bit(tmp_path, make, component):
    _, layers = adapted(
        make, component, rank=2, only=("to_q", "to_k", "to_v", "proj_out", "0.conv", "norm_out.linear")
    )
    write_lora(tmp_path / "a.safetensors", layers, "diffusers")
    write_lora(tmp_path / "b.safetensors", read_lora(tmp_path / "a.safetensors"), "kohya")
    same_bits(read_lora(tmp_path / "b.safetensors"), layers)
    write_lora(tmp_path / "c.safetensors", read_lora(tmp_path / "b.safetensors"), "diffusers")
    write_lora(tmp_path / "d.safetensors", read_lora(tmp_path / "c.safetensors"), "kohya")
    for one, other in ("ac", "bd"):
        ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", ["flux dev", "sd3", "sd35"])
def test_a_small_transformer_s_file_goes_through_kohya_s_names_with_ranks_of_its_own(tmp_path, name):
    make = lambda: tiny_pipeline(name).transformer  # noqa: E731
    _, layers = adapted(make, "transformer")
    generator = torch.Generator().manual_seed(1)
    for place, (layer, each) in enumerate(list(layers.items())):
        if place % 7 == 3:
            del layers[layer]
        elif place % 3:
            extra = torch.randn(each.up.shape[0], place % 3, generator=generator).view(
                -1, place % 3, *each.up.shape[2:]
            )
            down = torch.randn(place % 3, *each.down.shape[1:], generator=generator)
            layers[layer] = LoraLayer(torch.cat([each.up, extra], 1), torch.cat([each.down, down]), 1.0)
    write_lora(tmp_path / NAME, layers, "kohya")
    same_bits(read_lora(tmp_path / NAME), layers)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([3, 4]), st.data())
def test_an_original_layer_has_the_updates_of_its_parts_one_below_the_other(seed, rank, count, data):
    generator, width = torch.Generator().manual_seed(seed), 4
    blocks = ("single_transformer_blocks", "transformer_blocks")[count == 3]
    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"][:count]
    present = data.draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
    layers, dense = {}, []
    for part in parts:
        out = width * (4 if part == "proj_mlp" else 1)
        layer = LoraLayer(
            torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator), 1.0
        )
        if part in present:
            layers[f"{blocks}.7.{part}"] = layer
        dense.append(layer.up @ layer.down if part in present else torch.zeros(out, width))
    ((name, made),) = to_original(layers).items()
    assert torch.equal((made.up @ made.down), torch.cat(dense)) or torch.allclose(
        made.up @ made.down, torch.cat(dense)
    )
    same_bits(from_original(name, made), layers)


def test_an_original_layer_of_zeros_stays_three_layers():
    zeros = LoraLayer(torch.zeros(12, 3), torch.zeros(3, 4), 1.0)
    assert len(from_original("joint_blocks_0_x_block_attn_qkv", zeros)) == 3


@pytest.mark.parametrize("style", ["kohya", "original", "bfl"])
def test_layers_trained_as_one_by_kohya_or_bfl_are_cut_into_diffusers_modules(tmp_path, style):
    generator, width, rank = torch.Generator().manual_seed(3), 6, 4
    shapes = {
        "double_blocks.1.img_attn.qkv": 3 * width,
        "double_blocks.1.txt_mlp.0": 4 * width,
        "single_blocks.2.linear1": 7 * width,
        "final_layer.adaLN_modulation.1": 2 * width,
    }
    tensors, updates = {}, {}
    for number, (name, out) in enumerate(shapes.items()):
        up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator)
        alpha = 2.0**number
        updates[name] = alpha / rank * (up @ down)
        key = {"kohya": f"lora_unet_{name.replace('.', '_')}", "original": f"diffusion_model.{name}", "bfl": name}[
            style
        ]
        ends = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
        tensors |= {f"{key}.{ends[0]}.weight": down, f"{key}.{ends[1]}.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / NAME)
    layers = read_lora(tmp_path / NAME)
    dense = {name: layer.update().dense().float() for name, layer in layers.items()}
    joint, single = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.2"
    qkv = [f"{joint}.attn.to_{letter}" for letter in "qkv"]
    linear1 = [*(f"{single}.attn.to_{letter}" for letter in "qkv"), f"{single}.proj_mlp"]
    last = updates["final_layer.adaLN_modulation.1"]
    expected = {
        **dict(zip(qkv, updates["double_blocks.1.img_attn.qkv"].split(width), strict=True)),
        f"{joint}.ff_context.net.0.proj": updates["double_blocks.1.txt_mlp.0"],
        **dict(zip(linear1, updates["single_blocks.2.linear1"].split([width] * 3 + [4 * width]), strict=True)),
        # Shift and scale there, scale and shift in diffusers.
        "transformer.norm_out.linear": torch.cat([last[width:], last[:width]]),
    }
    assert dense.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(dense[name], update, rtol=1e-5, atol=1e-6)
    assert foreign_tensors(tmp_path / NAME).keys() == named_tensors(layers, "diffusers").keys()
    write_lora(tmp_path / "again.safetensors", layers, "diffusers")


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_the_original_names_of_a_unet_are_read_as_diffusers_modules(tmp_path, prefix):
    unet, layers = adapted(sdxl, "unet")
    homes = {f"unet.{path}": home for path, home in original_unet(unet).items()}
    tensors = {}
    for name, layer in layers.items():
        key = prefix + (homes[name].replace(".", "_") if prefix == "lora_unet_" else homes[name])
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / NAME)
    same_bits(read_lora(tmp_path / NAME), {name: layer._replace(scaling=0.5) for name, layer in layers.items()})


def test_the_original_names_of_stable_diffusion_1_are_read_too(tmp_path):
    unet, layers = adapted(sd15, "unet")
    homes = {f"unet.{path}": home for path, home in original_unet(unet).items()}
    tensors = {}
    for name, layer in layers.items():
        key = f"lora_unet_{homes[name].replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
    save_file(tensors, tmp_path / NAME)
    same_bits(read_lora(tmp_path / NAME), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(alpha=st.integers(1, 64), rank=st.integers(1, 8), rslora=st.booleans())
def test_folding_rounds_one_factor_once_and_nothing_where_the_scaling_is_a_power_of_two(dtype, alpha, rank, rslora):
    scaling = alpha / (rank**0.5 if rslora else rank)
    generator = torch.Generator().manual_seed(alpha)
    layer = LoraLayer(
        torch.randn(6, rank, generator=generator).to(dtype),
        torch.randn(rank, 5, generator=generator).to(dtype),
        scaling,
    )
    folded = layer.folded()
    assert folded.scaling == 1
    exact = scaling * (layer.up.double() @ layer.down.double())
    power = torch.tensor(scaling, dtype=torch.float64).frexp().mantissa == 0.5
    error = (folded.up.double() @ folded.down.double() - exact).abs()
    bound = 0.0 if power else 1.01 * 2**-24 * scaling
    assert (error <= bound * (layer.up.double().abs() @ layer.down.double().abs())).all()
    # The factor without the odd part is a power of two times the old one.
    ratio = (folded.down.double() / layer.down.double()).unique()
    assert ratio.numel() == 1
    assert ratio.frexp().mantissa.item() == 0.5
    assert folded.up.dtype in (dtype, torch.float32)
    assert not power or folded.up.dtype == dtype


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [2, 3, 16])
def test_a_file_loads_at_its_strength_although_no_alpha_is_looked_at(tmp_path, form, alpha):
    settings = {"r": 4, "lora_alpha": alpha, "target_modules": [*ATTENTION, "conv1"], "rank_pattern": {"conv1": 2}}
    deltas = save_adapter(tmp_path / "a", 1, settings)
    write_lora(tmp_path / NAME, read_lora(tmp_path / "a" / NAME), form)
    bare = load_file(tmp_path / NAME)
    assert not any("alpha" in key for key in bare)
    save_file(bare, tmp_path / "bare.safetensors")
    for file in (NAME, "bare.safetensors"):
        pipeline = tiny_sd()
        pipeline.load_lora_weights(tmp_path, weight_name=file)
        assert_same_answers(pipeline, with_dense([deltas], [1.0]))


def test_a_file_written_before_with_an_alpha_in_its_header_alone_is_still_read(tmp_path):
    deltas = save_adapter(tmp_path, 1, {"r": 4, "lora_alpha": 7, "target_modules": ATTENTION})
    layers = read_lora(tmp_path / NAME)
    assert {layer.scaling for layer in layers.values()} == {7 / 4}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.folded().update().dense().float().view(deltas[name].shape), deltas[name])


def test_a_file_of_stable_diffusion_xl_says_so_where_a1111_looks_for_it(tmp_path):
    for make, said in ((sdxl, "sdxl_base_v1-0"), (sd15, None)):
        _, layers = adapted(make, "unet", only=("attn1.to_q",))
        write_lora(tmp_path / NAME, layers)
        with safe_open(tmp_path / NAME, framework="pt") as file:
            assert file.metadata().get("ss_base_model_version") == said


def test_text_encoders_that_diffusers_would_not_read_under_kohya_s_names_keep_diffusers_in_the_common_format():
    unet, text = "unet.conv_in", "text_encoder.text_model.encoder.layers.0"
    assert common_format([unet, f"{text}.self_attn.q_proj"]) == "diffusers"
    assert common_format([unet, f"{text}.self_attn.q_proj", f"{text}.self_attn.out_proj"]) == "kohya"
    assert common_format([unet, f"{text}.mlp.fc1"]) == "kohya"


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q", "no names for this transformer"),
        ("text_encoder_3.encoder.block.0", "no names for text_encoder_3s"),
    ],
)
def test_what_kohya_has_no_names_for_is_refused(layer, said):
    with pytest.raises(UserError, match=said):
        check_kohya([layer], "`x`")

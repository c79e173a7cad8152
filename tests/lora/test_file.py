"""LoRA files: every style of names is read as diffusers reads it, and what is written loads there with its scaling."""

import json
import re

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from hypothesis import given
from hypothesis import strategies as st
from loras import (
    ATTENTION,
    EVERYTHING,
    TEXT,
    add_random_adapter,
    assert_same_answers,
    deltas_of,
    module_of,
    save_adapter,
    with_dense,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_sd
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from iet_finetune import UserError
from iet_finetune.lora.file import LoraLayer, merge_loras, write_lora
from iet_finetune.lora.reading import read_lora

NAME = "pytorch_lora_weights.safetensors"
HEADERS = {
    "alpha above rank": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "alpha below rank": {"r": 4, "lora_alpha": 1.5, "target_modules": ATTENTION},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION},
    "convolutions": {"r": 3, "lora_alpha": 6, "target_modules": EVERYTHING},
    "patterns": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": EVERYTHING,
        "rank_pattern": {"attn1.to_q": 5, "^conv_in": 2, "conv1": 1},
        "alpha_pattern": {"to_q": 9, "down_blocks.0.resnets.0.conv1": 4},
    },
    "rsLoRA with patterns": {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": EVERYTHING,
        "rank_pattern": {"conv2": 2},
    },
}


def assert_updates(layers, deltas):
    """The layers have exactly these dense updates."""
    assert layers.keys() == deltas.keys()
    for name, delta in deltas.items():
        update = layers[name].update().dense().float().reshape(delta.shape)
        torch.testing.assert_close(update, delta, rtol=1e-5, atol=1e-6)


def canonical(deltas):
    """Updates of a pipeline from transformers 5, under the names that a LoRA file has."""
    return {name.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): d for name, d in deltas.items()}


def rewritten(folder, change, metadata=None):
    """The adapter in `folder` with its tensors changed and another header, as another file."""
    path = folder / "other.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(folder / NAME)).items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("settings", HEADERS.values(), ids=HEADERS)
def test_the_scaling_is_read_from_the_header_as_peft_has_it(tmp_path, settings):
    deltas = save_adapter(tmp_path, 1, settings)
    assert_updates(read_lora(tmp_path / NAME), deltas)


def test_text_encoder_layers_are_read_with_their_own_settings(tmp_path):
    text = {
        "r": 2,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": TEXT,
        "alpha_pattern": {"encoder.layers.0.mlp.fc1": 3},
    }
    deltas = save_adapter(tmp_path, 1, HEADERS["alpha above rank"], text)
    assert_updates(read_lora(tmp_path / NAME), canonical(deltas))


def test_without_a_header_the_scaling_is_1_as_in_diffusers(tmp_path):
    save_adapter(tmp_path, 1, HEADERS["convolutions"], header=False)
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path)
    assert_updates(read_lora(tmp_path / NAME), dict(loaded(pipeline)))


def loaded(pipeline, components=("unet",)):
    """The dense updates of an adapter that a pipeline has loaded."""
    for component in components:
        for name, module in getattr(pipeline, component).named_modules():
            if hasattr(module, "get_delta_weight"):
                yield f"{component}.{name}", module.get_delta_weight(module.active_adapters[0]).detach()


def older(tensors):
    """Names of the first diffusers with LoRA."""
    for side, letter in (("down", "A"), ("up", "B")):
        for short in ("to_q", "to_k", "to_v"):
            tensors = {
                k.replace(f".{short}.lora_{letter}", f".processor.{short}_lora.{side}"): v for k, v in tensors.items()
            }
        tensors = {
            k.replace(f".to_out.0.lora_{letter}", f".processor.to_out_lora.{side}"): v for k, v in tensors.items()
        }
    return tensors


def oldest_text(tensors):
    """As `older`, with a text encoder's projections named like a UNet's."""
    for name, old in {"q_proj": "to_q", "v_proj": "to_v", "out_proj": "to_out"}.items():
        tensors = {
            k.replace(f".{name}.lora_A", f".{old}_lora.down").replace(f".{name}.lora_B", f".{old}_lora.up"): v
            for k, v in tensors.items()
        }
    return older(tensors)


def with_text_model(tensors):
    return {k.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): v for k, v in tensors.items()}


STYLES = {
    "scripts": convert_state_dict_to_diffusers,
    "older": older,
    "oldest": oldest_text,
    "transformers 4": lambda tensors: with_text_model(convert_state_dict_to_diffusers(tensors)),
}


@pytest.mark.parametrize("change", STYLES.values(), ids=STYLES)
def test_older_styles_of_names_are_read_as_the_same_layers(tmp_path, change):
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION}
    text = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "out_proj"]}
    deltas = save_adapter(tmp_path, 1, settings, text)
    path = rewritten(tmp_path, change)
    assert load_file(path).keys() != load_file(tmp_path / NAME).keys()
    assert_updates(read_lora(path), canonical(deltas))


@pytest.mark.parametrize("text_name", ["lora_te_", "lora_te1_"])
def test_kohya_files_are_read_with_the_alpha_of_every_layer(tmp_path, text_name):
    every = [*EVERYTHING, "time_emb_proj", "linear_2", "conv_out", "conv", "ff.net.0.proj"]
    saved = save_adapter(
        tmp_path,
        1,
        {"r": 4, "lora_alpha": 4, "target_modules": every},
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
    )

    def to_kohya(tensors):
        kohya = convert_state_dict_to_kohya(with_text_model(tensors))
        kohya = {key.replace("lora_te1_", text_name): tensor for key, tensor in kohya.items()}
        for i, key in enumerate(key for key in kohya if key.endswith(".alpha")):
            kohya[key] = torch.tensor(float(1 + i % 5))
        return kohya

    path = rewritten(tmp_path, to_kohya)
    layers, alphas = read_lora(path), [v.item() for k, v in load_file(path).items() if k.endswith(".alpha")]
    assert len(set(alphas)) == 5
    assert sorted(4 * layer.scaling for layer in layers.values()) == pytest.approx(sorted(alphas))
    deltas = canonical(saved)
    assert_updates({name: layer._replace(scaling=1.0) for name, layer in layers.items()}, deltas)


def test_a_kohya_alpha_belongs_to_its_own_layer(tmp_path):
    save_adapter(tmp_path, 1, {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION})

    def to_kohya(tensors):
        kohya = convert_state_dict_to_kohya(tensors)
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha"
        return kohya | {key: torch.tensor(2.0)}

    layers = read_lora(rewritten(tmp_path, to_kohya))
    halved = [name for name, layer in layers.items() if layer.scaling == 0.5]
    assert halved == ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"]


@pytest.mark.parametrize("form", [None, "diffusers", "kohya"])
@pytest.mark.parametrize("settings", HEADERS.values(), ids=HEADERS)
def test_what_is_written_loads_in_diffusers_and_is_read_again_as_it_was(tmp_path, settings, form):
    text = {"r": 2, "lora_alpha": 7, "target_modules": [*TEXT, "out_proj"], "rank_pattern": {"fc1": 4}}
    deltas = save_adapter(tmp_path / "a", 1, settings, text)
    layers = read_lora(tmp_path / "a" / NAME)
    write_lora(tmp_path / NAME, layers, form)
    again = read_lora(tmp_path / NAME)
    assert again.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(again[name].up, layer.folded().up)
        assert torch.equal(again[name].down, layer.folded().down)
        assert again[name].scaling == 1
    write_lora(tmp_path / "again.safetensors", again, form)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / NAME).read_bytes()
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path)
    assert dict(loaded(pipeline, ("unet", "text_encoder"))).keys() == deltas.keys()
    assert_same_answers(pipeline, with_dense([deltas], [1.0]))


def test_a_text_encoder_without_attention_layers_loads_too(tmp_path):
    deltas = save_adapter(tmp_path / "a", 1, None, {"r": 2, "lora_alpha": 6, "target_modules": ["fc1", "fc2"]})
    write_lora(tmp_path / NAME, read_lora(tmp_path / "a" / NAME))
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path)
    assert_same_answers(pipeline, with_dense([deltas], [1.0]))


def test_a_text_encoder_inside_another_model_gets_its_ranks_too(tmp_path):
    """The second encoder of Stable Diffusion XL, whose modules are named with `text_model.`."""
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=8,
    )
    encoder = CLIPTextModelWithProjection(config)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
    add_random_adapter(encoder, 1, **settings)
    deltas = deltas_of(encoder, "text_encoder_2")
    layers = {}
    for name in deltas:
        module = encoder.get_submodule(name.removeprefix("text_encoder_2."))
        up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
        layers[name] = LoraLayer(up.detach(), down.detach(), module.scaling["default"])
    write_lora(tmp_path / NAME, layers)
    fresh = CLIPTextModelWithProjection(config)
    state_dict, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    StableDiffusionXLPipeline.load_lora_into_text_encoder(
        state_dict, alphas, fresh, prefix="text_encoder_2", metadata=metadata
    )
    got = {f"text_encoder_2.{n}": m for n, m in fresh.named_modules() if hasattr(m, "get_delta_weight")}
    assert got.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(got[name].get_delta_weight(got[name].active_adapters[0]), delta)


def test_a_transformer_loads_what_is_written_for_it(tmp_path):
    def transformer():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
        )

    model = transformer()
    add_random_adapter(model, 1, r=2, lora_alpha=6, target_modules=["to_q", "proj_out"], rank_pattern={"proj_out": 3})
    deltas = deltas_of(model, "transformer")
    saved = {f"transformer.{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()}
    header = {f"transformer.{key}": value for key, value in model.peft_config["default"].to_dict().items()}
    header = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in header.items()})
    save_file(saved, tmp_path / "in.safetensors", metadata={"lora_adapter_metadata": header})
    layers = read_lora(tmp_path / "in.safetensors")
    assert_updates(layers, deltas)
    write_lora(tmp_path / NAME, layers)
    assert load_file(tmp_path / NAME).keys() == saved.keys()  # as the scripts of transformers name them
    fresh = transformer()
    with safe_open(tmp_path / NAME, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    fresh.load_lora_adapter(load_file(tmp_path / NAME), prefix="transformer", metadata=metadata)
    got = {f"transformer.{n}": m for n, m in fresh.named_modules() if hasattr(m, "get_delta_weight")}
    assert got.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(got[name].get_delta_weight("default_0"), delta)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_the_header_gives_every_layer_an_alpha_of_its_rank_and_holds_only_what_a_lora_config_takes(tmp_path, form):
    save_adapter(tmp_path / "a", 1, HEADERS["patterns"])
    write_lora(tmp_path / NAME, read_lora(tmp_path / "a" / NAME), form)
    with safe_open(tmp_path / NAME, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in header.items()})
    assert (config.r, config.lora_alpha) == (3, 3)
    assert config.rank_pattern["^conv_in"] == 2
    assert config.alpha_pattern == config.rank_pattern
    assert len(config.target_modules) == len(read_lora(tmp_path / NAME))


def saved_as_the_script_saves(folder, settings):
    """An adapter of `tiny_sd()`'s UNet as diffusers' `train_text_to_image_lora.py` saves it; its dense updates."""
    unet = tiny_sd().unet
    add_random_adapter(unet, 1, **settings)
    converted = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    header = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=converted, **header)
    return deltas_of(unet, "unet")


@pytest.mark.parametrize("targets", [ATTENTION, ["to_k", "to_v"]], ids=["all", "some"])
def test_what_the_training_script_writes_is_read_and_gets_names_that_other_tools_match(tmp_path, targets):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    deltas = saved_as_the_script_saves(tmp_path / "script", settings)
    layers = read_lora(tmp_path / "script" / NAME)
    assert_updates(layers, deltas)
    write_lora(tmp_path / NAME, layers)
    assert all(".lora.down." in key or ".lora.up." in key for key in load_file(tmp_path / "script" / NAME))
    assert all(re.fullmatch(r"lora_unet_\w+\.lora_(up|down)\.weight", key) for key in load_file(tmp_path / NAME))
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path)
    assert_same_answers(pipeline, with_dense([deltas], [1.0]))


def test_a_unet_s_layers_of_several_kinds_have_the_names_of_which_diffusers_loads_all(tmp_path):
    """What the script's converter makes of them is read here as well, but diffusers leaves the attention out."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": [*ATTENTION, "proj_in", "conv1", "ff.net.2"]}
    deltas = saved_as_the_script_saves(tmp_path / "script", settings)
    layers = read_lora(tmp_path / "script" / NAME)
    assert_updates(layers, deltas)
    write_lora(tmp_path / NAME, layers, "diffusers")
    save_adapter(tmp_path / "saved", 1, settings)
    assert load_file(tmp_path / NAME).keys() == load_file(tmp_path / "saved" / NAME).keys()
    pipeline = tiny_sd()
    pipeline.load_lora_weights(tmp_path)
    assert dict(loaded(pipeline)).keys() == deltas.keys()
    assert_same_answers(pipeline, with_dense([deltas], [1.0]))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    save_adapter(tmp_path, 1, HEADERS["rsLoRA"])
    before = (tmp_path / NAME).read_bytes()
    layer = next(iter(read_lora(tmp_path / NAME).values())).folded()
    with pytest.raises(RuntimeError):
        write_lora(tmp_path / NAME, {"unet.a": layer, "unet.b": layer})  # shared memory, which safetensors refuses
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == before


def random_layer(generator, rank, scaling, convolution):
    out, rest = (6, (4, 3, 3)) if convolution else (8, (5,))
    up = torch.randn(out, rank, *([1, 1] if convolution else []), generator=generator)
    return LoraLayer(up, torch.randn(rank, *rest, generator=generator), scaling)


@st.composite
def adapters(draw):
    """Up to 8 adapters of two layers, of which each has one or both, with ranks and scalings of their own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    files = []
    for _ in range(draw(st.integers(1, 8))):
        names = draw(st.sampled_from([["unet.a"], ["unet.b"], ["unet.a", "unet.b"]]))
        files.append(
            {
                name: random_layer(generator, draw(st.integers(1, 4)), draw(st.floats(0.1, 4)), name == "unet.b")
                for name in names
            }
        )
    weights = draw(st.lists(st.floats(0.1, 5) | st.integers(1, 9), min_size=len(files), max_size=len(files)))
    return files, weights


def dense(layer):
    return layer.scaling * (layer.up.flatten(1).double() @ layer.down.flatten(1).double())


@given(adapters())
def test_a_merge_is_the_weighted_mean_of_the_dense_updates(case):
    files, weights = case
    merged = merge_loras(files, weights)
    assert merged.layers.keys() == {name for file in files for name in file}
    for name, layer in merged.layers.items():
        expected = sum(w * dense(file[name]) for file, w in zip(files, weights, strict=True) if name in file)
        torch.testing.assert_close(dense(layer), expected / sum(weights), rtol=1e-5, atol=1e-5)
        assert layer.rank <= min(*expected.shape, sum(file[name].rank for file in files if name in file))
        assert merged.lost[name][0] == 0


@given(adapters(), st.integers(1, 3))
def test_a_cut_merge_is_the_best_of_its_rank_and_says_what_it_lost(case, rank):
    files, weights = case
    merged = merge_loras(files, weights, rank)
    for name, layer in merged.layers.items():
        exact = sum(w * dense(file[name]) for file, w in zip(files, weights, strict=True) if name in file)
        exact = exact / sum(weights)
        values = torch.linalg.svdvals(exact).square()
        lost, whole = merged.lost[name]
        assert layer.rank <= rank
        assert whole == pytest.approx(values.sum().item(), rel=1e-9)
        assert lost == pytest.approx(values[rank:].sum().item(), rel=1e-6, abs=1e-10 * whole)
        assert (exact - dense(layer)).square().sum().item() == pytest.approx(lost, rel=1e-3, abs=1e-10 * whole)


@pytest.mark.parametrize("count", range(1, 9))
def test_equal_adapters_merge_to_themselves_in_their_own_rank(tmp_path, count):
    save_adapter(tmp_path, 1, HEADERS["patterns"])
    layers = read_lora(tmp_path / NAME)
    merged = merge_loras([layers] * count, list(range(1, count + 1)))
    for name, layer in layers.items():
        assert merged.layers[name].rank == layer.rank
        torch.testing.assert_close(dense(merged.layers[name]), dense(layer), rtol=1e-5, atol=1e-6)


def test_an_update_of_zero_keeps_its_layer(tmp_path):
    layer = LoraLayer(torch.zeros(8, 4), torch.randn(4, 5), 2.0)
    merged = merge_loras([{"unet.a": layer}], [1])
    assert merged.layers["unet.a"].rank == 1
    assert dense(merged.layers["unet.a"]).abs().sum() == 0
    assert merged.lost == {"unet.a": (0.0, 0.0)}


def test_half_precision_adapters_merge_in_fp32():
    layers = [{"unet.a": LoraLayer(torch.randn(8, 2).half(), torch.randn(2, 5).bfloat16(), 1.0)} for _ in range(2)]
    (layer,) = merge_loras(layers, [1, 3]).layers.values()
    assert (layer.up.dtype, layer.down.dtype) == (torch.float32, torch.float32)
    expected = (dense(layers[0]["unet.a"]) + 3 * dense(layers[1]["unet.a"])) / 4
    torch.testing.assert_close(dense(layer), expected, rtol=1e-5, atol=1e-5)


PAIR = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}
BAD = {
    "a whole model": ({"conv_in.weight": torch.ones(2, 2)}, {}, "not a LoRA file .* `conv_in.weight`"),
    "no tensors": ({}, {"format": "pt"}, "it holds no tensors"),
    "DoRA": (PAIR | {"unet.a.lora_magnitude_vector.weight": torch.ones(4)}, {}, "is a DoRA adapter"),
    "DoRA of kohya": ({"lora_unet_mid_block_x.dora_scale": torch.ones(4)}, {}, "is a DoRA adapter"),
    "LoHa": ({"lora_unet_mid_block_x.hada_w1_a": torch.ones(4, 2)}, {}, "`lora_unet_mid_block_x.hada_w1_a`"),
    "bias": (PAIR | {"unet.a.lora_B.bias": torch.ones(4)}, {}, "`unet.a.lora_B.bias`"),
    "no component": ({"down.a.lora_A.weight": torch.ones(2, 3)}, {}, "does not say which component"),
    "one factor": ({"unet.a.lora_A.weight": torch.ones(2, 3)}, {}, "only one of the two factors of `unet.a`"),
    "twice": (PAIR | {"unet.a.lora.up.weight": torch.ones(4, 2)}, {}, "the up of `unet.a` twice"),
    "no pair": (PAIR | {"unet.a.lora_B.weight": torch.ones(4, 3)}, {}, "at `unet.a`: weights of shape"),
    "one axis": (PAIR | {"unet.a.lora_A.weight": torch.ones(2)}, {}, "at `unet.a`: factors of shape"),
    "rank of 0": (
        {"unet.a.lora_A.weight": torch.ones(0, 3), "unet.a.lora_B.weight": torch.ones(4, 0)},
        {"lora_adapter_metadata": '{"unet.lora_alpha": 4}'},
        "at `unet.a`: factors of shape",
    ),
    "two alphas": (PAIR | {"unet.a.alpha": torch.ones(2)}, {}, "cannot be read at `unet.a`"),
    "DoRA by header": (PAIR, {"lora_adapter_metadata": '{"unet.use_dora": true}'}, "its header says DoRA"),
    "NaN": (PAIR | {"unet.a.lora_B.weight": torch.full((4, 2), torch.nan)}, {}, "`unet.a` that are not finite"),
    "integers": (PAIR | {"unet.a.lora_B.weight": torch.ones(4, 2, dtype=torch.int8)}, {}, "not floating-point"),
    "another model of kohya": ({"lora_unet_blocks_4_x.lora_down.weight": torch.ones(2, 3)}, {}, "save_lora_weights"),
    "Flux with rows for no layer": (
        {f"double_blocks.0.img_attn.qkv.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
        {},
        "at `double_blocks_0_img_attn_qkv`: its 2 rows cannot be cut",
    ),
    "no JSON": (PAIR, {"lora_adapter_metadata": "{"}, "header of .* is not JSON"),
    "no mapping": (PAIR, {"lora_adapter_metadata": "[1]"}, "header is not a mapping"),
    "alpha of 0": (PAIR, {"lora_adapter_metadata": '{"unet.lora_alpha": 0}'}, "alpha must be positive, not 0"),
    "alpha a word": (PAIR, {"lora_adapter_metadata": '{"unet.lora_alpha": "two"}'}, "cannot be read at `unet.a`"),
    "pattern": (PAIR, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}, "cannot be read at `unet.a`"),
}


@pytest.mark.parametrize(("tensors", "metadata", "said"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_merged_is_refused_in_one_line(tmp_path, tensors, metadata, said):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=said) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_of_another_format_is_refused_by_name(tmp_path):
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(UserError, match="x.safetensors` is not a safetensors file"):
        read_lora(tmp_path / "x.safetensors")


def test_a_layer_s_name_is_that_of_its_module(tmp_path):
    save_adapter(tmp_path, 1, HEADERS["convolutions"])
    pipeline: StableDiffusionPipeline = tiny_sd()
    for name, layer in read_lora(tmp_path / NAME).items():
        weight = module_of(pipeline, name).weight
        assert weight.shape == (layer.up.shape[0], *layer.down.shape[1:])

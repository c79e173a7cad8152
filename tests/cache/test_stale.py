"""What is cached is never stale, and what is the same for another run is not encoded again."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import (
    CUT,
    FLIPS,
    MIXED,
    SQUARES,
    amended,
    at_once,
    built,
    captions_of,
    config,
    encoded_by,
    made_from,
    train,
    write_captions,
)
from PIL import Image
from runs import assert_equal
from safetensors.torch import load_file, save_file
from tiny import tiny_sd, tiny_tokenizer
from tiny_families import tiny_pipeline
from transformers import CLIPTokenizer

from iet_finetune.data.loader import Visit
from iet_finetune.families import FAMILIES
from iet_finetune.families.stable_diffusion import StableDiffusion


def nudged(folder: Path, tensor: str, place: tuple[int, ...]) -> None:
    """Another value, the next that there is, in one place of one tensor of the model in a folder."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    before = tensors[tensor].clone()
    tensors[tensor][place] = torch.nextafter(before[place], torch.tensor(torch.inf))
    assert (tensors[tensor] != before).sum() == 1
    save_file(tensors, file, {"format": "pt"})


def set_in(file: Path, **values: Any) -> None:
    settings = json.loads(file.read_text())
    assert all(name in settings and settings[name] != value for name, value in values.items())
    file.write_text(json.dumps(settings | values))


def change_a_weight_of_the_vae(base: Path) -> None:
    nudged(base / "vae", "encoder.mid_block.resnets.1.conv2.weight", (-1, -1, -1, -1))


def change_a_bias_of_the_vae(base: Path) -> None:
    nudged(base / "vae", "quant_conv.bias", (0,))


def change_a_setting_of_the_vae(base: Path) -> None:
    set_in(base / "vae" / "config.json", norm_num_groups=2)


def change_a_word(base: Path) -> None:
    nudged(base / "text_encoder", "embeddings.token_embedding.weight", (77, -1))


def change_a_setting_of_the_text_encoder(base: Path) -> None:
    set_in(base / "text_encoder" / "config.json", hidden_act="gelu")


def swap_two_letters_of_the_tokenizer(base: Path) -> None:
    vocabulary = tiny_tokenizer().get_vocab()
    vocabulary["t"], vocabulary["h"] = vocabulary["h"], vocabulary["t"]
    shutil.rmtree(base / "tokenizer")
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(base / "tokenizer")


def shorten_the_tokenizer(base: Path) -> None:
    shutil.rmtree(base / "tokenizer")
    tiny_tokenizer(length=10).save_pretrained(base / "tokenizer")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_a_weight_of_the_vae, (SQUARES, 0)),
        (change_a_bias_of_the_vae, (SQUARES, 0)),
        (change_a_setting_of_the_vae, (SQUARES, 0)),
        (change_a_word, (0, SQUARES)),
        (change_a_setting_of_the_text_encoder, (0, SQUARES)),
        (swap_two_letters_of_the_tokenizer, (0, SQUARES)),
        (shorten_the_tokenizer, (0, SQUARES)),
    ],
)
def test_what_changes_in_the_encoders_makes_all_that_they_encode_new(world, tmp_path, change, expected):
    assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    base = amended(world, tmp_path, "sd")
    assert encoded_by(config(world, tmp_path / "out", pretrained_model_name_or_path=base)) == (0, 0), "it is a copy"
    change(Path(base))
    assert encoded_by(config(world, tmp_path / "out", pretrained_model_name_or_path=base)) == expected
    assert encoded_by(config(world, tmp_path / "out")) == (0, 0), "what was there before is still good"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"resolution": 32}, (MIXED - 1, 0)),
        ({"image_interpolation_mode": "bilinear"}, (MIXED - 1, 0)),
        ({"center_crop": True}, (CUT, 0)),
        ({"seed": 1}, (CUT, 0)),
        ({"random_flip": True}, (MIXED - 1, 0)),
        ({"caption_dropout": 0.5}, (0, 1)),
    ],
)
def test_a_setting_makes_new_what_it_changes_and_nothing_else(world, tmp_path, flags, expected):
    mixed = {"data": "mixed"}
    assert encoded_by(config(world, tmp_path / "out", **mixed)) == (MIXED - 1, 3 * MIXED), "one picture is there twice"
    assert encoded_by(config(world, tmp_path / "out", **mixed, **flags)) == expected
    assert encoded_by(config(world, tmp_path / "out", **mixed, **flags)) == (0, 0)
    assert encoded_by(config(world, tmp_path / "out", **mixed)) == (0, 0)


@pytest.mark.parametrize("base", ["sd3", "flux dev", "pixart alpha"])
def test_another_length_of_captions_makes_captions_new(world, tmp_path, base):
    assert encoded_by(config(world, tmp_path / "out", base)) == (SQUARES, SQUARES)
    assert encoded_by(config(world, tmp_path / "out", base, max_sequence_length=17)) == (0, SQUARES)


def test_captions_of_an_sd3_without_t5_are_new_where_the_transformer_takes_other_widths(world, tmp_path):
    for width in (40, 48):
        pipeline = tiny_pipeline("sd3 without t5")
        torch.manual_seed(0)
        settings = {**pipeline.transformer.config, "joint_attention_dim": width}
        pipeline.transformer = type(pipeline.transformer).from_config(settings)
        pipeline.save_pretrained(tmp_path / str(width))
    narrow, wide = (
        config(world, tmp_path / "out", "sd3", pretrained_model_name_or_path=str(tmp_path / width))
        for width in ("40", "48")
    )
    assert encoded_by(narrow) == (SQUARES, SQUARES)
    assert encoded_by(wide) == (0, SQUARES)


def test_another_number_of_threads_makes_everything_new(world, tmp_path):
    assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    torch.set_num_threads(2)
    try:
        assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    finally:
        torch.set_num_threads(1)
    assert encoded_by(config(world, tmp_path / "out")) == (0, 0)


@pytest.mark.parametrize(("threads", "batch"), [(2, 3), (3, 8)])
def test_with_several_threads_the_cache_gives_what_encoding_gives(world, tmp_path, threads, batch):
    # Of small tensors torch's kernels give no part to another thread.
    flags = {"data": "mixed", "resolution": 64, "train_batch_size": batch, "num_shards": 1}
    torch.set_num_threads(threads)
    try:
        cached, *_ = built(config(world, tmp_path / "out", **flags))
        plain, _, run = built(config(world, tmp_path / "out", cache_latents=False, **flags))
        visits = [Visit(0, position) for position in range(batch)]
        pixels = torch.stack([plain.shards[0][visit].pixel_values for visit in visits])
        means = torch.stack([cached.shards[0][visit].encoded.mean for visit in visits])
        # As a micro-batch is encoded in training.
        assert torch.equal(means, run.local._noising._encoder.images(pixels)[0])
    finally:
        torch.set_num_threads(1)


OWN_FAMILY = """
from iet_finetune.families import FAMILIES
from iet_finetune.families.stable_diffusion import StableDiffusion

class Brighter(StableDiffusion):
    def encode_images(self, pixel_values):
        return super().encode_images(pixel_values * {factor})
"""


@pytest.mark.parametrize("where", ["in a file", "typed in"])
def test_a_family_of_ones_own_that_is_amended_makes_what_it_encodes_new(world, tmp_path, monkeypatch, where):
    file = tmp_path / "own_family.py"

    def load(factor: float) -> None:
        module = types.ModuleType("own_family")
        file.write_text(OWN_FAMILY.format(factor=factor))
        if where == "in a file":
            module.__file__ = str(file)
        exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, "own_family", module)
        monkeypatch.setitem(FAMILIES, "StableDiffusionPipeline", module.Brighter)

    assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    load(1.0)
    assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    load(0.5)
    assert encoded_by(config(world, tmp_path / "out"))[0] == SQUARES


def test_another_image_under_the_same_name_and_another_caption_are_new(world, tmp_path):
    assert encoded_by(config(world, tmp_path / "out", **FLIPS)) == (2 * SQUARES, SQUARES)
    data = Path(amended(world, tmp_path, "squares"))
    picture = np.asarray(Image.open(data / "003.png")).copy()
    picture[-1, -1, -1] ^= 1
    Image.fromarray(picture).save(data / "003.png")
    lines = captions_of(data)
    lines[5]["text"] += "s"
    write_captions(data, lines)
    assert encoded_by(config(world, tmp_path / "out", train_data_dir=str(data), **FLIPS)) == (2, 1)


def rename_everything(world: Path, tmp_path: Path) -> dict[str, Any]:
    data = Path(amended(world, tmp_path, "squares"))
    lines = captions_of(data)
    for line in reversed(lines):
        (data / line["file_name"]).rename(data / f"other-{line['file_name']}")
        line["file_name"] = f"other-{line['file_name']}"
    write_captions(data, lines[::-1])
    base = shutil.copytree(world / "sd", tmp_path / "elsewhere" / "base")
    return {"train_data_dir": str(data), "pretrained_model_name_or_path": str(base)}


def another_denoiser(world: Path, tmp_path: Path) -> dict[str, Any]:
    pipeline = tiny_sd(timesteps=10)
    pipeline.unet = tiny_sd(seed=1).unet
    pipeline.save_pretrained(tmp_path / "base")
    return {"pretrained_model_name_or_path": str(tmp_path / "base")}


@pytest.mark.parametrize(
    "other",
    [
        rename_everything,
        another_denoiser,
        {"seed": 1},
        {"center_crop": True},
        {"max_train_samples": 5},
        {"holdout_fraction": 0.25},
        {"random_flip": False},
        {"caption_dropout": 0.0},
        {"num_shards": 3, "gradient_accumulation_steps": 2, "train_batch_size": 4, "learning_rate": 1.0},
        {"use_lora": True, "mixed_precision": "bf16"},
        {"dataloader_num_workers": 2, "num_train_epochs": 3, "noise_offset": 0.1, "agc_threshold": 0.0},
    ],
)
def test_what_is_the_same_for_another_run_is_not_encoded_again(world, tmp_path, monkeypatch, other):
    flags = {**FLIPS, "caption_dropout": 0.5}
    assert encoded_by(config(world, tmp_path / "out", **flags)) == (2 * SQUARES, SQUARES + 1)
    calls = []
    for name in ("encode_images", "encode_captions"):
        real = getattr(StableDiffusion, name)
        monkeypatch.setattr(StableDiffusion, name, lambda *given, real=real: (calls.append(given), real(*given))[1])
    changes = other if isinstance(other, dict) else other(world, tmp_path)
    assert encoded_by(config(world, tmp_path / "out", **flags | changes)) == (0, 0)
    assert calls == []


def test_batches_above_eight_share_what_is_encoded_eight_at_once(world, tmp_path):
    assert encoded_by(config(world, tmp_path / "out", train_batch_size=8)) == (SQUARES, SQUARES)
    assert encoded_by(config(world, tmp_path / "out", train_batch_size=12)) == (0, 0)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batches_share_what_is_encoded_if_and_only_if_as_many_are_encoded_at_once(world, tmp_path, batch):
    assert encoded_by(config(world, tmp_path / "out", train_batch_size=4)) == (SQUARES, SQUARES)
    other = config(world, tmp_path / "other" / "out", train_batch_size=batch)
    built(other)
    same = at_once(tmp_path / "cache") == at_once(tmp_path / "other" / "cache")
    again = config(world, tmp_path / "out", train_batch_size=batch)
    assert encoded_by(again) == ((0, 0) if same else (SQUARES, SQUARES))


def test_of_more_data_only_what_is_new_is_encoded(world, tmp_path):
    assert encoded_by(config(world, tmp_path / "out")) == (SQUARES, SQUARES)
    data = Path(amended(world, tmp_path, "squares"))
    shutil.copy(data / "004.png", data / "copy.png")
    shutil.copy(world / "mixed" / "001.png", data / "new.png")
    more = [{"file_name": "copy.png", "text": "thing 2"}, {"file_name": "new.png", "text": "a new thing"}]
    write_captions(data, [*more, *captions_of(data)])
    more_of_it = config(world, tmp_path / "out", train_data_dir=str(data))
    assert encoded_by(more_of_it) == (1, 1)
    cached = train(more_of_it)
    plain = config(world, tmp_path / "plain", train_data_dir=str(data), cache_latents=False)
    assert_equal(cached, train(plain))


def test_made_from_describes_the_rows_and_names_no_path(world, tmp_path):
    built(config(world, tmp_path / "out", data="mixed"))
    images, captions = made_from(tmp_path / "cache")
    assert [*images["models"]] == ["vae"]
    assert [*captions["models"]] == ["text_encoder"]
    for facts in (images, captions):
        assert facts["pipeline"] == "StableDiffusionPipeline"
        assert facts["made by"]["torch"] == torch.__version__
        assert str(world) not in json.dumps(facts), "what moves with its cache is still good"
        assert str(tmp_path) not in json.dumps(facts)

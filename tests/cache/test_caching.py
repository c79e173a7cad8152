"""Images and captions that are encoded once give the same weights as encoding in every step, and are never stale."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from families.lending import travelling
from families.pixels import tiny_pixels
from PIL import Image
from ranks import Ended, run_ranks
from runs import Killed, assert_equal, killed_after, run_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import RESOLUTION, save_tiny_sd, tiny_sd, tiny_tokenizer
from tiny_families import tiny_pipeline
from torch import Tensor
from transformers import CLIPTokenizer

from iet_finetune import Config, Trainer, cli
from iet_finetune.cache import filling
from iet_finetune.cache.caching import encode_data
from iet_finetune.data import rows as data_rows
from iet_finetune.data.loader import Visit
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.distributed.groups import Ranks
from iet_finetune.families import FAMILIES
from iet_finetune.families.stable_diffusion import StableDiffusion
from iet_finetune.training.assembly import Run, assemble
from iet_finetune.training.data import Data
from iet_finetune.training.model import Model
from iet_finetune.training.starting import start_accelerator

MB = 1_000_000
LATEST = {"resume_from_checkpoint": "latest"}
# Width and height of the images of `mixed`: of five of them something is cut off.
SIZES = [(16, 16), (24, 16), (16, 40), (30, 20), (32, 32), (17, 33), (16, 16), (16, 16), (20, 44), (50, 50), (16, 16)]
CUT = 5
COPY_OF = {7: 6}  # a picture that is there twice, with captions of its own
MIXED, SQUARES = len(SIZES), 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines of several families, `squares`, 8 images of 16 pixels, and `mixed`, 11 of many sizes."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "sd", timesteps=10)
    for name in ("sdxl", "sd3", "flux dev", "pixart alpha"):
        tiny_pipeline(name).save_pretrained(folder / name)
    tiny_pixels(timesteps=100).save_pretrained(folder / "pixels")
    save_pictures(folder / "squares", [(RESOLUTION, RESOLUTION)] * SQUARES)
    save_pictures(folder / "mixed", SIZES, captions=3, copies=COPY_OF)
    return folder


def save_pictures(
    folder: Path, sizes: list[tuple[int, int]], captions: int = 1, copies: dict[int, int] | None = None
) -> Path:
    """Images of coloured noise, each with so many captions; the values of `copies` are those to copy."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    lines = []
    for i, (width, height) in enumerate(sizes):
        path = folder / f"{i:03d}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        if copies and i in copies:
            shutil.copy(folder / f"{copies[i]:03d}.png", path)
        texts = [f"thing {i}", *(f"thing {i}, said in way {j}" for j in range(1, captions))]
        lines.append({"file_name": path.name, "text": texts if captions > 1 else texts[0]})
    write_captions(folder, lines)
    return folder


def write_captions(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def captions_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def config(world: Path, output: Path, base: str = "sd", data: str = "squares", **flags: Any) -> Config:
    """A short run of two shards; the cache lies beside its output."""
    defaults: dict[str, Any] = {
        "pretrained_model_name_or_path": str(world / base),
        "train_data_dir": str(world / data),
        "output_dir": str(output),
        "cache_dir": str(output.parent / "cache"),
        "resolution": RESOLUTION,
        "num_shards": 2,
        "train_batch_size": 4,
        "num_train_epochs": 1,
        "merge_every_epochs": 1,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 0,
        "report_to": "none",
    }
    if base in ("sd3", "flux dev", "pixart alpha"):
        defaults["max_sequence_length"] = 16
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, Tensor]:
    (file,) = [*output.glob("unet/*.safetensors"), *output.glob("transformer/*.safetensors")]
    return load_file(file)


def train(settings: Config) -> dict[str, Tensor]:
    """The denoiser that comes of it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(Trainer(settings).train())


def built(settings: Config) -> tuple[Data, Model, Run]:
    """What the run works with, for which everything has been encoded that is to be cached."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return assemble(settings, start_accelerator(settings), Ranks.alone())


def rows_of(path: Path) -> int:
    """How many rows a file of a cache holds."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice("keys").get_shape()[0]


def has_images(path: Path) -> bool:
    """Whether the rows of a file of a cache are those of images."""
    with safe_open(path, framework="pt") as file:
        return "mean" in file.keys()  # noqa: SIM118 - no mapping


def encoded(cache: Path, pattern: str) -> list[Path]:
    """The files of a cache that belong to encoded images and captions."""
    return [*(cache / "iet_finetune" / "encoded").rglob(pattern)]


def rows(cache: Path) -> tuple[int, int]:
    """How many rows of images and of captions a cache holds, those counted twice that are there twice."""
    counts = {True: 0, False: 0}
    for path in encoded(cache, "*.safetensors"):
        counts[has_images(path)] += rows_of(path)
    return counts[True], counts[False]


def made_from(cache: Path) -> list[dict[str, Any]]:
    """What decided the bits of the rows of a cache: of those of images, and then of those of captions."""
    facts = [json.loads(path.read_text()) for path in encoded(cache, "made_from.json")]
    return sorted(facts, key=lambda one: "images" not in one)


def at_once(cache: Path) -> int:
    """How many images and captions were encoded at once for a cache."""
    (number,) = {facts["encoded at once"] for facts in made_from(cache)}
    return number


def encoded_by(settings: Config) -> tuple[int, int]:
    """How many images and captions are encoded when a run with these settings begins."""
    cache = Path(str(settings.model.cache_dir))
    before = rows(cache)
    built(settings)
    return tuple(now - then for now, then in zip(rows(cache), before, strict=True))  # type: ignore[return-value]


FLIPS, WORKERS, LONGER = {"random_flip": True}, {"dataloader_num_workers": 2}, {"num_train_epochs": 3}
CAPTIONS = {"caption_dropout": 0.3, "data": "mixed"}


@pytest.mark.parametrize(
    ("base", "flags"),
    [
        ("sd", {**FLIPS, **CAPTIONS, "train_batch_size": 3, "gradient_accumulation_steps": 2, **LONGER}),
        ("sd", {**CAPTIONS, "train_batch_size": 10, "num_shards": 1, "center_crop": True, **WORKERS}),
        ("sd", {**FLIPS, **CAPTIONS, "use_lora": True, "lora_export": "fuse", "mixed_precision": "bf16"}),
        ("sdxl", {**FLIPS, **CAPTIONS, **WORKERS}),
        ("sd3", {**FLIPS, "data": "mixed", "noise_offset": 0.1, "train_batch_size": 2}),
        ("flux dev", {**CAPTIONS, "train_batch_size": 9}),
        ("pixart alpha", {**FLIPS, **CAPTIONS, "train_batch_size": 3}),
        ("pixels", {**FLIPS, "data": "mixed", "train_batch_size": 9, "num_shards": 1, "holdout_fraction": 0.1}),
    ],
)
def test_the_cache_changes_no_bit_of_the_weights(world, tmp_path, base, flags):
    uncached = train(config(world, tmp_path / "uncached", base, cache_latents=False, **flags))
    assert not (tmp_path / "cache" / "iet_finetune" / "encoded").exists()
    images, _ = encoded_by(config(world, tmp_path / "cached", base, **flags))
    assert images >= SQUARES
    assert_equal(train(config(world, tmp_path / "cached", base, **flags)), uncached)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_be_resumed_with_the_cache_or_without_it(world, tmp_path, first, capsys):
    flags = {**FLIPS, **CAPTIONS, "num_train_epochs": 3, "checkpointing_steps": 1}
    whole = train(config(world, tmp_path / "whole", cache_latents=first, **flags))
    run_until(config(world, tmp_path / "out", cache_latents=first, **flags), 5)
    capsys.readouterr()
    assert_equal(train(config(world, tmp_path / "out", cache_latents=not first, **flags, **LATEST)), whole)
    assert "resuming, but" not in capsys.readouterr().err


def test_training_with_the_cache_reads_and_encodes_nothing(world, tmp_path):
    shutil.copytree(world / "mixed", tmp_path / "mixed")
    settings = config(world, tmp_path / "out", train_data_dir=str(tmp_path / "mixed"), caption_dropout=0.2, **FLIPS)
    trainer = Trainer(settings, callbacks=[killed_after(4)])
    shutil.rmtree(tmp_path / "mixed")
    del trainer.model.family.pipeline.vae.encoder
    trainer.model.family.encode_captions = None
    with pytest.raises(Killed):
        trainer.train()


@pytest.mark.parametrize("base", ["sd", "sdxl", "sd3", "flux dev", "pixart alpha", "pixels"])
def test_the_cache_gives_at_every_visit_what_encoding_gives(world, tmp_path, base):
    text = {} if base == "pixels" else {"caption_dropout": 0.2}
    flags = {**FLIPS, **text, "data": "mixed", "train_batch_size": 3, "noise_offset": 0.1}
    cached, *_ = built(config(world, tmp_path / "out", base, **flags))
    plain, model, _ = built(config(world, tmp_path / "out", base, cache_latents=False, **flags))
    family, chunk = model.family, at_once(tmp_path / "cache")
    for ours, theirs in zip(cached.shards, plain.shards, strict=True):
        visits = [Visit(pass_, position) for pass_ in range(4) for position in range(len(theirs))]
        expected, given = [theirs[visit] for visit in visits], [ours[visit] for visit in visits]
        for one, other in zip(given, expected, strict=True):
            assert one.pixel_values is None
            assert one.captions == other.captions
            for name in ("noise", "posterior_noise", "uniform", "members", "sizes", "labels"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
        means, stds = in_chunks(chunk, family.encode_images, torch.stack([visit.pixel_values for visit in expected]))
        assert torch.equal(torch.stack([visit.encoded.mean for visit in given]), means)
        if family.has_posterior:
            assert torch.equal(torch.stack([visit.encoded.std for visit in given]), stds)
        else:
            assert not stds.any()
            assert all(visit.encoded.std is None for visit in given)
        if family.needs_captions:
            texts = [visit.captions[0] for visit in expected]
            conditions = {
                name: in_chunks(chunk, lambda part, name=name: (family.encode_captions(part)[name],), texts)[0]
                for name in family.encode_captions(texts[:1])
            }
            assert given[0].encoded.conditions.keys() == conditions.keys()
            for name, tensor in conditions.items():
                assert torch.equal(torch.stack([visit.encoded.conditions[name] for visit in given]), tensor), name
    if base != "pixels":
        assert any("" in shard[Visit(pass_, 0)].captions for shard in cached.shards for pass_ in range(30))


def in_chunks(size: int, encode: Callable[[Any], tuple[Tensor, ...]], items: Any) -> list[Tensor]:
    """What is encoded of the items, always so many at once; where fewer are left, with some before them once more."""
    whole = len(items) // size * size
    parts = [encode(items[start : start + size]) for start in range(0, whole, size)]
    if rest := len(items) - whole:
        parts.append(tuple(tensor[-rest:] for tensor in encode(items[-size:])))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def test_a_mirrored_image_is_encoded_and_not_its_latent_mirrored(world, tmp_path):
    settings = config(world, tmp_path / "out", data="mixed", train_batch_size=1, **FLIPS)
    data, model, _ = built(settings)
    family, images = model.family, data.images
    transform = ImageTransform(RESOLUTION, center_crop=False, interpolation="lanczos", seed=settings.training.seed)
    encoded = encode_data(settings, family, images, transform, Ranks.alone(), torch.device("cpu"))
    for index in range(len(images)):
        caption = images.captions[index][0]
        (straight, place), (mirrored, other_place) = (encoded(index, flip, caption) for flip in (False, True))
        pixels, expected_place = transform.load(images, index, False)
        assert torch.equal(straight.mean[None], family.encode_images(pixels[None])[0])
        assert torch.equal(mirrored.mean[None], family.encode_images(pixels.flip(-1)[None])[0])
        assert (mirrored.mean - straight.mean.flip(-1)).abs().max() > 0.01
        assert torch.equal(place, expected_place)
        assert torch.equal(other_place, transform.load(images, index, True)[1])


def amended(world: Path, folder: Path, what: str) -> str:
    """A copy of a pipeline or of the data under the same name in another folder, to be amended."""
    shutil.copytree(world / what, folder / what)
    return str(folder / what)


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


OF_RANKS = {**FLIPS, **CAPTIONS, "train_batch_size": 2}
# A run that fails, and then one that does not; what tests read goes to stdout.
ON_RANKS = """
    from pathlib import Path
    from iet_finetune import Config, Trainer
    from iet_finetune.data import dataset
    from iet_finetune.data.images import Looked
    # Or the image would be found before anything is encoded.
    dataset.look_at, look_at = lambda *_: Looked(32, 32, False), dataset.look_at
    stdout, sys.stdout = sys.stdout, sys.stderr
    bad, good = (Config.from_flags(**flags) for flags in json.loads(os.environ["FLAGS"]))
    try:
        Trainer(bad)
    except UserError as error:
        dist.barrier()
        kept = [str(path) for path in Path(good.model.cache_dir, "iet_finetune", "encoded").rglob("*.safetensors")]
        print(json.dumps([error.printed_here, str(error), kept]), file=stdout, flush=True)
    dataset.look_at = look_at
    dist.barrier()
    Trainer(good).train()
"""


@pytest.fixture(scope="module")
def on_ranks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """A folder where two ranks came upon an image in `mixed` that cannot be decoded, and then trained without it.

    They trained on the `mixed` of the world, where it is whole, and left `out`. And how they ended.
    """
    folder = tmp_path_factory.mktemp("ranks")
    data = Path(amended(world, folder, "mixed"))
    whole = (data / "010.png").read_bytes()
    (data / "010.png").write_bytes(whole[: whole.index(b"IDAT") + 30])
    good = config(world, folder / "out", **OF_RANKS).to_flags()
    flags = [good | {"train_data_dir": str(data)}, good]
    environment = {"ACCELERATE_USE_CPU": "true", "FLAGS": json.dumps(flags)}
    environments = {rank: {**environment, "LOCAL_RANK": str(rank)} for rank in range(2)}
    return folder, run_ranks(ON_RANKS, 2, environments=environments)


def test_an_image_that_a_rank_cannot_read_ends_all_with_its_line_and_what_was_encoded_is_kept(on_ranks):
    folder, ended = on_ranks
    (first,), (second,) = (rank.output for rank in ended)
    assert [first[0], second[0]] == [False, True], "one of them says it: that whose share the image is in"
    assert first[1] == second[1]
    assert first[1].startswith(f"`{folder / 'mixed' / '010.png'}` cannot be decoded: ")
    assert first[1].endswith("Replace or remove it.")
    assert not [line for rank in ended for line in rank.stderr.splitlines() if "Traceback" in line]
    kept = sum(rows_of(Path(path)) for path in first[2])
    assert 8 < kept <= 18, "the last of ten images is bad, and five are the share of each"
    # Nothing of it was encoded once more.
    assert rows(folder / "cache") == (2 * (MIXED - 1), 3 * MIXED + 1)


def test_ranks_share_the_work_and_end_in_the_bits_of_one_rank_without_the_cache(world, tmp_path, on_ranks):
    folder, ended = on_ranks
    assert [(rank.code, rank.said) for rank in ended] == [(0, [])] * 2, ended
    (captions,) = {path.parent for path in encoded(folder / "cache", "*.safetensors") if not has_images(path)}
    shares = sorted(rows_of(path) for path in captions.glob("*.safetensors"))
    assert shares == [(3 * MIXED + 1) // 2, (3 * MIXED + 2) // 2]
    assert_equal(weights(folder / "out"), train(config(world, tmp_path / "alone", cache_latents=False, **OF_RANKS)))


def killed_at(number: int, owner: Any, name: str, settings: Config) -> None:
    """Begins a run in a process that is killed at its so manieth call of a function, and writes a file a chunk."""
    child = os.fork()
    if not child:
        try:
            filling.FILE_BYTES = 1
            real, calls = getattr(owner, name), iter(range(1, number))

            def until_killed(*arguments: Any) -> Any:
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            setattr(owner, name, until_killed)
            built(settings)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_run_that_is_killed_while_it_encodes_resumes_with_what_is_missing(world, tmp_path):
    flags = {**FLIPS, "data": "mixed", "train_batch_size": 3}
    settings = config(world, tmp_path / "out", **flags)
    cache = tmp_path / "cache"
    killed_at(3, StableDiffusion, "encode_images", settings)
    chunk = at_once(cache)
    assert rows(cache) == (2 * chunk, 0)
    # Two more chunks are written, and of the third a half-written file stays behind.
    killed_at(3, data_rows, "to_disk", settings)
    assert rows(cache) == (4 * chunk, 0)
    (partial,) = cache.rglob(".*.partial")
    assert partial.stat().st_size > 0
    # All images that were left, and two chunks of captions.
    killed_at(3, StableDiffusion, "encode_captions", settings)
    assert rows(cache) == (2 * (MIXED - 1), 2 * chunk)
    assert encoded_by(settings) == (0, 3 * MIXED - 2 * chunk)
    cached = train(settings)
    assert_equal(cached, train(config(world, tmp_path / "plain", cache_latents=False, **flags)))
    assert partial.exists(), "it is young, and might be written by another process"


def refusal(settings: Config, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line in which the command ends, apart from what it says it is about to do."""
    capfd.readouterr()
    flags = [word for name, value in settings.to_flags().items() if value is not None for word in typed(name, value)]
    assert cli.main(["train", *flags]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith(("encoding ", "[transformers] "))]
    assert len(lines) == 1, said
    assert lines[0].startswith("iet-finetune: error: ")
    return lines[0].removeprefix("iet-finetune: error: ")


def typed(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)] if values else []


def test_a_disk_without_room_for_what_is_encoded_is_refused_with_what_to_do(world, tmp_path, small_disk, capfd):
    disk = small_disk(100_000)
    flags = {"data": "mixed", "resolution": 64, "cache_dir": str(disk)}
    line = refusal(config(world, tmp_path / "out", **flags), capfd)
    assert line.startswith(f"no space left on the device for {MIXED - 1} encoded images in {disk}/")
    assert "choose a folder on another disk with `--cache_dir`" in line
    assert line.endswith("`--no_cache_latents`.")
    assert rows(disk) == (0, 0)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


# What Hugging Face's libraries take from the environment variable of this name when they are imported.
HF_ASSETS_CACHE = "huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE"


@pytest.mark.parametrize("by_flag", [False, True])
def test_a_cache_that_cannot_be_written_is_enough_where_nothing_is_missing(
    world, tmp_path, small_disk, monkeypatch, capfd, by_flag
):
    disk = small_disk(4 * MB)
    monkeypatch.setattr(HF_ASSETS_CACHE, str(disk))
    flags = {"cache_dir": str(disk) if by_flag else None}
    before = train(config(world, tmp_path / "before", **flags))
    assert rows(disk) == (SQUARES, SQUARES)
    read_only(disk)
    assert_equal(train(config(world, tmp_path / "after", **flags)), before)
    line = refusal(config(world, tmp_path / "other", **flags, **FLIPS), capfd)
    assert line.startswith(f"encoded rows cannot be written to {disk}/")
    assert "Read-only file system" in line
    assert "`--cache_dir`" in line
    assert line.endswith("`--no_cache_latents`.")


@pytest.mark.parametrize("place", ["file", "/proc/none", "x" * 300])
def test_a_cache_folder_that_cannot_be_is_refused_with_what_to_do(world, tmp_path, capfd, place):
    (tmp_path / "file").touch()
    cache = str(tmp_path / place) if not place.startswith("/") else place
    line = refusal(config(world, tmp_path / "out", cache_dir=cache), capfd)
    assert "`--cache_dir`" in line
    assert line.endswith("`--no_cache_latents`.")


def test_encoders_of_captions_are_lent_after_those_of_images_and_none_where_nothing_is_missing(world, tmp_path):
    settings = config(world, tmp_path / "out", "sdxl")
    transform = ImageTransform(RESOLUTION, center_crop=False, interpolation="lanczos", seed=0)
    captions = ["text_encoder", "text_encoder_2"]
    for expected in (["vae", "vae", *captions, *reversed(captions)], []):
        data, model, _ = built(config(world, tmp_path / "out", "sdxl", cache_latents=False))
        journeys = travelling(model.family, ("vae", "text_encoder", "text_encoder_2"))
        encode_data(settings, model.family, data.images, transform, Ranks.alone(), torch.device("cpu"))
        assert [name for name, _ in journeys] == expected

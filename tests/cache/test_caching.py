"""Images and captions that are encoded once give the same weights as encoding in every step, wherever a run fails."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import (
    CAPTIONS,
    FLIPS,
    LATEST,
    LONGER,
    MB,
    MIXED,
    SQUARES,
    WORKERS,
    amended,
    at_once,
    built,
    config,
    encoded,
    encoded_by,
    has_images,
    rows,
    rows_of,
    train,
    weights,
)
from families.lending import travelling
from ranks import Ended, run_ranks
from runs import Killed, assert_equal, killed_after, run_until
from tiny import RESOLUTION
from torch import Tensor

from iet_finetune import Config, Trainer, cli
from iet_finetune.cache import filling
from iet_finetune.cache.caching import encode_data
from iet_finetune.data import rows as data_rows
from iet_finetune.data.loader import Visit
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.distributed.groups import Ranks
from iet_finetune.families.stable_diffusion import StableDiffusion


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

"""Images of several shapes: alike on any number of ranks, cached or not and after a stop; models are told sizes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from runs import assert_close, assert_equal, run_until, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_tiny_sd, tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune import Config, Trainer, UserError
from iet_finetune.audit.inputs.context import AuditContext
from iet_finetune.audit.inputs.dataset import prepare
from iet_finetune.audit.inputs.subject import Subject
from iet_finetune.audit.inputs.work import Work
from iet_finetune.audit.measures.losses import Chosen, losses
from iet_finetune.audit.measures.membership import fixed_draws, image_losses
from iet_finetune.data.buckets import Buckets
from iet_finetune.data.dataset import load_images
from iet_finetune.data.loader import Visit
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.families import PipelineSource, family_class
from iet_finetune.families.stable_diffusion import StableDiffusion
from iet_finetune.families.tiny import TINY

SHAPES = [(48, 32), (32, 48), (40, 40), (64, 36), (36, 64), (18, 14), (90, 20)]
CPU = torch.device("cpu")


def save_shapes(folder: Path, count: int, shapes=SHAPES, noise: bool = False) -> Path:
    """Pictures of these shapes in turn; a pixel names its column in red, its row in green, and its image in blue.

    With `noise` they are coloured tiles instead, no two of which look the same.
    """
    folder.mkdir(parents=True)
    rows, rng = [], np.random.default_rng(0)
    for number in range(count):
        width, height = shapes[number % len(shapes)]
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = np.arange(width), np.arange(height)[:, None], 9 * number
        if noise:
            tiles = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            pixels = np.asarray(tiles.resize((width, height), Image.Resampling.NEAREST))
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"thing {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the pipeline `base`, and `data`: 26 images of seven shapes."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=100)
    save_shapes(folder / "data", 26, noise=True)
    return folder


def config(world: Path, output: Path, **flags) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "output_dir": str(output), "cache_dir": str(world / "cache"), "resolution": RESOLUTION,
        "aspect_ratio_buckets": "auto", "train_batch_size": 2, "gradient_accumulation_steps": 2, "num_shards": 2,
        "num_train_epochs": 3, "merge_every_epochs": 1, "lr_warmup_steps": 0, "learning_rate": 3e-3,
        "adam_epsilon": 1e-2, "report_to": "none", "random_flip": True, "checkpointing_steps": 3,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_bits_are_the_same_on_two_ranks_without_the_cache_and_after_a_stop_in_a_pass(world, tmp_path):
    # The guard asks for losses of training and held-out images of all sizes.
    flags = {"skip_rule": "guard", "holdout_fraction": 0.35, "use_ema": True, "guard_reference": 0}
    whole = Trainer(config(world, tmp_path / "one", **flags))
    passes = [whole.data.schedule.steps_per_pass(shard) for shard in (0, 1)]
    whole.train()
    assert sum(passes) > sum(-(-size // 4) for size in whole.data.schedule.shard_sizes), "as many steps as sizes need"
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **flags)):
        assert ended.code == 0, ended.stderr
    uncached = {"cache_latents": False, "dataloader_num_workers": 2}
    Trainer(config(world, tmp_path / "uncached", **flags, **uncached)).train()
    run_until(config(world, tmp_path / "stopped", **flags), sum(passes) + passes[0] // 2 + 1)
    with pytest.raises(UserError, match=r"`--aspect_ratio_buckets` has changed \(auto then, 16x16 now\)"):
        Trainer(config(world, tmp_path / "stopped", **flags | {"aspect_ratio_buckets": "16x16"},
                       resume_from_checkpoint="latest"))  # fmt: skip
    Trainer(config(world, tmp_path / "stopped", **flags, resume_from_checkpoint="latest")).train()
    ledgers = [pq.read_table(tmp_path / name / "ledger.parquet") for name in ("one", "two", "uncached", "stopped")]
    for name, ledger in zip(("two", "uncached", "stopped"), ledgers[1:], strict=True):
        assert_equal(weights(tmp_path / "one"), weights(tmp_path / name))
        assert ledger.equals(ledgers[0]), name
    # Every image was visited once a pass.
    assert set(ledgers[0].to_pydict()["seen"]) == {0, 3}


def test_ranks_that_train_one_clone_together_agree_with_one(world, tmp_path):
    flags = {"num_shards": 1, "train_batch_size": 3, "num_train_epochs": 2}
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **flags)):
        assert ended.code == 0, ended.stderr
    Trainer(config(world, tmp_path / "one", **flags)).train()
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=5e-6)


def test_losses_of_many_images_are_those_of_each_alone_in_the_order_of_the_images(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "out", holdout_fraction=0.35, stop_when="auto"))
    lender, count = trainer.run.lender, len(trainer.data.others)
    assert trainer.data.others.encoded is not None, "held-out images would be encoded at each look"
    together = lender.heldout_losses(range(count), (10, 60), 0)
    alone = torch.cat([lender.heldout_losses((number,), (10, 60), 0) for number in range(count)])
    assert len({trainer.data.others.size(number) for number in range(count)}) > 2
    assert torch.allclose(together, alone, atol=1e-5)


def test_sdxl_is_told_the_size_the_crop_and_the_bucket_of_each_image(tmp_path):
    tiny_pipeline("sdxl").save_pretrained(tmp_path / "base")
    # Each covers its size as it is, so that a pixel still names the place it comes from.
    shapes = [(16, 16), (24, 16), (20, 12), (13, 20), (12, 20), (25, 16)]
    save_shapes(tmp_path / "data", len(shapes), shapes)
    flags = {"num_shards": 1, "cache_latents": False, "image_interpolation_mode": "nearest", "train_batch_size": 1}
    sizes = {"aspect_ratio_buckets": "16x16,20x12,24x16,12x20"}
    trainer = Trainer(config(tmp_path, tmp_path / "out", **flags, **sizes))
    (shard,), seen = trainer.data.shards, set()
    for position in range(len(shapes)):
        sample = shard[Visit(0, position)]
        pixels = ((sample.pixel_values + 1) * 127.5).round().long()
        (column, row, number), next_column = pixels[:, 0, 0].tolist(), int(pixels[0, 0, 1])
        width, height = shapes[number // 9]
        rows, columns = pixels.shape[1:]
        left = width - 1 - column if next_column < column else column
        told = trainer.model.family.details(sample.sizes[None], torch.zeros(1, dtype=torch.int64))["time_ids"]
        assert told.tolist() == [[height, width, row, left, rows, columns]]
        assert sample.noise.shape == (4, rows // 2, columns // 2)
        seen.add((columns, rows))
    assert seen == {(16, 16), (24, 16), (20, 12), (12, 20)}


@pytest.mark.parametrize("kind", TINY)
def test_a_family_encodes_and_predicts_at_every_size(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = TINY[kind]()
    flags = Config.from_flags(resolution=RESOLUTION, aspect_ratio_buckets="auto")
    family = family_class(PipelineSource(None, kind, {}, {}), flags.model)(pipeline, flags)
    family.place(CPU)
    sizes = family.buckets(flags.data).sizes
    assert len(sizes) >= 3
    for width, height in sizes:
        shape = family.latent_shape_of((width, height))
        mean, std = family.encode_images(torch.zeros(1, 3, height, width))
        assert mean.shape == std.shape == (1, *shape)
        told = torch.tensor([[40, 50, 0, 0, height, width]])
        conditions = family.encode_captions(["a thing"]) if family.needs_captions else {}
        with torch.no_grad():
            labels, timesteps = torch.zeros(1, dtype=torch.int64), torch.tensor([5])
            predicted = family.predict(mean, timesteps, conditions | family.details(told, labels))
        assert predicted.shape == (1, *shape)
    details = family.details(told, labels)
    if kind == "PixArtAlphaPipeline":
        assert details["resolution"].tolist() == [[height, width]]
        assert details["aspect_ratio"].item() == pytest.approx(height / width)


class Squares(StableDiffusion):
    """As a family from outside the package that says nothing of other sizes."""

    side_multiple = None  # type: ignore[assignment]


def test_a_family_of_squares_alone_refuses_buckets_by_name():
    flags = Config.from_flags(aspect_ratio_buckets="auto")
    with pytest.raises(UserError, match="auto`: a StableDiffusionPipeline is trained on squares"):
        Squares(tiny_sd(), flags).buckets(flags.data)


def test_small_images_have_a_smaller_size_are_counted_or_are_named(world, tmp_path, capfd):
    flags = {"upscale": False, "aspect_ratio_buckets": "20x16,20x12,12x20,16x16,12x12", "num_shards": 1}
    trainer = Trainer(config(world, tmp_path / "out", **flags))
    sizes = [trainer.data.shards[0].size(number) for number in range(len(trainer.data.images))]
    small = [size for size, name in zip(sizes, trainer.data.images.names, strict=True)
             if Image.open(name).size == (18, 14)]  # fmt: skip
    assert set(small) == {(12, 12)}
    assert f"; {len(small)} are smaller than the size of their shape, and keep a smaller one" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"005.png` \(18 x 14 pixels, and 2 others\) is smaller than every size of"):
        Trainer(config(world, tmp_path / "none", **flags | {"aspect_ratio_buckets": "20x12,12x20,16x16"}))


def test_an_audit_measures_losses_at_the_sizes_of_training(world, tmp_path):
    flags = config(world, tmp_path / "out", eval_batch_size=4)
    images, heldout = load_images(flags.data, cache_dir=None, seed=0)
    family = StableDiffusion(tiny_sd(timesteps=100), flags)
    family.place(CPU)
    subject = Subject("tiny", "StableDiffusionPipeline", family, family.pipeline, CPU, "none")
    work = Work(tmp_path / "work", silent=True)
    data = prepare(flags, work, images, heldout, grey=False)
    chosen = Chosen("training images", data.training, data.references, np.arange(len(images)))

    def draws(shape):
        return fixed_draws(family.objective, shape)

    found = losses(subject, AuditContext(flags, data, work, CPU), chosen, draws)
    buckets = family.buckets(flags.data)
    for number in (0, 1, 2, 5, 25):
        image, content = images.load(number), images.content_hashes[number]
        size = buckets.of(image.size)
        one = ImageTransform(Buckets((size,)), center_crop=False, interpolation="lanczos", seed=0)
        told = torch.tensor([[*one.place(image.size, content, False), size[1], size[0]]])
        rows = image_losses(
            family, one(image, content, False)[None], images.captions[number], told,
            torch.zeros(1, dtype=torch.int64), draws((4, size[1] // 2, size[0] // 2)), CPU,
        )  # fmt: skip
        assert found[number] == pytest.approx(rows[0].numpy(), rel=1e-4)


def test_class_images_are_squares_beside_images_of_other_shapes(world, tmp_path):
    save_shapes(tmp_path / "class", 3)
    (tmp_path / "class" / "metadata.jsonl").unlink()
    flags = {"class_prompt": "a thing", "class_data_dir": str(tmp_path / "class"), "num_class_images": 3}
    for name, cached in (("cached", True), ("plain", False)):
        Trainer(config(world, tmp_path / name, num_train_epochs=1, cache_latents=cached, **flags)).train()
    assert_equal(weights(tmp_path / "cached"), weights(tmp_path / "plain"))
    Trainer(config(world, tmp_path / "without", num_train_epochs=1)).train()
    with pytest.raises(AssertionError):
        assert_equal(weights(tmp_path / "cached"), weights(tmp_path / "without"))

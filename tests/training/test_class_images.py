"""Prior preservation: class images are trained beside the samples, and are no part of anything else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from reference import WithClassImages
from runs import assert_close, assert_equal, files, run_until, samples, train_on_ranks
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer, UserError
from iet_finetune.audit.inputs.dataset import load_real_images
from iet_finetune.planning.trial import shortened

CLASS = "a thing"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline of 10 timesteps, 8 images in `data`, and 5 class images in `class`, of which one has a caption."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 8)
    save_images(folder / "class" / "data", 5, seed=1)
    (folder / "class" / "data" / "metadata.jsonl").unlink()
    (folder / "class" / "data" / "001.txt").write_text("another thing")
    return folder


def config(world: Path, output: Path, **flags: Any) -> Config:
    defaults = {
        "pretrained_model_name_or_path": str(world / "base"), "train_data_dir": str(world / "data"),
        "output_dir": str(output), "class_prompt": CLASS, "class_data_dir": str(world / "class"),
        "num_class_images": 5, "resolution": RESOLUTION, "train_batch_size": 2, "num_shards": 2,
        "num_train_epochs": 3, "merge_every_epochs": 1, "lr_warmup_steps": 0, "learning_rate": 3e-3,
        # So that a rounding of a gradient near zero is not made a step of the learning rate.
        "adam_epsilon": 1e-2, "report_to": "none", "checkpointing_steps": 4,
    }  # fmt: skip
    return Config.from_flags(**{**defaults, **flags})


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def class_samples(world: Path) -> list:
    folder = world / "class" / "data"
    rows = [{"file_name": f"{i:03d}.png", "text": "another thing" if i == 1 else CLASS} for i in range(5)]
    other = world / "rows" / "data"
    if not other.exists():
        shutil.copytree(folder, other)
        (other / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return samples(world / "rows")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_learns_the_mean_of_the_kept_samples_and_the_weighted_mean_of_class_images(world, tmp_path, accumulate):
    agc = {"agc_threshold": 0.99, "agc_decay": 0.1}
    flags = {**agc, "snr_gamma": 2.0, "prior_loss_weight": 0.7, "gradient_accumulation_steps": accumulate}
    flags |= {"train_batch_size": 2 // accumulate, "use_ema": True}
    Trainer(config(world, tmp_path / "out", **flags)).train()
    reference = WithClassImages(
        tiny_sd(timesteps=10), samples(world), class_samples=class_samples(world), weight=0.7, gamma=2.0, shards=2,
        batch=2, lr=3e-3, eps=1e-2, threshold=0.99, decay=0.1, ema_decay=0.9999,
    )  # fmt: skip
    expected = reference.train(passes=3, passes_per_round=1)
    assert reference.steps_without > 0, "no step kept nothing"
    assert_close(weights(tmp_path / "out"), expected)


def test_bits_depend_on_neither_ranks_nor_stops_nor_cache_nor_workers(world, tmp_path):
    # Some of the class images are given, and the others drawn.
    for name in ("one", "two", "stopped", "plain"):
        shutil.copytree(world / "class", tmp_path / f"class {name}")

    def flags(name: str) -> dict[str, Any]:
        return {"class_data_dir": str(tmp_path / f"class {name}"), "num_class_images": 16, "random_flip": True}

    Trainer(config(world, tmp_path / "one", **flags("one"))).train()
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **flags("two"))):
        assert ended.code == 0, ended.stderr
    run_until(config(world, tmp_path / "stopped", **flags("stopped")), 6)
    again = {**flags("stopped"), "resume_from_checkpoint": "latest"}
    Trainer(config(world, tmp_path / "stopped", **again)).train()
    plainly = {"cache_latents": False, "dataloader_num_workers": 1}
    Trainer(config(world, tmp_path / "plain", **flags("plain"), **plainly)).train()
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class one").glob("drawn-*.png")}
    assert len(set(drawn.values())) == len(drawn) == 11
    for name in ("two", "stopped", "plain"):
        assert {path.name: path.read_bytes() for path in (tmp_path / f"class {name}").glob("drawn-*.png")} == drawn
        assert_equal(weights(tmp_path / "one"), weights(tmp_path / name))


def test_a_group_of_ranks_learns_what_one_rank_does(world, tmp_path):
    # Micro-batches of 3, 3 and 2 images, of which the second rank has 1; a last one of 1 leaves it none.
    flags = {"num_shards": 1, "train_batch_size": 3, "max_train_samples": 7, "gradient_accumulation_steps": 2}
    Trainer(config(world, tmp_path / "one", **flags)).train()
    for ended in train_on_ranks(2, config(world, tmp_path / "two", **flags)):
        assert ended.code == 0, ended.stderr
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_class_images_are_in_no_ledger_weight_or_audit_and_the_card_says_what_they_are(world, tmp_path):
    settings = config(world, tmp_path / "out", num_train_epochs=1)
    trainer = Trainer(settings)
    assert [clone.weight for clone in trainer.ensemble.clones] == [4, 4]
    assert trainer.data.schedule.shard_sizes == (4, 4)
    trainer.train()
    trained = {image.content_hashes[0] for image in (trainer.data.images.subset([i]) for i in range(8))}
    ledger = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pydict()
    assert set(ledger["content_hash"]) == trained
    assert ledger["seen"] == [1] * 8
    real, heldout = load_real_images(settings, needs_captions=True)
    assert (set(real.content_hashes), len(heldout)) == (trained, 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on 8 images (8 distinct)" in card
    assert "(`` a thing ``, weight 1), one of 5, of which the base model drew 0." in card


def test_a_folder_that_cannot_be_made_is_told_as_that(world, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "class"
    said = r"^the folder of class images `.*class` cannot be made: Not a directory\. Choose another"
    with pytest.raises(UserError, match=said):
        Trainer(config(world, tmp_path / "out", class_data_dir=str(place)))


def test_drawing_goes_on_where_it_stopped_before_anything_else_is_there(world, tmp_path, monkeypatch):
    from iet_finetune.families.base import Family

    flags = {"class_data_dir": None, "num_class_images": 9}
    Trainer(config(world, tmp_path / "whole", **flags))
    draw, calls = Family.draw, []

    def killed(self, *args):
        calls.append(args)
        # After that which encodes the prompt, and that which draws the first four.
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(Family, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(world, tmp_path / "out", **flags))
    folder = tmp_path / "out" / "class_images"
    first = [f"drawn-{number:06d}.png" for number in range(4)]
    assert files(folder) == [".drawn.json", *first]
    (folder / first[2]).unlink()
    with pytest.raises(UserError, match="were drawn with another prompt: remove them, or choose another folder"):
        Trainer(config(world, tmp_path / "out", **flags, class_prompt="a cat"))
    trainer = Trainer(config(world, tmp_path / "out", **flags))
    assert len(calls) == 3 + 4
    assert trainer.data.beside.drawn == 9
    whole = tmp_path / "whole" / "class_images"
    assert files(folder) == files(whole)
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files(folder))


def test_a_run_that_goes_on_must_have_the_same_class_images(world, tmp_path):
    shutil.copytree(world / "class", tmp_path / "class")
    flags = {"class_data_dir": str(tmp_path / "class")}
    run_until(config(world, tmp_path / "out", **flags), 5)
    again = {**flags, "resume_from_checkpoint": "latest"}
    others = {"class_prompt": "a cat", "prior_loss_weight": 0.5, "num_class_images": 30}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"`--{name}` has changed"):
            Trainer(config(world, tmp_path / "out", **{**again, name: value}))
    without = {"class_prompt": None, "class_data_dir": None, "num_class_images": 100}
    with pytest.raises(UserError, match="`--class_prompt` has changed"):
        Trainer(config(world, tmp_path / "out", **{**again, **without}))
    # Refused before more of them were drawn.
    assert not list((tmp_path / "class").glob("drawn-*"))
    (tmp_path / "class" / "data" / "000.png").unlink()
    shutil.copy(world / "data" / "007.png", tmp_path / "class" / "data" / "000.png")
    with pytest.raises(UserError, match="the class data has changed"):
        Trainer(config(world, tmp_path / "out", **again))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"class_prompt": None}, "` does nothing without `--class_prompt`: give both."),
        ({"class_prompt": " "}, "`--class_prompt` is empty"),
        ({"prior_loss_weight": 0.0}, "`--prior_loss_weight` must be above 0, not 0.0."),
        ({"num_class_images": -1}, "`--num_class_images` must be 0 or more, not -1."),
        ({"num_class_images": 0, "class_data_dir": "{empty}"}, "holds no images, and `--num_class_images 0` draws"),
        ({"class_data_dir": "{world}/data/class"}, "class` and `--train_data_dir "),
        ({"class_data_dir": "{world}"}, "lie in each other, so that the same images would be in both: give another"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(world, tmp_path, flags, words):
    places = {"empty": tmp_path / "empty", "world": world}
    flags = {name: value.format(**places) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(UserError) as caught:
        Trainer(config(world, tmp_path / "out", **flags))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trial_draws_no_class_images_into_folders_of_the_run(world, tmp_path):
    found = Trainer(config(world, tmp_path / "found")).data
    there = shortened(config(world, tmp_path / "out"), found, tmp_path / "trial")
    assert there.class_path == world / "class"
    lacking = shortened(config(world, tmp_path / "out", num_class_images=50), found, tmp_path / "trial")
    assert lacking.class_path == tmp_path / "trial" / "class_images"
    assert lacking.prior.num_class_images == 4


def test_the_instance_prompt_is_the_caption_of_images_without_one(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "metadata.jsonl").unlink()
    (tmp_path / "data" / "003.txt").write_text("asleep")
    settings = config(world, tmp_path / "out", train_data_dir=str(tmp_path / "data"), instance_prompt="a sks thing")
    captions = [texts[0] for texts in Trainer(settings).data.images.captions]
    assert captions == ["a sks thing"] * 3 + ["asleep"] + ["a sks thing"] * 4

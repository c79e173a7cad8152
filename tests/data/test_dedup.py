"""`--dedup`: copies are left out and named, each group weighs as one image, and the search is done once."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data.made import load_all
from PIL import Image
from tiny import save_tiny_sd

from iet_finetune import Config, Trainer
from iet_finetune.audit.inputs.ledger import check_split, read_ledger
from iet_finetune.data import dedup
from iet_finetune.data.dedup import nothing_left_out, without_copies

# Original, or (original, what was done to it).
FILES = {
    "a": 0, "b": 1, "b again": (1, "saved again"), "c": 2, "a mirrored": (0, "mirrored"), "c moved": (2, "moved"),
    "b darker": (1, "darker"), "d": 3, "c moved and saved again": (2, "moved and saved again"),
}  # fmt: skip
CLASSES = {"a mirrored": "other"}


def picture(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(40, 200, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)


def changed(image: Image.Image, how: str) -> Image.Image:
    if how.startswith("moved"):
        return image.crop((5, 3, 96, 80))
    changes = {"mirrored": lambda: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "saved again": lambda: image}
    return changes.get(how, lambda: image.point(lambda value: value * 0.85))()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine images that show four things; file names sort as they are written here."""
    home = tmp_path / "data"
    home.mkdir()
    rows = []
    for number, (name, made) in enumerate(FILES.items()):
        image = picture(made) if isinstance(made, int) else changed(picture(made[0]), made[1])
        file = f"{number}.jpg" if "saved again" in name and "moved" in name else f"{number}.png"
        # Level 0 gives other bytes and the same pixels.
        image.save(home / file, **({"compress_level": 0} if name == "b again" else {}))
        rows.append({"file_name": file, "text": name, "class": CLASSES.get(name, "thing")})
    (home / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def captions(images):
    return [list(each) for each in images.captions]


def test_exact_copies_are_those_with_the_same_pixels_mirrored_or_not(folder, tmp_path):
    images = load_all(folder)
    kept, left_out = without_copies(images, "exact", 64, str(tmp_path / "cache"))
    assert captions(left_out.images) == [["b again"], ["a mirrored"]]
    assert captions(kept)[:3] == [["a", "a mirrored"], ["b", "b again"], ["c"]]
    assert left_out.stand_in.tolist() == [1, 0]
    assert left_out.copies.tolist() == [2, 2, 1, 1, 1, 1, 1]
    assert left_out.words == "left out 2 of 9 training images, which are copies (2 exact)"


def test_near_copies_are_left_out_too_and_their_captions_are_kept(folder, tmp_path):
    kept, left_out = without_copies(load_all(folder), "near", 64, str(tmp_path / "cache"))
    assert captions(kept) == [
        ["a", "a mirrored"], ["b", "b again", "b darker"], ["c", "c moved", "c moved and saved again"], ["d"],
    ]  # fmt: skip
    assert left_out.copies.tolist() == [2, 3, 3, 1]
    assert left_out.words == "left out 5 of 9 training images, which are copies (2 exact, 3 near)"
    assert [kept.captions[place][0] for place in left_out.stand_in] == ["b", "a", "c", "b", "c"]


def test_images_of_different_classes_are_no_copies_of_each_other(folder, tmp_path):
    images = load_all(folder, class_column="class")
    kept, _ = without_copies(images, "near", 64, str(tmp_path / "cache"))
    assert [each[0] for each in kept.captions] == ["a", "b", "c", "a mirrored", "d"]
    assert kept.classes == (1, 1, 1, 0, 1)


def test_the_search_is_done_once_for_the_same_images(folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    before = without_copies(load_all(folder), "near", 64, cache)
    monkeypatch.setattr(dedup, "_read", lambda *args: pytest.fail("searched again"))
    after = without_copies(load_all(folder), "near", 64, cache)
    assert before[0].fingerprint == after[0].fingerprint
    assert before[1].copies.tolist() == after[1].copies.tolist()
    assert before[1].exact == after[1].exact
    for which, size in (("exact", 64), ("near", 32)):
        with pytest.raises(pytest.fail.Exception, match="searched again"):
            without_copies(load_all(folder), which, size, cache)


def test_without_a_cache_that_can_be_written_it_is_done_nevertheless(folder, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert len(without_copies(load_all(folder), "near", 64, str(tmp_path / "cache"))[0]) == 4


def test_nothing_is_left_out_where_there_are_no_copies(folder, tmp_path):
    images = load_all(folder).subset([0, 1, 3, 7])
    kept, left_out = without_copies(images, "near", 64, str(tmp_path / "cache"))
    assert kept == images
    assert len(left_out.images) == 0
    none = nothing_left_out(images)
    assert (none.copies.tolist(), none.exact) == (left_out.copies.tolist(), left_out.exact)


def test_a_run_trains_on_what_is_left_says_so_and_names_the_rest(folder, tmp_path, capsys):
    save_tiny_sd(tmp_path / "base", timesteps=10)
    config = Config.from_flags(
        pretrained_model_name_or_path=str(tmp_path / "base"), train_data_dir=str(folder), resolution=32,
        output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), num_shards=2, train_batch_size=2,
        max_train_steps=2, merge_every_steps=1, dedup="near", num_validation_images=1, report_to="none",
    )  # fmt: skip
    Trainer(config).train()
    assert "left out 5 of 9 training images, which are copies (2 exact, 3 near)" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "ledger.parquet").to_pylist()
    training = load_all(folder)
    hashes = dict(zip(("".join(each) for each in training.captions), training.content_hashes, strict=True))
    assert [(row["split"], row["copies"]) for row in rows] == [
        ("train", 2), ("train", 3), ("train", 3), ("train", 1), *[("copy", None)] * 5,
    ]  # fmt: skip
    assert [row["content_hash"] for row in rows[:4]] == [hashes[name] for name in "abcd"]
    assert [row["copy_of"] for row in rows] == [None] * 4 + [hashes[name] for name in "bacbc"]
    assert all(row["seen"] == (2 if row["split"] == "train" else 0) for row in rows)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on 4 images (4 distinct) from a local data set." in card
    assert "5 copies of others were left out." in card
    # The audit looks at all the data, and knows that the copies were not forgotten.
    seen = read_ledger(tmp_path / "out" / "ledger.parquet")
    assert check_split(training, training.subset([]), seen) == (training.subset([]), ())
    # A held-out image that looks like a training image proves nothing.
    assert check_split(training, training.subset([5]), seen)[1][0].startswith("1 of 1 held-out images")

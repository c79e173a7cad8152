"""The real images of an audit: the classes of held-out ones, what was trained on, how often images are there."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import save_images

from iet_finetune import Config, UserError
from iet_finetune.audit.inputs.dataset import AuditData, load_real_images, prepare
from iet_finetune.audit.inputs.ledger import check_split, of_group, read_ledger
from iet_finetune.audit.inputs.work import Work
from iet_finetune.audit.measures.guidance import _repeats
from iet_finetune.data.dataset import TrainingImages
from iet_finetune.data.dedup import nothing_left_out
from iet_finetune.ensemble.ledger import ShardLedger, write_ledger


def told(folder: Path, column: str, values: list) -> Path:
    """The folder, with a value for each image in a column of its metadata."""
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) | {column: value} for line, value in zip(file.open(), values, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def load(tmp_path: Path, **flags) -> tuple[TrainingImages, TrainingImages]:
    config = Config.from_flags(
        train_data_dir=str(tmp_path / "train"), holdout_data_dir=str(tmp_path / "held"), resolution=16, **flags
    )
    return load_real_images(config, needs_captions=True)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    save_images(tmp_path / "train", 6)
    save_images(tmp_path / "held", 4, seed=1)
    return tmp_path


def test_held_out_images_have_the_numbers_that_the_classes_have_in_training(folders):
    told(folders / "train", "kind", ["ant", "bee", "cat"] * 2)
    told(folders / "held", "kind", ["cat", "bee", "cat", "cat"])
    training, heldout = load(folders, class_column="kind")
    assert training.classes == (0, 1, 2, 0, 1, 2)
    assert heldout.classes == (2, 1, 2, 2)


def test_they_have_classes_also_where_no_captions_are_wanted(folders):
    for name, count in (("train", 6), ("held", 4)):
        told(folders / name, "kind", list(range(count)))
    config = Config.from_flags(
        train_data_dir=str(folders / "train"), holdout_data_dir=str(folders / "held"), class_column="kind"
    )
    assert load_real_images(config, needs_captions=False)[1].classes == (0, 1, 2, 3)


def test_a_number_stays_that_class_also_where_no_training_image_has_it(folders):
    told(folders / "train", "kind", [0, 1, 2, 0, 1, 2])
    told(folders / "held", "kind", [7, 2, 0, 1])
    assert load(folders, class_column="kind")[1].classes == (7, 2, 0, 1)


def test_a_class_that_no_training_image_has_is_named(folders):
    told(folders / "train", "kind", ["ant", "bee", "cat"] * 2)
    told(folders / "held", "kind", ["cat", "dog", "cat", "cat"])
    with pytest.raises(UserError, match="no training image has the class 'dog' of `--class_column kind`"):
        load(folders, class_column="kind")


def ledger_of(file: Path, training: TrainingImages, seen: list[int]) -> Path:
    """A ledger of these images, seen so many times."""
    shard = ShardLedger(len(training))
    shard.seen.copy_(shard.seen.new_tensor(seen))
    write_ledger(file, training, training.subset([]), nothing_left_out(training), [np.arange(len(training))], [shard])
    return file


def test_images_that_the_ledger_says_were_trained_on_are_not_held_out(folders):
    training, heldout = load(folders)
    both = ledger_of(folders / "ledger.parquet", training, [2, 2, 2, 2, 2, 0])
    claimed = training.subset([0, 1, 5])
    left, warnings = check_split(heldout, claimed, read_ledger(both))
    assert left.content_hashes == training.subset([5]).content_hashes
    assert warnings[0].startswith("2 of 3 held-out images were trained on")
    assert warnings[1].startswith("4 of 4 training images were not trained on")


def test_with_the_data_of_the_run_or_without_a_ledger_nothing_is_said(folders):
    training, heldout = load(folders)
    for file in (ledger_of(folders / "ledger.parquet", training, [1] * 6), folders / "none.parquet", None):
        assert check_split(training, heldout, read_ledger(file)) == (heldout, ())


def test_a_group_was_seen_as_often_as_its_images_together(folders):
    training, _ = load(folders)
    seen = read_ledger(ledger_of(folders / "ledger.parquet", training, [3, 4, 0, 0, 0, 0]))
    assert of_group(training, np.array([0, 1]), seen) == (7, 0)
    assert of_group(load(folders)[1], np.array([0]), seen) is None


def prepared(folders: Path) -> AuditData:
    config = Config.from_flags(resolution=16)
    return prepare(config, Work(folders / "work", silent=True), *load(folders), grey=False)


def test_a_caption_counts_as_often_as_its_image_is_there_and_not_as_other_images_share_it(folders):
    """`save_images` gives each image a caption of its own; here 0 and 1 are one image, and 2 to 4 share a text."""
    train = folders / "train"
    (train / "001.png").write_bytes((train / "000.png").read_bytes())
    told(train, "text", ["first", "second", "shared", "shared", "shared", "sixth"])
    repeats = _repeats(prepared(folders), ["first", "second", "shared", "sixth"])
    assert repeats.tolist() == [2, 2, 1, 1]

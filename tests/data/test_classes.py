"""Classes: numbers as they stand, names of a ClassLabel, and texts numbered by sorting."""

import datasets
import pytest
from data.made import load, load_all, png, refusal, simple_folder, table, write_folder

from iet_finetune.data.samples import numbered
from iet_finetune.errors import UserError


def folder_of(tmp_path, *classes):
    files = {f"{i:03}.png": i for i in range(len(classes))}
    rows = [{"file_name": name, "kind": value} for name, value in zip(files, classes, strict=True)]
    return write_folder(tmp_path / "images", files, rows)


def classes_of(tmp_path, *classes):
    images = load_all(folder_of(tmp_path, *classes), class_column="kind", needs_captions=False)
    return images.classes, images.class_names


def refused(tmp_path, *classes):
    return refusal(folder_of(tmp_path, *classes), class_column="kind", needs_captions=False)


def test_numbers_stay_as_they_are(tmp_path):
    assert classes_of(tmp_path, 3, 0, 3) == ((3, 0, 3), ("0", "1", "2", "3"))


def test_texts_are_numbered_by_sorting(tmp_path):
    assert classes_of(tmp_path, "hat", "bag", "sock", "bag") == ((1, 0, 2, 0), ("bag", "hat", "sock"))


def test_a_class_label_keeps_its_numbers_and_names(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["zebra", "ape", "cow"]),
        }
    )
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "text": ["", "", ""], "label": [2, 0, 2]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    images = load_all(dataset_name=str(tmp_path), class_column="label")
    assert images.classes == (2, 0, 2)
    assert images.class_names == ("zebra", "ape", "cow")


def test_one_column_may_be_the_classes_and_what_the_shards_are_balanced_by(tmp_path):
    table(4, kind=["b", "a", "b", "a"]).to_parquet(tmp_path / "a.parquet")
    images = load_all(dataset_name=str(tmp_path), class_column="kind", shard_by_column="kind")
    assert images.classes == (1, 0, 1, 0)
    assert images.shard_labels == ("b", "a", "b", "a")


def test_without_metadata_the_label_is_the_name_of_the_folder(tmp_path):
    write_folder(tmp_path, {"dog/a.png": 0, "cat/b.png": 1, "dog/c.png": 2})
    images = load_all(tmp_path, class_column="label", needs_captions=False)
    assert sorted(zip(images.names, images.classes, strict=True)) == [
        (str(tmp_path / "cat/b.png"), 0),
        (str(tmp_path / "dog/a.png"), 1),
        (str(tmp_path / "dog/c.png"), 1),
    ]
    assert images.class_names == ("cat", "dog")


def test_folders_with_a_metadata_file_each_share_one_numbering(tmp_path):
    for folder, kind, number in (("one", "sock", 0), ("two", "hat", 1)):
        rows = [{"file_name": "a.png", "kind": kind}]
        write_folder(tmp_path / folder, {"a.png": number}, rows)
    images = load_all(tmp_path, class_column="kind", needs_captions=False)
    assert images.classes == (1, 0)
    assert images.class_names == ("hat", "sock")


def test_a_class_has_the_same_number_whichever_images_are_held_out(tmp_path):
    folder = folder_of(tmp_path, *"abcdefgh")
    options = {"class_column": "kind", "needs_captions": False}
    whole = load_all(folder, **options)
    number_of = dict(zip(whole.content_hashes, whole.classes, strict=True))
    training, heldout = load(folder, holdout_fraction=0.5, max_train_samples=2, **options)
    assert (len(training), len(heldout)) == (2, 4)
    for part in (training, heldout):
        assert part.classes == tuple(number_of[content] for content in part.content_hashes)
        assert part.class_names == tuple("abcdefgh")


def test_the_fingerprint_tells_classes_apart_and_without_them_is_that_of_before(tmp_path):
    folder = folder_of(tmp_path, "a", "b", "a")
    options = {"needs_captions": False}
    plain, ours = load_all(folder, **options), load_all(folder, class_column="kind", **options)
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace('"b"', '"0"'))
    other = load_all(folder, class_column="kind", **options)
    assert plain.classes is None
    assert plain.class_names is None
    assert len({images.fingerprint for images in (plain, ours, other)}) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "has None in `--class_column kind`: give a whole number or a text"),
        (True, "has True in `--class_column kind`"),
        ([1], "has [1] in `--class_column kind`"),
        (-1, "has -1 in `--class_column kind`: every image needs a class, from 0"),
    ],
)
def test_what_is_no_class_is_named_with_its_row(tmp_path, value, message):
    found = refused(tmp_path, value, value)
    assert message in found
    assert "2 rows lack a value (line 1 of `metadata.jsonl` (`000.png`) has" in found


def test_numbers_among_texts_are_refused():
    with pytest.raises(UserError, match="`--class_column kind` has numbers and texts, such as 3 and 'hat'"):
        numbered(["hat", 3], None, "kind")


def test_a_column_that_is_not_there_is_named_by_its_flag(tmp_path):
    message = refusal(simple_folder(tmp_path / "images"), class_column="kind")
    assert message.startswith("`--class_column kind` is no column of")

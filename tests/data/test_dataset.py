"""What is loaded from folders and data sets, what is refused by name, and how images are selected."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from iet_finetune.config import DataConfig
from iet_finetune.data.dataset import load_images
from iet_finetune.data.samples import Columns
from iet_finetune.data.table import table_samples
from iet_finetune.errors import UserError


def png(number):
    """A small picture that differs for every number below 2**24."""
    colour = (number & 255, number >> 8 & 255, number >> 16 & 255)
    file = io.BytesIO()
    PIL.Image.new("RGB", (10, 12), colour).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, files, rows=None, metadata="metadata.jsonl"):
    """Image files (name -> number of the picture) and, if given, metadata rows."""
    for name, number in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    if rows is not None:
        write_rows(folder / metadata, rows)
    return folder


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def simple_folder(folder, count=6, numbers=None):
    names = [f"{i:03}.png" for i in range(count)]
    rows = [{"file_name": name, "text": f"caption {i}"} for i, name in enumerate(names)]
    return write_folder(folder, dict(zip(names, numbers or range(count), strict=True)), rows)


def load(folder=None, *, seed=0, shard_by_column=None, needs_captions=True, cache_dir=None, **flags):
    data = DataConfig(**({} if folder is None else {"train_data_dir": str(folder)}), **flags)
    return load_images(
        data, cache_dir=cache_dir, seed=seed, shard_by_column=shard_by_column, needs_captions=needs_captions
    )


def load_all(*args, **options):
    training, held_out = load(*args, **options)
    assert len(held_out) == 0
    return training


def refusal(*args, **options):
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders of images


def test_a_folder_gives_captions_pixels_names_and_hashes_of_the_encoded_bytes(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/b.png", "text": "two"}]
    images = load_all(write_folder(tmp_path, {"a.png": 1, "sub/b.png": 2}, rows))
    assert images.captions == (("one",), ("two",))
    assert images.names == (f"{tmp_path}/a.png", f"{tmp_path}/sub/b.png")
    assert images.content_hashes == tuple(hashlib.blake2b(png(i), digest_size=16).hexdigest() for i in (1, 2))
    assert images.shard_labels is None
    assert [images.load(i).getpixel((0, 0)) for i in range(2)] == [(1, 0, 0), (2, 0, 0)]
    assert images.load(1).mode == "RGB"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_metadata_may_be_csv_or_parquet(tmp_path, name):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2})
    table = datasets.Dataset.from_dict({"file_name": ["b.png", "a.png"], "text": ["two, too", "one"]})
    (table.to_csv if name.endswith("csv") else table.to_parquet)(tmp_path / name)
    assert load_all(tmp_path).captions == (("two, too",), ("one",))


def test_a_caption_may_be_a_list_of_which_one_is_drawn(tmp_path):
    rows = [{"file_name": "a.png", "text": ["one", "uno"]}, {"file_name": "b.png", "text": ["two"]}]
    images = load_all(write_folder(tmp_path, {"a.png": 1, "b.png": 2}, rows))
    assert images.captions == (("one", "uno"), ("two",))


def test_rows_that_repeat_a_file_are_samples_of_their_own(tmp_path):
    rows = [{"file_name": "a.png", "text": text} for text in ("one", "one", "uno")]
    images = load_all(write_folder(tmp_path, {"a.png": 1}, rows))
    assert images.captions == (("one",), ("one",), ("uno",))
    assert images.num_duplicates == 2


def test_file_names_with_split_words_or_wildcards_change_nothing(tmp_path):
    names = ["train-station.png", "test.png", "[a]*?.png", "plain.png"]
    folder = tmp_path / "my [data] *"
    rows = [{"file_name": name, "text": name} for name in names]
    assert load_all(write_folder(folder, {n: i for i, n in enumerate(names)}, rows)).captions == tuple(
        (name,) for name in names
    )
    assert len(load_all(dataset_name=str(folder))) == 4


def test_a_folder_named_by_a_link_or_a_relative_path_is_read(tmp_path, monkeypatch):
    simple_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    images = load_all("link")
    assert images.names[0] == "link/000.png"
    monkeypatch.chdir("/")
    assert images.load(3).getpixel((0, 0)) == (3, 0, 0)


def test_several_metadata_files_are_read_in_the_order_of_their_folders_in_every_process(tmp_path):
    for name in "dbca":
        write_folder(tmp_path / name, {"x.png": ord(name)}, [{"file_name": "x.png", "text": name}])
    code = (
        "import sys; from iet_finetune.config import DataConfig; from iet_finetune.data.dataset import load_images;"
        "images, _ = load_images(DataConfig(train_data_dir=sys.argv[1], max_train_samples=3), cache_dir=None, seed=1);"
        "print(images.captions, images.fingerprint)"
    )
    here = load(tmp_path, max_train_samples=3, seed=1)[0]
    assert load_all(tmp_path).captions == (("a",), ("b",), ("c",), ("d",))
    for hash_seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{here.captions} {here.fingerprint}\n"


def test_changed_captions_are_never_served_from_a_cache_even_with_the_old_time_stamp(tmp_path):
    path = simple_folder(tmp_path) / "metadata.jsonl"
    stat = path.stat()
    before = load_all(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("caption 0", "caption 9"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_all(tmp_path)
    assert after.captions[0] == ("caption 9",)
    assert before.fingerprint != after.fingerprint


def test_images_without_captions_need_no_metadata_and_their_folders_are_their_labels(tmp_path):
    write_folder(tmp_path, {"cat/a.png": 1, "dog/b.png": 2, "cat/c.png": 3})
    images = load_all(tmp_path, needs_captions=False, shard_by_column="label")
    assert images.captions == (("",),) * 3
    assert images.shard_labels == ("cat", "cat", "dog")
    assert load_all(tmp_path, needs_captions=False).shard_labels is None


def test_labels_are_the_texts_of_the_column(tmp_path):
    rows = [{"file_name": "a.png", "text": "one", "kind": 3}, {"file_name": "b.png", "text": "two", "kind": 4}]
    images = load_all(write_folder(tmp_path, {"a.png": 1, "b.png": 2}, rows), shard_by_column="kind")
    assert images.shard_labels == ("3", "4")


def test_progress_bars_and_logging_of_datasets_are_as_before(tmp_path, capfd):
    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    (tmp_path / "table").mkdir()
    table().to_parquet(tmp_path / "table" / "a.parquet")
    capfd.readouterr()
    load(simple_folder(tmp_path / "folder"))
    load(dataset_name=str(tmp_path / "table"))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")


# What is refused


def test_a_missing_or_empty_folder_is_named(tmp_path):
    assert f"`--train_data_dir {tmp_path}/no` is not a folder" in refusal(tmp_path / "no")
    assert f"`--train_data_dir {tmp_path}` has no images" in refusal(tmp_path)
    assert f"`--dataset_name {tmp_path}` cannot be read" in refusal(dataset_name=str(tmp_path))


def test_a_folder_without_metadata_says_what_a_line_looks_like(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "cat/b.png": 2})
    for message in (refusal(tmp_path), refusal(dataset_name=str(tmp_path))):
        assert 'has no captions: add a metadata.jsonl with lines such as {"file_name": "cat.png", "text":' in message


def test_images_without_a_row_are_counted_and_the_first_is_named(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2, "sub/c.PNG": 3}, [{"file_name": "a.png", "text": "one"}])
    for message in (refusal(tmp_path), refusal(dataset_name=str(tmp_path))):
        assert f"has 2 of 3 images without a row in a metadata file, the first is `{tmp_path}/b.png`" in message


def test_a_row_whose_file_is_missing_is_named(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "gone.png", "text": "two"}]
    assert f"image `{tmp_path}/gone.png` cannot be read: No such file" in refusal(
        write_folder(tmp_path, {"a.png": 1}, rows)
    )


def test_a_file_that_is_no_image_is_named_before_training(tmp_path):
    simple_folder(tmp_path)
    (tmp_path / "004.png").write_text("no image")
    assert f"`{tmp_path}/004.png` is not an image" in refusal(tmp_path)


def test_an_image_that_changes_after_loading_is_named(tmp_path):
    images = load_all(simple_folder(tmp_path))
    (tmp_path / "002.png").write_bytes(png(99))
    (tmp_path / "003.png").unlink()
    with pytest.raises(UserError, match=r"002.png` changed since the data was loaded"):
        images.load(2)
    with pytest.raises(UserError, match=r"003.png` cannot be read"):
        images.load(3)


def test_two_metadata_files_in_one_folder_are_refused(tmp_path):
    (simple_folder(tmp_path) / "metadata.csv").write_text("file_name,text\n000.png,again\n")
    assert "metadata.csv and metadata.jsonl in the folder" in refusal(tmp_path)


@pytest.mark.parametrize("flag", ["caption_column", "image_column", "shard_by_column"])
def test_an_unknown_column_is_named_with_those_there_are(tmp_path, flag):
    simple_folder(tmp_path)
    for source in ({"folder": tmp_path}, {"dataset_name": str(tmp_path)}):
        message = refusal(**source, **{flag: "titel"})
        assert f"`--{flag} titel` is no column of" in message
        assert "image, text" in message


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"file_name": "b.png"}', r"row 1 of `.*metadata.jsonl` (`b.png`) has no caption"),
        ('{"file_name": "b.png", "text": 7}', "metadata.jsonl` cannot be read: line 2 has 7 in `--caption_column"),
        ('{"file_name": "b.png", "text": ["two"]}', "line 2 mixes texts and lists in `--caption_column text`"),
        ('{"text": "two"}', "row 1 of `.*metadata.jsonl` names no image file"),
        ('{"file_name": "b.png", "text": "tw', "metadata.jsonl` cannot be read: line 2 is not JSON"),
        ('{"file_name": "../b.png", "text": "two"}', "metadata.jsonl` cannot be read: Invalid metadata file_name"),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, message):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n' + second + "\n")
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), refusal(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.png", "text": 7}, "row 0 of `.*` .`a.png`. has 7, which is not text, in `--caption_column"),
        ({"file_name": "a.png", "text": []}, "has an empty list in `--caption_column text`"),
        ({"file_name": "a.png", "text": ["a", None]}, "has no caption in `--caption_column text`"),
        ({"file": "a.png", "text": "one"}, "line 1 has no `file_name`"),
    ],
)
def test_a_bad_only_row_is_named(tmp_path, row, message):
    assert re.search(message, refusal(write_folder(tmp_path, {"a.png": 1}, [row])))


def test_an_empty_metadata_file_is_named(tmp_path):
    assert "metadata.jsonl` cannot be read: it has no rows" in refusal(write_folder(tmp_path, {"a.png": 1}, []))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv` cannot be read: it has no rows" in refusal(tmp_path)


def test_a_number_in_a_csv_and_a_missing_label_are_named(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2})
    (tmp_path / "metadata.csv").write_text("file_name,text,kind\na.png,5,\nb.png,6,x\n")
    assert "row 0 of `" in refusal(tmp_path)
    assert "row 0 of `" in refusal(tmp_path, needs_captions=False, shard_by_column="kind")
    assert "in `--shard_by_column kind`: every image needs one value" in refusal(
        tmp_path, needs_captions=False, shard_by_column="kind"
    )


def test_a_split_does_not_go_with_a_training_folder(tmp_path):
    assert "`--dataset_split test` goes with `--dataset_name`" in refusal(
        simple_folder(tmp_path), dataset_split="test"
    )


def test_no_source_is_an_error():
    assert "give `--train_data_dir FOLDER` or `--dataset_name NAME`" in refusal()


# Tables


def table(count=5, **columns):
    columns = {"image": [png(i) for i in range(count)], "text": [f"caption {i}" for i in range(count)], **columns}
    return datasets.Dataset.from_dict(columns)


def as_images(rows):
    return rows.cast_column("image", datasets.Image())


def write_webdataset(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(5):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_arrow(folder):
    table().save_to_disk(folder.parent / "saved")
    (folder.parent / "saved" / "data-00000-of-00001.arrow").rename(folder / "a.arrow")


def write_json(folder):
    write_folder(folder, {f"pictures/{i}": i for i in range(5)})
    write_rows(folder / "rows.jsonl", [{"image": f"pictures/{i}", "text": f"caption {i}"} for i in range(5)])


WRITERS = {
    "parquet of bytes": lambda folder: table().to_parquet(folder / "a.parquet"),
    "parquet of images": lambda folder: as_images(table()).to_parquet(folder / "a.parquet"),
    "save_to_disk": lambda folder: as_images(table()).save_to_disk(folder),
    "save_to_disk of splits": lambda folder: datasets.DatasetDict(train=table(), test=table(2)).save_to_disk(folder),
    "arrow": write_arrow,
    "json with paths": write_json,
    "webdataset": write_webdataset,
    "image folder": lambda folder: simple_folder(folder, 5),
    "image folder of splits": lambda folder: (simple_folder(folder / "train", 5), simple_folder(folder / "test", 2)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_local_data_set_is_read_in_every_format_and_survives_pickling(tmp_path, kind):
    folder = tmp_path / "named"
    folder.mkdir()
    WRITERS[kind](folder)
    columns = {"image_column": "png", "caption_column": "txt"} if kind == "webdataset" else {}
    images = load_all(dataset_name=str(folder), **columns)
    assert images.captions == tuple((f"caption {i}",) for i in range(5))
    assert images.content_hashes == tuple(hashlib.blake2b(png(i), digest_size=16).hexdigest() for i in range(5))
    copy = pickle.loads(pickle.dumps(images.subset([4, 1])))
    assert copy.captions == (("caption 4",), ("caption 1",))
    assert [copy.load(i).getpixel((0, 0)) for i in range(2)] == [(4, 0, 0), (1, 0, 0)]
    assert copy.fingerprint == images.subset([4, 1]).fingerprint


def test_a_table_is_pickled_without_its_images(tmp_path):
    noise = [np.random.default_rng(i).bytes(1000) for i in range(100)]
    table(100, image=[png(i) + extra for i, extra in enumerate(noise)]).to_parquet(tmp_path / "a.parquet")
    assert len(pickle.dumps(load_all(dataset_name=str(tmp_path)))) < 20_000


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_loads_the_same_images(tmp_path, start):
    table().to_parquet(tmp_path / "a.parquet")
    images = load_all(dataset_name=str(tmp_path))
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(images.load, (3,)).getpixel((0, 0)) == (3, 0, 0)


def test_a_rewritten_table_is_never_served_from_the_cache_even_with_the_old_time_stamp(tmp_path):
    path = tmp_path / "a.parquet"
    table().to_parquet(path)
    stat = path.stat()
    before = load_all(dataset_name=str(tmp_path))
    table(text=[f"caption {i}" for i in (5, 6, 7, 8, 9)]).to_parquet(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_all(dataset_name=str(tmp_path))
    assert after.captions[0] == ("caption 5",)
    assert before.fingerprint != after.fingerprint


def test_a_table_that_datasets_made_of_an_image_folder_is_put_in_the_order_of_its_paths(tmp_path):
    for name in "hdbfcaeg":
        write_folder(tmp_path / name, {"x.png": ord(name)}, [{"file_name": "x.png", "text": name}])
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    samples = table_samples(rows, Columns("image", "text", None), "hub/name", "`--dataset_name hub/name`", None)
    assert samples.captions == tuple((name,) for name in "abcdefgh")
    assert [samples.read(i) for i in range(8)] == [png(ord(name)) for name in "abcdefgh"]


def test_the_cache_goes_where_it_is_told(tmp_path):
    (tmp_path / "data").mkdir()
    table().to_parquet(tmp_path / "data" / "a.parquet")
    load_all(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_lists_of_captions_and_class_names_come_from_tables_too(tmp_path):
    rows = as_images(table(2, text=[["a", "b"], ["c"]], kind=[1, 0]))
    rows = rows.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    rows.save_to_disk(tmp_path / "saved")
    images = load_all(dataset_name=str(tmp_path / "saved"), shard_by_column="kind")
    assert images.captions == (("a", "b"), ("c",))
    assert images.shard_labels == ("dog", "cat")
    assert images.names == (f"row 0 of {tmp_path}/saved", f"row 1 of {tmp_path}/saved")


def test_a_part_of_a_split_can_be_taken(tmp_path):
    table().to_parquet(tmp_path / "a.parquet")
    assert load_all(dataset_name=str(tmp_path), dataset_split="train[1:3]").captions == (
        ("caption 1",),
        ("caption 2",),
    )


@pytest.mark.parametrize("kind", WRITERS)
def test_an_unknown_split_is_named_with_those_there_are(tmp_path, kind):
    folder = tmp_path / "named"
    folder.mkdir()
    WRITERS[kind](folder)
    message = refusal(dataset_name=str(folder), dataset_split="dev")
    assert message.startswith("`--dataset_split dev` ")
    splits = message.rpartition(str(folder))[2]
    assert "train" in splits
    assert ("test" in splits) == ("splits" in kind)


def test_images_that_the_guessed_splits_leave_out_are_refused(tmp_path):
    write_folder(tmp_path, {"train-station.png": 1, "cat.png": 2})
    message = refusal(dataset_name=str(tmp_path), needs_captions=False)
    assert f"1 images outside its splits (train), the first is `{tmp_path}/cat.png`" in message


def test_a_data_set_with_several_configurations_asks_for_one(tmp_path):
    table(2).to_parquet(tmp_path / "one.parquet")
    table(3).to_parquet(tmp_path / "two.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one.parquet\n"
        "- config_name: two\n  data_files: two.parquet\n---\n"
    )
    message = refusal(dataset_name=str(tmp_path))
    assert "has several configurations: choose one with `--dataset_config_name`, of ['one', 'two']" in message
    assert "`--dataset_config_name six` does not fit" in refusal(dataset_name=str(tmp_path), dataset_config_name="six")
    assert len(load_all(dataset_name=str(tmp_path), dataset_config_name="two")) == 3


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_named():
    for name in ("nobody/nothing", "./no/folder", "/no/folder"):
        message = refusal(dataset_name=name)
        assert (
            f"`--dataset_name {name}` cannot be loaded: it is no folder here, and the Hub did not give it" in message
        )


def test_a_file_as_data_set_and_a_broken_file_in_one_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "is a file: give the folder" in refusal(dataset_name=str(tmp_path / "a.parquet"))
    assert f"`--dataset_name {tmp_path}` cannot be read: Parquet" in refusal(dataset_name=str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1, 2]}, "row 0 of .* has 1, which is not text,"),
        ({"text": ["a", None]}, "row 1 of .* has no caption"),
        ({"text": [png(1), png(2)]}, "row 0 of .* has b.*, which is not text,"),
        ({"text": [{"a": 1}, {"a": 2}]}, "`--caption_column text` of .* holds no text"),
        ({"image": [1, 2]}, "`--image_column image` of .* not images"),
        ({"image": ["", None]}, "row 0 of .* has no image in `--image_column image`"),
        ({"image": ["a.png", "b.png"]}, "image `.*a.png` cannot be read"),
        ({"image": ["https://x/a.png", "b"]}, "row 0 of .* points to `https://x/a.png`, which is not a file"),
        ({"image": [png(1), b"no"]}, "`row 1 of .*` is not an image"),
    ],
)
def test_a_bad_column_or_row_of_a_table_is_named(tmp_path, columns, message):
    table(2, **columns).to_parquet(tmp_path / "a.parquet")
    assert re.search(message, refusal(dataset_name=str(tmp_path)))


def test_a_table_without_rows_is_an_error(tmp_path):
    table(1).select([]).to_parquet(tmp_path / "a.parquet")
    assert f"of `--dataset_name {tmp_path}` has no rows" in refusal(dataset_name=str(tmp_path))
    table(3).to_parquet(tmp_path / "a.parquet")
    assert "has no rows" in refusal(dataset_name=str(tmp_path), dataset_split="train[:0]")
    as_images(table(1)).select([]).save_to_disk(tmp_path / "saved")
    assert "has no rows" in refusal(dataset_name=str(tmp_path / "saved"))


# Selection


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """40 images of 25 contents: one stands 8 times, eight stand twice."""
    numbers = [0] * 8 + [i for i in range(1, 9) for _ in range(2)] + list(range(9, 25))
    np.random.default_rng(0).shuffle(numbers)
    return simple_folder(tmp_path_factory.mktemp("many"), 40, [int(number) for number in numbers])


def test_held_out_contents_are_never_among_the_training_images(many):
    for seed in range(20):
        training, held_out = load(many, holdout_fraction=0.25, seed=seed)
        assert len(held_out) == 10
        assert len(training) == 30
        assert not set(training.content_hashes) & set(held_out.content_hashes)
        assert sorted(training.names + held_out.names) == sorted(load_all(many).names)
        assert training.names == tuple(sorted(training.names))
        assert held_out.names == tuple(sorted(held_out.names))


def test_every_content_is_held_out_by_some_seed_and_seeds_differ(many):
    draws = [load(many, holdout_fraction=0.25, seed=seed)[1].content_hashes for seed in range(60)]
    assert {content for draw in draws for content in draw} == set(load_all(many).content_hashes)
    assert len(set(draws)) > 50


def test_the_training_subset_is_drawn_after_the_held_out_images_and_keeps_the_order(many):
    everything, held_out = load(many, holdout_fraction=0.25, seed=3)
    training, same = load(many, holdout_fraction=0.25, max_train_samples=7, seed=3)
    assert same.names == held_out.names
    assert len(training) == 7
    assert set(training.names) < set(everything.names)
    assert training.names == tuple(sorted(training.names))
    assert [training.load(i).tobytes() for i in range(7)] == [
        everything.load(everything.names.index(name)).tobytes() for name in training.names
    ]


def test_every_image_is_as_likely_to_be_in_the_subset_and_smaller_subsets_nest(many):
    counts = Counter()
    for seed in range(60):
        small, large = (set(load(many, max_train_samples=size, seed=seed)[0].names) for size in (10, 20))
        assert len(small) == 10
        assert small < large
        counts.update(large)
    assert len(counts) == 40
    assert min(counts.values()) > 12  # 30 expected, standard deviation 3.9
    assert max(counts.values()) < 48


def test_a_subset_larger_than_the_data_is_the_data(many):
    assert load_all(many, max_train_samples=1000).names == load_all(many).names


@pytest.mark.parametrize(("fraction", "held", "left"), [(0.01, 0, 3), (0.99, 3, 0)])
def test_a_share_that_leaves_a_side_empty_is_refused_with_both_numbers(tmp_path, fraction, held, left):
    message = refusal(simple_folder(tmp_path, 3), holdout_fraction=fraction)
    assert f"`--holdout_fraction {fraction}` of 3 images (3 distinct) holds out {held} and leaves {left}" in message


def test_one_image_many_times_cannot_be_split(tmp_path):
    message = refusal(simple_folder(tmp_path, 4, [5] * 4), holdout_fraction=0.5)
    assert "of 4 images (1 distinct) holds out 0 and leaves 4" in message


def test_the_fingerprint_sees_contents_captions_labels_and_order_but_not_names_or_dates(tmp_path):
    def fingerprint(files, texts, kinds=("x", "y"), label="kind"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        rows = [{"file_name": f, "text": t, "kind": k} for f, t, k in zip(files, texts, kinds, strict=True)]
        return load_all(write_folder(folder, files, rows), shard_by_column=label).fingerprint

    base = fingerprint({"a.png": 1, "b.png": 2}, ["one", "two"])
    assert base == fingerprint({"c.png": 1, "d.png": 2}, ["one", "two"])
    changed = [
        fingerprint({"a.png": 1, "b.png": 3}, ["one", "two"]),
        fingerprint({"a.png": 1, "b.png": 2}, ["one", "zwei"]),
        fingerprint({"a.png": 1, "b.png": 2}, [["one"], ["two", "zwei"]]),
        fingerprint({"a.png": 1, "b.png": 2}, ["one", "two"], kinds=("x", "z")),
        fingerprint({"a.png": 1, "b.png": 2}, ["one", "two"], label=None),
        fingerprint({"b.png": 2, "a.png": 1}, ["two", "one"], kinds=("y", "x")),
    ]
    assert len({base, *changed}) == 7

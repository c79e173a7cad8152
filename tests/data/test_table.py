"""Loading tables in every format, and refusing bad ones by name."""

import hashlib
import io
import multiprocessing
import os
import pickle
import re
import tarfile

import datasets
import numpy as np
import pytest
from data.made import load_all, png, refusal, simple_folder, table, write_folder, write_rows

from iet_finetune.data.faults import Faults
from iet_finetune.data.samples import Columns
from iet_finetune.data.table import table_samples


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
    samples = table_samples(
        rows, Columns("image", "text", None), "hub/name", "`--dataset_name hub/name`", None, Faults("it")
    )
    assert samples.captions == tuple((name,) for name in "abcdefgh")
    assert [samples.read(i) for i in range(8)] == [png(ord(name)) for name in "abcdefgh"]


def test_the_cache_is_kept_in_cache_dir(tmp_path):
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
        ({"text": [1.5, 2.5]}, "2 rows are wrong .row 0 of .* has 1.5, which is not text, in `--caption_column text`"),
        ({"text": ["a", None]}, "1 image has no caption .row 1 of "),
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

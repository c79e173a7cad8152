"""Loading folders of images, and refusing bad ones by name."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from data.made import load, load_all, png, refusal, simple_folder, table, write_folder

from iet_finetune.errors import UserError


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


def test_a_column_of_file_names_may_be_called_as_datasets_calls_it(tmp_path):
    rows = [{"img_file_name": "b.png", "text": "two"}, {"img_file_name": "a.png", "text": "one"}]
    write_folder(tmp_path, {"a.png": 1, "b.png": 2}, rows)
    assert load_all(tmp_path, image_column="img").captions == (("two",), ("one",))
    assert "has no column `file_name`" in refusal(tmp_path)


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
        "import sys; from iet_finetune.config.settings import DataConfig;"
        "from iet_finetune.data.dataset import load_images;"
        "images, _ = load_images(DataConfig(train_data_dir=sys.argv[1], max_train_samples=3), cache_dir=None, seed=1);"
        "print(images.captions, images.fingerprint)"
    )
    here = load(tmp_path, max_train_samples=3, seed=1)[0]
    assert load_all(tmp_path).captions == (("a",), ("b",), ("c",), ("d",))
    # The order of sets of texts is drawn anew in every process, unless this says otherwise.
    environment = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
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


def test_a_folder_without_captions_says_how_to_give_them(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "cat/b.png": 2})
    for message in (refusal(tmp_path), refusal(dataset_name=str(tmp_path))):
        assert "2 images have no caption (`" in message
        assert 'Add rows such as {"file_name": "cat.png", "text": "a cat on a sofa"} to metadata.jsonl' in message
        assert "`--default_caption TEXT` or `--caption_from folder`" in message


def test_images_without_a_row_are_named(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2, "sub/c.PNG": 3}, [{"file_name": "a.png", "text": "one"}])
    assert "2 images have no caption (`b.png`, `sub/c.PNG`)" in refusal(tmp_path)
    assert f"2 images have no caption (`{tmp_path}/b.png`, " in refusal(dataset_name=str(tmp_path))
    message = refusal(tmp_path, needs_captions=False)
    assert "2 images are in no row of the tables beside them (`b.png`, `sub/c.PNG`). Add their rows or move" in message


def test_a_row_whose_file_is_missing_is_named(tmp_path):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "gone.png", "text": "two"}]
    write_folder(tmp_path, {"a.png": 1}, rows)
    assert "1 row names a file that is not there (`gone.png` in line 2 of `metadata.jsonl`)" in refusal(tmp_path)


def test_a_file_that_is_no_image_is_named_before_training(tmp_path):
    simple_folder(tmp_path)
    (tmp_path / "004.png").write_text("no image")
    assert "1 image cannot be read (`004.png` is not an image that Pillow can read)" in refusal(tmp_path)


def test_an_image_that_changes_after_loading_is_named(tmp_path):
    images = load_all(simple_folder(tmp_path))
    (tmp_path / "002.png").write_bytes(png(99))
    (tmp_path / "003.png").unlink()
    with pytest.raises(UserError, match=r"002.png` changed since the data was loaded"):
        images.load(2)
    with pytest.raises(UserError, match=r"003.png` cannot be read"):
        images.load(3)


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
        ('{"file_name": "b.png"}', "1 image has no caption (line 2 of `metadata.jsonl` (`b.png`))"),
        ('{"file_name": "b.png", "text": []}', "1 image has no caption (line 2 of `metadata.jsonl` (`b.png`))"),
        (
            '{"file_name": "b.png", "text": {"en": "b"}}',
            "line 2 of `metadata.jsonl` (`b.png`) has {'en': 'b'}, which is",
        ),
        ('{"file_name": "b.png", "text": ["b", null]}', "line 2 of `metadata.jsonl` (`b.png`) has None, which is not"),
        ('{"text": "two"}', "1 row is wrong (line 2 of `metadata.jsonl` names no image file)"),
        ('{"file_name": 7, "text": "two"}', "1 row is wrong (line 2 of `metadata.jsonl` names no image file)"),
        ('{"file_name": "b.png", "text": "tw', "line 2 of `metadata.jsonl` is not JSON"),
        ('["b.png", "two"]', "line 2 of `metadata.jsonl` is not a row of names and values"),
        ('{"file_name": "../b.png", "text": "two"}', "`../b.png` in line 2 of `metadata.jsonl` (there is `b.png`)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, message):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n' + second + "\n")
    assert message in refusal(tmp_path)


def test_an_empty_metadata_file_is_named(tmp_path):
    assert "metadata.jsonl` cannot be read: it has no rows" in refusal(write_folder(tmp_path, {"a.png": 1}, []))
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv` cannot be read: it has no rows" in refusal(tmp_path)


def test_a_missing_label_is_named(tmp_path):
    write_folder(tmp_path, {"a.png": 1, "b.png": 2})
    (tmp_path / "metadata.csv").write_text("file_name,text,kind\na.png,5,\nb.png,6,x\n")
    message = refusal(tmp_path, shard_by_column="kind")
    assert "1 row lacks a value (line 2 of `metadata.csv` (`a.png`) has None in `--shard_by_column kind`" in message


def test_a_split_does_not_go_with_a_training_folder(tmp_path):
    assert "`--dataset_split test` goes with `--dataset_name`" in refusal(
        simple_folder(tmp_path), dataset_split="test"
    )


def test_no_source_is_an_error():
    assert "give `--train_data_dir FOLDER` or `--dataset_name NAME`" in refusal()

"""With many images a start hashes only what has changed, and a few of them are few wherever they go."""

import hashlib
import json
import pickle

import pytest
from data.made import load, load_all, png, table, write_rows

from iet_finetune.data import dataset, hashes

COUNT, CHANGED = 3_000, 2**20


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Images count as settled at once, so that no test has to wait for it."""
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the images whose bytes were read to hash them."""
    names, look = [], dataset.look_at
    monkeypatch.setattr(dataset, "look_at", lambda data, name, most: names.append(name) or look(data, name, most))
    return names


@pytest.fixture
def folder(tmp_path):
    """Images in folders of 1,000."""
    for number in range(COUNT):
        save(tmp_path / "images", number, number)
    return name_all(tmp_path / "images", range(COUNT))


def name(number):
    return f"{number // 1000}/{number:05}.png"


def save(folder, number, content):
    (folder / name(number)).parent.mkdir(parents=True, exist_ok=True)
    (folder / name(number)).write_bytes(png(content))


def name_all(folder, numbers):
    write_rows(folder / "metadata.jsonl", [{"file_name": name(n), "text": f"caption {n}"} for n in numbers])
    return folder


def test_only_what_changed_or_came_is_hashed_again_and_what_went_is_missed(folder, tmp_path, looked_at):
    cache = str(tmp_path / "cache")
    before = load_all(folder, cache_dir=cache)
    assert len(looked_at) == COUNT
    looked_at.clear()
    assert load_all(folder, cache_dir=cache) == before
    assert looked_at == []
    for number in (7, 1500, COUNT):
        save(folder, number, CHANGED + number)
    (folder / name(2999)).unlink()
    (folder / name(0)).unlink()
    after = load_all(name_all(folder, [*range(1, 2999), COUNT]), cache_dir=cache)
    assert sorted(looked_at) == [f"{folder}/{name(number)}" for number in (7, 1500, COUNT)]
    expected = dict(zip(before.names, before.content_hashes, strict=True))
    for number in (0, 2999):
        del expected[f"{folder}/{name(number)}"]
    for number in (7, 1500, COUNT):
        expected[f"{folder}/{name(number)}"] = hashlib.blake2b(png(CHANGED + number), digest_size=16).hexdigest()
    assert dict(zip(after.names, after.content_hashes, strict=True)) == expected


def test_hashes_of_a_start_that_failed_are_kept(folder, tmp_path, looked_at):
    whole = (folder / name(2900)).read_bytes()
    (folder / name(2900)).write_bytes(b"no image")
    with pytest.raises(Exception, match="02900"):
        load_all(folder, cache_dir=str(tmp_path / "cache"))
    looked_at.clear()
    (folder / name(2900)).write_bytes(whole)
    load_all(folder, cache_dir=str(tmp_path / "cache"))
    assert looked_at == [str(folder / name(2900))]


def test_a_few_of_many_are_pickled_without_the_others(folder, tmp_path):
    images = load_all(folder, cache_dir=str(tmp_path / "cache"))
    few = images.subset(range(0, COUNT, 300))
    assert len(pickle.dumps(images)) > 200_000
    assert len(pickle.dumps(few)) < 4_000
    copy = pickle.loads(pickle.dumps(few))
    assert copy == few
    assert [copy.load(i).getpixel((0, 0)) for i in range(10)] == [
        images.load(i).getpixel((0, 0)) for i in range(0, COUNT, 300)
    ]


def test_the_fingerprint_is_that_of_the_lines_of_json(folder, tmp_path):
    texts = ['"quoted" \\ back', "größe 😀 \x7f\u2028", "tab\t", ""]
    rows = [{"file_name": name(n), "text": [*texts[: n % 4 + 1]], "kind": n % 7} for n in range(COUNT)]
    write_rows(folder / "metadata.jsonl", rows)
    for flags in ({}, {"shard_by_column": "kind"}, {"class_column": "kind"}):
        images = load_all(folder, cache_dir=str(tmp_path / "cache"), **flags)
        digest = hashlib.blake2b(digest_size=16)
        for i in range(COUNT):
            row = [images.content_hashes[i], images.captions[i], images.shard_labels and images.shard_labels[i]]
            row += [] if images.classes is None else [images.classes[i]]
            digest.update(json.dumps(row).encode() + b"\n")
        assert images.fingerprint == digest.hexdigest()


def test_a_large_table_that_was_just_written_is_waited_for_and_not_hashed_twice(tmp_path, monkeypatch, looked_at):
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 1.0)
    monkeypatch.setattr(dataset, "_WORTH_WAITING", 100)
    (tmp_path / "named").mkdir()
    table(100).to_parquet(tmp_path / "named" / "a.parquet")
    flags = {"dataset_name": str(tmp_path / "named"), "cache_dir": str(tmp_path / "cache")}
    first, _ = load(**flags)
    assert len(looked_at) == 100
    assert load(**flags)[0].content_hashes == first.content_hashes
    assert len(looked_at) == 100

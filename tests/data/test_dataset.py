"""How images are held out and selected, and what the fingerprint sees."""

from collections import Counter

import numpy as np
import pytest
from data.made import load, load_all, refusal, simple_folder, write_folder


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

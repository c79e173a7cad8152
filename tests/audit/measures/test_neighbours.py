"""The nearest references are those of a search one by one over integers, whatever the blocks and orientations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from iet_finetune.audit.measures import neighbours
from iet_finetune.audit.measures.neighbours import nearest_features, nearest_pixels


def random_images(rng: np.random.Generator, count: int, height: int, width: int, low: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8 from `low` to 255."""
    return rng.integers(low, 256, (count, height, width, 3), dtype=np.uint8)


def searched(generated, references, k, flips=True):
    """Index, distance and flipped of the k nearest from the formula: integers, one image after the other."""
    rows = []
    for image in generated.astype(np.int64):
        as_it_is = ((image - references) ** 2).sum(axis=(1, 2, 3))
        mirrored = ((image[:, ::-1] - references) ** 2).sum(axis=(1, 2, 3)) if flips else as_it_is
        both = np.minimum(as_it_is, mirrored)
        nearest = sorted(range(len(references)), key=lambda place, both=both: (both[place], place))[:k]
        rows.append((nearest, both[nearest] / 65025, (mirrored < as_it_is)[nearest]))
    return tuple(np.array(column) for column in zip(*rows, strict=True))


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 25), st.integers(1, 5), st.integers(1, 6)),
    st.sampled_from([0, 250, 254]),
    st.booleans(),
    st.sampled_from([2_000, 20_000, 256 * 10**6]),
    st.integers(0, 2**32),
    st.data(),
)
def test_they_equal_a_search_one_by_one_over_integers(sizes, low, flips, workspace, seed, data):
    count, references, height, width = sizes
    rng = np.random.default_rng(seed)
    ours, theirs = (random_images(rng, n, height, width, low) for n in (count, references))
    k = data.draw(st.integers(1, references))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(neighbours, "WORKSPACE", workspace)
        found = nearest_pixels(ours, theirs, k, flips=flips)
    assert_equal(found, searched(ours, theirs, k, flips))


def test_they_do_not_depend_on_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    ours, theirs = random_images(rng, 9, 7, 9), random_images(rng, 100, 7, 9)
    whole = nearest_pixels(ours, theirs, 20)
    assert_equal(whole, searched(ours, theirs, 20))
    for workspace in (3_000, 30_000, 150_000):
        monkeypatch.setattr(neighbours, "WORKSPACE", workspace)
        size, strips = neighbours._plan((7, 9, 3))
        assert size < 100
        assert len(strips) == 7 or workspace > 3_000
        assert_equal(nearest_pixels(ours, theirs, 20), whole)


def test_near_copies_among_bright_images_are_exact():
    """|g|^2 + |x|^2 - 2 g.x in fp32 is off by thousands here, and the distances are 1 to 60."""
    rng = np.random.default_rng(1)
    bright = np.full((60, 32, 32, 3), 255, np.uint8)
    for place, image in enumerate(bright):
        image.reshape(-1)[rng.choice(3072, place + 1, replace=False)] -= 1
    found = nearest_pixels(np.full((1, 32, 32, 3), 255, np.uint8), bright, 60)
    np.testing.assert_array_equal(found.index[0], np.arange(60))
    np.testing.assert_array_equal(found.distance[0] * 65025, np.arange(1, 61))
    found = nearest_pixels(bright, bright, 5)
    assert_equal(found, searched(bright, bright, 5))


@pytest.fixture
def imprecise():
    """Lets products of fp32 matrices be computed in bfloat16 where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("imprecise")
def test_a_lower_precision_of_matrix_products_changes_nothing():
    images = random_images(np.random.default_rng(2), 40, 32, 32, 250)
    assert_equal(nearest_pixels(images[:5], images, 40), searched(images[:5], images, 40))


def test_a_mirrored_copy_is_found_and_told():
    rng = np.random.default_rng(3)
    references = random_images(rng, 80, 8, 8)
    found = nearest_pixels(references[[70, 3], :, ::-1], references, 5)
    np.testing.assert_array_equal(found.index[:, 0], [70, 3])
    np.testing.assert_array_equal(found.distance[:, 0], 0)
    assert found.flipped[:, 0].all()
    blind = nearest_pixels(references[[70, 3], :, ::-1], references, 5, flips=False)
    assert blind.distance.min() > 10
    assert not blind.flipped.any()


def test_a_symmetric_image_is_not_called_flipped_and_each_reference_comes_once():
    rng = np.random.default_rng(4)
    half = random_images(rng, 20, 6, 3)
    symmetric = np.concatenate((half, half[:, :, ::-1]), axis=2)
    found = nearest_pixels(symmetric, symmetric, 20)
    assert not found.flipped.any()
    assert all(sorted(row) == list(range(20)) for row in found.index)


@pytest.mark.parametrize("workspace", [5_000, 256 * 10**6])
def test_of_equally_near_references_the_first_ones_count(monkeypatch, workspace):
    monkeypatch.setattr(neighbours, "WORKSPACE", workspace)
    rng = np.random.default_rng(5)
    few = random_images(rng, 3, 4, 4)
    references = few[rng.integers(0, 3, 300)]
    found = nearest_pixels(few, references, 120)
    assert_equal(found, searched(few, references, 120))


def test_references_that_come_ever_nearer_are_all_seen(monkeypatch):
    monkeypatch.setattr(neighbours, "WORKSPACE", 60_000)
    shades = np.repeat(np.arange(255, 5, -1, dtype=np.uint8), 4 * 4 * 3).reshape(250, 4, 4, 3)
    found = nearest_pixels(np.zeros((3, 4, 4, 3), np.uint8), shades, 4)
    np.testing.assert_array_equal(found.index, [[249, 248, 247, 246]] * 3)
    np.testing.assert_allclose(found.distance[0], 48 * (np.arange(6, 10) / 255) ** 2, rtol=1e-15)


def test_images_in_files_give_the_same(tmp_path):
    rng = np.random.default_rng(6)
    ours, theirs = random_images(rng, 10, 5, 8), random_images(rng, 90, 5, 8)
    mapped = []
    for name, images in (("ours", ours), ("theirs", theirs)):
        np.save(tmp_path / name, images)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    assert all(isinstance(images, np.memmap) for images in mapped)
    assert_equal(nearest_pixels(*mapped, 10), searched(ours, theirs, 10))


def test_progress_adds_up_to_the_images(monkeypatch):
    monkeypatch.setattr(neighbours, "WORKSPACE", 20_000)
    rng = np.random.default_rng(7)
    done: list[int] = []
    nearest_pixels(random_images(rng, 33, 4, 4), random_images(rng, 77, 4, 4), 3, progress=done.append)
    assert sum(done) == 33
    assert len(done) > 4
    assert min(done) >= 0


def test_no_images_have_no_neighbours():
    references = random_images(np.random.default_rng(8), 9, 4, 4)
    found = nearest_pixels(references[:0], references, 5)
    assert [part.shape for part in found] == [(0, 5)] * 3
    assert [part.dtype for part in found] == [np.int64, np.float64, bool]


@pytest.mark.parametrize("k", [0, 10])
def test_more_neighbours_than_references_are_refused(k):
    references = random_images(np.random.default_rng(9), 9, 4, 4)
    with pytest.raises(ValueError, match=f"k = {k} nearest of 9 references"):
        nearest_pixels(references, references, k)
    with pytest.raises(ValueError, match=f"k = {k} nearest of 9 references"):
        nearest_features(np.ones((2, 3), np.float32), None, np.ones((9, 3), np.float32), k)


@pytest.mark.parametrize("other", [np.zeros((2, 4, 5, 3), np.uint8), np.zeros((2, 4, 4, 3), np.float32)])
def test_images_that_cannot_be_compared_are_refused(other):
    with pytest.raises(ValueError, match="must be uint8 and of one size"):
        nearest_pixels(np.zeros((2, 4, 4, 3), np.uint8), other, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits():
    rng = np.random.default_rng(10)
    ours, theirs = random_images(rng, 50, 32, 32, 240), random_images(rng, 700, 32, 32, 240)
    found = nearest_pixels(ours, theirs, 50, device=torch.device("cuda"))
    assert_equal(found, nearest_pixels(ours, theirs, 50))


def test_similar_features_are_those_of_the_formula():
    rng = np.random.default_rng(11)
    ours, turned, theirs = (rng.normal(size=(n, 40)).astype(np.float32) for n in (23, 23, 61))
    as_they_are, mirrored = 1 - cdist(ours, theirs, "cosine"), 1 - cdist(turned, theirs, "cosine")
    both = np.maximum(as_they_are, mirrored)
    order = np.argsort(-both, axis=1)[:, :7]
    for rows in (5, 1000):
        found = nearest_features(ours, turned, theirs, 7, rows=rows)
        np.testing.assert_array_equal(found.index, order)
        np.testing.assert_allclose(found.similarity, np.take_along_axis(both, order, 1), atol=1e-6)
        np.testing.assert_array_equal(found.flipped, np.take_along_axis(mirrored > as_they_are, order, 1))
    alone = nearest_features(ours, None, theirs)
    np.testing.assert_array_equal(alone.index[:, 0], as_they_are.argmax(axis=1))
    assert not alone.flipped.any()


def test_features_of_zeros_are_similar_to_nothing():
    rng = np.random.default_rng(12)
    theirs = rng.normal(size=(9, 4)).astype(np.float32)
    found = nearest_features(np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32), theirs, 3)
    np.testing.assert_array_equal(found.similarity, 0)
    np.testing.assert_array_equal(found.index, [[0, 1, 2]] * 2)


def test_the_length_of_features_does_not_matter():
    rng = np.random.default_rng(13)
    theirs = rng.normal(size=(9, 4)).astype(np.float32)
    found = nearest_features(1000 * theirs, None, theirs * rng.uniform(0.1, 10, (9, 1)).astype(np.float32))
    np.testing.assert_array_equal(found.index[:, 0], np.arange(9))
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)
    assert found.similarity.max() <= 1

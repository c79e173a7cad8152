"""One image is found again, copied, mirrored or compressed; different images of one kind are left apart."""

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iet_finetune.data import duplicates
from iet_finetune.data.duplicates import find_duplicates

DATA = Path(__file__).parents[2] / "demo" / "data"


def random_images(count: int, side: int = 24, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8: smooth, no two alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse]
    )


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    """What a JPEG file keeps of an image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def emoji(*names: str) -> np.ndarray:
    """The demo's images of these code points, wherever they are."""
    files = [next(DATA.rglob(f"{name}.png")) for name in names]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def test_different_images_stand_alone():
    found = find_duplicates(random_images(200))
    np.testing.assert_array_equal(found.representative, np.arange(200))
    np.testing.assert_array_equal(found.references, np.arange(200))
    np.testing.assert_array_equal(found.repeats, 1)
    assert (found.exact, found.near) == (0, 0)


def test_copies_and_mirrored_copies_belong_to_the_first():
    images = random_images(6)
    images = np.concatenate((images, images[[4, 4, 0]], images[[4, 2], :, ::-1]))
    found = find_duplicates(images)
    np.testing.assert_array_equal(found.representative, [0, 1, 2, 3, 4, 5, 4, 4, 0, 4, 2])
    np.testing.assert_array_equal(found.references, np.arange(6))
    np.testing.assert_array_equal(found.repeats, [2, 1, 2, 1, 4, 1])
    assert (found.exact, found.near) == (5, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=30), st.sampled_from([2_000, 10**6]))
def test_any_mixture_of_copies_is_sorted_out(chosen, chunk):
    originals = random_images(8, side=9)
    images = np.stack([originals[which, :, ::-1] if mirrored else originals[which] for which, mirrored in chosen])
    order = [which for which, _ in chosen]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(duplicates, "CHUNK", chunk)
        found = find_duplicates(images)
    np.testing.assert_array_equal(found.representative, [order.index(which) for which in order])
    assert found.exact == len(order) - len(set(order))
    assert found.repeats.sum() == len(order)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", ["noise", "compressed", "brighter", "resized"])
def test_near_copies_are_found(kind, mirrored):
    rng = np.random.default_rng(1)
    originals = np.concatenate((random_images(30, side=64), emoji("1f34e", "2764-fe0f", "1f610")))
    copies = {
        "noise": lambda image: np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8),
        "compressed": lambda image: compressed(image, 75),
        "brighter": lambda image: np.clip(image.astype(int) + 8, 0, 255).astype(np.uint8),
        "resized": lambda image: np.asarray(Image.fromarray(image).resize((40, 40)).resize((64, 64))),
    }
    step = -1 if mirrored else 1
    found = find_duplicates(np.concatenate((originals, [copies[kind](image)[:, ::step] for image in originals])))
    np.testing.assert_array_equal(found.representative, [*range(33), *range(33)])
    assert (found.exact, found.near) == (0, 33)


@pytest.mark.parametrize("side", [24, 96])
@pytest.mark.parametrize("kind", ["shifted", "cropped", "larger", "darker", "brighter", "all of it"])
def test_images_that_were_moved_scaled_or_made_brighter_are_found(kind, side):
    rng = np.random.default_rng(4)
    # None so bright that it would be cut off.
    originals = random_images(40, side=96) // 3 * 2 + 25

    def copied(image):
        dx, dy, scale = {
            "shifted": (*rng.uniform(-6, 6, 2), 1.0),
            "cropped": (0, 0, rng.uniform(0.85, 1)),
            "larger": (*rng.uniform(-2, 2, 2), rng.uniform(1, 1.08)),
            "all of it": (*rng.uniform(-4, 4, 2), rng.uniform(0.92, 1.05)),
        }.get(kind, (0, 0, 1))
        wide = Image.fromarray(np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="edge"))
        half, x, y = 48 * scale, 68 + dx, 68 + dy
        moved = wide.resize((96, 96), Image.Resampling.BICUBIC, box=(x - half, y - half, x + half, y + half))
        gain = {"darker": 0.8, "brighter": 1.2, "all of it": rng.uniform(0.85, 1.15)}.get(kind, 1.0)
        copy = np.clip(np.asarray(moved) * gain, 0, 255).astype(np.uint8)
        return small(compressed(copy, 75)[:, :: rng.choice((-1, 1))])

    def small(image):
        return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))

    found = find_duplicates(np.stack([*map(small, originals), *map(copied, originals)]))
    assert (found.representative[:40] == np.arange(40)).all()
    of_others = ~np.isin(found.representative[40:], [*range(40, 80)]) & (found.representative[40:] != np.arange(40))
    assert not of_others.any()
    assert (found.representative[40:] == np.arange(40)).mean() >= 0.9


def test_a_group_takes_along_what_it_leads_when_it_joins_another():
    """A compressed copy of a shifted copy is near that one first, and belongs to the original with it."""
    original = random_images(1, side=64)[0]
    shifted = np.pad(original, ((4, 0), (3, 0), (0, 0)), mode="edge")[:64, :64]
    found = find_duplicates(np.stack([original, shifted, compressed(shifted, 85), *random_images(5, side=64, seed=9)]))
    np.testing.assert_array_equal(found.representative, [0, 0, 0, 3, 4, 5, 6, 7])


def test_flat_images_are_not_taken_for_one_made_brighter():
    noise = np.random.default_rng(5).normal(0, 2, (4, 32, 32, 3))
    shades = np.array([30, 80, 130, 200])[:, None, None, None]
    found = find_duplicates((shades + noise).astype(np.uint8))
    np.testing.assert_array_equal(found.representative, np.arange(4))


def test_different_images_of_one_kind_are_no_near_copies():
    """Clock faces, hearts and faces: several have the same perceptual hash, and hardly differ in most pixels."""
    alike = emoji("1f55f", "1f563", "1f495", "1f49e", "1f641", "1f642", "1f610", "1f626", "1f49c", "1fa76")
    hashes = duplicates._hashes(alike)
    assert (np.bitwise_count(hashes[:, None] ^ hashes) <= duplicates.MOST_BITS).sum() >= len(alike) + 8
    found = find_duplicates(alike)
    assert (found.exact, found.near) == (0, 0)


def test_hashes_are_those_of_the_cosine_transform():
    images = random_images(50, side=32)
    grey = images.mean(axis=3)
    lowest = scipy.fft.dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(50, 64)
    bits = lowest > np.median(lowest, axis=1, keepdims=True) + duplicates.STANDS_OUT
    np.testing.assert_array_equal(duplicates._hashes(images), np.packbits(bits, axis=1).view(np.uint64)[:, 0])


def test_a_near_copy_joins_the_first_group_that_it_is_near_the_first_image_of():
    """Flat images have no frequencies to hash: their colours decide."""
    shades = np.array([40, 100, 110, 118, 109, 255], np.uint8)
    flat = np.broadcast_to(shades[:, None, None, None], (6, 16, 16, 3))
    assert len(set(duplicates._hashes(flat).tolist())) == 1
    found = find_duplicates(flat)
    # 110 is near 100; 118 is near 110, which leads no group; 109 is near 100 and near 118.
    np.testing.assert_array_equal(found.representative, [0, 1, 1, 3, 1, 5])


def test_a_fine_pattern_makes_another_image():
    """What no low frequency and no mean of a part tells."""
    pattern = 30 * (-1) ** np.indices((64, 64)).sum(axis=0)[..., None]
    both = np.stack([random_images(1, side=64)[0] // 2 + 60 + sign * pattern for sign in (1, -1)]).astype(np.uint8)
    hashes, parts = duplicates._hashes(both), duplicates._part_means(both)
    assert np.bitwise_count(hashes[0] ^ hashes[1]) <= duplicates.MOST_BITS
    assert np.abs(parts[0] - parts[1]).max() < duplicates.MOST_IN_A_PART
    assert find_duplicates(both).near == 0


def test_a_copy_of_a_near_copy_counts_as_exact():
    original = random_images(1, side=64)
    near = compressed(original[0], 80)[None]
    found = find_duplicates(np.concatenate((original, near, near, near[:, :, ::-1])))
    np.testing.assert_array_equal(found.representative, 0)
    assert (found.exact, found.near) == (2, 1)
    np.testing.assert_array_equal(found.repeats, [4])


def test_neither_chunks_nor_files_change_the_groups(monkeypatch, tmp_path):
    images = random_images(60, side=64)
    images = np.concatenate((images, images[:20], [compressed(image, 85) for image in images[20:40]]))
    images = images[np.random.default_rng(2).permutation(len(images))]
    whole = find_duplicates(images)
    assert (whole.exact, whole.near) == (20, 20)
    np.save(tmp_path / "images", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for chunk in (1, 200_000):
        monkeypatch.setattr(duplicates, "CHUNK", chunk)
        found = find_duplicates(mapped)
        np.testing.assert_array_equal(found.representative, whole.representative)
        assert found[1:] == whole[1:]


def test_the_demo_has_the_copies_that_it_was_given():
    files = sorted((DATA / "finetune").glob("*.png"))
    found = find_duplicates(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    copies = sum("-copy" in file.name for file in files)
    assert (found.exact, found.near) == (copies, 0)
    assert sorted(set(found.repeats.tolist())) == [1, 15]


def test_progress_adds_up_to_the_images(monkeypatch):
    monkeypatch.setattr(duplicates, "CHUNK", 200_000)
    done: list[int] = []
    find_duplicates(random_images(70), done.append)
    assert sum(done) == 70
    assert len(done) > 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 7), (33, 90)])
def test_images_of_any_size_can_be_compared(shape):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (4, *shape, 3), dtype=np.uint8)
    found = find_duplicates(np.concatenate((images, images[1:2, :, ::-1])))
    np.testing.assert_array_equal(found.representative, [0, 1, 2, 3, 1])


def test_no_images_have_no_duplicates():
    found = find_duplicates(np.zeros((0, 8, 8, 3), np.uint8))
    assert [part.shape for part in (found.representative, found.references, found.repeats)] == [(0,)] * 3
    assert (found.exact, found.near) == (0, 0)

"""Each image is brought to the size of its shape, and little of it is cut off."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.config.settings import DataConfig
from iet_finetune.data.buckets import Buckets, automatic_sizes, chosen_buckets, shares_outside, targets
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.errors import UserError

HASH = "00112233445566778899aabbccddeeff"
# Of photos from cameras and phones, upright and not.
ASPECTS = [(3, 2), (2, 3), (4, 3), (3, 4), (16, 9), (9, 16), (1, 1)]
sides = st.integers(1, 300)
shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=20).map(lambda sizes: np.array(sizes))


def buckets_for(text, multiple=8, longest=None, **settings) -> Buckets:
    return chosen_buckets(DataConfig(aspect_ratio_buckets=text, **settings), multiple, longest)


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_of_photos_hardly_anything_is_cut_off(resolution):
    rng = np.random.default_rng(0)
    short = rng.integers(1080, 3000, 300)
    photos = np.array([(round(a * n / min(a, b)), round(b * n / min(a, b)))
                       for n, (a, b) in zip(short.tolist(), ASPECTS * 43, strict=False)])  # fmt: skip
    buckets = buckets_for("auto", resolution=resolution)
    cut = shares_outside(photos, targets(photos, buckets)).mean()
    of_squares = shares_outside(photos, targets(photos, Buckets.square(resolution))).mean()
    assert len(photos) == 300
    assert cut < 0.03
    assert 0.28 < of_squares < 0.30


@given(st.integers(8, 1100), st.sampled_from([2, 8, 16, 64]), st.none() | st.integers(64, 1200))
def test_automatic_sizes_have_no_more_pixels_than_the_square_and_come_in_pairs(resolution, step, longest):
    sizes = automatic_sizes(resolution, step, longest)
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert 0.75 * resolution**2 <= width * height <= resolution**2
        assert max(width, height) <= min(2 * min(width, height), longest or 10**9)
    if resolution % step == 0 and resolution <= (longest or resolution):
        assert sizes[0] == (resolution, resolution)


def test_the_sizes_at_1024_pixels_are_those_of_sdxl():
    landscape = [size for size in automatic_sizes(1024, 64) if size[0] >= size[1]]
    assert landscape == [(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)]


def slowly(size, sizes, upscale):
    """The size of an image's shape, from its definition; None if there is none."""
    width, height = size
    distances = [abs(np.log(width / height) - np.log(w / h)) for w, h in sizes]
    nearest = [own for own, distance in zip(sizes, distances, strict=True) if distance < min(distances) + 1e-12]
    fitting = [(w, h) for w, h in nearest if w <= width and h <= height]
    if fitting:
        return max(fitting, key=np.prod)
    if upscale:
        return min(nearest, key=np.prod)
    return max(((w, h) for w, h in sizes if w <= width and h <= height), key=np.prod, default=None)


@given(shapes, st.booleans())
def test_an_image_has_the_size_of_the_nearest_shape_and_is_not_enlarged_where_it_must_not_be(images, upscale):
    # No two have both the same shape and the same pixels, so that there is one answer.
    sizes = ((64, 64), (96, 40), (40, 96), (32, 32), (48, 20), (200, 200))
    buckets = Buckets(sizes, upscale)
    numbers = buckets.numbers(images)
    for image, number in zip(images.tolist(), numbers.tolist(), strict=True):
        wanted = slowly(image, sizes, upscale)
        found = None if number < 0 else sizes[number]
        assert (found is None) == (wanted is None)
        assert found is None or np.prod(found) == np.prod(wanted)
        assert upscale or found is None or (found[0] <= image[0] and found[1] <= image[1])


def test_smaller_sizes_are_for_small_images_alone():
    buckets = buckets_for("auto", resolution=1024, upscale=False)
    assert buckets.of((3000, 2000)) == buckets_for("auto", resolution=1024).of((3000, 2000)) == (1216, 832)
    assert buckets.of((700, 500)) == (576, 448)
    with pytest.raises(UserError, match="smaller than"):
        buckets.of((60, 400))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("60x64", "`--aspect_ratio_buckets 60x64`: sides must be multiples of 8 for this model"),
        ("64x64,640x64", "`--aspect_ratio_buckets 64x64,640x64`: 640 x 64 has a side of more than the 512 pixels"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused_by_name(text, words):
    with pytest.raises(UserError) as caught:
        buckets_for(text, longest=512)
    assert str(caught.value).startswith(words)


@given(st.tuples(sides, sides), st.booleans(), st.booleans())
def test_an_image_covers_its_size_and_is_cropped_to_it(size, center_crop, flip):
    sizes = ((16, 16), (24, 12), (12, 20))
    transform = ImageTransform(Buckets(sizes), center_crop=center_crop, interpolation="nearest", seed=3)
    (columns, rows), (width, height) = transform.target(size), transform.resized(size)
    assert (columns, rows) in sizes
    assert (width == columns and height >= rows) or (height == rows and width >= columns)
    pixels = transform(PIL.Image.new("RGB", size), HASH, flip)
    assert pixels.shape == (3, rows, columns)
    stored_height, stored_width, top, left = transform.place(size, HASH, flip)
    assert (stored_width, stored_height) == size
    assert 0 <= top <= height - rows
    assert 0 <= left <= width - columns


def test_the_transform_of_one_size_is_that_of_several():
    image = PIL.Image.effect_noise((50, 30), 90).convert("RGB")
    several = ImageTransform(Buckets(((16, 16), (24, 16))), center_crop=False, interpolation="lanczos", seed=0)
    one = several.at((24, 16))
    assert np.array_equal(several(image, HASH, True), one(image, HASH, True))
    assert (
        one.key
        != several.at((16, 16)).key
        == ImageTransform(16, center_crop=False, interpolation="lanczos", seed=0).key
    )

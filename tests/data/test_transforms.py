"""Every kind of image becomes the right training tensor."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.data.images import check_image, decode_rgb
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.errors import UserError

HASH = "00112233445566778899aabbccddeeff"


def transform(resolution=16, center_crop=True, interpolation="lanczos", seed=0):
    return ImageTransform(resolution, center_crop=center_crop, interpolation=interpolation, seed=seed)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(image, format="PNG", **options):
    return decode_rgb(encoded(image, format, **options), "x")


def box_resized(pixels, rows, columns):
    """Means over whole blocks: the box filter written from its definition, for sizes that divide."""
    height, width, _ = pixels.shape
    blocks = pixels.astype(np.float64).reshape(rows, height // rows, columns, width // columns, 3)
    return blocks.mean(axis=(1, 3))


@pytest.mark.parametrize("flip", [False, True])
def test_the_tensor_equals_block_means_cropped_at_the_centre_flipped_and_scaled(flip):
    image = picture(64, 32)
    wanted = box_resized(np.asarray(image), 8, 16)[:, 4:12]
    wanted = wanted[:, ::-1] if flip else wanted
    pixels = transform(8, interpolation="box")(image, HASH, flip)
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 8, 8)
    # Pillow rounds after each of its two directions, so a value may be off by one of 255 steps.
    assert np.abs(pixels.numpy().transpose(1, 2, 0) - (wanted / 127.5 - 1)).max() <= 1.01 / 127.5


@given(st.integers(8, 40), st.integers(0, 30), st.integers(0, 30), st.booleans(), st.booleans())
def test_an_image_whose_shorter_side_fits_keeps_its_exact_values(resolution, extra, seed, tall, flip):
    size = (resolution, resolution + extra) if tall else (resolution + extra, resolution)
    image = picture(*size, seed=seed)
    t = transform(resolution, center_crop=False, seed=seed)
    top, left = t.crop_offset(size, HASH)
    wanted = np.asarray(image)[top : top + resolution, left : left + resolution].astype(np.float32)
    wanted = wanted[:, ::-1] if flip else wanted
    pixels = t(image, HASH, flip)
    assert np.array_equal(pixels.numpy(), (wanted / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1))


def test_black_is_minus_one_and_white_is_one():
    for value, level in ((0, -1.0), (255, 1.0)):
        pixels = transform()(PIL.Image.new("RGB", (50, 70), (value,) * 3), HASH, False)
        assert torch.equal(pixels, torch.full((3, 16, 16), level))


def test_the_tensor_is_contiguous_and_shares_memory_with_nothing():
    image = picture(16, 16)
    before = np.array(image)
    first, second = transform()(image, HASH, True), transform()(image, HASH, True)
    assert first.is_contiguous()
    first.zero_()
    assert second.abs().max() > 0
    assert np.array_equal(np.asarray(image), before)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 64), st.integers(0, 2**40), st.booleans())
def test_tall_wide_and_tiny_images_are_resized_by_their_shorter_side_and_cropped_inside(w, h, r, seed, center):
    t = transform(r, center_crop=center, seed=seed)
    width, height = t.resized((w, h))
    assert min(width, height) == r
    assert max(width, height) == int(r * max(w, h) / min(w, h))
    top, left = t.crop_offset((width, height), HASH)
    assert 0 <= top <= height - r
    assert 0 <= left <= width - r


def test_an_image_of_one_pixel_fills_the_square_with_its_colour():
    pixels = transform()(PIL.Image.new("RGB", (1, 1), (255, 0, 255)), HASH, False)
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 16, 16))


def test_the_centre_crop_is_in_the_middle_and_rounds_half_to_even():
    assert transform(16).crop_offset((26, 16), HASH) == (0, 5)
    assert transform(16).crop_offset((16, 21), HASH) == (2, 0)
    assert transform(16).crop_offset((16, 23), HASH) == (4, 0)


def test_the_random_crop_is_the_documented_formula():
    words = np.random.SeedSequence([7, int(HASH, 16)]).generate_state(2, np.uint64)
    wanted = tuple(int(word) * n // 2**64 for word, n in zip(words, (41, 85), strict=True))
    assert transform(16, center_crop=False, seed=7).crop_offset((100, 56), HASH) == wanted
    # Fixed for good: a cache that was written with another place would be wrong.
    assert wanted == (8, 47)


def test_random_crops_reach_every_place_about_equally_often():
    t = transform(8, center_crop=False)
    places = np.zeros((3, 2))
    for number in range(1200):
        places[t.crop_offset((9, 10), f"{number:032x}")] += 1
    assert places.min() > 150
    assert places.max() < 250


def test_random_crops_differ_by_seed_and_by_contents():
    size = (1000, 1000)
    offset = transform(8, center_crop=False, seed=1).crop_offset(size, HASH)
    assert offset != transform(8, center_crop=False, seed=2).crop_offset(size, HASH)
    assert offset != transform(8, center_crop=False, seed=1).crop_offset(size, HASH[::-1])


def test_every_setting_that_changes_pixels_is_in_the_key():
    keys = {
        transform().key,
        transform(resolution=32).key,
        transform(interpolation="box").key,
        transform(center_crop=False).key,
        transform(center_crop=False, seed=1).key,
    }
    assert len(keys) == 5
    assert transform(seed=1).key == transform(seed=2).key  # a centre crop draws nothing


def test_a_change_of_decoding_changes_the_key(monkeypatch):
    before = transform().key, transform().scaling
    monkeypatch.setattr("iet_finetune.data.transforms.DECODING", 99)
    assert transform().key != before[0]
    assert transform().scaling != before[1]


def test_different_filters_give_different_pixels():
    image = picture(50, 50)
    names = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
    results = [transform(interpolation=name)(image, HASH, False) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def whole_then_cropped(t, image):
    """The crop as it is for images of ordinary shape: of the whole resized image."""
    top, left = t.crop_offset(t.resized(image.size), HASH)
    whole = image.resize(t.resized(image.size), PIL.Image.Resampling[t.interpolation.upper()])
    return np.asarray(whole)[top : top + t.buckets.sizes[0][0], left : left + t.buckets.sizes[0][0]].astype(float)


def levels(pixels):
    return np.rint((pixels.numpy().transpose(1, 2, 0) + 1) * 127.5)


def is_halfway(t, image):
    """(resolution,) the rows or columns along the long side at which nearest and box have a choice of pixels."""
    axis = int(np.argmax(image.size))
    scale = max(image.size) / max(t.resized(image.size))
    top, left = t.crop_offset(t.resized(image.size), HASH)
    centres = ((left, top)[axis] + np.arange(t.buckets.sizes[0][0]) + 0.5) * scale
    reach = 0 if t.interpolation == "nearest" else max(scale, 1) / 2 - 0.5
    edges = np.stack([centres - reach, centres + reach])
    return (np.abs(edges - np.rint(edges)) < 1e-4).any(0), axis


@given(
    *(st.integers(1, 40), st.floats(1, 30), st.integers(8, 48), st.booleans(), st.integers(0, 99)),
    st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
)
def test_of_an_elongated_image_only_the_part_that_is_needed_is_resized(short, ratio, resolution, tall, seed, filter):
    size = (short, int(short * 4 * ratio) + 1)
    image = picture(*(size if tall else size[::-1]), seed=seed)
    t = transform(resolution, center_crop=False, interpolation=filter, seed=seed)
    difference = np.abs(levels(t(image, HASH, False)) - whole_then_cropped(t, image))
    if filter in ("nearest", "box"):
        halfway, axis = is_halfway(t, image)
        difference = np.delete(difference, halfway, axis=1 - axis)
    assert (difference <= 1).mean() > 0.999
    # A step of rounding between the two passes is more than one after the second, where a filter sharpens.
    assert difference.max(initial=0) <= (2 if filter in ("bicubic", "lanczos") else 1)


@given(st.integers(8, 60), st.floats(1, 4), st.integers(8, 48), st.booleans(), st.integers(0, 99))
def test_an_image_of_ordinary_shape_has_the_bits_of_the_whole_resized_image(short, ratio, resolution, tall, seed):
    size = (short, int(short * ratio))
    image = picture(*(size if tall else size[::-1]), seed=seed)
    t = transform(resolution, center_crop=False, seed=seed)
    assert np.array_equal(levels(t(image, HASH, False)), whole_then_cropped(t, image))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_line_is_enlarged_to_the_square_alone(size):
    # All of it would be 1024 x 61,440,000 pixels.
    assert levels(transform(1024)(picture(*size), HASH, False)).std() > 20


TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_turns_the_image_upright(orientation):
    image = picture(5, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(decoded(image, exif=exif))
    assert np.array_equal(upright, TURNED[orientation](np.asarray(image)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_put_on_white(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    pixels = pixels if mode == "RGBA" else pixels[..., [0, 3]]
    result = np.asarray(decoded(PIL.Image.fromarray(pixels))).astype(float)
    colour = np.broadcast_to(pixels[..., :-1], (4, 6, 3)).astype(float)
    alpha = pixels[..., -1:] / 255
    assert np.abs(result - (alpha * colour + (1 - alpha) * 255)).max() <= 1
    assert (result[0] == 255).all()
    assert np.array_equal(result[1], colour[1])


def test_the_transparent_entry_of_a_palette_becomes_white_and_the_others_their_colour():
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 0, 1, 2, 3])
    for column in range(3):
        image.putpixel((column, 0), column)
    result = np.asarray(decoded(image, transparency=1))
    assert result[0].tolist() == [[10, 20, 30], [255, 255, 255], [1, 2, 3]]


def test_a_colour_marked_transparent_in_an_rgb_image_becomes_white():
    image = PIL.Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (10, 20, 31))
    assert np.asarray(decoded(image, transparency=(10, 20, 30)))[0].tolist() == [[255, 255, 255], [10, 20, 31]]


def test_grey_and_black_and_white_become_three_equal_channels():
    grey = PIL.Image.fromarray(np.array([[0, 77, 255]], np.uint8))
    assert np.asarray(decoded(grey))[0].tolist() == [[0] * 3, [77] * 3, [255] * 3]
    assert np.asarray(decoded(grey.point(lambda v: v > 76, mode="1")))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_high_byte(format):
    values = np.array([[0, 255, 256, 30000, 65535]], np.uint16)
    result = np.asarray(decoded(PIL.Image.fromarray(values), format))
    assert result.shape == (1, 5, 3)
    assert result[0, :, 0].tolist() == [0, 0, 1, 117, 255]
    assert (result == result[..., :1]).all()


def test_the_transparent_value_of_sixteen_bit_grey_becomes_white():
    values = np.array([[300, 30000]], np.uint16)
    assert np.asarray(decoded(PIL.Image.fromarray(values), transparency=300))[0, :, 0].tolist() == [255, 117]


def test_cmyk_becomes_the_rgb_of_its_inks():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    result = np.asarray(decoded(PIL.Image.fromarray(inks, mode="CMYK"), "TIFF"))
    assert result[0].tolist() == [[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    image = decoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(image).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


@pytest.mark.parametrize("values", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32)])
def test_pixels_without_a_fixed_range_are_refused_by_name_before_decoding(values):
    data = encoded(PIL.Image.fromarray(values), "TIFF")
    with pytest.raises(UserError, match="`odd.tif` has pixels of mode [FI], whose range is not fixed"):
        check_image(data, "odd.tif")


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused_by_name(data):
    for read in (check_image, decode_rgb):
        with pytest.raises(UserError, match="`odd.png` is not"):
            read(data, "odd.png")


def test_an_image_cut_off_in_its_pixels_passes_the_header_check_and_is_named_when_decoded():
    data = encoded(picture(64, 64))
    check_image(data[: len(data) // 2], "cut.png")
    with pytest.raises(UserError, match=r"`cut.png` cannot be decoded: .*truncated"):
        decode_rgb(data[: len(data) // 2], "cut.png")

"""A look at an image finds what is wrong with it, at less than the cost of decoding it."""

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.data import dedup, hashes
from iet_finetune.data.dedup import without_copies
from iet_finetune.data.images import Looked, decode_rgb, look_at
from iet_finetune.errors import UserError

from .made import load_all, refusal, simple_folder


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width=64, height=48):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "JPEG"}, {"format": "WEBP"}, {"format": "TIFF"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_image(options, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(33, 20), **options, exif=exif)
    assert look_at(data, "x") == (*decode_rgb(data, "x").size, False)
    assert decode_rgb(data, "x").size == ((33, 20) if orientation <= 4 else (20, 33))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "progressive JPEG", "WEBP", "TIFF", "GIF"])
@given(share=st.floats(0.3, 0.98))
def test_an_image_cut_off_in_its_pixels_is_named(format, share):
    progressive = {"progressive": True} if format.startswith("progressive") else {}
    data = encoded(noise(), format.split()[-1], **progressive)
    for read in (look_at, decode_rgb):
        with pytest.raises(UserError, match=r"`cut.x` (cannot be decoded|is not)") as caught:
            read(data[: int(len(data) * share)], "cut.x")
        assert "\n" not in str(caught.value)


def grey16(values):
    return PIL.Image.fromarray(np.asarray(values, np.uint16).reshape(1, -1))


def test_sixteen_bit_values_in_a_sixteenth_of_their_range_are_narrow():
    assert look_at(encoded(grey16(np.arange(0, 4096))), "x").narrow
    assert look_at(encoded(grey16(np.arange(0, 4096)), "TIFF"), "x").narrow
    assert not look_at(encoded(grey16(np.arange(0, 4097))), "x").narrow
    assert not look_at(encoded(grey16(np.arange(0, 65536, 16))), "x").narrow


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_mask_of_zeros_and_ones_is_narrow(mode):
    mask = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 2, (40, 30), np.uint8)).convert(mode)
    assert look_at(encoded(mask), "x") == Looked(30, 40, True)
    assert not look_at(encoded(mask.point(lambda value: 16 * value)), "x").narrow


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_one_even_colour_is_narrow_and_two_are_not(format):
    image = PIL.Image.new("RGB", (40, 30), (255, 0, 20))
    assert look_at(encoded(image, format), "x").narrow
    image.paste((255, 0, 200), (0, 0, 20, 30))
    assert not look_at(encoded(image, format), "x").narrow


def test_black_on_a_transparent_ground_is_not_narrow():
    image = PIL.Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    assert look_at(encoded(image), "x").narrow
    image.paste((0, 0, 0, 255), (10, 10, 20, 20))
    assert not look_at(encoded(image), "x").narrow


def test_fine_patterns_are_not_taken_for_an_even_area():
    checks = PIL.Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    data = encoded(checks, "JPEG", quality=95)
    eighth = PIL.Image.open(io.BytesIO(data))
    eighth.draft(None, (8, 8))
    low, high = eighth.getextrema()
    assert high - low < 16
    assert look_at(data, "x") == (64, 64, False)


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_other_colour_spaces_are_looked_at_too(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 4 if mode == "CMYK" else 3), np.uint8)
    image = PIL.Image.frombytes(mode, (9, 8), pixels.tobytes())
    data = encoded(image, "TIFF")
    assert look_at(data, "x") == (*decode_rgb(data, "x").size, False)
    assert look_at(encoded(PIL.Image.frombytes(mode, (9, 8), bytes(pixels.nbytes)), "TIFF"), "x").narrow


def test_floating_point_is_refused():
    data = encoded(PIL.Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF")
    with pytest.raises(UserError, match="`x.tif` has pixels of mode F, whose range is not fixed"):
        look_at(data, "x.tif")


def test_the_limit_of_pixels_is_that_of_the_flag(tmp_path):
    folder = simple_folder(tmp_path / "images")  # of 10 x 12 pixels
    assert load_all(folder, max_image_pixels=120).subset([1, 2]).max_pixels == 120
    assert "000.png` has 120 pixels (10 x 12), more than `--max_image_pixels 119`. Shrink it" in refusal(
        folder, max_image_pixels=119, cache_dir=str(tmp_path / "cache")
    )


def test_an_image_is_decoded_within_the_limit_of_its_set(tmp_path):
    (simple_folder(tmp_path / "images") / "000.png").write_bytes(data := encoded(noise(), "JPEG"))
    images = load_all(tmp_path / "images", max_image_pixels=1000)
    assert np.array_equal(images.subset([0]).load(0), decode_rgb(data, "x", 1000))
    assert images.load(0).size == (32, 24)


@pytest.mark.parametrize("change", ["decoding", "limit"])
def test_copies_that_were_found_in_other_pixels_are_looked_for_again(tmp_path, monkeypatch, change):
    images = load_all(simple_folder(tmp_path / "images", numbers=[0, 0, 1, 2, 3, 4]))
    cache = str(tmp_path / "cache")
    assert len(without_copies(images, "exact", 64, cache)[0]) == 5
    looked = []
    monkeypatch.setattr(dedup, "_first_of_each", lambda *_: looked.append(1) or (np.arange(6), np.zeros(6, bool)))
    without_copies(images, "exact", 64, cache)
    assert not looked
    if change == "decoding":
        monkeypatch.setattr(dedup, "DECODING", 99)
    else:
        images = replace(images, max_pixels=1000)
    without_copies(images, "exact", 64, cache)
    assert looked


def test_an_image_is_checked_again_when_decoding_has_changed(tmp_path, monkeypatch):
    checked = []

    def check(index):
        checked.append(index)
        return bytes(hashes.HASH_BYTES)

    for decoding in (98, 98, 99):
        monkeypatch.setattr(hashes, "DECODING", decoding)
        hashes.remembered(["stamp"], check, hashes.HASH_BYTES, "source", str(tmp_path))
    assert checked == [0, 0]

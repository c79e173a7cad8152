"""Colours of images with a profile become those of sRGB."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms

from iet_finetune.data import colours
from iet_finetune.data.images import decode_rgb

from .profiles import (
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    lab_to_srgb,
    levels,
    linear,
    matrix_profile,
    p3_to_srgb,
)

P3 = matrix_profile(DISPLAY_P3)
LINEAR_GREY = grey_profile(np.linspace(0, 1, 256))
WHITE, BLACK, CYAN, RED = (100, 0, 0), (0, 0, 0), (60, -40, -45), (50, 70, 50)
INKS = np.empty((2, 2, 2, 2, 3))
INKS[...] = BLACK
INKS[0, 0, 0, 0], INKS[1, 0, 0, 0], INKS[0, 1, 1, 0] = WHITE, CYAN, RED


def noise(mode="RGB", size=(40, 30), seed=0):
    shape = (size[1], size[0], len(PIL.Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return PIL.Image.frombytes(mode, size, pixels.tobytes())


def decoded(image, profile, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, icc_profile=profile, **options)
    return np.asarray(decode_rgb(file.getvalue(), "x"))


def test_display_p3_becomes_srgb_as_the_formulas_say():
    image = noise()
    wanted = p3_to_srgb(np.asarray(image))
    assert np.abs(wanted - np.asarray(image)).max() > 50
    assert np.abs(decoded(image, P3) - wanted).max() <= 2


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_every_colour_of_display_p3_does(colour):
    image = PIL.Image.new("RGB", (1, 1), colour)
    assert np.abs(decoded(image, P3)[0, 0] - p3_to_srgb(colour)).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "WEBP"])
def test_the_profile_is_found_in_every_format_that_has_one(format):
    image = PIL.Image.new("RGB", (16, 16), (40, 200, 60))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}[format]
    assert np.abs(decoded(image, P3, format, **options) - p3_to_srgb([40, 200, 60])).max() <= 4


def test_alpha_is_kept_while_the_colours_are_converted():
    image = noise("RGBA")
    colour, alpha = np.split(np.asarray(image), [3], -1)
    wanted = p3_to_srgb(colour) * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(decoded(image, P3) - wanted).max() <= 3


def test_palettes_and_colours_marked_transparent_are_converted():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([40, 200, 60, 200, 100, 0])
    image.putpixel((1, 0), 1)
    pixels = decoded(image, P3, transparency=1)[0]
    assert np.abs(pixels[0] - p3_to_srgb([40, 200, 60])).max() <= 2
    assert pixels[1].tolist() == [255, 255, 255]
    image = image.convert("RGB")
    assert np.array_equal(decoded(image, P3, transparency=(200, 100, 0))[0], pixels)


def test_a_turned_image_is_converted_too():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = noise()
    wanted = np.rot90(p3_to_srgb(np.asarray(image)), -1)
    assert np.abs(decoded(image, P3, exif=exif) - wanted).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_converted_by_a_profile_of_grey(mode):
    values = np.arange(256, dtype=np.uint8)[None]
    image = PIL.Image.fromarray(values)
    if mode == "LA":
        image.putalpha(255)
    if mode == "I;16":
        image = PIL.Image.fromarray(values.astype(np.uint16) * 257)
    pixels = decoded(image, LINEAR_GREY)
    assert np.abs(pixels - levels(values / 255)[..., None]).max() <= 2
    assert (pixels == pixels[..., :1]).all()


def test_inks_become_the_colours_that_their_profile_tells():
    image = PIL.Image.new("CMYK", (4, 1))
    for column, inks in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)]):
        image.putpixel((column, 0), inks)
    pixels = decoded(image, cmyk_profile(INKS), "TIFF")[0]
    assert np.abs(pixels - lab_to_srgb([WHITE, CYAN, RED, BLACK])).max() <= 2
    # Half of an ink is halfway in L*a*b*, in which the profile interpolates.
    image = PIL.Image.new("CMYK", (1, 1), (128, 0, 0, 0))
    assert np.abs(decoded(image, cmyk_profile(INKS), "TIFF")[0] - lab_to_srgb([80, -20, -22.5])).max() <= 3


@pytest.mark.parametrize("with_profile", [False, True])
def test_lab_becomes_the_colours_of_its_definition(with_profile):
    lab = np.array([[100, 0, 0], [0, 0, 0], [54, 0, 0], [60, -30, 20], [60, 30, -20], [40, 10, 30]])
    values = np.rint(lab * [2.55, 1, 1]).astype(int)
    # In a TIFF, as in these bytes, a* and b* are signed.
    image = PIL.Image.frombytes("LAB", (len(lab), 1), (values % 256).astype(np.uint8).tobytes())
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes() if with_profile else None
    assert np.abs(decoded(image, profile, "TIFF")[0] - lab_to_srgb(values / [2.55, 1, 1])).max() <= 2


def dark_table(count):
    """sRGB's curve in a table of `count` places, between which it is straight."""
    return linear(np.linspace(0, 255, count))


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        matrix_profile(SRGB),
        matrix_profile(SRGB, dark_table(256)),
        matrix_profile(((0.6401, 0.3300), (0.3000, 0.6001), (0.1500, 0.0601)), dark_table(4096)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_pixels_that_are_srgb_already_keep_their_bits(profile, mode):
    image = noise().convert(mode) if mode == "P" else noise(mode)
    assert np.array_equal(decoded(image, profile), decoded(image, None))


def test_grey_with_the_curve_of_srgb_keeps_its_bits():
    assert np.array_equal(decoded(noise("L"), grey_profile(dark_table(1024))), decoded(noise("L"), None))


def test_the_curve_of_rec_709_is_not_taken_for_that_of_srgb():
    at = np.linspace(0, 1, 1024)
    curve = np.where(at < 0.081, at / 4.5, ((at + 0.099) / 1.099) ** (1 / 0.45))
    assert not np.array_equal(decoded(noise(), matrix_profile(SRGB, curve)), np.asarray(noise()))


BROKEN = P3[:200]
SHORT_TABLE = P3[:128] + b"\0\0\0\x01" + P3[132:]


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile"),
        ("RGB", BROKEN),
        ("RGB", SHORT_TABLE),
        ("RGB", cmyk_profile(INKS)),
        ("RGB", LINEAR_GREY),
        ("L", P3),
        ("1", LINEAR_GREY),
        ("CMYK", P3),
    ],
)
def test_a_profile_that_is_broken_or_for_other_pixels_is_ignored(mode, profile):
    image = noise("RGB").convert(mode)
    assert np.array_equal(decoded(image, profile, "TIFF"), decoded(image, None, "TIFF"))


@given(st.integers(128, len(P3) - 1), st.binary(min_size=1, max_size=8))
def test_no_damage_to_a_profile_stops_an_image_from_being_read(place, damage):
    profile = P3[:place] + damage + P3[place + len(damage) :]
    assert decoded(noise(size=(3, 2)), profile, "TIFF").shape == (2, 3, 3)


def test_a_profile_is_read_once_however_many_images_have_it(monkeypatch):
    built = []

    class Counted(ImageCms.ImageCmsTransform):
        def __init__(self, *args, **options):
            built.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(ImageCms, "ImageCmsTransform", Counted)
    colours._converter.cache_clear()
    for seed in range(5):
        decoded(noise(seed=seed), P3)
        decoded(noise(seed=seed), matrix_profile(SRGB))
    assert len(built) == 2


def test_threads_may_convert_at_the_same_time():
    images = [noise(size=(400, 300), seed=seed) for seed in range(16)]
    wanted = [decoded(image, P3) for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda image: decoded(image, P3), images * 3))
    assert all(np.array_equal(a, b) for a, b in zip(results, wanted * 3, strict=True))

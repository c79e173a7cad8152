"""Images are opened within our own limits, and Pillow's stay as they are."""

import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from PIL.PngImagePlugin import PngInfo

from iet_finetune.data.images import check_image, decode_rgb, look_at
from iet_finetune.errors import UserError

from .profiles import DISPLAY_P3, matrix_profile, p3_to_srgb

PILLOWS_LIMIT = PIL.Image.MAX_IMAGE_PIXELS


@pytest.fixture(autouse=True)
def pillow_stays_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert PIL.Image.MAX_IMAGE_PIXELS == PILLOWS_LIMIT


def noise(width=20, height=10, mode="RGB", seed=0):
    image = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8))
    return image.convert(mode)


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_chunk(png, kind, body, place=33):
    """A PNG with one more chunk, after the header unless told otherwise."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:place] + chunk + png[place:]


WORKFLOW = b'{"nodes": [' + b'{"id": 1, "type": "KSampler"}, ' * 200_000 + b"]}"
TEXTS = {
    b"tEXt": b"workflow\0" + WORKFLOW * 12,
    b"zTXt": b"workflow\0\0" + zlib.compress(WORKFLOW),
    b"iTXt": b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW),
}


@pytest.mark.parametrize("after_the_pixels", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_png_with_a_large_text_is_read(kind, after_the_pixels):
    image = noise()
    plain = saved(image)
    data = with_chunk(plain, kind, TEXTS[kind], len(plain) - 12 if after_the_pixels else 33)
    with pytest.raises(ValueError, match=r"too large|Too much"):
        PIL.Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decode_rgb(data, "x"), image)
    assert look_at(data, "x") == (20, 10, False)


def test_a_text_that_turns_the_image_is_heeded_next_to_a_large_one():
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')
    data = with_chunk(saved(noise(), pnginfo=xmp), b"zTXt", TEXTS[b"zTXt"])
    assert np.array_equal(decode_rgb(data, "x"), np.rot90(np.asarray(noise()), -1))


def test_a_colour_profile_is_heeded_however_long_it_is():
    profile = matrix_profile(DISPLAY_P3)
    profile += np.random.default_rng(0).bytes(2 << 20)  # a profile may hold anything else at its end
    profile = struct.pack(">I", len(profile)) + profile[4:]
    data = with_chunk(saved(noise()), b"iCCP", b"name\0\0" + zlib.compress(profile))
    with pytest.raises(ValueError, match="too large"):
        PIL.Image.open(io.BytesIO(data))
    assert np.abs(np.asarray(decode_rgb(data, "x")) - p3_to_srgb(np.asarray(noise()))).max() <= 2


@pytest.mark.parametrize("body", [b"", b"name", b"name\0\0no zlib", b"name\0\7" + zlib.compress(b"x")])
def test_a_broken_colour_profile_is_ignored(body):
    assert np.array_equal(decode_rgb(with_chunk(saved(noise()), b"iCCP", body), "x"), noise())


@pytest.mark.parametrize("kept", [20, 40, 60, 90])
def test_a_png_that_ends_within_a_text_is_named(kept):
    data = with_chunk(saved(noise()), b"tEXt", b"a\0" + b"b" * 100)[: 33 + kept]
    with pytest.raises(UserError, match="`cut.png`"):
        decode_rgb(data, "cut.png")


@pytest.mark.parametrize(("limit", "scale"), [(2048, 1), (2047, 2), (512, 2), (511, 4), (128, 4), (127, 8), (32, 8)])
def test_a_jpeg_beyond_the_limit_is_decoded_at_the_largest_size_within_it(limit, scale):
    data = saved(noise(8, 4).resize((64, 32), PIL.Image.Resampling.BICUBIC), "JPEG", quality=95)
    decoded = decode_rgb(data, "x", limit)
    assert decoded.size == (64 // scale, 32 // scale)
    assert look_at(data, "x", limit)[:2] == decoded.size
    means = decode_rgb(data, "x").resize(decoded.size, PIL.Image.Resampling.BOX)
    assert np.abs(np.asarray(decoded).astype(float) - means).mean() < 4


def test_a_reduced_jpeg_is_turned_and_converted_like_a_whole_one():
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    image = PIL.Image.new("RGB", (64, 32), (40, 200, 60))
    options = {"quality": 100, "subsampling": 0, "exif": exif, "icc_profile": matrix_profile(DISPLAY_P3)}
    decoded = decode_rgb(saved(image, "JPEG", **options), "x", 600)
    assert decoded.size == (16, 32)
    assert np.abs(np.asarray(decoded) - p3_to_srgb([40, 200, 60])).max() <= 4


def test_a_picture_of_several_frames_from_a_camera_is_reduced_as_a_jpeg():
    data = saved(noise(64, 32), "MPO", save_all=True, append_images=[noise(64, 32, seed=1)])
    assert PIL.Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_rgb(data, "x", 600).size == (32, 16)


TOO_LARGE = r"`big.x` has 200 pixels \(20 x 10\), more than `--max_image_pixels 199`. "


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "BMP", "JPEG2000", "progressive"])
def test_other_images_beyond_the_limit_are_refused_with_their_pixels_and_the_flag(format):
    data = saved(noise(), "JPEG", progressive=True) if format == "progressive" else saved(noise(), format)
    for read in (check_image, look_at, decode_rgb):
        read(data, "big.x", 200)
        with pytest.raises(UserError, match=TOO_LARGE):
            read(data, "big.x", 199)


def test_a_jpeg_that_is_too_large_at_an_eighth_is_refused_too():
    with pytest.raises(UserError, match=r"has 200 pixels \(20 x 10\), more than `--max_image_pixels 5`"):
        check_image(saved(noise(), "JPEG"), "x", 5)


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "packbits"})])
def test_pillows_own_limit_neither_warns_nor_refuses(monkeypatch, format, options):
    # Lowered instead of images of 90 and 180 million pixels.
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr("iet_finetune.data.opening._PILLOWS_LIMIT", 50)
    data = saved(noise(), format, **options)
    assert np.array_equal(decode_rgb(data, "x"), noise())
    assert look_at(data, "x") == (20, 10, False)
    assert PIL.Image.MAX_IMAGE_PIXELS == 50
    monkeypatch.undo()


def test_a_format_that_compares_with_pillows_limit_on_opening_is_read_too(monkeypatch):
    data = saved(noise(), "WEBP", lossless=True)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    monkeypatch.setattr("iet_finetune.data.opening._PILLOWS_LIMIT", 50)
    with pytest.raises(PIL.Image.DecompressionBombError):
        PIL.Image.open(io.BytesIO(data))
    assert np.array_equal(decode_rgb(data, "x"), noise())
    with pytest.raises(UserError, match=TOO_LARGE):
        decode_rgb(data, "big.x", 199)
    monkeypatch.undo()


def test_every_format_is_recognised_as_pillow_does():
    for format in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "ICO", "TGA", "PCX", "DDS", "SGI"):
        data = saved(noise(16, 16), format)
        wanted = PIL.Image.open(io.BytesIO(data)).convert("RGBA")
        white = PIL.Image.new("RGBA", wanted.size, "white")
        wanted = PIL.Image.alpha_composite(white, wanted).convert("RGB")
        assert np.array_equal(decode_rgb(data, format), wanted), format

"""Decodes images to RGB: applies colour profiles, orientation, transparency and bit depth."""

from typing import NamedTuple, cast

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from ..errors import UserError, one_line
from .colours import to_srgb
from .opening import MAX_PIXELS, SIXTEEN_BIT_MODES, load_pixels, open_image, reduce_jpeg

# Part of what names cached results. Count it up whenever `decode_rgb` or `ImageTransform` may give other pixels.
DECODING = 2
# Images whose channels span fewer of the 256 levels look like one colour.
_NARROW = 16


class Looked(NamedTuple):
    """What a look at an image tells.

    Attributes:
        width, height: the size of the image that `decode_rgb` returns, in pixels.
        narrow: whether the values of each channel lie within 16 of 256 levels. Such an image is one even area, a mask
            saved as 0 and 1, or a 16-bit one that uses less than 1/16 of its range and so comes out nearly black.
    """

    width: int
    height: int
    narrow: bool


def check_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Reads the header of an encoded image without decoding its pixels.

    Raises:
        UserError: `decode_rgb` cannot read the image; names `name`.
    """
    open_image(data, name, max_pixels)


def look_at(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Looked:
    """Decodes an image for once, so that a broken one is found before it is needed.

    A JPEG is decoded at 1/8 of its size, which reads all of its data in half the time. Profiles are not applied.

    Raises:
        UserError: as `decode_rgb`.
    """
    image = open_image(data, name, max_pixels)
    width, height = image.size
    reduce_jpeg(image, 8)
    is_reduced = image.size != (width, height)
    try:
        load_pixels(image)
        if image.getexif().get(PIL.ExifTags.Base.Orientation) in (5, 6, 7, 8):
            width, height = height, width
        narrow = _is_narrow(_rgb(image, None))
    except Exception as error:
        raise _undecodable(name, error) from error
    if narrow and is_reduced:  # means of 8 x 8 pixels may be alike where the pixels are not
        narrow = _is_narrow(decode_rgb(data, name, max_pixels))
    return Looked(width, height, narrow)


def decode_rgb(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Decodes an image to mode RGB.

    Converts colours to sRGB if the image has another profile (see `colours.to_srgb`), applies the EXIF orientation,
    composites transparency onto white, keeps the high byte of 16-bit grey (as Pillow does for 16-bit colour), and
    takes the first of several frames. A JPEG of more than `max_pixels` comes at a reduced size (see
    `opening.open_image`).

    Raises:
        UserError: `data` is not an image, is truncated, has pixels without a fixed range, or too many of them; names
            `name`.
    """
    image = open_image(data, name, max_pixels)
    try:
        load_pixels(image)
        return _rgb(image, image.info.get("icc_profile")).convert("RGB")
    except Exception as error:  # Pillow's decoders raise all kinds of errors, from OSError to struct.error
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> UserError:
    return UserError(f"`{name}` cannot be decoded: {one_line(error)}. Replace or remove it.")


def _rgb(image: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """Upright and on white, in mode RGB; the image itself, turned in place, if no more is to be done."""
    PIL.ImageOps.exif_transpose(image, in_place=True)
    return _on_white(to_srgb(_eight_bit(image), profile))


def _eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode != "I" and image.mode not in SIXTEEN_BIT_MODES:
        return image
    values = np.array(image)  # Pillow's own conversion clips at 255, which turns nearly everything white
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return PIL.Image.fromarray((values >> 8).astype(np.uint8))


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def _is_narrow(image: PIL.Image.Image) -> bool:
    extrema = cast(tuple[tuple[int, int], ...], image.getextrema())  # of an RGB image
    return all(high - low < _NARROW for low, high in extrema)

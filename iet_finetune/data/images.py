"""Decodes images to RGB: applies orientation, transparency and bit depth."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..errors import UserError, one_line

# Modes that Pillow converts to RGB unambiguously: "F" (floating point) has no fixed white, LAB wants a colour profile.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
# Formats whose 32-bit mode "I" holds 16-bit grey; elsewhere its range is unknown.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def check_image(data: bytes, name: str) -> None:
    """Reads the header of an encoded image without decoding its pixels.

    Raises:
        UserError: `decode_rgb` cannot read the image; names `name`.
    """
    _open(data, name)


def decode_rgb(data: bytes, name: str) -> PIL.Image.Image:
    """Decodes an image to mode RGB.

    Applies the EXIF orientation, composites transparency onto white, keeps the high byte of 16-bit grey (as Pillow
    does for 16-bit colour), takes the first of several frames and ignores colour profiles.

    Raises:
        UserError: `data` is not an image, is truncated, or has pixels without a fixed range; names `name`.
    """
    image = _open(data, name)
    try:
        image.load()
        image = PIL.ImageOps.exif_transpose(image)
        return _on_white(_eight_bit(image))
    except Exception as error:  # Pillow's decoders raise all kinds of errors, from OSError to struct.error
        raise UserError(f"`{name}` cannot be decoded: {one_line(error)}. Replace or remove it.") from error


def _open(data: bytes, name: str) -> PIL.Image.Image:
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError:
        raise UserError(f"`{name}` is not an image that Pillow can read. Replace or remove it.") from None
    except Exception as error:
        raise UserError(f"`{name}` is not a readable image: {one_line(error)}. Replace or remove it.") from error
    known = image.mode in _EIGHT_BIT_MODES + _SIXTEEN_BIT_MODES
    if not known and not (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        raise UserError(
            f"`{name}` has pixels of mode {image.mode}, whose range is not fixed. Convert it to 8-bit RGB."
        )
    return image


def _eight_bit(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode != "I" and image.mode not in _SIXTEEN_BIT_MODES:
        return image
    values = np.array(image).astype(
        np.int64
    )  # Pillow's own conversion clips at 255, which turns nearly everything white
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return PIL.Image.fromarray((values >> 8).astype(np.uint8))


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, layer).convert("RGB")

"""Converts the colours of images to sRGB, by the colour profiles that they carry."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL.Image
from PIL import ImageCms

# The colour space that a profile must have to fit the pixels of a mode.
_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
# Relative colorimetric with black point compensation is what photo editors take when they convert a photo: colours
# that sRGB has stay as they are. Perceptual tables shift all of them, each profile's in its own way, and the profiles
# of cameras and screens have none. Without the cache of one pixel, threads may share a transform.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE
# Steps of 255. The sRGB profiles that are about differ from each other by one, Rec. 709's from them by 16.
_SAME = 2


def to_srgb(image: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """Converts an 8-bit image to sRGB; alpha stays as it is.

    Args:
        image: of any 8-bit mode that Pillow converts to RGB, or LAB (CIE 1976, D50).
        profile: the ICC profile of its pixels. Ignored if it is broken, is for other pixels (such as CMYK in an RGB
            image), or differs nowhere by more than 2 of 255 steps from sRGB.

    Returns:
        The image in mode L, LA, RGB or RGBA; the same object, of any mode, if there is nothing to convert.
    """
    mode = _colour_mode(image)
    convert = _converter(profile, mode) if profile and mode else None
    if convert is None and mode == "LAB":
        convert = _converter(None, mode)
    if convert is None:
        return image
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if mode == "L" else "RGBA")
        alpha = image.getchannel("A")
    converted = convert(image if image.mode == mode else image.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _colour_mode(image: PIL.Image.Image) -> str | None:
    """The mode in which the colours of an image are converted; None for black and white, which stays as it is."""
    if image.mode in _SPACES:
        return image.mode
    return {"1": None, "LA": "L"}.get(image.mode, "RGB")


@lru_cache(maxsize=32)
def _converter(profile: bytes | None, mode: str) -> Callable[[PIL.Image.Image], PIL.Image.Image] | None:
    """Converts images of `mode` to sRGB; None if the profile does not fit, is broken or is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB") if profile is None else io.BytesIO(profile))
        if source.profile.xcolor_space != _SPACES[mode]:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # Grey takes but 256 colours to convert, and LittleCMS' shortcuts are far off for the dark ones.
        flags = _FLAGS | ImageCms.Flags.NOOPTIMIZE if mode == "L" else _FLAGS
        transform = ImageCms.ImageCmsTransform(source, srgb, mode, "RGB", _INTENT, flags=flags)
    except (OSError, ValueError):
        return None
    if mode == "L":
        return _by_table(transform)
    return None if mode == "RGB" and _is_srgb(transform) else transform.apply


def _by_table(transform: ImageCms.ImageCmsTransform) -> Callable[[PIL.Image.Image], PIL.Image.Image] | None:
    """The conversion of grey to grey, None if it changes nothing that can be seen."""
    greys = np.arange(256, dtype=np.uint8)
    table = np.asarray(transform.apply(PIL.Image.fromarray(greys[None])))[0, :, 1]
    if np.abs(table.astype(int) - greys).max() <= _SAME:
        return None
    return lambda image: image.point(table.tolist())


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform leaves RGB as it is, as far as can be seen.

    It is tried out on 18 levels of each channel in all combinations, as sRGB has many profiles with as many names.
    """
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    pixels = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    converted = np.asarray(transform.apply(PIL.Image.fromarray(pixels)))
    return int(np.abs(converted.astype(int) - pixels).max()) <= _SAME

"""Opens encoded images within a limit of pixels that is ours, not Pillow's, whatever text a PNG holds."""

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

from ..config.settings import DataConfig
from ..errors import UserError, one_line

# Modes that Pillow converts to RGB unambiguously: "F" (floating point) has no fixed white.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
# Formats whose 32-bit mode "I" holds 16-bit grey; elsewhere its range is unknown.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")

MAX_PIXELS = DataConfig.max_image_pixels
# Pillow's own limit, unless somebody changed it: it warns of more pixels, and refuses more than twice as many.
_PILLOWS_LIMIT = 89_478_485
_ONE_AT_A_TIME = threading.Lock()

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts in which Pillow looks for the EXIF orientation.
_ORIENTED_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
# No text that long turns an image, and no colour profile is that long; both are limits against zip bombs.
_MAX_TEXT_BYTES, _MAX_PROFILE_BYTES = 1 << 24, 1 << 24


def open_image(data: bytes, name: str, max_pixels: int) -> PIL.Image.Image:
    """Reads the header of an encoded image; `load_pixels` reads the rest.

    A JPEG of more than `max_pixels` is set to be decoded at 1/2, 1/4 or 1/8 of its width and height, whichever is the
    largest within the limit. Not a progressive one: it takes the memory of all its pixels at any size.

    Raises:
        UserError: `data` is no image, its pixels have no fixed range, or they are too many; names `name`.
    """
    try:
        image = _identified(data)
    except Exception as error:
        raise UserError(f"`{name}` is not a readable image: {one_line(error)}. Replace or remove it.") from error
    if image is None:
        raise UserError(f"`{name}` is not an image that Pillow can read. Replace or remove it.")
    known = image.mode in _EIGHT_BIT_MODES + SIXTEEN_BIT_MODES
    if not known and not (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        raise UserError(
            f"`{name}` has pixels of mode {image.mode}, whose range is not fixed. Convert it to 8-bit RGB."
        )
    width, height = image.size
    if not _fits(image, max_pixels):
        raise UserError(
            f"`{name}` has {width * height:,} pixels ({width} x {height}), more than `--max_image_pixels "
            f"{max_pixels}`. Shrink it, or raise the flag if there is enough memory."
        )
    return image


def load_pixels(image: PIL.Image.Image) -> None:
    """Decodes an image that `open_image` has opened; raises whatever Pillow's decoders do."""
    if image.width * image.height <= _PILLOWS_LIMIT:
        image.load()
    else:
        with _without_pillows_limit():
            image.load()


def reduce_jpeg(image: PIL.Image.Image, scale: int) -> None:
    """Has a JPEG decoded at 1/`scale` (2, 4 or 8) of its width and height; other formats stay as they are."""
    if isinstance(image, JpegImageFile):
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _fits(image: PIL.Image.Image, max_pixels: int) -> bool:
    """Whether an image has at most `max_pixels`, decoded at a reduced size if need be and possible."""
    width, height = image.size
    if width * height > max_pixels and "progressive" not in image.info:
        scale = next((scale for scale in (2, 4, 8) if -(-width // scale) * -(-height // scale) <= max_pixels), 8)
        reduce_jpeg(image, scale)
    return image.width * image.height <= max_pixels


def _identified(data: bytes) -> PIL.Image.Image | None:
    data, profile = _without_texts(data) if data.startswith(_PNG_SIGNATURE) else (data, None)
    try:
        image = _first_that_opens(data)
    except PIL.Image.DecompressionBombError:  # WebP and others compare with Pillow's limit while they open a file
        with _without_pillows_limit():
            image = _first_that_opens(data)
    if image is not None and profile is not None:
        image.info["icc_profile"] = profile
    return image


def _first_that_opens(data: bytes) -> PIL.Image.Image | None:
    """As `PIL.Image.open`, which would also warn of images within our limit and refuse those beyond its own."""
    PIL.Image.init()
    for each in PIL.Image.ID:
        opened, accepts = PIL.Image.OPEN[each]
        try:
            accepted = accepts is None or accepts(data[:16])
            # A text says why this Pillow cannot read the format.
            if accepted and not isinstance(accepted, str):
                return opened(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    return None


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Lets Pillow read an image that is larger than its own limit.

    Most of its decoders compare with the limit themselves, and it is a global of the process. So it is lifted for
    these few images alone, and for one of them at a time.
    """
    with _ONE_AT_A_TIME:
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def _without_texts(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without its colour profile and the texts that have no influence on its pixels, and the profile.

    Generators write whole workflows into their images, and Pillow refuses an image with a text of more than its
    `MAX_TEXT_CHUNK`, or a profile; that limit is a global of the process, which is not ours to change.
    """
    kept, profile, start, place = [], None, 0, len(_PNG_SIGNATURE)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body, end = place + 8, place + 12 + length
        if end > len(data):
            break
        is_text = kind in (b"tEXt", b"zTXt", b"iTXt")
        if is_text and data.startswith(_ORIENTED_TEXTS, body) and length <= _MAX_TEXT_BYTES:
            is_text = False
        if kind == b"iCCP":
            profile = _inflated_profile(data[body : body + length])
        if is_text or kind == b"iCCP":
            kept.append(data[start:place])
            start = end
        place = end
    return (b"".join([*kept, data[start:]]) if kept else data), profile


def _inflated_profile(chunk: bytes) -> bytes | None:
    """The profile in an iCCP chunk: name, a zero, the method (a zero too), and a zlib stream; None if it is broken."""
    compressed = chunk.partition(b"\0")[2][1:]
    try:
        return zlib.decompressobj().decompress(compressed, _MAX_PROFILE_BYTES) or None
    except zlib.error:
        return None

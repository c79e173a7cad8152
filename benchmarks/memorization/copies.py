"""Near copies: what becomes of an image that is saved, cropped and edited again and again."""

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# At most: of the side that a copy is shifted by, that its scale differs by, that its brightness differs by.
SHIFT, SCALE, BRIGHTNESS = 0.08, 0.10, 0.20


def near_copy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image shifted, scaled, brighter or darker, in half of the cases mirrored, and encoded as JPEG again.

    What is shifted in from outside has the colour of the nearest edge.
    """
    side = image.width
    dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * side
    scale = 1 + rng.uniform(-SCALE, SCALE)
    edge = round(side * (SHIFT + SCALE)) + 2
    pixels = np.asarray(image)
    widths = ((edge, edge), (edge, edge), *(((0, 0),) * (pixels.ndim - 2)))
    padded = Image.fromarray(np.pad(pixels, widths, mode="edge"))
    half = side / scale / 2
    middle_x, middle_y = edge + side / 2 + dx, edge + side / 2 + dy
    box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
    copy = padded.resize((side, side), Image.Resampling.BICUBIC, box=box)
    copy = ImageEnhance.Brightness(copy).enhance(1 + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    if rng.random() < 0.5:
        copy = ImageOps.mirror(copy)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=int(rng.integers(60, 91)))
    return Image.open(io.BytesIO(buffer.getvalue())).convert(image.mode)

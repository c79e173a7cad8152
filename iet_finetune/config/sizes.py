"""Sizes of images as `--aspect_ratio_buckets` writes them: auto, or WIDTHxHEIGHT separated by commas."""

import re

from ..errors import UserError

AUTO = "auto"
# Width and height in pixels.
Size = tuple[int, int]


def named_sizes(text: str | None) -> tuple[Size, ...] | None:
    """The sizes that the flag lists, in its order; None if it lists none.

    Raises:
        UserError: it is neither auto nor a list of different sizes.
    """
    if text is None or text == AUTO:
        return None
    words = [word.strip() for word in text.split(",")]
    found = [re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", word) for word in words]
    sizes = tuple((int(match[1]), int(match[2])) for match in found if match is not None)
    if len(sizes) < len(words):
        wrong = next(word for word, match in zip(words, found, strict=True) if match is None)
        raise UserError(
            f"`--aspect_ratio_buckets {text}`: {wrong!r} is no size: give auto, or sizes such as 1024x1024,832x1216, "
            "width first."
        )
    if len(set(sizes)) < len(sizes):
        twice = next(word for word, size in zip(words, sizes, strict=True) if sizes.count(size) > 1)
        raise UserError(f"`--aspect_ratio_buckets {text}` has {twice} twice: leave one out.")
    return sizes

"""HTML pages that are self-contained: images inline, no scripts, nothing fetched."""

import base64
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from ..files import written_beside

# Names of local files and folders stand between these two, so that a push can remove them.
LOCAL_BEGINS, LOCAL_ENDS = "<!-- local begins -->", "<!-- local ends -->"
# Sides in pixels: larger images than the first are scaled down; up to the second, pixels are shown as they are.
LARGEST, SMALL = 256, 96


def render(template: Path, /, **content: Any) -> str:
    """A page from a template, which extends `base.html.jinja` of this folder.

    All content is untrusted text, captions above all, and is escaped.
    """
    return _environment(template.parent).get_template(template.name).render(**content)


def write_page(path: Path, page: str) -> Path:
    """Writes a page beside its place and moves it there; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        # JSON may hold a lone surrogate, which UTF-8 cannot: it becomes a question mark.
        partial.write_text(page, encoding="utf-8", errors="replace")
    return path


def embedded(image: Image.Image, largest: tuple[int, int] = (LARGEST, LARGEST)) -> dict[str, Any]:
    """An image for a page: a data URI, its size, and whether the page enlarges it pixel by pixel.

    Small ones are kept exactly (PNG); others are fitted into `largest` pixels (JPEG).
    """
    image, stream = image.convert("RGB"), io.BytesIO()
    small = max(image.size) <= SMALL
    if small:
        image.save(stream, "PNG", optimize=True)
    else:
        image.thumbnail(largest, Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=88)
    kind, content = "png" if small else "jpeg", base64.b64encode(stream.getvalue()).decode("ascii")
    return {
        "uri": f"data:image/{kind};base64,{content}",
        "width": image.width,
        "height": image.height,
        "small": small,
    }


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    environment.globals |= {"local_begins": Markup(LOCAL_BEGINS), "local_ends": Markup(LOCAL_ENDS)}
    return environment


def _words(text: str) -> Markup:
    """Escaped text: backticks mark code, and no line breaks before a `%`."""
    tight = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", tight))

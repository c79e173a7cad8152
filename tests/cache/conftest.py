"""The world that tests of the cache share."""

from pathlib import Path

import pytest
from caches import COPY_OF, SIZES, SQUARES, save_pictures
from families.pixels import tiny_pixels
from tiny import RESOLUTION, save_tiny_sd
from tiny_families import tiny_pipeline


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines of several families, `squares`, 8 images of 16 pixels, and `mixed`, 11 of many sizes."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "sd", timesteps=10)
    for name in ("sdxl", "sd3", "flux dev", "pixart alpha"):
        tiny_pipeline(name).save_pretrained(folder / name)
    tiny_pixels(timesteps=100).save_pretrained(folder / "pixels")
    save_pictures(folder / "squares", [(RESOLUTION, RESOLUTION)] * SQUARES)
    save_pictures(folder / "mixed", SIZES, captions=3, copies=COPY_OF)
    return folder

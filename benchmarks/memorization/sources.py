"""Where the images come from: garments, emoji, and emoji in another style."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).parents[2]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FLUENT = "@lobehub/fluent-emoji-3d@1.1.0"


class Pictures(NamedTuple):
    """Images as they come, before they are made small.

    Attributes:
        images: N of PIL, all of one mode.
        captions: (N,) str; empty strings where there are none.
        labels: (N,) int64, the class; 0 where there is none.
    """

    images: list[Image.Image]
    captions: np.ndarray
    labels: np.ndarray

    def at(self, places: np.ndarray) -> "Pictures":
        """Some of them, in this order."""
        return Pictures([self.images[place] for place in places], self.captions[places], self.labels[places])


def garments(part: str = "train", first: int = 0, count: int = 30000) -> Pictures:
    """Fashion-MNIST: grey, 28 x 28; some of the 60,000 images to train with or the 10,000 to test with (`t10k`)."""
    files = [FASHION_MNIST / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.is_file():
            sys.exit(f"{file} is not there: install Debian's package dataset-fashion-mnist.")
    pixels, labels = (_read_idx(file)[first : first + count] for file in files)
    return Pictures([Image.fromarray(each) for each in pixels], np.full(len(labels), ""), labels.astype(np.int64))


def emoji() -> Pictures:
    """All 1,026 emoji of the demo, once each: colour, 64 x 64, with their names."""
    images, captions = [], []
    for folder in ("base", "finetune", "heldout"):
        home = ROOT / "demo" / "data" / folder
        for line in (home / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "-copy" not in row["file_name"]:
                images.append(Image.open(home / row["file_name"]).convert("RGB"))
                captions.append(row["text"])
    return Pictures(images, np.array(captions), np.zeros(len(images), np.int64))


def fluent_emoji(cache: Path) -> Pictures:
    """Microsoft's Fluent emoji in 3D (MIT), 64 x 64 on white, with their Unicode names: those of one code point.

    Args:
        cache: a folder where the npm package is kept.
    """
    images, captions = [], []
    with tarfile.open(_packed(cache)) as package:
        members = sorted((each for each in package if each.name.endswith(".webp")), key=lambda each: each.name)
        for member in members:
            points = [point for point in Path(member.name).stem.split("-") if point != "fe0f"]
            name = unicodedata.name(chr(int(points[0], 16)), "") if len(points) == 1 else ""
            content = package.extractfile(member)
            # Letters in boxes and the like teach nothing about a style.
            if not name or content is None or int(points[0], 16) < 0x1F300:
                continue
            image = Image.open(io.BytesIO(content.read())).convert("RGBA").resize((64, 64), Image.Resampling.LANCZOS)
            images.append(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
            captions.append(name.lower())
    return Pictures(images, np.array(captions), np.zeros(len(images), np.int64))


def _packed(cache: Path) -> Path:
    file = cache / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    cache.mkdir(parents=True, exist_ok=True)
    # Two runs that begin together fetch it once.
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            if shutil.which("npm") is None:
                sys.exit(f"{FLUENT} is fetched with npm, which is not installed; `--only` chooses other sets.")
            subprocess.run(["npm", "pack", "--silent", FLUENT], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    return file


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: 00 00 08, the number of dimensions, each as 4 bytes, and the values."""
    content = gzip.decompress(path.read_bytes())
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], dtype=">u4")
    return np.frombuffer(content[begin:], dtype=np.uint8).reshape(shape.tolist())

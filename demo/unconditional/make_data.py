"""Makes the data of `make demo-unconditional` out of the files of Debian's package dataset-fashion-mnist."""

import argparse
import gzip
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
OUTPUT = Path(__file__).parent / "data"
# As the authors of the data set number and name them.
CLASSES = (
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def read_idx(path: Path) -> np.ndarray:
    """The numbers of a gzipped IDX file of bytes: 00 00 08, how many dimensions, each as 4 bytes, and the values.

    Raises:
        ValueError: it is no such file.
    """
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    begin = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:begin], dtype=">u4")
    return np.frombuffer(content[begin:], dtype=np.uint8).reshape(shape.tolist())


def choose(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the first `count` / 10 images of each class."""
    each = count // len(CLASSES)
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(len(CLASSES))]))


def encoded(pixels: np.ndarray) -> bytes:
    """A PNG of one grey image, as small as Pillow makes it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """One parquet file with the columns `image` and `label` that `datasets` reads."""
    rows = {
        "image": [{"bytes": encoded(pixels), "path": None} for pixels in images],
        "label": labels.astype(int).tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=PACKAGE, help="folder with the .gz files")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for train.parquet")
    parser.add_argument("--count", type=int, default=2000, help="images, as many of each class")
    args = parser.parse_args()
    if not (args.source / "train-images-idx3-ubyte.gz").is_file():
        parser.error(f"{args.source} has no train-images-idx3-ubyte.gz: install dataset-fashion-mnist")
    images = read_idx(args.source / "train-images-idx3-ubyte.gz")
    labels = read_idx(args.source / "train-labels-idx1-ubyte.gz")
    chosen = choose(labels, args.count)
    write(images[chosen], labels[chosen], args.output / "train.parquet")
    print(f"{args.output / 'train.parquet'}: {len(chosen)} images")


if __name__ == "__main__":
    main()

"""Splits a folder of captioned emoji into the demo's three sets: base, finetune and heldout."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

HELDOUT_IMAGES = 60
FINETUNE_IMAGES = 300
REPEATED_IMAGES = 20
COPIES = 15

# What the README and the tests ask the base pipeline to draw, so it has to have seen it.
ALWAYS_IN_BASE = (
    "airplane",
    "automobile",
    "banana",
    "blue book",
    "books",
    "cat face",
    "closed book",
    "dog face",
    "green book",
    "grinning face",
    "heavy black heart",
    "house building",
    "lion face",
    "open book",
    "orange book",
    "panda face",
    "pig face",
    "red apple",
    "rocket",
    "rose",
    "soccer ball",
    "strawberry",
    "sun with face",
)


def read_rows(folder: Path) -> list[dict]:
    """The rows of `folder/metadata.jsonl`, each with at least `file_name` and `text`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """Divide `rows` into heldout, finetune and base by the hash of the file name.

    The order of `rows` changes nothing. The first `REPEATED_IMAGES` rows of finetune are the ones to repeat.
    Raises ValueError if a caption of `ALWAYS_IN_BASE` is missing.
    """
    missing = set(ALWAYS_IN_BASE) - {row["text"] for row in rows}
    if missing:
        raise ValueError(f"no image is captioned {', '.join(sorted(missing))}: is this the emoji folder?")
    free = [row for row in rows if row["text"] not in ALWAYS_IN_BASE]
    free.sort(key=lambda row: hashlib.sha256(row["file_name"].encode()).hexdigest())
    last = HELDOUT_IMAGES + FINETUNE_IMAGES
    named = [row for row in rows if row["text"] in ALWAYS_IN_BASE]
    return {"heldout": free[:HELDOUT_IMAGES], "finetune": free[HELDOUT_IMAGES:last], "base": named + free[last:]}


def files_of(row: dict, copies: int) -> list[dict]:
    """One output row a copy: `1f6.png`, `1f6-copy02.png`, ..., all with the same source and caption."""
    stem = Path(row["file_name"]).stem
    names = [row["file_name"]] + [f"{stem}-copy{number:02d}.png" for number in range(2, copies + 1)]
    return [{"file_name": name, "text": row["text"], "source": row["file_name"]} for name in names]


def write_folder(files: list[dict], source: Path, target: Path) -> None:
    """Replace `target` by a datasets `imagefolder` of `files`: the images, byte for byte, and metadata.jsonl."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = sorted(files, key=lambda file: file["file_name"])
    for file in files:
        shutil.copyfile(source / file["source"], target / file["file_name"])
    lines = [json.dumps({"file_name": file["file_name"], "text": file["text"]}, ensure_ascii=False) for file in files]
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder with the images and their metadata.jsonl")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    if not (args.source / "metadata.jsonl").exists():
        parser.error(f"{args.source} has no metadata.jsonl")

    for name, rows in split(read_rows(args.source)).items():
        repeated = REPEATED_IMAGES if name == "finetune" else 0
        files = [file for i, row in enumerate(rows) for file in files_of(row, COPIES if i < repeated else 1)]
        write_folder(files, args.source, args.output / name)
        print(f"{name}: {len(rows)} images, {len(files)} files")
        for row in rows[:repeated]:
            print(f"  {COPIES} times: {row['text']}")


if __name__ == "__main__":
    main()

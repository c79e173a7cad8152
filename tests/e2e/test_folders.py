"""Folders as people keep them, from the command line to the ledger: each image is trained on with its caption."""

from pathlib import Path

import pyarrow.parquet
import pytest
from accelerate.state import AcceleratorState
from e2e.command import SMALL, words
from tiny import save_images

from iet_finetune import cli

IMAGES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images, whose captions are in text files instead of a table."""
    save_images(tmp_path / "data", IMAGES)
    (tmp_path / "data" / "metadata.jsonl").unlink()
    for number in range(IMAGES):
        (tmp_path / "data" / f"{number:03}.txt").write_text(f"thing {number}\n")
    return tmp_path


def trained(world: Path, folder: Path, capfd, **flags) -> tuple[list[str], Path]:
    """The first lines of a run on the folder, and what it left."""
    AcceleratorState._reset_state(reset_partial_state=True)
    places = {"pretrained_model_name_or_path": world / "base", "train_data_dir": folder / "data",
              "output_dir": folder / "out"}  # fmt: skip
    assert cli.main(["train", *words({**places, **SMALL, "num_shards": 2, **flags})]) == 0
    return capfd.readouterr().out.splitlines(), folder / "out"


def visits(output: Path) -> dict[str, int]:
    """How often each image was visited, by the name of its file."""
    rows = pyarrow.parquet.read_table(output / "ledger.parquet").to_pylist()
    found: dict[str, int] = {}
    for row in rows:
        found[Path(row["image"]).name] = found.get(Path(row["image"]).name, 0) + row["seen"]
    return found


def test_text_files_and_a_default_caption_train(world, folder, capfd):
    for number in (1, 4):
        (folder / "data" / f"{number:03}.txt").unlink()
    lines, output = trained(world, folder, capfd, default_caption="a thing")
    assert lines[0].startswith("images: 6, ")
    assert "captions: 4 in text files, 2 by default" in lines
    assert "captions: 5 distinct" in lines
    assert visits(output) == {f"{number:03}.png": 1 for number in range(IMAGES)}


def test_a_folder_of_kohya_repeats_its_images(world, folder, capfd):
    (folder / "data" / "3_sks thing").mkdir()
    for path in [*(folder / "data").glob("00[01].*")]:
        path.rename(folder / "data" / "3_sks thing" / path.name)
    lines, output = trained(world, folder, capfd, caption_from="folder")
    assert lines[0].startswith("images: 10 (6 distinct), ")
    assert "each image of `3_sks thing` is in the data 3 times, as the folder's name says" in lines
    assert visits(output) == {f"{number:03}.png": 3 if number < 2 else 1 for number in range(IMAGES)}


def test_bad_images_are_left_out_and_written_down(world, folder, capfd):
    (folder / "data" / "001.png").write_bytes(b"")
    half = (folder / "data" / "002.png").read_bytes()
    (folder / "data" / "002.png").write_bytes(half[: len(half) // 2])
    lines, output = trained(world, folder, capfd, skip_bad_images=True)
    assert lines[0].startswith("images: 4, ")
    assert "left out 2 images that cannot be read, listed in unreadable_images.txt" in lines
    listed = (output / "unreadable_images.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in listed] == [f"{folder}/data/00{number}.png" for number in (1, 2)]
    assert visits(output) == {f"{number:03}.png": 1 for number in (0, 3, 4, 5)}

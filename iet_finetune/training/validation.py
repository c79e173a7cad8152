"""Pictures drawn while training, always from the same prompts and seeds, and put side by side."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from ..config.settings import ValidationConfig
from ..families.base import Family, evaluating
from ..files import written_beside
from .compiling import uncompiled

FOLDER = "validation"
BEFORE_AFTER = f"{FOLDER}/before_after.png"


def draw_images(family: Family, validation: ValidationConfig, seed: int, resolution: int) -> list[list[Image.Image]]:
    """`num_validation_images` pictures for each prompt, from the denoiser as it stands.

    Image i of every prompt starts from the noise of seed + i; torch's global generators are left alone.
    """
    device, rows = next(family.denoiser.parameters()).device, []
    # Encoders that wait on the host go back there. A compiled denoiser would be compiled once more for this.
    encoders = family.lent((*family.image_encoders, *family.caption_encoders), device)
    with encoders, evaluating(family.denoiser), torch.no_grad(), uncompiled():
        pipeline = family.sampling_pipeline().to(device)
        for prompt in family.prompts(validation):
            generators = [torch.Generator().manual_seed(seed + i) for i in range(validation.num_validation_images)]
            rows.append(family.draw(pipeline, prompt, generators, validation, resolution))
    return rows


def grid(rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """One row of pictures for each label, with the label above it.

    Without a label, as pictures without a prompt are, they stand in rows of eight.
    """
    if labels == [""]:
        return _sheet(rows[0], columns=8)
    width, height = rows[0][0].size
    band = 16
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (max(columns * width, 160), len(rows) * (height + band)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        pen.text((2, y * (height + band) + 2), label, fill="black")
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * (height + band) + band))
    return sheet


def _sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, -(-len(pictures) // columns) * height), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet


def round_file(output: Path, round_: int) -> Path:
    """Where the pictures drawn after a round are kept; round 0 is before training."""
    return output / FOLDER / f"round-{round_:04d}.png"


def forget_rounds(output: Path, above: int) -> None:
    """Removes the pictures of later rounds than `above`, and the comparison made with them."""
    for file in (output / FOLDER).glob("round-*.png"):
        if int(file.stem.removeprefix("round-")) > above:
            file.unlink()
    (output / BEFORE_AFTER).unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG beside its place and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as partial:
        picture.save(partial, format="PNG")


def save_before_after(output: Path, last_round: int) -> Path | None:
    """`validation/before_after.png`: the pictures of round 0 beside those of the last round; None without them."""
    files = [round_file(output, 0), round_file(output, last_round)]
    if not all(file.is_file() for file in files):
        return None
    before, after = (Image.open(file).convert("RGB") for file in files)
    gap, band = 24, 20
    sheet = Image.new("RGB", (before.width + gap + after.width, max(before.height, after.height) + band), "white")
    pen = ImageDraw.Draw(sheet)
    for x, title, picture in ((0, "before", before), (before.width + gap, f"after {last_round} rounds", after)):
        pen.text((x + 2, 4), title, fill="black")
        sheet.paste(picture, (x, band))
    save_picture(sheet, output / BEFORE_AFTER)
    return output / BEFORE_AFTER

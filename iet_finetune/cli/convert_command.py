"""The command `convert`: writes a LoRA file under the names that other tools match."""

import argparse
import os
from pathlib import Path

from ..config.command_line import parse_arguments
from ..config.places import expanded
from ..config.settings.method import LORA_FORMATS
from ..errors import UserError, one_line
from ..files import LORA_NAME
from .parsing import CommandParser


def convert_command(argv: list[str]) -> str:
    """Runs `iet-finetune convert` with the arguments after that word; returns the line to print.

    Arguments and paths are checked before torch is imported; the output is complete or absent.

    Raises:
        UserError: whatever the user can mend.
    """
    given = parse_arguments(convert_parser(), argv, ["to", "output"])
    source = _source(Path(expanded(given["lora"], "LORA")))
    form = _form(given["to"])
    output = _output(given["output"], source, form)
    from ..lora.file import write_lora
    from ..lora.formats import KOHYA, check_kohya
    from ..lora.reading import read_lora

    layers = read_lora(source)
    if form == KOHYA:
        check_kohya(layers, f"`{source}`")
    write_lora(output, layers, form)
    scaled = sum(layer.scaling != 1 for layer in layers.values())
    folded = f", the scaling of {scaled} of them now in the matrices" if scaled else ""
    return f"Wrote {len(layers)} layers under {form}'s names{folded}: `{output}`."


def convert_parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments."""
    parser = CommandParser(
        "convert",
        description="Write a LoRA file under other names. The update stays the same; alpha goes into the matrices, so "
        "that every tool loads it at full strength. docs/lora-files.md says which tool matches which names.",
    )
    parser.add_argument("lora", metavar="LORA", help=f"A LoRA file of any format, or a folder with {LORA_NAME}.")
    parser.add_argument("--to", metavar="FORMAT", help=f"{' or '.join(LORA_FORMATS)}. (required)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="The .safetensors file to write, which must not exist. (default: beside LORA, its name with the format)",
    )
    return parser


def _source(path: Path) -> Path:
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"`{path}` holds no {LORA_NAME}: give a LoRA file or a folder with one."
            if path.is_dir()
            else f"`{path}` does not exist. Give a LoRA file; download what is on the Hub first."
        )
    if file.suffix != ".safetensors":
        raise UserError(f"`{path}` is not a .safetensors file: give a LoRA file.")
    return file


def _form(given: str | None) -> str:
    if given not in LORA_FORMATS:
        said = "`--to` is missing" if given is None else f"`--to {given}` is not a format"
        raise UserError(f"{said}: choose {' or '.join(LORA_FORMATS)}.")
    return given


def _output(given: str | None, source: Path, form: str) -> Path:
    output = Path(expanded(given, "`--output`")) if given else source.with_name(f"{source.stem}_{form}.safetensors")
    try:
        if output.exists():
            raise UserError(f"`{output}` exists already: choose another file with `--output`.")
        folder = output.resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"`--output {output}` cannot be written in `{folder}`: choose another place.")
    except OSError as error:
        raise UserError(f"`--output {output}` cannot be used: {error.strerror or one_line(error)}.") from None
    if output.suffix != ".safetensors":
        raise UserError(f"`--output {output}` must end in .safetensors.")
    return output

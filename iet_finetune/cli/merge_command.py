"""The command `merge`: merges LoRA adapters or whole denoisers trained elsewhere, as the method merges its clones."""

import argparse
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..config.command_line import parse_arguments
from ..config.places import expanded
from ..errors import UserError, one_line
from ..files import LORA_NAME, partial_name, removed_on_error
from ..publish.upload_list import INDEX_NAME
from .parsing import CommandParser

if TYPE_CHECKING:
    from ..lora.file import MergedLora
    from ..lora.layer import LoraLayer

LORA, PIPELINE, MODEL = "LoRA file", "pipeline", "model folder"
# Names in a checkpoint file of a whole pipeline, or of the transformer of SD 3 or Flux, begin with these.
ORIGINAL = ("model.diffusion_model.", "joint_blocks.", "double_blocks.")
_LARGEST = 1e15  # whole numbers up to here are exact in float64, and no sum of weights overflows


def merge_command(argv: list[str]) -> str:
    """Runs `iet-finetune merge` with the arguments after that word; returns the line to print.

    Arguments, paths and kinds are checked before torch is imported; OUTPUT is complete or absent.

    Raises:
        UserError: whatever the user can mend.
    """
    given = parse_arguments(_parser(), argv, ["weights", "rank", "output", "base", "base_config"])
    inputs = [Path(expanded(name, "INPUT")) for name in given["inputs"]]
    weights = _weights(given["weights"], len(inputs))
    rank = _rank(given["rank"])
    kind = _common_kind(inputs)
    if rank is not None and kind != LORA:
        raise UserError(f"`--rank` is for LoRA files, but `{inputs[0]}` is a {kind}.")
    base, base_config = given["base"], given["base_config"]
    base = None if base is None else expanded(base, "`--base`")
    if base is not None and kind != LORA:
        raise UserError(f"`--base` is for LoRA files, but `{inputs[0]}` is a {kind}.")
    files = [*(inputs if kind == PIPELINE else []), *([Path(base)] if base is not None else [])]
    if base_config is not None and not any(path.is_file() for path in files):
        raise UserError(f"`--base_config {base_config}` is for checkpoint files, and none is given: leave it out.")
    output = _output(given["output"], inputs if kind != LORA else [Path(base)] if base is not None else [])
    if kind == LORA:
        return _merge_lora_files(inputs, weights, rank, output, base, base_config)
    return _merge_whole(kind, inputs, weights, output, base_config)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "merge",
        description="Merge LoRA adapters or whole denoisers: the result is exactly their weighted mean. An adapter is "
        "written in fp32, a denoiser in the precision of the first.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=f"LoRA files of any format, or folders with {LORA_NAME}; or pipelines, or unet/ or transformer/ folders, "
        "in diffusers' format, or checkpoint files of pipelines. All of one kind. What is not the denoiser of a "
        "pipeline is copied from the first.",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="W",
        help="A positive number for each input, such as its number of images; they are divided by their sum. "
        "(default: equal)",
    )
    parser.add_argument("--output", metavar="OUTPUT", help="The folder for the result, new or empty. (required)")
    parser.add_argument(
        "--rank",
        metavar="R",
        help="For LoRA: cut the result to this rank; what is lost is printed. Without it nothing is cut, and the rank "
        "is what the exact merge needs: at most the sum of the ranks.",
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="For LoRA: folder, checkpoint file or Hub id of a pipeline. The result is this pipeline with the merged "
        "update in its weights, in the precision in which they are stored, instead of a LoRA file.",
    )
    parser.add_argument(
        "--base_config",
        metavar="NAME",
        help="For checkpoint files: Hub id or folder of a diffusers pipeline of their kind, whose configuration is "
        "used. By default diffusers finds it out from each file.",
    )
    return parser


def _weights(given: Sequence[str] | None, count: int) -> list[float]:
    if given is None:
        return [1] * count
    if len(given) != count:
        raise UserError(f"`--weights` gives {len(given)} for {count} inputs: give one number for each.")
    return [_positive("--weights", text) for text in given]


def _positive(flag: str, text: str) -> float:
    """A number; a whole one as an int, with which equal models merge to themselves bit for bit."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"`{flag}` must be positive numbers, and {text!r} is not one.")
    if not 1 / _LARGEST <= number <= _LARGEST:
        raise UserError(f"`{flag} {text}` is out of range: use {1 / _LARGEST:g} to {_LARGEST:g}.")
    return int(number) if number.is_integer() else number


def _rank(given: str | None) -> int | None:
    if given is None:
        return None
    rank = _positive("--rank", given)
    if not isinstance(rank, int):
        raise UserError(f"`--rank` must be a whole number, not {given!r}.")
    return rank


def _common_kind(inputs: Sequence[Path]) -> str:
    kinds = [_kind(path) for path in inputs]
    for path, kind in zip(inputs, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(f"`{path}` is a {kind}, but `{inputs[0]}` is a {kinds[0]}: give inputs of one kind.")
    return kinds[0]


def _kind(path: Path) -> str:
    if not path.exists():
        raise UserError(f"`{path}` does not exist. Give files or folders; download what is on the Hub first.")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"`{path}` is not a .safetensors file. Give LoRA files, pipelines or model folders.")
        return PIPELINE if _is_checkpoint(path) else LORA
    if (path / INDEX_NAME).is_file():
        if (path / LORA_NAME).is_file():
            raise UserError(f"`{path}` holds a pipeline and a LoRA file: give `{path / LORA_NAME}` or another folder.")
        return PIPELINE
    if (path / LORA_NAME).is_file():
        return LORA
    if (path / "config.json").is_file():
        return MODEL
    raise UserError(f"`{path}` holds neither {LORA_NAME} nor {INDEX_NAME} nor config.json: nothing to merge.")


def _is_checkpoint(path: Path) -> bool:
    """Whether a file holds a whole pipeline in its original layout; what is damaged is refused when it is read."""
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return False
    return not any("lora" in name for name in names) and any(name.startswith(ORIGINAL) for name in names)


def _output(given: str | None, models: Sequence[Path]) -> Path:
    """The folder to make; nothing is made yet. It must not lie in one of `models`, whose folders are copied."""
    if not given:
        raise UserError("`--output` is missing: give a new or empty folder for the result.")
    output = Path(expanded(given, "`--output`")).resolve()
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"`--output {given}` is not empty: give a new folder.")
        above = next(folder for folder in output.parents if folder.exists())
    except OSError as error:
        raise UserError(f"`--output {given}` cannot be used: {error.strerror or one_line(error)}.") from None
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"`--output {given}` cannot be made in `{above}`: choose another place.")
    if inside := next((path for path in models if path.resolve() in output.parents), None):
        raise UserError(f"`--output {given}` lies inside the input `{inside}`: choose a folder outside.")
    return output


def _publish(output: Path, save: Callable[[Path], None]) -> None:
    """Calls `save` with a folder beside `output`, then moves it into place as a whole."""
    partial = partial_name(output)
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with removed_on_error(partial):
        partial.mkdir()
        save(partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)


def _merge_lora_files(
    inputs: Sequence[Path],
    weights: Sequence[float],
    rank: int | None,
    output: Path,
    base: str | None,
    base_config: str | None,
) -> str:
    from ..lora.file import merge_loras, write_lora
    from ..lora.reading import read_lora

    files = [read_lora(path / LORA_NAME if path.is_dir() else path) for path in inputs]
    _check_same_layers(inputs, files)
    merged = merge_loras(files, weights, rank)
    load, into = f"pipeline.load_lora_weights({str(output)!r})", ""
    if base is None:
        _publish(output, lambda folder: write_lora(folder / LORA_NAME, merged.layers))
    else:
        from .merge_models import fuse_into

        load, into = f"DiffusionPipeline.from_pretrained({str(output)!r})", f", into {base}"
        _publish(output, lambda folder: fuse_into(base, base_config, merged.layers, folder))
    ranks = sorted({layer.rank for layer in merged.layers.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{_done(LORA, weights)}{into}: {span}, {_energy(merged)} Load it with {load}."


def _check_same_layers(inputs: Sequence[Path], files: "Sequence[Mapping[str, LoraLayer]]") -> None:
    """Raises a `UserError` where adapters cannot be of one base: other shapes, or not one denoiser in common."""
    from ..lora.layer import DENOISERS

    first: dict[str, tuple[Path, tuple[int, ...]]] = {}
    adapted: tuple[Path, set[str]] | None = None
    for path, layers in zip(inputs, files, strict=True):
        for name, layer in layers.items():
            shape = (layer.up.shape[0], *layer.down.shape[1:])
            other, known = first.setdefault(name, (path, shape))
            if known != shape:
                raise UserError(f"`{path}` is for {name} of shape {shape}, but `{other}` for {known}: another base.")
        own = {name.split(".")[0] for name in layers} & set(DENOISERS)
        adapted = adapted or ((path, own) if own else None)
        if own and adapted and not own & adapted[1]:
            ours, theirs = min(own), min(adapted[1])
            raise UserError(f"`{path}` adapts the {ours}, but `{adapted[0]}` the {theirs}: another kind of base.")


def _energy(merged: "MergedLora") -> str:
    lost, whole = (sum(energies) for energies in zip(*merged.lost.values(), strict=True))
    if not lost:
        return "exact."
    shares = {name: part / energy for name, (part, energy) in merged.lost.items() if energy}
    worst = max(shares, key=shares.__getitem__)
    return f"which loses {lost / whole:.2%} of the update's energy ({shares[worst]:.2%} in {worst})."


def _merge_whole(
    kind: str, inputs: Sequence[Path], weights: Sequence[float], output: Path, base_config: str | None
) -> str:
    from ..publish.model_folder import CONFIG_NAME, merge_models, merge_pipelines, read_json
    from .merge_models import as_folder

    merge = merge_pipelines if kind == PIPELINE else merge_models

    def save(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            folders = [as_folder(path, Path(scratch) / str(n), base_config) for n, path in enumerate(inputs)]
            merge(folders, weights, folder)

    _publish(output, save)
    loader = "DiffusionPipeline"
    if kind == MODEL:
        loader = read_json(output / CONFIG_NAME).get("_class_name", "ModelMixin")
    return f"{_done(kind, weights)}. Load it with {loader}.from_pretrained({str(output)!r})."


def _done(kind: str, weights: Sequence[float]) -> str:
    """The inputs and their shares, which are the weights divided by their sum."""
    shares = ", ".join(f"{weight / sum(weights):.4g}" for weight in weights)
    return f"Merged {len(weights)} {kind}{'s' * (len(weights) > 1)}, in shares of {shares}"

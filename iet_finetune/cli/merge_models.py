"""The whole models that the command `merge` is given, and a base for its LoRA files; imports torch."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..config.settings import ModelConfig
from ..errors import UserError
from ..families import find_pipeline, load_as_stored, save_pipeline
from ..lora.layer import LoraLayer
from ..publish.base_files import are_plain
from ..publish.fused_lora import fuse_lora


def fuse_into(base: str, base_config: str | None, layers: Mapping[str, LoraLayer], output: Path) -> None:
    """Writes a base with LoRA layers in its weights; one that is no folder of safetensors is written as one first.

    Args:
        base: folder, checkpoint file or Hub id.
        base_config: of a checkpoint file.
        output: an empty folder.

    Raises:
        UserError: no such base, or it has not the layers that the adapter changes.
    """
    with tempfile.TemporaryDirectory(dir=output) as scratch, _named_as(base, "--base"):
        model = _model(base, base_config)
        source = find_pipeline(model)
        if not are_plain(source):
            source = find_pipeline(_model(str(_unpacked(model, Path(scratch) / "base")), None))
        fuse_lora(source, layers, output)


def as_folder(path: Path, folder: Path, base_config: str | None) -> Path:
    """A model's folder; a checkpoint file is written there as one first."""
    if path.is_dir():
        return path
    with _named_as(str(path)):
        return _unpacked(_model(str(path), base_config), folder)


def _model(name: str, base_config: str | None) -> ModelConfig:
    return ModelConfig(pretrained_model_name_or_path=name, base_config=base_config)


def _unpacked(model: ModelConfig, folder: Path) -> Path:
    source = find_pipeline(model)
    save_pipeline(load_as_stored(source, model), folder, source.dtypes, source.own_index)
    return folder


@contextlib.contextmanager
def _named_as(name: str, flag: str = "") -> Iterator[None]:
    """Lets errors about a pipeline name the argument of this command that gave it."""
    try:
        yield
    except UserError as error:
        ours = f"{flag} {name}".strip()
        raise UserError(str(error).replace(f"--pretrained_model_name_or_path {name}", ours)) from None

"""From a Hub id or folder to a pipeline in memory, and back to disk with every component as it came."""

import contextlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers.utils import logging as transformers_logging

from ..config import ModelConfig
from ..errors import UserError, one_line

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside; they are as they were afterwards."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline lies on disk, what it says it is, and the precision its components were stored in."""

    folder: Path
    class_name: str
    dtypes: dict[str, torch.dtype]


def find_pipeline(model: ModelConfig) -> PipelineSource:
    """Looks the pipeline up, downloading it if it is on the Hub; reads its index, not its weights.

    Raises:
        UserError: no such folder or repository, no network, or not a pipeline.
    """
    name = str(model.pretrained_model_name_or_path)
    folder = Path(name) if Path(name).exists() else _download(name, model)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is not a diffusers pipeline: it has no model_index.json."
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        class_name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index_file} cannot be read as a pipeline's index: {one_line(error)}.") from None
    components = [key for key in index if not key.startswith("_")]
    return PipelineSource(folder, str(class_name), stored_dtypes(folder, components, model.variant))


def _download(name: str, model: ModelConfig) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"`--pretrained_model_name_or_path {name}`: there is no such folder.")
    try:
        path = DiffusionPipeline.download(
            name, revision=model.revision, variant=model.variant, cache_dir=model.cache_dir
        )
    except Exception as error:
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is no folder here and could not be had from the Hub: "
            f"{one_line(error)}"
        ) from None
    _fetch_card(name, model)
    return Path(path)


def _fetch_card(name: str, model: ModelConfig) -> None:
    """Puts the repository's README.md, which names the licence, beside the files that diffusers fetches."""
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        hf_hub_download(name, "README.md", revision=model.revision, cache_dir=model.cache_dir)


def load_pipeline(source: PipelineSource, model: ModelConfig) -> DiffusionPipeline:
    """The pipeline with all its models in fp32.

    Raises:
        UserError: files are missing or damaged.
    """
    try:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(source.folder, variant=model.variant, dtype=torch.float32)
    except Exception as error:
        raise UserError(
            f"`--pretrained_model_name_or_path {model.pretrained_model_name_or_path}` could not be loaded: "
            f"{one_line(error)}"
        ) from None


def stored_dtypes(folder: Path, components: list[str], variant: str | None) -> dict[str, torch.dtype]:
    """The precision that most of each component's stored weights have; components without weights are left out."""
    found = {name: _stored_dtype(folder / name, variant) for name in components}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _stored_dtype(folder: Path, variant: str | None) -> torch.dtype | None:
    if not folder.is_dir():
        return None
    numbers: Counter[torch.dtype] = Counter()
    for file in _weight_files(folder, variant):
        numbers.update(_count_dtypes(file))
    return numbers.most_common(1)[0][0] if numbers else None


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        chosen = [file for file in files if variant is not None and f".{variant}" in file.name]
        plain = [file for file in files if file.name.count(".") == 1]
        if chosen or plain:
            return chosen or plain
    return []


def _count_dtypes(file: Path) -> Counter[torch.dtype]:
    if file.suffix == ".bin":
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return Counter(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    named = (entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    return Counter(_SAFETENSORS_DTYPES[dtype] for dtype in named if dtype in _SAFETENSORS_DTYPES)


def save_pipeline(pipeline: Any, folder: Path, dtypes: dict[str, torch.dtype]) -> None:
    """Saves the pipeline with each model in the precision given for it; its models keep that precision afterwards.

    Local paths that diffusers and transformers note in configuration files are taken out.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name in dtypes:
            # The plain method: diffusers' own warns about layers kept in fp32, of which nothing is lost here.
            nn.Module.to(component, dtypes[name])
    with quiet_loading():
        pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        _remove_source_path(file)


def _remove_source_path(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict) and ("_name_or_path" in content or "name_or_path" in content):
        content.pop("_name_or_path", None)
        content.pop("name_or_path", None)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

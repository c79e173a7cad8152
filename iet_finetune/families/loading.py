"""Loads a pipeline from a Hub id or folder, and saves it with every untrained component unchanged."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..config.settings import ModelConfig
from ..errors import UserError, one_line
from .precision import exceptions, inexact_tensors, mend, round_pipeline
from .stored import Stored, stored_weights, summary

# Keys in which diffusers and transformers record where and how a configuration was loaded.
_OF_LOADING = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences progress bars of diffusers and transformers and the log of diffusers, so that an error is one line."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in libraries:
            library.enable_progress_bar()


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline is on disk, its class, and the precision of its stored components.

    Attributes:
        folder: None when training from scratch, or from a pipeline in memory.
        classes: component -> [library, class], as in model_index.json.
        dtypes: component -> precision of most of its weights, component/tensor -> precision of an exception.
        absent: missing components that must be passed to `from_pretrained` as None, such as SD 3's T5.
        stored: component -> what its weights files hold; empty without a folder.
    """

    folder: Path | None
    class_name: str
    classes: dict[str, list[str]]
    dtypes: dict[str, torch.dtype]
    absent: tuple[str, ...] = ()
    stored: dict[str, Stored] = field(default_factory=dict)


def find_pipeline(model: ModelConfig) -> PipelineSource:
    """Finds the pipeline, downloading it from the Hub if needed; reads its index, not its weights.

    Raises:
        UserError: no such folder or repository, no network, or not a pipeline.
    """
    name = str(model.pretrained_model_name_or_path)
    # Unlike pathlib's, this `exists` returns False for a name that is too long for the system.
    folder = Path(name) if os.path.exists(name) else _download(name, model)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is not a diffusers pipeline: it has no model_index.json."
        )
    index = _read_index(index_file)
    classes = _components(folder, index)
    stored = stored_weights({name: part_folder(folder, name) for name in classes}, model.variant)
    dtypes = summary({name: part.dtypes for name, part in stored.items()})
    return PipelineSource(folder, str(index["_class_name"]), classes, dtypes, _absent(index), stored)


def source_of(pipeline: Any) -> PipelineSource:
    """What is known of a pipeline in memory: it has no folder, and its tensors are stored as they are there.

    Raises:
        UserError: it is not a diffusers pipeline.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise UserError(f"`pipeline` must be a loaded diffusers pipeline, not a {type(pipeline).__name__}.")
    loaded = cast(Any, pipeline)
    # The one that it would be saved under, which is another for a class-conditional one.
    class_name = json.loads(loaded.to_json_string())["_class_name"]
    index = {part: list(value) for part, value in loaded.config.items() if isinstance(value, list | tuple)}
    components = loaded.components
    classes = {part: value for part, value in index.items() if part in components and value[1:] not in ([], [None])}
    stored = {
        part: {name: tensor.dtype for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        for part, module in components.items()
        if isinstance(module, nn.Module)
    }
    return PipelineSource(None, class_name, classes, summary(stored), _absent(index | {"_class_name": class_name}))


def _read_index(file: Path) -> dict[str, Any]:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{file}` is damaged: {one_line(error)}. Get the pipeline anew.") from None
    if not isinstance(index, dict) or "_class_name" not in index:
        raise UserError(f"`{file}` is no index of a pipeline: it names no `_class_name`. Get the pipeline anew.")
    return index


def _components(folder: Path, index: dict[str, Any]) -> dict[str, list[str]]:
    """Returns library and class of the components; each must have its folder, and a tokenizer its vocabulary."""
    # A component is `[library, class]`; a missing one is `[null, null]`.
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    for name, (_, class_name) in parts.items():
        part = part_folder(folder, name)
        if not part.is_dir():
            raise UserError(f"`{folder}` is not complete: model_index.json names {name}, but its folder is missing.")
        # transformers silently builds a tokenizer without words from such a folder.
        if "Tokenizer" in str(class_name) and not any((part / file).is_file() for file in _VOCABULARIES):
            raise UserError(f"`{part}` has no vocabulary, such as a tokenizer.json. Get the pipeline anew.")
    return parts


def _absent(index: dict[str, Any]) -> tuple[str, ...]:
    optional = getattr(getattr(diffusers, str(index["_class_name"]), None), "_optional_components", ())
    return tuple(name for name, value in index.items() if value == [None, None] and name not in optional)


def part_folder(folder: Path, name: str) -> Path:
    """Returns the folder of a component: one of its name or, in early pipelines, the pipeline's own."""
    flat = not (folder / name).is_dir() and (folder / "scheduler_config.json").is_file()
    return folder if flat else folder / name


def _download(name: str, model: ModelConfig) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"`--pretrained_model_name_or_path {name}`: there is no such folder.")
    try:
        with quiet_loading():
            path = DiffusionPipeline.download(
                name, revision=model.revision, variant=model.variant, cache_dir=model.cache_dir
            )
    except Exception as error:
        # diffusers' own message refers to a traceback that is not shown.
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is no folder here, and the Hub did not give it ({reason}). "
            "Check the name, the network and, for a private or gated one, the login."
        ) from None
    _fetch_card(name, model)
    return Path(path)


def _fetch_card(name: str, model: ModelConfig) -> None:
    """Downloads the repository's README.md, which names the licence and which diffusers does not fetch."""
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        hf_hub_download(name, "README.md", revision=model.revision, cache_dir=model.cache_dir)


def load_pipeline(source: PipelineSource, model: ModelConfig) -> DiffusionPipeline:
    """Loads the pipeline with all its models in fp32.

    Raises:
        UserError: files are missing or damaged.
    """
    return _load(source, model, {})


def load_as_stored(source: PipelineSource, model: ModelConfig) -> DiffusionPipeline:
    """Loads the pipeline with each model in the precision in which it is stored, wherever that is exact.

    diffusers and transformers then leave weights in safetensors files mapped into memory: a weight is read when it is
    first used, and the ranks of a machine share what was read.

    Raises:
        UserError: files are missing or damaged.
    """
    dtypes = {name: part.loads_in for name, part in source.stored.items()}
    pipeline: Any = _load(source, model, dtypes)
    inexact = {
        name: names
        for name, component in pipeline.components.items()
        if dtypes.get(name, torch.float32) != torch.float32
        and (names := inexact_tensors(component, dtypes[name], exceptions(source.dtypes, name)))
    }
    if inexact:
        exact: Any = _load(source, model, {**dtypes, **dict.fromkeys(inexact, torch.float32)})
        for name, names in inexact.items():
            mend(pipeline.components[name], names, exact.components[name])
    return pipeline


def _load(source: PipelineSource, model: ModelConfig, dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    """Loads the pipeline with these precisions by component, and fp32 for the others."""
    assert source.folder is not None
    try:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(
                source.folder,
                variant=model.variant,
                dtype={"default": torch.float32, **dtypes},
                **dict.fromkeys(source.absent),
            )
    except Exception as error:
        raise UserError(
            f"`--pretrained_model_name_or_path {model.pretrained_model_name_or_path}` could not be loaded: "
            f"{one_line(error).rstrip('.')}. Get the pipeline anew, or check `--variant`."
        ) from None


def save_pipeline(
    pipeline: Any, folder: Path, dtypes: dict[str, torch.dtype], classes: dict[str, list[str]] | None = None
) -> None:
    """Saves the pipeline with each model in its given precision; the models keep that precision afterwards.

    Configuration files are saved without the paths they were loaded from. A transformers model in half precision is
    recorded as fp32: without `dtype`, `from_pretrained` takes its precision from that record but fp32 for all other
    models, and a pipeline of mixed precision cannot sample.

    Args:
        dtypes: as `PipelineSource.dtypes`.
        classes: library and class of components in model_index.json. Without torchvision, transformers loads another
            image processor than the stored one and would record that.
    """
    round_pipeline(pipeline, dtypes)
    with quiet_loading():
        pipeline.save_pretrained(folder, safe_serialization=True)
        _save_tokenizers_as_loaded(pipeline, folder)
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8")) | (classes or {})
    index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.json"):
        _amend_config(file)


def move_pipeline(pipeline: Any, device: torch.device) -> None:
    """Moves all models of a pipeline to a device, without diffusers' advice on half precision."""
    with quiet_loading():
        pipeline.to(device)


def _save_tokenizers_as_loaded(pipeline: Any, folder: Path) -> None:
    # A used tokenizer saves its last padding and truncation in tokenizer.json.
    source = pipeline.config.get("_name_or_path")
    for name, component in pipeline.components.items():
        if isinstance(component, PreTrainedTokenizerBase) and source and (Path(source) / name).is_dir():
            type(component).from_pretrained(Path(source) / name).save_pretrained(folder / name)


def _amend_config(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    amended = {key: value for key, value in content.items() if key not in _OF_LOADING}
    if amended.get("dtype") in ("float16", "bfloat16"):
        amended["dtype"] = "float32"
    if amended != content:
        file.write_text(json.dumps(amended, indent=2) + "\n", encoding="utf-8")

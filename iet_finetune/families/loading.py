"""Loads a pipeline from a Hub id or folder, and saves it with every untrained component unchanged."""

import contextlib
import json
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..config.settings import ModelConfig
from ..errors import UserError, one_line

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    """

    folder: Path | None
    class_name: str
    classes: dict[str, list[str]]
    dtypes: dict[str, torch.dtype]
    absent: tuple[str, ...] = ()


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
    return PipelineSource(
        folder,
        str(index["_class_name"]),
        classes,
        stored_dtypes(folder, list(classes), model.variant),
        _absent(index),
    )


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
    return PipelineSource(None, class_name, classes, _summary(stored), _absent(index | {"_class_name": class_name}))


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
    assert source.folder is not None
    try:
        with quiet_loading():
            return DiffusionPipeline.from_pretrained(
                source.folder, variant=model.variant, dtype=torch.float32, **dict.fromkeys(source.absent)
            )
    except Exception as error:
        raise UserError(
            f"`--pretrained_model_name_or_path {model.pretrained_model_name_or_path}` could not be loaded: "
            f"{one_line(error).rstrip('.')}. Get the pipeline anew, or check `--variant`."
        ) from None


def stored_dtypes(folder: Path, components: list[str], variant: str | None) -> dict[str, torch.dtype]:
    """Returns the precision of most stored tensors of each component and, by component/tensor, of the exceptions.

    Components without weights are left out. T5 in fp16, for example, keeps some layers in fp32, which would overflow.

    Raises:
        UserError: a weights file is damaged; names it.
    """
    return _summary({name: _stored_dtypes(part_folder(folder, name), variant) for name in components})


def _summary(stored: dict[str, dict[str, torch.dtype]]) -> dict[str, torch.dtype]:
    """Component -> tensor -> precision, in the form of `PipelineSource.dtypes`."""
    found: dict[str, torch.dtype] = {}
    for name, dtypes in stored.items():
        if dtypes:
            found[name] = most = Counter(dtypes.values()).most_common(1)[0][0]
            found |= {f"{name}/{tensor}": dtype for tensor, dtype in dtypes.items() if dtype != most}
    return found


def _stored_dtypes(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    if not folder.is_dir():
        return {}
    return {name: dtype for file in _weight_files(folder, variant) for name, dtype in _dtypes_in(file).items()}


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    for suffix in (".safetensors", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        chosen = [file for file in files if variant is not None and f".{variant}" in file.name]
        plain = [file for file in files if file.name.count(".") == 1]
        if chosen or plain:
            return chosen or plain
    return []


def _dtypes_in(file: Path) -> dict[str, torch.dtype]:
    try:
        return _dtypes_pickled(file) if file.suffix == ".bin" else _dtypes_in_safetensors(file)
    except Exception as error:  # torch raises all kinds of errors, from EOFError to UnpicklingError
        raise UserError(f"`{file}` is damaged: {one_line(error).rstrip('.')}. Get the pipeline anew.") from None


def _dtypes_pickled(file: Path) -> dict[str, torch.dtype]:
    # Files from before torch 1.6 are not archives and cannot be mapped.
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}


def _dtypes_in_safetensors(file: Path) -> dict[str, torch.dtype]:
    with safe_open(file, framework="pt") as weights:
        dtypes = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
    return {name: _SAFETENSORS_DTYPES[dtype] for name, dtype in dtypes.items() if dtype in _SAFETENSORS_DTYPES}


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


def round_pipeline(pipeline: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Puts each model of the pipeline into its precision, given as in `PipelineSource.dtypes`."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and name in dtypes:
            start = f"{name}/"
            others = {key.removeprefix(start): dtype for key, dtype in dtypes.items() if key.startswith(start)}
            _round(component, dtypes[name], others)


def _round(module: nn.Module, dtype: torch.dtype, others: dict[str, torch.dtype]) -> None:
    """Converts the module to a precision, and the tensors in `others` to theirs."""
    exact = {name: tensor for name, tensor in module.state_dict().items() if name in others}
    # The plain method: diffusers' own warns about layers kept in fp32, which are handled below.
    nn.Module.to(module, dtype)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in exact:
            tensor.data = exact[name].to(others[name])


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

"""Finds a pipeline on the Hub, in a folder or in a checkpoint file, before any weight is read."""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn

from ..config.settings import ModelConfig
from ..errors import UserError, one_line
from .quiet import quiet_loading
from .single_file import configuration, flag, is_file, read_checkpoint, stored_parts, unused
from .stored import Stored, has_weights, only_variant, stored_weights, summary

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline is on disk, its class, and the precision of its stored components.

    Attributes:
        folder: None when training from scratch, or from a pipeline in memory; that of the configuration with a file.
        class_name: the class that it is loaded as.
        classes: component -> [library, class], as in model_index.json.
        dtypes: component -> precision of most of its weights, component/tensor -> precision of an exception.
        absent: missing components that must be passed to `from_pretrained` as None, such as SD 3's T5.
        stored: component -> what its weights files hold; empty without a folder.
        file: the checkpoint, where one file holds the weights.
        in_file: components that it holds; the others come from `folder`.
        variant: of the weights files in `folder`.
        index: the content of model_index.json; empty without a folder.
        saved_as: the class in it, where that draws from a picture with the models of a text-to-image pipeline.
        notes: what was decided without being asked, in lines.
    """

    folder: Path | None
    class_name: str
    classes: dict[str, list[str]]
    dtypes: dict[str, torch.dtype]
    absent: tuple[str, ...] = ()
    stored: dict[str, Stored] = field(default_factory=dict)
    file: Path | None = None
    in_file: tuple[str, ...] = ()
    variant: str | None = None
    index: dict[str, Any] = field(default_factory=dict)
    saved_as: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def own_index(self) -> dict[str, Any]:
        """The entries of model_index.json that the saved one takes over: its components, or all of another class."""
        if self.saved_as is None:
            return dict(self.classes)
        whole = {name: value for name, value in self.index.items() if not name.startswith("_")}
        absent = {name: [None, None] for name, value in whole.items() if isinstance(value, list)}
        return {**whole, **absent, **self.classes, "_class_name": self.saved_as}


def find_pipeline(model: ModelConfig) -> PipelineSource:
    """Finds the pipeline, downloading it from the Hub if needed; reads its index, not its weights.

    Raises:
        UserError: no such folder, file or repository, no network, or not a pipeline.
    """
    name = str(model.pretrained_model_name_or_path)
    if is_file(name):
        return _find_checkpoint(model)
    if model.base_config is not None:
        raise UserError(
            f"`--base_config {model.base_config}` is for a checkpoint file, and {flag(model)} is none: leave it out."
        )
    # Unlike pathlib's, this `exists` returns False for a name that is too long for the system.
    folder = Path(name) if os.path.exists(name) else _download(name, model)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is not a diffusers pipeline: it has no model_index.json."
        )
    index = _read_index(index_file)
    classes = _components(folder, index)
    folders = {name: part_folder(folder, name) for name in classes}
    variant = model.variant or only_variant(folders)
    stored = stored_weights(folders, variant)
    dtypes = summary({name: part.dtypes for name, part in stored.items()})
    chosen = f"{flag(model)} has its weights as the variant {variant} alone, which is taken"
    return PipelineSource(
        folder,
        str(index["_class_name"]),
        classes,
        dtypes,
        _absent(index),
        stored,
        variant=variant,
        index=index,
        notes=() if variant == model.variant else (chosen,),
    )


def _find_checkpoint(model: ModelConfig) -> PipelineSource:
    header = read_checkpoint(model)
    folder = configuration(model, header)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"`{folder}` is not the configuration of a diffusers pipeline, for it has no model_index.json: name one "
            "with `--base_config`."
        )
    index = _read_index(folder / "model_index.json")
    # diffusers reads no safety checker with a single file.
    classes = {name: value for name, value in _components(folder, index).items() if name != "safety_checker"}
    in_file = stored_parts(header, classes)
    others = [name for name in classes if name not in in_file and (folder / name / "config.json").is_file()]
    variant = only_variant({name: folder / name for name in others})
    stored = stored_weights({name: folder / name for name in others}, variant)
    if missing := [name for name in others if name not in stored]:
        raise UserError(
            f"{flag(model)} holds no {' and no '.join(missing)}: give the folder of a whole pipeline as "
            "`--base_config`, from which what is missing is taken."
        )
    notes = [f"{flag(model)} holds no {name}: that of `--base_config` is taken" for name in others]
    if left_out := unused(header):
        notes.append(
            f"{len(left_out)} of {len(header)} tensors in {flag(model)} are not used, such as `{left_out[0]}`"
        )
    stored |= in_file
    return PipelineSource(
        folder,
        str(index["_class_name"]),
        classes,
        summary({name: part.dtypes for name, part in stored.items()}),
        _absent(index),
        stored,
        Path(str(model.pretrained_model_name_or_path)),
        tuple(in_file),
        variant,
        index,
        notes=tuple(notes),
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
            path = _download_variant(name, model, model.variant)
    except Exception as error:
        # diffusers' own message refers to a traceback that is not shown.
        reason = one_line(error.__cause__ or error).rstrip(".")
        raise UserError(
            f"`--pretrained_model_name_or_path {name}` is no folder here, and the Hub did not give it ({reason}). "
            "Check the name, the network and, for a private or gated one, the login."
        ) from None
    _fetch_card(name, model)
    return Path(path)


def _download_variant(name: str, model: ModelConfig, variant: str | None) -> str:
    path = DiffusionPipeline.download(name, revision=model.revision, variant=variant, cache_dir=model.cache_dir)
    if variant is None and not all(has_weights(file.parent, None) for file in Path(path).glob("*/config.json")):
        # No weights but those of a variant, which diffusers leaves on the Hub without a word.
        with contextlib.suppress(ValueError):
            return _download_variant(name, model, "fp16")
    return path


def _fetch_card(name: str, model: ModelConfig) -> None:
    """Downloads the repository's README.md, which names the licence and which diffusers does not fetch."""
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError):
        hf_hub_download(name, "README.md", revision=model.revision, cache_dir=model.cache_dir)

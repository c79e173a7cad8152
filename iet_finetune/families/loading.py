"""Loads a pipeline that was found, and saves it with every untrained component unchanged."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from ..config.settings import ModelConfig
from ..errors import UserError, one_line
from .finding import PipelineSource
from .precision import exceptions, inexact_tensors, mend, round_pipeline
from .quiet import quiet_loading
from .single_file import check_all_used, flag, load_checkpoint

# Keys in which diffusers and transformers record where and how a configuration was loaded.
_OF_LOADING = ("_name_or_path", "name_or_path", "is_local", "local_files_only")


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
    mend_it = "Get the pipeline anew, or check `--variant`"
    try:
        with quiet_loading():
            if source.file is None:
                return _from_folder(source, dtypes, source.absent)
            mend_it = "Check that `--base_config` is of the same kind, or get the file anew"
            return _from_file(source, dtypes)
    except Exception as error:
        raise UserError(f"{flag(model)} could not be loaded: {one_line(error).rstrip('.')}. {mend_it}.") from None


def _from_folder(source: PipelineSource, dtypes: dict[str, torch.dtype], without: Iterable[str]) -> DiffusionPipeline:
    # By its own class, unless it is to be another one.
    kind: Any = DiffusionPipeline if source.saved_as is None else getattr(diffusers, source.class_name)
    return kind.from_pretrained(
        source.folder,
        variant=source.variant,
        dtype={"default": torch.float32, **dtypes},
        **dict.fromkeys(without),
    )


def _from_file(source: PipelineSource, dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    assert source.file is not None
    assert source.folder is not None
    others: dict[str, Any] = dict.fromkeys(source.absent)
    if outside := [name for name in source.stored if name not in source.in_file]:
        without = (*source.absent, *source.in_file, *(["safety_checker"] if "safety_checker" in source.index else []))
        rest: Any = _from_folder(source, {name: dtypes.get(name, torch.float32) for name in outside}, without)
        others |= {name: rest.components[name] for name in outside}
    in_file = {name: dtypes.get(name, torch.float32) for name in source.in_file}
    pipeline = load_checkpoint(source.file, source.folder, source.class_name, in_file, others)
    for name in {"unet", "transformer"} & in_file.keys():
        check_all_used(name, pipeline.components[name], source.stored[name])
    # As `from_pretrained` does; tokenizers are saved as they are there.
    pipeline.register_to_config(_name_or_path=str(source.folder))
    return pipeline


def save_pipeline(
    pipeline: Any, folder: Path, dtypes: dict[str, torch.dtype], own_index: dict[str, Any] | None = None
) -> None:
    """Saves the pipeline with each model in its given precision; the models keep that precision afterwards.

    Configuration files are saved without the paths they were loaded from. A transformers model in half precision is
    recorded as fp32: without `dtype`, `from_pretrained` takes its precision from that record but fp32 for all other
    models, and a pipeline of mixed precision cannot sample.

    Args:
        dtypes: as `PipelineSource.dtypes`.
        own_index: as `PipelineSource.own_index`. Without torchvision, transformers loads another image processor than
            the stored one and would record that.
    """
    round_pipeline(pipeline, dtypes)
    with quiet_loading():
        pipeline.save_pretrained(folder, safe_serialization=True)
        _save_tokenizers_as_loaded(pipeline, folder)
    amend_saved(folder, own_index)


def amend_saved(folder: Path, own_index: dict[str, Any] | None = None) -> None:
    """Amends the configurations of a saved pipeline in place; see `save_pipeline`."""
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    if own_index is not None and "_class_name" in own_index:
        # Of another class, which has other entries.
        index = {name: value for name, value in index.items() if name.startswith("_")}
    index |= own_index or {}
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
    # transformers before 5 wrote the second.
    for key in ("dtype", "torch_dtype"):
        if amended.get(key) in ("float16", "bfloat16"):
            amended[key] = "float32"
    if amended != content:
        file.write_text(json.dumps(amended, indent=2) + "\n", encoding="utf-8")

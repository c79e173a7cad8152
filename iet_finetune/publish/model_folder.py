"""Whole models in diffusers' folders, merged one tensor at a time, so that no model is ever in memory."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, one_line
from ..method.merging import merge_state_dicts
from .safetensors_files import write_like
from .upload_list import INDEX_NAME, component_names

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
SHARDS_NAME = f"{WEIGHTS_NAME}.index.json"
DENOISERS = ("unet", "transformer", "transformer_2")


def merge_pipelines(folders: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """The first pipeline with its denoiser replaced by the weighted average of all; everything else is copied from it.

    Args:
        folders: pipelines saved by diffusers, with the same denoisers.
        weights: one positive number each.
        output: an empty folder.

    Raises:
        UserError: a component is missing, or what `merge_models` raises.
    """
    components = [component_names(read_json(folder / INDEX_NAME)) for folder in folders]
    denoisers = [name for name in components[0] if name in DENOISERS]
    for folder, names in zip(folders, components, strict=True):
        if not denoisers or [name for name in names if name in DENOISERS] != denoisers:
            wanted = " and ".join(denoisers) or "unet or transformer"
            raise UserError(f"the pipeline in `{folder}` must have a {wanted}, as `{folders[0]}` has.")
    for name in components[0]:
        if name in denoisers:
            merge_models([folder / name for folder in folders], weights, output / name)
        elif (folders[0] / name).is_dir():
            shutil.copytree(folders[0] / name, output / name)
        else:
            raise UserError(f"`{folders[0]}` is not complete: {INDEX_NAME} names {name}, but it is missing.")
    shutil.copyfile(folders[0] / INDEX_NAME, output / INDEX_NAME)


def merge_models(folders: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Writes the weighted average of models, as `merge_state_dicts` gives it: bit for bit, in the first one's dtypes.

    Files are sharded as those of the first model. One tensor of each model is in memory at a time.

    Args:
        folders: each with a config.json and safetensors, sharded or not.
        weights: one positive number each.
        output: a folder, made if it is not there.

    Raises:
        UserError: a file is missing or damaged, or the models do not have the same configuration, tensors and shapes.
    """
    _check_same_config(folders)
    with contextlib.ExitStack() as stack:
        models = [_Model(folder, stack) for folder in folders]
        for model in models[1:]:
            _check_same_tensors(models[0], model)
        output.mkdir(exist_ok=True)
        for file in models[0].files:
            write_like(file, output / file.name, lambda name: _merged(name, models, weights))
    for name in (CONFIG_NAME, SHARDS_NAME):
        if (folders[0] / name).is_file():
            shutil.copyfile(folders[0] / name, output / name)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be read: {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"`{path}` must hold a JSON object, not a {type(values).__name__}.")
    return values


class _Model:
    """The tensors of one model, on disk until one is asked for."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._handles: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"`{file}` is not a safetensors file: {one_line(error)}.") from None
            self._handles |= dict.fromkeys(handle.keys(), handle)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._handles.items()}

    def tensor(self, name: str) -> Tensor:
        return self._handles[name].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    files = [folder / WEIGHTS_NAME]
    if (folder / SHARDS_NAME).is_file():
        shards = read_json(folder / SHARDS_NAME).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"`{folder / SHARDS_NAME}` has no `weight_map` of tensors to files.")
        files = [folder / Path(name).name for name in sorted(set(shards.values()))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(
            f"`{missing}` is missing: the weights must be safetensors without a variant, as `save_pretrained` "
            "writes them."
        )
    return files


def _check_same_config(folders: Sequence[Path]) -> None:
    configs = [read_json(folder / CONFIG_NAME) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if "quantization_config" in config:
            raise UserError(
                f"`{folder}` is quantized, and its numbers cannot be averaged: merge the original weights."
            )
        for key in sorted(configs[0].keys() | config.keys()):
            # Keys that begin with _ record a model's origin, except its class.
            noted = key.startswith("_") and key != "_class_name"
            if not noted and configs[0].get(key) != config.get(key):
                ours, theirs = config.get(key), configs[0].get(key)
                raise UserError(f"`{folder / CONFIG_NAME}` has {key} {ours}, but `{folders[0]}` has {theirs}.")


def _check_same_tensors(first: _Model, other: _Model) -> None:
    ours, theirs = first.shapes(), other.shapes()
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            lacking = other.folder if name in ours else first.folder
            raise UserError(f"`{lacking}` does not have the tensor `{name}`, which another of the models has.")
        if ours[name] != theirs[name]:
            raise UserError(
                f"`{name}` has shape {theirs[name]} in `{other.folder}`, but {ours[name]} in `{first.folder}`."
            )


def _merged(name: str, models: Sequence[_Model], weights: Sequence[float]) -> Tensor:
    tensors: list[Mapping[str, Tensor]] = [{name: model.tensor(name)} for model in models]
    return merge_state_dicts(tensors, weights)[name]

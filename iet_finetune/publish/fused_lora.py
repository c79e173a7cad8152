"""LoRA layers added to the weights of a pipeline, on their way from its files to those of the result."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..families import PipelineSource, amend_saved
from ..lora.layer import LoraLayer
from .base_files import Change, header_of, take_over
from .upload_list import INDEX_NAME

# Tensor's name -> what is added to it.
_Layers = Mapping[str, LoraLayer]


def fuse_lora(source: PipelineSource, layers: Mapping[str, LoraLayer], output: Path) -> None:
    """Writes a pipeline with weight + scaling · B A in the place of each layer's weight; the rest is as it was.

    A sum is in float64 and rounded once to fp32, and from there to the precision in which the weight is stored. One
    tensor is in memory at a time.

    Args:
        source: a base for which `base_files.are_plain` holds.
        layers: by component and module, as `read_lora` names them.
        output: an empty folder.

    Raises:
        UserError: the adapter has a layer that the base does not have, or a file is missing or damaged.
    """
    assert source.folder is not None
    changes = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in layers):
        own = {name.partition(".")[2]: layer for name, layer in layers.items() if name.startswith(f"{component}.")}
        changes[component] = _adding(_by_tensor(source, component, own))
    take_over(source, output, changes)
    shutil.copyfile(source.folder / INDEX_NAME, output / INDEX_NAME)
    amend_saved(output, source.own_index)


def _by_tensor(source: PipelineSource, component: str, layers: _Layers) -> _Layers:
    stored = header_of(source, component) if component in source.stored else {}
    found = {}
    for module, layer in layers.items():
        # Of a text encoder files of transformers 5 may lack the prefix that LoRA files have.
        names = [f"{name}.weight" for name in (module, module.removeprefix("text_model."), f"text_model.{module}")]
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise UserError(
                f"`{source.folder}` has no layer {component}.{module}, which the adapter changes: give its base."
            )
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        if stored[name][1] != shape:
            raise UserError(
                f"{component}.{module} has shape {stored[name][1]} in `{source.folder}`, but the adapter is for "
                f"{shape}: give its base."
            )
        found[name] = layer
    return found


def _adding(layers: _Layers) -> Change:
    @torch.no_grad()
    def changed(name: str, weight: Tensor) -> Tensor:
        if name not in layers:
            return weight
        total = weight.to(torch.float64, copy=True).flatten(1)
        total += layers[name].update().dense()
        return total.to(torch.float32).view(weight.shape)

    return changed

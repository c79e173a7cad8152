"""A pipeline's files taken over from its base, the weights of some components changed on the way.

No model is ever in memory: safetensors are read and written one tensor at a time, everything else is copied.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError, one_line
from ..families import PipelineSource
from ..families.finding import part_folder
from ..families.stored import Header, read_header, weight_files
from .safetensors_files import copied_like, nbytes

# Of configurations, vocabularies and chat templates; weights are chosen, and code is never taken.
_COPIED = (".json", ".txt", ".model", ".jinja")
Change = Callable[[str, Tensor], Tensor]
"""A tensor's name, and its numbers as they are stored -> its new numbers, in any floating-point dtype."""


def are_plain(source: PipelineSource) -> bool:
    """Whether all weights of a base are in safetensors files, in a folder for each component."""
    folder = source.folder
    if folder is None or source.file is not None:
        return False
    if any(part_folder(folder, name) != folder / name for name in source.classes):
        return False
    files = [file for name in source.stored for file in weight_files(folder / name, source.variant)]
    return all(file.suffix == ".safetensors" for file in files)


def header_of(source: PipelineSource, component: str) -> Header:
    """The tensors in a component's files; {} where they cannot be read, or one is there twice."""
    assert source.folder is not None
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        for file in weight_files(source.folder / component, source.variant):
            header = read_header(file)
            if found.keys() & header.keys():
                return {}
            found |= header
    except Exception:  # safetensors has errors of its own
        return {}
    return found


def take_over(
    source: PipelineSource,
    output: Path,
    changes: Mapping[str, Change],
    dtypes: Mapping[str, torch.dtype] | None = None,
    but: tuple[str, ...] = (),
) -> None:
    """Writes the components of a base into another folder, under the names that files have without a variant.

    They are copied, not linked: the result must not change, or grow into something that cannot be deleted, with the
    Hub's cache, nor the cache with the result.

    Args:
        source: for which `are_plain` holds.
        output: a folder, made if it is not there.
        changes: component -> what becomes of its tensors; shapes, dtypes, shards and metadata stay as they are.
        dtypes: component -> another dtype for all its floating-point tensors.
        but: components that are left out.

    Raises:
        UserError: a file is missing or damaged.
    """
    assert source.folder is not None
    output.mkdir(parents=True, exist_ok=True)
    for name in source.classes:
        if name in but:
            continue
        try:
            _write_part(source, name, output / name, changes.get(name), (dtypes or {}).get(name))
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            reason = one_line(error).rstrip(".")
            raise UserError(f"`{source.folder / name}` cannot be read: {reason}. Get the pipeline anew.") from None


def _write_part(
    source: PipelineSource, name: str, target: Path, change: Change | None, dtype: torch.dtype | None
) -> None:
    assert source.folder is not None
    folder = source.folder / name
    target.mkdir()
    chosen = weight_files(folder, source.variant)
    plain = {file.name: _without_variant(file.name, source.variant) for file in chosen}
    for file in chosen:
        if change is None:
            shutil.copyfile(file, target / plain[file.name])
        else:
            copied_like(file, target / plain[file.name], change, dtype)
    size = sum(nbytes(target / written) for written in plain.values()) if dtype is not None else None
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and not _is_index(file):
            shutil.copyfile(file, target / file.name)
        elif _is_index(file) and (index := _index_of(file, plain, size)) is not None:
            written = target / _without_variant(file.name, source.variant)
            if index == _read(file):
                shutil.copyfile(file, written)
            else:
                written.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _without_variant(name: str, variant: str | None) -> str:
    """`model.fp16-00001-of-00002.safetensors` -> `model-00001-of-00002.safetensors`, and so on."""
    return name if variant is None else re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", name, count=1)


def _is_index(file: Path) -> bool:
    return file.suffix == ".json" and ".index." in file.name


def _index_of(file: Path, plain: Mapping[str, str], size: int | None) -> dict[str, Any] | None:
    """What becomes of an index of shards; None for one of other files than those that are taken."""
    index = _read(file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not set(places.values()) <= plain.keys():
        return None
    metadata = dict(index.get("metadata") or {}) | ({"total_size": size} if size is not None else {})
    return {**index, "metadata": metadata, "weight_map": {tensor: plain[name] for tensor, name in places.items()}}


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))

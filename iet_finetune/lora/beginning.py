"""A LoRA file that a run's adapter begins from, instead of an update of 0."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..files import LORA_NAME
from .adapted import AdaptedLayer
from .adapters import Adapter
from .factors import as_matrix
from .layer import LoraLayer
from .reading import read_lora


@dataclass(frozen=True)
class Beginning:
    """An adapter to begin from.

    Attributes:
        flag: what errors call it.
        layers: as `read_lora` reads them.
        digest: of the file's bytes.
    """

    flag: str
    layers: Mapping[str, LoraLayer]
    digest: str

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())


def read_beginning(given: str | None, rank: int) -> Beginning | None:
    """The file that `--init_lora` names, or the one in the folder that it names; None without the flag.

    Args:
        rank: `--rank`.

    Raises:
        UserError: it is not there, is no LoRA file, or has a higher rank.
    """
    if given is None:
        return None
    path, flag = Path(given), f"`--init_lora {given}`"
    file = path / LORA_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{flag}: there is no such LoRA file, nor a folder with {LORA_NAME}.")
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{flag} cannot be read: {error.strerror}.") from None
    try:
        layers = read_lora(file)
    except UserError as error:
        raise UserError(f"`--init_lora`: {error}") from None
    found = Beginning(flag, layers, digest)
    if found.rank > rank:
        raise UserError(f"{flag} has rank {found.rank}, and `--rank` is {rank}: give `--rank {found.rank}`.")
    return found


@torch.no_grad()
def begin_from(adapter: Adapter, component: str, beginning: Beginning) -> None:
    """Gives the adapter the file's update; layers that the file lacks, and a rank beyond its own, begin as before.

    Where the run's scaling is 1 (alpha is the rank), B and A are the file's factors as `LoraLayer.folded` has them, to
    the bit where the file's scaling is a power of two. With another scaling each is rounded once, to fp32.

    Args:
        adapter: as `add_adapter` made it: A drawn, B of 0.
        component: of the pipeline, such as "unet".

    Raises:
        UserError: the file has a layer that the adapter does not have, or one of another shape.
    """
    ours = {f"{component}.{name}": layer for name, layer in adapter.layers.items()}
    if strange := [name for name in beginning.layers if name not in ours]:
        raise UserError(_not_adapted(beginning, component, strange))
    for name, lora in beginning.layers.items():
        _put(ours[name], lora, f"{beginning.flag}: its layer `{name}`")


def _not_adapted(beginning: Beginning, component: str, strange: list[str]) -> str:
    more = f" and {len(strange) - 1} others" if len(strange) > 1 else ""
    others = [name for name in strange if not name.startswith(f"{component}.")]
    if others:
        return f"{beginning.flag} changes `{others[0]}`, and only the {component} is trained: take it out of the file."
    names = ",".join(sorted({_short(name) for name in beginning.layers}))
    return (
        f"{beginning.flag} changes `{strange[0]}`{more}, which have no adapter here: give `--lora_layers {names}`, "
        "unless it was made for another model."
    )


def _short(name: str) -> str:
    """What `--lora_layers` may call a layer: the last part of its name, with the one before if that is a number."""
    head, _, last = name.rpartition(".")
    return f"{head.rpartition('.')[2]}.{last}" if last.isdigit() else last


def _put(layer: AdaptedLayer, lora: LoraLayer, what: str) -> None:
    if layer.scaling == 1:
        factors = lora.folded(torch.float32)
        up, down = as_matrix(factors.up, factors.down)
    else:
        up, down = layer.factors(lora.update())
    ours, rank = as_matrix(layer.up_weight, layer.down_weight), lora.rank
    if (up.shape[0], down.shape[1]) != ours.shape:
        raise UserError(
            f"{what} is ({up.shape[0]}, {down.shape[1]}), and ours is {ours.shape}: it was made for another model."
        )
    # Views: the first columns and rows are the file's.
    ours.up[:, :rank], ours.down[:rank] = up, down

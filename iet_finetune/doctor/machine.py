"""What a run finds on this machine: versions, devices, the Hub, how it is launched, and what is missing for what."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..audit.flags import EXTRA
from ..ensemble.budget import available_memory
from ..environment import environment, has_bf16
from ..errors import UserError, one_line
from ..files import gigabytes
from ..training.card import check_driver

# Package -> what it is needed for, where a run does without it otherwise.
OPTIONAL = {
    **dict.fromkeys(EXTRA, "an audit: `pip install 'iet_finetune[audit]'`"),
    "tensorboard": "curves in TensorBoard, the default of `--report_to`: `pip install tensorboard`",
    "bitsandbytes": "`--use_8bit_adam`, on a GPU: `pip install bitsandbytes`",
    "wandb": "`--report_to wandb`: `pip install wandb`",
}


def about_machine() -> Iterator[str]:
    """Lines on this machine. Nothing is loaded or downloaded, and no network is needed."""
    facts = environment()
    versions = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
    yield f"versions: Python {facts['python']} on {platform.system()} {facts['processor']}; {versions}"
    yield from _devices()
    yield f"memory: {gigabytes(available_memory(), math.floor)} are free, {os.cpu_count()} cores"
    yield f"disk: {_disk(Path.cwd(), 'here')}; {_disk(_cache(), 'for downloads and what is encoded')}"
    yield f"Hub: {_hub()}"
    yield f"launch: {_launch()}"
    missing = [(name, what) for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    for name, what in missing:
        yield f"missing: {name}, for {what}"


def _devices() -> Iterator[str]:
    if not torch.cuda.is_available():
        try:
            check_driver()
        except UserError as error:
            yield f"GPU: {error}"
            return
        yield "GPU: none that torch can use; training runs on the CPU, which is slow for all but small models"
        return
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        half = "bf16" if has_bf16(torch.device("cuda")) else "no bf16: use `--mixed_precision fp16`"
        free, _ = torch.cuda.mem_get_info(number)
        has = f"{gigabytes(card.total_memory, math.floor)}, {gigabytes(free, math.floor)} of them free"
        yield f"GPU {number}: {card.name}, {has}; {half}"


def _disk(folder: Path, which: str) -> str:
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return f"{gigabytes(shutil.disk_usage(there).free, math.floor)} are free {which} ({folder})"


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME)


def _hub() -> str:
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "`HF_HUB_OFFLINE` is set: only what was downloaded before is found"
    if get_token() is None:
        return f"{ENDPOINT}, not logged in: gated models and `--push_to_hub` need `hf auth login`"
    return f"{ENDPOINT}, a login is stored"


def _launch() -> str:
    """What `accelerate launch` will do without flags of its own."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not os.path.isfile(default_config_file):
        return "`accelerate launch` has no configuration of its own: it starts one process a GPU, or one on a CPU"
    try:
        found = load_config_from_file(None)
    except Exception as error:  # whatever a file of another version or a text editor brings
        return f"{default_config_file} cannot be read ({one_line(error)}): make it anew with `accelerate config`"
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    return (
        f"{default_config_file}: {found.num_processes} process{'es' * (found.num_processes != 1)}, {kind}, mixed "
        f"precision {found.mixed_precision}"
    )

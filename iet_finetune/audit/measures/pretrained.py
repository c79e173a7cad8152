"""Pretrained transformers models: loaded quietly and completely, and identified by their weights."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from ...environment import without_tf32
from ...errors import UserError, one_line
from ...families.quiet import quiet_loading

# What a configuration says of where it came from and who wrote it, not of what the network does.
_NOT_OF_THE_NETWORK = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


def load_part(kind: Any, name: str, flag: str, wanted: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, in silence, in fp32, without remote code; other output of it is passed through.

    Raises:
        UserError: it cannot be loaded; says that `flag` `name` holds no `wanted`, or that the Hub did not give it.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # What a checkpoint lacks is drawn at random.
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, KeyError, safetensors' own: whatever is wrong with a folder
        reason = one_line(error).rstrip(".")
        if os.path.isdir(name):
            text = f"`{flag} {name}` holds no {wanted} that transformers can load ({reason}): give another folder."
        else:
            text = (
                f"`{flag} {name}` is no folder here, and the Hub gave no {wanted} of that name ({reason}): check the "
                "name and the connection."
            )
        raise UserError(text) from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_model(name: str, flag: str, wanted: str) -> tuple[Any, set[str]]:
    """A model of transformers in fp32, and the names of the weights of its pooler if those are not stored.

    A model that has image features does not do without a pooler.

    Raises:
        UserError: there is none, or other weights are missing or have another shape.
    """
    model, info = load_part(AutoModel, name, flag, wanted, dtype=torch.float32, output_loading_info=True)
    missing = set(info["missing_keys"])
    spared = "pooler." if not hasattr(model, "get_image_features") else "\0"
    wrong = sorted([key for key in missing if spared not in key] + [str(key) for key in info["mismatched_keys"]])
    if wrong:
        raise UserError(
            f"`{flag} {name}` is not complete: {len(wrong)} weights are missing or do not fit, such as {wrong[0]}. "
            "Get the model anew."
        )
    return model.eval(), missing


def stored_weights(model: nn.Module, missing: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all weights but those that are not stored."""
    return ((name, tensor) for name, tensor in model.state_dict().items() if name not in missing)


def pooled(output: Any) -> Tensor:
    """The features (B, D) that `get_image_features` or `get_text_features` gives, in whichever form it does."""
    return output if isinstance(output, Tensor) else output.pooler_output


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Without TF32 and without cuDNN's search for the fastest way inside: the same numbers every time."""
    cudnn: Any = torch.backends.cudnn
    names, wanted = ("enabled", "benchmark", "deterministic"), (True, False, True)
    before = [getattr(cudnn, name) for name in names]
    try:
        for name, value in zip(names, wanted, strict=True):
            setattr(cudnn, name, value)
        with without_tf32():
            yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(cudnn, name, value)


def fingerprint_of(weights: Iterable[tuple[str, Tensor]], *settings: object) -> str:
    """A hexadecimal hash of every bit of the weights, their names, shapes and dtypes, and of settings fit for JSON."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without what depends on where they were read and by which version."""
    return {
        key: plain_settings(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key not in _NOT_OF_THE_NETWORK
    }

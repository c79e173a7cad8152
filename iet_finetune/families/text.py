"""Tokenizes captions and encodes them with CLIP and T5, as diffusers' pipelines do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.transfer import to_device
from ..errors import UserError


def token_ids(tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
    """Returns (B, length) int64 on the host, padded and truncated to `length`."""
    return tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def clip_states(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Returns the penultimate hidden states (B, length, D) and the encoder's first output.

    For a CLIPTextModelWithProjection that is the projected state (B, P) of the last token.
    """
    output = encoder(to_device(token_ids(tokenizer, captions, length), encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]


@torch.no_grad()
def clip_pooled(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> Tensor:
    """Returns the last token's state (B, D) of a CLIPTextModel."""
    return encoder(to_device(token_ids(tokenizer, captions, length), encoder.device)).pooler_output


@torch.no_grad()
def t5_states(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> Tensor:
    """Returns the last hidden states (B, length, D) of a T5EncoderModel, padding included, as in the pipelines."""
    return encoder(to_device(token_ids(tokenizer, captions, length), encoder.device))[0]


def require_parts(pipeline: Any, names: Sequence[str]) -> None:
    """Raises a `UserError` that names the first of these components that is missing."""
    for name in names:
        if getattr(pipeline, name) is None:
            raise UserError(
                f"the {type(pipeline).__name__} has no {name}, without which nothing can be trained: get it complete."
            )

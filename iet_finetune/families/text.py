"""Captions as tokens, and what CLIP and T5 make of them, as diffusers' pipelines for text do it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError


def token_ids(tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
    """(B, length) int64 on the host; what is shorter is padded, what is longer is cut off."""
    return tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def clip_states(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The hidden states before the last layer (B, length, D), and the encoder's first output.

    That is the projected state of the last token (B, P) of a CLIPTextModelWithProjection.
    """
    output = encoder(
        token_ids(tokenizer, captions, length).to(encoder.device, non_blocking=True), output_hidden_states=True
    )
    return output.hidden_states[-2], output[0]


@torch.no_grad()
def clip_pooled(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> Tensor:
    """The last token's state (B, D) of a CLIPTextModel."""
    return encoder(token_ids(tokenizer, captions, length).to(encoder.device, non_blocking=True)).pooler_output


@torch.no_grad()
def t5_states(tokenizer: Any, encoder: Any, captions: Sequence[str], length: int) -> Tensor:
    """The last hidden states (B, length, D) of a T5EncoderModel, padding too, as the pipelines have it."""
    return encoder(token_ids(tokenizer, captions, length).to(encoder.device, non_blocking=True))[0]


def require_parts(pipeline: Any, names: Sequence[str]) -> None:
    """Raises a `UserError` that names the first of these components that the pipeline does without."""
    for name in names:
        if getattr(pipeline, name) is None:
            raise UserError(
                f"the {type(pipeline).__name__} has no {name}, without which nothing can be trained: get it complete."
            )

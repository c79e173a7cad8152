"""Prompts that are encoded before anything is drawn from them: encoders and denoiser never meet on a device."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .base import Family


class PromptsEncoded(Exception):
    """Ends the call of a pipeline whose prompts have been encoded."""


class NotThere(Exception):
    """A pipeline has called a model that is not on the device."""


class Away(nn.Module):
    """Stands in for a model of a pipeline that is not on the device: has all of its settings, and computes nothing.

    Args:
        model: the model itself, which stays where it is.
        device: where the pipeline computes, in fp32.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        # Not as a part: whatever is done to the pipeline's models is not done to it.
        self.__dict__["_model"] = model
        self.device, self.dtype = device, torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `NotThere`."""
        raise NotThere(f"a {type(self.__dict__['_model']).__name__} is not on the device")


@contextmanager
def away(pipeline: Any, names: Sequence[str], device: torch.device) -> Iterator[None]:
    """Inside, the pipeline has an `Away` in the place of each of these models that it has."""
    found = {name: part for name in names if isinstance(part := getattr(pipeline, name, None), nn.Module)}
    pipeline.register_modules(**{name: Away(part, device) for name, part in found.items()})
    try:
        yield
    finally:
        pipeline.register_modules(**found)


class EncodedPrompts:
    """What `encode_prompt` of a pipeline returned, on the host, by what it was called with."""

    def __init__(self) -> None:
        self._answers: dict[str, Any] = {}

    @contextmanager
    def noting(self, pipeline: Any) -> Iterator[None]:
        """Inside, a call of the pipeline raises `PromptsEncoded` as soon as its prompts are encoded and noted."""
        encode = pipeline.encode_prompt

        def note(*args: Any, **kwargs: Any) -> Any:
            self._answers[_key(encode, args, kwargs)] = tree_map(_on_host, encode(*args, **kwargs))
            raise PromptsEncoded

        with _replaced(pipeline, note):
            yield

    @contextmanager
    def answering(self, pipeline: Any, encoders: Sequence[str], device: torch.device) -> Iterator[None]:
        """Inside, the pipeline does without its text encoders: what was noted is on the device when it is asked for.

        Numbers are in fp32 there, whatever they were computed in, as are then the latents.
        """
        encode = pipeline.encode_prompt

        def answer(*args: Any, **kwargs: Any) -> Any:
            key = _key(encode, args, kwargs)
            if key not in self._answers:
                raise NotThere(f"these prompts were not encoded before: {key}")
            return tree_map(lambda value: _on_device(value, device), self._answers[key])

        with away(pipeline, encoders, device), _replaced(pipeline, answer):
            yield


def encodes_first(family: Family) -> bool:
    """Whether the family's pipeline encodes prompts in a call of its own."""
    has_encoders = any(getattr(family.pipeline, name, None) is not None for name in family.caption_encoders)
    return has_encoders and hasattr(type(family.pipeline), "encode_prompt")


def encode_prompts(
    family: Family, pipeline: Any, calls: Sequence[Callable[[], object]], device: torch.device
) -> EncodedPrompts | None:
    """Encodes the prompts of calls of a pipeline, with the text encoders alone on the device, in those same batches.

    Args:
        family: frozen; its models wait elsewhere.
        pipeline: a shell of its own, of the family's models.
        calls: each calls the pipeline once.

    Returns:
        None where the pipeline does not encode prompts in a call of its own, or needs other models for it.
    """
    if not calls or not encodes_first(family):
        return None
    prompts, encoders = EncodedPrompts(), family.caption_encoders
    others = [name for name in pipeline.components if name not in encoders]
    with ExitStack() as stack:
        stack.enter_context(family.lent(encoders, device))
        stack.enter_context(torch.no_grad())
        stack.enter_context(away(pipeline, others, device))
        stack.enter_context(prompts.noting(pipeline))
        try:
            for call in calls:
                with suppress(PromptsEncoded):
                    call()
        except NotThere:
            return None
    return prompts


@contextmanager
def _replaced(pipeline: Any, function: Callable[..., Any]) -> Iterator[None]:
    """The pipeline's `encode_prompt` is this function inside."""
    pipeline.encode_prompt = function
    try:
        yield
    finally:
        del pipeline.encode_prompt


def _key(encode: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    bound = inspect.signature(encode).bind(*args, **kwargs)
    return repr(sorted((name, repr(value)) for name, value in bound.arguments.items() if name != "device"))


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _on_device(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

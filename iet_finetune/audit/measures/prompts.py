"""Prompt memorization: how far a prompt pulls the predicted noise from the unconditional prediction."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...families.base import evaluating
from ...families.quiet import quiet_loading
from .findings import Findings, histogram
from .memorization import repeat_classes
from .metrics import Metric, mean
from .separation import auc_metric, common_edges

# Pipelines that draw by classifier-free guidance with one call of the denoiser a step, for the batch without the
# prompts and with them, one after the other.
GUIDED = (
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
)
_NAMES = ("prompt_memorization", "prompt_memorization_auc")
_FEW = 30


def guidance_fault(pipeline: Any, guidance: float | None) -> str | None:
    """Why prompt memorization cannot be measured, in words for the report; None if it can.

    Args:
        pipeline: of diffusers.
        guidance: the scale to draw with; None is the pipeline's default.
    """
    kind = type(pipeline).__name__
    parameters = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in parameters:
        return f"a {kind} draws without prompts"
    if kind not in GUIDED:
        return f"a {kind} does not predict the noise without the prompt too (no classifier-free guidance)"
    # A distilled UNet takes the scale as an input, and predicts once.
    if getattr(getattr(pipeline, "unet", None), "config", {}).get("time_cond_proj_dim") is not None:
        return f"the UNet of this {kind} takes its guidance as an input, and predicts no noise without the prompt"
    scale = parameters["guidance_scale"].default if guidance is None else guidance
    return f"drawn with guidance {scale:g}: it takes more than 1" if scale <= 1 else None


def prompt_norms(
    pipeline: Any,
    denoiser: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int,
    size: int,
    steps: int,
    guidance: float | None,
    options: Mapping[str, Any],
) -> np.ndarray:
    """The statistic of each prompt, (P,) fp32: mean over the calls of the denoiser of |eps(x_t, prompt) - eps(x_t)|_2.

    x_t is what the pipeline draws from the prompt. A memorized prompt pulls harder, from the first step on (Wen, Liu,
    Chen and Lyu, "Detecting, Explaining, and Mitigating Memorization in Diffusion Models", ICLR 2024).
    For models that predict v or a velocity it is the norm of that: compare models of one kind. A learned variance does
    not count. Nothing is decoded, and nothing read back before a batch is done.

    Args:
        pipeline: without a safety checker.
        denoiser: its unet or transformer.
        prompts, seeds: P of each; a prompt's first noise is that of its seed.
        batch_size: prompts at a time; always as many, so that the bits of one do not depend on how many there are.
        size: side of the images in pixels.
        steps: of sampling.
        guidance: None is the pipeline's default.
        options: further arguments of the pipeline, as `Family.call_options`.

    Raises:
        ValueError: the pipeline draws without classifier-free guidance.
    """
    if reason := guidance_fault(pipeline, guidance):
        raise ValueError(f"prompt memorization: {reason}")
    told: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "latent"}
    told |= dict(options) | ({} if guidance is None else {"guidance_scale": guidance})
    norms = []
    with evaluating(denoiser):
        for start in range(0, len(prompts), batch_size):
            chosen = [min(start + i, len(prompts) - 1) for i in range(batch_size)]
            generators = [torch.Generator().manual_seed(int(seeds[i])) for i in chosen]
            with _watched(denoiser, batch_size) as watch, torch.no_grad(), quiet_loading():
                pipeline([prompts[i] for i in chosen], generator=generators, **told)
            norms.append(watch.mean().cpu().numpy())
    return np.concatenate([*norms, np.zeros(0, dtype=np.float32)])[: len(prompts)]


class _Watch:
    """Adds up the norms of the calls of a denoiser with a batch twice, on the device."""

    def __init__(self, batch_size: int, channels: int) -> None:
        self._batch_size = batch_size
        self._channels = channels
        self._total: Tensor | None = None
        self._calls = 0

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """The hook: changes nothing."""
        predictions = output[0].detach()[:, : self._channels].float()
        if len(predictions) != 2 * self._batch_size:  # a further call, as of skip-layer guidance
            return
        without, given = predictions.flatten(1).chunk(2)
        norms = torch.linalg.vector_norm(given - without, dim=1)
        self._total = norms if self._total is None else self._total + norms
        self._calls += 1

    def mean(self) -> Tensor:
        """(batch_size,) fp32, over the calls."""
        if self._total is None:
            raise ValueError("prompt memorization: the denoiser was not called with and without the prompts")
        return self._total / self._calls


@contextmanager
def _watched(denoiser: Any, batch_size: int) -> Iterator[_Watch]:
    watch = _Watch(batch_size, denoiser.config.in_channels)
    handle = denoiser.register_forward_hook(watch)
    try:
        yield watch
    finally:
        handle.remove()


def prompt_findings(training: np.ndarray, heldout: np.ndarray | None, seed: int = 0) -> Findings:
    """`prompt_memorization`, the mean over training captions beside that over held-out ones, and how far they part.

    Args:
        training: norms (P,) of the distinct captions that were trained on.
        heldout: norms (Q,) of captions that were not; None or empty if there are none.
        seed: of the bootstrap.
    """
    heldout = np.zeros(0) if heldout is None else heldout
    if not len(training):
        return Findings(not_measured=dict.fromkeys(_NAMES, "there are no captions"))
    both = np.concatenate([training, heldout]).astype(np.float64)
    if broken := int((~np.isfinite(both)).sum()):
        reason = f"{broken} of the {len(both)} norms are not finite"
        return Findings(not_measured=dict.fromkeys(_NAMES, reason))
    training, heldout = both[: len(training)], both[len(training) :]
    baseline = float(heldout.mean()) if len(heldout) else None
    metrics, missing = {_NAMES[0]: mean(training, seed).against(baseline)}, {}
    if len(heldout):
        metrics[_NAMES[1]] = auc_metric(training, heldout, seed)
    else:
        missing[_NAMES[1]] = "needs captions of held-out images"
    series = {"training": training, "heldout": heldout if len(heldout) else None}
    histograms = {"prompt": histogram(common_edges(both), **series)}
    return Findings(metrics, missing, _few(len(training), len(heldout)), histograms)


def _few(training: int, heldout: int) -> list[str]:
    return [
        f"prompt memorization has only {count} {kind} captions: its intervals are wide"
        for count, kind in ((training, "training"), (heldout, "held-out"))
        if 0 < count < _FEW
    ]


def prompt_by_repeats(norms: np.ndarray, repeats: np.ndarray, seed: int = 0) -> dict[str, Metric]:
    """The mean norm of the captions of each class of repeats.

    Args:
        norms: (P,).
        repeats: (P,) int64, of the image of each caption.

    Returns:
        By label of the class; classes without captions are left out, and all of them with norms that are not finite.
    """
    if not np.isfinite(norms).all():
        return {}
    return {label: mean(norms[mask].astype(np.float64), seed) for label, mask in repeat_classes(repeats)}

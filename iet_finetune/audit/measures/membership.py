"""Membership inference: can the training images be told from held-out ones by the model's loss on them?"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...families.base import Conditions, Family, evaluating
from ...families.encoding import Encoder
from ...method.objective import Objective, per_sample_loss
from ..inputs.context import NEEDS_HELDOUT
from .findings import Findings, NoiseLevel, histogram
from .memorization import repeat_classes
from .metrics import Metric, mean
from .separation import auc_metric, common_edges, tpr_metric

FEWEST_DRAWS = 8
# The stream of random numbers of the fixed noise: no number that `seeding` keys its own streams by.
_NOISE = 64
_FEW, _FEW_FOR_FPR = 30, 100
Losses = tuple[np.ndarray, ...]  # of the model (N, J), and then of the reference if there is one


class Draws(NamedTuple):
    """Noise levels and noise, the same for every image and every model.

    Attributes:
        timesteps: (J,) int64, those of the objective.
        noise: (J, C, H, W) fp32, standard normal.
        levels: of each draw the share of the schedule, from little noise to much, in (0, 1); sigma for flow matching.
    """

    timesteps: Tensor
    noise: Tensor
    levels: tuple[float, ...]


def fixed_draws(
    objective: Objective,
    shape: tuple[int, int, int],
    count: int = FEWEST_DRAWS,
    seed: int = 0,
    low: float = 0.05,
    high: float = 0.30,
) -> Draws:
    """Draws at little noise, where memorization shows: at the middles of `count` equal parts of [low, high].

    Args:
        shape: (C, H, W) of a latent.
        count: J. With fewer than 8 draws chance in the noise hides what the loss has to say.
        seed: of the noise; torch's generators are left alone. More draws begin with the noise of fewer.
        low, high: part of the schedule from little noise (0) to much (1).

    Raises:
        ValueError: fewer than 8 draws.
    """
    if count < FEWEST_DRAWS:
        raise ValueError(f"membership inference takes at least {FEWEST_DRAWS} draws, not {count}")
    return _draws(objective, shape, count, seed, low, high)


def spread_draws(objective: Objective, shape: tuple[int, int, int], count: int = FEWEST_DRAWS, seed: int = 0) -> Draws:
    """As `fixed_draws` but over the whole schedule, for a held-out loss; any number of draws will do."""
    return _draws(objective, shape, count, seed, low=0.0, high=1.0)


def _draws(objective: Objective, shape: tuple[int, int, int], count: int, seed: int, low: float, high: float) -> Draws:
    timesteps, levels = objective.nearest(
        low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
    )
    streams = (np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_NOISE, j))) for j in range(count))
    noise = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
    return Draws(timesteps, torch.from_numpy(noise), tuple(levels.tolist()))


@torch.no_grad()
def image_losses(
    family: Family,
    pixel_values: Tensor,
    captions: Sequence[str],
    sizes: Tensor,
    labels: Tensor,
    draws: Draws,
    device: torch.device,
) -> Tensor:
    """The unweighted training loss of each image at each draw, (B, J) fp32 on the device.

    An image is encoded once, as the mean of its posterior, in fp32 even under autocast, as while training.
    The bits of a row do not depend on the other images of its batch as long as the batches are of the same size: pad
    the last one.

    Args:
        family: placed on the device.
        pixel_values: (B, 3, H, W) fp32 in [-1, 1].
        captions: B of them; not looked at if the family needs none.
        sizes: (B, 6) int64, and `labels` (B,) int64: as `Family.details` takes them.
        draws: for latents of the images' shape.
    """
    with torch.autocast(device.type, enabled=False):
        latents = image_latents(family, pixel_values.to(device))
        conditions = caption_conditions(family, captions, device)
    conditions = conditions | family.details(sizes.to(device), labels.to(device))
    return denoising_losses(family, latents, conditions, draws)


@torch.no_grad()
def denoising_losses(family: Family, latents: Tensor, conditions: Conditions, draws: Draws) -> Tensor:
    """The same of latents (B, C, H, W) and all that the denoiser is conditioned on, on its device."""
    timesteps, noise = draws.timesteps.to(latents.device), draws.noise.to(latents.device)
    with evaluating(family.denoiser):
        losses = [
            _losses(family, latents, noise_j.expand_as(latents), timestep.expand(len(latents)), conditions)
            for timestep, noise_j in zip(timesteps, noise, strict=True)
        ]
    return torch.stack(losses, dim=1)


def _losses(family: Family, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    noisy_latents = family.objective.add_noise(latents, noise, timesteps)
    prediction = family.predict(noisy_latents, timesteps, conditions)
    return per_sample_loss(prediction, family.objective.target(latents, noise, timesteps))


@torch.no_grad()
def image_latents(family: Family, pixel_values: Tensor) -> Tensor:
    """The means of the posteriors of B images on the encoders' device, in chunks of one size as while training."""
    means, stds = Encoder(family, len(pixel_values), pixel_values.device).images(pixel_values)
    return family.latents(means, stds, torch.zeros_like(means))


@torch.no_grad()
def caption_conditions(family: Family, captions: Sequence[str], device: torch.device) -> Conditions:
    """What B captions say, in chunks of one size as while training; the encoders are on the device."""
    return Encoder(family, len(captions), device).captions(list(captions))


def raw_scores(losses: np.ndarray) -> np.ndarray:
    """How much the model seems to know each image: s_i = -mean_j log l_ij, (N,) float64 from losses (N, J).

    A low loss marks a member (Yeom et al., "Privacy Risk in Machine Learning", 2018; for diffusion models Matsumoto et
    al., 2023, and Duan et al., "SecMI", 2023). In logarithms every draw counts the same: the loss of epsilon at little
    noise is many times that at much.
    """
    return -_log(losses).mean(axis=1)


def calibrated_scores(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much better the model knows each image than a reference does: s_i = mean_j (log l_ref,ij - log l_ij).

    The reference says how hard an image is by itself (Watson et al., "On the Importance of Difficulty Calibration in
    Membership Inference Attacks", 2021).

    Args:
        losses: (N, J) of the model.
        reference: (N, J), at the same draws, of a model that was not trained on these images.

    Returns:
        (N,) float64.
    """
    return (_log(reference) - _log(losses)).mean(axis=1)


def _log(losses: np.ndarray) -> np.ndarray:
    # A loss of 0 means an image known exactly, not an infinite score.
    return np.log(np.maximum(losses.astype(np.float64), np.finfo(np.float32).tiny))


def membership_findings(
    train: np.ndarray,
    heldout: np.ndarray,
    levels: Sequence[float],
    ref_train: np.ndarray | None = None,
    ref_heldout: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[Findings, list[NoiseLevel]]:
    """How well training images can be told from held-out ones, over all draws and at each noise level.

    Args:
        train, heldout: losses (N, J) and (H, J) of the model at the same draws.
        levels: (J,), of the draws.
        ref_train, ref_heldout: those of a reference model, or None.
        seed: of the bootstrap.

    Returns:
        Findings: `mia_auc` and `mia_tpr_at_1_fpr` from `raw_scores`, `mia_ref_auc` and `mia_ref_tpr_at_1_fpr` from
        `calibrated_scores`, histograms `mia` and `mia_ref`; what cannot be measured says why.
        `mia_auc` and `mia_ref_auc` of each noise level, from little to much, without what cannot be measured.
    """
    findings = [_attack("mia", raw_scores, (train,), (heldout,), seed)]
    by_level = [_levels("mia_auc", raw_scores, (train,), (heldout,), seed)]
    if ref_train is None or ref_heldout is None:
        findings.append(Findings(not_measured=dict.fromkeys(_names("mia_ref"), "needs `--reference_model`")))
    else:
        pairs = (train, ref_train), (heldout, ref_heldout)
        findings.append(_attack("mia_ref", calibrated_scores, *pairs, seed))
        by_level.append(_levels("mia_ref_auc", calibrated_scores, *pairs, seed))
    rows = [
        NoiseLevel(round(level, 4), {name: metric for parts in by_level for name, metric in parts.get(j, {}).items()})
        for j, level in sorted(enumerate(levels), key=lambda pair: pair[1])
    ]
    return Findings.merged(*findings), [row for row in rows if row.metrics]


def _names(attack: str) -> tuple[str, str]:
    return f"{attack}_auc", f"{attack}_tpr_at_1_fpr"


def _attack(name: str, score: Callable[..., np.ndarray], train: Losses, heldout: Losses, seed: int) -> Findings:
    """One attack: `score` of the losses of the model, and of the reference if there is one."""
    if reason := _fault(train, heldout):
        return Findings(not_measured=dict.fromkeys(_names(name), reason))
    members, others = score(*train), score(*heldout)
    area, rate = auc_metric(members, others, seed), tpr_metric(members, others, seed=seed)
    return Findings(
        metrics=dict(zip(_names(name), (area, rate), strict=True)),
        warnings=_few(len(members), len(others)),
        histograms={name: histogram(common_edges(members, others), training=members, heldout=others)},
    )


def _levels(
    name: str, score: Callable[..., np.ndarray], train: Losses, heldout: Losses, seed: int
) -> dict[int, dict[str, Metric]]:
    """The area of each draw alone, by its place; none where the losses cannot be used."""
    if _fault(train, heldout):
        return {}
    rows = {}
    for j in range(train[0].shape[1]):
        members, others = (score(*(losses[:, [j]] for losses in side)) for side in (train, heldout))
        rows[j] = {name: auc_metric(members, others, seed)}
    return rows


def _fault(train: Losses, heldout: Losses) -> str | None:
    """Why training and held-out images cannot be compared by these losses, in words; None if they can."""
    if not len(train[0]):
        return "there are no training images to compare with"
    if not len(heldout[0]):
        return NEEDS_HELDOUT
    return _not_finite(*train, *heldout)


def _not_finite(*losses: np.ndarray) -> str | None:
    broken = sum(int((~np.isfinite(part)).sum()) for part in losses)
    return f"{broken} of {sum(part.size for part in losses)} losses are not finite" if broken else None


def _few(members: int, others: int) -> list[str]:
    warnings = []
    if others < _FEW_FOR_FPR:
        warnings.append(
            f"true positives at 1 % false positives: 1 % of {others} held-out images is less than one image; at least "
            f"{_FEW_FOR_FPR} are needed"
        )
    for count, kind in ((members, "training"), (others, "held-out")):
        if count < _FEW:
            warnings.append(f"membership inference has only {count} {kind} images: its intervals are wide")
    return warnings


def membership_by_repeats(
    train: np.ndarray, repeats: np.ndarray, heldout: np.ndarray, seed: int = 0
) -> dict[str, Metric]:
    """The AUC of the images of each class of repeats against all held-out ones.

    Args:
        train, heldout: scores (N,) and (H,), raw or calibrated.
        repeats: (N,) int64, how many training images each stands for.

    Returns:
        By label of the class; classes without images are left out, and all of them if there are no held-out images or
        not all scores are finite.
    """
    if _fault((train,), (heldout,)):
        return {}
    return {label: auc_metric(train[inside], heldout, seed) for label, inside in repeat_classes(repeats)}


def loss_findings(heldout: np.ndarray, training: np.ndarray | None = None, seed: int = 0) -> Findings:
    """`heldout_loss`: the mean over images of the mean over draws, of losses (H, J).

    Its baseline is the other way round here: the same of the training images' losses (N, J), None if they were not
    measured. The further it lies below, the more the model has fitted them.
    """
    fitted = training if training is not None and len(training) else None
    reason = NEEDS_HELDOUT if not len(heldout) else _not_finite(heldout, *([] if fitted is None else [fitted]))
    if reason is not None:
        return Findings(not_measured={"heldout_loss": reason})
    loss = mean(heldout.astype(np.float64).mean(axis=1), seed)
    return Findings(
        metrics={"heldout_loss": loss.against(None if fitted is None else float(fitted.mean(dtype=float)))}
    )

"""Membership inference and the loss on held-out images: losses with the same draws of noise for all images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.dataset import TrainingImages
from ...errors import UserError
from ..inputs.context import NEEDS_HELDOUT, NEEDS_MODEL, AuditContext, choose
from ..inputs.images import Pixels, digest, training_transform
from ..inputs.pipelines import SubjectSource
from ..inputs.samples import autocast
from ..inputs.subject import Subject
from .findings import Findings, ModelIdentity, NoiseLevel
from .membership import (
    Draws,
    calibrated_scores,
    fixed_draws,
    image_losses,
    loss_findings,
    membership_by_repeats,
    membership_findings,
    raw_scores,
    spread_draws,
)
from .metrics import Metric


@dataclass(frozen=True)
class Chosen:
    """Some of the images, with all that a denoiser is conditioned on.

    Attributes:
        name: for the progress bar.
        images: the chosen ones.
        pixels, places: of more images, and which of those are the chosen ones.
    """

    name: str
    images: TrainingImages
    pixels: Pixels
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def losses(subject: Subject, context: AuditContext, chosen: Chosen, draws: Draws) -> np.ndarray:
    """(N, J) fp32, the loss of each image at each draw.

    Raises:
        UserError: an image can no longer be read.
    """
    assert subject.family is not None
    family, images, batch = subject.family, chosen.images, context.batch
    precision = context.config.training.mixed_precision or "no"
    transform = training_transform(context.config)

    def compute(part: range) -> np.ndarray:
        # Always a full batch: the bits of a loss may depend on the batch size.
        numbers = [*part, *[part[-1]] * (batch - len(part))]
        sizes = [transform.place(images.load(i).size, images.content_hashes[i], False) for i in part]
        sizes += [sizes[-1]] * (batch - len(part))
        labels = [images.classes[i] if images.classes is not None else 0 for i in numbers]
        with autocast(subject.device, precision):
            rows = image_losses(
                family,
                as_values(chosen.pixels.array[chosen.places[numbers]]).to(subject.device),
                [images.captions[i][0] for i in numbers],
                torch.tensor(sizes, device=subject.device),
                torch.tensor(labels, device=subject.device),
                draws,
                subject.device,
            )
        return rows[: len(part)].float().cpu().numpy()

    made_from: dict[str, Any] = {
        "model": subject.fingerprint,
        "images": digest([chosen.pixels.key, *map(str, chosen.places)]),
        "described": images.fingerprint,
        "draws": digest([str(draws.timesteps.tolist()), str(draws.noise.double().sum().item())]),
        "precision": precision,
        "batch": batch,
        **{f"option_{name}": value for name, value in subject.options.items()},
    }
    return context.work.rows(f"losses of {chosen.name}", made_from, len(images), compute, batch)


def as_values(pixels: np.ndarray) -> Tensor:
    """(B, 3, R, R) fp32 in [-1, 1] of (B, R, R, 3) uint8, as training has them."""
    values = np.ascontiguousarray(pixels.astype(np.float32).transpose(0, 3, 1, 2))
    return torch.from_numpy(values).div_(127.5).sub_(1.0)


def check_reference(subject: Subject, reference: Subject, resolution: int) -> None:
    """Raises a `UserError` unless both have the same latents and noise levels, so that losses can be compared."""
    assert subject.family is not None
    same = (
        reference.family is not None
        and reference.family.latent_shape(resolution) == subject.family.latent_shape(resolution)
        and len(reference.family.objective) == len(subject.family.objective)
    )
    if not same:
        raise UserError(
            f"`--reference_model {reference.name}` has other latents or noise levels than {subject.name}: give the "
            "pipeline that was fine-tuned, or leave it out."
        )


OF_LOSSES = ("mia_auc", "mia_tpr_at_1_fpr", "mia_ref_auc", "mia_ref_tpr_at_1_fpr", "heldout_loss")


def measure_losses(
    context: AuditContext, subject: Subject | None, reference: SubjectSource | None
) -> tuple[Findings, list[NoiseLevel], dict[str, dict[str, Metric]], ModelIdentity | None]:
    """Membership inference with and without a reference model, and the loss on held-out images.

    Args:
        subject: None if there are only generated images.
        reference: None goes without.

    Returns:
        the metrics, those by noise level, of each attack the AUC by how often an image is in the data, and which model
        the reference is.
    """
    if (reason := _why_not(context, subject)) is not None:
        return Findings(not_measured=dict.fromkeys(OF_LOSSES, reason)), [], {}, None
    assert subject is not None
    assert subject.family is not None
    config = context.config
    shape = subject.family.latent_shape(config.data.resolution)
    low = fixed_draws(subject.family.objective, shape, config.audit.membership_draws, context.seed)
    spread = spread_draws(subject.family.objective, shape, config.audit.membership_draws, context.seed)
    training, heldout, repeats = _sides(context)
    both = Draws(torch.cat([low.timesteps, spread.timesteps]), torch.cat([low.noise, spread.noise]), ())
    count = len(low.timesteps)
    every = losses(subject, context, training, both), losses(subject, context, heldout, both)
    ours, whole = [side[:, :count] for side in every], [side[:, count:] for side in every]
    theirs, warnings, identity = _reference_losses(context, subject, reference, (training, heldout), low)
    known, unknown = theirs if theirs is not None else (None, None)
    findings, levels = membership_findings(ours[0], ours[1], low.levels, known, unknown, context.seed)
    scores = {"mia_auc": [raw_scores(side) for side in ours]}
    if theirs is not None:
        scores["mia_ref_auc"] = [calibrated_scores(*pair) for pair in zip(ours, theirs, strict=True)]
    about_heldout = loss_findings(whole[1], whole[0], seed=context.seed)
    return (
        Findings.merged(findings, about_heldout, Findings(warnings=warnings)),
        levels,
        {
            name: membership_by_repeats(members, repeats, others, context.seed)
            for name, (members, others) in scores.items()
        },
        identity,
    )


def _why_not(context: AuditContext, subject: Subject | None) -> str | None:
    if subject is None:
        return NEEDS_MODEL
    if subject.family is None:
        return f"no family of this package knows the {subject.class_name}, so its losses are not known"
    return None if context.has_heldout else NEEDS_HELDOUT


def _sides(context: AuditContext) -> tuple[Chosen, Chosen, np.ndarray]:
    """The training and the held-out images whose losses are taken, and how often each of the former is in the data."""
    data, limit = context.data, context.config.audit.membership_images
    of_training = choose(len(data.members), limit, context.seed)
    of_heldout = choose(len(data.heldout), limit, context.seed)
    firsts = [int(number) for number in data.firsts[of_training]]
    training = Chosen("training images", data.training.subset(firsts), data.references, of_training)
    unseen = data.heldout.subset([int(number) for number in of_heldout])
    heldout = Chosen("held-out images", unseen, data.heldout_pixels, of_heldout)
    return training, heldout, data.repeats[of_training]


def _reference_losses(
    context: AuditContext,
    subject: Subject,
    source: SubjectSource | None,
    sides: tuple[Chosen, Chosen],
    draws: Draws,
) -> tuple[tuple[np.ndarray, np.ndarray] | None, list[str], ModelIdentity | None]:
    """Losses of both sides under the reference model, if there is one; warnings; and which model it is."""
    if source is None:
        return None, [], None
    reference = source.load(context.device)
    check_reference(subject, reference, context.config.data.resolution)
    if reference.fingerprint == subject.fingerprint:
        return (
            None,
            ["the reference model is the audited model itself, which calibrates nothing: it was left out."],
            None,
        )
    ours, theirs = (losses(reference, context, side, draws) for side in sides)
    return (ours, theirs), [], ModelIdentity(reference.name, reference.fingerprint)

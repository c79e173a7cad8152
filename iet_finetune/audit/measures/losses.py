"""Membership inference and the loss on held-out images: losses with the same draws of noise for all images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config.sizes import Size
from ...data.buckets import numbers_of
from ...data.dataset import TrainingImages
from ...errors import UserError
from ...families.base import Conditions
from ..inputs.batches import in_parts, rows_together
from ..inputs.context import NEEDS_HELDOUT, NEEDS_MODEL, AuditContext, choose
from ..inputs.images import Pixels, as_pixels, digest, sized_transform
from ..inputs.pipelines import SubjectSource
from ..inputs.subject import Subject
from .findings import Findings, ModelIdentity, NoiseLevel
from .membership import (
    Draws,
    calibrated_scores,
    caption_conditions,
    denoising_losses,
    fixed_draws,
    image_latents,
    loss_findings,
    membership_by_repeats,
    membership_findings,
    raw_scores,
    spread_draws,
)
from .metrics import Metric

Shape = tuple[int, int, int]
# Noise for latents of a shape (C, H, W).
DrawsOf = Callable[[Shape], Draws]


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


def losses(subject: Subject, context: AuditContext, chosen: Chosen, draws_of: DrawsOf) -> np.ndarray:
    """(N, J) fp32, the loss of each image at each draw, at the size at which images of its shape were trained on.

    Raises:
        UserError: an image can no longer be read, or is too small for every size.
    """
    assert subject.family is not None
    buckets = subject.family.buckets(context.config.data)
    numbers = numbers_of(chosen.images, buckets)
    found: dict[int, np.ndarray] = {}
    for number in np.unique(numbers).tolist():
        places = np.flatnonzero(numbers == number)
        part = replace(chosen, images=chosen.images.subset(places.tolist()), places=chosen.places[places])
        rows = _losses_at(buckets.sizes[number], subject, context, part, draws_of)
        found |= dict(zip(places.tolist(), rows, strict=True))
    return np.stack([found[place] for place in range(len(chosen))])


def _losses_at(size: Size, subject: Subject, context: AuditContext, chosen: Chosen, draws_of: DrawsOf) -> np.ndarray:
    """The losses of images that are all brought to one size, (width, height)."""
    assert subject.family is not None
    family, images, batch, device = subject.family, chosen.images, context.batch, subject.device
    # What is encoded waits there for the denoiser.
    waits = torch.device("cpu") if subject.travels else device
    transform, draws = sized_transform(context.config, size), draws_of(family.latent_shape_of(size))
    # Squares of the resolution have been made already.
    is_made = chosen.pixels.array.shape[1:3] == (size[1], size[0])

    def pixels(numbers: list[int]) -> np.ndarray:
        if is_made:
            return chosen.pixels.array[chosen.places[numbers]]
        contents = images.content_hashes
        made = {i: as_pixels(transform, images.load(i), contents[i], subject.is_grey) for i in set(numbers)}
        return np.stack([made[i] for i in numbers])

    def details(numbers: Sequence[int]) -> Conditions:
        contents = images.content_hashes
        places = {i: transform.place(images.load(i).size, contents[i], False) for i in set(numbers)}
        told = torch.tensor([(*places[i], *size[::-1]) for i in numbers], device=device)
        labels = [images.classes[i] if images.classes is not None else 0 for i in numbers]
        return family.details(told, torch.tensor(labels, device=device))

    def compute(part: range) -> np.ndarray:
        # Always full batches: the bits of a loss may depend on the batch size.
        batches = [[*some, *[some[-1]] * (batch - len(some))] for some in in_parts(part, batch)]
        with subject.lent(family.image_encoders):
            latents = [image_latents(family, as_values(pixels(some)).to(device)).to(waits) for some in batches]
        with subject.lent(family.caption_encoders):
            texts = ([images.captions[i][0] for i in some] for some in batches)
            conditions = [_put(caption_conditions(family, text, device), waits) for text in texts]
        rows = []
        with subject.predicting():
            for some, latent, condition in zip(batches, latents, conditions, strict=True):
                told = _put(condition, device) | details(some)
                rows.append(denoising_losses(family, latent.to(device), told, draws).float().cpu().numpy())
        return np.concatenate(rows)[: len(part)]

    made_from: dict[str, Any] = {
        "model": subject.fingerprint,
        "images": digest([chosen.pixels.key, *map(str, chosen.places)]),
        "size": list(size),
        "described": images.fingerprint,
        "draws": digest([str(draws.timesteps.tolist()), str(draws.noise.double().sum().item())]),
        "precision": subject.precision,
        "batch": batch,
        **{f"option_{name}": value for name, value in subject.options.items()},
    }
    together = rows_together(batch, subject.travels)
    return context.work.rows(f"losses of {chosen.name}", made_from, len(images), compute, together)


def _put(conditions: Conditions, device: torch.device) -> Conditions:
    return {name: tensor.to(device) for name, tensor in conditions.items()}


def as_values(pixels: np.ndarray) -> Tensor:
    """(B, 3, H, W) fp32 in [-1, 1] of (B, H, W, 3) uint8, as training has them."""
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
    config, objective = context.config, subject.family.objective

    def low(shape: Shape) -> Draws:
        return fixed_draws(objective, shape, config.audit.membership_draws, context.seed)

    def both(shape: Shape) -> Draws:
        two = low(shape), spread_draws(objective, shape, config.audit.membership_draws, context.seed)
        return Draws(torch.cat([part.timesteps for part in two]), torch.cat([part.noise for part in two]), ())

    training, heldout, repeats = _sides(context)
    levels_of_low = low(subject.family.latent_shape(config.data.resolution)).levels
    count = len(levels_of_low)
    every = losses(subject, context, training, both), losses(subject, context, heldout, both)
    ours, whole = [side[:, :count] for side in every], [side[:, count:] for side in every]
    theirs, warnings, identity = _reference_losses(context, subject, reference, (training, heldout), low)
    known, unknown = theirs if theirs is not None else (None, None)
    findings, levels = membership_findings(ours[0], ours[1], levels_of_low, known, unknown, context.seed)
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
    draws_of: DrawsOf,
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
    ours, theirs = (losses(reference, context, side, draws_of) for side in sides)
    return (ours, theirs), [], ModelIdentity(reference.name, reference.fingerprint)

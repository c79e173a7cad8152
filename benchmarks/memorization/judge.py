"""Judges a model in the midst of its training, with the audit's own functions."""

import time
from typing import Any

import numpy as np
import torch

from iet_finetune import Callback, Config
from iet_finetune.audit.inputs.subject import Subject
from iet_finetune.audit.measures.features import Features
from iet_finetune.audit.measures.membership import (
    Draws,
    calibrated_scores,
    fixed_draws,
    image_losses,
    raw_scores,
    spread_draws,
)
from iet_finetune.audit.measures.memorization import DELTAS, MEMORIZED, MQ_NEIGHBOURS, mq_ratios, ratios
from iet_finetune.audit.measures.neighbours import Neighbours, nearest_pixels
from iet_finetune.audit.measures.quality import NEIGHBOURS, frechet_distance, kernel_distance, prdc
from iet_finetune.audit.measures.separation import auc, tpr_at_fpr
from iet_finetune.families import Family, family_class
from iet_finetune.families.finding import source_of
from iet_finetune.training.callbacks import RoundFacts, RunFacts, StepFacts

from .arms import Course
from .sets import EXACT, LONG_TAIL, NEAR, ONCE, EvidenceSet, array

BATCH = 64
# Of prompts; pixels are drawn without.
GUIDANCE = 3.0
# A weaker sign of a copy than f_mem's third, for images of few pixels, of which hardly any real one shows it.
CLOSE = 1 / 2
# How often an image must be in the data to count as repeated often.
OFTEN = 5
# Noise levels of the held-out loss.
LEVELS = 5
# Images drawn of held-out captions, to see how far the model follows words that it was not trained on.
HELDOUT_CAPTIONS = 48
Row = dict[str, Any]


class Ruler:
    """What models of one set and seed are measured against; made once for all arms.

    Args:
        evidence: the set.
        features: of which the Fréchet distance and the kernel distance are taken.
    """

    def __init__(self, evidence: EvidenceSet, features: Features) -> None:
        self.evidence, self.features = evidence, features
        rows = array(evidence.rows)
        # Exact copies once.
        kept = np.unique(rows.reshape(len(rows), -1), axis=0, return_index=True)[1]
        self._references, self._origin = rows[np.sort(kept)], evidence.origin[np.sort(kept)]
        self.originals = rows[evidence.firsts]
        quality, seen = array(evidence.quality.images), array(evidence.seen.images)
        self.seen = seen
        self._quality = features(quality)
        self.baseline = self.of_images(np.concatenate([seen, quality]), baseline=True)

    def of_images(self, images: np.ndarray, baseline: bool = False) -> Row:
        """How near images (G, H, W, 3) are to training images, and unless they are real ones how good they are."""
        kind, repeats = self.evidence.kind, self.evidence.repeats
        found = self._nearest_originals(images)
        ratio, mq, nearest = ratios(found), mq_ratios(found), found.index[:, 0]
        row: Row = {"images": len(images)}
        row |= {"f_mem": int((ratio < MEMORIZED).sum()), "close": int((ratio < CLOSE).sum())}
        row |= {f"mq_{delta:g}": int((mq < delta).sum()) for delta in DELTAS}
        row |= {f"nearest_{each}": int((kind[nearest] == each).sum()) for each in (ONCE, EXACT, NEAR)}
        for sign, copies in (("f_mem", ratio < MEMORIZED), ("close", ratio < CLOSE)):
            row |= {f"{sign}_{each}": int((kind[nearest[copies]] == each).sum()) for each in (ONCE, EXACT, NEAR)}
            copied = repeats[np.unique(nearest[copies])]
            row |= {f"extracted_{sign}_x{times}": int((copied == times).sum()) for times in (1, *LONG_TAIL)}
            row[f"extracted_{sign}"] = int((copied > 1).sum())
        row["repeated"] = int((repeats > 1).sum())
        if not baseline:
            features = self.features(images)
            precision, recall, density, coverage = (each.mean() for each in prdc(features, self._quality, NEIGHBOURS))
            row |= {
                "frechet": frechet_distance(features, self._quality),
                "kernel": kernel_distance(features, self._quality),
                "precision": precision,
                "recall": recall,
                "density": density,
                "coverage": coverage,
            }
        return row

    def caption_agreement(self, images: np.ndarray) -> float:
        """How well images drawn of the first held-out captions fit them: 1 at best, 1/2 by chance.

        The share, over the drawn images, of the held-out images with other captions that are farther from one, in
        features, than the image that its caption belongs to.
        """
        captions = self.evidence.quality.captions
        distance = ((self.features(images)[:, None] - self._quality[None]) ** 2).sum(axis=2)
        shares = []
        for number, far in enumerate(distance):
            others = far[captions != captions[number]]
            own = far[number]
            shares.append((others > own).mean() + (others == own).mean() / 2)
        return float(np.mean(shares))

    def _nearest_originals(self, images: np.ndarray) -> Neighbours:
        """The nearest originals, each as near as the nearest of its copies."""
        everything = nearest_pixels(images, self._references, len(self._references))
        originals = self._origin[everything.index]
        index, distance = [], []
        for row, far in zip(originals, everything.distance, strict=True):
            first = np.sort(np.unique(row, return_index=True)[1])[:MQ_NEIGHBOURS]
            index.append(row[first])
            distance.append(far[first])
        return Neighbours(np.array(index), np.array(distance), np.zeros((len(index), len(index[0])), bool))


class Judge(Callback):
    """Measures a model after some rounds, and counts what its rule skips.

    Args:
        ruler: of the set.
        config: the run's settings.
        rows: (n,) which of the set's rows the run is trained on.
        course: after which rounds it is measured, and how images are drawn.
        labels: facts that each row of measurements begins with.
        reference: losses of the originals and of held-out images under the model that fine-tuning starts from; those
            at the first judged round are taken if there is none.

    Attributes:
        measured: one row a judged round.
        drawn: (n, H, W, 3) uint8, what was drawn at the last one.
    """

    wants_losses = True

    def __init__(
        self, ruler: Ruler, config: Config, rows: np.ndarray, course: Course, labels: Row,
        reference: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        self._ruler, self._config, self._course = ruler, config, course
        self._labels, self._reference = labels, reference
        self._origin = torch.from_numpy(ruler.evidence.origin[rows])
        self._seen, self._skipped = (torch.zeros(len(ruler.evidence.kind)) for _ in range(2))
        self._spent, self._since = 0.0, time.process_time()
        self._rounds: list[RoundFacts] = []
        self.measured: list[Row] = []
        self.drawn = np.zeros((0, 1, 1, 3), np.uint8)

    def on_run_begin(self, facts: RunFacts) -> None:
        """Starts the clock."""
        self._since = time.process_time()

    def on_step_end(self, facts: StepFacts) -> None:
        """Counts which originals were seen and skipped."""
        assert facts.samples is not None
        origin = self._origin[facts.samples.images]
        self._seen += torch.bincount(origin, minlength=len(self._seen))
        self._skipped += torch.bincount(origin[~facts.samples.keep], minlength=len(self._seen))

    def on_round_end(self, facts: RoundFacts) -> None:
        """Judges the merged model, if it is time."""
        self._spent += time.process_time() - self._since
        self._rounds.append(facts)
        if facts.round in self._course.judged:
            assert facts.pipeline is not None
            with facts.pipeline() as pipeline:
                self._judge(pipeline, facts)
        self._since = time.process_time()

    def of_saved(self, pipeline: Any) -> None:
        """Judges what a run left that ended by itself: the round with the lowest held-out loss."""
        looked = [facts for facts in self._rounds if "heldout_loss" in facts.metrics]
        kept = min(looked, key=lambda facts: facts.metrics["heldout_loss"])
        self._judge(pipeline, kept)
        self.measured[-1]["ended"] = self._rounds[-1].round

    def _judge(self, pipeline: Any, facts: RoundFacts) -> None:
        row = measure(pipeline, self._config, self._ruler, self._course, self._reference)
        # What is known of the losses becomes the reference of later rounds.
        losses, self.drawn = row.pop("losses"), row.pop("drawn")
        self._reference = self._reference or losses
        about = {"round": facts.round, "step": facts.step, "seconds": self._spent, **self._skips()}
        self.measured.append({**self._labels, **about, **row})

    def _skips(self) -> Row:
        """Shares of samples that gave no gradient so far: of images once in the data, of those there often, of all."""
        repeats = torch.from_numpy(self._ruler.evidence.repeats)
        groups = {"once": repeats == 1, "often": repeats >= OFTEN, "all": repeats > 0}
        rates = (self._skipped[which].sum() / self._seen[which].sum().clamp(min=1) for which in groups.values())
        return {f"skipped_{name}": float(rate) for name, rate in zip(groups, rates, strict=True)}


@torch.no_grad()
def measure(
    pipeline: Any, config: Config, ruler: Ruler, course: Course, reference: tuple[np.ndarray, np.ndarray] | None
) -> Row:
    """All measurements; under `losses` those of the originals and of held-out images, under `drawn` the images."""
    family = family_class(source_of(pipeline), config.model)(pipeline, config)
    images = draw(pipeline, family, ruler.evidence, course, config)
    ours, others, levels = losses(family, ruler, config)
    row = {**ruler.of_images(images), **membership(ours, others, ruler.evidence, levels, reference)}
    if family.needs_captions:
        captions = ruler.evidence.quality.captions[:HELDOUT_CAPTIONS].tolist()
        fresh = _drawn(pipeline, family, captions, [0] * len(captions), course, config)
        row["caption_agreement"] = ruler.caption_agreement(fresh)
    return {**row, "losses": (ours, others), "drawn": images}


def draw(pipeline: Any, family: Family, evidence: EvidenceSet, course: Course, config: Config) -> np.ndarray:
    """(drawn, R, R, 3) uint8, always from the same noise; of prompts and classes those of the training images.

    Of prompts, those of repeated images come first, as often as those of the others.
    """
    count = course.drawn
    often = np.flatnonzero(evidence.repeats > 1)
    once = np.flatnonzero(evidence.repeats == 1)
    numbers = np.arange(count) // 2
    originals = once[np.arange(count) % len(once)]
    if len(often):
        originals = np.where(np.arange(count) % 2 == 0, often[numbers % len(often)], once[numbers % len(once)])
    captions = [str(caption) for caption in evidence.captions[evidence.firsts[originals]]]
    labels = [int(evidence.labels[i * 7 % len(evidence.labels)]) for i in range(count)]
    return _drawn(pipeline, family, captions, labels, course, config)


def _drawn(
    pipeline: Any, family: Family, captions: list[str], labels: list[int], course: Course, config: Config
) -> np.ndarray:
    """(n, R, R, 3) uint8 of captions or classes; image i starts from the noise of seed i."""
    subject = Subject("", type(pipeline).__name__, family, pipeline, torch.device("cpu"), "")
    images = []
    for start in range(0, len(captions), BATCH):
        part = range(start, min(start + BATCH, len(captions)))
        images += subject.draw(
            [captions[i] for i in part],
            [labels[i] for i in part],
            [torch.Generator().manual_seed(i) for i in part],
            steps=course.sampling_steps,
            guidance=GUIDANCE,
            size=config.data.resolution,
        )
    return array(images)


def losses(family: Family, ruler: Ruler, config: Config) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """The losses of the originals and of held-out images, each (N, 8 + 5), and their noise levels.

    The first eight are at little noise, where memorization shows, the last five over the whole schedule.
    """
    evidence, size = ruler.evidence, config.data.resolution
    shape = family.latent_shape(size)
    low, wide = fixed_draws(family.objective, shape), spread_draws(family.objective, shape, LEVELS, seed=1)
    both = Draws(torch.cat([low.timesteps, wide.timesteps]), torch.cat([low.noise, wide.noise]), ())
    firsts = evidence.firsts
    sides = (
        (ruler.originals, evidence.captions[firsts], evidence.labels[firsts]),
        (ruler.seen, evidence.seen.captions, evidence.seen.labels),
    )
    found = [_losses(family, pixels, captions, labels, both, size) for pixels, captions, labels in sides]
    return found[0], found[1], (*low.levels, *wide.levels)


def _losses(
    family: Family, pixels: np.ndarray, captions: np.ndarray, labels: np.ndarray, draws: Draws, size: int
) -> np.ndarray:
    rows = []
    for start in range(0, len(pixels), BATCH):
        # Always a full batch: the bits of a loss may depend on its size.
        places = [min(place, len(pixels) - 1) for place in range(start, start + BATCH)]
        values = torch.from_numpy(pixels[places]).permute(0, 3, 1, 2).float() / 127.5 - 1
        sizes = torch.tensor([[size, size, 0, 0, size, size]] * BATCH)
        words, classes = [str(caption) for caption in captions[places]], torch.from_numpy(labels[places])
        part = image_losses(family, values, words, sizes, classes, draws, torch.device("cpu"))
        rows.append(part[: min(BATCH, len(pixels) - start)])
    return torch.cat(rows).numpy()


def membership(
    ours: np.ndarray,
    others: np.ndarray,
    evidence: EvidenceSet,
    levels: tuple[float, ...],
    reference: tuple[np.ndarray, np.ndarray] | None,
) -> Row:
    """Held-out loss; how well members are told from others; and how well repeated images from those in the data once.

    Args:
        ours, others: losses of the originals and of the held-out images.
        reference: the same of another model.
    """
    low, repeats = len(levels) - LEVELS, evidence.repeats
    often, once = repeats >= OFTEN, repeats == 1
    scores, unknown = raw_scores(ours[:, :low]), raw_scores(others[:, :low])
    # In logarithms, as losses at little noise are many times those at much.
    logs = np.log(others[:, low:]).mean(axis=1)
    row: Row = {
        "heldout_loss": float(logs.mean()),
        "heldout_loss_error": float(logs.std(ddof=1) / np.sqrt(len(logs))),
        "mia_auc": auc(scores, unknown),
        "mia_tpr": tpr_at_fpr(scores, unknown),
        "levels": [round(level, 4) for level in levels],
    }
    if often.any():
        row |= {
            "mia_auc_often": auc(scores[often], unknown),
            "told_by_loss": [auc(-ours[often, j], -ours[once, j]) for j in range(len(levels))],
            "told_by_loss_all": auc(*_pooled(ours[:, low:], often, once)),
            # AGC looks at the loss over the bank's, which is the mean loss of all samples at that noise level.
            "told_by_bank_all": auc(*_pooled(ours[:, low:] / ours[:, low:].mean(axis=0), often, once)),
        }
    if reference is not None:
        over = [np.log(side) - np.log(known) for side, known in zip((ours, others), reference, strict=True)]
        known, unknown = (
            calibrated_scores(a[:, :low], b[:, :low]) for a, b in zip((ours, others), reference, strict=True)
        )
        row |= {"mia_ref_auc": auc(known, unknown), "mia_ref_tpr": tpr_at_fpr(known, unknown)}
        if often.any():
            row |= {
                "mia_ref_auc_often": auc(known[often], unknown),
                "told_by_reference": [auc(-over[0][often, j], -over[0][once, j]) for j in range(len(levels))],
                "told_by_reference_all": auc(*_pooled(over[0][:, low:], often, once)),
                "told_by_reference_eight": auc(known[often], known[once]),
            }
    return row


def _pooled(values: np.ndarray, often: np.ndarray, once: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image at each noise level as one sample: scores of repeated ones and of the others."""
    return -values[often].ravel(), -values[once].ravel()

"""Which training images a run seems to be memorizing, as far as it has seen."""

import math
from typing import NamedTuple

import numpy as np

from ..ensemble.clone import Clone
from .assembly import Run
from .data import Data


class Suspect(NamedTuple):
    """A training image, and what points to it.

    Attributes:
        score: the higher, the more suspicious; images of one run alone can be compared.
        image: its index.
        seen, skipped: visits so far, and those that gave no gradient.
        words: what was found.
    """

    score: float
    image: int
    seen: int
    skipped: int
    words: str


def suspects(run: Run, data: Data, most: int) -> list[Suspect]:
    """The most suspicious images, the most suspicious one first, each content once. Every rank takes part.

    A rule that scores images says which they are. Otherwise they are those whose loss is lowest for the noise that
    they were shown with, among images that were compared at least half as often as is usual.
    """
    own = [
        tuple(suspect) for clone in run.ensemble.own for suspect in _of_clone(clone, data.indices[clone.shard], most)
    ]
    gathered = [Suspect(*facts) for rank in run.ranks.all_gather_object(own) for facts in rank]
    by_content: dict[str, Suspect] = {}
    for suspect in sorted(gathered, key=lambda each: (-each.score, each.image)):
        by_content.setdefault(data.images.content_hashes[suspect.image], suspect)
    return [*by_content.values()][:most]


def _of_clone(clone: Clone, images: np.ndarray, most: int) -> list[Suspect]:
    """Of one shard: more than are wanted, as some may be copies of each other."""
    ledger = clone.ledger
    seen, skipped = ledger.seen.cpu().numpy(), ledger.skipped.cpu().numpy()
    if (given := clone.rule.suspicion()) is not None:
        scores, words = given.cpu().numpy()[images], _deviations
    else:
        compared = ledger.log_ratio_count.cpu().numpy()
        enough = compared >= max(1.0, float(np.median(compared)) / 2)
        scores, words = np.where(enough, -ledger.mean_log_ratio(), -np.inf), _below
    first = [index for index in np.argsort(-scores, kind="stable")[: 4 * most].tolist() if scores[index] > 0]
    return [
        Suspect(
            float(scores[index]),
            int(images[index]),
            int(seen[index]),
            int(skipped[index]),
            words(float(scores[index])),
        )
        for index in first
    ]


def _below(score: float) -> str:
    return f"loss {-math.expm1(-score):.0%} below what is expected"


def _deviations(score: float) -> str:
    return f"loss fell further than that of held-out images, by {score:.1f} deviations"

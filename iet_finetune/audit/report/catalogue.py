"""What every figure of an audit means: its title, a sentence about it, which way is better, how it is written."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

GROUPS = ("Memorization", "Membership", "Prompts", "Quality", "Other")
# How often an image is in the data: the end of a metric's name, and the words of `by_repeats`.
REPEATS = {"x1": "1", "x2_4": "2-4", "x5_9": "5-9", "x10_up": "10 or more"}
# Names fit for a title; other features are called by their slug.
_SHORT = {"effnet_lite0": "EffNetLite0"}

_IET = "Liu et al., ECCV 2024"
_YOON = "Yoon et al., 2023"
_SOMEPALLI = "Somepalli et al., CVPR 2023"
_CARLINI = "Carlini et al., USENIX Security 2023"
_MIA = "Yeom et al., CSF 2018"
_LIRA = "Carlini et al., S&P 2022"
_WATSON = "Watson et al., ICLR 2022"
_WEN = "Wen et al., ICLR 2024"
_HEUSEL = "Heusel et al., NeurIPS 2017"
_KYNKAANNIEMI = "Kynkäänniemi et al., NeurIPS 2019"
_NAEEM = "Naeem et al., ICML 2020"

HELDOUT, TRAINING, CHANCE = "held-out images", "training images", "chance"
CAPTIONS = "held-out captions"


@dataclass(frozen=True)
class Entry:
    """What is known about one metric.

    Attributes:
        name: as in audit.json, such as `frechet_effnet_lite0`.
        title: for a table or a card; plain text.
        meaning: one sentence for a reader who does not know the metric.
        better: `lower` or `higher`; None where neither is.
        percent: written as a percentage; otherwise as a number.
        digits: behind the point.
        group: one of `GROUPS`.
        null: what its `null` is, in words.
        source: the paper it is taken from; empty where there is none.
        minor: a detail of another metric, such as one more threshold.
        slug: of the features it is measured in, if any.
        repeats: it is of the images that are so often in the data (`1`, `2-4`, ...); None: of all.
    """

    name: str
    title: str
    meaning: str
    better: str | None
    percent: bool
    digits: int
    group: str
    null: str
    source: str
    minor: bool = False
    slug: str | None = None
    repeats: str | None = None

    def number(self, value: float) -> str:
        """A value without its unit: 0.0234 of a rate is `2.3`."""
        text = f"{100 * value if self.percent else value:,.{self.digits}f}"
        return text.removeprefix("-") if not text.strip("-0.,") else text

    def show(self, value: float) -> str:
        """A value with its unit: 0.0234 of a rate is `2.3 %`."""
        return self.number(value) + (" %" if self.percent else "")

    def interval(self, low: float, high: float) -> str:
        """The two ends of an interval, without unit: `1.5 to 3.4`."""
        return f"{self.number(low)} to {self.number(high)}"

    @property
    def is_other_cut(self) -> bool:
        """Whether it is only another threshold or percentile of a metric."""
        return self.minor and self.repeats is None

    @property
    def direction(self) -> str:
        """Which way is better, in words; empty where neither is."""
        return f"{self.better} is better" if self.better else ""


def _rate(title: str, meaning: str, group: str, null: str, source: str, better: str = "lower") -> Entry:
    return Entry("", title, meaning, better, True, 1, group, null, source)


def _value(
    title: str, meaning: str, group: str, null: str, source: str, better: str = "lower", digits: int = 3
) -> Entry:
    return Entry("", title, meaning, better, False, digits, group, null, source)


_PLAIN = {
    "f_mem": _rate(
        "Nearly copied (f_mem)",
        "Share of generated images that are less than a third as far from their nearest training image as from the "
        "second nearest.",
        "Memorization",
        HELDOUT,
        _YOON,
    ),
    "extracted": _rate(
        "Extracted",
        "Share of distinct training images that at least one generated image nearly copies.",
        "Memorization",
        HELDOUT,
        _CARLINI,
    ),
    "mia_auc": _value(
        "Membership by loss (AUC)",
        "How often a training image has a lower loss than a held-out one; 0.5 is chance, 1 gives every training image "
        "away.",
        "Membership",
        CHANCE,
        _MIA,
    ),
    "mia_tpr_at_1_fpr": _rate(
        "Membership by loss, found at 1 % false alarms",
        "Share of training images that are recognised when at most 1 % of held-out images are mistaken for them.",
        "Membership",
        CHANCE,
        _LIRA,
    ),
    "mia_ref_auc": _value(
        "Membership against a reference (AUC)",
        "The same attack with each loss compared with a model's that was not trained on the images; 0.5 is chance.",
        "Membership",
        CHANCE,
        _WATSON,
    ),
    "mia_ref_tpr_at_1_fpr": _rate(
        "Membership against a reference, found at 1 % false alarms",
        "Share of training images that the attack with a reference model recognises at 1 % false alarms.",
        "Membership",
        CHANCE,
        _LIRA,
    ),
    "prompt_memorization": _value(
        "Pull of training captions",
        "Mean size of what a training caption adds to the predicted noise while drawing; memorized prompts pull more.",
        "Prompts",
        CAPTIONS,
        _WEN,
        digits=2,
    ),
    "prompt_memorization_auc": _value(
        "Training captions told from held-out ones (AUC)",
        "How often a training caption pulls more strongly than a held-out one; 0.5 is chance.",
        "Prompts",
        CHANCE,
        _WEN,
    ),
    "heldout_loss": _value(
        "Loss on held-out images",
        "Mean denoising loss on real images that were not trained on.",
        "Quality",
        TRAINING,
        "",
        digits=4,
    ),
    "clip_score": _value(
        "CLIP score",
        "How well the generated images fit their prompts, from 0 to 100.",
        "Quality",
        "held-out images with their captions",
        "Hessel et al., EMNLP 2021",
        "higher",
        digits=2,
    ),
}

# Measured in features: the name is followed by their slug. `{}` in a title is the name of the features.
_IN_FEATURES = {
    "similarity_mean": _value(
        "Similarity to the nearest, mean ({})",
        "Mean cosine similarity of a generated image to its most similar training image.",
        "Memorization",
        HELDOUT,
        _SOMEPALLI,
    ),
    "similarity_p90": _value(
        "Similarity to the nearest, 90th percentile ({})",
        "One in ten generated images is at least this similar to a training image.",
        "Memorization",
        HELDOUT,
        _SOMEPALLI,
    ),
    "similarity_p95": _value(
        "Similarity to the nearest, 95th percentile ({})",
        "One in twenty generated images is at least this similar to a training image.",
        "Memorization",
        HELDOUT,
        _SOMEPALLI,
    ),
    "similarity_above_0.5": _rate(
        "Similarity above 0.5 ({})",
        "Share of generated images with a cosine similarity above 0.5 to some training image; the threshold is made "
        "for SSCD features.",
        "Memorization",
        HELDOUT,
        _SOMEPALLI,
    ),
    "kid": _value(
        "KID-{}",
        "Distance between the generated and the held-out images as a whole (maximum mean discrepancy of features).",
        "Quality",
        TRAINING,
        "Bińkowski et al., ICLR 2018",
        digits=4,
    ),
    "frechet": _value(
        "FD-{}",
        "Fréchet distance between the generated and the held-out images in these features; not to be compared with "
        "an FID.",
        "Quality",
        TRAINING,
        _HEUSEL,
        digits=2,
    ),
    "precision": _rate(
        "Precision ({})",
        "Share of generated images that lie among the real ones: how real they look.",
        "Quality",
        TRAINING,
        _KYNKAANNIEMI,
        "higher",
    ),
    "recall": _rate(
        "Recall ({})",
        "Share of held-out images that lie among the generated ones: how varied they are.",
        "Quality",
        TRAINING,
        _KYNKAANNIEMI,
        "higher",
    ),
    "density": _value(
        "Density ({})",
        "How densely real images surround the generated ones; steadier than precision, and may exceed 1.",
        "Quality",
        TRAINING,
        _NAEEM,
        "higher",
    ),
    "coverage": _rate(
        "Coverage ({})",
        "Share of held-out images that have a generated one nearby; steadier than recall.",
        "Quality",
        TRAINING,
        _NAEEM,
        "higher",
    ),
}
_MINOR = {"similarity_mean", "similarity_p90"}
# What is also measured by how often images are in the data.
BY_REPEATS = ("extracted", "mia_auc", "mia_ref_auc", "prompt_memorization")


def describe(name: str) -> Entry:
    """What is known about the metric of this name.

    A name that is not known, as from a newer audit, gets an entry of the group `Other` that says no more than it.
    """
    return _known(name) or Entry(name, name, "", None, False, 3, "Other", "null", "")


def is_known(name: str) -> bool:
    """Whether the catalogue has the metric."""
    return _known(name) is not None


def repeats_name(metric: str, repeats: str) -> str | None:
    """The name of a metric for images that are so often in the data (`1`, `2-4`, ...); None for other words."""
    ends = {words: end for end, words in REPEATS.items()}
    return f"{metric}_{ends[repeats]}" if repeats in ends else None


def times(repeats: str) -> str:
    """How often an image is in the data, in words: `once`, `2 to 4 times`."""
    return "once" if repeats == "1" else f"{repeats.replace('-', ' to ')} times"


def in_order(names: Iterable[str]) -> list[str]:
    """The names by group, within one in the order of the catalogue, details behind their metric."""
    return sorted(names, key=_place)


def _known(name: str) -> Entry | None:
    if name in _PLAIN:
        return replace(_PLAIN[name], name=name)
    if name.startswith("mq_"):
        return _mq(name)
    for metric in BY_REPEATS:
        end = name.removeprefix(f"{metric}_")
        if end != name and end in REPEATS:
            whole = _PLAIN[metric]
            title = f"{whole.title}, in the data {times(REPEATS[end])}"
            return replace(whole, name=name, title=title, minor=True, repeats=REPEATS[end])
    for start, entry in _IN_FEATURES.items():
        slug = name.removeprefix(f"{start}_")
        if slug and slug != name:
            title = entry.title.format(_SHORT.get(slug, slug))
            return replace(entry, name=name, title=title, minor=start in _MINOR, slug=slug)
    return None


def _mq(name: str) -> Entry | None:
    threshold = name.removeprefix("mq_")
    if not threshold.replace(".", "", 1).isdigit():
        return None
    meaning = (
        f"Share of generated images whose squared distance to the nearest training image is below {threshold} of the "
        "mean of the 50 smallest."
    )
    entry = _rate(f"MQ at {threshold}", meaning, "Memorization", HELDOUT, _IET)
    # The paper's tables have ten thresholds; one stands for them.
    return replace(entry, name=name, minor=threshold != "0.4")


def _place(name: str) -> tuple[int, int, str, int, str]:
    """Sorts by group, metric, features, and how often an image is in the data."""
    entry = describe(name)
    start, often = name.removesuffix(f"_{entry.slug}"), 0
    if entry.repeats is not None:
        often = 1 + list(REPEATS.values()).index(entry.repeats)
        start = next(metric for metric in BY_REPEATS if name.startswith(f"{metric}_x"))
    start = "mq" if start.startswith("mq_") else start
    position = _ORDER.index(start) if start in _ORDER else len(_ORDER)
    return GROUPS.index(entry.group), position, entry.slug or "", often, name


_ORDER = (
    *("f_mem", "extracted", "similarity_p95", "similarity_mean", "similarity_p90", "similarity_above_0.5", "mq"),
    *("mia_auc", "mia_tpr_at_1_fpr", "mia_ref_auc", "mia_ref_tpr_at_1_fpr"),
    *("prompt_memorization", "prompt_memorization_auc"),
    *("frechet", "kid", "precision", "recall", "density", "coverage", "clip_score", "heldout_loss"),
)

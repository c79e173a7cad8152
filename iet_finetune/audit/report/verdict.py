"""The metrics of an audit in plain sentences, as strong as their intervals allow and no stronger."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

from ..measures.metrics import Metric, rate
from .advice import advice
from .catalogue import describe, times
from .comparison import Difference, difference
from .record import AuditRecord
from .tones import BAD, GOOD, OPEN, PLAIN, RARE

GUARANTEE = "This measures; it does not prove that nothing is memorized: only differential privacy gives a guarantee."


@dataclass(frozen=True)
class Sentence:
    """One finding in words.

    Attributes:
        tone: `bad` (memorization), `good` (none was found), `open` (inconclusive), or `plain` (a fact).
        text: of one or more sentences.
        about: the finding, such as `copies`.
    """

    tone: str
    text: str
    about: str = ""


@dataclass(frozen=True)
class Verdict:
    """All findings, and their summary.

    Attributes:
        headline: one sentence.
        tone: of the headline, as of a `Sentence`.
        sentences: in the order of the report.
        advice: what to do next, a sentence or two each; none where there is nothing to say.
    """

    headline: str
    tone: str
    sentences: tuple[Sentence, ...]
    advice: tuple[str, ...] = ()


def verdict(audit: AuditRecord) -> Verdict:
    """What an audit found, in words."""
    tried = _attacks(audit)
    bar = _Bar(tried)
    copies = _copies(audit, bar)
    found = [
        copies,
        *_extraction(audit, copies.tone, bar),
        *_similarity(audit, bar),
        *_membership(audit, bar),
        *_prompts(audit, bar),
        *_quality(audit),
    ]
    tones = {each.about: each.tone for each in found}
    headline, tone = _headline(tones)
    sentences = (*_in_short(audit, tones), *found, *_many(tried), *_skipping(audit), *_caution(audit))
    sentences += (Sentence(PLAIN, GUARANTEE, "guarantee"),)
    return Verdict(headline, tone, sentences, tuple(advice(audit, tones)))


class _Bar:
    """How far from chance a finding must be so that of several attacks that find nothing one in twenty seems to.

    Bonferroni's correction for so many attacks: the intervals, of 95 % each, are widened as those of normal errors.
    """

    def __init__(self, attacks: int) -> None:
        normal = NormalDist()
        self._wider = normal.inv_cdf(1 - 0.025 / max(attacks, 1)) / normal.inv_cdf(0.975)

    def low(self, found: Metric | Difference) -> float:
        """The lower end of the widened interval."""
        return found.value - self._wider * (found.value - found.low)


def _attacks(audit: AuditRecord) -> int:
    """How many findings could each call the model one that memorizes, by chance."""
    metrics = audit.metrics
    copies, membership = metrics.get("f_mem"), {"mia_ref_auc", "mia_auc"} & metrics.keys()
    close = [metrics.get(f"similarity_p95_{features.slug}") for features in audit.features]
    compared = [each for each in close if each is not None and each.of_baseline is not None]
    by_repeats = sum("extracted" in row.metrics for row in audit.by_repeats) > 1
    found = bool(copies is not None and copies.count)
    return found + by_repeats + len(compared) + bool(membership) + ("prompt_memorization_auc" in metrics)


def _many(tried: int) -> Iterator[Sentence]:
    if tried > 1:
        text = f"{tried} attacks were tried; a result counts only where chance over all of them does not explain it."
        yield Sentence(PLAIN, text, "attacks")


def _skipping(audit: AuditRecord) -> Iterator[Sentence]:
    """Says so if the run's skip rule did nothing."""
    run = audit.training
    is_off = run.get("skip_rule") == "agc" and run.get("agc_threshold") == 0
    if "skip_rule" in run and run.get("skipped") == 0 and not is_off:
        text = f"In training, `--skip_rule {run['skip_rule']}` skipped nothing: the rule changed nothing."
        yield Sentence(PLAIN, text, "skipping")


def _in_short(audit: AuditRecord, tones: Mapping[str, str]) -> Iterator[Sentence]:
    """What was tried and what came of it, for readers who know no metric."""
    copies, extracted = audit.metrics.get("f_mem"), audit.metrics.get("extracted")
    if copies is None:
        return
    (count, total), tone = _counts(copies), tones["copies"]
    tries = f"{total:,} {'try' if total == 1 else 'tries'}"
    if BAD in (tone, tones.get("extraction")):
        pictures, among = _counts(extracted) if extracted is not None else (0, 0)
        some = f"{pictures:,} of the {among:,} training images" if pictures else "copies of training images"
        yield Sentence(
            BAD, f"Strangers who have only the model can get {some} out of it, as {tries} showed.", "in short"
        )
    elif not count:
        more = "" if tone == GOOD else f", which {'is' if total == 1 else 'are'} too few to say more"
        text = f"Strangers who have only the model could not get any training image out of it in {tries}{more}."
        yield Sentence(tone, text, "in short")
    else:
        text = f"What came out of the model in {tries} may be training images, or look like them by chance."
        yield Sentence(tone, text, "in short")


def _headline(tones: Mapping[str, str]) -> tuple[str, str]:
    if BAD in (tones["copies"], tones.get("extraction")):
        return "The model repeats training images.", BAD
    if tones.get("similarity") == BAD:
        return "Generated images resemble training images more than unseen images do.", BAD
    if tones.get("membership") == BAD or tones.get("prompts") == BAD:
        copies = "No copies were found, but" if tones["copies"] == GOOD else "Whatever it draws,"
        return f"{copies} the model gives away what it was trained on.", BAD
    if tones["copies"] == GOOD:
        # A model that draws no copies may still leak through its losses.
        looked = GOOD in (tones.get("membership"), tones.get("prompts"))
        return ("No memorization was found." if looked else "No copies of training images were found."), GOOD
    if OPEN in tones.values():
        return "Whether the model memorizes cannot be told from this audit.", OPEN
    return "Memorization was not measured.", OPEN


def _copies(audit: AuditRecord, bar: _Bar) -> Sentence:
    metric = audit.metrics.get("f_mem")
    if metric is None:
        reason = audit.not_measured.get("f_mem", "no reason is given")
        return Sentence(PLAIN, f"How many generated images are copies was not measured: {_ended(reason)}", "copies")
    entry, (count, total) = describe("f_mem"), _counts(metric)
    if not count:
        text = (
            f"None of {total:,} generated {_noun(total, 'image')} is nearly a copy of a training image; with 95 % "
            f"confidence fewer than {entry.show(metric.high)} are."
        )
        return Sentence(GOOD if metric.high <= RARE else OPEN, text, "copies")
    text = (
        f"{_of(count, total, 'generated image')} {'is nearly a copy' if count == 1 else 'are nearly copies'} of "
        f"training images ({entry.show(metric.value)}, 95 % interval "
        f"{entry.interval(metric.low, metric.high)})"
    )
    return _against_heldout(text, metric, audit, bar)


def _against_heldout(text: str, metric: Metric, audit: AuditRecord, bar: _Bar) -> Sentence:
    """Compares with the held-out images, however few."""
    if metric.baseline is None:
        more = ". Without held-out images nobody knows how many of these are chance."
        return Sentence(BAD if bar.low(metric) > 0.01 else OPEN, text + more, "copies")
    heldout = audit.data.heldout_images or 0
    text += f"; held-out images score {describe('f_mem').show(metric.baseline)}."
    if heldout:
        apart = difference(rate(round(metric.baseline * heldout), heldout), metric)
        if bar.low(apart) > 0:
            return Sentence(BAD, f"{text} That is more than chance explains.", "copies")
        if apart.high < 0:
            return Sentence(GOOD, f"{text} That is less than unseen images score by chance.", "copies")
    few = f" of {heldout:,} held-out {_noun(heldout, 'image')}" if heldout else ""
    return Sentence(OPEN, f"{text} Against the score{few}, it cannot be told from chance.", "copies")


def _extraction(audit: AuditRecord, copies: str, bar: _Bar) -> Iterator[Sentence]:
    """How many training images are extracted; `copies` is the tone of the finding about the generated ones."""
    metric = audit.metrics.get("extracted")
    if metric is None:
        return
    count, total = _counts(metric)
    classes = [(row.repeats, row.metrics["extracted"]) for row in audit.by_repeats if "extracted" in row.metrics]
    if not count:
        yield Sentence(GOOD, f"None of {total:,} distinct training images was extracted.", "extraction")
    elif len(classes) > 1 and bar.low(difference(classes[0][1], classes[-1][1])) > 0:
        yield Sentence(BAD, f"Repeated images suffer most: {_repeated(classes)}.", "extraction")
    else:
        text = f"{_of(count, total, 'distinct training image')} can be extracted."
        if len(classes) > 1:
            text += " Whether repeated images suffer more cannot be told."
        # How often held-out images hit by chance is counted in other numbers of tries, so that the two shares cannot
        # be compared; those of the generated and the held-out images that are copies can.
        yield Sentence(BAD if copies == BAD else OPEN, text, "extraction")


def _repeated(classes: list[tuple[str, Metric]]) -> str:
    """`12 of 20 images that are in the data 10 or more times can be extracted, 1 of 280 others`."""
    (words, most), rest = classes[-1], [metric for _, metric in classes[:-1]]
    count, total = _counts(most)
    others = [sum(numbers) for numbers in zip(*map(_counts, rest), strict=True)]
    there = "is" if total == 1 else "are"
    return (
        f"{_of(count, total, 'image')} that {there} in the data {times(words)} can be extracted, "
        f"{others[0]:,} of {others[1]:,} {'other' if others[1] == 1 else 'others'}"
    )


def _similarity(audit: AuditRecord, bar: _Bar) -> Iterator[Sentence]:
    for features in audit.features:
        metric = audit.metrics.get(name := f"similarity_p95_{features.slug}")
        if metric is None:
            continue
        entry, title = describe(name), features.title or features.slug
        text = f"In the features of {title}, one in twenty generated images has a similarity of at least "
        text += f"{entry.show(metric.value)} to a training image"
        if metric.of_baseline is None:
            yield Sentence(PLAIN, f"{text}.", "similarity_alone")
            continue
        text += f"; for held-out images that is {entry.show(metric.of_baseline.value)}. "
        apart = difference(metric.of_baseline, metric)
        if bar.low(apart) > 0:
            yield Sentence(BAD, f"{text}Generated images come closer.", "similarity")
        elif apart.value > 0:
            yield Sentence(OPEN, f"{text}That generated images come closer may be chance.", "similarity_open")
        else:
            yield Sentence(GOOD, f"{text}Generated images come no closer than that.", "similarity_none")


def _membership(audit: AuditRecord, bar: _Bar) -> Iterator[Sentence]:
    name = next((name for name in ("mia_ref_auc", "mia_auc") if name in audit.metrics), None)
    if name is not None:
        attack = "compared with a reference model" if name == "mia_ref_auc" else "by its loss alone"
        text = f"Shown a training image and a held-out one, an attack on the model ({attack}) picks the right one "
        yield _pairs(text, audit.metrics[name], "membership", "image", bar)


def _prompts(audit: AuditRecord, bar: _Bar) -> Iterator[Sentence]:
    metric = audit.metrics.get("prompt_memorization_auc")
    if metric is not None:
        text = "Shown a training caption and a held-out one, the model's reaction gives the training caption away "
        yield _pairs(text, metric, "prompts", "caption", bar)


def _pairs(text: str, metric: Metric, about: str, noun: str, bar: _Bar) -> Sentence:
    """An AUC in words: how often the right one of two is chosen."""
    text += (
        f"in {100 * metric.value:.0f} % of cases (95 % interval {100 * metric.low:.0f} to "
        f"{100 * metric.high:.0f}; guessing gives 50). "
    )
    if bar.low(metric) > 0.5:
        return Sentence(BAD, f"{text}{_strength(metric.value)}", about)
    if metric.low > 0.5:
        return Sentence(OPEN, f"{text}With so many attacks, one may find this much by chance.", about)
    if metric.high < 0.5:
        # What was trained on does not score lower for that: the held-out ones are easier, or of another kind.
        return Sentence(OPEN, f"{text}The two sets of {noun}s differ in other ways, which may hide a leak.", about)
    if metric.high - metric.low > 0.2:
        return Sentence(OPEN, f"{text}Too few {noun}s were looked at to tell that from guessing.", about)
    return Sentence(GOOD, f"{text}No leak was found this way.", about)


def _strength(auc: float) -> str:
    if auc < 0.6:
        return "That is a slight leak, but a real one."
    return "That is a clear leak." if auc < 0.8 else "That is a strong leak."


def _quality(audit: AuditRecord) -> Iterator[Sentence]:
    for features in audit.features:
        metric = audit.metrics.get(name := f"frechet_{features.slug}")
        if metric is None:
            continue
        entry = describe(name)
        text = f"Quality: the {entry.title} to held-out images is {entry.show(metric.value)}"
        if metric.baseline is not None:
            text += f"; copies of the training images would score {entry.show(metric.baseline)}"
        yield Sentence(PLAIN, f"{text}. Lower is better.", "quality")


def _caution(audit: AuditRecord) -> Iterator[Sentence]:
    count = len(audit.warnings)
    if count:
        yield Sentence(OPEN, f"Read this with care: {count} {_noun(count, 'warning')} below.", "warnings")


def _counts(metric: Metric) -> tuple[int, int]:
    return int(metric.count or 0), int(metric.total or 0)


def _of(count: int, total: int, noun: str) -> str:
    return f"{count:,} of {total:,} {_noun(total, noun)}" if count else f"None of {total:,} {_noun(total, noun)}"


def _noun(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."

"""Audits side by side: differences with honest intervals, and every reason why they may not be comparable."""

import json
import math

import numpy as np
import pytest
from audit_samples import HOSTILE, even, sample_json, sample_metrics, share
from scipy import stats

from iet_finetune.audit.measures.metrics import Metric, rate
from iet_finetune.audit.report.compare import compare, write_comparison
from iet_finetune.audit.report.compare_text import as_text
from iet_finetune.audit.report.comparison import difference
from iet_finetune.errors import UserError


@pytest.fixture
def save(tmp_path):
    """Writes an audit into a folder of a run and returns the path of its audit.json."""

    def write(folder, **changes):
        path = tmp_path / folder / "audit" / "audit.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample_json(**changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def two(save):
    return [
        save("a", model="plain", metrics=sample_metrics() | {"f_mem": share(120, 1000, 0.0)}),
        save("b", model="iet"),
    ]


# Newcombe, "Interval estimation for the difference between independent proportions", 1998, Table II, method 10.
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
        ((0, 20), (0, 10), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
    ],
)
def test_the_interval_of_two_rates_is_that_of_the_paper(first, second, low, high):
    found = difference(rate(*first), rate(*second))
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def wilson(count, total):
    """Wilson's interval from his formula, for arrays."""
    z, p = stats.norm.isf(0.025), count / total
    middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    return middle - reach, middle + reach


@pytest.mark.parametrize(("one", "other"), [(0.02, 0.05), (0.3, 0.3), (0.01, 0.01)])
def test_the_interval_of_a_difference_of_rates_holds_the_truth_19_times_in_20(one, other):
    rng = np.random.default_rng(0)
    held, rounds = 0, 1500
    for first, second in zip(rng.binomial(400, one, rounds), rng.binomial(600, other, rounds), strict=True):
        (l1, u1), (l2, u2) = wilson(first, 400), wilson(second, 600)
        found = difference(Metric(first / 400, l1, u1), Metric(second / 600, l2, u2))
        held += found.low <= other - one <= found.high
    assert 0.935 <= held / rounds <= 0.985


def test_even_intervals_add_up_as_those_of_normal_errors_do():
    found = difference(Metric(1.0, 0.7, 1.3), Metric(2.0, 1.6, 2.4))
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.5, 1.5))
    assert found.clear
    assert not difference(Metric(1.0, -2.0, 4.0), Metric(2.0, -2.0, 6.0)).clear


def test_swapping_two_metrics_turns_the_difference_round():
    one, other = rate(3, 40), rate(9, 50)
    there, back = difference(one, other), difference(other, one)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_a_value_beyond_its_own_interval_does_not_widen_the_difference():
    biased = Metric(5.0, 5.2, 6.0)
    found = difference(Metric(1.0, 0.9, 1.1), biased)
    assert found.low == pytest.approx(4.0 - 0.1)
    assert found.high == pytest.approx(4.0 + math.hypot(1.0, 0.1))


def test_each_audit_is_compared_with_the_first(two, save):
    third = save("c", model="agc", metrics={"f_mem": share(118, 1000)})
    found = compare([*two, third])
    assert found.labels == ("plain", "iet", "agc")
    row = found.rows[0]
    assert row.name == "f_mem"
    assert row.differences[0] is None
    assert row.differences[1].value == pytest.approx(-0.097)
    assert row.differences[1].clear
    assert not row.differences[2].clear


def test_only_metrics_of_two_audits_are_compared_and_a_gap_stays_a_gap(save):
    files = [
        save("a", metrics={"f_mem": share(1, 10), "extracted": share(1, 10)}, by_repeats=[]),
        save("b", metrics={"mia_auc": even(0.6, 0.1), "extracted": share(1, 10)}, by_repeats=[]),
        save("c", metrics={"mia_auc": even(0.7, 0.1)}, by_repeats=[]),
    ]
    found = compare(files)
    assert [row.name for row in found.rows] == ["extracted", "mia_auc"]
    assert found.rows[0].values[2] is None
    assert found.rows[1].values[0] is None
    # Without a value of the first there is nothing to compare with.
    assert found.rows[1].differences == (None, None, None)


def test_metrics_by_repeats_are_compared_too(save):
    rows = [{"repeats": "10 or more", "extracted": share(3, 20), "mia_auc": even(0.9, 0.05)}]
    found = compare([save("a", metrics={}, by_repeats=rows), save("b", metrics={}, by_repeats=rows)])
    assert [row.name for row in found.rows] == ["extracted_x10_up", "mia_auc_x10_up"]


def test_audits_of_one_model_are_called_by_their_folders(save):
    assert compare([save("a"), save("b")]).labels == ("a", "b")


def test_labels_differ_whatever_models_and_folders_are_called(save):
    file = save("a")
    assert compare([file, file]).labels == ("emoji-sd-iet (1)", "emoji-sd-iet (2)")


def test_a_folder_stands_for_the_audit_in_it(two):
    run, audit = two[0].parent.parent, two[1].parent
    assert compare([run, audit]).labels == ("plain", "iet")


def test_audits_of_the_same_conditions_give_no_warning(two):
    assert compare(two).warnings == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"training_fingerprint": "ffff"}}, "the training images differ: 5f1d0c77a1be (a), ffff (b)"),
        ({"data": {"heldout_fingerprint": None}}, "the held-out images differ: 90cc41b23d5e (a), none (b)"),
        ({"data": {"generated_images": 50}}, "the number of generated images differs: 1000 (a), 50 (b)"),
        ({"data": {"heldout_images": 50}}, "the number of held-out images differs: 300 (a), 50 (b)"),
        (
            {"features": [{"slug": "effnet_lite0", "fingerprint": "eeee"}]},
            "the features effnet_lite0 are not the same: 0badc0ffee12 (a), eeee (b)",
        ),
        (
            {"reference": {"fingerprint": "ffff"}},
            "the reference models differ: emoji-sd 77aa10fe93b2 (a), emoji-sd ffff (b)",
        ),
        ({"settings": {"num_inference_steps": 20}}, "the `--num_inference_steps` differs: 50 (a), 20 (b)"),
        ({"settings": {"sampling_guidance_scale": 7.5}}, "the `--sampling_guidance_scale` differs: none (a), 7.5 (b)"),
        (
            {"settings": {"scheduler": "DDPMScheduler"}},
            "the `--scheduler` differs: DDIMScheduler (a), DDPMScheduler (b)",
        ),
        ({"versions": {"torch": "2.9.0"}}, "the version of torch differs: 2.13.0 (a), 2.9.0 (b)"),
    ],
)
def test_a_difference_in_conditions_is_named_with_both_values(save, changes, words):
    whole = sample_json()
    changed = {name: whole[name] | part if isinstance(part, dict) else part for name, part in changes.items()}
    assert compare([save("a"), save("b", **changed)]).warnings == (words,)


def test_flags_that_must_differ_between_audits_are_no_difference_in_conditions(save):
    settings = sample_json()["settings"]
    files = [save(name, settings=settings | {"model": name, "output_dir": name}) for name in ("a", "b")]
    assert compare(files).warnings == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "is not an audit of iet_finetune"),
        (b'{"format": "something", "version": 1}', "is not an audit of iet_finetune"),
        (b'{"format": "iet_finetune.audit", "version": 3}', "version 3, and this program reads versions 1 and 2"),
        (b'{"format": "iet_finetune.audit"}', "version None"),
        (b'{"format": "iet_finetune.audit", "version": 1, "metrics": []}', "`metrics` is no table"),
        (b'{"format": "iet_finetune.audit", "version": 1, "features": ["x"]}', "`features` is no table"),
        (b'{"format": "iet_finetune.audit", "version": 1, "metrics": {"f_mem": 3}}', "`metrics.f_mem` is no table"),
        (b'{"format": "iet_finetune.audit", "version": 1, "metrics": {"f_mem": {"value": NaN}}}', "NaN"),
        (
            b'{"format": "iet_finetune.audit", "version": 1, '
            b'"metrics": {"f_mem": {"value": 1, "low": 1e999, "high": 1}}}',
            "`metrics.f_mem.low` is no finite number",
        ),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "features": [{"slug": ["x"]}]}',
            "`features.slug` is no text",
        ),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "data": {"generated_images": "many"}}',
            "`data.generated_images` is no whole number",
        ),
        (b'{"format": "iet_finetune.audit", "version": 2, "model": 7}', "`model` is no text"),
        (b'{"format": "iet_finetune.audit", "version": 2, "reference": "base"}', "`reference` is no table"),
        (b'{"format": "iet_finetune.audit", "version": 2, "warnings": [1]}', "`warnings` is no text"),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "by_noise_level": [{"level": "x"}]}',
            "`by_noise_level.level` is no finite number",
        ),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "by_repeats": [{"images": 1}]}',
            "`by_repeats.repeats` is no text",
        ),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "histograms": {"mia": {"edges": [0, 1], "a": [1, 2]}}}',
            "`histograms.mia` has other numbers",
        ),
        (
            b'{"format": "iet_finetune.audit", "version": 2, "histograms": {"mia": {}}}',
            "`histograms.mia.edges` is no list",
        ),
    ],
)
def test_a_file_that_cannot_be_compared_is_named_in_one_line(save, tmp_path, content, words):
    file = tmp_path / "broken.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        compare([save("a"), file])
    assert f"`--compare {file}`" in str(error.value)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_one_audit_alone_is_refused(save):
    with pytest.raises(UserError, match="at least two audits"):
        compare([save("a")])


def test_audits_without_a_common_metric_are_refused(save):
    files = [save("a", metrics={}, by_repeats=[]), save("b", by_repeats=[])]
    with pytest.raises(UserError, match="no metric was measured in two"):
        compare(files)


@pytest.mark.parametrize("count", [2, 3, 4, 30])
def test_the_table_for_the_terminal_fits_100_columns_and_names_every_audit(save, count):
    files = [save(f"run-{number}", model=None) for number in range(count)]
    text = as_text(compare(files))
    assert max(map(len, text.splitlines())) <= 100
    assert all(f" run-{number}, " in text for number in range(count))


def test_up_to_three_audits_stand_side_by_side(two, save):
    assert "Nearly copied (f_mem)     12.0 % [10.1, 14.2]      2.3 % [1.5, 3.4]" in as_text(compare(two))
    many = as_text(compare([*two, save("c"), save("d")]))
    assert "  A   12.0 % [10.1, 14.2]" in many
    assert "-9.7 [-12.0, -7.5] *" in many


def test_a_clear_difference_is_marked_and_others_are_not(two):
    lines = as_text(compare(two)).splitlines()
    marked = [line for line in lines if line.endswith(" *")]
    assert [line.strip() for line in marked] == ["-9.7 [-12.0, -7.5] *"]


def test_the_table_shows_warnings_and_nothing_that_a_terminal_would_obey(save):
    text = as_text(compare([save("a", model="a\x1b[2J\nb"), save("b", model="b", date=HOSTILE, versions={})]))
    assert "Not the same conditions: the version of torch differs: 2.13.0" in text
    assert all(each.isprintable() or each == "\n" for each in text)


def test_a_comparison_is_written_as_json_and_as_a_page(two, tmp_path):
    comparison = compare(two)
    page = write_comparison(tmp_path / "out", comparison)
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in page.parent.iterdir()) == ["compare.html", "compare.json"]
    assert [each["label"] for each in written["audits"]] == ["plain", "iet"]
    assert written["metrics"]["f_mem"]["differences"][0] is None
    assert written["metrics"]["f_mem"]["differences"][1]["clear"] is True
    assert written["metrics"]["f_mem"]["figures"][1]["count"] == 23
    text = page.read_text(encoding="utf-8")
    assert "lower by 9.7 points" in text
    assert "no clear difference" in text


def test_a_hostile_model_name_is_no_markup_in_the_page(save, tmp_path):
    page = write_comparison(tmp_path / "out", compare([save("a", model=HOSTILE), save("b", model="b")]))
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_an_audit_of_version_1_is_compared_with_one_of_version_2(save):
    old = save("a", model="old", by_repeats=[], by_noise_level=[], histograms={})
    old.write_text(old.read_text().replace('"version": 2', '"version": 1').replace('"baseline', '"null'))
    found = compare([old, save("b", model="new", by_repeats=[])])
    assert found.rows[0].values[0] == found.rows[0].values[1]
    assert found.rows[0].values[0].baseline == 0.0
    assert found.audits[0].metrics == found.audits[1].metrics

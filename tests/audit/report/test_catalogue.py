"""The catalogue knows every metric of an audit, and writes its metrics as people do."""

import subprocess
import sys
from pathlib import Path

import pytest
from audit_samples import sample_audit, sample_metrics

from iet_finetune.audit.report import catalogue
from iet_finetune.audit.report.catalogue import GROUPS, describe, in_order, repeats_name

SLUGS = ("effnet_lite0", "dinov2_base", "sscd_disc_large")
OF_FEATURES = (
    *("similarity_mean", "similarity_p90", "similarity_p95", "similarity_above_0.5"),
    *("kid", "frechet", "precision", "recall", "density", "coverage"),
)
NAMES = (
    *("f_mem", "extracted", "extracted_x1", "extracted_x2_4", "extracted_x5_9", "extracted_x10_up"),
    *(f"mq_{delta / 100:g}" for delta in range(15, 61, 5)),
    *("prompt_memorization", "prompt_memorization_auc"),
    *("mia_auc", "mia_tpr_at_1_fpr", "mia_ref_auc", "mia_ref_tpr_at_1_fpr", "heldout_loss", "clip_score"),
    *(f"{metric}_{slug}" for metric in OF_FEATURES for slug in SLUGS),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_has_a_title_a_sentence_a_direction_and_a_group(name):
    entry = describe(name)
    assert entry.name == name
    assert entry.title
    assert "{" not in entry.title
    assert entry.meaning.endswith(".")
    assert entry.better in ("lower", "higher")
    assert entry.group in GROUPS[:-1]
    assert entry.baseline


def test_no_two_metrics_have_the_same_title():
    titles = [describe(name).title for name in NAMES]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", ["f_men", "mq_", "mq_high", "frechet", "frechet_", "extracted_x3", "kidney", ""])
def test_a_name_that_is_none_gets_an_entry_that_says_no_more_than_it(name):
    entry = describe(name)
    assert (entry.title, entry.group, entry.better) == (name, "Other", None)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_frechet_distance_is_never_called_fid(slug):
    title = describe(f"frechet_{slug}").title
    assert title.startswith("FD-")
    assert "FID" not in title
    assert describe("frechet_effnet_lite0").title == "FD-EffNetLite0"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("f_mem", 0.0234, "2.3 %"),
        ("f_mem", 0.0, "0.0 %"),
        ("f_mem", 1.0, "100.0 %"),
        ("f_mem", -0.00001, "0.0 %"),
        ("mia_auc", 0.6034, "0.603"),
        ("frechet_effnet_lite0", 1234.567, "1,234.57"),
        ("kid_effnet_lite0", -0.00123, "-0.0012"),
        ("kid_effnet_lite0", -0.00001, "0.0000"),
    ],
)
def test_a_value_is_written_with_its_unit_and_its_digits(name, value, shown):
    assert describe(name).show(value) == shown


def test_an_interval_is_written_without_unit():
    assert describe("f_mem").interval(0.0154, 0.0344) == "1.5 to 3.4"


def test_metrics_are_in_the_order_of_the_groups_and_classes_of_repeats_behind_their_metric():
    names = in_order([*reversed(NAMES), "unheard_of"])
    groups = [GROUPS.index(describe(name).group) for name in names]
    assert groups == sorted(groups)
    assert names[-1] == "unheard_of"
    start = names.index("extracted")
    assert names[start : start + 5] == [*NAMES[1:6]]
    assert names[0] == "f_mem"


@pytest.mark.parametrize("metric", ["extracted", "mia_auc", "mia_ref_auc", "prompt_memorization"])
@pytest.mark.parametrize(("repeats", "end"), [("1", "x1"), ("2-4", "x2_4"), ("5-9", "x5_9"), ("10 or more", "x10_up")])
def test_a_class_of_repeats_has_a_name_and_a_title_of_its_own(metric, repeats, end):
    name = repeats_name(metric, repeats)
    assert name == f"{metric}_{end}"
    assert describe(name).repeats == repeats
    assert describe(name).title.startswith(f"{describe(metric).title}, in the data ")
    assert repeats_name(metric, "three") is None


def test_the_classes_of_repeats_are_those_that_are_measured():
    memorization = pytest.importorskip("iet_finetune.audit.measures.memorization")
    assert tuple(catalogue.REPEATS.values()) == tuple(label for label, _, _ in memorization.REPEATS)


def test_the_sample_audit_of_these_tests_has_every_metric_but_what_it_says_it_has_not():
    missing = {name for name in NAMES if not name.endswith(SLUGS[1:])} - sample_metrics().keys()
    assert missing == {*sample_audit().not_measured, "extracted_x2_4", "extracted_x5_9"}


def test_the_catalogue_is_had_without_any_library():
    code = "import iet_finetune.audit.report.catalogue, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "scipy", "jinja2"} & set(done.stdout.split())

"""Sets of scores are told apart by the area under the ROC curve and by the true positives at few false ones."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.audit.measures.separation import auc, auc_metric, chance_tpr, common_edges, tpr_at_fpr, tpr_metric

# Few values, so that many are equal.
SCORES = st.lists(st.integers(-4, 4).map(lambda n: n / 3), min_size=1, max_size=12).map(np.array)


def slow_auc(members, others):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in others]
    return sum(wins) / len(wins)


def slow_tpr(members, others, fpr):
    """Every threshold between two values, and beyond all of them, is tried."""
    values = sorted({*members, *others})
    thresholds = [values[0] - 1, *values]
    allowed = [
        sum(a > threshold for a in members) / len(members)
        for threshold in thresholds
        if sum(b > threshold for b in others) <= fpr * len(others) + 1e-9
    ]
    return max(allowed)


@given(SCORES, SCORES)
def test_the_area_is_the_chance_that_a_member_scores_above_another(members, others):
    assert auc(members, others) == pytest.approx(slow_auc(members, others), abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - auc(members, others), abs=1e-12)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
def test_no_threshold_names_more_members_for_so_few_others(members, others, fpr):
    assert tpr_at_fpr(members, others, fpr) == pytest.approx(slow_tpr(members, others, fpr), abs=1e-12)


def test_one_of_a_hundred_others_may_be_named_and_none_of_ninety_nine():
    others = np.arange(100.0)
    members = np.array([97.5, 98.5, 98.5, 99.5])
    assert tpr_at_fpr(members, others) == 0.75
    assert tpr_at_fpr(members, others[1:]) == 0.25
    # 29 of 100, though 0.29 * 100 is a little less than 29 in floating point.
    assert tpr_at_fpr(np.array([70.5]), others, 0.29) == 1.0


def test_scores_that_say_nothing_name_the_chance_share_on_average():
    rng = np.random.default_rng(0)
    for count in (20, 100, 150):
        found = [tpr_at_fpr(rng.random(50), rng.random(count)) for _ in range(4000)]
        assert np.mean(found) == pytest.approx(chance_tpr(count), abs=0.002)
    assert chance_tpr(10**6) == pytest.approx(0.01, abs=1e-5)


def test_intervals_cover_the_truth_and_stand_beside_chance():
    rng = np.random.default_rng(1)
    truth = 0.76025  # of two normal distributions one standard deviation apart: Phi(1 / sqrt(2))
    area = [auc_metric(rng.normal(1, 1, 200), rng.normal(0, 1, 200), seed) for seed in range(20)]
    assert sum(metric.low <= truth <= metric.high for metric in area) >= 17
    assert all(metric.baseline == 0.5 and metric.low < metric.value < metric.high for metric in area)
    # A bootstrap over both sets is as wide as the two together, by Hanley and McNeil (1982) about 4 x 0.0236.
    assert np.mean([metric.high - metric.low for metric in area]) == pytest.approx(4 * 0.0236, rel=0.1)
    members, others = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    rate = tpr_metric(members, others)
    assert rate.value == tpr_at_fpr(members, others)
    assert rate.low < rate.value < rate.high
    assert rate.baseline == 3 / 201


def test_intervals_follow_from_the_seed():
    members, others = np.random.default_rng(2).normal(size=(2, 60))
    assert auc_metric(members, others, 3) == auc_metric(members, others, 3)
    assert auc_metric(members, others, 3) != auc_metric(members, others, 4)


def test_a_thousand_resamples_of_a_thousand_each_take_no_time():
    members, others = np.random.default_rng(0).normal(size=(2, 1000))
    start = time.process_time()
    auc_metric(members, others)
    tpr_metric(members, others)
    assert time.process_time() - start < 3


def test_what_cannot_be_compared_is_refused():
    some = np.ones(3)
    for members, others in ((some, some[:0]), (some[:0], some), (some, np.array([np.nan])), (some * np.inf, some)):
        with pytest.raises(ValueError, match="must be"):
            auc(members, others)


def test_one_outlier_does_not_squeeze_a_histogram():
    edges = common_edges(np.linspace(0, 1, 1000), np.array([1e6]), bins=10)
    assert len(edges) == 11
    assert edges[-1] < 1.01
    assert (np.diff(common_edges(np.zeros(4), np.zeros(2))) > 0).all()

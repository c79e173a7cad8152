"""Figures and their intervals, against scipy and by what an interval promises."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from iet_finetune.audit.measures.metrics import Metric, bootstrap, mean, rate

COUNTS = st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(COUNTS)
def test_a_rate_has_wilsons_interval(counts):
    count, total = counts
    low, high = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    metric = rate(count, total)
    assert (metric.low, metric.high) == pytest.approx((low, high), abs=1e-12)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1
    assert (metric.value, metric.count, metric.total) == (count / total, count, total)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_a_share_of_nothing_or_of_more_than_all_is_no_rate(count, total):
    with pytest.raises(ValueError, match="is no rate"):
        rate(count, total)


def test_the_interval_of_a_mean_is_that_of_scipys_bootstrap():
    values = np.random.default_rng(0).gamma(2.0, size=400)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    ours = bootstrap(np.mean, values, resamples=4000)
    assert ours.value == values.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_samples_are_drawn_from_independently():
    ones, twos = np.random.default_rng(1).normal(size=(2, 300))
    apart = bootstrap(lambda a, b: a.mean() - b.mean(), ones, twos)
    expected = 1.96 * math.hypot(ones.std(), twos.std()) / math.sqrt(300)
    assert apart.high - apart.low == pytest.approx(2 * expected, rel=0.1)


def test_a_centred_interval_reaches_as_far_to_both_sides_as_the_spread_says():
    values = np.random.default_rng(2).normal(size=500)
    metric = bootstrap(np.mean, values, centred=True)
    assert metric.value - metric.low == pytest.approx(metric.high - metric.value)
    assert metric.high - metric.value == pytest.approx(1.96 * values.std() / math.sqrt(500), rel=0.1)


def test_an_interval_holds_the_truth_in_nineteen_of_twenty_cases():
    rng = np.random.default_rng(3)
    held = [metric.low <= 1 <= metric.high for metric in (mean(rng.exponential(size=200)) for _ in range(150))]
    assert 0.88 <= np.mean(held) <= 0.99


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(4).normal(size=50)
    assert mean(values, seed=5) == mean(values, seed=5)
    assert mean(values, seed=5) != mean(values, seed=6)


def test_one_value_alone_is_its_own_interval():
    assert mean(np.array([3.0])) == Metric(3.0, 3.0, 3.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["value", "low", "high", "baseline"])
def test_a_metric_that_is_not_finite_is_none(field, broken):
    with pytest.raises(ValueError, match="must be finite"):
        Metric(**{"value": 1.0, "low": 0.0, "high": 2.0, "baseline": 1.0, field: broken})


def test_a_metric_in_json_has_its_baseline_even_where_there_is_none():
    assert Metric(1.0, 0.5, 2.0).to_json() == {"value": 1.0, "low": 0.5, "high": 2.0, "baseline": None}
    beside = rate(1, 4).against(rate(0, 10)).to_json()
    assert json.loads(json.dumps(beside)) == beside
    assert beside.keys() == {"value", "low", "high", "baseline", "count", "total", "baseline_low", "baseline_high"}
    assert (beside["baseline"], beside["baseline_low"], beside["count"]) == (0.0, 0.0, 1)
    assert rate(1, 4).against(0.25).to_json().keys() == {"value", "low", "high", "baseline", "count", "total"}

"""Copies score as copies, held-out images as the baseline says, and duplicates in the training data blind nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iet_finetune.audit.measures.findings import Findings, Histogram, histogram
from iet_finetune.audit.measures.memorization import (
    DELTAS,
    REPEATS,
    closest_pairs,
    extraction,
    mq_ratios,
    pixel_metrics,
    ratios,
    repeat_classes,
    similarity_metrics,
)
from iet_finetune.audit.measures.metrics import Metric, rate
from iet_finetune.audit.measures.neighbours import Neighbours, nearest_pixels
from iet_finetune.data.duplicates import find_duplicates

MQ_NAMES = ["mq_0.15", "mq_0.2", "mq_0.25", "mq_0.3", "mq_0.35", "mq_0.4", "mq_0.45", "mq_0.5", "mq_0.55", "mq_0.6"]


def images(count: int, seed: int) -> np.ndarray:
    """(count, 8, 8, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def neighbours_of(*distances: list[float], nearest: list[int] | None = None) -> Neighbours:
    """Neighbours with these squared distances; the nearest reference is the first unless told."""
    distance = np.array(distances, dtype=np.float64)
    index = np.tile(np.arange(distance.shape[1]), (len(distance), 1))
    if nearest is not None:
        index[:, 0] = nearest
    return Neighbours(index, distance, np.zeros(distance.shape, dtype=bool))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e4), min_size=50, max_size=55), min_size=1, max_size=6), st.integers(50, 55))
def test_the_ratios_are_those_of_the_formulas(rows, k):
    rows = [sorted((row + row)[:k]) for row in rows]
    found = neighbours_of(*rows)
    for row, ratio, mq in zip(rows, ratios(found), mq_ratios(found), strict=True):
        if row[0] == 0:
            assert ratio == mq == 0
        else:
            assert ratio == pytest.approx(row[0] ** 0.5 / row[1] ** 0.5)
            assert mq == pytest.approx(row[0] / (sum(row[:50]) / 50))
        assert 0 <= ratio <= 1
        assert 0 <= mq <= 1 + 1e-12


def test_the_ratio_is_of_distances_and_mq_of_their_squares():
    found = neighbours_of([1.0] + [16.0] * 49)
    assert ratios(found) == [0.25]
    assert mq_ratios(found) == [pytest.approx(1 / ((1 + 49 * 16) / 50))]


def test_an_exact_copy_scores_0_even_beside_a_second_one():
    found = neighbours_of([0.0, 0.0] + [1.0] * 48, [0.0] * 50)
    np.testing.assert_array_equal(ratios(found), 0)
    np.testing.assert_array_equal(mq_ratios(found), 0)


def test_a_third_itself_is_not_below_a_third():
    found = neighbours_of([1.0, 9.0], [1.0, 9.1])
    assert pixel_metrics(found, None, 2).metrics["f_mem"].count == 1


def test_copies_are_memorized_and_held_out_images_are_the_baseline():
    training = images(600, 0)
    copies = np.concatenate((training[:30], training[30:40, :, ::-1]))
    found = pixel_metrics(nearest_pixels(copies, training), nearest_pixels(images(25, 1), training), 600)
    assert list(found.metrics) == ["f_mem", *MQ_NAMES]
    for metric in found.metrics.values():
        assert metric == rate(40, 40).against(0.0)
    assert found.warnings == []
    assert found.not_measured == {}
    assert (
        found.histograms["ratio"].series["generated"][0] == found.histograms["mq_ratio"].series["generated"][0] == 40
    )
    assert (
        sum(found.histograms["ratio"].series["baseline"]) == sum(found.histograms["mq_ratio"].series["baseline"]) == 25
    )


def test_held_out_images_score_as_their_own_baseline():
    training, heldout = images(80, 2), nearest_pixels(images(40, 3), images(80, 2))
    found = pixel_metrics(heldout, heldout, len(training))
    assert {metric.value - metric.baseline for metric in found.metrics.values()} == {0.0}


def test_mq_counts_what_is_below_each_delta():
    found = neighbours_of(*([mq * 50 / 50] + [(50 - mq) / 49] * 49 for mq in (0.05, 0.16, 0.29, 0.44, 0.58, 0.9)))
    counts = [pixel_metrics(found, None, 1000).metrics[name].count for name in MQ_NAMES]
    assert counts == [1, 2, 2, 3, 3, 3, 4, 4, 4, 5]
    assert [f"mq_{delta:g}" for delta in DELTAS] == MQ_NAMES


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 59), max_size=40), st.booleans())
def test_duplicates_in_the_training_data_change_nothing(copied, mirrored):
    training = images(60, 4)
    generated = np.concatenate((training[:5], images(10, 5)))
    step = -1 if mirrored else 1
    data = np.concatenate((training, training[copied][:, :, ::step]))
    groups = find_duplicates(data)
    plain, cleaned = nearest_pixels(generated, training), nearest_pixels(generated, data[groups.references])
    assert len(groups.references) == 60
    assert pixel_metrics(cleaned, None, 60) == pixel_metrics(plain, None, 60)
    assert pixel_metrics(cleaned, None, 60).metrics["f_mem"].count == 5


def test_duplicates_that_are_left_in_hide_near_copies():
    """Why they are removed: a near copy is as near to the second as to the first."""
    training = images(60, 6)
    near = np.clip(training[:10].astype(int) + 1, 0, 255).astype(np.uint8)
    assert pixel_metrics(nearest_pixels(near, training), None, 60).metrics["f_mem"].count == 10
    twice = np.concatenate((training, training))
    assert pixel_metrics(nearest_pixels(near, twice), None, 120).metrics["f_mem"].count == 0


@pytest.mark.parametrize(
    ("references", "measured", "warned"),
    [(1, [], False), (2, ["f_mem"], False), (49, ["f_mem"], False), (50, ["f_mem", *MQ_NAMES], True)],
)
def test_what_needs_more_references_is_not_measured(references, measured, warned):
    training = images(references, 7)
    found = pixel_metrics(nearest_pixels(training, training, min(50, references)), None, references)
    assert list(found.metrics) == measured
    assert set(found.not_measured) == {"f_mem", *MQ_NAMES} - set(measured)
    assert all(f"the data has {references}" in reason for reason in found.not_measured.values())
    assert [f"reference set of {references} images is small" in line for line in found.warnings] == [True] * warned


def test_fewer_neighbours_than_a_ratio_needs_are_a_mistake():
    with pytest.raises(ValueError, match="two neighbours"):
        ratios(neighbours_of([1.0]))
    with pytest.raises(ValueError, match="50 neighbours"):
        mq_ratios(neighbours_of([1.0] * 49))


def test_similarities_are_summed_up_beside_their_baseline():
    rng = np.random.default_rng(8)
    generated, baseline = rng.uniform(0.2, 1, 400), rng.uniform(0, 0.7, 90)
    found = similarity_metrics("effnet_lite0", generated, baseline, seed=3)
    expected = {
        "similarity_mean_effnet_lite0": np.mean,
        "similarity_p90_effnet_lite0": lambda values: np.percentile(values, 90),
        "similarity_p95_effnet_lite0": lambda values: np.percentile(values, 95),
        "similarity_above_0.5_effnet_lite0": lambda values: np.mean(values > 0.5),
    }
    assert list(found.metrics) == list(expected)
    for name, statistic in expected.items():
        metric = found.metrics[name]
        assert metric.value == pytest.approx(statistic(generated))
        assert metric.baseline == pytest.approx(statistic(baseline))
        assert metric.low < metric.value < metric.high
    assert found.metrics["similarity_above_0.5_effnet_lite0"].total == 400
    counts = found.histograms["similarity_effnet_lite0"].series
    assert (sum(counts["generated"]), sum(counts["baseline"])) == (400, 90)
    assert similarity_metrics("effnet_lite0", generated, baseline, seed=3) == found


def test_without_held_out_images_there_is_no_baseline():
    found = similarity_metrics("x", np.linspace(-1, 1, 20), None)
    assert {metric.baseline for metric in found.metrics.values()} == {None}
    assert list(found.histograms["similarity_x"].series) == ["generated"]
    assert sum(found.histograms["similarity_x"].series["generated"]) == 20


def test_extraction_counts_references_by_how_often_they_are_repeated():
    near, far = [1.0, 100.0], [99.0, 100.0]
    repeats = np.array([1, 1, 1, 2, 4, 5, 12, 10, 30])
    generated = neighbours_of(near, near, near, near, far, near, nearest=[0, 6, 6, 7, 8, 4])
    found, classes = extraction(generated, repeats, neighbours_of(far, near, far, far, far, far, nearest=[0] * 6))
    assert {name: (metric.count, metric.total) for name, metric in found.metrics.items()} == {
        "extracted": (4, 9),
        "extracted_x1": (1, 3),
        "extracted_x2_4": (1, 2),
        "extracted_x5_9": (0, 1),
        "extracted_x10_up": (2, 3),
    }
    assert list(classes) == [label for label, _, _ in REPEATS]
    assert classes["10 or more"] == found.metrics["extracted_x10_up"]
    assert found.metrics["extracted"].baseline == pytest.approx(1 / 9)
    assert [classes[label].baseline for label in classes] == [pytest.approx(1 / 3), 0, 0, 0]
    assert found.warnings == []


def test_classes_without_images_are_left_out():
    found, classes = extraction(neighbours_of([1.0, 2.0]), np.array([1, 15]), None)
    assert list(found.metrics) == ["extracted", "extracted_x1", "extracted_x10_up"]
    assert list(classes) == ["1", "10 or more"]
    assert [(label, which.tolist()) for label, which in repeat_classes(np.array([3, 1, 2]))] == [
        ("1", [False, True, False]),
        ("2-4", [True, False, True]),
    ]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_every_image_is_in_one_class(repeats):
    inside = [which for _, which in repeat_classes(np.array(repeats))]
    np.testing.assert_array_equal(np.sum(inside, axis=0), 1)


def test_unequal_numbers_of_tries_are_told():
    found, _ = extraction(neighbours_of([1.0, 2.0], [1.0, 2.0]), np.array([1, 1]), neighbours_of([1.0, 2.0]))
    assert ["2 generated images against 1 held-out ones" in line for line in found.warnings] == [True]


def test_extraction_needs_a_second_reference():
    found, classes = extraction(neighbours_of([1.0]), np.array([3]), None)
    assert found.metrics == classes == {}
    assert "extracted" in found.not_measured


def test_the_closest_pairs_come_first_and_no_reference_fills_the_list():
    rows = [[0.5, 1.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0], [0.3, 1.0], [0.0, 2.0], [2.0, 20.0]]
    found = neighbours_of(*rows, nearest=[0, 1, 1, 1, 1, 2, 0])
    assert closest_pairs(found).tolist() == [1, 5, 2, 6, 3, 0]
    assert closest_pairs(found, count=2).tolist() == [1, 5]
    assert closest_pairs(found, per_reference=1).tolist() == [1, 5, 6]
    assert closest_pairs(neighbours_of([3.0], [1.0], [2.0])).tolist() == [1, 2, 0]
    assert closest_pairs(neighbours_of(*[[1.0, 2.0]] * 60, nearest=list(range(60)))).tolist() == list(range(50))


def test_findings_merge_in_order_and_keep_a_warning_once():
    metric = Metric(0.5, 0.4, 0.6)
    merged = Findings.merged(
        Findings({"a": metric}, warnings=["w"]),
        Findings({"b": metric}, {"c": "why"}, ["w", "v"], {"h": histogram([0, 1], x=np.ones(2))}),
    )
    assert merged == Findings(
        {"a": metric, "b": metric}, {"c": "why"}, ["w", "v"], {"h": Histogram([0.0, 1.0], {"x": [2]})}
    )
    with pytest.raises(ValueError, match="found twice: a"):
        Findings.merged(merged, Findings({"a": metric}))
    with pytest.raises(ValueError, match="both measured and not measured: a"):
        Findings.merged(merged, Findings(not_measured={"a": "why"}))
    assert Findings.merged() == Findings()


@given(st.lists(st.floats(-10, 10)), st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True).map(sorted))
def test_a_histogram_loses_no_number(values, edges):
    found = histogram(edges, all=np.array(values), none=None)
    assert list(found.series) == ["all"]
    counts = found.series["all"]
    assert sum(counts) == len(values)
    inside = [sum(low <= value < high for value in values) for low, high in zip(edges[1:-2], edges[2:-1], strict=True)]
    assert counts[1:-1] == inside

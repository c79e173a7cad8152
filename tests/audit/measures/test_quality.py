"""Figures of quality against slow versions of their formulas, their intervals, and what cannot be measured."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPModel, CLIPTokenizer
from vision import noise, save_clip, save_dinov2

from iet_finetune.audit.measures import quality
from iet_finetune.audit.measures.quality import (
    OF_QUALITY,
    clip_findings,
    frechet_distance,
    kernel_distance,
    load_clip,
    prdc,
    quality_findings,
)
from iet_finetune.errors import UserError
from iet_finetune.families.quiet import quiet_loading

PAIRS = [(30, 30, 8), (40, 25, 8), (25, 40, 8), (9, 12, 20), (7, 6, 3)]  # with more and fewer images than dimensions


def points(count: int, dimensions: int = 8, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Features that are no less than zero, as those of a network mostly are."""
    drawn = np.random.default_rng(seed).standard_normal((count, dimensions)) + shift
    return np.maximum(drawn, 0).astype(np.float32)


def two_sets(count: int, other: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    return points(count, dimensions, 1, 0.3).astype(np.float64), points(other, dimensions, 2).astype(np.float64)


def measured(generated, heldout, training=None, seed=0):
    return quality_findings("net", "Net", generated, heldout, training, seed)


def slow_kid(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(s):
        return math.fsum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j)

    between = math.fsum(kernel(a, b) for a in x for b in y)
    n, m = len(x), len(y)
    return within(x) / (n * (n - 1)) + within(y) / (m * (m - 1)) - 2 * between / (n * m)


def slow_frechet(x: np.ndarray, y: np.ndarray) -> float:
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = sqrtm(sqrtm(cov_x) @ cov_y @ sqrtm(cov_x))  # has the trace of √(S₁S₂), and is symmetric
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root.real))


def slow_prdc(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def reach(i, points):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real_reach = [reach(i, real) for i in range(len(real))]
    own_reach = [reach(j, generated) for j in range(len(generated))]
    inside = [[math.dist(g, r) <= size for r, size in zip(real, real_reach, strict=True)] for g in generated]
    recalled = [any(math.dist(g, r) <= size for g, size in zip(generated, own_reach, strict=True)) for r in real]
    precision = sum(any(row) for row in inside) / len(generated)
    coverage = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    return precision, sum(recalled) / len(real), sum(map(sum, inside)) / k / len(generated), coverage


@pytest.mark.parametrize("shape", PAIRS)
def test_kid_is_that_of_the_formula(shape):
    x, y = two_sets(*shape)
    assert kernel_distance(x, y) == pytest.approx(slow_kid(x, y), rel=1e-9, abs=1e-12)


def test_kid_with_weights_leaves_out_the_pairs_of_an_image_with_itself():
    x, y = two_sets(9, 7, 4)
    rng = np.random.default_rng(0)
    v, w = (rng.multinomial(n, np.full(n, 1 / n), 3) for n in (9, 7))
    for value, a, b in zip(quality._kernel_distances(x, y, v, w), v, w, strict=True):
        i, j = np.repeat(np.arange(9), a), np.repeat(np.arange(7), b)
        kernel = (np.concatenate([x, y]) @ np.concatenate([x, y]).T / 4 + 1) ** 3
        own_x = [kernel[p, q] for p in i for q in i if p != q]
        own_y = [kernel[9 + p, 9 + q] for p in j for q in j if p != q]
        between = [kernel[p, 9 + q] for p in i for q in j]
        assert value == pytest.approx(np.mean(own_x) + np.mean(own_y) - 2 * np.mean(between), rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kid_is_that_of_torchmetrics_where_that_takes_all_images():
    x, y = two_sets(40, 40, 8)

    class Given(torch.nn.Module):
        num_features = 8

        def forward(self, features):
            return features

    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=40).set_dtype(torch.float64)
    with torch.random.fork_rng():  # it draws the order of the images
        theirs.update(torch.from_numpy(x), real=False)
        theirs.update(torch.from_numpy(y), real=True)
        value, _ = theirs.compute()
    assert kernel_distance(x, y) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.parametrize("shape", PAIRS)
def test_the_frechet_distance_is_that_of_the_formula(shape):
    x, y = two_sets(*shape)
    assert frechet_distance(x, y) == pytest.approx(slow_frechet(x, y), rel=1e-5)


@pytest.mark.parametrize("shape", PAIRS)
def test_the_distance_that_the_interval_is_made_of_is_the_same(shape):
    x, y = two_sets(*shape)
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, len(x), len(x)), rng.integers(0, len(y), len(y))
    assert quality._frechet_of_drawn(x, i, y, j) == pytest.approx(slow_frechet(x[i], y[j]), rel=1e-5)


@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("k", [1, 5])
def test_neighbourhoods_are_those_of_the_formulas(shape, k, monkeypatch):
    monkeypatch.setattr(quality, "_ROWS", 7)  # several blocks of rows
    x, y = two_sets(*shape)
    assert [each.mean() for each in prdc(x, y, k)] == pytest.approx(slow_prdc(x, y, k), rel=1e-12)


def test_an_image_on_the_rim_of_a_neighbourhood_is_inside():
    real = np.array([[0.0], [1.0], [10.0]])
    inside, recalled, density, covered = prdc(np.array([[-1.0], [-3.0]]), real, 1)
    assert inside.tolist() == [True, False]  # -1 is at 1 of 0, whose nearest is at 1
    assert recalled.tolist() == [True, True, False]  # 1 is at 2 of -1, whose nearest is at 2
    assert density.tolist() == [1.0, 0.0]
    assert covered.tolist() == [True, False, False]


def test_equal_sets_score_as_well_as_can_be():
    x = points(60, seed=3)
    metrics = measured(x, x.copy()).metrics
    assert metrics["kid_net"].value <= 0
    assert metrics["frechet_net"].value == pytest.approx(0, abs=1e-9)
    assert [metrics[f"{name}_net"].value for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    # Every image is in its own neighbourhood and in those of k others on average.
    assert metrics["density_net"].value == pytest.approx((quality.NEIGHBOURS + 1) / quality.NEIGHBOURS)


def test_a_distance_of_nothing_is_not_below_nothing():
    x = points(20, 300, seed=3)  # torchmetrics finds a little less than 0
    metric = measured(x, x).metrics["frechet_net"]
    assert metric.value == pytest.approx(0, abs=1e-4)
    assert min(metric.value, metric.low) >= 0 < metric.high


@pytest.mark.parametrize("seed", range(4))
def test_copies_in_another_order_are_in_every_neighbourhood_of_their_originals(seed, monkeypatch):
    monkeypatch.setattr(quality, "_ROWS", 64)
    x = points(400, 200, seed).astype(np.float64) + 1
    _, _, density, _ = prdc(x[::-1], x, 5)
    assert density.mean() == pytest.approx(6 / 5, rel=1e-12)  # with the nearest five, those on the rim too


def test_copies_of_images_that_the_real_ones_hold_often_are_among_them():
    x = points(30, 200, seed=3).astype(np.float64) + 1
    inside, recalled, _, _ = prdc(x, np.tile(x, (6, 1)), 5)  # the neighbourhoods reach to copies of the same image
    assert inside.all()
    assert recalled.all()


def test_sets_far_apart_score_as_badly_as_can_be():
    x, y = points(40, seed=3), points(50, seed=4) + 100
    metrics = measured(x, y).metrics
    assert [metrics[f"{name}_net"].value for name in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]
    assert metrics["frechet_net"].value == pytest.approx(8 * 100**2, rel=0.05)
    assert metrics["kid_net"].low > 1


def test_features_with_a_large_common_part_keep_their_neighbourhoods():
    x, y = two_sets(40, 30, 8)
    assert [each.mean() for each in prdc(x + 1e4, y + 1e4, 5)] == [each.mean() for each in prdc(x, y, 5)]


def test_metrics_hold_their_values_intervals_and_counts():
    x, y = points(80, seed=1, shift=0.3), points(60, seed=2)
    metrics = measured(x, y).metrics
    assert list(metrics) == [f"{name}_net" for name in OF_QUALITY]
    x, y = x.astype(np.float64), y.astype(np.float64)
    expected = [slow_kid(x, y), slow_frechet(x, y), *slow_prdc(x, y, 5)]
    assert [each.value for each in metrics.values()] == pytest.approx(expected, rel=1e-5)
    assert all(each.low <= each.value <= each.high and each.baseline is None for each in metrics.values())
    assert all(metrics[f"{name}_net"].low < metrics[f"{name}_net"].high for name in OF_QUALITY)
    assert [metrics[f"{name}_net"].total for name in ("precision", "recall", "coverage")] == [80, 60, 60]


def test_the_nulls_are_what_training_images_in_the_place_of_the_generated_score():
    x, y, training = points(40, seed=1, shift=0.3), points(50, seed=2), points(30, seed=5)
    as_generated = measured(training, y).metrics
    for name, metric in measured(x, y, training).metrics.items():
        assert metric.baseline == pytest.approx(as_generated[name].value, rel=1e-12)
        assert metric.baseline != metric.value


def test_the_baseline_takes_no_more_training_images_than_there_are_generated_ones():
    x, y = points(40, seed=1, shift=0.3), points(50, seed=2)
    training = np.concatenate([points(20, seed=5), points(100, seed=6)])
    chosen = quality._subset(training, 40, seed=9)
    assert len(np.unique(chosen, axis=0)) == 40
    baselines = [each.baseline for each in measured(x, y, training, seed=9).metrics.values()]
    assert baselines == [each.baseline for each in measured(x, y, chosen, seed=9).metrics.values()]


@pytest.mark.parametrize(("name", "reps"), [("kid", 60), ("frechet", 60)])
def test_the_interval_is_as_wide_as_metrics_vary(name, reps, monkeypatch):
    monkeypatch.setattr(quality, "RESAMPLES", 200)
    metrics = [
        measured(points(60, 4, 1000 + i, 0.5), points(60, 4, 2000 + i)).metrics[f"{name}_net"] for i in range(reps)
    ]
    deviation = np.std([each.value for each in metrics], ddof=1)
    assert np.mean([each.high - each.low for each in metrics]) == pytest.approx(2 * 1.96 * deviation, rel=0.3)


def test_the_interval_of_many_images_comes_from_some_of_them(monkeypatch):
    x, y = points(300, 4, 1, 0.5), points(300, 4, 2)
    whole = measured(x, y).metrics["frechet_net"]
    monkeypatch.setattr(quality, "_SPREAD_IMAGES", 100)
    part = measured(x, y).metrics["frechet_net"]
    assert part.value == whole.value
    assert part.high - part.low == pytest.approx(whole.high - whole.low, rel=0.5)


def test_kid_and_neighbourhoods_take_so_many_images_at_most(monkeypatch):
    monkeypatch.setattr(quality, "MOST", 20)
    x, y = points(30, seed=1), points(40, seed=2)
    metrics = measured(x, y, x).metrics
    assert [metrics[f"{name}_net"].total for name in ("precision", "recall")] == [20, 20]
    few = [quality._subset(each.astype(np.float64), 20, 0) for each in (x, y)]
    assert metrics["kid_net"].value == pytest.approx(slow_kid(*few), rel=1e-9)
    assert metrics["frechet_net"].value == pytest.approx(slow_frechet(x, y), rel=1e-5)


def test_a_frechet_distance_of_few_images_comes_with_a_warning(monkeypatch):
    monkeypatch.setattr(quality, "FEW", 30)
    assert measured(points(30), points(30)).warnings == []
    for sizes in ((29, 30), (30, 29)):
        (line,) = measured(points(sizes[0]), points(sizes[1], seed=1)).warnings
        assert line.startswith("Net: fewer than 30 generated or held-out images")
        assert line.endswith("the Fréchet distance is biased upwards and carries no weight")


@pytest.mark.parametrize("sizes", [(0, 0), (0, 30), (30, 0), (1, 30), (30, 1)])
def test_nothing_is_measured_of_one_image_a_side(sizes):
    found = measured(points(sizes[0]), points(sizes[1]), points(3))
    assert found.metrics == {}
    assert found.warnings == []
    assert list(found.not_measured) == [f"{name}_net" for name in OF_QUALITY]
    assert found.not_measured["kid_net"] == (
        f"needs at least 2 generated and 2 held-out images; there are {sizes[0]} and {sizes[1]}"
    )


@pytest.mark.parametrize("size", [2, 5])
def test_neighbourhoods_need_more_images_than_distances_do(size):
    found = measured(points(size), points(30, seed=1), points(size, seed=2))
    assert list(found.metrics) == ["kid_net", "frechet_net"]
    assert "at least 6 generated" in found.not_measured["precision_net"]
    assert list(measured(points(6), points(6, seed=1)).metrics) == [f"{name}_net" for name in OF_QUALITY]


@pytest.mark.parametrize("training", [np.zeros((0, 8), np.float32), points(1)])
def test_too_few_training_images_leave_the_baseline_out(training):
    metrics = measured(points(10), points(10, seed=1), training).metrics
    assert all(each.baseline is None for each in metrics.values())


def test_images_that_are_all_alike_have_finite_metrics():
    same = np.ones((10, 8), np.float32)
    metrics = measured(same, same, same).metrics  # a `Metric` refuses what is not finite
    assert [metrics[f"{name}_net"].value for name in ("kid", "frechet", "precision", "recall")] == [0, 0, 1, 1]


def test_the_seed_decides_and_the_global_generators_are_untouched():
    x, y, training = points(40, seed=1), points(40, seed=2), points(90, seed=3)
    np.random.seed(0)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert measured(x, y, training, seed=1) == measured(x, y, training, seed=1)
    assert measured(x, y, training, seed=1) != measured(x, y, training, seed=2)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])


# CLIP score

CAPTIONS = ["a cat", "two red dogs that run and run beyond the last token", "", "a cat", "b", "c", "d", "e", "f", "gh"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    with quiet_loading():
        return save_clip(tmp_path_factory.mktemp("clip"))


def slow_scores(folder, images: np.ndarray, captions: list[str]) -> list[float]:
    with quiet_loading():
        model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    scores = []
    for image, caption in zip(images, captions, strict=True):
        pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
        words = tokenizer(caption, add_special_tokens=False, truncation=True, max_length=10).input_ids
        tokens = torch.tensor([[tokenizer.bos_token_id, *words, tokenizer.eos_token_id]])
        of_image = model.visual_projection(model.vision_model(pixels).pooler_output)[0].detach().double()
        of_text = model.text_projection(model.text_model(tokens).pooler_output)[0].detach().double()
        cosine = of_image @ of_text / of_image.norm() / of_text.norm()
        scores.append(max(100 * float(cosine), 0.0))
    return scores


def test_the_clip_score_is_that_of_the_formula_for_each_pair(clip):
    images = noise(len(CAPTIONS), size=28)
    scores = load_clip(str(clip), "cpu").score(images, CAPTIONS)
    expected = slow_scores(clip, images, CAPTIONS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    assert len({round(score, 3) for score in expected}) > 3


def test_a_caption_that_points_away_from_the_image_scores_zero(clip):
    scorer, images = load_clip(str(clip), "cpu"), noise(2)
    assert (scorer.score(images, ["a", "b"]) > 1).all()
    with torch.no_grad():
        scorer._model.text_projection.weight.neg_()
    assert scorer.score(images, ["a", "b"]).tolist() == [0, 0]


def test_a_pair_has_the_same_score_in_any_company(clip):
    scorer, images = load_clip(str(clip), "cpu"), noise(10)
    together = scorer.score(images, CAPTIONS)
    np.testing.assert_array_equal(scorer.score(images[1:2], CAPTIONS[1:2]), together[1:2])
    assert scorer.score(images[:0], []).shape == (0,)


def test_images_and_captions_come_in_pairs(clip):
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        load_clip(str(clip), "cpu").score(noise(2), ["a"])


def test_the_clip_score_is_a_mean_beside_that_of_held_out_images():
    scores = np.array([10.0, 20.0, 30.0, 40.0], np.float32)
    metric = clip_findings(scores, np.array([30.0, 32.0], np.float32), seed=1).metrics["clip_score"]
    assert (metric.value, metric.baseline) == (25, 31)
    assert 10 < metric.low < 25 < metric.high < 40
    assert clip_findings(scores, None, seed=1).metrics["clip_score"].baseline is None
    assert "there are none" in clip_findings(scores[:0], None, seed=1).not_measured["clip_score"]


def test_fingerprints_tell_the_weights_of_clips_apart_but_not_folders(clip, tmp_path):
    with quiet_loading():
        same, other = save_clip(tmp_path / "same"), save_clip(tmp_path / "other", seed=1)
    prints = [load_clip(str(folder), "cpu").fingerprint for folder in (clip, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_what_is_no_clip_is_refused_by_the_name_of_the_flag(tmp_path, clip):
    with pytest.raises(UserError, match=re.escape(f"`--clip_model {tmp_path}` holds no CLIP model")):
        load_clip(str(tmp_path), "cpu")
    with quiet_loading():
        save_dinov2(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((clip / file).read_bytes())
    with pytest.raises(UserError, match="Dinov2Model: give a model of images and texts"):
        load_clip(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="`--clip_model nobody/clip` is no folder here"):
        load_clip("nobody/clip", "cpu")

"""The exact merge of LoRA adapters against dense float64 matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import Conv2d, Linear, LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iet_finetune.lora.factors import as_matrix, as_weights, fold_scaling, lora_scaling, unfold_scaling
from iet_finetune.lora.low_rank import align, combine, compress, merge_layer, weighted_sum
from iet_finetune.lora.spectra import LowRank
from iet_finetune.lora.splitting import split

sides = st.integers(1, 24)
ranks = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)


def draw_factors(generator, m, n, rank, dtype=torch.float32):
    up, down = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return LowRank(up.to(dtype), down.to(dtype))


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def as_dense(matrix):
    return matrix if isinstance(matrix, torch.Tensor) else matrix.up.double() @ matrix.down.double()


def dense_mean(clones, weights):
    """The weighted mean of the updates, written from the formula."""
    return sum(w * as_dense(clone) for clone, w in zip(clones, weights, strict=True)) / sum(weights)


def assert_close(actual, expected, tolerance=1e-12, scale=None):
    """Every number to `tolerance` of the largest one, or of `scale`."""
    size = expected.abs().max().item() if scale is None else scale
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * size)


def assert_balanced(matrix):
    """Both factors have orthogonal columns of the same lengths, falling, and the sign of `up` is settled."""
    if not matrix.rank:
        return
    gram = matrix.up.mT @ matrix.up
    lengths = gram.diagonal()
    assert_close(gram, torch.diag(lengths))
    assert_close(matrix.down @ matrix.down.mT, torch.diag(lengths))
    assert (lengths.diff() <= 1e-12 * lengths.max()).all()
    assert (matrix.up.gather(0, matrix.up.abs().argmax(0, keepdim=True)) > 0).all()


@st.composite
def layers(draw, max_clones=8):
    """Clones of one layer in fp32, some with a rank below the width of their factors, and their integer weights."""
    m, n, count = draw(sides), draw(sides), draw(st.integers(1, max_clones))
    generator = generator_of(draw(seeds))
    clones = []
    for _ in range(count):
        clone = draw_factors(generator, m, n, draw(ranks))
        if draw(st.booleans()):
            clone.up[:, -1] = clone.up[:, 0]
        clones.append(clone)
    return clones, draw(st.lists(st.integers(1, 5000), min_size=count, max_size=count))


@given(layers())
def test_a_weighted_sum_is_the_weighted_mean_of_the_updates(case):
    clones, weights = case
    total = weighted_sum(clones, weights)
    assert total.rank == sum(clone.rank for clone in clones)
    scale = sum(as_dense(clone).abs().max().item() for clone in clones)
    assert_close(total.dense(), dense_mean(clones, weights), scale=scale)


@given(layers())
def test_the_mean_of_the_factors_is_not_the_mean_of_the_updates(case):
    """Why the merge is not that of the full denoiser; the identity of the difference, which nothing else relies on."""
    clones = [LowRank(clone.up[:, :1].double(), clone.down[:1].double()) for clone in case[0]]
    equal = [1] * len(clones)
    up, down = (torch.stack(factor).mean(0) for factor in zip(*clones, strict=True))
    off = [LowRank(clone.up - up, clone.down - down) for clone in clones]
    exact = weighted_sum(clones, equal).dense()
    scale = sum(as_dense(clone).abs().max().item() for clone in clones)
    assert_close(exact - up @ down, weighted_sum(off, equal).dense(), scale=scale)


def test_integer_weights_are_divided_once():
    part = LowRank(torch.randn(50, 1, generator=generator_of(0)), torch.ones(1, 1))
    expected = torch.cat([part.up.double() * n for n in (3, 5, 41)], dim=1) / 49
    assert torch.equal(weighted_sum([part] * 3, [3, 5, 41]).up, expected)
    assert torch.equal(weighted_sum([part], [6], total=3).up, part.up.double() * 2)


@given(layers())
def test_the_energy_is_the_squared_norm_of_the_dense_matrix(case):
    total = weighted_sum(*case)
    assert total.energy() == pytest.approx(total.dense().square().sum().item(), rel=1e-10)


def test_the_energy_of_what_cancels_is_nearly_zero():
    part = draw_factors(generator_of(0), 30, 20, 4, torch.float64)
    nothing = LowRank(torch.cat([part.up, -part.up], 1), torch.cat([part.down, part.down]))
    assert nothing.energy() < 1e-28 * part.energy()


@given(layers())
def test_compressing_keeps_the_matrix_in_its_numerical_rank(case):
    total = weighted_sum(*case)
    small = compress(total)
    assert_close(small.dense(), total.dense(), scale=math.sqrt(total.energy()))
    assert small.rank == torch.linalg.matrix_rank(total.dense(), rtol=1e-13)
    assert_balanced(small)
    assert compress(small).rank == small.rank


def test_what_is_only_rounding_is_dropped_and_what_is_small_is_not():
    part = draw_factors(generator_of(0), 40, 30, 3, torch.float64)
    other = draw_factors(generator_of(1), 40, 30, 1, torch.float64)
    cancelled = [part, LowRank(-part.up, part.down)]
    assert compress(weighted_sum(cancelled, [1, 1])).rank == 0
    faint = LowRank(other.up * 1e-12, other.down)
    found = compress(weighted_sum([part, faint], [1, 1], total=1))
    assert found.rank == 4
    assert_close(found.dense() - part.dense(), faint.dense(), tolerance=1e-2)
    # How the length is shared between both factors has no say in it.
    lopsided = LowRank(torch.cat([part.up * 1e9, faint.up], 1), torch.cat([part.down * 1e-9, faint.down]))
    assert compress(lopsided).rank == 4
    assert compress(lopsided, tolerance=1e-6).rank == 3


@given(layers(), ranks)
def test_the_split_is_the_best_of_its_rank_and_loses_nothing(case, rank):
    total = weighted_sum(*case)
    kept, rest, share = split(total, rank)
    dense = total.dense()
    scale = dense.norm().item()
    values = torch.linalg.svdvals(dense)
    assert kept.rank == rank
    assert_close(kept.dense() + as_dense(rest), dense, scale=scale)
    assert_close((dense - kept.dense()).norm(), values[rank:].norm(), scale=scale)
    assert share == pytest.approx((values[rank:].square().sum() / values.square().sum()).item(), abs=1e-12)
    assert isinstance(rest, torch.Tensor) == (
        2 * (torch.linalg.matrix_rank(dense, rtol=1e-13) - rank) > min(dense.shape)
    )
    if isinstance(rest, LowRank):
        assert_balanced(rest)
    left = isinstance(rest, torch.Tensor) or rest.rank
    assert_balanced(LowRank(kept.up[:, : len(values)], kept.down[: len(values)]) if left else compress(kept))


def test_equal_singular_values_are_split_the_same_way_each_time():
    eye = LowRank(torch.eye(6), torch.eye(6))
    first, second = split(eye, 2), split(eye, 2)
    assert first[2] == pytest.approx(4 / 6, rel=1e-12)
    assert_close(first[0].dense() + as_dense(first[1]), torch.eye(6, dtype=torch.float64))
    for one, other in zip((*first[0], first[1]), (*second[0], second[1]), strict=True):
        assert torch.equal(one, other)


def assert_can_learn(kept, from_column):
    """The directions from `from_column` on change nothing now, but a gradient reaches their `up`."""
    new = kept.down[from_column:]
    assert torch.equal(kept.up[:, from_column:], torch.zeros_like(kept.up[:, from_column:]))
    assert (new.norm(dim=1) > 0.01).all()
    if kept.rank <= kept.down.shape[1]:
        unit = torch.nn.functional.normalize(kept.down, dim=1)
        assert_close(unit @ unit.mT, torch.eye(kept.rank, dtype=torch.float64))


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 10, 4), (3, 10, 4), (12, 3, 5), (1, 1, 3)])
def test_a_zero_update_stays_zero_and_can_still_learn(m, n, rank):
    generator = generator_of(0)
    clones = [LowRank(torch.zeros(m, rank), torch.randn(rank, n, generator=generator)) for _ in range(3)]
    kept, rest, share = merge_layer(clones, [1, 2, 3], rank)
    assert rest.rank == 0
    assert share == 0
    assert_can_learn(kept, 0)
    length = torch.cat([clone.down for clone in clones]).double().square().sum(1).mean().sqrt()
    assert_close(kept.down.norm(dim=1), length.expand(rank))
    if rank <= n:  # the directions are those in which the first clone began
        own = clones[0].down.double()
        assert_close(kept.down, kept.down @ torch.linalg.pinv(own) @ own)


@pytest.mark.parametrize("down", [torch.zeros(4, 6), torch.ones(4, 6)], ids=["zero", "all rows the same"])
def test_directions_are_found_even_where_the_clones_have_none(down):
    clones = [LowRank(torch.zeros(5, 4), down), LowRank(torch.zeros(5, 4), 2 * down)]
    assert_can_learn(split(weighted_sum(clones, [1, 1]), 4)[0], 0)


def test_new_directions_are_orthogonal_even_where_the_clones_own_are_nearly_parallel():
    rows = torch.randn(2, 30, generator=generator_of(0)).double()
    down = torch.stack([rows[0], rows[0] + 1e-5 * rows[1], rows[1], rows[0] - 1e-5 * rows[1]])
    kept = split(LowRank(torch.zeros(5, 4), down), 4)[0]
    assert_can_learn(kept, 0)


def test_new_directions_are_as_long_as_the_clones_rows_whatever_the_remainder():
    clones = [LowRank(torch.zeros(12, 4), torch.randn(4, 10, generator=generator_of(seed))) for seed in range(2)]
    faint = LowRank(torch.full((12, 1), 1e-6).double(), torch.full((1, 10), 1e-6).double())
    length = torch.cat([clone.down for clone in clones]).double().square().sum(1).mean().sqrt()
    for remainder in (faint, faint.dense()):
        kept = merge_layer(clones, [1, 1], 4, remainder).kept
        assert_can_learn(kept, 1)
        assert_close(kept.down[1:].norm(dim=1), length.expand(3))


def test_a_merge_of_smaller_rank_is_filled_up_with_directions_that_are_new():
    clones = [draw_factors(generator_of(seed), 12, 10, 4) for seed in range(2)]
    for clone in clones:
        clone.up[:, 1:] = 0
    kept, rest, _ = merge_layer(clones, [3, 1], 4)
    assert rest.rank == 0
    assert_close(kept.dense(), dense_mean(clones, [3, 1]))
    assert_can_learn(kept, 2)


@given(layers(), ranks, st.sampled_from(["none", "factors", "dense"]), seeds)
def test_kept_and_rest_are_exactly_the_remainder_and_the_mean_update(case, rank, kind, seed):
    clones, weights = case
    m, n = clones[0].shape
    before = draw_factors(generator_of(seed), m, n, 2, torch.float64)
    remainder = {"none": None, "factors": before, "dense": before.dense()}[kind]
    expected = dense_mean(clones, weights) + (0 if remainder is None else before.dense())
    kept, rest, share = merge_layer(clones, weights, rank, remainder)
    assert kept.rank == rank
    scale = before.dense().norm().item() + sum(as_dense(clone).norm().item() for clone in clones)
    assert_close(as_dense(kept) + as_dense(rest), expected, scale=scale)
    energies = [as_dense(part).square().sum().item() for part in (kept, rest)]
    assert share == pytest.approx(energies[1] / (sum(energies) or 1), abs=1e-12)
    if kind == "dense":
        assert isinstance(rest, torch.Tensor)
    elif isinstance(rest, LowRank):
        assert 2 * rest.rank <= min(m, n) or len(clones) == 1  # which comes back as it is


@given(layers(), ranks)
def test_a_dense_remainder_leaves_the_same_adapter_as_its_factors(case, rank):
    clones, weights = case
    m, n = clones[0].shape
    before = draw_factors(generator_of(1), m, n, 3, torch.float64)
    one, other = (merge_layer(clones, weights, rank, part) for part in (before, before.dense()))
    scale = before.dense().norm().item() + sum(as_dense(clone).norm().item() for clone in clones)
    assert one.lost_share == pytest.approx(other.lost_share, abs=1e-12)
    # The best part is unique unless singular values nearly meet at the cut, which no random matrix here does.
    values = torch.linalg.svdvals(as_dense(one.kept) + as_dense(one.rest))
    gap = (values[rank - 1] - values[rank]).item() / scale if rank < len(values) else 1.0
    assert_close(one.kept.dense(), other.kept.dense(), tolerance=1e-13 / max(gap, 1e-9), scale=scale)


@pytest.mark.parametrize("count", range(1, 9))
def test_equal_clones_come_back_bit_for_bit(count):
    clone = draw_factors(generator_of(0), 30, 20, 4)
    kept, rest, share = merge_layer([LowRank(*(factor.clone() for factor in clone))] * count, [7] * count, 4)
    assert torch.equal(kept.up.float(), clone.up)
    assert torch.equal(kept.down.float(), clone.down)
    assert rest.rank == 0
    assert share == 0


@pytest.mark.parametrize("count", range(1, 9))
def test_equal_updates_in_other_factors_give_that_update(count):
    generator = generator_of(count)
    clone = draw_factors(generator, 30, 20, 4, torch.float64)
    turns = [torch.randn(4, 4, generator=generator).double() for _ in range(count)]
    clones = [LowRank(clone.up @ turn, torch.linalg.solve(turn, clone.down)) for turn in turns]
    kept, rest, _ = merge_layer(clones, range(1, count + 1), 4)
    assert_close(kept.dense() + as_dense(rest), clone.dense(), tolerance=1e-11)


@pytest.mark.parametrize(("m", "n", "rank"), [(20, 30, 2), (30, 20, 2), (5, 40, 4), (3, 3, 4), (1, 9, 2)])
def test_many_rounds_in_a_row_lose_nothing(m, n, rank):
    """The adapter trains on between merges; base + update follows the dense running total, past the dense rest."""
    generator = generator_of(0)
    start = LowRank(torch.zeros(m, rank).double(), torch.randn(rank, n, generator=generator).double())
    kept, rest, total = start, None, torch.zeros(m, n).double()
    forms = set()
    for _ in range(20):
        steps = [draw_factors(generator, m, n, rank, torch.float64) for _ in range(3)]
        clones = [LowRank(kept.up + 0.1 * step.up, kept.down + 0.1 * step.down) for step in steps]
        weights = torch.randint(1, 100, (3,), generator=generator).tolist()
        total = total - as_dense(kept) + dense_mean(clones, weights)
        kept, rest, share = merge_layer(clones, weights, rank, rest)
        forms.add(type(rest))
        assert 0 <= share <= 1
        assert_close(as_dense(kept) + as_dense(rest), total, tolerance=1e-10)
    assert (torch.Tensor in forms) == (2 * (min(m, n) - rank) > min(m, n))


def test_a_merge_gives_the_same_bits_each_time_and_draws_nothing():
    clones = [draw_factors(generator_of(seed), 30, 20, 4) for seed in range(3)]
    clones[0].up[:, 1] = clones[1].up[:, 1] = clones[2].up[:, 1] = 0
    state = torch.get_rng_state()
    first, second = (merge_layer(clones, [1, 2, 3], 10) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip((*first.kept, *first.rest), (*second.kept, *second.rest), strict=True):
        assert torch.equal(one, other)


def test_the_clones_and_the_remainder_are_left_alone():
    clones = [draw_factors(generator_of(seed), 6, 5, 2, torch.float64) for seed in range(3)]
    remainder = torch.ones(6, 5).double()
    before = [factor.clone() for clone in clones for factor in clone]
    merge_layer(clones, [1, 2, 3], 2, remainder)
    assert all(map(torch.equal, before, (factor for clone in clones for factor in clone)))
    assert torch.equal(remainder, torch.ones(6, 5).double())


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return made


def test_no_dense_matrix_is_formed_while_factors_suffice():
    side, count, rank = 40_000, 4, 2  # 1.6e9 numbers, 13 GB
    clones = [draw_factors(generator_of(seed), side, side, rank) for seed in range(count)]
    others = [draw_factors(generator_of(-seed), side, side, rank) for seed in range(1, count)]
    with Largest() as made:
        kept, rest, _ = merge_layer(clones, [1] * count, rank)
        _, rest, _ = merge_layer([kept, *others], [1] * count, rank, rest)
    assert 0 < made.numel <= side * (2 * count - 1) * rank
    with Largest() as made:
        merge_layer(clones, [1] * count, count * rank + 1)  # filled up
    assert 0 < made.numel <= side * (2 * count + 1) * rank
    assert rest.rank == (2 * count - 2) * rank


def test_the_rest_is_dense_once_it_is_wider_than_half_the_smaller_side():
    clones = [draw_factors(generator_of(seed), 12, 16, 2) for seed in range(5)]
    assert merge_layer(clones[:4], [1] * 4, 2).rest.rank == 6
    rest = merge_layer(clones, [1] * 5, 2).rest
    assert isinstance(rest, torch.Tensor)
    assert rest.shape == (12, 16)
    assert torch.linalg.matrix_rank(rest) == 8


coefficients = st.sampled_from([0, 1, -1, 3]) | st.floats(-5, 5)


@given(layers(), st.data())
def test_a_combination_is_the_sum_of_the_dense_terms(case, data):
    terms = []
    for clone in case[0]:
        dense = data.draw(st.booleans())
        terms.append((data.draw(coefficients), clone.dense() if dense else clone))
    before = [as_dense(matrix).clone() for _, matrix in terms]
    total = combine(terms)
    expected = sum(coefficient * as_dense(matrix) for coefficient, matrix in terms)
    scale = sum(abs(coefficient) * as_dense(matrix).norm().item() for coefficient, matrix in terms)
    assert_close(as_dense(total), expected, scale=scale + 1e-300)
    assert all(map(torch.equal, before, (as_dense(matrix) for _, matrix in terms)))
    if any(coefficient and isinstance(matrix, torch.Tensor) for coefficient, matrix in terms):
        assert isinstance(total, torch.Tensor)
    if isinstance(total, LowRank):
        assert 2 * total.rank <= min(total.shape)
        assert_balanced(total)


def test_a_combination_of_factors_is_dense_only_where_its_own_rank_is_high():
    part, other = (draw_factors(generator_of(seed), 12, 16, 4) for seed in range(2))
    assert combine([(2, part), (-0.5, part), (1, part)]).rank == 4  # 12 columns before
    assert combine([(2, part), (-2, part)]).rank == 0
    assert combine([(0, part), (0, part.dense())]).rank == 0
    assert isinstance(combine([(1, part), (1, other)]), torch.Tensor)
    same = torch.ones(12, 16).double()
    assert combine([(1, same)]) is not same


def test_a_combination_forms_no_dense_matrix_of_factors():
    side, rank = 40_000, 2
    parts = [draw_factors(generator_of(seed), side, side, rank) for seed in range(4)]
    with Largest() as made:
        total = combine([(-1.5, part) for part in parts])
    assert 0 < made.numel <= side * 4 * rank
    assert total.rank == 8


def test_a_dense_matrix_is_compressed_to_its_own_factors():
    part = draw_factors(generator_of(0), 40, 30, 3, torch.float64)
    small = compress(part.dense())
    assert small.rank == 3
    assert_balanced(small)
    assert_close(small.dense(), part.dense())
    full = torch.randn(20, 30, generator=generator_of(1))
    assert compress(full).rank == 20
    assert_close(compress(full).dense(), full.double())


@pytest.mark.parametrize(("m", "n"), [(12, 10), (300, 270)])
def test_a_dense_matrix_is_split_like_its_factors(m, n):
    part = draw_factors(generator_of(0), m, n, 8, torch.float64)
    dense = part.dense()
    kept, rest, share = split(dense, 3)
    expected = split(part, 3)
    assert isinstance(rest, torch.Tensor)
    assert_close(kept.dense() + rest, part.dense())
    assert torch.equal(dense, part.dense())
    assert_close(kept.dense(), expected[0].dense(), tolerance=1e-5)
    assert share == pytest.approx(expected[2], rel=1e-6)
    assert_balanced(kept)


def test_a_dense_matrix_of_smaller_rank_is_filled_up_too():
    dense = draw_factors(generator_of(0), 300, 270, 2, torch.float64).dense()
    for spare in (None, torch.randn(5, 270, generator=generator_of(1))):
        kept, rest, share = split(dense, 4, spare)
        assert_can_learn(kept, 2)
        assert share < 1e-24
        assert_close(kept.dense() + rest, dense)


@pytest.mark.parametrize("spread", [1e-3, 1e-4])
def test_aligned_factors_are_near_those_in_which_the_clones_trained(spread):
    """So that moments of their columns still fit; as the SVD leaves them, columns are turned and reordered."""
    generator = generator_of(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator).double()).Q
    start = split(draw_factors(generator, 30, 20, 4, torch.float64), 4)[0]
    start = LowRank(start.up @ turn, turn.mT @ start.down)
    steps = [draw_factors(generator, 30, 20, 4, torch.float64) for _ in range(3)]
    clones = [LowRank(start.up + spread * step.up, start.down + spread * step.down) for step in steps]
    mean = LowRank(*(torch.stack(factor).mean(0) for factor in zip(*clones, strict=True)))
    kept = merge_layer(clones, [1, 1, 1], 4).kept
    aligned = align(kept, mean)
    assert_close(aligned.dense(), kept.dense())
    assert_close(aligned.up.mT @ aligned.up, aligned.down @ aligned.down.mT)
    assert max((one - other).abs().max().item() for one, other in zip(aligned, mean, strict=True)) < 10 * spread
    assert max((one - other).abs().max().item() for one, other in zip(kept, mean, strict=True)) > 0.1


SCALINGS = [(4, 4, False, 1.0), (4, 8, False, 2.0), (8, 3, False, 0.375), (4, 6, True, 3.0), (6, 5, True, 5 / 6**0.5)]


@pytest.mark.parametrize(("rank", "alpha", "use_rslora", "scaling"), SCALINGS)
def test_scaling_folds_in_and_out(rank, alpha, use_rslora, scaling):
    assert lora_scaling(rank, alpha, use_rslora) == pytest.approx(scaling, rel=1e-15)
    factors = draw_factors(generator_of(0), 30, 20, rank)
    update = fold_scaling(factors, scaling)
    assert_close(update.dense(), scaling * as_dense(factors))
    back = unfold_scaling(update, scaling)
    assert torch.equal(back.up.float(), factors.up)
    assert torch.equal(back.down.float(), factors.down)
    balanced = unfold_scaling(split(update, rank)[0], scaling)
    assert_balanced(balanced)
    assert_close(scaling * balanced.dense(), update.dense())


def peft_layer(layer, rank, alpha, use_rslora, seed):
    """peft's own layer around a layer, with random factors."""
    kind = Conv2d if isinstance(layer, torch.nn.Conv2d) else Linear
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora)
    wrapped = kind(layer, "clone", config=config, r=rank, lora_alpha=alpha)
    generator = generator_of(seed)
    with torch.no_grad():
        for part in (wrapped.lora_A["clone"], wrapped.lora_B["clone"]):
            part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
    return wrapped


LAYERS = {
    "linear": (lambda: torch.nn.Linear(12, 16), (2, 12)),
    "1x1": (lambda: torch.nn.Conv2d(6, 9, 1), (2, 6, 5, 5)),
    "3x3": (lambda: torch.nn.Conv2d(3, 10, 3, padding=1, stride=2), (2, 3, 5, 5)),
    "1x3": (lambda: torch.nn.Conv2d(4, 9, (1, 3)), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_merged_peft_layers_compute_the_mean_of_their_updates(name, use_rslora):
    build, shape = LAYERS[name]
    rank, alpha, weights = 3, 5, [1, 4, 2]
    layers = [peft_layer(build(), rank, alpha, use_rslora, seed) for seed in range(3)]
    scaling = lora_scaling(rank, alpha, use_rslora)
    assert layers[0].scaling["clone"] == pytest.approx(scaling)
    pairs = [(layer.lora_B["clone"].weight, layer.lora_A["clone"].weight) for layer in layers]
    merged = merge_layer([fold_scaling(as_matrix(*pair), scaling) for pair in pairs], weights, rank)
    expected = sum(w * layer.get_delta_weight("clone").detach() for layer, w in zip(layers, weights, strict=True))
    expected = expected / sum(weights)
    update = as_dense(merged.kept) + as_dense(merged.rest)
    torch.testing.assert_close(update.float().reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        up, down = as_weights(unfold_scaling(merged.kept, scaling), *pairs[0])
        layers[0].lora_B["clone"].weight.copy_(up)
        layers[0].lora_A["clone"].weight.copy_(down)
        base = layers[0].get_base_layer()
        x = torch.randn(shape, generator=generator_of(9))
        rest = as_dense(merged.rest).float().reshape(base.weight.shape)
        base.weight.add_(rest)
        actual = layers[0](x)
        base.weight.add_(expected - rest)
        torch.testing.assert_close(actual, base(x), rtol=1e-5, atol=1e-5)


def test_weights_come_back_from_the_matrix_bit_for_bit():
    up, down = torch.randn(8, 3, 1, 1), torch.randn(3, 4, 3, 2)
    back = as_weights(fold_scaling(as_matrix(up, down), 1.0), up, down)
    assert all(map(torch.equal, back, (up, down)))
    assert [tensor.dtype for tensor in back] == [torch.float32] * 2
    wider = LowRank(torch.zeros(8, 5).double(), torch.zeros(5, 24).double())
    assert [tuple(tensor.shape) for tensor in as_weights(wider, up, down)] == [(8, 5, 1, 1), (5, 4, 3, 2)]
    none = LowRank(torch.zeros(8, 0), torch.zeros(0, 24))
    assert [tuple(tensor.shape) for tensor in as_weights(none, up, down)] == [(8, 0, 1, 1), (0, 4, 3, 2)]


@pytest.mark.parametrize(
    ("up", "down"),
    [((8, 4), (3, 5)), ((8, 2, 1, 1), (4, 6, 3, 3)), ((8, 4, 3, 3), (4, 6, 3, 3)), ((8, 4), (4, 6, 1, 1))],
    ids=["ranks", "groups", "wide up", "kinds"],
)
def test_weights_that_are_no_pair_are_refused(up, down):
    with pytest.raises(ValueError, match="are not the up and down of one layer without groups"):
        as_matrix(torch.zeros(up), torch.zeros(down))


ONE, OTHER = LowRank(torch.ones(4, 2), torch.ones(2, 3)), LowRank(torch.ones(4, 2), torch.ones(2, 5))
NOT_FINITE = LowRank(torch.full((4, 2), math.nan), torch.ones(2, 3))
REFUSED = {
    "no update": ([], [], 2, None, "at least one update"),
    "other weights": ([ONE, ONE], [1], 2, None, "as many weights, not 2 and 1"),
    "zero weight": ([ONE, ONE], [1, 0], 2, None, "must be positive, not 0"),
    "weight not a number": ([ONE], [math.nan], 2, None, "must be positive, not nan"),
    "other shape": ([ONE, OTHER], [1, 1], 2, None, r"shape \(4, 5\), the first one \(4, 3\)"),
    "no pair": ([LowRank(torch.ones(4, 2), torch.ones(3, 3))], [1], 2, None, "rank 2 and 3 make no update"),
    "rank": ([ONE], [1], 0, None, "rank must be positive, not 0"),
    "remainder": ([ONE], [1], 2, torch.ones(3, 4), r"remainder has shape \(3, 4\), the update \(4, 3\)"),
    "not finite": ([ONE, NOT_FINITE], [1, 1], 2, None, "not finite"),
    "single not finite": ([NOT_FINITE], [1], 2, None, "not finite"),
    "remainder not finite": ([ONE], [1], 1, torch.full((4, 3), math.inf), "not finite"),
}


@pytest.mark.parametrize(("clones", "weights", "rank", "remainder", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(clones, weights, rank, remainder, said):
    with pytest.raises(ValueError, match=said):
        merge_layer(clones, weights, rank, remainder)


NO_SUM = {
    "no term": ([], "at least one term"),
    "other shape": ([(1, ONE), (1, torch.ones(4, 5))], r"shape \(4, 5\), the first one \(4, 3\)"),
    "other shape of 0": ([(1, ONE), (0, OTHER)], r"shape \(4, 5\), the first one \(4, 3\)"),
    "coefficient": ([(math.inf, ONE)], "must be finite, not inf"),
    "not finite": ([(1, NOT_FINITE)], "not finite"),
    "dense not finite": ([(0, torch.full((4, 3), math.nan))], "not finite"),
    "no pair": ([(1, LowRank(torch.ones(4, 2), torch.ones(3, 3)))], "rank 2 and 3 make no update"),
}


@pytest.mark.parametrize(("terms", "said"), NO_SUM.values(), ids=NO_SUM)
def test_what_cannot_be_combined_is_refused_by_name(terms, said):
    with pytest.raises(ValueError, match=said):
        combine(terms)


@pytest.mark.parametrize("act", [compress, lambda matrix: split(matrix, 2)], ids=["compress", "split"])
@pytest.mark.parametrize("matrix", [NOT_FINITE, torch.full((4, 3), math.inf)], ids=["factors", "dense"])
def test_a_matrix_that_is_not_finite_is_refused(act, matrix):
    with pytest.raises(ValueError, match="not finite"):
        act(matrix)


@pytest.mark.parametrize("scaling", [0, -1.0, math.inf, math.nan])
def test_a_scaling_that_is_not_positive_is_refused(scaling):
    with pytest.raises(ValueError, match="scaling must be positive"):
        fold_scaling(ONE, scaling)


def test_factors_of_another_shape_cannot_be_aligned():
    with pytest.raises(ValueError, match=r"\(4, 3\) of rank 2 cannot be turned to \(4, 5\), rank 2"):
        align(ONE, OTHER)

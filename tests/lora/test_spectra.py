"""Large matrices, of which only the leading singular vectors are computed: nearly the best, and nothing is lost."""

import pytest
import torch
from lora.test_low_rank import as_dense, assert_balanced, assert_close, dense_mean, draw_factors, generator_of

from iet_finetune.lora.low_rank import merge_layer
from iet_finetune.lora.spectra import LowRank
from iet_finetune.lora.splitting import split


def with_values(values, m, n, seed=0):
    """(m, n) with these singular values in random directions."""
    generator = generator_of(seed)
    left, right = (torch.linalg.qr(torch.randn(side, len(values), generator=generator).double()).Q for side in (m, n))
    return LowRank(left * values, right.mT)


STEPS = torch.arange(300).double()
SPECTRA = {
    "random": torch.linalg.svdvals(torch.randn(300, 400, generator=generator_of(0)).double()),
    "slow decay": (1 + STEPS) ** -0.5,
    "fast decay": torch.exp(-STEPS / 4),
    "clustered": torch.where(STEPS < 20, 1 + 1e-4 * torch.cos(STEPS), 0.5),
    "two clusters at the cut": torch.where(STEPS < 10, 3.0, torch.where(STEPS < 40, 1 - 1e-5 * STEPS, 0.9)),
    "nearly flat": 1 + 0.01 * torch.cos(STEPS),
    "flat": torch.ones(300).double(),
    "one alone": torch.where(STEPS < 1, 1.0, 1e-9),
}


@pytest.mark.parametrize("rank", [1, 8, 100])
@pytest.mark.parametrize("form", ["tall", "wide", "tall factors", "wide factors"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_kept_part_of_a_large_matrix_holds_nearly_all_energy_that_its_rank_can(name, form, rank):
    values = SPECTRA[name].double()
    factors = with_values(values, *((300, 310) if "wide" in form else (310, 300)))
    matrix = factors if "factors" in form else factors.dense()
    kept, rest, share = split(matrix, rank)
    best = values.sort(descending=True).values[:rank].square().sum().item()
    held = kept.up.square().sum(0).square().sum().item()
    assert (1 - 1e-6) * best <= held <= (1 + 1e-12) * best
    assert share == pytest.approx(1 - held / values.square().sum().item(), abs=1e-12)
    dense = factors.dense()
    assert_close(kept.dense() + as_dense(rest), dense, scale=dense.norm().item())
    assert_balanced(kept)
    again = split(matrix, rank)
    assert all(map(torch.equal, (*kept, as_dense(rest)), (*again[0], as_dense(again[1]))))


def test_directions_that_lie_apart_from_the_large_rows_are_found():
    """A block of its own, whose rows are short but many."""
    matrix = torch.zeros(600, 400).double()
    matrix[:40, :40] = 2 * torch.eye(40)
    matrix[40:, 40:] = 3 * torch.ones(560, 1).double() @ torch.ones(1, 360).double() / (560 * 360) ** 0.5
    assert split(matrix, 1)[0].up.square().sum().item() == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(("m", "n"), [(700, 600), (600, 700)])
def test_wide_factors_lose_nothing_and_stay_factors_while_they_are_small_enough(m, n):
    clones = [draw_factors(generator_of(seed), m, n, 40) for seed in range(8)]
    state = torch.get_rng_state()
    kept, rest, share = merge_layer(clones[:7], [1] * 7, 16)
    assert isinstance(rest, LowRank)
    first = dense_mean(clones[:7], [1] * 7)
    assert_close(kept.dense() + rest.dense(), first)
    assert share == pytest.approx(rest.energy() / first.square().sum().item(), rel=1e-9)
    wider = merge_layer([kept, *clones], [1] * 9, 16, rest)
    assert isinstance(wider.rest, torch.Tensor)
    assert_close(wider.kept.dense() + wider.rest, rest.dense() + dense_mean([kept, *clones], [1] * 9))
    last = merge_layer(clones, [1] * 8, 16, wider.rest)
    assert_close(last.kept.dense() + last.rest, wider.rest + dense_mean(clones, [1] * 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_wide_factors_of_a_small_update_leave_no_rest():
    part = draw_factors(generator_of(0), 300, 310, 4, torch.float64)
    clones = [LowRank(part.up * (1 + seed), part.down) for seed in range(70)]
    kept, rest, share = merge_layer(clones, [1] * 70, 4)
    assert rest.rank == 0
    assert share == 0
    assert_close(kept.dense(), dense_mean(clones, [1] * 70))

"""The merge over ranks: the weighted mean of the clones, the same bits on any number of ranks and after a stop."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from iet_finetune import merge_state_dicts
from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.ensemble.merger import ROW, Merger, slice_size
from iet_finetune.method.merging import CloneRule, SumRule

CPU = torch.device("cpu")
# Of five clones in the merge over ranks; the third takes no part.
WEIGHTS = [4, 3, 0, 2, 1]


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A model's tensors, some of them smaller and some larger than a row, and a counter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3,), "b": (70, 31), "c": (), "d": (5, 1, ROW + 7)}
    values = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**values, "n": torch.tensor([seed])}


def alone(start: dict[str, torch.Tensor], **settings) -> Merger:
    return Merger("denoiser", start, Ranks.alone(), HostMemory(CPU), **settings)


def merged(start, clones, weights, **settings) -> dict[str, torch.Tensor]:
    """What one rank makes of clones that it collects one after the other."""
    merger = alone(start, **settings)
    for clone, weight in zip(clones, weights, strict=True):
        merger.collect(clone, [weight])
    merger.merge()
    return merger.tensors


def digest(values: dict[str, torch.Tensor]) -> str:
    """A hash of all bits."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values.values())).hexdigest()


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=5))
def test_one_rank_merges_to_the_same_bits_as_the_sum_of_whole_models(weights):
    clones = [tensors(seed) for seed in range(1, len(weights) + 1)]
    assert_equal(merged(tensors(0), clones, weights), merge_state_dicts(clones, weights))


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=5))
def test_equal_clones_merge_to_themselves(weights):
    assert_equal(merged(tensors(0), [tensors(1)] * len(weights), weights), tensors(1))


def test_a_clone_of_weight_0_is_left_out_and_without_any_nothing_changes():
    merger = alone(tensors(0))
    for seed, weight in ((1, 0), (2, 3), (3, 0)):
        merger.collect(tensors(seed), [weight])
    merger.merge()
    assert_equal(merger.tensors, tensors(2))
    merger.collect(tensors(4), [0])
    assert merger.merge() == 0
    assert_equal(merger.tensors, tensors(2))


def test_the_only_clone_is_its_own_mean_without_a_sum():
    merger = alone(tensors(0), only_clone=True)
    assert merger._collected is None
    moved = merger.collect(tensors(1), [7])
    assert merger.merge() == moved > 0
    assert_equal(merger.tensors, tensors(1))


def test_distances_are_those_of_the_whole_vectors():
    start, clone = tensors(0), tensors(1)

    def norm(values):
        return torch.cat([value.double().flatten() for value in values]).norm().item()

    names = ("a", "b", "c", "d")
    expected = norm([clone[name] - start[name] for name in names]) / norm([start[name] for name in names])
    merger = alone(start)
    assert merger.collect(clone, [2]) == pytest.approx(expected, rel=1e-6)
    merger.collect(start, [2])
    assert merger.merge() == pytest.approx(expected / 2, rel=1e-6)


def test_the_outer_optimizer_is_nesterov_on_the_way_from_the_start_to_the_mean():
    lr, momentum = 0.7, 0.9
    merger = alone(tensors(0), outer=(lr, momentum))
    theta = {name: torch.nn.Parameter(value.double()) for name, value in tensors(0).items() if name != "n"}
    reference = torch.optim.SGD(theta.values(), lr=lr, momentum=momentum, nesterov=True)
    for round_ in range(3):
        clones = [tensors(10 * round_ + seed) for seed in (1, 2)]
        for clone in clones:
            merger.collect(clone, [1])
        merger.merge()
        for name, parameter in theta.items():
            parameter.grad = parameter.detach() - sum(clone[name].double() for clone in clones) / 2
        reference.step()
        for name, parameter in theta.items():
            torch.testing.assert_close(merger.tensors[name].double(), parameter.detach(), rtol=1e-5, atol=1e-5)


def test_an_outer_step_of_1_without_momentum_is_the_mean_and_0_momentum_a_part_of_the_way():
    clones, weights = [tensors(1), tensors(2)], [3, 5]
    assert_equal(merged(tensors(0), clones, weights, outer=(1.0, 0.0)), merge_state_dicts(clones, weights))
    half = merged(tensors(0), clones, weights, outer=(0.5, 0.0))
    mean = merge_state_dicts(clones, weights)
    for name in ("a", "b", "c", "d"):
        torch.testing.assert_close(half[name], (tensors(0)[name] + mean[name]) / 2)


class Median(CloneRule):
    """Of each number over the clones, whatever their weights."""

    def merge(self, clones, weights, start):
        return clones.median(dim=0).values


class HalfWay(SumRule):
    """Half of the way to the mean."""

    def merge(self, total, weight, start):
        return (total / weight + start) / 2


def test_a_rule_takes_the_place_of_the_mean_number_by_number():
    clones = [tensors(seed) for seed in (1, 2, 3)]
    for rule in (Median(), HalfWay()):
        merger = alone(tensors(0), rule=rule)
        for _ in range(2):  # the second round has nothing left of the first
            start = {name: tensor.clone() for name, tensor in merger.tensors.items()}
            for clone, weight in zip(clones, (4, 1, 2), strict=True):
                merger.collect(clone, [weight])
            merger.merge()
        for name in ("a", "b", "c", "d"):
            values = torch.stack([clone[name] for clone in clones])
            mean = (4 * values[0] + values[1] + 2 * values[2]) / 7
            expected = values.median(dim=0).values if isinstance(rule, Median) else (mean + start[name]) / 2
            torch.testing.assert_close(merger.tensors[name], expected)


def test_a_rule_is_asked_even_where_there_is_a_single_clone():
    merger = alone(tensors(0), only_clone=True, rule=HalfWay())
    merger.collect(tensors(1), [4])
    merger.merge()
    torch.testing.assert_close(merger.tensors["a"], (tensors(0)["a"] + tensors(1)["a"]) / 2)


@pytest.mark.parametrize("settings", [{}, {"outer": (0.7, 0.9)}, {"rule": Median()}], ids=["mean", "outer", "median"])
def test_a_sum_that_was_saved_goes_on_to_the_same_bits(tmp_path, settings):
    whole, first, second = (alone(tensors(0), **settings) for _ in range(3))
    for merger in (whole, first):
        merger.collect(tensors(1), [4])
        merger.merge()
        merger.collect(tensors(2), [1])
    store = CheckpointStore(tmp_path)
    store.save(3, first.pieces("round 1", "round 1 after 1"), {})
    found = store.find("latest")
    assert found is not None
    second.restore(found, first.total)
    for merger in (whole, second):
        merger.collect(tensors(3), [2])
        merger.merge()
    assert_equal(second.tensors, whole.tensors)


def test_slices_are_whole_rows_and_hold_everything():
    for numbers in (1, ROW, ROW + 1, 10 * ROW - 1):
        for ranks in (1, 2, 3, 7):
            size = slice_size(numbers, ranks)
            assert size % ROW == 0
            assert numbers <= size * ranks < numbers + ranks * ROW


RANKS = """
import sys
sys.path.insert(0, "TESTS")
from pathlib import Path
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.ensemble import merger as room
from ensemble.test_merger import WEIGHTS, Median, digest, tensors

room.BUCKET = 2 * room.ROW * ranks.size
merger = room.Merger("denoiser", tensors(0), ranks, HostMemory(torch.device("cpu")), outer=(0.7, 0.9))
median = room.Merger("ema", tensors(0), ranks, HostMemory(torch.device("cpu")), rule=Median())
store = CheckpointStore(Path("FOLDER"), None, ranks)
placement = Placement.plan(5, ranks.size)
drifts = []
for round_ in range(2):
    for wave in placement.waves(0):
        mine = [shard for shard in wave if shard in placement.shards_of(ranks.rank)]
        by_rank = [0] * ranks.size
        for shard in wave:
            by_rank[placement.leader(shard)] = WEIGHTS[shard]
        clone = tensors(1 + round_ * 5 + mine[0]) if mine else None
        drifts.append(merger.collect(clone, by_rank))
        median.collect(clone, by_rank)
        if round_ == 1 and wave[-1] < 4:
            versions = "round 1", f"after {wave[-1]}"
            pieces = merger.pieces(*versions) | median.pieces(*versions)
            store.save(wave[-1], pieces, {"total": merger.total})
    moved = merger.merge()
    median.merge()
emit([digest(merger.tensors), moved, digest(median.tensors)])
"""


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """Number of ranks -> (the folder of its checkpoints, what its ranks emitted)."""
    runs = {}
    for size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"on{size}")
        body = RANKS.replace("TESTS", str(Path(__file__).parents[1])).replace("FOLDER", str(folder))
        ended = run_ranks(body, size)
        assert [rank.code for rank in ended] == [0] * size, [rank.stderr for rank in ended]
        runs[size] = (folder, [rank.output[0] for rank in ended])
    return runs


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_of_any_number_ends_with_the_same_bits(on_ranks, size):
    clones = [[tensors(1 + round_ * 5 + shard) for shard in range(5)] for round_ in range(2)]
    merger, median = alone(tensors(0), outer=(0.7, 0.9)), alone(tensors(0), rule=Median())
    for round_ in clones:
        for clone, weight in zip(round_, WEIGHTS, strict=True):
            merger.collect(clone, [weight])
            median.collect(clone, [weight])
        moved = merger.merge()
        median.merge()
    assert on_ranks[size][1] == [[digest(merger.tensors), moved, digest(median.tensors)]] * size


@pytest.mark.parametrize(("written_by", "step"), [(1, 1), (2, 1), (2, 3), (4, 3)])
def test_what_several_ranks_saved_is_taken_up_by_one(on_ranks, written_by, step):
    folder, output = on_ranks[written_by]
    found = CheckpointStore(folder).find(f"checkpoint-{step}")
    assert found is not None
    merger = alone(tensors(0), outer=(0.7, 0.9))
    median = Merger("ema", tensors(0), Ranks.alone(), HostMemory(CPU), rule=Median())
    for each in (merger, median):
        each.restore(found, found.manifest["total"])
        for shard in range(step + 1, 5):
            each.collect(tensors(6 + shard), [WEIGHTS[shard]])
        each.merge()
    assert [digest(merger.tensors), digest(median.tensors)] == [output[0][0], output[0][2]]

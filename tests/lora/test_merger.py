"""The merges of LoRA clones, and of their moving averages, against dense updates made by peft, round after round."""

import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loras import adapted_unet, answer_of, deltas_of
from tiny import tiny_sd
from torch import Tensor

from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.ema import EMA, START_SHARE
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.lora.average import ExactAverageMerger
from iet_finetune.lora.merger import ExactMerger, FactorMerger
from iet_finetune.lora.sharing import portions

CPU = torch.device("cpu")
GO = torch.tensor(0.0)
# Linear layers, and convolutions of 1x1 and 3x3; some of them as small as 16x16.
LAYERS = "to_q,to_out.0,proj_in,conv1,conv_shortcut,linear_1"


def moved(start, seed, scale=0.1):
    """A clone's tensors: those it started from, each number moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + scale * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def mean_of(values, weights):
    """Σ w_k x_k / Σ w_k of named tensors."""
    total = sum(weights)
    return {
        name: sum(weight * value[name] for value, weight in zip(values, weights, strict=True)) / total
        for name in values[0]
    }


class Run:
    """A real UNet whose adapter is merged, and beside it what its whole update must be: dense, by peft's products."""

    def __init__(self, folder=None, **flags):
        self.unet, self.adapter, self.trainable = adapted_unet(**flags)
        self.host = HostMemory(CPU, folder)
        self.merger = ExactMerger("denoiser", self.adapter, self.trainable.tensors, Ranks.alone(), self.host)
        self.update = {name: torch.zeros_like(delta) for name, delta in self.deltas(self.merger.tensors).items()}

    def deltas(self, tensors):
        """scaling · B A of every layer."""
        self.trainable.load({name: tensor for name, tensor in tensors.items() if name != START_SHARE})
        return {name.removeprefix("unet."): delta.double() for name, delta in deltas_of(self.unet, "unet").items()}

    @property
    def rest(self):
        """What of the update lies outside the adapter from which the round starts."""
        adapter = self.deltas(self.merger.tensors)
        return {name: update - adapter[name] for name, update in self.update.items()}

    def merge(self, clones, weights):
        """Merges a round's clones, here and in the reference; returns what the merger says of the distances."""
        rest, mean = self.rest, mean_of([self.deltas(clone) for clone in clones], weights)
        self.update = {name: rest[name] + mean[name] for name in rest}
        said = [self.merger.collect(clone, [weight]) for clone, weight in zip(clones, weights, strict=True)]
        return [*said, self.merger.merge()]

    def round(self, weights, seed):
        """One round of clones that start from the merged adapter."""
        start = {name: tensor.clone() for name, tensor in self.merger.tensors.items()}
        # Updates far larger than the weights would make a forward pass in fp32 err by more than 1e-5 by itself.
        scale = 0.1 / max(1.0, next(iter(self.adapter.layers.values())).scaling)
        return self.merge([moved(start, 100 * seed + k, scale) for k in range(len(weights))], weights)

    def assert_shown(self, merger, update):
        """What the merger puts into the live UNet answers as base + update."""
        merger.load_into(self.trainable)
        expected = tiny_sd().unet
        with torch.no_grad():
            for name, delta in update.items():
                weight = expected.get_submodule(name).weight
                weight.copy_(weight.double() + delta)
        torch.testing.assert_close(answer_of(self.unet), answer_of(expected), rtol=1e-5, atol=1e-5)

    def norm(self, named):
        """‖·‖ / ‖W‖ of named dense updates."""
        return torch.cat([tensor.flatten() for tensor in named.values()]).norm().item() / self.adapter.norm


def bits(*named):
    """A hash of all bits of mappings to tensors or factors, names too."""
    digest = hashlib.sha256()
    for mapping in named:
        for name, value in sorted(mapping.items()):
            digest.update(name.encode())
            for tensor in [value] if isinstance(value, Tensor) else value:
                digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- the exact merge -------------------------------------------------------------------------------------------------


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    weights=st.lists(st.integers(1, 2**20), min_size=1, max_size=8),
    rank=st.integers(1, 3),
    alpha=st.one_of(st.none(), st.integers(1, 7)),
    rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_merged_forward_pass_is_base_plus_the_mean_of_the_dense_updates(weights, rank, alpha, rslora, seed):
    run = Run(rank=rank, lora_alpha=alpha, use_rslora=rslora, lora_layers=LAYERS, seed=seed)
    for round_ in range(3):
        run.round(weights, seed + round_)
        run.assert_shown(run.merger, run.update)


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
def test_it_is_so_until_all_remainders_are_dense(tmp_path, monkeypatch, offload):
    # Else tensors this small would never go to files.
    monkeypatch.setattr("iet_finetune.ensemble.host.TINY", 4)
    run = Run(tmp_path if offload else None, rank=4, lora_alpha=2, lora_layers=LAYERS)
    forms = []
    for round_ in range(6):
        run.round([5, 1, 2], round_)
        run.assert_shown(run.merger, run.update)
        forms.append([isinstance(rest, Tensor) for rest in run.merger.remainders.values()])
        run.merger.rest()
    assert [len(of_round) for of_round in forms] == [len(run.adapter.layers)] * 6
    assert not all(forms[0])
    assert all(forms[-1])
    assert bool(list(run.host._regions)) == offload


def test_offloading_changes_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("iet_finetune.ensemble.host.TINY", 4)
    digests = []
    for folder in (None, tmp_path):
        run = Run(folder, rank=3, lora_layers=LAYERS)
        for round_ in range(4):
            run.round([3, 2], round_)
        digests.append(bits(run.merger.tensors, run.merger.remainders))
    assert digests[0] == digests[1]


def test_how_many_layers_are_merged_at_a_time_changes_no_bit(monkeypatch):
    digests = []
    for portion in (1 << 28, 1):
        monkeypatch.setattr("iet_finetune.lora.sharing.PORTION", portion)
        run = Run(rank=3, lora_layers=LAYERS)
        for round_ in range(3):
            run.round([5, 1], round_)
        digests.append(bits(run.merger.tensors, run.merger.remainders))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_portions_hold_every_layer_once_and_work_for_every_rank(monkeypatch, num_ranks):
    monkeypatch.setattr("iet_finetune.lora.sharing.PORTION", 10)
    sizes = {str(i): size for i, size in enumerate([4, 5, 6, 30, 1, 1, 1, 1, 40])}
    cut = list(portions(sizes, num_ranks))
    assert [name for names in cut for name in names] == list(sizes)
    assert all(len(names) >= num_ranks for names in cut[:-1])
    assert all(sum(sizes[n] for n in names) <= 10 or len(names) <= num_ranks for names in cut)
    assert len(cut) == (5 if num_ranks == 1 else 3)


def test_a_dense_remainder_is_written_over_the_one_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("iet_finetune.ensemble.host.TINY", 4)
    run = Run(tmp_path, rank=4, lora_layers="proj_in,to_q")
    for round_ in range(5):
        run.round([5, 1, 2], round_)
    before = {name: rest.data_ptr() for name, rest in run.merger.remainders.items()}
    regions = len(run.host._regions)
    run.round([5, 1, 2], 5)
    assert {name: rest.data_ptr() for name, rest in run.merger.remainders.items()} == before
    run.merger.load_into(run.trainable)
    assert len(run.host._regions) == regions
    run.assert_shown(run.merger, run.update)


def test_the_adapter_keeps_the_best_of_its_rank_and_the_facts_tell_what_it_could_not_hold():
    run = Run(rank=2, lora_layers=LAYERS)
    assert run.merger.facts == {"remainder_share": 0}
    for round_ in range(3):
        run.round([2, 3, 4], round_)
        kept, best, lost, whole = run.deltas(run.merger.tensors), {}, 0.0, 0.0
        for name, update in run.update.items():
            u, s, v = torch.linalg.svd(update.flatten(1))
            best[name] = ((u[:, :2] * s[:2]) @ v[:2]).view(update.shape)
            lost, whole = lost + s[2:].square().sum().item(), whole + s.square().sum().item()
        assert run.norm({name: kept[name] - best[name] for name in kept}) < 1e-6
        assert run.merger.facts["remainder_share"] == pytest.approx(lost / whole, rel=1e-5)


def test_distances_are_those_of_the_dense_updates():
    run = Run(rank=2, lora_alpha=5, lora_layers=LAYERS)
    for round_ in range(2):
        start, before = run.deltas(run.merger.tensors), dict(run.update)
        clones = [moved(run.merger.tensors, 10 * round_ + k) for k in range(3)]
        deltas = [run.deltas(clone) for clone in clones]
        expected = [run.norm({name: delta[name] - start[name] for name in start}) for delta in deltas]
        said = run.merge(clones, [1, 2, 3])
        expected.append(run.norm({name: run.update[name] - before[name] for name in before}))
        assert said == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [[1], [7], [1, 1], [3, 5, 2**20], [7] * 8])
def test_identical_clones_are_unchanged_bit_for_bit_and_so_is_what_lies_below_them(weights):
    run = Run(rank=3, lora_alpha=7, lora_layers=LAYERS)
    for round_ in range(3):
        clone, before = moved(run.merger.tensors, round_), bits(run.merger.remainders)
        run.merge([clone] * len(weights), weights)
        assert bits(run.merger.tensors) == bits(clone)
        assert bits(run.merger.remainders) == before
        assert not run.merger.rebased
        run.assert_shown(run.merger, run.update)
        run.round([2, 1], 50 + round_)
        assert run.merger.remainders


def test_without_clones_nothing_changes():
    run = Run(rank=2)
    run.round([1, 2], 0)
    before = bits(run.merger.tensors, run.merger.remainders)
    assert run.merger.rebased
    assert run.merger.collect(None, [0]) == 0
    assert run.merger.total == 0
    assert run.merger.merge() == 0
    assert bits(run.merger.tensors, run.merger.remainders) == before
    assert not run.merger.rebased  # else moments that still belong to their factors would be dropped


def test_factors_turn_with_the_first_merge_and_later_only_in_layers_that_moved_far():
    run = Run(rank=3, lora_layers=LAYERS)
    run.merge([moved(run.merger.tensors, seed, 0.01) for seed in (1, 2)], [1, 2])
    assert set(run.merger.rebased) == set(run.trainable.parameters)
    run.merge([moved(run.merger.tensors, seed, 1e-3) for seed in (1, 2)], [1, 2])
    assert not run.merger.rebased
    far = list(run.adapter.layers.values())[4]
    clones = [moved(run.merger.tensors, seed, 1e-3) for seed in (3, 4)]
    for seed, clone in enumerate(clones):
        clone.update(moved({name: torch.zeros_like(clone[name]) for name in (far.up, far.down)}, seed, 3.0))
    run.merge(clones, [1, 2])
    assert run.merger.rebased == [far.up, far.down]
    run.assert_shown(run.merger, run.update)


def test_mean_updates_are_not_held_while_clones_train():
    run = Run(rank=2)
    run.merge([moved(run.merger.tensors, seed) for seed in (1, 2)], [1, 2])
    assert {mean.rank for mean in run.merger.means.values()} == {4}
    run.merger.load_into(run.trainable)
    assert not run.merger.means


# --- the moving average ----------------------------------------------------------------------------------------------


class AveragedRun(Run):
    """A `Run` whose clones keep real moving averages, and beside it what the merged average must be, dense.

    The reference is the definition: an average is (update outside the adapter) + s C + B̄ Ā.
    """

    def __init__(self, folder=None, **flags):
        super().__init__(folder, **flags)
        self.ema = EMA(self.trainable.parameters, 0.9, start_share=True)
        self.averages = ExactAverageMerger(
            "ema", self.adapter, self.ema.tensors, self.merger, Ranks.alone(), self.host
        )
        self.away = {name: torch.zeros_like(update) for name, update in self.update.items()}
        self.average = dict(self.update)

    def train(self, first, steps, seed, scale):
        """A clone's tensors and average after so many steps, the first of that number; and the product of decays."""
        self.merger.load_into(self.trainable)
        self.ema.load(self.averages.tensors)
        share = self.averages.tensors[START_SHARE].item()
        for step in range(first, first + steps):
            self.trainable.load(moved(self.trainable.tensors, seed + step, scale))
            self.ema.update(step, GO)
            # The decay by the rule of diffusers' `EMAModel`.
            share *= min(0.9, step / (9 + step)) if step > 1 else 0.0
        copies = [{n: t.clone() for n, t in tensors.items()} for tensors in (self.trainable.tensors, self.ema.tensors)]
        return (*copies, share)

    def averaged_round(self, steps, weights, seed, scale=0.02):
        """Clones that begin at different steps and take different numbers of them, merged with their averages."""
        trained = [self.train(5 * k + 3, n, 1000 * seed + 100 * k, scale) for k, n in enumerate(steps)]
        rest, away = self.rest, self.away
        products = [self.deltas(average) for _, average, _ in trained]
        of_clones = [
            {name: rest[name] + share * away[name] + product[name] for name in rest}
            for product, (_, _, share) in zip(products, trained, strict=True)
        ]
        self.average = mean_of(of_clones, weights)
        for (clone, average, _), weight in zip(trained, weights, strict=True):
            # As the ensemble does it: the clone, then its average.
            self.merger.collect(clone, [weight])
            self.averages.collect(average, [weight])
        mean = mean_of([self.deltas(clone) for clone, _, _ in trained], weights)
        self.update = {name: rest[name] + mean[name] for name in rest}
        self.merger.merge()
        self.averages.merge()
        if len(steps) > 1:
            self.away = {name: self.average[name] - self.update[name] for name in rest}
        return trained


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
def test_the_merged_average_is_the_mean_of_the_averages_of_the_clones(tmp_path, monkeypatch, offload):
    monkeypatch.setattr("iet_finetune.ensemble.host.TINY", 4)
    run = AveragedRun(tmp_path if offload else None, rank=3, lora_alpha=5, lora_layers=LAYERS)
    # In the third round only one clone has steps left.
    for round_, (steps, weights) in enumerate(
        [((2, 4, 1), (5, 1, 2)), ((3, 1), (1, 3)), ((2,), (1,)), ((1, 2), (4, 1))]
    ):
        run.averaged_round(steps, weights, round_)
        run.assert_shown(run.averages, run.average)
        assert run.norm({name: run.average[name] - run.update[name] for name in run.update}) > 1e-3
        run.assert_shown(run.merger, run.update)
        run.averages.rest()


def test_the_average_of_a_single_clone_goes_on_bit_for_bit():
    run = AveragedRun(rank=3, lora_layers=LAYERS)
    run.averaged_round((1, 2), (1, 2), 0)
    below = bits(run.averages._away)
    for round_ in (1, 2):
        ((_, average, _),) = run.averaged_round((2,), (3,), round_)
        assert bits(run.averages.tensors) == bits(average)
        assert 0 < run.averages.tensors[START_SHARE] < 1
        assert bits(run.averages._away) == below


@pytest.mark.parametrize("clones", [1, 2, 3])
def test_at_a_learning_rate_of_0_the_average_stays_the_denoiser(clones):
    run = AveragedRun(rank=3, lora_layers=LAYERS)
    run.round([1, 2], 0)
    run.ema.load(run.merger.tensors)
    for name, tensor in run.merger.tensors.items():
        run.averages.tensors[name].copy_(tensor)
    for round_ in range(3):
        run.averaged_round((2, 1, 3)[:clones], (2, 3, 1)[:clones], round_, scale=0.0)
        average = {name: tensor for name, tensor in run.averages.tensors.items() if name != START_SHARE}
        assert bits(average) == bits(run.merger.tensors)
        assert not run.averages._away
        run.assert_shown(run.averages, run.update)


# --- the mean of each matrix -----------------------------------------------------------------------------------------


def factor_merger(merge, **settings_):
    unet, adapter, trainable = adapted_unet(rank=2, lora_layers=LAYERS, lora_merge=merge)
    return (
        unet,
        adapter,
        trainable,
        FactorMerger("denoiser", adapter, trainable.tensors, Ranks.alone(), HostMemory(CPU), **settings_),
    )


def dense_of(unet, trainable, tensors):
    trainable.load(tensors)
    return torch.cat([delta.double().flatten() for delta in deltas_of(unet, "unet").values()])


@pytest.mark.parametrize("merge", ["average", "freeze_a"])
def test_each_matrix_becomes_its_mean_and_only_with_a_frozen_a_the_update_does(merge):
    unet, adapter, trainable, merger = factor_merger(merge)
    for round_ in range(2):
        start = dense_of(unet, trainable, merger.tensors)
        clones = [moved(merger.tensors, 10 * round_ + k) for k in range(3)]
        deltas = [dense_of(unet, trainable, clone) for clone in clones]
        drifts = [merger.collect(clone, [weight]) for clone, weight in zip(clones, (1, 2, 5), strict=True)]
        assert drifts == pytest.approx([(d - start).norm().item() / adapter.norm for d in deltas], rel=1e-5)
        change = merger.merge()
        for name, tensor in mean_of(clones, (1, 2, 5)).items():
            torch.testing.assert_close(merger.tensors[name], tensor)
        after = dense_of(unet, trainable, merger.tensors)
        assert change == pytest.approx((after - start).norm().item() / adapter.norm, rel=1e-5)
        assert min(*drifts, change) > 0
        off = (after - sum(w * d for w, d in zip((1, 2, 5), deltas, strict=True)) / 8).norm().item() / adapter.norm
        assert (off < 1e-7) == (merge == "freeze_a")


@pytest.mark.parametrize("merge", ["average", "freeze_a"])
def test_the_only_clone_moves_the_merged_adapter_as_far_as_itself(merge):
    _, _, _, merger = factor_merger(merge, only_clone=True)
    for round_ in range(2):
        clone = moved(merger.tensors, round_)
        drift = merger.collect(clone, [3])
        assert merger.merge() == drift > 0
        assert bits(merger.tensors) == bits(clone)

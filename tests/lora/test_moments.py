"""Adam's moments over merges of LoRA clones: they go on where they still belong to their factors, and only there."""

import pytest
import torch
from loras import adapted_unet

from iet_finetune.config.config import Config
from iet_finetune.distributed.groups import Placement, Ranks
from iet_finetune.ensemble.across_rounds import POLICIES
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.clone import Clone
from iet_finetune.ensemble.ensemble import Ensemble
from iet_finetune.ensemble.host import HostMemory
from iet_finetune.ensemble.ledger import ShardLedger
from iet_finetune.ensemble.meter import RoundMeter
from iet_finetune.ensemble.optimizers import build_optimizer, parameter_of
from iet_finetune.method.agc import AntiGradientControl
from iet_finetune.training.mergers import build_mergers

CPU = torch.device("cpu")
MOMENTS = ["shard-00000/moments.pt", "shard-00001/moments.pt"]


class Run:
    """Two clones of a real UNet's adapter, trained by AdamW on gradients that are drawn."""

    def __init__(self, moments, folder=None):
        config = Config.from_flags(use_lora=True, rank=3, num_shards=2, optimizer_across_rounds=moments)
        _, self.adapter, self.trainable = adapted_unet(rank=3)
        self.optimizer = build_optimizer(self.trainable.parameters.values(), config.optimizer, config.training)
        ranks, host = Ranks.alone(), HostMemory(CPU, folder)
        mergers = build_mergers(config, self.trainable, self.adapter, None, ranks, host)
        policy = POLICIES[moments](self.optimizer, ranks, placement := Placement.plan(2, 1), host)
        self.merger, self.averaged = mergers["denoiser"], getattr(policy, "merger", None)
        self.ensemble = Ensemble(
            self.trainable,
            None,
            [Clone(k, 3 + k, AntiGradientControl(1000, 0.0, 0.8), ShardLedger(4), RoundMeter(CPU)) for k in (0, 1)],
            mergers,
            policy,
            ranks,
            placement,
            seed=0,
        )

    def train(self, shard, seed, scale, far=()):
        """One clone's round: a step of AdamW, and then so far away from where it began, in some parameters farther."""
        clone = self.ensemble.checkout([shard])
        assert clone is not None
        generator = torch.Generator().manual_seed(seed)
        begun = {name: tensor.clone() for name, tensor in self.trainable.tensors.items()}
        for parameter in self.trainable.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        for name, tensor in begun.items():
            tensor.add_((3.0 if name in far else scale) * torch.randn(tensor.shape, generator=generator))
        self.trainable.load(begun)
        clone.step += 1
        self.ensemble.collect([shard])

    def round(self, seed, scale, far=()):
        """Both clones' rounds, and the merge."""
        for shard in (0, 1):
            self.train(shard, 2 * seed + shard, scale, far)
        self.ensemble.merge()

    def numbers(self, names):
        """The optimizer's numbers of these parameters."""
        return {number for number, name in enumerate(self.trainable.parameters) if name in names}

    @property
    def of_one_layer(self):
        """The names of one layer's matrices."""
        layer = list(self.adapter.layers.values())[5]
        return layer.up, layer.down


def test_all_moments_start_anew_after_the_first_merge_and_go_on_after_a_merge_of_small_moves():
    run = Run("keep")
    run.round(0, 0.01)
    assert set(run.merger.rebased) == set(run.trainable.parameters)
    assert [clone.optimizer_state for clone in run.ensemble.clones] == [{}, {}]
    assert not set(MOMENTS) & run.ensemble.pieces().keys()
    for expected in (1, 2):
        # Each clone's step counts are those since the moments began.
        run.round(expected, 1e-3)
        assert not run.merger.rebased
        for clone in run.ensemble.clones:
            assert set(clone.optimizer_state) == set(range(len(run.trainable.parameters)))
            assert {state["step"].item() for state in clone.optimizer_state.values()} == {expected}
    assert not torch.equal(*(clone.optimizer_state[0]["exp_avg"] for clone in run.ensemble.clones))


def test_only_the_moments_of_turned_factors_are_dropped_and_the_others_keep_every_bit():
    run = Run("keep")
    run.round(0, 0.01)
    run.round(1, 1e-3)
    for shard in (0, 1):
        run.train(shard, 10 + shard, 1e-3, far=run.of_one_layer)
    before = [{n: s["exp_avg"].clone() for n, s in clone.optimizer_state.items()} for clone in run.ensemble.clones]
    versions = [run.ensemble.pieces()[name].version for name in MOMENTS]
    run.ensemble.merge()
    assert tuple(run.merger.rebased) == run.of_one_layer
    gone = run.numbers(run.of_one_layer)
    assert len(gone) == 2
    for clone, old in zip(run.ensemble.clones, before, strict=True):
        assert set(clone.optimizer_state) == set(old) - gone
        assert all(torch.equal(state["exp_avg"], old[number]) for number, state in clone.optimizer_state.items())
    # The clones' steps are the same as before the merge, so only the version tells the two contents apart.
    assert all(run.ensemble.pieces()[n].version != v for n, v in zip(MOMENTS, versions, strict=True))
    run.train(0, 20, 1e-3)
    steps = {number: state["step"].item() for number, state in run.ensemble.clones[0].optimizer_state.items()}
    assert steps == {number: 1 if number in gone else 3 for number in range(len(run.trainable.parameters))}


@pytest.mark.parametrize("far", [False, True])
def test_averaged_moments_are_zeroed_where_the_factors_turned_and_nowhere_else(far):
    run = Run("average")
    run.round(0, 0.01)
    assert all(not tensor.any() for tensor in run.averaged.tensors.values())
    run.round(1, 1e-3)
    assert all(tensor.any() for tensor in run.averaged.tensors.values())
    run.round(2, 1e-3, far=run.of_one_layer if far else ())
    gone = run.numbers(run.of_one_layer) if far else set()
    zero = {name for name, tensor in run.averaged.tensors.items() if not tensor.any()}
    assert zero == {name for name in run.averaged.tensors if parameter_of(name) in gone}
    assert len(zero) == (6 if far else 0)


@pytest.mark.parametrize("offload", [False, True], ids=["in memory", "offloaded"])
def test_a_run_resumed_after_moments_were_dropped_goes_on_to_the_same_bits(tmp_path, monkeypatch, offload):
    monkeypatch.setattr("iet_finetune.ensemble.host.TINY", 4)
    whole, resumed = (Run("keep", tmp_path / "offload" if offload else None) for _ in range(2))
    store = CheckpointStore(tmp_path / "checkpoints")
    for round_ in (0, 1):
        whole.round(round_, 0.01 if round_ == 0 else 1e-3)
    for shard in (0, 1):
        whole.train(shard, 10 + shard, 1e-3, far=whole.of_one_layer)
    # The first holds the moments that the second, which links what has not changed, must not.
    store.save(1, whole.ensemble.pieces(), {"position": whole.ensemble.position()})
    whole.ensemble.merge()
    store.save(2, whole.ensemble.pieces(), {"position": whole.ensemble.position()})
    found = store.find("latest")
    assert found is not None
    resumed.ensemble.restore(found)
    for run in (whole, resumed):
        run.round(3, 1e-3)
    ours, theirs = resumed.ensemble, whole.ensemble
    assert all(torch.equal(ours.denoiser[name], theirs.denoiser[name]) for name in theirs.denoiser)
    for one, other in zip(ours.clones, theirs.clones, strict=True):
        assert set(one.optimizer_state) == set(other.optimizer_state)
        for number, state in other.optimizer_state.items():
            assert all(torch.equal(one.optimizer_state[number][name], value) for name, value in state.items())

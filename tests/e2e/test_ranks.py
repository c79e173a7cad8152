"""Training on several ranks, and on two machines, leaves what one rank leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from e2e.command import (
    IN_FOUR,
    STEPS_IN_FOUR,
    environment,
    flags,
    leftovers,
    run_by_hand,
    run_torchrun,
    the_line,
    words,
)
from safetensors.torch import load_file
from tiny import save_images

from iet_finetune import cli

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

TWO_MACHINES = Path(__file__).with_name("two_machines.sh")
NOT_PERMITTED = 77
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
RECORDS = ("metrics.jsonl", "ledger.parquet")
AVERAGE = {"optimizer_across_rounds": "average", "num_train_epochs": 4}
# A merge leaves remainders, of which the ranks share out the layers; its file is of as high a rank as it takes.
LORA: dict[str, Any] = {
    "use_lora": True,
    "rank": 2,
    "learning_rate": 1e-2,
    "lora_export": "full_rank",
    "outer_lr": None,
    "outer_momentum": None,
    "num_train_epochs": 6,
}
# 7 images a shard: a step of two micro-batches of 3, and one of 1, of which the second of two ranks has none.
IN_GROUPS: dict[str, Any] = {
    **IN_FOUR,
    "num_shards": 2,
    "train_batch_size": 3,
    "adam_epsilon": 1e-4,
    "num_train_epochs": 6,
}


def train(settings: dict[str, Any]) -> None:
    """Trains in this process, which is the only rank."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", *words(settings)]) == 0


def train_on(ranks: int, settings: dict[str, Any], run: Callable[..., Any] = run_by_hand) -> str:
    """Trains on so many ranks and returns their stderr."""
    done = run(ranks, settings)
    assert done.returncode == 0, done.stderr
    assert leftovers(Path(settings["output_dir"])) == []
    return done.stderr


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank leaves of a run in four shards: `one`, `average` with averaged moments, and `lora`, an adapter."""
    folder = tmp_path_factory.mktemp("ranks")
    train(flags(world, folder / "one", **IN_FOUR))
    train(flags(world, folder / "average", **IN_FOUR | AVERAGE))
    train(flags(world, folder / "lora", **IN_FOUR | LORA))
    return folder


@pytest.fixture(scope="module", params=[{}, LORA | {"lora_export": "fuse"}], ids=["whole", "lora"])
def groups(world: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> dict[int, Path]:
    """What two ranks leave of a run in two shards, and what four leave, two of them to a shard."""
    folder = tmp_path_factory.mktemp("groups")
    data = save_images(folder / "data", 14)
    for ranks in (2, 4):
        train_on(ranks, flags(world, folder / str(ranks), train_data_dir=data, **IN_GROUPS | request.param))
    return {ranks: folder / str(ranks) for ranks in (2, 4)}


def outcome(output: Path) -> dict[str, bytes]:
    """The bytes of what a run is made for: its weights, saved and in the last checkpoint, and its records."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    names = [*RECORDS, LORA_WEIGHTS if (output / LORA_WEIGHTS).exists() else WEIGHTS]
    names += sorted(f"{last.name}/{path.name}" for path in last.glob("*.safetensors") if "velocity" not in path.name)
    return {name: (output / name).read_bytes() for name in names}


def assert_same_outcome(ours: Path, theirs: Path) -> None:
    one, other = outcome(ours), outcome(theirs)
    assert one.keys() == other.keys()
    assert [name for name in other if one[name] != other[name]] == []


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics, one a round."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "run"), [(2, run_torchrun), (4, run_by_hand)])
def test_four_shards_on_several_ranks_leave_the_bits_of_one_rank(world, runs, tmp_path, ranks, run):
    train_on(ranks, flags(world, tmp_path / "out", **IN_FOUR), run)
    assert_same_outcome(tmp_path / "out", runs / "one")


def test_the_adapter_that_they_share_is_one_whose_merges_leave_remainders_in_which_agc_skips(runs):
    lines = metrics(runs / "lora")
    assert all(line["remainder_share"] > 0 for line in lines)
    assert 0 < sum(line["skip_rate"] for line in lines) < len(lines)
    assert {"denoiser_remainders.safetensors", "ema_away.safetensors"} <= {
        name.rpartition("/")[2] for name in outcome(runs / "lora")
    }


def test_an_adapter_on_four_ranks_and_then_on_two_leaves_the_bits_of_one_rank(world, runs, tmp_path):
    output = tmp_path / "out"
    settings = flags(world, output, **IN_FOUR | LORA | {"checkpoints_total_limit": None})
    train_on(4, settings)
    assert_same_outcome(output, runs / "lora")
    # Amid the second round each of the four clones has taken one step, and two ranks go on with two each.
    for path in output.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 24:
            shutil.rmtree(path)
    newest = output / "checkpoint-24"
    assert len(list(newest.glob("shard-*/live.safetensors"))) == 4
    assert (newest / "denoiser_remainders.safetensors").exists()
    train_on(2, settings)
    assert_same_outcome(output, runs / "lora")


def test_the_run_that_they_share_is_one_in_which_agc_skips_and_every_part_takes_part(runs):
    lines = metrics(runs / "one")
    assert lines[-1]["step"] == STEPS_IN_FOUR
    assert all(0 < sum(line["shard_skip_rate"]) < 4 for line in lines[1:])
    assert all(drift > 0 for line in lines for drift in (line["merge_drift"], *line["clone_drift"]))
    last = runs / "one" / f"checkpoint-{STEPS_IN_FOUR}"
    weights, average = load_file(last / "denoiser.safetensors"), load_file(last / "ema.safetensors")
    assert any(not torch.equal(weights[name], average[name]) for name in weights)
    (velocity,) = last.glob("denoiser_velocity-*")
    assert load_file(velocity)["numbers"].abs().max() > 0, "the outer optimizer has momentum"


def test_averaged_moments_and_an_offload_folder_give_the_bits_of_one_rank_without(world, runs, tmp_path):
    offload = {"offload_dir": tmp_path / "offload"}
    train_on(2, flags(world, tmp_path / "out", **IN_FOUR | AVERAGE | offload))
    assert_same_outcome(tmp_path / "out", runs / "average")
    kept = outcome(runs / "one")[WEIGHTS]
    assert outcome(runs / "average")[WEIGHTS] != kept, "averaging the moments changes the weights"


def test_an_offload_folder_changes_no_bit_of_moments_that_are_kept(world, runs, tmp_path):
    train(flags(world, tmp_path / "out", offload_dir=tmp_path / "offload", **IN_FOUR))
    assert (tmp_path / "offload").is_dir()
    assert_same_outcome(tmp_path / "out", runs / "one")


def test_three_shards_on_two_ranks_give_the_bits_of_one_with_a_warning_of_who_idles(world, tmp_path):
    said = train_on(2, flags(world, tmp_path / "out"))
    for name in (WEIGHTS, *RECORDS):
        assert (tmp_path / "out" / name).read_bytes() == (world / "trained" / name).read_bytes(), name
    warnings = [line for line in said.splitlines() if line.startswith("warning: `--num_shards")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: `--num_shards 3` on 2 ranks: rank 1 will have nothing to do")


def test_two_ranks_to_a_shard_leave_the_weights_of_one_to_a_shard_to_rounding(groups):
    one, other = (load_file(groups[ranks] / WEIGHTS) for ranks in (2, 4))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)


def test_two_ranks_to_a_shard_skip_the_images_that_one_skips(groups):
    one, other = (pq.read_table(groups[ranks] / "ledger.parquet").to_pydict() for ranks in (2, 4))
    assert [one["shard"].count(shard) for shard in (0, 1)] == [7, 7], "the last micro-batch of a pass is one image"
    assert other["seen"] == one["seen"] == [IN_GROUPS["num_train_epochs"]] * 14
    assert other["skipped"] == one["skipped"]
    assert 0 < sum(one["skipped"]) < sum(one["seen"])
    for ours, theirs in zip(metrics(groups[4]), metrics(groups[2]), strict=True):
        assert ours["skip_rate_by_noise_level"] == theirs["skip_rate_by_noise_level"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def two_machines(folder: Path, settings: dict[str, Any], **more: str) -> dict[int, tuple[int, str]]:
    """By machine, the exit code of its `torchrun` and all that was said there; skips where there cannot be two."""
    command = ["bash", str(TWO_MACHINES), str(folder), *words(settings)]
    with subprocess.Popen(command, env=environment(PYTHON=sys.executable, **more), text=True, stderr=-1) as script:
        try:
            _, stderr = script.communicate(timeout=180)
        finally:
            script.terminate()  # it removes its machines
    if script.returncode == NOT_PERMITTED:
        pytest.skip(stderr.strip())
    assert not [name for name in os.listdir("/run/netns") if name.startswith(f"iet-{script.pid}-")]
    logs = {machine: (folder / f"machine-{machine}.log").read_text() for machine in (0, 1)}
    return {machine: (int((folder / f"machine-{machine}.code").read_text()), logs[machine]) for machine in (0, 1)}


def test_two_machines_leave_the_bits_of_one_rank(world, runs, tmp_path):
    ended = two_machines(tmp_path / "logs", flags(world, tmp_path / "out", **IN_FOUR))
    assert [code for code, _ in ended.values()] == [0, 0], ended
    assert_same_outcome(tmp_path / "out", runs / "one")


def test_when_the_cable_is_cut_each_machine_ends_by_itself_and_the_run_goes_on_from_its_checkpoint(
    world, runs, tmp_path
):
    output = tmp_path / "out"
    settings = flags(world, output, **IN_FOUR | {"checkpoints_total_limit": None, "ddp_timeout": 6})
    began = time.monotonic()
    ended = two_machines(tmp_path / "logs", settings, CUT_WHEN=str(output / "checkpoint-20"))
    assert time.monotonic() - began < 90
    assert the_line(*ended[0]).startswith("iet-finetune: error: rank 1 has not answered for ")
    assert the_line(*ended[1]).startswith("iet-finetune: error: lost contact with rank 0 or the launcher")
    assert all("`--resume_from_checkpoint latest`" in said for _, said in ended.values())
    assert not (output / "model_index.json").exists()
    train(settings)
    assert_same_outcome(output, runs / "one")

"""What a run needs on the host is weighed against what the machine has before it starts."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loras import adapted_unet

from iet_finetune import UserError
from iet_finetune.config.settings import OptimizerConfig
from iet_finetune.distributed.groups import Placement
from iet_finetune.ensemble.across_rounds import POLICIES
from iet_finetune.ensemble.budget import Need, available_memory, cgroup_memory, check_memory
from iet_finetune.ensemble.merger import Merger
from iet_finetune.ensemble.optimizers import state_bytes
from iet_finetune.lora.merger import ExactMerger

MB = 1_000_000
GB = 1_000_000_000

# --- what a run needs ------------------------------------------------------------------------------------------------


def host_need(weights: int, clones: int, ranks: int = 1, *, policy: str = "reset", eight_bits: bool = False, **others):
    """What the first rank needs: gradients, optimizer state, the merge, and a moving average if there is one."""
    placement = Placement.plan(clones, ranks)
    state = state_bytes(weights, OptimizerConfig(use_8bit_adam=eight_bits))
    need = Need(device=weights) + POLICIES[policy].need(state, placement, 0)
    need += Merger.need(weights, placement, others.get("outer", (1.0, 0.0)))
    return need + Need(device=weights) + Merger.need(weights, placement) if others.get("ema") else need


def test_stable_diffusion_needs_what_the_design_says():
    sd15 = 3_438_000_000, 4
    keep, reset = host_need(*sd15, policy="keep"), host_need(*sd15)
    assert round(keep.host / GB) == 38
    assert round(reset.host / GB) == 10
    assert round(host_need(*sd15, ema=True).host / GB) == 21
    # On a GPU that is all the memory, and with `--offload_dir` nothing of it.
    assert keep.memory(device_is_host=False, offloaded=False) == keep.host
    assert keep.memory(device_is_host=False, offloaded=True) == 0


@given(
    parameters=st.integers(1, 10**10),
    ranks=st.integers(1, 64),
    times=st.integers(1, 8),
    ema=st.booleans(),
    policy=st.sampled_from(["keep", "reset"]),
)
def test_on_a_gpu_the_need_is_that_of_the_design(parameters, ranks, times, ema, policy):
    num_shards = ranks * times + 1
    need = host_need(4 * parameters, num_shards, ranks, policy=policy, ema=ema)
    formula = parameters * (4 + 8 / ranks) * (2 if ema else 1) + 8 * parameters * (times + 1) * (policy == "keep")
    assert need.host == pytest.approx(formula, rel=1e-9, abs=2)


def test_exactly_merged_adapters_need_the_weights_below_them_and_their_remainders():
    _, adapter, _ = adapted_unet(rank=3)

    def needs(clones, ranks):
        placement = Placement.plan(clones, ranks)
        return adapter.need(placement), ExactMerger.need(100, adapter, placement)

    below, merged = needs(4, 2)
    assert adapter.nbytes > 1000
    assert (below.host, below.checkpoint) == (adapter.nbytes, 0)
    # Of the four clones' adapters each is on one rank, and once more while they are brought together.
    assert (merged.host, merged.checkpoint) == (100 + adapter.nbytes + 2 * 4 * 100 // 2, 500 + adapter.nbytes)
    below, merged = needs(1, 1)
    assert below.host == 0
    assert (merged.host, merged.checkpoint) == (100 + 2 * 100, 100)


def needs(clones: int = 4, ranks: int = 1, **settings: Any) -> tuple[int, int, int]:
    """(idle in memory, live, offloaded) for weights of 1000 bytes, on the CPU."""
    need = host_need(1000, clones, ranks, **settings)
    live = need.memory(device_is_host=True, offloaded=True)
    return need.memory(device_is_host=True, offloaded=False) - live, live, need.host


def test_on_a_cpu_the_live_clone_needs_gradients_optimizer_state_and_average():
    assert needs() == (3000, 3000, 3000)
    assert needs(ema=True) == (6000, 4000, 6000)


def test_on_a_cpu_one_optimizer_state_is_live_and_has_a_file_all_the_same():
    assert needs(policy="keep") == (3000 + 3 * 2000, 3000, 3000 + 4 * 2000)
    assert needs(4, 4, policy="keep") == (1500, 3000, 1500 + 2000)


def test_an_averaged_optimizer_state_is_merged_like_the_weights():
    assert needs(policy="average") == (3000 + 2000 + 4000, 3000, 9000)
    assert needs(4, 4, policy="average") == (1500 + 2000 + 1000, 3000, 4500)


def test_a_clone_that_is_the_only_one_needs_no_sum_but_for_an_outer_optimizer():
    assert needs(1) == (1000, 3000, 1000)
    assert needs(1, ema=True) == (2000, 4000, 2000)
    assert needs(1, outer=(0.5, 0.0), ema=True) == (2000 + 2000, 4000, 4000)
    assert needs(1, outer=(1.0, 0.9)) == (1000 + 2000 + 1000, 3000, 4000)
    assert needs(1, 2) == (2000, 3000, 2000)


def test_the_outer_momentum_is_cut_into_slices():
    assert needs(4, 4, outer=(1.0, 0.9)) == (1000 + 500 + 250, 3000, 1750)


def test_an_optimizer_state_in_eight_bits_takes_a_quarter_in_memory_in_files_and_in_checkpoints():
    assert needs(policy="keep", eight_bits=True) == (3000 + 3 * 500, 1500, 3000 + 4 * 500)
    for policy, states in (("keep", 4), ("reset", 1)):
        whole, eighth = (host_need(1000, 4, policy=policy, eight_bits=bits).checkpoint for bits in (False, True))
        assert whole - eighth == states * (2000 - 500)


@given(
    clones=st.integers(2, 9),
    ranks=st.integers(1, 9),
    ema=st.booleans(),
    policy=st.sampled_from(["keep", "reset", "average"]),
    outer=st.sampled_from([(1.0, 0.0), (0.7, 0.9)]),
    device_is_host=st.booleans(),
)
def test_more_shards_on_a_rank_need_more_only_for_the_state_they_keep(clones, ranks, policy, device_is_host, **others):
    few, many = (host_need(1000, n * ranks, ranks, policy=policy, **others) for n in (clones, clones + 1))
    for offloaded in (False, True):
        one, other = (need.memory(device_is_host=device_is_host, offloaded=offloaded) for need in (few, many))
        assert other - one == (2000 if policy == "keep" and not offloaded else 0)
    assert many.host - few.host == (2000 if policy == "keep" else 0)


# --- what the machine has --------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, object]) -> Path:
    """Writes a made-up /proc and /sys."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_version_2_leaves_the_limit_minus_what_is_used_and_cannot_be_given_up(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user/job",
        "sys/fs/cgroup/user/job/memory.max": 900 * MB,
        "sys/fs/cgroup/user/job/memory.current": 700 * MB,
        "sys/fs/cgroup/user/job/memory.stat": f"anon {500 * MB}\ninactive_file {50 * MB}\nactive_file {20 * MB}",
    }
    assert cgroup_memory(tree(tmp_path, files)) == 250 * MB
    assert available_memory(tmp_path) == 250 * MB


def test_a_parent_that_leaves_less_decides(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user/job",
        "sys/fs/cgroup/user/job/memory.max": "max",
        "sys/fs/cgroup/user/job/memory.current": 100 * MB,
        "sys/fs/cgroup/user/memory.max": 400 * MB,
        "sys/fs/cgroup/user/memory.current": 100 * MB,
        "sys/fs/cgroup/memory.max": 800 * MB,
        "sys/fs/cgroup/memory.current": 600 * MB,
    }
    assert cgroup_memory(tree(tmp_path, files)) == 200 * MB
    assert cgroup_memory(tree(tmp_path, {"sys/fs/cgroup/memory.current": 100 * MB})) == 300 * MB


@pytest.mark.parametrize("path", ["/docker/0123", "/", "/../../other"])
def test_in_a_container_the_limits_at_the_top_count(tmp_path, path):
    files = {
        "proc/self/cgroup": f"4:memory:{path}\n1:cpu:/\n0::{path}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 500 * MB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * MB,
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {10 * MB}",
        # Outside of what the process can see.
        "sys/fs/other/memory.limit_in_bytes": 1,
        "sys/fs/other/memory.usage_in_bytes": 1,
    }
    assert cgroup_memory(tree(tmp_path, files)) == 410 * MB


def test_version_1_may_share_its_line_with_other_controllers(tmp_path):
    files = {
        "proc/self/cgroup": "5:cpuset:/a\n4:cpu,memory:/a/b:c\n0::/",
        "sys/fs/cgroup/memory/a/b:c/memory.limit_in_bytes": 100,
        "sys/fs/cgroup/memory/a/b:c/memory.usage_in_bytes": 30,
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": 30,
    }
    assert cgroup_memory(tree(tmp_path, files)) == 70


def test_more_used_than_allowed_leaves_nothing(tmp_path):
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 100,
        "sys/fs/cgroup/memory.current": 300,
    }
    assert available_memory(tree(tmp_path, files)) == 0


def test_without_a_limit_the_machine_decides(tmp_path):
    assert cgroup_memory(tmp_path) is None
    assert 0 < available_memory(tmp_path) <= psutil.virtual_memory().total
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 1 << 62, "sys/fs/cgroup/memory.current": 0}
    assert 0 < available_memory(tree(tmp_path, files)) <= psutil.virtual_memory().total


def test_this_process_has_some_memory_left():
    assert MB < available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("ranks", "can_offload", "can_reset", "named"),
    [
        (1, True, True, ["`--offload_dir`", "`--optimizer_across_rounds reset`"]),
        (1, True, False, ["`--offload_dir`"]),
        (1, False, True, ["`--optimizer_across_rounds reset`"]),
        (2, False, False, ["fewer than 2 ranks"]),
        (2, True, True, ["`--offload_dir`", "`--optimizer_across_rounds reset`", "fewer than 2 ranks"]),
        (1, False, False, ["a machine with more memory"]),
    ],
)
def test_what_does_not_fit_into_memory_is_one_line_that_says_what_helps(ranks, can_offload, can_reset, named):
    with pytest.raises(UserError) as caught:
        check_memory(200_000 * GB, ranks, can_offload=can_offload, can_reset=can_reset)
    line = str(caught.value)
    assert f"needs {200_000 * ranks}.00 GB of memory on this machine" in line
    assert "GB are free: " in line
    ways = ["`--offload_dir`", "`--optimizer_across_rounds reset`", "fewer than 2 ranks", "a machine with more memory"]
    assert [way for way in ways if way in line] == named
    assert "\n" not in line


def test_the_ranks_of_a_machine_share_its_memory():
    half = available_memory() // 2
    check_memory(half // 8, 8, can_offload=True, can_reset=True)
    with pytest.raises(UserError, match="for 8 ranks"):
        check_memory(half, 8, can_offload=True, can_reset=True)

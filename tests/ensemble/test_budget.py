"""What a run needs on the host is weighed against what the machine has before it starts."""

from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune import UserError
from iet_finetune.ensemble.budget import available_memory, cgroup_memory, check_memory, host_need

MB = 1_000_000
GB = 1_000_000_000

# --- what a run needs ------------------------------------------------------------------------------------------------

# The UNet of Stable Diffusion 1.5 in fp32.
SD15: dict[str, Any] = {"weights": 3_438_000_000, "ranks": 1, "shards_of_rank": 4, "num_shards": 4}
SD15 |= {"outer_momentum": False, "device_is_host": False}


def test_stable_diffusion_needs_what_the_design_says():
    keep = host_need(**SD15, ema=False, moments="keep")
    reset = host_need(**SD15, ema=False, moments="reset")
    assert round(keep.total / GB) == 38
    assert round(reset.total / GB) == 10
    assert round(host_need(**SD15, ema=True, moments="reset").total / GB) == 21
    assert keep.live == keep.returning == 0
    assert keep.offloaded == keep.resting == keep.total


@given(
    parameters=st.integers(1, 10**10),
    ranks=st.integers(1, 64),
    num_shards=st.integers(2, 64),
    ema=st.booleans(),
    moments=st.sampled_from(["keep", "reset"]),
)
def test_on_a_gpu_the_need_is_that_of_the_design(parameters, ranks, num_shards, ema, moments):
    shards = -(-num_shards // ranks)
    need = host_need(
        weights=4 * parameters,
        ranks=ranks,
        shards_of_rank=shards,
        num_shards=num_shards,
        ema=ema,
        moments=moments,
        outer_momentum=False,
        device_is_host=False,
    )
    formula = parameters * (4 + 8 / ranks) * (2 if ema else 1) + 8 * parameters * shards * (moments == "keep")
    assert need.resting == pytest.approx(formula, rel=1e-9, abs=2)
    assert need.live == 0


def test_exactly_merged_adapters_need_the_weights_below_them_and_their_remainders():
    adapter: dict[str, Any] = {"weights": 100, "ranks": 2, "shards_of_rank": 2, "num_shards": 4}
    adapter |= {"outer_momentum": False, "device_is_host": False, "moments": "reset"}
    need = host_need(**adapter, ema=False, adapted=5000)
    assert (need.merged, need.sums) == (100 + 2 * 5000, 2 * 4 * 100 // 2)
    averaged = host_need(**adapter, ema=True, adapted=5000)
    assert (averaged.merged, averaged.sums) == (200 + 3 * 5000, 2 * 4 * 200 // 2)
    single = host_need(**adapter | {"num_shards": 1, "ranks": 1, "shards_of_rank": 1}, ema=False, adapted=5000)
    assert single.merged == 100


def needs(**changes: Any) -> tuple[int, int, int]:
    """(resting, live, offloaded) for weights of 1000 bytes; four shards, one rank, on the CPU unless changed."""
    settings: dict[str, Any] = {"weights": 1000, "ranks": 1, "shards_of_rank": 4, "num_shards": 4, "ema": False}
    settings |= {"moments": "reset", "outer_momentum": False, "device_is_host": True}
    need = host_need(**{**settings, **changes})
    assert need.total == need.resting + need.live
    return need.resting, need.live, need.offloaded


def test_on_a_cpu_the_live_clone_needs_gradients_moments_and_average():
    assert needs() == (3000, 3000, 3000)
    assert needs(ema=True) == (6000, 4000, 6000)
    assert needs(device_is_host=False) == (3000, 0, 3000)


def test_on_a_cpu_one_set_of_moments_is_live_and_has_a_file_all_the_same():
    assert needs(moments="keep") == (3000 + 3 * 2000, 3000, 3000 + 4 * 2000)
    assert needs(moments="keep", ranks=4, shards_of_rank=1) == (1500, 3000, 1500 + 2000)
    assert needs(moments="keep", ranks=5, shards_of_rank=0) == (1400, 3000, 1400)


def test_averaged_moments_are_merged_like_the_weights():
    assert needs(moments="average") == (3000 + 2000 + 4000, 3000, 9000)
    assert needs(moments="average", ranks=4, shards_of_rank=1) == (1500 + 2000 + 1000, 3000, 4500)


def test_a_clone_that_is_the_only_one_needs_no_sum_but_for_an_outer_optimizer():
    alone = {"num_shards": 1, "shards_of_rank": 1}
    assert needs(**alone) == (1000, 3000, 1000)
    assert needs(**alone, ema=True) == (2000, 4000, 2000)
    assert needs(**alone, outer=True, ema=True) == (2000 + 2000, 4000, 4000)
    assert needs(**alone, outer_momentum=True) == (1000 + 2000 + 1000, 3000, 4000)
    assert needs(**alone, ranks=2) == (2000, 3000, 2000)


def test_the_outer_momentum_is_cut_into_slices():
    assert needs(outer_momentum=True, ranks=4, shards_of_rank=1) == (1000 + 500 + 250, 3000, 1750)


def test_moments_in_eight_bits_take_a_quarter():
    assert needs(moments="keep", state_bytes_per_weight_byte=0.5) == (3000 + 3 * 500, 1500, 3000 + 4 * 500)


@given(
    shards=st.integers(1, 9),
    ranks=st.integers(1, 9),
    ema=st.booleans(),
    moments=st.sampled_from(["keep", "reset", "average"]),
    outer_momentum=st.booleans(),
    device_is_host=st.booleans(),
)
def test_more_shards_on_a_rank_need_more_only_for_the_moments_they_keep(shards, moments, **settings):
    few, many = (
        host_need(weights=1000, shards_of_rank=n, num_shards=n + 1, moments=moments, **settings)
        for n in (shards, shards + 1)
    )
    assert many.total - few.total == (2000 if moments == "keep" else 0)
    assert many.offloaded - few.offloaded == (2000 if moments == "keep" else 0)
    assert many.live == few.live


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

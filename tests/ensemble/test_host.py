"""What rests on the host keeps its values wherever it lies, and goes when it is dropped."""

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune import UserError
from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.host import TINY, HostMemory, check_offload
from iet_finetune.ensemble.merger import Merger
from iet_finetune.lora.spectra import LowRank
from iet_finetune.method.merging import CloneRule, Mean

CPU = torch.device("cpu")
MB = 1_000_000
GB = 1_000_000_000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def files_held(folder: Path) -> list[str]:
    """The files in a folder that this process has open or mapped, those without a name too."""
    places = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    places += [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return [place for place in places if place.startswith(str(folder))]


def adam_state(sizes: list[int], value: float = 0.0) -> dict[int, Any]:
    """An optimizer state as `state_dict()["state"]` gives it, every number another."""
    torch.manual_seed(int(value))
    return {
        i: {"step": torch.tensor(value), "exp_avg": torch.randn(n), "exp_avg_sq": torch.rand(n)}
        for i, n in enumerate(sizes)
    }


def assert_same(ours: Any, theirs: Any) -> None:
    """Two states have the same structure, dtypes and bits."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """A state's tensors, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ():
        yield from tensors_of(value)


def places(state: Any) -> list[int]:
    """The addresses of a state's tensors, in order."""
    return [tensor.data_ptr() for tensor in tensors_of(state)]


def said_by_a_fresh_process(code: str, folder: Path) -> list[list[int]]:
    """The numbers, by line, that Python prints when it runs the code with the folder as its argument."""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


# --- ordinary memory -------------------------------------------------------------------------------------------------


def test_in_ordinary_memory_a_state_changes_owner_and_is_not_copied():
    state, values = adam_state([3, 2 * TINY]), adam_state([3, 2 * TINY])
    before = places(state)
    kept = HostMemory(CPU).keep(state, into=adam_state([3, 2 * TINY], 1))
    assert kept is state
    assert places(kept) == before
    assert_same(kept, values)


def test_a_device_without_pinned_memory_gets_ordinary_memory():
    tensor = HostMemory(torch.device("mps")).empty((2, 3 * TINY), torch.float64)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((2, 3 * TINY), torch.float64, CPU)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_a_tensor_in_a_file_is_like_any_other(tmp_path, dtype):
    tensor = HostMemory(CPU, tmp_path).empty((3, TINY), dtype)
    assert (tensor.shape, tensor.dtype, tensor.device) == ((3, TINY), dtype, CPU)
    assert tensor.is_contiguous()
    values = torch.arange(3 * TINY).reshape(3, TINY).to(dtype)
    tensor.copy_(values)
    assert torch.equal(tensor, values)


@linux
def test_a_file_has_no_name_and_goes_with_its_last_tensor(tmp_path):
    tensor = HostMemory(CPU, tmp_path).empty((5 * TINY,), torch.float32).fill_(7)
    part = tensor[TINY : 2 * TINY].view(32, -1)
    assert list(tmp_path.iterdir()) == []
    del tensor
    gc.collect()
    assert files_held(tmp_path)
    assert part.unique().tolist() == [7]
    del part
    gc.collect()
    assert files_held(tmp_path) == []


@linux
def test_a_killed_process_leaves_nothing_in_the_folder(tmp_path):
    code = """
import os, signal, sys, torch
from pathlib import Path
from iet_finetune.ensemble.host import HostMemory
tensor = HostMemory(torch.device("cpu"), Path(sys.argv[1]) / "made").empty((1 << 20,), torch.float32).fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert list(tmp_path.rglob("*")) == [tmp_path / "made"]


@linux
def test_a_state_of_many_tensors_lies_in_one_file_and_its_tiny_ones_in_memory(tmp_path):
    host = HostMemory(CPU, tmp_path)
    state = adam_state([TINY + 1, 5, 3 * TINY, TINY, 2 * TINY + 7] * 40)
    kept = host.keep(state)
    assert_same(kept, state)
    # The mapping and the file descriptor behind it.
    assert len(files_held(tmp_path)) == 2
    for ours, theirs in zip(tensors_of(kept), tensors_of(state), strict=True):
        tiny = theirs.numel() <= TINY
        assert (ours.data_ptr() == theirs.data_ptr()) == tiny
        assert tiny or ours.data_ptr() % 64 == 0


tensors = st.builds(
    lambda shape, dtype: (torch.randn(shape) * 100).to(dtype),
    st.lists(st.integers(0, 50), min_size=0, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool]),
)
plain = st.none() | st.integers() | st.floats(allow_nan=False) | st.text()
states = st.recursive(
    tensors | plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.integers(), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=10,
)


@given(before=states, state=states)
def test_any_nested_state_is_kept_as_it_is_whatever_was_kept_before(tmp_path_factory, before, state):
    host = HostMemory(CPU, tmp_path_factory.getbasetemp())
    assert_same(host.keep(state, into=host.keep(before)), state)
    kept = host.keep(before)
    assert_same(host.keep(state, into=kept), state)


def test_a_later_state_is_written_over_the_earlier_one_where_the_tensors_fit(tmp_path):
    host = HostMemory(CPU, tmp_path)
    first = host.keep(adam_state([2 * TINY, 3 * TINY, 4 * TINY], 1))
    later = adam_state([2 * TINY, 5 * TINY, 4 * TINY], 2)
    later[2]["exp_avg"] = later[2]["exp_avg"].double()
    before = places(first)
    second = host.keep(later, into=first)
    assert_same(second, later)
    fits = [ours == theirs for ours, theirs in zip(places(second), before, strict=True)]
    assert fits == [False, True, True, False, False, False, False, False, True]


def test_a_tensor_that_lies_in_a_file_changes_owner(tmp_path):
    host = HostMemory(CPU, tmp_path)
    kept = host.keep(adam_state([2 * TINY]))
    kept[0]["exp_avg"].add_(1)
    again = host.keep({0: kept[0], 1: {"exp_avg": torch.ones(2 * TINY)}})
    assert places(again[0]) == places(kept[0])
    assert places(again[1]) != places(kept[0])


def test_a_tensor_that_only_lies_near_a_file_is_copied(tmp_path):
    host = HostMemory(CPU, tmp_path)
    above = torch.ones(1 << 20)
    between = host.empty((1 << 20,), torch.float32).fill_(2)
    below = torch.full((1 << 20,), 3.0)
    kept = host.keep([above, between, below])
    assert [ours == theirs for ours, theirs in zip(places(kept), places([above, between, below]), strict=True)] == [
        False,
        True,
        False,
    ]
    assert_same(kept, [above, between, below])


def test_a_matrix_kept_as_factors_is_one_again_and_may_be_written_over_by_a_dense_one(tmp_path):
    host = HostMemory(CPU, tmp_path)
    factors = {
        "a": LowRank(torch.randn(2 * TINY, 1), torch.randn(1, 3)),
        "b": LowRank(torch.ones(3, 1), torch.ones(1, 2)),
    }
    kept = host.keep(factors)
    assert_same(kept, factors)
    assert places(kept["a"]) != places(factors["a"])
    later = {"a": LowRank(factors["a"].up + 1, factors["a"].down + 1), "b": torch.randn(2 * TINY)}
    again = host.keep(later, into=kept)
    assert again["a"].up.data_ptr() == kept["a"].up.data_ptr()
    host.rest(again)
    assert_same(again, later)


def test_strides_are_kept(tmp_path):
    tensor = torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last)
    kept = HostMemory(CPU, tmp_path).keep([tensor, tensor[:, :, ::2], tensor[:1].expand(3, -1, -1, -1)])
    assert kept[0].stride() == tensor.stride()
    assert_same(kept, [tensor, tensor[:, :, ::2], tensor[:1].expand(3, -1, -1, -1)])


def test_an_optimizer_goes_on_from_a_file_with_the_same_bits(tmp_path):
    host = HostMemory(CPU, tmp_path)
    results = []
    for offload in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 64))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        buffer = None
        for _ in range(4):
            weight.grad = torch.randn(64, 64)
            optimizer.step()
            if offload:
                saved = optimizer.state_dict()
                saved["state"] = buffer = host.keep(saved["state"], into=buffer)
                host.rest(buffer)
                optimizer.state.clear()
                optimizer.load_state_dict(saved)
        results.append(weight.detach())
    assert torch.equal(*results)


@linux
def test_rest_lowers_the_memory_of_the_process_and_keeps_the_values(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from iet_finetune.ensemble.host import HostMemory
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if "Rss" in line or "RSS" in line}
host = HostMemory(torch.device("cpu"), Path(sys.argv[1]))
size = 1 << 22
print(resident()["VmRSS:"], resident()["RssFile:"])
single = host.empty((size,), torch.float32)
torch.arange(size, out=single)
state = host.keep({i: {"step": torch.tensor(1.0), "exp_avg": torch.full((size // 64,), float(i))} for i in range(64)})
print(resident()["VmRSS:"], resident()["RssFile:"])
host.rest(single.view(2, -1), state, [None, 3, torch.zeros(5000)])
print(resident()["VmRSS:"], resident()["RssFile:"])
for i, part in zip(range(0, size, 4096), single.split(4096)):
    assert torch.equal(part, torch.arange(i, i + 4096).float())
assert all(state[i]["exp_avg"].unique().tolist() == [i] and state[i]["step"] == 1 for i in range(64))
print(resident()["VmRSS:"], resident()["RssFile:"])
"""
    before, written, rested, read = said_by_a_fresh_process(code, tmp_path)
    size = 2 * (1 << 22) * 4
    for kind in (0, 1):
        assert written[kind] - before[kind] > 0.9 * size
        assert written[kind] - rested[kind] > 0.9 * size
        assert read[kind] - rested[kind] > 0.9 * size


def test_rest_without_files_changes_nothing():
    host = HostMemory(CPU)
    tensor = host.empty((2 * TINY,), torch.float32).fill_(3)
    host.rest(tensor, {"a": [tensor]})
    assert tensor.unique().tolist() == [3]


def test_a_disk_that_is_too_small_is_one_line_and_no_signal(small_disk):
    disk = small_disk(8 * MB)
    host = HostMemory(CPU, disk)
    first = host.empty((1_000_000,), torch.float32).fill_(1)
    with pytest.raises(UserError) as caught:
        host.keep({0: torch.zeros(500_000), 1: torch.zeros(800_000)})
    assert str(caught.value).startswith(
        f"no space left on the device for `--offload_dir {disk}`: another 0.01 GB are "
    )
    assert "\n" not in str(caught.value)
    del first
    gc.collect()
    assert_same(host.keep([torch.ones(1_500_000)]), [torch.ones(1_500_000)])


def test_where_space_cannot_be_reserved_in_one_call_the_file_is_written_through(small_disk, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    host = HostMemory(CPU, small_disk(8 * MB))
    with pytest.raises(UserError, match="no space left on the device for `--offload_dir"):
        host.empty((3_000_000,), torch.float32)
    assert host.empty((1_500_000,), torch.float32).unique().tolist() == [0]


def test_a_folder_is_made_with_its_parents(tmp_path):
    HostMemory(CPU, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    wrong = [tmp_path / "file", tmp_path / "file" / "below"]
    # Not even root can make a file there.
    wrong += [Path("/proc")] if Path("/proc/self").exists() else []
    for folder in wrong:
        with pytest.raises(UserError) as caught:
            HostMemory(CPU, folder)
        assert str(caught.value).startswith(f"`--offload_dir {folder}` cannot be written: ")
        assert str(caught.value).endswith(". Choose another folder.")


# --- pinned memory ---------------------------------------------------------------------------------------------------


class Runtime:
    """Stands in for the CUDA runtime's registry of pinned memory, where there is no GPU."""

    def __init__(self, failure: int = 0) -> None:
        self.failure = failure
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        if not self.failure:
            self.pinned[address] = size
        return self.failure

    def cudaHostUnregister(self, address: int) -> int:
        # It must still be mapped: reading it would kill the process otherwise.
        mapped = [line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(int(start, 16) == address for start in mapped)
        del self.pinned[address]
        return 0


class Middle(CloneRule):
    """The mean of the clones, for which all of them are kept."""

    def merge(self, clones, weights, start):
        return clones.double().mean(dim=0)


@linux
def test_with_a_gpu_memory_is_pinned_at_its_exact_size_and_given_back_with_its_last_tensor(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    host = HostMemory(torch.device("cuda"))
    tensor = host.empty((3, 5 * TINY), torch.float64).fill_(2)
    assert runtime.pinned == {tensor.data_ptr(): tensor.nbytes}
    state = adam_state([TINY, 3 * TINY, 5 * TINY])
    kept = host.keep(state)
    assert_same(kept, state)
    assert sorted(runtime.pinned.values()) == [2 * (3 + 5) * TINY * 4, tensor.nbytes]
    later = adam_state([TINY, 3 * TINY, 5 * TINY], 1)
    assert_same(host.keep(later, into=kept), later)
    assert len(runtime.pinned) == 2
    host.rest(tensor, kept)
    assert tensor.unique().tolist() == [2]
    view = tensor[1]
    del tensor, kept
    gc.collect()
    assert list(runtime.pinned) == [view.data_ptr() - view.nbytes]
    del view
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(failure=2))
    with pytest.raises(
        UserError, match=r"^0\.02 GB of memory cannot be pinned for the GPU \(CUDA error 2\)\. .*offload"
    ):
        HostMemory(torch.device("cuda")).empty((3_000_001,), torch.float32)


@linux
@pytest.mark.parametrize("rule", [Mean, Middle])
def test_only_what_a_gpu_copies_is_pinned(rule, monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    clone = {"weight": torch.arange(4.0 * TINY)}
    host = HostMemory(torch.device("cuda"))
    merger = Merger("denoiser", clone, Ranks.alone(), host, outer=(0.5, 0.9), rule=rule())
    merger.collect(clone, [1])
    merger.collect(clone, [1])
    merger.merge()
    assert torch.equal(merger.tensors["weight"], clone["weight"])
    assert list(runtime.pinned) == [merger.tensors["weight"].data_ptr()]
    assert sum(runtime.pinned.values()) == merger.tensors["weight"].untyped_storage().nbytes()


def test_what_is_on_the_host_is_fetched_as_it_is():
    numbers = torch.ones(3)
    assert HostMemory(torch.device("cuda")).fetched(numbers) is numbers
    assert HostMemory(torch.device("cpu")).fetched(numbers) is numbers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_comes_from_a_gpu_comes_through_the_same_pinned_memory():
    host, numbers = HostMemory(torch.device("cuda")), torch.randn(3, 5 * TINY, device="cuda")
    first = host.fetched(numbers)
    assert first.is_pinned()
    assert torch.equal(first, numbers.cpu())
    assert host.fetched(-numbers[:2]).data_ptr() == first.data_ptr()
    assert torch.equal(first[:2], -numbers[:2].cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_memory_pinned():
    host = HostMemory(torch.device("cuda"))
    tensor = host.empty((3, 5 * TINY), torch.float32)
    assert tensor.is_pinned()
    values = torch.randn(3, 5 * TINY, device="cuda")
    kept = host.keep({"values": values})
    assert kept["values"].is_pinned()
    assert_same(kept, {"values": values.cpu()})
    assert torch.equal(kept["values"].to("cuda", non_blocking=True), values)


# --- the disk --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_on_the_disk_is_one_line(small_disk):
    folder = small_disk(8 * MB) / "not" / "made"
    check_offload(folder, 3 * MB, 2)
    assert not folder.exists()
    with pytest.raises(UserError) as caught:
        check_offload(folder, 3 * MB, 3)
    assert str(caught.value) == (
        f"no space left on the device for `--offload_dir {folder}`: 0.01 GB for 3 ranks are needed, and 0.00 GB are "
        "free. Choose a folder on another disk."
    )


def test_a_disk_that_cannot_be_asked_is_named(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.disk_usage", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied. Choose another folder."):
        check_offload(tmp_path, 1, 1)

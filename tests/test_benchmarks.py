"""The benchmarks run and measure what they say; how good the figures are is theirs to tell, not for a test."""

import json
import os
import sys
from itertools import accumulate
from pathlib import Path

import processes
import pytest
import torch
from tiny import tiny_sd
from tiny_families import tiny_pipeline

from iet_finetune.config.settings import AdapterConfig
from iet_finetune.families.precision import computing, predicting
from iet_finetune.lora.adapters import add_adapter

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def programs(monkeypatch):
    """Lets a test import the benchmarks as they import each other."""
    monkeypatch.syspath_prepend(FOLDER)


def run_benchmark(name: str, tmp_path: Path, *flags: str) -> tuple[dict, list[str]]:
    """What a benchmark wrote to its JSON file and to stdout; its exit code must fit what it found."""
    record, scratch = tmp_path / "record.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags, "--dir", str(scratch), "--json", str(record)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run(command, launcher=True, env=environment, timeout=300)
    assert record.exists(), done.stderr
    found = json.loads(record.read_text(encoding="utf-8"))
    assert done.returncode == int(not all(check["holds"] for check in found["checks"]))
    assert list(scratch.iterdir()) == [], "something is left on the disk"
    return found, done.stdout.splitlines()


def table_of(lines: list[str]) -> list[list[str]]:
    """The cells of every line of the tables, heads and rules too."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


@linux
@pytest.mark.slow
def test_the_memory_of_real_runs_is_measured_and_compared(tmp_path):
    flags = ["--clones", "2", "3", "--channels", "16", "32", "--images", "3", "--rounds", "1"]
    found, printed = run_benchmark("memory", tmp_path, *flags, "--modes", "keep", "keep, offloaded")
    rows = found["rows"]
    assert [(row["K"], row["moments"]) for row in rows] == [
        (2, "keep"),
        (3, "keep"),
        (2, "keep, offloaded"),
        (3, "keep, offloaded"),
    ]
    for row in rows:
        # Python with torch and diffusers, in MB. The peaks of the parts need not fall together.
        assert 100 < row["own"] < row["peak resident MB"] < 4000
        assert row["peak resident MB"] - 20 <= row["own"] + row["of files"] + row["shared"]
    assert [row["growth MB"] for row in rows[::2]] == [0, 0]
    assert [row["kept moments MB"] for row in rows] == [0, found["parameters"] * 8 // 10**6, None, None]
    assert len(found["checks"]) == 2
    assert [line[:2] for line in table_of(printed)[2:]] == [[str(row["K"]), row["moments"]] for row in rows]


@linux
@pytest.mark.slow
def test_plans_are_held_against_the_runs_and_their_memory_comes_true(tmp_path):
    found, printed = run_benchmark("planned", tmp_path, "--runs", "six clones", "--channels", "16", "32")
    assert [row["run"] for row in found["rows"]] == ["six clones"]
    assert [check["holds"] for check in found["checks"] if ": memory is" in check["text"]] == [True]
    assert [line[0] for line in table_of(printed)[2:]] == ["six clones"]


@linux
def test_a_peak_that_has_passed_is_seen(programs):
    code = """
import json, time, torch
from iet_finetune.planning.peaks import peak_resident
from measured_run import sampled_peaks
peaks = {}
def look():
    return {"resident": peak_resident(), **peaks}
with sampled_peaks(peaks):
    time.sleep(0.1)
    before = look()
    held = torch.ones(50_000_000)
    time.sleep(0.3)
    del held
    time.sleep(0.1)
print(json.dumps([before, look()]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT)])}
    done = processes.run([sys.executable, "-c", code], env=environment)
    before, after = json.loads(done.stdout)
    for name in ("resident", "RssAnon"):
        assert 195e6 < after[name] - before[name] < 260e6


@pytest.mark.parametrize(
    ("mode", "grown", "kept", "holds"),
    [
        ("reset", 90, 0, True),
        ("reset", 110, 0, False),
        ("reset", -500, 0, True),
        ("keep", 8000, 8000, True),
        ("keep", 8400, 8000, True),
        ("keep", 8600, 8000, False),
        ("keep", 100, 8000, False),
    ],
)
def test_memory_that_grows_otherwise_than_expected_is_a_miss(programs, mode, grown, kept, holds):
    from memory import checks_of

    mb = 10**6
    peaks, first = ({"resident": size * mb, "device": None} for size in (2000 + grown, 2000))
    ((text, found),) = checks_of(32, mode, peaks, first, kept * mb)
    assert found is holds
    assert f"{grown} MB" in text


@linux
@pytest.mark.slow
def test_a_second_start_with_many_images_finds_what_the_first_one_left(tmp_path):
    record, home = tmp_path / "record.json", tmp_path / "home"
    flags = ["--count", "120", "--home", str(home), "--sources", "folder", "--json", str(record)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = processes.run([sys.executable, str(FOLDER / "many_images.py"), *flags], env=environment, timeout=300)
    found = json.loads(record.read_text(encoding="utf-8"))
    assert done.returncode == int(not all(check["holds"] for check in found["checks"]))
    assert [row["start"] for row in found["rows"]] == ["first", "second"]
    assert found["checks"][0] == {"text": "the second start finds the same images", "holds": True}
    assert len(list((home / "folder-120").rglob("*.png"))) == 120


def test_device_memory_must_not_grow_with_the_clones(programs):
    from memory import checks_of

    first = {"resident": 100, "device": 1000}
    verdicts = [checks_of(8, "reset", {"resident": 100, "device": grown}, first, 0)[1][1] for grown in (1040, 1060)]
    assert verdicts == [True, False]


def test_a_disk_without_room_is_said_before_anything_is_trained(programs, tmp_path):
    from memory import check_room

    check_room(tmp_path, 1, 1)
    with pytest.raises(SystemExit, match="GB are needed in .* name a disk with --dir"):
        check_room(tmp_path, 10**15, 32)


@pytest.mark.slow
def test_the_speed_of_real_ranks_and_merges_is_measured(tmp_path):
    training = ["--images", "4", "--batch", "1", "--passes", "1", "--rounds", "2", "--runs", "1", "--resolution", "16"]
    found, printed = run_benchmark("scaling", tmp_path, *training, "--channels", "16", "32", "--repeats", "1")
    one, two = found["speeds"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert found["speedup"] == pytest.approx(two["images/s"] / one["images/s"])
    for ranks, row in enumerate(found["merges"], start=1):
        assert row["ranks"] == ranks
        assert row["MB of a clone"] == 1
        assert all(row[name] > 0 for name in ("collect, s", "merge, s", "copy, s", "overwrite, s"))
        # All of it is the merge and 4 or 2 collects, at least two of which took no less than their median.
        spent = 4 * row["all / copy"] * row["copy, s"]
        assert spent == pytest.approx(4 * row["all / overwrite"] * row["overwrite, s"])
        assert spent >= 0.999 * (row["merge, s"] + 2 * row["collect, s"])
    heads = [line for line in table_of(printed) if line[0] == "ranks"]
    assert heads == [list(one), list(found["merges"][0])]
    assert len(found["checks"]) == 2


@linux
def test_the_search_for_neighbours_is_measured_against_the_loop(tmp_path):
    found, printed = run_benchmark("nearest", tmp_path, "--fast", "--threads", "1")
    ours, loop = found["rows"]
    assert (ours["images"], loop["images"]) == (200, 8)
    assert found["ratio"] == pytest.approx(loop["ms an image"] / ours["ms an image"])
    assert 50 < ours["peak MB"] < 2000
    assert found["checks"][2]["holds"], "other neighbours than the loop's"
    assert [line[0] for line in table_of(printed)[2:]] == ["ours, both orientations", "the loop"]


def test_the_speed_of_training_is_measured_against_the_plain_loop(tmp_path):
    found, printed = run_benchmark("speed", tmp_path, "--fast")
    assert [row["training"] for row in found["speeds"]] == ["plain loop", "K = 1, uncached", "K = 1", "K = 1, AGC"]
    assert [row["training"] for row in found["clones"]] == ["K = 1, AGC", "K = 2, AGC"]
    for row in found["speeds"]:
        # Two turns of one step with 8 images, whose median is their mean.
        assert row["images/s"] == pytest.approx(8 * 1000 / row["ms a step"])
    for row in found["cached"]:
        assert row["speed"] == pytest.approx(row["plain loop, ms a step"] / row["ours, ms a step"])
        assert 0.1 < row["encoding / UNet"] < 1.5
    *parts, total = found["parts"]
    assert sum(part["ms a round"] for part in parts) == pytest.approx(total["ms a round"])
    assert [part["part"] for part in parts if part["ms a step"] == 0] == ["encode images and captions"]
    assert all(part["without the cache, ms a step"] > 0 for part in parts)
    diffusers, ours = found["starts"]
    assert ours["imported, s"] < ours["built, s"] < ours["done, s"]
    assert found["ratios"]["start"]["median"] == pytest.approx(ours["done, s"] / diffusers["done, s"])
    # One for each trained tensor: AdamW's step count.
    assert found["waits"]["optimizer"] > 100
    assert found["waits"]["elsewhere"] == 0, "a step waits for the device"
    assert len(found["checks"]) == 5
    names = [
        row[name]
        for rows, name in (
            *(("starts", "start"), ("speeds", "training"), ("clones", "training"), ("cached", "training")),
            *(("parts", "part"),),
        )
        for row in found[rows]
    ]
    assert [line[0] for line in table_of(printed) if line[0] in names] == names


def test_a_program_runs_only_in_its_turn_and_its_error_is_raised_there(programs):
    from stepped import Turns

    done = []

    def count(after_step):
        for number in range(3):
            done.append(number)
            after_step()
        raise ValueError("no more")

    turns = Turns(count)
    assert done == []
    turns.advance(2)
    assert done == [0, 1]
    turns.advance(1)
    with pytest.raises(ValueError, match="no more"):
        turns.advance(1)
    turns.close()


def test_a_closed_program_takes_no_further_step(programs):
    from stepped import Turns

    done = []

    def count(after_step):
        while True:
            done.append(len(done))
            after_step()

    turns = Turns(count)
    turns.advance(2)
    turns.close()
    assert done == [0, 1]


@linux
@pytest.mark.slow
def test_the_memory_and_the_time_that_the_cache_takes_are_measured(tmp_path):
    found, printed = run_benchmark("cache", tmp_path, "--fast")
    tenth, all_ = found["filled"]
    assert (tenth["images"], all_["images"]) == (20, 200)
    for row in found["filled"]:
        # Mean and deviation of 4 x 32 x 32 numbers for each image and its mirrored copy, and 16 x 32 for its caption.
        assert row["MB on disk"] == row["images"] * (2 * 2 * 4 * 32 * 32 + 16 * 32) * 4 // 10**6
        assert row["files"] == 2
        assert row["images/s"] == pytest.approx(row["images"] / row["encoded, s"])
        # All rows wait for one file.
        assert row["MB on disk"] <= row["at most more"] < 400
        # Python with torch and diffusers, in MB.
        assert 100 < row["own MB before"] < row["peak resident MB"] < 4000
    opened = found["opened"]
    assert opened["images"] == 200
    assert 0 < opened["opened, s"] < all_["encoded, s"]
    assert opened["1000 samples, s"] > 0
    assert opened["peak resident MB"] <= opened["with samples"]
    assert [check["holds"] for check in found["checks"][:3]] == [True, True, True], "memory, or encoded again"
    heads = [line for line in table_of(printed) if line[0] == "images"]
    assert heads == [list(all_), list(opened)]


def test_a_comparison_of_records_finds_a_changed_number_and_overlooks_renamed_keys_and_dates(
    programs, tmp_path, capsys
):
    from same_bits import compare

    def record(name, **audit):
        runs = {"full": {"weights": {"unet.safetensors": "a1"}, "metrics": [{"loss": 0.5}, {"loss": float("nan")}]}}
        (tmp_path / name).write_text(json.dumps({**runs, "audit": {"date": name, **audit}}), encoding="utf-8")
        return tmp_path / name

    before = record("before", f_mem={"value": 0.1, "null": 0.0})
    assert compare(before, record("same", f_mem={"value": 0.1, "baseline": 0.0})) == 0
    assert capsys.readouterr().out == "the same bits in 1 runs and an audit\n"
    assert compare(before, record("other", f_mem={"value": 0.2, "baseline": 0.0}, more=1)) == 1
    assert capsys.readouterr().out.splitlines() == ["audit > f_mem > value: 0.1 | 0.2", "audit > more: nothing | 1"]


@pytest.mark.parametrize("half", [False, True])
def test_what_is_counted_on_fake_tensors_is_what_a_step_takes(programs, half):
    from device_memory import inputs_of, make_fake, numbers, peak_of_step
    from torch._subclasses.fake_tensor import FakeTensorMode

    def net():
        made = tiny_sd().unet.train()
        made.enable_gradient_checkpointing()
        return made

    real, called = net(), inputs_of(net(), 4, 32, 12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        peak_of_step(real, called, half)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    # Gradients are there from the start, and are not counted.
    measured = max(accumulate(changes)) - 4 * numbers(real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(fake := net())
        counted = peak_of_step(fake, inputs_of(fake, 4, 32, 12), half)
    assert counted == pytest.approx(measured, rel=0.1)


def test_what_is_counted_of_models_that_compute_in_half_precision_is_what_they_take(programs):
    from device_memory import held, peak_of, put
    from torch._subclasses.fake_tensor import FakeTensorMode

    ids, bf16, cpu = torch.ones(8, 64, dtype=torch.long), torch.bfloat16, torch.device("cpu")
    real, fake = (tiny_pipeline("sd3") for _ in range(2))
    with computing(real.text_encoder_3, cpu, bf16):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            peak_of(lambda: real.text_encoder_3(ids))
        weights = held(real.text_encoder_3)
    changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    with predicting(real.transformer, cpu, bf16):
        of_denoiser = held(real.transformer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put(fake.text_encoder_3, bf16)
        put(fake.transformer, bf16, layers_alone=True)
        assert peak_of(lambda: fake.text_encoder_3(ids)) == pytest.approx(max(accumulate(changes)), rel=0.1)
    assert (held(fake.text_encoder_3), held(fake.transformer)) == (weights, of_denoiser)
    assert weights < 0.51 * held(real.text_encoder_3)
    assert of_denoiser < 0.6 * held(real.transformer)


def test_the_remainders_of_ten_rounds_are_factors_or_dense_whichever_is_smaller(programs):
    from device_memory import ROUNDS, remainders

    with torch.device("meta"):
        net = torch.nn.ModuleDict({"wide": torch.nn.Linear(5000, 4000), "small": torch.nn.Linear(64, 64)})
    adapter = add_adapter(net, AdapterConfig(use_lora=True, rank=16, lora_layers="wide,small"), (), 0)
    factors = 4 * (5000 + 4000) * 3 * 16 * ROUNDS
    assert remainders(adapter, clones=4) == factors + 4 * 64 * 64

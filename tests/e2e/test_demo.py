"""`make demo`, made short: the command of the Makefile with the demo's own configuration, pipeline and images."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import yaml
from audit_runs import read_audit, save_mosaic, typed
from diffusers import DiffusionPipeline
from PIL import Image

from iet_finetune import cli
from iet_finetune.config.settings import DataConfig
from iet_finetune.data.dataset import load_images

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"


def images(part: str):
    return load_images(DataConfig(train_data_dir=str(DEMO / "data" / part)), cache_dir=None, seed=0)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder and the text printed by a demo of one round of two steps."""
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, short_demo("configs/demo.yaml", output)


def short_demo(recipe: str, output: Path) -> str:
    """What a demo of one round of two steps prints."""
    launch = re.search(r"accelerate launch (.*?)--num_cpu_threads", (ROOT / "Makefile").read_text(), re.DOTALL)[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.replace("\\\n", " ").split()]
    short = ["--max_train_steps", "2", "--validation_inference_steps", "2", "--num_validation_images", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    script = ["train_iet_agc.py", "--config", recipe, "--output_dir", str(output), *short]
    result = processes.run([*command, *script], launcher=True, cwd=ROOT, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_says_what_was_skipped_where_the_picture_is_and_how_to_load_the_result(run):
    output, printed = run
    rate = json.loads((output / "metrics.jsonl").read_text())["skip_rate"]
    said = f"skipped by round: {rate:.1%}" if rate else "nothing was skipped in any round"
    assert re.search(rf"^{re.escape(said)}", printed, flags=re.MULTILINE)
    picture = Image.open(re.search(r"^before and after: (.+)$", printed, flags=re.MULTILINE)[1])
    assert picture.width > 2 * 64
    (line,) = re.findall(r"^load it with: (.+)$", printed, flags=re.MULTILINE)
    pipeline = eval(line, {"DiffusionPipeline": DiffusionPipeline})
    assert pipeline("red apple", num_inference_steps=2).images[0].size == (64, 64)


def test_with_lora_a_file_below_a_megabyte_comes_out_and_loads(tmp_path):
    printed = short_demo("configs/demo_lora.yaml", tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").stat().st_size < 1_000_000
    assert re.search(r"^saved as a LoRA file of rank 4", printed, flags=re.MULTILINE)
    (line,) = re.findall(r"^load it with: (.+)$", printed, flags=re.MULTILINE)
    pipeline = DiffusionPipeline.from_pretrained(DEMO / "pipeline")
    eval(line, {"pipeline": pipeline})
    assert pipeline.get_active_adapters()
    assert pipeline("red apple", num_inference_steps=2).images[0].size == (64, 64)


def commands_of(target: str, *variables: str) -> str:
    """What `make` would run for a target, with this Python's programs."""
    # These tests may themselves be run by make, and the inner one would say which folder it enters and leaves.
    make = ["make", "--no-print-directory", "-n", "-o", "/dev/null", "INSTALLED=/dev/null", *variables]
    program = [*make, f"BIN={Path(sys.executable).parent}", target]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_four_models_are_audited_in_the_same_way_and_then_compared(tmp_path):
    printed = commands_of("demo-audit").splitlines()
    lines = [line.split("audit ", 1)[1] for line in printed if "iet-finetune audit " in line]
    *audits, compare = [line.split() for line in lines]
    models = {line[line.index("--model") + 1] for line in audits}
    assert models == {"demo/pipeline", "outputs/demo-plain", "outputs/demo-iet-agc", "outputs/demo"}
    assert len({tuple(line[: line.index("--model")]) for line in audits}) == 1
    assert compare[1:5] == ["outputs/demo-base", "outputs/demo-plain", "outputs/demo-iet-agc", "outputs/demo"]
    base = next(line for line in audits if "demo/pipeline" in line)
    assert base[base.index("--output_dir") + 1] == "outputs/demo-base/audit"
    few = {"num_images": 3, "num_inference_steps": 2, "membership_images": 8, "features": save_mosaic(tmp_path)}
    short = typed({**few, "output_dir": tmp_path / "base" / "audit"})
    assert cli.main(["audit", *base, *short]) == 0
    found = read_audit(tmp_path / "base" / "audit")
    assert found["data"] == found["data"] | {"training_images": 580, "distinct": 300, "exact_duplicates": 280}
    assert [(row["repeats"], row["images"]) for row in found["by_repeats"]] == [("1", 280), ("10 or more", 20)]


def test_from_scratch_garments_are_drawn_and_the_result_loads(tmp_path):
    command = commands_of("demo-unconditional", "FASHION_MNIST=/nowhere").rstrip()
    short = f"--output_dir {tmp_path / 'out'} --max_train_steps 2 --validation_inference_steps 2"
    result = subprocess.run(
        f"{command} {short} --num_validation_images 1",
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    picture = Image.open(re.search(r"^before and after: (.+)$", printed, flags=re.MULTILINE)[1])
    assert picture.size == (28 + 24 + 28, 20 + 28)
    (line,) = re.findall(r"^load it with: (.+)$", printed, flags=re.MULTILINE)
    pipeline = eval(line, {"DiffusionPipeline": DiffusionPipeline})
    image = pipeline(num_inference_steps=2).images[0]
    assert (image.size, image.mode) == ((28, 28), "L")
    assert "Trained from scratch" in (tmp_path / "out" / "README.md").read_text()


def test_the_garments_are_as_many_of_each_class_with_their_licence_beside_them():
    folder = DEMO / "unconditional" / "data"
    settings = DataConfig(dataset_name=str(folder), class_column="label")
    garments = load_images(settings, cache_dir=None, seed=0, needs_captions=False)[0]
    assert set(Counter(garments.classes).values()) == {200}
    assert len(garments.class_names) == 10
    assert garments.num_duplicates == 0
    assert {image.size for image in (garments.load(i) for i in range(0, len(garments), 100))} == {(28, 28)}
    assert "MIT" in (folder / "NOTICE").read_text()
    assert (folder / "train.parquet").stat().st_size < 1_100_000


def test_the_garments_are_made_from_the_files_of_the_package(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array([*range(10), *range(10)], dtype=np.uint8)
    images = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    script = DEMO / "unconditional" / "make_data.py"
    subprocess.run(
        [sys.executable, script, "--source", tmp_path, "--output", tmp_path / "out", "--count", "10"], check=True
    )
    settings = DataConfig(dataset_name=str(tmp_path / "out"), class_column="label")
    made = load_images(settings, cache_dir=None, seed=0, needs_captions=False)[0]
    assert made.classes == tuple(range(10))
    for number in range(10):
        assert np.array_equal(np.asarray(made.load(number))[..., 0], images[number])


def test_the_recipes_with_adapters_and_without_differ_only_in_what_lora_needs():
    names = ("demo_iet_agc", "demo_lora")
    whole, adapters = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in names)
    differ = {name for name in whole | adapters if whole.get(name) != adapters.get(name)}
    assert differ == {"output_dir", "use_lora", "rank", "lora_layers", "lora_export", "learning_rate"}


def test_the_card_names_the_licence_of_the_emoji(run):
    output, _ = run
    assert "cc-by-4.0" in (output / "README.md").read_text()


def test_the_base_pipeline_is_small_and_in_half_precision():
    files = list((DEMO / "pipeline").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 10_000_000
    pipeline = DiffusionPipeline.from_pretrained(DEMO / "pipeline", dtype=torch.float32)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"


def test_some_emoji_are_repeated_and_none_is_also_in_the_base_or_held_out_set():
    finetune, base, heldout = (images(part) for part in ("finetune", "base", "heldout"))
    counts = Counter(finetune.content_hashes)
    assert Counter(counts.values()) == {1: 280, 15: 20}
    assert not set(counts) & set(base.content_hashes)
    assert not set(counts) & set(heldout.content_hashes)
    assert not set(base.content_hashes) & set(heldout.content_hashes)
    assert len(heldout) == 60


def test_the_prompts_of_the_demo_stand_in_its_data():
    prompts = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["validation_prompts"]
    captions = {caption for part in ("base", "finetune") for row in images(part).captions for caption in row}
    assert set(prompts) <= captions


@pytest.mark.parametrize("part", ["base", "finetune", "heldout"])
def test_every_image_has_a_caption_and_the_licence_stands_beside_them(part):
    rows = [json.loads(line) for line in (DEMO / "data" / part / "metadata.jsonl").read_text().splitlines()]
    assert all(row["text"].strip() for row in rows)
    assert "CC-BY" in (DEMO / "data" / "NOTICE").read_text()

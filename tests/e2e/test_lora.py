"""LoRA training with the real command: what it saves loads in a fresh process and draws what the trainer drew."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.utils import convert_state_dict_to_kohya
from e2e.command import environment, flags, words
from peft.utils import get_peft_model_state_dict
from PIL import Image
from reference import with_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import RESOLUTION, tiny_sd

from iet_finetune import cli

pytestmark = pytest.mark.timeout(300)

LORA = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPTS = ["a thing", "thing 3"]
PICTURES = 2
# Two rounds of two passes; every merge leaves a remainder that changes the pictures.
LEARN: dict[str, Any] = {
    "use_lora": True,
    "rank": 2,
    "learning_rate": 6e-2,
    "num_train_epochs": 4,
    "merge_every_epochs": 2,
    "validation_prompts": PROMPTS,
    "num_validation_images": PICTURES,
    "validation_inference_steps": 3,
    "validation_guidance_scale": 3.0,
    "seed": 5,
}
RUNS: dict[str, dict[str, Any]] = {
    "alone": {"num_shards": 1, "lora_alpha": 3},
    "average": {"lora_merge": "average", "lora_alpha": 3, "use_rslora": True},
    "full_rank": {"lora_export": "full_rank", "lora_alpha": 3, "use_rslora": True, "use_ema": True},
    "convolutions": {"lora_export": "full_rank", "lora_layers": "conv1,to_q,proj_in,linear_1,conv_in"},
    "truncate": {"lora_export": "truncate", "lora_alpha": 3},
    "fuse": {"lora_export": "fuse"},
}
# Draws what the output folders hold, each with a pipeline of its own, into an array (picture, height, width, 3).
DRAW = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
base, prompts, settings, target, *outputs = sys.argv[1:]
drawn = {}
for output in outputs:
    name, fused = output.rsplit("/", 1)[1], output.endswith("fuse")
    pipeline = DiffusionPipeline.from_pretrained(output if fused else base)
    if not fused:
        pipeline.load_lora_weights(output)
    pictures = []
    for prompt in json.loads(prompts):
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        pictures += pipeline([prompt] * 2, generator=generators, **json.loads(settings)).images
    drawn[name] = np.stack([np.asarray(picture) for picture in pictures])
np.savez(target, **drawn)
"""


@pytest.fixture(scope="module")
def outputs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each of `RUNS` left."""
    folder = tmp_path_factory.mktemp("lora")
    for name, settings in RUNS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        assert cli.main(["train", *words(flags(world, folder / name, **LEARN | settings))]) == 0
    return folder


@pytest.fixture(scope="module")
def redrawn(world: Path, outputs: Path) -> dict[str, np.ndarray]:
    """The validation pictures of each of `RUNS`, drawn by a fresh process that has diffusers alone."""
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": RESOLUTION, "width": RESOLUTION}
    folders = [str(outputs / name) for name in RUNS]
    arguments = [str(world / "base"), json.dumps(PROMPTS), json.dumps(settings), str(outputs / "drawn.npz"), *folders]
    # As it is started, it cannot see the package.
    alone = environment() | {"PYTHONPATH": ""}
    done = processes.run([sys.executable, "-c", DRAW, *arguments], env=alone, cwd=outputs)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr, "every tensor of the files was loaded"
    return dict(np.load(outputs / "drawn.npz"))


def drawn_by_trainer(output: Path, round_: int) -> np.ndarray:
    """The pictures that a validation sheet shows, row by row, below a band of 16 pixels each."""
    sheet = np.asarray(Image.open(output / "validation" / f"round-{round_:04d}.png"))
    rows = sheet.reshape(len(PROMPTS), 16 + RESOLUTION, -1, 3)[:, 16:, : PICTURES * RESOLUTION]
    return np.concatenate([np.stack(np.split(row, PICTURES, axis=1)) for row in rows])


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference, in grey levels."""
    assert one.shape == other.shape == (len(PROMPTS) * PICTURES, RESOLUTION, RESOLUTION, 3)
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_process_draws_what_the_trainer_drew(outputs, redrawn, name):
    before, after = (drawn_by_trainer(outputs / name, round_) for round_ in (0, 2))
    # So that a file which is loaded in part, or with another scaling, would be seen.
    assert apart(before, after) > 10
    if name == "truncate":
        assert 0 < apart(redrawn[name], after) < apart(before, after)
    else:
        assert apart(redrawn[name], after) <= (0 if name in ("alone", "average") else 1)


def test_the_tensors_have_kohya_s_names_and_the_shapes_of_diffusers_script(outputs):
    pipeline = with_adapter(tiny_sd(), r=2, lora_alpha=3, target_modules=ATTENTION)
    theirs = convert_state_dict_to_kohya(
        {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(pipeline.unet).items()}
    )
    expected = {name: tensor.shape for name, tensor in theirs.items() if not name.endswith(".alpha")}
    for name in ("alone", "average", "truncate"):
        assert {key: tensor.shape for key, tensor in load_file(outputs / name / LORA).items()} == expected
    assert load_file(outputs / "full_rank" / LORA).keys() == expected.keys()


@pytest.mark.parametrize("name", ["alone", "average", "truncate"])
def test_the_header_gives_the_rank_and_an_alpha_that_changes_nothing(outputs, name):
    with safe_open(outputs / name / LORA, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["unet.r"] == header["unet.lora_alpha"] == 2
    assert header["unet.rank_pattern"] == header["unet.alpha_pattern"] == {}


def test_what_is_exact_needs_a_higher_rank_and_the_card_says_what_truncation_lost(outputs):
    tensors = load_file(outputs / "full_rank" / LORA)
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name}
    assert max(ranks.values()) > 2
    card = (outputs / "truncate" / "README.md").read_text()
    assert "a LoRA file of rank 2, which lost " in card
    assert "load_lora_weights" in card
    for name in ("alone", "average", "full_rank", "fuse"):
        assert "which lost" not in (outputs / name / "README.md").read_text()


def test_the_fused_pipeline_is_the_base_but_for_the_layers_that_were_adapted(world, outputs):
    file = "unet/diffusion_pytorch_model.safetensors"
    ours, base = load_file(outputs / "fuse" / file), load_file(world / "base" / file)
    assert ours.keys() == base.keys()
    changed = {name for name in base if not torch.equal(ours[name], base[name])}
    assert changed == {name for name in base if name.removesuffix(".weight").endswith(tuple(ATTENTION))}
    index = "model_index.json"
    assert json.loads((outputs / "fuse" / index).read_text()) == json.loads((world / "base" / index).read_text())
    assert not (outputs / "fuse" / LORA).exists()


def test_a_run_that_saved_a_lora_file_left_no_pipeline(outputs):
    assert sorted(path.name for path in (outputs / "alone").iterdir() if not path.name.startswith("checkpoint")) == [
        "README.md",
        "card.json",
        "ledger.parquet",
        "metrics.jsonl",
        LORA,
        "run.html",
        "timings.jsonl",
        "training_config.yaml",
        "validation",
    ]

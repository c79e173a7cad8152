"""The page on adding a family: its program trains a pipeline that the package does not know, from outside of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LDMPipeline, UNet2DModel, VQModel
from tiny import save_images

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-family.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The page's program, a tiny pipeline of its kind, and images without captions."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "train_ldm.py").write_text(PROGRAM)
    save_images(folder / "my_photos", 6)
    (folder / "my_photos" / "metadata.jsonl").unlink()
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        vq_embed_dim=3,
        **blocks,
    )
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **blocks,
    )
    LDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "my_ldm")
    return folder


def run(world: Path, program: str, output: str) -> subprocess.CompletedProcess:
    flags = ["--pretrained_model_name_or_path", "my_ldm", "--train_data_dir", "my_photos", "--output_dir", output]
    small = ["--resolution", "16", "--num_shards", "2", "--merge_every_steps", "1", "--max_train_steps", "2"]
    drawn = ["--validation_inference_steps", "2", "--num_validation_images", "1", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    return processes.run([sys.executable, program, *flags, *small, *drawn], cwd=world, env=environment, timeout=200)


def test_the_program_of_the_page_trains_and_the_result_loads_and_draws(world):
    result = run(world, "train_ldm.py", "out")
    assert result.returncode == 0, result.stderr
    pipeline = DiffusionPipeline.from_pretrained(world / "out")
    before = DiffusionPipeline.from_pretrained(world / "my_ldm")
    assert type(pipeline).__name__ == "LDMPipeline"
    assert not torch.equal(pipeline.unet.conv_in.weight, before.unet.conv_in.weight)
    assert all(
        torch.equal(tensor, before.vqvae.state_dict()[name]) for name, tensor in pipeline.vqvae.state_dict().items()
    )
    assert pipeline(1, num_inference_steps=2).images[0].size == (16, 16)
    assert (world / "out" / "validation" / "before_after.png").is_file()


def test_the_program_is_shorter_than_a_hundred_lines():
    assert len(PROGRAM.splitlines()) < 100


def test_without_it_the_pipeline_is_refused_in_one_line_that_lists_the_families(world):
    result = run(world, str(ROOT / "train_iet_agc.py"), "none")
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "is a LDMPipeline" in line
    assert "StableDiffusionPipeline" in line
    assert "docs/add-a-family.md" in line

"""A pipeline and a dataset in memory are trained as those of the same contents on disk are."""

from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from runs import assert_equal, files
from safetensors.torch import load_file
from tiny import RESOLUTION, save_images, save_tiny_sd, tiny_sd

from iet_finetune import Config, Trainer, UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A pipeline in half precision, with a dropout, and a table of 8 images."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "drops", dropout=0.2)
    DiffusionPipeline.from_pretrained(folder / "drops").to(torch.float16).save_pretrained(folder / "base")
    save_images(folder / "images", 8)
    table = datasets.load_dataset("imagefolder", data_dir=str(folder / "images"), split="train")
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "train-00000-of-00001.parquet")
    return folder


def config(output: Path, **flags) -> Config:
    defaults = {
        "output_dir": str(output),
        "resolution": RESOLUTION,
        "train_batch_size": 2,
        "num_shards": 2,
        "num_train_epochs": 2,
        "merge_every_epochs": 1,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 0,
        "validation_prompts": ["a"],
        "num_validation_images": 1,
        "validation_inference_steps": 1,
        "report_to": "none",
    }
    return Config.from_flags(**{**defaults, **flags})


def on_disk(world: Path) -> dict[str, str]:
    return {"pretrained_model_name_or_path": str(world / "base"), "dataset_name": str(world / "table")}


def in_memory(world: Path) -> tuple[DiffusionPipeline, datasets.Dataset]:
    pipeline = DiffusionPipeline.from_pretrained(world / "base", dtype=torch.float16)
    # A format would make arrays of the images.
    table = datasets.load_dataset(str(world / "table"), split="train").with_format("numpy")
    return pipeline, table


def ledger(output: Path) -> list[dict]:
    """Without the names of the images, which say where they came from."""
    return pq.read_table(output / "ledger.parquet").drop_columns(["image"]).to_pylist()


@pytest.mark.parametrize("flags", [{"use_ema": True}, {"use_lora": True, "rank": 2, "mixed_precision": "bf16"}])
def test_what_is_passed_as_an_object_gives_the_same_bits_as_what_is_named(world, tmp_path, flags):
    named = Trainer(config(tmp_path / "named", **flags, **on_disk(world))).train()
    pipeline, table = in_memory(world)
    passed = Trainer(config(tmp_path / "passed", **flags), pipeline=pipeline, dataset=table).train()
    assert files(passed) == files(named)
    assert (passed / "metrics.jsonl").read_bytes() == (named / "metrics.jsonl").read_bytes()
    assert (passed / "README.md").read_bytes() == (named / "README.md").read_bytes()
    assert ledger(passed) == ledger(named)
    for file in passed.glob("*/*.json"):
        if not file.parent.name.startswith("checkpoint-"):
            assert file.read_bytes() == (named / file.relative_to(passed)).read_bytes(), file
    for file in [*passed.glob("*.safetensors"), *passed.glob("*/*.safetensors")]:
        assert_equal(load_file(file), load_file(named / file.relative_to(passed)))
    saved = yaml.safe_load((passed / "training_config.yaml").read_text())
    assert (saved["pretrained_model_name_or_path"], saved["dataset_name"]) == (None, None)


def test_the_pipeline_is_left_trained_in_its_precision_and_ready_to_draw(world, tmp_path):
    pipeline, table = in_memory(world)
    output = Trainer(config(tmp_path / "out"), pipeline=pipeline, dataset=table).train()
    assert_equal(pipeline.unet.state_dict(), load_file(output / UNET))
    assert not pipeline.unet.training
    assert {tensor.dtype for tensor in pipeline.vae.state_dict().values()} == {torch.float16}
    assert not torch.equal(pipeline.unet.conv_in.weight, in_memory(world)[0].unet.conv_in.weight)


def test_a_trained_adapter_is_left_active_in_the_pipeline(world, tmp_path):
    pipeline, table = in_memory(world)
    flags = {"use_lora": True, "rank": 2, "lora_export": "full_rank", "num_train_epochs": 1}
    output = Trainer(config(tmp_path / "out", **flags), pipeline=pipeline, dataset=table).train()
    theirs = in_memory(world)[0]
    base = draw(theirs)
    theirs.load_lora_weights(output)
    torch.testing.assert_close(draw(pipeline), draw(theirs), atol=2e-2, rtol=0)
    assert (draw(theirs) - base).abs().max() > 5e-2


def draw(pipeline: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pipeline.to(torch.float32)
    options = {"num_inference_steps": 2, "output_type": "pt", "height": RESOLUTION, "width": RESOLUTION}
    return pipeline("a thing", generator=generator, **options).images


def test_a_run_goes_on_with_the_same_contents_in_memory_and_refuses_others(world, tmp_path):
    whole = Trainer(config(tmp_path / "whole", **on_disk(world))).train()
    output = Trainer(config(tmp_path / "out", num_train_epochs=1, **on_disk(world))).train()
    pipeline, table = in_memory(world)
    resumed = config(output, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="the training data has changed"):
        Trainer(resumed, pipeline=pipeline, dataset=table.select(range(7)))
    with pytest.raises(UserError, match="the base model has changed"):
        Trainer(resumed, pipeline=tiny_sd(seed=1), dataset=table)
    Trainer(resumed, pipeline=in_memory(world)[0], dataset=table).train()
    assert_equal(load_file(output / UNET), load_file(whole / UNET))


@pytest.mark.parametrize(
    ("flags", "objects", "told"),
    [
        ({"train_data_dir": "images"}, {}, "`--train_data_dir images` does not go with a dataset that is passed"),
        ({"model_config": "cifar10"}, {}, "`--model_config cifar10` does not go with a pipeline that is passed"),
        ({"smoke": True}, {}, "`--smoke True` does not go with a pipeline"),
        ({}, {"pipeline": "base"}, "`pipeline` must be a loaded diffusers pipeline, not a str"),
        ({}, {"dataset": {"train": []}}, "`dataset` must be a `datasets.Dataset`, such as one split of"),
        ({"caption_column": "words"}, {}, "`--caption_column words`"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(world, tmp_path, flags, objects, told):
    pipeline, table = in_memory(world)
    with pytest.raises(UserError) as error:
        Trainer(config(tmp_path / "out", **flags), **{"pipeline": pipeline, "dataset": table, **objects})
    assert told in str(error.value)
    assert "\n" not in str(error.value)

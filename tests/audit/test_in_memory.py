"""`audit()` in a notebook: the numbers of the command, from a pipeline and images in memory that stay as they were."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from audit_runs import run_audit, save_mosaic
from datasets import load_dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import save_images, save_tiny_sd

from iet_finetune import UserError
from iet_finetune.audit import AuditRecord, audit
from iet_finetune.families.fingerprint import pipeline_fingerprint

SMALL = {"num_images": 3, "num_inference_steps": 2, "eval_batch_size": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_images(folder / "train", 12)
    save_images(folder / "held", 8, seed=1)
    save_tiny_sd(folder / "pipeline")
    save_tiny_sd(folder / "base", seed=1)
    save_mosaic(folder)
    return folder


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted(folder.glob("*.png"))]


def from_file(output: Path) -> AuditRecord:
    return AuditRecord.from_json(json.loads((output / "audit.json").read_text()))


def test_a_pipeline_in_memory_gives_the_record_of_the_command_and_is_handed_back_as_it_came(world, tmp_path):
    folders = {"train_data_dir": world / "train", "holdout_data_dir": world / "held"}
    names = {"model": world / "pipeline", "reference_model": world / "base", "features": world / "mosaic.pt"}
    run_audit(tmp_path / "out", **folders, **names, **SMALL)
    pipeline, base = (DiffusionPipeline.from_pretrained(world / name) for name in ("pipeline", "base"))
    pipeline.unet.train()
    before = pipeline_fingerprint(pipeline), pipeline.scheduler, dict(pipeline.config)
    heldout = load_dataset(str(world / "held"), split="train", cache_dir=str(tmp_path / "cache"))
    features = [str(world / "mosaic.pt")]
    record = audit(pipeline, world / "train", heldout, reference=base, features=features, silent=True, **SMALL)
    assert record.metrics == from_file(tmp_path / "out").metrics
    assert record == from_file(tmp_path / "out")
    assert "mia_ref_auc" in record.metrics
    assert (pipeline_fingerprint(pipeline), pipeline.scheduler, dict(pipeline.config)) == before
    assert pipeline.unet.training
    assert not pipeline.vae.training
    assert all(tensor.requires_grad for tensor in pipeline.unet.parameters())


def test_lists_of_images_give_the_metrics_of_their_folders(world, tmp_path):
    flags = {"resolution": 16, "eval_batch_size": 4}
    folders = {"train_data_dir": world / "train", "holdout_data_dir": world / "held", "generated_dir": world / "train"}
    run_audit(tmp_path / "out", **folders, features=world / "mosaic.pt", **flags)
    train, held = opened(world / "train"), opened(world / "held")
    record = audit(None, train, held, generated_images=train, features=[str(world / "mosaic.pt")], **flags)
    assert record.metrics == from_file(tmp_path / "out").metrics
    assert record.metrics["f_mem"].value == 1.0


def test_an_image_that_was_edited_after_it_was_opened_counts_as_it_is(world):
    edited = opened(world / "train")
    for image in edited:
        image.paste((0, 0, 0), (0, 0, *image.size))
    record = audit(None, edited, opened(world / "held"), generated_images=edited, features=[str(world / "mosaic.pt")])
    assert record.data.distinct == 1


def test_files_are_left_only_where_that_is_asked_for(world, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    train, features = world / "train", [str(world / "mosaic.pt")]
    audit(None, train, generated_images=train, features=features)
    assert list((tmp_path / "temporary").iterdir()) == []
    record = audit(None, train, generated_images=train, features=features, output_dir=tmp_path / "out")
    assert from_file(tmp_path / "out") == record
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 1.0}, "`learning_rate` is no flag that `audit()` takes"),
        ({"train_data_dir": "x"}, "`train_data_dir` is no flag that `audit()` takes"),
        ({"num_images": 3}, "`--num_images 3` does nothing with `--generated_dir`"),
        ({"heldout_images": ["a.png"]}, "images must be a folder, a `datasets.Dataset`, or a list of PIL images"),
        ({"heldout_images": "nowhere"}, "`--holdout_data_dir nowhere` is not a folder"),
        ({"generated_images": None}, "nothing to judge"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(world, arguments, words):
    given = {"generated_images": opened(world / "train"), "features": [str(world / "mosaic.pt")]} | arguments
    with pytest.raises(UserError) as error:
        audit(None, opened(world / "train"), **given)
    assert words in str(error.value)


def test_a_pipeline_in_half_precision_is_refused(world):
    pipeline = DiffusionPipeline.from_pretrained(world / "pipeline").to(torch.float16)
    with pytest.raises(UserError, match=r"the pipeline's \w+ is in torch.float16: load it with"):
        audit(pipeline, world / "train", features=[str(world / "mosaic.pt")])

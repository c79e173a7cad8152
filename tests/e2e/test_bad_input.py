"""Mistakes in flags, files, data and pipelines: each ends in one line that names it and says what to do."""

import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from e2e.command import contents, flags, leftovers, run_script, the_error, words

from iet_finetune import cli

Spoil = Callable[[Path], dict[str, Any]]
MISSING_TRACKER = next((name for name in ("wandb", "trackio", "comet_ml", "mlflow") if not find_spec(name)), None)


def changed(**changes: Any) -> Spoil:
    """Only flags are wrong."""
    return lambda _: changes


def lora(**changes: Any) -> Spoil:
    """Only flags are wrong, of a run that trains an adapter."""
    return changed(use_lora=True, **changes)


def written(path: str, text: str, **changes: Any) -> Spoil:
    """A file holds something else."""

    def spoil(folder: Path) -> dict[str, Any]:
        (folder / path).write_text(text)
        return changes

    return spoil


def yaml_file(text: str) -> Spoil:
    """`--config` names a file that holds `text`."""

    def spoil(folder: Path) -> dict[str, Any]:
        (folder / "run.yaml").write_text(text)
        return {"config": folder / "run.yaml"}

    return spoil


def without(path: str, **changes: Any) -> Spoil:
    """A file or folder is not there."""

    def spoil(folder: Path) -> dict[str, Any]:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
        return changes

    return spoil


def rows(edit: Callable[[list[dict[str, Any]]], object], **changes: Any) -> Spoil:
    """The rows of metadata.jsonl are edited."""

    def spoil(folder: Path) -> dict[str, Any]:
        file = folder / "data" / "metadata.jsonl"
        table = [json.loads(line) for line in file.read_text().splitlines()]
        edit(table)
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        return changes

    return spoil


def table(name: str, data: bytes, keep: bool = False) -> Spoil:
    """A file lies beside the images, and unless `keep` it takes the place of metadata.jsonl."""

    def spoil(folder: Path) -> dict[str, Any]:
        (folder / "data" / name).write_bytes(data)
        if not keep:
            (folder / "data" / "metadata.jsonl").unlink()
        return {}

    return spoil


def archive(folder: Path) -> dict[str, Any]:
    """A folder holds an archive."""
    (folder / "photos.zip").write_bytes(b"PK")
    return {}


def weights(header: bytes) -> Spoil:
    """The denoiser's weights begin with `header` and end there."""

    def spoil(folder: Path) -> dict[str, Any]:
        (folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(header)
        return {}

    return spoil


def unknown_pipeline(folder: Path) -> dict[str, Any]:
    """The pipeline is one that no family knows."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    DDPMPipeline(UNet2DModel(sample_size=8, norm_num_groups=2, **blocks), DDPMScheduler()).save_pretrained(
        folder / "pixels"
    )
    index = folder / "pixels" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "PNDMPipeline"))
    return {"pretrained_model_name_or_path": folder / "pixels"}


def empty_images(folder: Path) -> dict[str, Any]:
    """`--train_data_dir` has no images."""
    (folder / "empty").mkdir()
    return {"train_data_dir": folder / "empty"}


def occupied(folder: Path) -> dict[str, Any]:
    """A file lies where the output folder is to be."""
    (folder / "taken").write_text("mine")
    return {"output_dir": folder / "taken"}


def used(folder: Path) -> dict[str, Any]:
    """The output folder holds something of the user's."""
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return {}


FLAGS = {
    "an unknown flag": (changed(num_shard=2), ["`--num_shard`", "Did you mean `--num_shards`?"]),
    "several unknown flags": (
        changed(num_shard=2, network_dim=8, enable_bucket=True, foo=1),
        [
            "`--num_shard` (did you",
            "`--network_dim` (it is `--rank` here",
            "`--enable_bucket` (it is `--aspect_ratio_buckets auto`",
            "`--foo`.",
        ],
    ),
    "a switch with another value": (changed(**{"use_ema=maybe": True}), ["`--use_ema` is a switch", "'maybe'"]),
    "steps in two ways": (
        changed(max_train_steps=2, total_train_steps=6),
        ["`--max_train_steps` (of each clone) and `--total_train_steps` (of all) cannot both be given"],
    ),
    "a word without a flag": (changed(train_batch_size=["2", "4"]), ["unexpected argument '4'"]),
    "a wrong type": (changed(num_shards="many"), ["`--num_shards` must be of type int, not 'many'"]),
    "a number that is not finite": (changed(learning_rate="nan"), ["`--learning_rate` must be a finite number"]),
    "patience without a stop": (changed(stop_patience=5), ["`--stop_patience 5` does nothing without `--stop_when"]),
    "no shards": (changed(num_shards=0), ["`--num_shards` must be at least 1, not 0"]),
    "a threshold of 1": (changed(agc_threshold=1.0), ["`--agc_threshold` must be in [0, 1), not 1.0"]),
    "a negative learning rate": (changed(learning_rate=-1), ["`--learning_rate` must be 0 or more"]),
    "a value that is none of the choices": (changed(lr_scheduler="cosin"), ["`--lr_scheduler`", "cosine", "'cosin'"]),
    "an unknown tracker": (changed(report_to="tensorbord"), ["`--report_to`", "tensorboard", "'tensorbord'"]),
    "both merge intervals": (changed(merge_every_steps=3), ["`--merge_every_epochs` and `--merge_every_steps`"]),
    "stratified without a column": (changed(shard_strategy="stratified"), ["`--shard_by_column COLUMN`"]),
    "no images at all": (changed(train_data_dir=None), ["`--train_data_dir FOLDER` or `--dataset_name NAME`"]),
    "both sources of images": (changed(dataset_name="x/y"), ["`--train_data_dir` and `--dataset_name`", "choose one"]),
    "no pipeline": (changed(pretrained_model_name_or_path=None), ["`--pretrained_model_name_or_path` is missing"]),
    "rank 0": (lora(rank=0), ["`--rank` must be at least 1, not 0"]),
    "alpha 0": (lora(lora_alpha=0), ["`--lora_alpha` must be at least 1, not 0"]),
    "an adapter that is always dropped": (lora(lora_dropout=1), ["`--lora_dropout` must be in [0, 1), not 1.0"]),
    "an empty name among the layers": (lora(lora_layers="to_q,,to_k"), ["`--lora_layers to_q,,to_k`", "empty name"]),
    "no names of layers": (lora(lora_layers=""), ["`--lora_layers ", "empty name"]),
    "DoRA": (lora(use_dora=True), ["`--use_dora`", "not low-rank", "leave it out"]),
    "a rank without LoRA": (changed(rank=8), ["`--rank 8` does nothing without `--use_lora`"]),
    "an outer optimizer and exact merging": (lora(outer_lr=0.5), ["`--outer_lr 0.5`", "`--lora_merge exact`"]),
    "outer momentum and exact merging": (lora(outer_momentum=0.9), ["`--outer_momentum 0.9`", "`--lora_merge exact`"]),
    "an unknown merge": (lora(lora_merge="mean"), ["`--lora_merge`", "exact, average, freeze_a", "'mean'"]),
    "an unknown YAML key": (yaml_file("num_shard: 2"), ["`num_shard`", "run.yaml", "Did you mean `num_shards`?"]),
    "several unknown YAML keys": (
        yaml_file("num_shard: 2\nlora_rank: 4\nfoo: 1"),
        ["unknown keys in", "run.yaml", "`num_shard` (did you", "`lora_rank` (it is `--rank` here", "`foo`."],
    ),
    "a wrong type in YAML": (yaml_file("seed: [1, 2]"), ["`seed` in `--config", "run.yaml", "must be of type int"]),
    "a YAML file that is missing": (changed(config="nowhere.yaml"), ["`--config nowhere.yaml` cannot be read"]),
    "a file that is not YAML": (yaml_file("seed: [1"), ["run.yaml` is not valid YAML"]),
    "a YAML file that is no mapping": (yaml_file("- seed"), ["run.yaml` must hold `key: value` lines, not a list"]),
}

DATA = {
    "an image folder that is missing": (without("data"), ["`--train_data_dir", "data` is not a folder"]),
    "a folder without images": (empty_images, ["`--train_data_dir", "empty` has no images"]),
    "no captions": (
        without("data/metadata.jsonl"),
        ["12 images have no caption (`000.png`", "and 2 more", "to metadata.jsonl", "`--default_caption TEXT`"],
    ),
    "a file that is no image": (
        written("data/004.png", "text"),
        ["1 image cannot be read (`004.png` is not an image that Pillow can read)", "`--skip_bad_images`"],
    ),
    "an empty file": (written("data/004.png", ""), ["1 image cannot be read (`004.png` "]),
    "a missing caption column": (changed(caption_column="cap"), ["`--caption_column cap`", "image, text, kind"]),
    "a missing image column": (changed(image_column="img"), ["`--image_column img`", "image, text, kind"]),
    "a missing label column": (
        changed(shard_strategy="stratified", shard_by_column="breed"),
        ["`--shard_by_column breed`", "image, text, kind"],
    ),
    "an image without a row": (rows(lambda table: table.pop(3)), ["1 image has no caption (`003.png`)"]),
    "a row without a file": (without("data/003.png"), ["1 row names a file that is not there (`003.png` in line 4"]),
    "a caption that is not text": (
        rows(lambda table: table[2].update(text={"en": 5})),
        ["line 3 of `metadata.jsonl` (`002.png`) has {'en'", "not text"],
    ),
    "a caption that is missing": (
        rows(lambda table: table[2].update(text=None)),
        ["1 image has no caption (line 3 of `metadata.jsonl` (`002.png`))"],
    ),
    "metadata that is not JSON": (written("data/metadata.jsonl", "{"), ["line 1 of `metadata.jsonl` is not JSON"]),
    "a table in another encoding": (
        table("captions.csv", "file_name,text\n000.png,caf\xe9\n".encode("latin-1")),
        ["captions.csv` cannot be read: line 2 has the byte 0xe9, which is not UTF-8"],
    ),
    "a table of zero bytes": (table("metadata.csv", "file_name,text\n".encode("utf-16-le")), ["it has zero bytes"]),
    "a table without a header": (
        table("metadata.csv", b"000.png,red\n001.png,blue\n"),
        ["has no column `file_name`", "000.png, red"],
    ),
    "a table with a comma too many": (
        table("metadata.csv", b"file_name,text\n000.png,red, round\n"),
        ["line 2 of `metadata.csv` has 3 fields instead of 2: texts with the separator in them need quotes"],
    ),
    "a table that is none": (table("metadata.parquet", b"<html>"), ["metadata.parquet` cannot be read: "]),
    "a table of another JSON": (table("metadata.json", b"7"), ["metadata.json` cannot be read: it is not a list of"]),
    "two tables that contradict": (
        table("captions.csv", b"file_name,text\n000.png,something else\n", keep=True),
        ["1 image has different captions in two places (`000.png`: `000.png` in `captions.csv` and"],
    ),
    "a text file that contradicts": (
        table("000.txt", b"something else", keep=True),
        ["1 image has different captions in two places (`000.png`: line 1 of `metadata.jsonl` and `000.txt`)"],
    ),
    "a text file that is no text": (
        table("000.txt", b"\xff\xd8\xff\xe0"),
        ["000.txt` cannot be read: line 1 has the byte"],
    ),
    "a picture of another program": (
        table("photo.cr2", b"II*", keep=True),
        ["1 image cannot be read (`photo.cr2`: Pillow does not read .cr2: convert it to PNG)"],
    ),
    "archives alone": (
        lambda folder: {**empty_images(folder), **archive(folder / "empty")},
        ["has no images, but 1 .zip (unpack archives)"],
    ),
    "a caption for a model without prompts": (
        changed(model_config="fashion_mnist", pretrained_model_name_or_path=None, default_caption="a"),
        ["`--default_caption a`"],
    ),
    "more shards than images": (changed(num_shards=13), ["`--num_shards 13` needs at least 13 images", "are 12"]),
    "a holdout of everything": (changed(holdout_fraction=0.99), ["`--holdout_fraction 0.99` of 12 images"]),
    "a holdout of nothing": (changed(holdout_fraction=0.01), ["`--holdout_fraction 0.01` of 12 images"]),
    "too few images after the holdout": (changed(holdout_fraction=0.9), ["`--num_shards 3` needs at least 3 images"]),
    "a data set without network": (
        changed(train_data_dir=None, dataset_name="nobody/cats"),
        ["`--dataset_name nobody/cats`", "Check the name and the network"],
    ),
}

BASE = "pretrained_model_name_or_path"
PIPELINE = {
    "a missing folder": (changed(**{BASE: "/nowhere/sd"}), [f"`--{BASE} /nowhere/sd`", "no such folder"]),
    "a name that is too long": (changed(**{BASE: "x" * 300}), [f"`--{BASE} xxx", "Check the name"]),
    "a folder that is no pipeline": (without("base/model_index.json"), ["is not a diffusers pipeline"]),
    "a damaged index": (written("base/model_index.json", '{"_cl'), ["base/model_index.json` is damaged", "anew"]),
    "an index without a class": (
        written("base/model_index.json", "{}"),
        ["base/model_index.json` is no index", "`_class_name`"],
    ),
    "an unknown family": (unknown_pipeline, ["is a PNDMPipeline", "can be trained", "StableDiffusionPipeline"]),
    "no weights": (weights(b""), ["base/unet/", "safetensors` is damaged", "anew"]),
    "weights cut off": (
        weights(struct.pack("<Q", 10_000) + b'{"a'),
        ["base/unet/", "safetensors` is damaged", "anew"],
    ),
    "weights that are none": (weights(b"<html>not found</html>"), ["base/unet/", "safetensors` is damaged", "anew"]),
    "weights that are missing": (without("base/unet/diffusion_pytorch_model.safetensors"), [f"--{BASE}", "base/unet"]),
    "a component that is missing": (without("base/vae"), ["base` is not complete", "vae, but its folder is missing"]),
    "a tokenizer without words": (without("base/tokenizer/tokenizer.json"), ["base/tokenizer` has no vocabulary"]),
    "classes for a pipeline that takes none": (
        changed(class_column="text"),
        ["`--class_column text`", "StableDiffusionPipeline takes no classes"],
    ),
    "a Hub id without network": (changed(**{BASE: "nobody/sd"}), [f"`--{BASE} nobody/sd`", "Check the name"]),
    "a resolution that does not fit": (changed(resolution=18), ["`--resolution 18`", "multiple of 4", "16 or 20"]),
    "a layer that the denoiser has not": (
        lora(lora_layers="to_q,nosuch"),
        ["`--lora_layers`", "UNet", "named nosuch"],
    ),
    "a layer that cannot have an adapter": (
        lora(lora_layers="norm1"),
        ["`--lora_layers`", "norm1 is a", "only linear"],
    ),
    "more denoising steps than there are": (
        changed(validation_prompts=["a"], validation_inference_steps=11),
        ["`--validation_inference_steps 11`", "the 10 steps"],
    ),
}

OUTPUT = {
    "a file in place of the folder": (occupied, ["`--output_dir", "taken` cannot be written"]),
    "a place that cannot be written": (
        changed(output_dir="/dev/null/out"),
        ["`--output_dir /dev/null/out` cannot be"],
    ),
    "a folder that is not empty": (used, ["out` is not empty", "`--resume_from_checkpoint latest`"]),
    "a folder of other things": (
        lambda folder: {**used(folder), "resume_from_checkpoint": "latest"},
        ["out` is not empty and holds no run to go on with"],
    ),
    "a log folder that cannot be made": (
        changed(report_to="tensorboard", logging_dir="/dev/null/logs"),
        ["`--logging_dir`: /dev/null/logs cannot be made"],
    ),
    "a checkpoint that is not there": (
        changed(resume_from_checkpoint="checkpoint-7"),
        ["`--resume_from_checkpoint checkpoint-7`", "no complete checkpoint", "has: none"],
    ),
}

MACHINE = {
    "fp16 without a GPU": pytest.param(
        changed(mixed_precision="fp16"),
        ["`--mixed_precision fp16`", "GPU"],
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has fp16"),
    ),
    "a tracker that is not installed": pytest.param(
        changed(report_to=MISSING_TRACKER),
        [f"`--report_to {MISSING_TRACKER}` needs a package: `pip install"],
        marks=pytest.mark.skipif(MISSING_TRACKER is None, reason="every tracker is installed"),
    ),
    "8-bit Adam that is not installed": pytest.param(
        changed(use_8bit_adam=True),
        ["`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`"],
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
    ),
}

MISTAKES = {**FLAGS, **DATA, **PIPELINE, **OUTPUT, **MACHINE}


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline and the images that a test may spoil."""
    for name in ("base", "data"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("spoil", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line_that_names_it_and_leaves_every_file_as_it_was(copy, capfd, spoil, named):
    settings = {**flags(copy, copy / "out"), **spoil(copy)}
    before = contents(copy)
    code = cli.main(["train", *words(settings)])
    line = the_error(code, *capfd.readouterr())
    for part in named:
        assert part in line
    assert line.endswith((".", "?")), "a whole sentence"
    assert contents(copy) == before


@pytest.mark.parametrize("name", ["an unknown flag", "a file that is no image", "weights cut off"])
def test_the_script_itself_ends_in_that_line(copy, name):
    spoil, named = MISTAKES[name]
    done = run_script(*words({**flags(copy, copy / "out"), **spoil(copy)}))
    line = the_error(done.returncode, done.stdout, done.stderr)
    assert all(part in line for part in named)
    assert not leftovers(copy)


@pytest.fixture
def finished(world: Path, tmp_path: Path) -> Path:
    """A copy of what a finished run left."""
    return Path(shutil.copytree(world / "trained", tmp_path / "out"))


def test_resuming_with_another_number_of_shards_is_refused_and_nothing_is_lost(world, finished, capfd):
    before = contents(finished)
    settings = flags(world, finished, num_shards=2, resume_from_checkpoint="latest")
    line = the_error(cli.main(["train", *words(settings)]), *capfd.readouterr())
    assert "`--num_shards` has changed (3 then, 2 now). Put it back" in line
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("manifest.json", b'{"format"', "manifest.json cannot be read"),
        ("manifest.json", b"[]", "manifest.json names no pieces"),
        ("manifest.json", b'{"format": 99, "pieces": {}}', "has format 99"),
        ("denoiser.safetensors", b"", "denoiser.safetensors cannot be read"),
        ("denoiser.safetensors", None, "denoiser.safetensors is missing"),
        ("shard-00001/clone.pt", b"PK", "shard-00001/clone.pt cannot be read"),
        ("shard-00001/moments.pt", b"", "shard-00001/moments.pt cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_fault(world, finished, capfd, name, data, said):
    checkpoint = finished / "checkpoint-6"
    (checkpoint / name).unlink() if data is None else (checkpoint / name).write_bytes(data)
    before = contents(finished)
    settings = flags(world, finished, resume_from_checkpoint="latest")
    line = the_error(cli.main(["train", *words(settings)]), *capfd.readouterr())
    assert line.startswith(f"checkpoint {checkpoint} ")
    assert said in line
    assert contents(finished) == before


@pytest.fixture(scope="module")
def adapted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run of an adapter of rank 2 left."""
    output = tmp_path_factory.mktemp("adapted") / "out"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", *words(flags(world, output, use_lora=True, rank=2))]) == 0
    return output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, "`--rank` has changed (2 then, 4 now)"),
        ({"rank": 2, "lora_alpha": 8}, "`--lora_alpha` has changed (None then, 8 now)"),
        ({"rank": 2, "lora_merge": "average"}, "`--lora_merge` has changed (exact then, average now)"),
        ({"rank": 2, "lora_layers": "to_q"}, "`--lora_layers` has changed (None then, to_q now)"),
        ({"rank": 2, "use_rslora": True}, "`--use_rslora` has changed (False then, True now)"),
        ({"use_lora": False}, "`--use_lora` has changed (True then, False now)"),
    ],
)
def test_resuming_with_another_adapter_is_refused_and_nothing_is_lost(world, adapted, capfd, changes, said):
    before = contents(adapted)
    settings = flags(world, adapted, resume_from_checkpoint="latest", **{"use_lora": True, **changes})
    line = the_error(cli.main(["train", *words(settings)]), *capfd.readouterr())
    assert said in line
    assert contents(adapted) == before

"""`iet-finetune fit` goes from a folder of images to an audited adapter in one command, and says what it chose."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import RESOLUTION, save_images, save_tiny_sd

from iet_finetune import cli
from iet_finetune.cli.fit_command import own_side

# So that a tiny pipeline is done soon.
SHORT = [
    *("--num_train_epochs", "2", "--merge_every_epochs", "1", "--validation_inference_steps", "2"),
    *("--num_images", "8", "--num_inference_steps", "2", "--membership_images", "8", "--report_to", "none"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=20)
    save_images(folder / "photos", 30)
    return folder


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory) -> tuple[Path, str]:
    """The output folder, and what was printed."""
    output = tmp_path_factory.mktemp("out") / "my model"
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main(["fit", str(world / "photos"), "--base", str(world / "base"), f"--output={output}", *SHORT])
    assert code == 0
    return output, said.getvalue()


def test_it_ends_with_an_adapter_a_page_and_an_audit_that_compares_with_held_out_images(fitted):
    output, _ = fitted
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert (output / "run.html").is_file()
    audit = json.loads((output / "audit" / "audit.json").read_text())
    assert audit["data"]["heldout_images"] == 8


def test_it_says_what_it_chose_and_why_but_not_what_it_was_given(fitted):
    _, said = fitted
    told = dict(re.findall(r"^  --(\w+) (.*?): ", said, flags=re.MULTILINE))
    assert told["holdout_fraction"] == "0.27"
    assert told["skip_rule"] == "guard"
    assert told["resolution"] == str(RESOLUTION)
    assert told["rank"] == "4"
    assert "num_train_epochs" not in told
    assert said.splitlines()[-1].startswith("to train again, also with other settings: iet-finetune train --config ")


def test_the_file_that_it_leaves_does_the_same_without_choosing(fitted, tmp_path):
    output, said = fitted
    flags = yaml.safe_load((output / "training_config.yaml").read_text())
    assert flags["dedup"] == "near"
    assert flags["stop_when"] == "auto"
    again = ["train", "--config", str(output / "training_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert cli.main([*again, "--no_audit"]) == 0
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


def test_what_is_given_in_another_way_is_not_chosen(world, tmp_path, capsys):
    flags = ["--max_train_steps", "6", "--merge_every_steps", "3", "--no_audit", "--validation_inference_steps", "2"]
    fit = ["fit", str(world / "photos"), "--base", str(world / "base"), "--output", str(tmp_path / "out"), *flags]
    assert cli.main(fit) == 0
    said = capsys.readouterr().out
    assert "--num_train_epochs" not in said
    assert "--merge_every_epochs" not in said
    assert "2 rounds" in said
    assert (tmp_path / "out" / "validation" / "before_after.png").is_file(), "of the round that is kept"


def test_images_of_several_shapes_keep_them(world, tmp_path, capsys):
    save_images(tmp_path / "wide", 8)
    for file in sorted((tmp_path / "wide").glob("*.png"))[:6]:
        with Image.open(file) as image:
            wide = image.resize((image.width * 3 // 2, image.height))
        wide.save(file)
    flags = ["--max_train_steps", "2", "--merge_every_steps", "2", "--no_audit", "--validation_inference_steps", "1"]
    flags += ["--output", str(tmp_path / "out"), "--report_to", "none"]
    assert cli.main(["fit", str(tmp_path / "wide"), "--base", str(world / "base"), *flags]) == 0
    said = capsys.readouterr().out
    assert "--aspect_ratio_buckets auto: squares would cut off 25% of the images, on average" in said
    assert "sizes: " in said


@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_help_shows_the_short_names_in_two_levels_and_no_default_of_what_is_chosen(capsys, option):
    with pytest.raises(SystemExit):
        cli.main(["fit", option])
    said = capsys.readouterr().out
    assert "--base STR" in said
    assert "--output STR" in said
    assert "--config" not in said
    assert re.search(r"--learning_rate FLOAT +Learning rate after warm-up. \(default: chosen\)", said)
    assert ("--adam_beta2" in said) == (option == "--help-all")
    assert option == "--help-all" or len(said.splitlines()) <= 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images: name their folder, as in `iet-finetune fit my_photos --base HUB_ID`."),
        (["{photos}"], "`--base` is missing: give the Hub id or folder of the pipeline to fine-tune."),
        (["{photos}", "--base", "{base}", "--rnak", "3"], "unknown flag `--rnak`. Did you mean `--rank`?"),
        (["{photos}", "--config", "demo"], "`--config` goes with `iet-finetune train`"),
        (["{bare}", "--base", "{base}"], 'give all of them one with `--default_caption "a photo of sks dog"`'),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, capsys, arguments, message):
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(bare / "a.png")
    words = [each.format(photos=world / "photos", base=world / "base", bare=bare) for each in arguments]
    assert cli.main(["fit", *words, "--output", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[transformers] ")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


def test_the_side_of_a_pipeline_is_read_from_its_files_else_usual(world, tmp_path):
    assert own_side(world / "base", "unet", "StableDiffusionPipeline") == RESOLUTION
    assert own_side(None, "unet", "StableDiffusionPipeline") == 512
    assert own_side(tmp_path, "transformer", "FluxPipeline") == 1024

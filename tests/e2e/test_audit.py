"""The command `audit` on pipelines that were trained here and elsewhere, cut short and taken up, and `--audit`."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from audit_runs import read_audit, save_mosaic
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from e2e.command import contents, environment, flags, run_by_hand, the_error, words
from hub_server import HubServer
from huggingface_hub import ModelCard
from tiny import RESOLUTION, save_images, tiny_sd

from iet_finetune import cli
from iet_finetune.publish.upload_list import upload_list

TOKEN = "hf_thisIsNotARealTokenButItLooksLikeOne03"
AUDIT = [sys.executable, "-m", "iet_finetune", "audit"]
OF_THE_MODEL = ("mia_auc", "mia_tpr_at_1_fpr", "heldout_loss", "prompt_memorization", "prompt_memorization_auc")
OF_A_REFERENCE = ("mia_ref_auc", "mia_ref_tpr_at_1_fpr")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images that were not trained on in `held`, and features in `mosaic.pt`."""
    folder = tmp_path_factory.mktemp("held")
    save_images(folder / "held", 10, seed=5)
    captions = folder / "held" / "metadata.jsonl"
    captions.write_text(captions.read_text().replace("thing", "other"))
    save_mosaic(folder)
    return folder


def small(held: Path, **changes: Any) -> dict[str, Any]:
    """Flags of an audit of a few small images."""
    images = {"num_images": 5, "num_inference_steps": 2, "eval_batch_size": 4}
    return {"holdout_data_dir": held / "held", "features": held / "mosaic.pt", **images, **changes}


def audit(output: Path, **settings: Any) -> dict[str, Any]:
    """Runs the command in this process; it must succeed."""
    assert cli.main(["audit", *words({**settings, "output_dir": output})]) == 0
    return read_audit(output)


@pytest.fixture(scope="module")
def audited(world: Path, held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with `--audit` left."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    output = tmp_path_factory.mktemp("audited") / "out"
    settings = flags(world, output, audit=True, **small(held))
    assert cli.main(["train", *words(settings)]) == 0
    return output


def test_a_run_ends_with_an_audit_of_what_it_saved(audited):
    found = read_audit(audited / "audit")
    assert found["model"] == "out"
    assert found["data"]["generated_images"] == 5
    assert set(found["metrics"]) >= {"f_mem", "frechet_mosaic", *OF_THE_MODEL, *OF_A_REFERENCE}
    assert found["not_measured"]["clip_score"] == "needs `--clip_model`"
    for metric in found["metrics"].values():
        assert metric.keys() >= {"value", "low", "high", "baseline"}
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert (audited / "audit" / "report.html").stat().st_size > 10_000
    pair = json.loads((audited / "audit" / "pairs.json").read_text())[0]
    # One pass: every image was seen once.
    assert (pair["seen"], pair["skipped"], pair["repeats"]) == (1, 0, 1)


def test_the_card_shows_the_audit(audited):
    card = ModelCard.load(audited / "README.md")
    found = read_audit(audited / "audit")
    assert card.text.count("\n## Audit\n") == 1
    assert card.text.index("## Audit") < card.text.index("## Limits") < card.text.index("## License")
    assert "Memorization of this pipeline: not measured." not in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["f_mem"] == found["metrics"]["f_mem"]["value"]
    assert results["mia_ref_auc"] == found["metrics"]["mia_ref_auc"]["value"]
    assert str(audited) not in str(card)


def test_training_images_are_published_only_if_that_is_asked_for(audited, world):
    plain = upload_list(audited)
    assert [name for name in plain if name.startswith("audit/")] == ["audit/audit.json"]
    asked = upload_list(audited, audit_images=True)
    assert asked.keys() - plain.keys() == {"audit/report.html"}
    report = bytes(asked["audit/report.html"]).decode()
    assert "data:image/png;base64," in report
    for local in (audited, world):
        assert str(local) in (audited / "audit" / "report.html").read_text()
        assert str(local) not in report


def test_a_run_is_pushed_with_its_audit_and_audited_from_the_hub(audited, world, held, tmp_path):
    with HubServer(TOKEN) as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        there |= {"HF_HUB_DISABLE_XET": "1"}
        command = [*AUDIT[:-1], "push", str(audited), "--hub_model_id", "user/cats"]
        pushed = processes.run(command, env=environment(**there))
        assert pushed.returncode == 0, pushed.stderr
        files = hub.repositories["user/cats"].files
        assert json.loads(files["audit/audit.json"]) == read_audit(audited / "audit")
        assert "type: mia_ref_auc" in files["README.md"].decode()
        settings = small(held, model="user/cats", train_data_dir=world / "data", output_dir=tmp_path / "out")
        done = processes.run([*AUDIT, *words({**settings, "resolution": RESOLUTION})], env=environment(**there))
        assert done.returncode == 0, done.stderr
        assert hub.troubles == []
    ours, theirs = read_audit(tmp_path / "out"), read_audit(audited / "audit")
    assert ours["model"] == "user/cats"
    assert ours["fingerprint"] == theirs["fingerprint"]
    assert ours["metrics"] == {name: metric for name, metric in theirs["metrics"].items() if "mia_ref" not in name}


def test_the_command_repeats_the_audit_without_being_told_of_data_or_base(audited, tmp_path):
    copy = shutil.copytree(audited, tmp_path / "out")
    shutil.rmtree(copy / "audit")
    card = (copy / "README.md").read_text()
    assert cli.main(["audit", "--model", str(copy)]) == 0
    assert read_audit(copy / "audit") == read_audit(audited / "audit")
    assert (copy / "README.md").read_text() == card


def test_an_audit_is_shown_as_long_as_the_weights_are_those_that_were_audited(world, audited, held, tmp_path):
    copy = Path(shutil.copytree(audited, tmp_path / "out"))
    settings = flags(world, copy, resume_from_checkpoint="latest", **small(held))
    assert cli.main(["train", *words(settings)]) == 0
    assert "\n## Audit\n" in (copy / "README.md").read_text()
    assert read_audit(copy / "audit") == read_audit(audited / "audit")
    assert cli.main(["train", *words({**settings, "num_train_epochs": 2})]) == 0
    assert "## Audit" not in (copy / "README.md").read_text()
    assert "Memorization of this pipeline: not measured." in (copy / "README.md").read_text()
    assert not (copy / "audit" / "report.html").exists()


def test_a_run_of_two_ranks_ends_with_an_audit_of_the_first_while_the_other_waits(world, held, tmp_path):
    # Whatever the audit did together with the other would wait in vain.
    settings = flags(world, tmp_path / "out", audit=True, num_shards=2, ddp_timeout=20, **small(held))
    done = run_by_hand(2, settings)
    assert done.returncode == 0, done.stderr
    assert read_audit(tmp_path / "out" / "audit")["metrics"].keys() >= {"f_mem", "frechet_mosaic", *OF_THE_MODEL}


def test_pixels_are_drawn_with_the_scheduler_that_is_asked_for(held, tmp_path):
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = UNet2DModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(tmp_path / "ddpm")
    settings = small(held, model=tmp_path / "ddpm", train_data_dir=held / "held", holdout_data_dir=None, num_images=2)
    images = []
    for name in ("DDIMScheduler", "DDPMScheduler"):
        found = audit(tmp_path / name, **settings, scheduler=name)
        assert found["settings"]["scheduler"] == name
        images.append((tmp_path / name / "samples" / "000000.png").read_bytes())
    assert images[0] != images[1]


def test_the_reference_model_is_named(audited):
    found = read_audit(audited / "audit")
    assert found["reference"]["model"] == "base"
    assert found["reference"]["fingerprint"] not in (None, found["fingerprint"])


def test_a_share_that_was_trained_on_is_not_taken_for_held_out(audited, held, tmp_path):
    few = {"num_images": 2, "num_inference_steps": 1, "features": held / "mosaic.pt"}
    copy = shutil.copytree(audited, tmp_path / "out")
    config = (copy / "training_config.yaml").read_text().splitlines()
    kept = [line for line in config if not line.startswith("holdout_data_dir")]
    (copy / "training_config.yaml").write_text("\n".join(kept) + "\n")
    found = audit(tmp_path / "audit", model=copy, holdout_fraction=0.25, **few)
    assert found["data"]["heldout_images"] == 0
    assert any("held-out images were trained on, as the ledger of the run says" in each for each in found["warnings"])
    assert "needs held-out images" in found["not_measured"]["mia_auc"]
    (copy / "ledger.parquet").unlink()
    found = audit(tmp_path / "unknown", model=copy, holdout_fraction=0.25, **few)
    assert any("there is no record that the model was trained without them" in each for each in found["warnings"])


def test_a_cut_off_audit_goes_on_where_it_was(world, held, tmp_path):
    settings = small(held, model=world / "trained", num_images=12, num_inference_steps=6)
    whole = audit(tmp_path / "whole", **settings)
    output = tmp_path / "cut"
    command = [*AUDIT, *words({**settings, "output_dir": output})]
    with processes.Popen(command, env=environment(), stdout=-1, stderr=-1) as process:
        end = time.monotonic() + 90
        while not (output / "samples" / "000007.png").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (output / "audit.json").exists()
    drawn = {file.name: file.stat().st_mtime_ns for file in sorted((output / "samples").glob("*.png"))[:8]}
    done = processes.run(command, env=environment())
    assert done.returncode == 0, done.stderr
    assert read_audit(output) == whole
    assert {name: (output / "samples" / name).stat().st_mtime_ns for name in drawn} == drawn
    assert "metrics: " in done.stdout


def test_an_adapter_is_audited_on_its_base(world, held, tmp_path):
    settings = flags(world, tmp_path / "out", use_lora=True, rank=2, lora_export="truncate", learning_rate=1e-2)
    assert cli.main(["train", *words(settings)]) == 0
    ours = audit(tmp_path / "audit", model=tmp_path / "out", **small(held))
    base = small(held, train_data_dir=world / "data", model=world / "base")
    plain = audit(tmp_path / "plain", **base)
    assert ours["metrics"].keys() == plain["metrics"].keys() | set(OF_A_REFERENCE)
    assert ours["fingerprint"] != plain["fingerprint"]
    assert ours["metrics"]["heldout_loss"] != plain["metrics"]["heldout_loss"]


def test_a_pipeline_that_no_family_knows_is_drawn_from_and_judged(world, held, tmp_path):
    components = tiny_sd(timesteps=50).components
    settings = {name: value for name, value in components["unet"].config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel(**{**settings, "time_cond_proj_dim": 8})
    scheduler = LCMScheduler.from_config(components["scheduler"].config)
    kept = {name: components[name] for name in ("vae", "text_encoder", "tokenizer")}
    parts = {**kept, "unet": unet, "scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "lcm")
    found = audit(tmp_path / "out", model=tmp_path / "lcm", train_data_dir=world / "data", **small(held))
    assert found["pipeline_class"] == "LatentConsistencyModelPipeline"
    assert {"f_mem", "frechet_mosaic", "similarity_mean_mosaic"} <= found["metrics"].keys()
    for name in ("mia_auc", "heldout_loss", "prompt_memorization"):
        assert "LatentConsistencyModelPipeline" in found["not_measured"][name]


def test_audits_are_compared(audited, world, held, tmp_path, capsys):
    audit(tmp_path / "base", model=world / "base", train_data_dir=world / "data", **small(held))
    capsys.readouterr()
    files = [str(tmp_path / "base" / "audit.json"), str(audited)]
    assert cli.main(["audit", "--compare", *files, "--output_dir", str(tmp_path / "compared")]) == 0
    said = capsys.readouterr().out
    assert "f_mem" in said
    assert "page: " in said
    assert (tmp_path / "compared" / "compare.html").is_file()
    differences = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert "heldout_loss" in differences["metrics"]


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing to judge": ({"model": None}, ["give `--model DIR_OR_HUB_ID`, or `--generated_dir FOLDER`"]),
    "no such model": ({"model": "nowhere/at/all"}, ["`--model nowhere/at/all`", "no such folder"]),
    "a folder that is no pipeline": ({"model": "data"}, ["`--model data` is not a diffusers pipeline"]),
    "no training images": ({"train_data_dir": None}, ["`--train_data_dir FOLDER` or `--dataset_name NAME`"]),
    "no such training images": ({"train_data_dir": "none"}, ["`--train_data_dir none` is not a folder"]),
    "no such held-out images": ({"holdout_data_dir": "none"}, ["`--holdout_data_dir none` is not a folder"]),
    "held-out images without captions": (
        {"holdout_data_dir": "bare"},
        ["`--holdout_data_dir bare`: ", " no caption (`", "`--default_caption TEXT`"],
    ),
    "a number of given images": (
        {"generated_dir": "bare"},
        ["`--num_images 5` does nothing with `--generated_dir`"],
    ),
    "no such generated images": (
        {"generated_dir": "none", "num_images": None},
        ["`--generated_dir none` is not a folder"],
    ),
    "no such features": ({"features": "nowhere.pt"}, ["`--features nowhere.pt`"]),
    "features that are none": ({"features": "data/000.png"}, ["`--features data/000.png`"]),
    "no such CLIP model": ({"clip_model": "no/such/model"}, ["`--clip_model no/such/model`"]),
    "no such reference": ({"reference_model": "no/such/model"}, ["`--reference_model no/such/model`"]),
    "no such prompts": ({"prompts": "none.txt"}, ["`--prompts none.txt`", "no file"]),
    "an unknown scheduler": ({"scheduler": "DDIM"}, ["`--scheduler DDIM` is no scheduler"]),
    "too few draws": ({"membership_draws": 7}, ["`--membership_draws` must be at least 8, not 7"]),
    "no images": ({"num_images": 0}, ["`--num_images` must be at least 1, not 0"]),
    "a resolution that does not fit": ({"resolution": 13}, ["`--resolution 13` must be a multiple of"]),
    "an unknown flag": ({"num_image": 3}, ["unknown flag `--num_image`. Did you mean `--num_images`?"]),
    "a flag of training": ({"learning_rate": 0.1}, ["unknown flag `--learning_rate`"]),
    "nowhere to write": ({"output_dir": "taken/out"}, ["`--output_dir taken/out` cannot be written"]),
    "one audit to compare": ({"compare": "torn.json"}, ["`--model` does nothing with `--compare`"]),
}


@pytest.fixture
def copy(world: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pipeline and the images, where the command is typed."""
    for name in ("base", "data"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copytree(held, tmp_path / "held")
    save_images(tmp_path / "bare", 3)
    (tmp_path / "bare" / "metadata.jsonl").unlink()
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "torn.json").write_text('{"format": "iet_finetune.audit"')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("spoil", "named"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line_that_names_it_and_loses_nothing(copy, capfd, spoil, named):
    plain = {"model": "base", "train_data_dir": "data", "output_dir": "out", **small(Path("held/"))}
    before = contents(copy)
    code = cli.main(["audit", *words({**plain, "holdout_data_dir": "held/held", **spoil})])
    line = the_error(code, *capfd.readouterr())
    for part in named:
        assert part in line
    after = contents(copy)
    assert {name: after.get(name) for name in before} == before
    assert not (copy / "out" / "audit.json").exists()


def test_a_full_disk_ends_an_audit_in_one_line_and_it_goes_on_when_there_is_room(copy, small_disk, capfd):
    disk = small_disk(60_000)
    settings = {"model": "base", "train_data_dir": "data", "output_dir": disk / "out", **small(Path("held/"))}
    command = ["audit", *words({**settings, "holdout_data_dir": "held/held", "num_images": 12})]
    line = the_error(cli.main(command), *capfd.readouterr())
    assert "no space left on the device" in line
    assert "the same command goes on where it was" in line
    assert "checkpoint" not in line
    subprocess.run(["mount", "-o", "remount,size=50M", str(disk)], check=True)
    assert cli.main(command) == 0
    assert read_audit(disk / "out")["data"]["generated_images"] == 12


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["torn.json"], "`--compare` needs at least two audits"),
        (["torn.json", "torn.json"], "`--compare torn.json` is damaged"),
        (["none.json", "torn.json"], "`--compare none.json`: there is no such file"),
    ],
)
def test_what_cannot_be_compared_is_named(copy, capfd, files, said):
    assert said in the_error(cli.main(["audit", "--compare", *files]), *capfd.readouterr())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"holdout_data_dir": "none"}, "`--holdout_data_dir none` is not a folder"),
        ({"prompts": "none.txt"}, "`--prompts none.txt`"),
    ],
)
def test_what_would_make_the_audit_fail_ends_a_run_before_it_trains(copy, capfd, change, said):
    settings = flags(copy, copy / "out", audit=True, **change)
    assert said in the_error(cli.main(["train", *words(settings)]), *capfd.readouterr())
    assert not (copy / "out" / "metrics.jsonl").exists()


def test_an_audit_that_fails_leaves_the_trained_pipeline_and_says_how_to_go_on(copy, capfd):
    settings = flags(copy, copy / "out", audit=True, num_inference_steps=2, num_images=1, scheduler="DDIM")
    code = cli.main(["train", *words(settings)])
    _, stderr = capfd.readouterr()
    line = stderr.splitlines()[-1]
    assert code == 2
    assert "`--scheduler DDIM` is no scheduler" in line
    assert line.endswith(f"audit it with: iet-finetune audit --model {copy / 'out'}")
    assert (copy / "out" / "model_index.json").is_file()

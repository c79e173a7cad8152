"""Training with `--push_to_hub` from end to end, against a server that plays the Hub."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
from accelerate.state import AcceleratorState
from e2e.command import ERROR, contents, environment, flags, leftovers, run_script, words
from hub_server import HubServer
from safetensors.torch import load_file

from iet_finetune import cli

pytestmark = pytest.mark.timeout(300)

TOKEN = "hf_thisIsNotARealTokenButItLooksLikeOne02"
REPOSITORY = "user/cats"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
LOAD = """
import sys
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
DiffusionPipeline.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


# The base pipeline with the LoRA file of a repository, in its weights.
LOAD_LORA = """
import sys
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[3], local_files_only=True)
pipeline.load_lora_weights(sys.argv[1])
pipeline.fuse_lora()
pipeline.unload_lora_weights()
pipeline.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Story:
    """A run that was pushed, and a longer one whose push failed and was repeated with the command it printed.

    Attributes:
        output: the output folder of both.
        first, second: how `train_iet_agc.py` ended.
        before, after: what was in the output folder then.
        command: what the second one said to type.
        again: how that ended.
    """

    hub: HubServer
    folder: Path
    output: Path
    first: subprocess.CompletedProcess
    before: dict[str, bytes]
    second: subprocess.CompletedProcess
    after: dict[str, bytes]
    command: list[str]
    again: subprocess.CompletedProcess


def online(folder: Path, url: str, **settings: str) -> dict[str, str]:
    """The environment of somebody at home in `folder` whose Hub is at `url`."""
    kept = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    home |= {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return {**kept, **home, **settings}


def command_folder(folder: Path) -> Path:
    """Where the command `iet-finetune` is: that of the installation, or one made as an installation makes it."""
    installed = shutil.which("iet-finetune", path=str(Path(sys.executable).parent))
    if installed is not None:
        return Path(installed).parent
    script = folder / "bin" / "iet-finetune"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom iet_finetune.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return script.parent


def nobody() -> str:
    """An address at which no server listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


@pytest.fixture(scope="module")
def story(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Train and push; train on while the server is gone; push again with the command it printed."""
    folder = tmp_path_factory.mktemp("push")
    output = folder / "out"
    settings = {"push_to_hub": True, "hub_model_id": REPOSITORY, "report_to": "tensorboard"}
    settings |= {"validation_prompts": ["a thing"], "num_validation_images": 1, "validation_inference_steps": 1}
    run = flags(world, output, **settings)
    with HubServer(TOKEN) as hub:
        first = run_script(*words({**run, "hub_token": TOKEN}), **online(folder, hub.url))
        before = contents(output)
        longer = {**run, "num_train_epochs": 2, "resume_from_checkpoint": "latest"}
        second = run_script(*words(longer), **online(folder, nobody(), HF_TOKEN=TOKEN))
        after = contents(output)
        command = shlex.split(second.stderr.splitlines()[-1].partition("push it with: ")[2])
        path = os.pathsep.join([str(command_folder(folder)), os.environ["PATH"]])
        variables = environment(**online(folder, hub.url, HF_TOKEN=TOKEN, PATH=path))
        again = subprocess.run(
            ["/usr/bin/env", *command], env=variables, cwd=folder, capture_output=True, text=True, timeout=120
        )
        yield Story(hub, folder, output, first, before, second, after, command, again)


def card(files: dict[str, bytes]) -> str:
    return files["README.md"].decode()


def test_training_ends_with_the_address_of_what_it_pushed(story):
    assert story.first.returncode == 0, story.first.stderr
    assert story.first.stdout.splitlines()[-1] == f"pushed to {story.hub.url}/{REPOSITORY}"
    assert [message for message, _ in story.hub.repositories[REPOSITORY].commits[1:2]] == [
        "Upload a pipeline fine-tuned with IET-AGC"
    ]
    _, files = story.hub.repositories[REPOSITORY].commits[1]
    assert files[WEIGHTS] == story.before[WEIGHTS]
    assert f'from_pretrained("{REPOSITORY}")' in card(files)


def test_a_push_that_fails_ends_in_one_line_with_the_command_and_the_pipeline_saved(story):
    second = story.second
    assert second.returncode == 2
    assert "Traceback" not in second.stderr
    line = second.stderr.splitlines()[-1]
    assert line.startswith(f"{ERROR}the connection to the Hub at http://127.0.0.1:")
    assert f"The finished pipeline is saved in `{story.output}`; push it with: " in line
    assert story.command == ["iet-finetune", "push", str(story.output), "--hub_model_id", REPOSITORY]
    assert "pushed to" not in second.stdout
    assert story.after[WEIGHTS] != story.before[WEIGHTS]
    assert "model_index.json" in story.after
    assert not leftovers(story.output)


def test_the_printed_command_pushes_and_brings_card_and_weights_up_to_date(story):
    assert story.again.returncode == 0, story.again.stderr
    assert story.again.stdout == f"{story.hub.url}/{REPOSITORY}\n"
    commits = story.hub.repositories[REPOSITORY].commits
    assert len(commits) == 3, "one to begin with, and one a push"
    old, new = commits[1][1], commits[2][1]
    assert new[WEIGHTS] == story.after[WEIGHTS] != old[WEIGHTS]
    assert "| merges | 1 |" in card(old)
    assert "| merges | 2 |" in card(new)
    assert contents(story.output) == story.after, "a push changes nothing here"


def test_a_fresh_process_loads_the_pushed_pipeline_with_equal_weights(story):
    loaded = story.folder / "loaded"
    command = [sys.executable, "-c", LOAD, REPOSITORY, str(loaded)]
    done = processes.run(command, env=environment(**online(story.folder, story.hub.url)))
    assert done.returncode == 0, done.stderr
    files, ours = contents(loaded), story.after
    weights = [name for name in ours if name.endswith(".safetensors") and not name.startswith("checkpoint-")]
    assert len(weights) == 3
    assert [name for name in weights if files[name] != ours[name]] == []
    assert files["scheduler/scheduler_config.json"] == ours["scheduler/scheduler_config.json"]


def test_the_token_is_in_no_file_no_output_no_tracker_and_no_upload(story):
    assert any(name.startswith("logs/") and "events.out" in name for name in story.after)
    everything = {str(path): path.read_bytes() for path in story.folder.rglob("*") if path.is_file()}
    assert sum(len(data) for data in everything.values()) > 1_000_000
    assert [name for name, data in everything.items() if TOKEN.encode() in data] == []
    said = [text for done in (story.first, story.second, story.again) for text in (done.stdout, done.stderr)]
    assert not any(TOKEN in text for text in said)
    assert not any(TOKEN.encode() in part for part in story.hub.received())
    assert any(TOKEN in str(request.headers) for request in story.hub.requests), "it was used"


def test_a_lora_file_is_pushed_with_its_card_and_loads_from_there(world, tmp_path):
    output, loaded = tmp_path / "out", tmp_path / "loaded"
    settings = {"use_lora": True, "lora_alpha": 7, "lora_export": "full_rank", "learning_rate": 1e-2}
    run = flags(world, output, push_to_hub=True, hub_model_id=REPOSITORY, hub_token=TOKEN, **settings)
    with HubServer(TOKEN) as hub:
        done = run_script(*words(run), **online(tmp_path, hub.url))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"pushed to {hub.url}/{REPOSITORY}"
        command = [sys.executable, "-c", LOAD_LORA, REPOSITORY, str(loaded), str(world / "base")]
        variables = environment(**online(tmp_path, hub.url))
        again = processes.run(command, env=variables)
        assert again.returncode == 0, again.stderr
        files = hub.repositories[REPOSITORY].files
    assert sorted(files) == [".gitattributes", "README.md", LORA, "training_config.yaml"]
    assert files[LORA] == (output / LORA).read_bytes()
    assert f'load_lora_weights("{REPOSITORY}")' in card(files)
    assert "use_lora: true" in files["training_config.yaml"].decode()
    assert str(tmp_path) not in files["training_config.yaml"].decode()
    # Nothing is left to train: the same adapter in the weights of a pipeline, by the trainer itself.
    AcceleratorState._reset_state(reset_partial_state=True)
    fuse = {"push_to_hub": False, "hub_token": None, "lora_export": "fuse", "resume_from_checkpoint": "latest"}
    assert cli.main(["train", *words({**run, **fuse})]) == 0
    ours, theirs, base = (load_file(folder / WEIGHTS) for folder in (output, loaded, world / "base"))
    assert max((theirs[name] - base[name]).abs().max().item() for name in base) > 1e-2
    assert max((theirs[name] - ours[name]).abs().max().item() for name in ours) < 1e-6

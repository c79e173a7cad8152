"""Promises of the push, kept against a real HTTP server that plays the Hub."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
import yaml
from cards import facts, with_flags
from hub_server import HubServer, Repository, Trouble
from PIL import Image
from tiny import save_tiny_sd

from iet_finetune.cli.push_command import push_command
from iet_finetune.config.config import Config
from iet_finetune.errors import UserError
from iet_finetune.publish.card import write_model_card
from iet_finetune.publish.upload_list import upload_list

pytestmark = pytest.mark.timeout(120)

TOKEN = "hf_thisIsNotARealTokenButItLooksLikeOne01"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# The pauses between attempts are noted, not waited for; all else is the real client in a process of its own.
PUSH = """
import json, sys, time
pauses = []
time.sleep = pauses.append
import iet_finetune.publish.hub as hub
from iet_finetune.cli.push_command import push_command
from iet_finetune.errors import UserError
hub.SILENCE = 1.0
try:
    said, code = push_command(sys.argv[1:]), 0
except UserError as error:
    said, code = str(error), 2
print(json.dumps({"said": said, "pauses": pauses}))
sys.exit(code)
"""

LOAD = """
import hashlib, sys, torch
from diffusers import DiffusionPipeline
for source in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(source, safety_checker=None)
    digest = hashlib.sha256()
    for name in ("unet", "vae", "text_encoder"):
        for key, tensor in sorted(getattr(pipeline, name).state_dict().items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
    print(digest.hexdigest(), type(pipeline.scheduler).__name__, pipeline.tokenizer("ab").input_ids)
"""


@dataclass(frozen=True)
class Pushed:
    """What a push printed, how it ended and how long it would have waited."""

    code: int
    said: str
    pauses: list[float]
    printed: str


def run_python(code: str, arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a process whose only settings of the Hub are those given here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    root = str(Path(__file__).parents[2])
    settings = {"HF_HOME": str(folder / "hf_home"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": root}
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return processes.run(
        [sys.executable, "-c", code, *arguments], env=kept | settings | environment, cwd=folder, timeout=100
    )


def push_to(url: str, folder: Path, *arguments: str, token: str | None = TOKEN, **environment: str) -> Pushed:
    """`iet-finetune push` in a fresh process whose home is `folder`."""
    settings = {"HF_ENDPOINT": url, **({} if token is None else {"HF_TOKEN": token}), **environment}
    done = run_python(PUSH, list(arguments), folder, **settings)
    assert "Traceback" not in done.stderr, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["said"].splitlines()) == 1
    return Pushed(done.returncode, answer["said"], answer["pauses"], done.stdout + done.stderr)


def fill_run(output: Path, data: Path) -> None:
    """Everything that a run leaves behind, most of which must not leave the machine."""
    config = Config.from_flags(
        pretrained_model_name_or_path=str(data / "base"),
        train_data_dir=str(data),
        cache_dir=str(data / "cache"),
        output_dir=str(output),
        hub_token=TOKEN,
        resume_from_checkpoint=str(output / "checkpoint-5"),
        validation_prompts=["a cat"],
        learning_rate=1e-5,
    )
    secret = {"checkpoint-5/optimizer.safetensors": b"moments", "logs/events.out": b"log", "ledger.parquet": b"ledger"}
    secret |= {
        "metrics.jsonl": b"{}",
        "timings.jsonl": b"{}",
        "run.html": b"training images",
        "audit/report.html": b"report",
        "unet/old.bin": b"pickle",
    }
    secret |= {"audit/nearest.png": b"training image", "validation/round-1.png": b"image", "unet/captions.txt": b"x"}
    for name, contents in secret.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b"SECRET " + contents)
    (output / "training_config.yaml").write_text(yaml.safe_dump(config.to_flags() | {"hub_token": TOKEN}))
    (output / "audit/audit.json").write_text(json.dumps({"mean": 0.25, "where": str(data), "files": [str(data), "b"]}))
    Image.new("RGB", (8, 8)).save(output / "validation/before_after.png")
    # diffusers writes here the folder from which the base pipeline was loaded
    unet = json.loads((output / "unet/config.json").read_text())
    (output / "unet/config.json").write_text(json.dumps(unet | {"_name_or_path": str(data / "base/unet")}))
    write_model_card(output, facts(base_model=str(data / "base"), sample_grid="validation/before_after.png"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, read by all tests; one that changes it makes a copy."""
    folder = tmp_path_factory.mktemp("machine")
    save_tiny_sd(folder / "run")
    fill_run(folder / "run", folder / "photos")
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that the test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty Hub."""
    with HubServer(TOKEN) as server:
        yield server


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder by path, as a digest."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_pushed_pipeline_is_loaded_from_the_hub_with_equal_weights(hub: HubServer, finished: Path, tmp_path: Path):
    pushed = push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    assert (pushed.code, pushed.said) == (0, f"{hub.url}/user/cats")
    loaded = run_python(LOAD, ["user/cats", str(finished)], tmp_path, HF_ENDPOINT=hub.url)
    assert loaded.returncode == 0, loaded.stderr
    remote, local = loaded.stdout.splitlines()
    assert remote == local


def test_only_the_pipeline_its_card_and_public_settings_leave_the_machine(hub: HubServer, finished: Path, tmp_path):
    push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    files = hub.repositories["user/cats"].files
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "audit/audit.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "training_config.yaml",
        "unet/config.json",
        WEIGHTS,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "validation/before_after.png",
    }
    everything = list(hub.received())
    assert sum(len(part) for part in everything) > 500_000
    for forbidden in (TOKEN, str(finished.parent), "SECRET"):
        assert not [part for part in everything if forbidden.encode() in part]
    assert (finished / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert json.loads(files["audit/audit.json"]) == {"mean": 0.25, "files": ["b"]}


def test_the_uploaded_settings_repeat_the_run_but_for_paths_and_secrets(finished: Path):
    local = yaml.safe_load((finished / "training_config.yaml").read_text())
    public = yaml.safe_load(bytes(upload_list(finished)["training_config.yaml"]))
    gone = {"train_data_dir", "output_dir", "cache_dir", "offload_dir", "logging_dir", "resume_from_checkpoint"}
    gone |= {
        "class_data_dir",
        "init_lora",
        "holdout_data_dir",
        "generated_dir",
        "prompts",
        "features",
        "clip_model",
        "reference_model",
    }
    assert local.keys() - public.keys() == gone | {"hub_token", "pretrained_model_name_or_path"}
    assert public.items() <= local.items()
    assert Config.from_flags(**public).optimizer.learning_rate == 1e-5


def test_a_public_base_and_data_set_stay_in_the_uploaded_settings(copy: Path):
    named = {"pretrained_model_name_or_path": "somebody/tiny-sd", "dataset_name": "somebody/cats"}
    (copy / "training_config.yaml").write_text(yaml.safe_dump(named | {"seed": 3}))
    write_model_card(copy, with_flags(facts(), dataset_name="somebody/cats"))
    assert yaml.safe_load(bytes(upload_list(copy)["training_config.yaml"])) == named | {"seed": 3}


@pytest.mark.parametrize(("network", "published"), [("cifar10", True), ("networks/mine.yaml", False), ("mine", False)])
def test_a_network_is_published_by_its_name_and_never_by_its_file(copy: Path, network: str, published: bool):
    (copy / "training_config.yaml").write_text(yaml.safe_dump({"model_config": network, "seed": 3}))
    public = yaml.safe_load(bytes(upload_list(copy)["training_config.yaml"]))
    assert public == ({"model_config": network} if published else {}) | {"seed": 3}


def test_the_card_on_the_hub_loads_from_its_own_repository(hub: HubServer, finished: Path, tmp_path: Path):
    push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "cats")
    card = hub.repositories["user/cats"].files["README.md"].decode()
    assert 'DiffusionPipeline.from_pretrained("user/cats")' in card
    assert "![Sample grid](validation/before_after.png)" in card


def test_a_second_push_replaces_the_pipeline_and_the_card_and_keeps_the_users_files(
    hub: HubServer, copy: Path, tmp_path: Path
):
    index = json.dumps({"unet": ["diffusers", "X"], "safety_checker": ["diffusers", "Y"], "image_encoder": [None] * 2})
    old = {"unet/diffusion_pytorch_model.bin": b"old", "safety_checker/config.json": b"{}", "model_index.json": index}
    mine = {"notes.md": b"mine", "examples/cat.png": b"mine", "image_encoder/mine.txt": b"mine"}
    files = {path: data.encode() if isinstance(data, str) else data for path, data in (old | mine).items()}
    hub.repositories["user/cats"] = Repository(commits=[("old", files | {"README.md": b"---\n---\nold card"})])
    assert push_to(hub.url, tmp_path, str(copy), "--hub_model_id", "user/cats").code == 0
    first = hub.repositories["user/cats"].files
    assert mine.items() <= first.items()
    assert not {*old} - {"model_index.json"} & first.keys()
    assert b"old card" not in first["README.md"]

    (copy / "vae" / "config.json").write_text('{"changed": true}')
    write_model_card(copy, facts(steps=987654))
    assert push_to(hub.url, tmp_path, str(copy), "--hub_model_id", "user/cats").code == 0
    second = hub.repositories["user/cats"].files
    assert b"987654" in second["README.md"]
    assert second["vae/config.json"] == b'{"changed": true}'
    assert len(hub.repositories["user/cats"].commits) == 3, "each push is one commit"


def test_files_that_the_run_no_longer_has_go_from_the_repository(hub: HubServer, copy: Path, tmp_path: Path):
    push_to(hub.url, tmp_path, str(copy), "--hub_model_id", "user/cats")
    (copy / "audit/audit.json").unlink()
    push_to(hub.url, tmp_path, str(copy), "--hub_model_id", "user/cats")
    assert "audit/audit.json" not in hub.repositories["user/cats"].files


def test_a_gitignore_in_the_repository_leaves_out_no_weights(hub: HubServer, finished: Path, tmp_path: Path):
    hub.repositories["user/cats"] = Repository(commits=[("mine", {".gitignore": b"*.safetensors\n"})])
    assert push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats").code == 0
    assert WEIGHTS in hub.repositories["user/cats"].files


@pytest.mark.parametrize(
    ("method", "where", "how"),
    [
        ("PUT", "/lfs/", "drop"),
        ("POST", "/repos/create", "drop"),
        ("POST", "/validate-yaml", 503),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "unanswered"),
        ("POST", "/repos/create", "silent"),
    ],
)
def test_a_connection_lost_once_is_only_a_pause(hub: HubServer, finished: Path, tmp_path: Path, method, where, how):
    hub.troubles = [Trouble(method, where, how)]
    pushed = push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    assert (pushed.code, pushed.said, pushed.pauses) == (0, f"{hub.url}/user/cats", [1])
    assert len(hub.repositories["user/cats"].commits) == 2, "no commit is made twice"
    assert hub.repositories["user/cats"].files[WEIGHTS] == (finished / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("method", "where"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_connection_lost_for_ever_ends_in_one_line_with_the_command_to_push_again(
    hub: HubServer, finished: Path, tmp_path: Path, method: str, where: str
):
    before = contents(finished)
    hub.troubles = [Trouble(method, where, "drop", math.inf)]
    pushed = push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats", "--hub_token", TOKEN, token=None)
    assert pushed.code == 2
    assert pushed.said.startswith(f"the connection to the Hub at {hub.url} failed (")
    saved = f"The finished pipeline is saved in `{finished}`; push it with: "
    assert pushed.said.endswith(f"{saved}iet-finetune push {finished} --hub_model_id user/cats")
    assert TOKEN not in pushed.printed
    assert "secret-of-the-store" not in pushed.said
    # Four large files are sent side by side, each again by itself.
    assert set(pushed.pauses) == {1, 2, 4, 8}
    assert len(pushed.pauses) <= 20
    assert contents(finished) == before
    assert len(hub.repositories["user/cats"].commits) == 1, "the repository is as it was"


@pytest.mark.parametrize(("status", "says"), [(401, "refused the token (401)"), (403, "may not write there (403)")])
def test_a_refused_token_is_named_at_once_and_never_printed(hub: HubServer, finished: Path, tmp_path, status, says):
    hub.refuse = status
    pushed = push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    assert pushed.code == 2
    assert says in pushed.said
    assert "iet-finetune push" in pushed.said
    assert TOKEN not in pushed.printed
    assert pushed.pauses == []


def test_a_token_that_the_server_repeats_is_hidden(hub: HubServer, finished: Path, tmp_path: Path):
    hub.troubles = [Trouble("POST", "/commit/", 409)]
    pushed = push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    assert pushed.code == 2
    assert "the push failed (409, refused what came with Bearer ***)." in pushed.said
    assert TOKEN not in pushed.printed


def test_without_a_token_offline_and_with_a_bad_name_nothing_is_sent(hub: HubServer, finished: Path, tmp_path: Path):
    name = ("--hub_model_id", "user/cats")
    pushes = {
        "no token": push_to(hub.url, tmp_path, str(finished), *name, token=None),
        "`HF_HUB_OFFLINE` is set": push_to(hub.url, tmp_path, str(finished), *name, HF_HUB_OFFLINE="1"),
        "not 'a/b/c'": push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "a/b/c", "--hub_private_repo"),
    }
    for says, pushed in pushes.items():
        assert pushed.code == 2
        assert says in pushed.said
        assert str(finished) in pushed.said
    again = f"iet-finetune push {finished} --hub_model_id OWNER/NAME --hub_private_repo"
    assert pushes["not 'a/b/c'"].said.endswith(again), "a command that cannot work is not advised"
    assert hub.requests == []


def test_a_server_that_cannot_be_reached_is_tried_five_times(finished: Path, tmp_path: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    pushed = push_to(url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    assert pushed.code == 2
    assert f"the connection to the Hub at {url} failed (" in pushed.said
    assert pushed.pauses == [1, 2, 4, 8]


def test_private_means_private(hub: HubServer, finished: Path, tmp_path: Path):
    arguments = (str(finished), "--hub_private_repo", "--hub_model_id")
    assert push_to(hub.url, tmp_path, *arguments, "user/cats").code == 0
    assert hub.repositories["user/cats"].private
    hub.repositories["user/open"] = Repository(private=False)
    refused = push_to(hub.url, tmp_path, *arguments, "user/open")
    assert refused.code == 2
    assert "`user/open` exists and is public" in refused.said
    assert len(hub.repositories["user/open"].commits) == 1


def test_a_lora_file_is_pushed_with_its_card_and_replaces_a_whole_pipeline(hub: HubServer, finished: Path, tmp_path):
    push_to(hub.url, tmp_path, str(finished), "--hub_model_id", "user/cats")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"lora")
    write_model_card(lora, facts())
    assert push_to(hub.url, tmp_path, "lora", "--hub_model_id", "user/cats").code == 0
    files = hub.repositories["user/cats"].files
    ours = {"README.md", "pytorch_lora_weights.safetensors"}
    assert files.keys() - {".gitattributes", "validation/before_after.png"} == ours
    assert b'from_pretrained("somebody/tiny-sd")\npipeline.load_lora_weights("user/cats")' in files["README.md"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "model_index.json").unlink(), "holds no finished pipeline"),
        (lambda run: (run / "scheduler/scheduler_config.json").unlink(), "names scheduler, but its files are missing"),
        (lambda run: (run / WEIGHTS).rename(run / "unet/model.pt"), "only as pickles"),
        (lambda run: (run / "README.md").unlink(), "is not published without its model card"),
        (lambda run: (run / "README.md").write_text("---\nlicense: [\n---\n"), "is not a model card"),
        (lambda run: (run / "validation/before_after.png").unlink(), "shows `validation/before_after.png`"),
        (lambda run: (run / "training_config.yaml").write_text("- 1"), "must hold `key: value` lines"),
        (lambda run: (run / "unet/config.json").write_text("{"), "unet/config.json` cannot be read"),
    ],
)
def test_what_is_not_a_complete_run_is_not_pushed(copy: Path, spoil, says: str):
    spoil(copy)
    with pytest.raises(UserError, match=re.escape(says)):
        push_command([str(copy)])


def test_an_image_outside_the_run_is_never_uploaded(copy: Path):
    (copy.parent / "private.png").write_bytes(b"x")
    card = (copy / "README.md").read_text()
    (copy / "README.md").write_text(card.replace("validation/before_after.png", "../private.png"))
    with pytest.raises(UserError, match=r"\.\./private\.png"):
        upload_list(copy)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "OUTPUT"),
        (["nowhere"], "OUTPUT `nowhere` is not a folder"),
        (["nowhere", "--hub_model"], "Did you mean `--hub_model_id`?"),
        (["nowhere", "--hub_model_id"], "expected one argument"),
    ],
)
def test_wrong_arguments_of_the_command_are_named(argv: list[str], says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        push_command(argv)

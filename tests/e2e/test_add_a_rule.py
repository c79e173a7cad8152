"""The page on adding a rule: its program trains with a skip rule that the package does not know, from outside of it.

The very file runs as the main program of a rank: on one and on two, killed in the middle of a round, and resumed.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from e2e.command import ROOT, assert_same, flags, repeatable, words
from ranks import Ended, run_ranks

from iet_finetune.config.config import flag_names

PAGE = (ROOT / "docs" / "add-a-rule.md").read_text()
PROGRAM = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]
# Two shards of 6 images in steps of 2: a round of one pass is 3 steps of each clone.
RUN: dict[str, Any] = {
    "skip_rule": "reference",
    "reference_share": 0.99,
    "num_shards": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "checkpointing_steps": 2,
    "resume_from_checkpoint": "latest",
}
LORA = {"use_lora": True, "rank": 1, "lora_export": "fuse", "learning_rate": 0.1}
# Its one argument is the step of all clones after whose checkpoint it is killed.
BODY = """
import runpy
from iet_finetune.ensemble.checkpoint import CheckpointStore

save = CheckpointStore.save
def save_and_die(self, step, *args, **settings):
    path = save(self, step, *args, **settings)
    if step == int(os.environ["DIE_AT"]):
        # The last rank to write its part completes it.
        while not (path / "manifest.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return path
CheckpointStore.save = save_and_die
sys.stdout = sys.stderr
sys.argv = json.loads(os.environ["ARGUMENTS"])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The file that the page shows."""
    file = tmp_path_factory.mktemp("program") / "train_reference.py"
    file.write_text(PROGRAM)
    return file


def train(program: Path, ranks: int, settings: dict[str, Any], die_at: int = -1) -> list[Ended]:
    return run_program(program, ranks, words(settings), die_at)


def run_program(program: Path, ranks: int, typed: list[str], die_at: int = -1) -> list[Ended]:
    arguments = json.dumps([str(program), *typed])
    shared = {"ACCELERATE_USE_CPU": "true", "ARGUMENTS": arguments, "DIE_AT": str(die_at)}
    return run_ranks(BODY, ranks, environments={rank: {**shared, "LOCAL_RANK": str(rank)} for rank in range(ranks)})


def left(output: Path) -> dict[str, bytes]:
    """The files of a run without checkpoints, which are cut into one part a rank."""
    return {name: data for name, data in repeatable(output).items() if not name.startswith("checkpoint-")}


def is_amid_a_round(output: Path) -> bool:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    manifest = json.loads((newest / "manifest.json").read_text())
    return any(name.endswith("live.safetensors") for name in manifest["pieces"])


@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
def test_the_program_of_the_page_leaves_the_same_on_one_rank_and_two_killed_and_resumed(
    program, world, tmp_path, extra
):
    (ended,) = train(program, 1, flags(world, tmp_path / "whole", **{**RUN, **extra}))
    assert ended.code == 0, ended.stderr
    ledger = pq.read_table(tmp_path / "whole" / "ledger.parquet").to_pydict()
    assert 3 < sum(ledger["skipped"]) < sum(ledger["seen"]) - 3
    assert "reference_share" in (tmp_path / "whole" / "training_config.yaml").read_text()
    whole = left(tmp_path / "whole")
    # Step 8 lies in the second round, of one rank's first clone or of both clones.
    for first, then in ((1, 2), (2, 1)):
        output = tmp_path / f"{first} then {then}"
        settings = flags(world, output, **{**RUN, **extra})
        assert any(rank.code == -9 for rank in train(program, first, settings, die_at=8))
        assert is_amid_a_round(output)
        for rank in train(program, then, settings):
            assert rank.code == 0, rank.stderr
        assert_same(left(output), whole)


def test_another_share_is_another_run(program, world, tmp_path):
    settings = flags(world, tmp_path / "out", **RUN)
    train(program, 1, settings, die_at=2)
    (ended,) = train(program, 1, {**settings, "reference_share": 0.5})
    assert ended.code == 2
    assert "`--reference_share` has changed (0.99 then, 0.5 now)" in ended.stderr


def test_the_program_is_shorter_than_forty_lines():
    assert len(PROGRAM.splitlines()) < 40


def test_its_flag_is_in_the_help_of_the_program_and_of_no_other(program):
    (ended,) = run_program(program, 1, ["--help-all"])
    assert ended.code == 0
    assert "--reference_share" in ended.stderr
    assert "reference_share" not in flag_names()

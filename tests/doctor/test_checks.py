"""Checks run in processes of their own, and say what they found whatever becomes of them."""

import json
import os
import time
from pathlib import Path

from iet_finetune.doctor.checks import (
    FAILED,
    NOT_HERE,
    PASSED,
    PASSED_ON_CPU,
    Check,
    Machine,
    expect,
    report,
    run_checks,
    shown,
)


def fine(machine: Machine, found: dict) -> None:
    found["rate, GB/s"] = 12.3456
    found["nothing"] = None


def lacking(machine: Machine, found: dict) -> None:
    machine.need_card()


def wrong(machine: Machine, found: dict) -> None:
    found["value"] = 3
    expect(found["value"] < 3, "the value | is too large")


def broken(machine: Machine, found: dict) -> None:
    print("said before")
    raise RuntimeError("something\nelse")


def crashing(machine: Machine, found: dict) -> None:
    found["before"] = 1
    os._exit(7)


def hanging(machine: Machine, found: dict) -> None:
    found["before"] = 1
    (machine.scratch / "there").touch()
    time.sleep(60)


ALL = [fine, lacking, wrong, broken, crashing, hanging]


def test_a_check_that_fails_crashes_or_hangs_does_not_end_the_others(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checks = [Check(function.__name__, f"is it {function.__name__}", function, 2) for function in ALL]
    outcomes = list(run_checks(checks))
    assert [(each.name, each.answer, each.reason) for each in outcomes] == [
        ("fine", PASSED_ON_CPU, ""),
        ("lacking", NOT_HERE, "needs a card"),
        ("wrong", FAILED, "the value | is too large"),
        ("broken", FAILED, "RuntimeError: something"),
        ("crashing", FAILED, "its process ended with exit code 7"),
        ("hanging", FAILED, "not done after 2 s"),
    ]
    assert [each.found for each in outcomes] == [{"rate, GB/s": 12.3456}, {}, {"value": 3}, {}, *[{"before": 1}] * 2]
    assert "said before" in outcomes[3].log
    assert "Traceback" in outcomes[3].log
    assert shown(outcomes[0]).startswith("| is it fine | passed, on a CPU | rate, GB/s 12.35 | ")
    assert shown(outcomes[2]).startswith("| is it wrong | FAILED | the value / is too large; value 3 | ")
    assert [each["name"] for each in json.loads(report(outcomes))["checks"]] == [each.__name__ for each in ALL]


def test_on_a_card_passed_is_passed(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (outcome,) = run_checks([Check("fine", "", fine, 20)])
    assert (outcome.answer, outcome.found) == (PASSED, {"rate, GB/s": 12.3456})


def test_each_check_has_an_empty_folder_that_is_gone_afterwards():
    folders = []

    def look(machine: Machine, found: dict) -> None:
        found["folder"] = str(machine.scratch)
        found["files"] = [path.name for path in machine.scratch.iterdir()]

    for outcome in run_checks([Check("a", "", look, 20), Check("b", "", look, 20)]):
        assert outcome.found["files"] == ["log"]
        folders.append(Path(outcome.found["folder"]))
    assert folders[0] != folders[1]
    assert not any(folder.exists() for folder in folders)

"""Checkpoints are complete or absent, whatever happens while one is written."""

import json
from collections import Counter

import pytest
import torch

from iet_finetune import UserError
from iet_finetune.distributed.groups import Ranks
from iet_finetune.ensemble.checkpoint import CheckpointStore
from iet_finetune.ensemble.pieces import Piece, state_piece, tensors_piece


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path)


class OneOfTwo(Ranks):
    """One of two ranks that live in the same process and count together."""

    def __init__(self, rank: int, said: Counter) -> None:
        super().__init__(rank, 2)
        self._said = said

    def is_last_to(self, what: str) -> bool:
        self._said[what] += 1
        return self._said[what] == 2

    def all_gather_object(self, value: str) -> list[str]:
        return ["of rank 0"] * 2


def pieces(value: float, version: str = "one"):
    return {
        "weights.safetensors": tensors_piece(f"{value}", {"w": torch.full((3,), value)}),
        "shard/state.pt": state_piece(version, {"step": 3, "moments": {0: torch.ones(2)}}),
    }


def test_what_was_saved_is_found_again(store):
    store.save(5, pieces(1.0), {"round": 2})
    found = store.find("latest")
    assert found.path.name == "checkpoint-5"
    assert found.manifest["round"] == 2
    assert found.tensors("weights.safetensors")["w"].tolist() == [1.0] * 3
    assert found.state("shard/state.pt")["moments"][0].tolist() == [1.0] * 2
    assert found.has("shard/state.pt")
    assert not found.has("shard/other.pt")


def test_latest_is_the_one_of_most_steps_and_may_be_absent(store):
    assert store.find("latest") is None
    for step in (9, 10, 100):
        store.save(step, pieces(float(step)), {})
    assert store.find("latest").path.name == "checkpoint-100"


@pytest.mark.parametrize(("limit", "kept"), [(1, [5]), (2, [4, 5]), (None, [1, 2, 3, 4, 5])])
def test_the_oldest_beyond_the_limit_are_removed_once_the_new_one_stands(tmp_path, limit, kept):
    store = CheckpointStore(tmp_path, limit)
    for step in range(1, 6):
        store.save(step, pieces(float(step)), {})
    assert [path.name for path in store.all()] == [f"checkpoint-{step}" for step in kept]


def test_a_write_that_fails_leaves_the_former_checkpoint_and_no_rubbish(store, tmp_path):
    store.save(1, pieces(1.0), {})

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left on the device, while writing .*checkpoint-2"):
        store.save(2, {**pieces(2.0), "broken": Piece("x", fail)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert store.find("latest").tensors("weights.safetensors")["w"].tolist() == [1.0] * 3


def test_an_interrupted_write_does_not_count(store, tmp_path):
    store.save(1, pieces(1.0), {})
    (tmp_path / ".checkpoint-2.partial").mkdir()
    (tmp_path / ".checkpoint-2.partial" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()
    assert CheckpointStore(tmp_path).find("latest").path.name == "checkpoint-1"


def test_going_back_puts_later_checkpoints_aside_until_a_new_one_stands(store, tmp_path):
    for step in (1, 2, 3):
        store.save(step, pieces(float(step)), {})
    store.go_back_to(store.find("checkpoint-1"))
    assert store.find("latest").path.name == "checkpoint-1"
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".checkpoint-2.given-up", ".checkpoint-3.given-up"]
    store.save(2, pieces(9.0), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_older_ones_beyond_the_limit_are_kept_if_asked_for(tmp_path):
    store = CheckpointStore(tmp_path, limit=1)
    store.save(1, pieces(1.0), {})
    store.save(2, pieces(2.0), {}, keep_older=True)
    assert [path.name for path in store.all()] == ["checkpoint-1", "checkpoint-2"]


def test_one_that_is_still_needed_is_kept_beyond_the_limit_until_it_is_not(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    needed = store.save(1, pieces(1.0), {})
    for step in (2, 3):
        store.save(step, pieces(float(step)), {}, needed=[needed])
        assert [path.name for path in store.all()] == ["checkpoint-1", f"checkpoint-{step}"]
    store.save(4, pieces(4.0), {})
    assert [path.name for path in store.all()] == ["checkpoint-4"]


def test_a_checkpoint_of_another_folder_is_refused(store, tmp_path):
    store.save(1, pieces(1.0), {})
    other = CheckpointStore(tmp_path / "other")
    with pytest.raises(UserError, match="is not in `--output_dir"):
        other.find(str(tmp_path / "checkpoint-1"))


def test_saving_the_same_step_again_replaces_it(store, tmp_path):
    store.save(1, pieces(1.0), {})
    store.save(1, pieces(2.0), {})
    assert store.find("latest").tensors("weights.safetensors")["w"].tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_pieces_of_the_same_version_are_linked_and_others_written(store, tmp_path):
    store.save(1, pieces(1.0), {})
    store.save(2, pieces(2.0), {})
    one, two = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert (one / "shard/state.pt").samefile(two / "shard/state.pt")
    assert not (one / "weights.safetensors").samefile(two / "weights.safetensors")


def test_a_rank_ahead_of_the_others_links_to_what_it_wrote_and_not_to_what_it_replaces(tmp_path):
    said: Counter = Counter()
    ahead, behind = (CheckpointStore(tmp_path, ranks=OneOfTwo(rank, said)) for rank in range(2))

    def weights(value: float):
        return {"weights.safetensors": tensors_piece(f"{value}", {"w": torch.full((3,), value)})}

    others = {"other.pt": state_piece("one", 1)}
    for value in (1.0, 2.0):
        ahead.save(5, weights(value), {})
        if value == 1.0:
            behind.save(5, others, {})
    # Here checkpoint-5 is still the first one: the second waits for the rank that is behind.
    ahead.save(6, weights(2.0), {})
    for step in (5, 6):
        behind.save(step, others, {})
        assert behind.open(tmp_path / f"checkpoint-{step}").tensors("weights.safetensors")["w"].tolist() == [2.0] * 3
    assert (tmp_path / "checkpoint-5" / "weights.safetensors").samefile(tmp_path / "checkpoint-6/weights.safetensors")


@pytest.mark.parametrize("damage", ["no json", '{"format": 1}', '{"format": 9, "pieces": {}}'])
def test_a_damaged_manifest_is_named(store, tmp_path, damage):
    path = store.save(1, pieces(1.0), {})
    (path / "manifest.json").write_text(damage)
    with pytest.raises(UserError, match="checkpoint-1"):
        CheckpointStore(tmp_path).find("latest")


def test_state_that_runs_code_when_loaded_is_refused(store):
    class Evil:
        def __reduce__(self):
            return (print, ("pwned",))

    store.save(1, {"state.pt": state_piece("x", {"a": Evil()})}, {})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        store.find("latest").state("state.pt")


def test_the_manifest_lists_every_piece(store):
    path = store.save(1, pieces(1.0), {})
    manifest = json.loads((path / "manifest.json").read_text())
    written = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {"manifest.json"}
    assert set(manifest["pieces"]) == written

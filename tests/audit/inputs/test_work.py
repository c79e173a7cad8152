"""What an audit has computed is used again, and only for what it was computed from."""

import numpy as np
import pytest

from iet_finetune.audit.inputs import work as module
from iet_finetune.audit.inputs.work import Work


class Killed(BaseException):
    """Stands for a process that is gone."""


def counting(limit: int | None = None):
    """What makes row i from i, remembers what it was asked for, and is killed after `limit` calls."""
    asked: list[range] = []

    def compute(part: range) -> np.ndarray:
        if limit is not None and len(asked) == limit:
            raise Killed
        asked.append(part)
        return np.array([[number, number**2] for number in part], dtype=np.float32)

    return compute, asked


EXPECTED = np.array([[number, number**2] for number in range(10)], dtype=np.float32)


def test_rows_are_made_batch_by_batch_and_only_once(tmp_path):
    compute, asked = counting()
    first = Work(tmp_path).rows("squares", {"of": 1}, 10, compute, batch=4)
    again = Work(tmp_path).rows("squares", {"of": 1}, 10, compute, batch=4)
    assert asked == [range(4), range(4, 8), range(8, 10)]
    np.testing.assert_array_equal(first, EXPECTED)
    np.testing.assert_array_equal(again, EXPECTED)


def test_an_interrupted_computation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    compute, _ = counting(limit=2)
    with pytest.raises(Killed):
        Work(tmp_path).rows("squares", {}, 10, compute, batch=4)
    compute, asked = counting()
    np.testing.assert_array_equal(Work(tmp_path).rows("squares", {}, 10, compute, batch=4), EXPECTED)
    assert asked == [range(8, 10)]


@pytest.mark.parametrize("change", [{"made_from": {"of": 2}}, {"name": "cubes"}, {"total": 9}], ids=str)
def test_what_was_made_from_something_else_is_not_used(tmp_path, change):
    settings = {"name": "squares", "made_from": {"of": 1}, "total": 10}
    Work(tmp_path).rows(**settings, compute=counting()[0], batch=10)
    compute, asked = counting()
    Work(tmp_path).rows(**(settings | change), compute=compute, batch=10)
    assert asked


def test_an_array_is_made_once(tmp_path):
    made = []

    def make(advance):
        advance(3)
        made.append(1)
        return np.arange(3)

    for _ in range(2):
        np.testing.assert_array_equal(Work(tmp_path).array("numbers", {"a": 1}, make), [0, 1, 2])
    assert made == [1]


def test_images_are_mapped_from_a_file_that_is_complete_or_absent(tmp_path):
    def fill(row, number):
        row[:] = number

    def killed(row, number):
        if number == 5:
            raise Killed
        row[:] = 99

    with pytest.raises(Killed):
        Work(tmp_path).filled("images", {}, (9, 2, 2, 3), killed)
    assert list(tmp_path.glob("*.npy")) == []
    images = Work(tmp_path).filled("images", {}, (9, 2, 2, 3), fill)
    assert isinstance(images, np.memmap)
    np.testing.assert_array_equal(images, np.broadcast_to(np.arange(9)[:, None, None, None], (9, 2, 2, 3)))
    np.testing.assert_array_equal(Work(tmp_path).filled("images", {}, (9, 2, 2, 3), killed), images)


def test_a_progress_bar_is_for_terminals_only(tmp_path, capsys):
    Work(tmp_path).rows("squares", {}, 10, counting()[0], batch=4)
    assert capsys.readouterr() == ("", "")

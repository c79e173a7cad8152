"""The random state of a clone's dropout, on whichever device it trains."""

import pytest
import torch

from iet_finetune.ensemble.clone import random_state, set_random_state


class Cards:
    """Stands in for a machine's GPUs, of which each has a generator; this process has the one numbered `own`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, own: int) -> None:
        self.own, self.states = own, [torch.tensor([number], dtype=torch.uint8) for number in range(count)]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: own)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.states[own])
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _set(self, state: torch.Tensor) -> None:
        self.states[self.own] = state

    @property
    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


def test_the_state_of_the_ranks_own_gpu_goes_on_on_another_number_of_gpus(monkeypatch):
    Cards(monkeypatch, 4, own=3)
    state = random_state()
    drawn = torch.rand(3)
    cards = Cards(monkeypatch, 2, own=1)
    set_random_state(state)
    assert cards.numbers == [0, 3]
    assert torch.equal(torch.rand(3), drawn)


def test_a_state_of_all_gpus_that_an_earlier_version_wrote_goes_on(monkeypatch):
    old = {**random_state(), "cuda": [torch.tensor([10 + number], dtype=torch.uint8) for number in range(2)]}
    cards = Cards(monkeypatch, 4, own=1)
    set_random_state(old)
    assert cards.numbers == [0, 11, 2, 3]
    cards = Cards(monkeypatch, 4, own=3)
    set_random_state(old)
    assert cards.numbers == [0, 1, 2, 10]


def test_a_gpu_and_a_cpu_go_on_from_each_others_state(monkeypatch):
    on_cpu = random_state()
    cards = Cards(monkeypatch, 1, own=0)
    on_gpu = random_state()
    set_random_state(on_cpu)
    assert cards.numbers == [0]
    Cards(monkeypatch, 0, own=0)
    set_random_state(on_gpu)
    assert torch.equal(torch.get_rng_state(), on_gpu["cpu"])

"""A resumable training loop on one thread: AdamW, cosine learning rate, bfloat16, averaged weights."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

# Gives the loss of one step: its argument is that step's own random generator.
LossOfStep = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 100
    seed: int = 0
    save_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 50


class TrainingState:
    """A module with its optimizer, learning-rate schedule, averaged weights and step number."""

    def __init__(self, module: torch.nn.Module, recipe: Recipe):
        self.module = module
        self.step = 0
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=recipe.lr, weight_decay=0.01, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, recipe.warmup, recipe.steps)
        self.ema = EMAModel(self.parameters, decay=0.999, foreach=True)

    def update(self, loss: torch.Tensor) -> None:
        """One optimizer step down the gradient of `loss`."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.parameters)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write everything that `load` needs; an interruption leaves the file that was there before."""
        parts = {name: getattr(self, name).state_dict() for name in ("module", "optimizer", "schedule", "ema")}
        beside = path.with_suffix(".new")
        torch.save({"step": self.step, **parts}, beside)
        os.replace(beside, path)

    def load(self, path: Path) -> None:
        """Go back to the state in `path`."""
        saved = torch.load(path, weights_only=True)
        self.step = saved.pop("step")
        for name, part in saved.items():
            getattr(self, name).load_state_dict(part)

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The module with its averaged weights, for the time of a `with` block."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        yield self.module
        self.ema.restore(self.parameters)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, a function of (seed, step), so that resuming changes none of them."""
    key = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key >> np.uint64(1)))


def train(
    state: TrainingState,
    loss_of_step: LossOfStep,
    recipe: Recipe,
    checkpoint: Path,
    after_save: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `state` up to `recipe.steps`, from `checkpoint` if that file exists.

    Writes `checkpoint` every `recipe.save_every` steps and calls `after_save(step)` each time. Prints the mean
    loss and the seconds a step since the last line.
    """
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"{checkpoint.stem}: goes on at step {state.step}", flush=True)
    losses, start = [], time.perf_counter()
    while state.step < recipe.steps:
        # The plain attention kernel is a fifth faster here than the CPU's flash kernel in bfloat16.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of_step(generator_of(recipe.seed, state.step))
        state.update(loss)
        losses.append(loss.item())
        if state.step % recipe.log_every == 0:
            seconds = (time.perf_counter() - start) / len(losses)
            where = f"{checkpoint.stem}: step {state.step}/{recipe.steps}"
            print(f"{where}  loss {np.mean(losses):.4f}  {seconds:.3f} s a step", flush=True)
            losses, start = [], time.perf_counter()
        if state.step % recipe.save_every == 0 or state.step == recipe.steps:
            state.save(checkpoint)
            after_save(state.step)

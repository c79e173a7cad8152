"""What the end-to-end tests share: a small pipeline and its images, and a finished run."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from e2e.command import flags, words
from tiny import save_images, save_tiny_sd

from iet_finetune import cli


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a pipeline of 10 timesteps; `data`, 12 images; `trained`, what a finished run of one round left."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_sd(folder / "base", timesteps=10)
    save_images(folder / "data", 12)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.main(["train", *words(flags(folder, folder / "trained"))]) == 0
    return folder

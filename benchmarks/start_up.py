"""How long a fresh Python takes: to train its first step, and for diffusers alone to load a pipeline."""

import subprocess
import sys
import time
from pathlib import Path

from running import environment

# Prints a line when it has imported, when it has built everything, and when the first step is done.
FIRST_STEP = """
import os, sys
import iet_finetune
config = iet_finetune.Config.from_command_line(sys.argv[1:])
trainer_class = iet_finetune.Trainer
print(flush=True)
class FirstStep(iet_finetune.Callback):
    def on_step_end(self, facts):
        print(flush=True)
        os._exit(0)
trainer = trainer_class(config, callbacks=[FirstStep()])
print(flush=True)
trainer.train_rounds()
"""
# Prints a line when it has imported, and one when the pipeline is there.
LOADED_PIPELINE = """
import sys
from diffusers import DiffusionPipeline
print(flush=True)
DiffusionPipeline.from_pretrained(sys.argv[1])
print(flush=True)
"""


def time_lines(code: str, arguments: list[str], scratch: Path) -> list[float]:
    """Seconds from the start of a fresh Python to each line that it prints."""
    command, began = [sys.executable, "-c", code, *arguments], time.perf_counter()
    with subprocess.Popen(
        command, env=environment(scratch), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        times = [time.perf_counter() - began for _ in process.stdout]
        said = process.stderr.read()
    if process.returncode:
        sys.exit(f"{said}\nexit code {process.returncode} of a start-up")
    return times

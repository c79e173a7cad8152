"""Plans a run as the flags say and writes what it would take: measured_plan.py REPORT FLAGS..."""

import json
import sys
from pathlib import Path

import torch

from iet_finetune import Config
from iet_finetune.planning.plan import make_plan

if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = make_plan(Config.from_command_line(sys.argv[2:]))
    said = {"resident": max(plan.host.values()), "seconds": sum(plan.seconds.values()), "parts": plan.seconds}
    Path(sys.argv[1]).write_text(json.dumps(said), encoding="utf-8")

"""Fine-tune a diffusers pipeline with IET-AGC: parse the configuration, build a Trainer, train.

Start it with `accelerate launch train_iet_agc.py --config FILE`, or with `python`; `--help` lists the flags.
"""

import sys

import iet_finetune
from iet_finetune.cli import run


def main() -> None:
    """Train as the command line says."""
    # The flags are checked first: `iet_finetune.Trainer` is what imports torch.
    config = iet_finetune.Config.from_command_line(sys.argv[1:])
    iet_finetune.Trainer(config).train()


if __name__ == "__main__":
    sys.exit(run(main))

"""Fine-tune a diffusers pipeline with IET-AGC: parse the configuration, build a Trainer, train.

Start it with `accelerate launch train_iet_agc.py --config FILE`, or with `python`; `--help` shows the main flags.
"""

import sys

from iet_finetune.cli import run, train

if __name__ == "__main__":
    sys.exit(run(lambda: train(sys.argv[1:])))

"""Loads a pipeline and reads all its weights, with others that do so too: measured_loading.py REPORT FOLDER HOW.

It says so on stdout, measures when all have come so far and a line comes on stdin, and stays until another comes.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from measured_run import sampled_peaks

from iet_finetune.config.settings import ModelConfig
from iet_finetune.families import find_pipeline, load_as_stored, load_pipeline
from iet_finetune.planning.peaks import read_status

LOADERS: dict[str, Any] = {"in fp32": load_pipeline, "as stored": load_as_stored}


def mapped_weights() -> int:
    """Bytes of weights files that are mapped into memory; of a page that n processes map, 1/n in each."""
    mappings = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return 1024 * sum(int(size) for size in re.findall(r"\.safetensors\n(?:.*\n)*?Pss:\s+(\d+) kB$", mappings, re.M))


def main(report: Path, folder: str, how: str) -> None:
    """Load, wait, measure; in bytes, beside what the process had before."""
    model = ModelConfig(pretrained_model_name_or_path=folder)
    source = find_pipeline(model)
    before, peaks = read_status()["RssAnon"], dict[str, int]()
    with sampled_peaks(peaks):
        pipeline = LOADERS[how](source, model)
        models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        for parameter in (parameter for part in models for parameter in part.parameters()):
            parameter.flatten()[::512].sum().item()  # a number of every page
    print("loaded", flush=True)
    sys.stdin.readline()
    own = read_status()["RssAnon"] - before
    found = {"peak": peaks["RssAnon"] - before, "own": own, "mapped": mapped_weights()}
    report.write_text(json.dumps(found), encoding="utf-8")
    print("measured", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Opens the cache of a run, encodes what it lacks, and writes what that took: measured_cache.py REPORT FLAGS..."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured_run import sampled_peaks

from iet_finetune import Config
from iet_finetune.cache.caching import encode_data
from iet_finetune.data.dataset import TrainingImages, load_images
from iet_finetune.data.encoded import EncodedData
from iet_finetune.data.loader import stacked
from iet_finetune.data.transforms import ImageTransform
from iet_finetune.distributed.groups import Ranks
from iet_finetune.families import find_pipeline, load_family
from iet_finetune.planning.peaks import peak_resident, read_status

SAMPLES = 1000


def own_memory(status: dict[str, int]) -> int:
    """Bytes that are the process's own; the most that it ever had, of all kinds, where the system does not tell."""
    return status.get("RssAnon") or peak_resident()


def read_samples(encoded: EncodedData, images: TrainingImages, batch: int) -> None:
    """Random ones, every second of them mirrored, copied into batches as for training."""
    chosen = np.random.default_rng(0).integers(len(images), size=SAMPLES)
    for start in range(0, SAMPLES, batch):
        numbered = enumerate(chosen[start : start + batch])
        stacked([encoded(int(index), number % 2 == 1, images.captions[index][0])[0] for number, index in numbered])


def measure(config: Config) -> dict[str, Any]:
    """Seconds to load the images, open the cache and read samples; bytes of memory before the cache, and at most."""
    began = time.perf_counter()
    images, _ = load_images(config.data, cache_dir=config.model.cache_dir, seed=config.training.seed)
    loaded = time.perf_counter() - began
    family = load_family(find_pipeline(config.model), config)
    transform = ImageTransform(
        config.data.resolution,
        center_crop=config.data.center_crop,
        interpolation=config.data.image_interpolation_mode,
        seed=config.training.seed,
    )
    family.freeze()
    before, peaks = own_memory(read_status()), {}
    with sampled_peaks(peaks):
        began = time.perf_counter()
        encoded = encode_data(config, family, images, transform, Ranks.alone(), torch.device("cpu"))
        opened = time.perf_counter() - began
    memory = {"before": before, "own": own_memory(peaks), "resident": peak_resident()}
    began = time.perf_counter()
    read_samples(encoded, images, config.training.train_batch_size)
    read = time.perf_counter() - began
    return {"loaded": loaded, "opened": opened, "read": read, **memory, "with_samples": peak_resident()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(measure(Config.from_command_line(sys.argv[2:]))), encoding="utf-8")

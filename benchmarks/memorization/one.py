"""One run: trains one arm of one set with one seed, and writes down what was measured on the way."""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from PIL import Image

from iet_finetune import Config, Trainer
from iet_finetune.audit.measures.separation import auc
from iet_finetune.families import family_class
from iet_finetune.families.finding import source_of
from iet_finetune.files import LEDGER, written_beside
from iet_finetune.training.data import compares_with

from . import other_clones, rules
from .arms import ARMS, COURSES, FINE_TUNED, base, chosen_rows, config_of
from .features import GarmentFeatures, SmallEfficientNet
from .judge import OFTEN, Judge, Ruler, losses, measure
from .sets import SETS, EvidenceSet, table

BEFORE = "before"


def measured_file(home: Path, name: str, arm: str, seed: int) -> Path:
    """Where the measurements of a run are."""
    return home / "measured" / f"{name}.{arm}.{seed}.json"


def read(file: Path) -> list[dict[str, Any]]:
    """The measurements of a run, one row a judged round."""
    return json.loads(file.read_text())


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Keeps the measurements of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(file) as partial:
        partial.write_text(json.dumps(rows, default=_plain) + "\n")


def run(name: str, arm: str, seed: int, home: Path) -> None:
    """Trains and judges; does nothing if it was done, and waits if another process is at it."""
    file = measured_file(home, name, arm, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            write_rows(file, _measured(name, arm, seed, home))


def _measured(name: str, arm: str, seed: int, home: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    evidence = SETS[name](seed, home / "packages")
    features = (GarmentFeatures if name.startswith("garments") else SmallEfficientNet)(home / "features")
    ruler = Ruler(evidence, features)
    labels = {"set": name, "arm": arm, "seed": seed}
    if arm == BEFORE:
        return [{**labels, "round": 0, "step": 0, **_before(name, seed, home, ruler)}]
    return _trained(name, arm, seed, home, ruler, labels)


def _before(name: str, seed: int, home: Path, ruler: Ruler) -> dict[str, Any]:
    """The held-out images in the place of generated ones, and the model that fine-tuning starts from."""
    row = {f"baseline_{key}": value for key, value in ruler.baseline.items()}
    if name in FINE_TUNED:
        pipeline, config = base(name, seed, home), config_of(name, "plain", seed, home, {})
        family = family_class(source_of(pipeline), config.model)(pipeline, config)
        row |= measure(family.sampling_pipeline(), config, ruler, COURSES[name], None)
        del row["losses"], row["drawn"]
    return row


def _trained(name: str, arm: str, seed: int, home: Path, ruler: Ruler, labels: dict[str, Any]) -> list[dict[str, Any]]:
    as_saved, rows = ARMS[arm].as_saved, chosen_rows(name, ARMS[arm], ruler.evidence)
    course = replace(COURSES[name], judged=()) if as_saved else COURSES[name]
    rules.register()
    extra = {"chance_of_skipping": _skipped(name, seed, home)} if arm == "chance" else {}
    with tempfile.TemporaryDirectory(prefix="iet-evidence-") as scratch:
        config = config_of(name, arm, seed, Path(scratch) / "run", extra)
        pipeline = base(name, seed, home)
        reference = _reference(pipeline, config, ruler) if name in FINE_TUNED else None
        judge = Judge(ruler, config, rows, course, labels, reference)
        heldout = table(ruler.evidence.seen) if compares_with(config) else None
        # A search of its own leaves the same images, of which the judge must know.
        dataset = ruler.evidence.dataset(rows if config.data.dedup == "none" else None)
        callbacks = [judge, listening := other_clones.Listening()]
        trainer = Trainer(config, callbacks, pipeline=pipeline, dataset=dataset, heldout_images=heldout)
        if config.training.skip_rule == other_clones.NAME:
            listening.trainer = trainer
        trainer.train()
        if as_saved:
            judge.of_saved(DiffusionPipeline.from_pretrained(str(config.output_path), dtype=torch.float32))
        judge.measured[-1] |= told_by_ledger(config.output_path / LEDGER, ruler.evidence, rows)
    save_grid(judge.drawn[:64], home / "drawn" / f"{name}.{arm}.{seed}.png")
    return judge.measured


def told_by_ledger(file: Path, evidence: EvidenceSet, rows: np.ndarray) -> dict[str, float]:
    """How well columns of the ledger tell repeated originals from those in the data once: AUC by column.

    An original is told by the highest value of its rows; those of which nothing is known are left out.
    """
    ledger = pq.read_table(file).to_pandas().query("split == 'train'")
    assert len(ledger) == len(rows)
    values = {"copies": ledger["copies"], "loss": -ledger["mean_log_ratio"]}
    if "guard_score" in ledger:
        values["guard"] = ledger["guard_score"]
    found = {}
    often, once = evidence.repeats >= OFTEN, evidence.repeats == 1
    for name, column in values.items():
        highest = np.full(len(evidence.repeats), -np.inf)
        np.maximum.at(highest, evidence.origin[rows], column.fillna(-np.inf).to_numpy(np.float64))
        known = np.isfinite(highest)
        if (often & known).any() and (once & known).any():
            found[f"ledger_{name}"] = auc(highest[often & known], highest[once & known])
    return found


def save_grid(images: np.ndarray, file: Path) -> None:
    """Images (n, H, W, 3) uint8 in rows of 16, to look at."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = -(-len(images) // 16)
    Image.fromarray(np.concatenate([np.concatenate(images[16 * row : 16 * row + 16], 1) for row in range(rows)])).save(
        file
    )


def _reference(pipeline: Any, config: Config, ruler: Ruler) -> tuple[np.ndarray, np.ndarray]:
    family = family_class(source_of(pipeline), config.model)(pipeline, config)
    with torch.no_grad():
        ours, others, _ = losses(family, ruler, config)
    return ours, others


def _skipped(name: str, seed: int, home: Path) -> float:
    """The share of samples that AGC skipped in the run with the same set and seed."""
    return float(read(measured_file(home, name, "agc", seed))[-1]["skipped_all"])


def _plain(value: Any) -> Any:
    """Numbers of numpy as numbers of JSON."""
    return value.item() if isinstance(value, np.generic) else value.tolist()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))

"""What is compared: plain training, de-duplication, the parts of IET-AGC, and how each set is trained."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from filelock import FileLock

from iet_finetune import Config, Trainer
from iet_finetune.data.duplicates import find_duplicates

from . import other_clones, rules
from .sets import FEW, LONG, UNIQUE, UNIQUES, EvidenceSet, array, seen_classes, small, table
from .sources import ROOT

# Clones of the arms with iterative ensemble training.
SHARDS = 4
# Channels of the networks in pixels, by level.
LEVELS = (24, 48, 64)


@dataclass(frozen=True)
class Course:
    """How the models of a set are trained, whatever the arm, and where they are judged.

    Attributes:
        round_steps: optimizer steps between two merges, of all clones together.
        judged: after which rounds; the last one ends the run.
        drawn: images that are drawn then, in `sampling_steps` steps each.
        flags: further settings of the trainer.
    """

    round_steps: int
    judged: tuple[int, ...]
    drawn: int
    flags: dict[str, Any]
    sampling_steps: int = 16


_FLAGS = {
    "learning_rate": 1e-3,
    "lr_warmup_steps": 20,
    "use_ema": True,
    "ema_max_decay": 0.99,
    # Nobody looks at them.
    "num_validation_images": 1,
    "validation_inference_steps": 1,
}
_GARMENTS = {**_FLAGS, "train_batch_size": 16, "resolution": 16, "learning_rate": 2e-3}
COURSES = {
    # A quarter of the steps, as many as a clone takes, ends with a judged round.
    "garments": Course(120, (1, 2, 3, 5, 8, 12), 384, _GARMENTS),
    "garments-class": Course(120, (1, 2, 3, 5, 8, 12), 384, {**_GARMENTS, "class_column": "label"}),
    # In 32 pixels, six minutes of a core are not enough to learn to draw.
    "emoji": Course(120, (1, 2, 3, 5, 8, 12), 384, _GARMENTS),
    "garments-new": Course(80, (1, 3, 5, 8, 12), 384, {**_GARMENTS, "learning_rate": 1e-3}),
    "text-to-image": Course(
        40, (2, 4, 6, 8), 120, {**_FLAGS, "train_batch_size": 16, "resolution": 64, "learning_rate": 3e-4}, 10
    ),
}
# A set with one question has few arms, and is judged where that is answered: a pass of `UNIQUE` has 12.5 steps, one of
# `FEW` 3.75; of `LONG`, plain training is best after round five, so round 6 is 1.2 times the best stop and round 15
# three times.
COURSES[UNIQUE] = Course(48, (4, 10, 20, 30, 40), 384, COURSES["garments-new"].flags)
COURSES[FEW] = Course(8, (6, 12, 24, 48, 96), 384, COURSES["garments-new"].flags)
COURSES[LONG] = replace(COURSES["text-to-image"], judged=(3, 5, 6, 15))
ARMS_OF = {
    UNIQUE: ("plain", "agc", "iet", "iet-agc", "guard", "lora", "calibrated", "guard-pull"),
    FEW: ("plain", "agc", "iet-agc", "guard", "guard-pull"),
    LONG: ("plain", "iet-agc", "search", "search-guard", "search-guard-pull", "search-guard-stop"),
}
FINE_TUNED = ("garments-new", "text-to-image", *UNIQUES, LONG)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        words: what it is called in tables.
        flags: settings of the trainer.
        rows: which training images are left: `all`; `originals` alone, as somebody who knows all copies would choose;
            or what `find_duplicates` leaves (`searched`).
        shards: K.
        only_fine_tuned: whether it makes sense for a pretrained model alone, as an adapter does, and a comparison with
            the model as it came.
        as_saved: whether the pipeline that it leaves is judged, and not its rounds; in `LONG` alone.
    """

    words: str
    flags: dict[str, Any]
    rows: str = "all"
    shards: int = 1
    only_fine_tuned: bool = False
    as_saved: bool = False


# Of a network in pixels: its convolutions too, of which it mainly consists.
_LORA_LAYERS = "to_k,to_q,to_v,to_out.0,conv1,conv2"
_OFF, _AGC = {"agc_threshold": 0.0}, {"agc_threshold": 0.5, "agc_decay": 0.8, "agc_bins": 50}
_CALIBRATED, _GUARD = {"skip_rule": "calibrated_agc"}, {"skip_rule": "guard", "guard_budget": 0.08}
_PULL = {**_GUARD, "guard_pull": 1.0}
ARMS = {
    "plain": Arm("plain training", _OFF),
    "agc": Arm("AGC", _AGC),
    "chance": Arm("skipping by chance, as often as AGC", {"skip_rule": rules.NAME}),
    "iet": Arm("IET", _OFF, shards=SHARDS),
    "iet-agc": Arm("IET-AGC", _AGC, shards=SHARDS),
    "iet-weights": Arm("IET, without a moving average", {**_OFF, "use_ema": False}, shards=SHARDS),
    "search": Arm("de-duplicated by search", {**_OFF, "dedup": "near"}, "searched"),
    "oracle": Arm("de-duplicated by an oracle", _OFF, "originals"),
    "guard": Arm("guard", _GUARD),
    "search-guard": Arm("guard, de-duplicated by search", {**_GUARD, "dedup": "near"}, "searched"),
    "lora": Arm(
        "LoRA of rank 8", {**_OFF, "use_lora": True, "rank": 8, "lora_layers": _LORA_LAYERS}, only_fine_tuned=True
    ),
    "calibrated": Arm("calibrated AGC", _CALIBRATED, only_fine_tuned=True),
    "search-calibrated": Arm(
        "calibrated AGC, de-duplicated by search",
        {**_CALIBRATED, "dedup": "near"},
        "searched",
        only_fine_tuned=True,
    ),
    "search-guard-stop": Arm(
        "guard, de-duplicated by search, ending by itself",
        {**_GUARD, "dedup": "near", "stop_when": "auto"},
        "searched",
        only_fine_tuned=True,
        as_saved=True,
    ),
    "guard-pull": Arm("guard that pulls", _PULL, only_fine_tuned=True),
    "search-guard-pull": Arm(
        "guard that pulls, de-duplicated by search", {**_PULL, "dedup": "near"}, "searched", only_fine_tuned=True
    ),
    "guard-levels": Arm(
        "guard that chooses its noise levels",
        {**_GUARD, "guard_levels": (0.005, 0.01, 0.02, 0.04, 0.08, 0.15), "guard_best_levels": 3},
        only_fine_tuned=True,
    ),
    "guard-clones": Arm(
        "IET, guard by the other clones",
        {"skip_rule": other_clones.NAME, "shard_strategy": other_clones.SHARDING},
        shards=SHARDS,
        only_fine_tuned=True,
    ),
}
# In latent space the paper has another threshold for AGC, and an adapter goes to the attention alone.
_LATENT = {"agc": {"agc_threshold": 0.8}, "iet-agc": {"agc_threshold": 0.8}, "lora": {"lora_layers": None}}


def arms_of(name: str) -> list[str]:
    """The arms that a set is trained with, those that others wait for first."""
    fitting = [arm for arm, each in ARMS.items() if name in FINE_TUNED or not each.only_fine_tuned]
    return [arm for arm in fitting if arm in ARMS_OF.get(name, ARMS) and (name == LONG or not ARMS[arm].as_saved)]


def is_latent(name: str) -> bool:
    """Whether a set has captions and is learned in latent space."""
    return name.startswith("text-to-image")


def chosen_rows(name: str, arm: Arm, evidence: EvidenceSet) -> np.ndarray:
    """Which training images of a set an arm is trained on."""
    if arm.rows == "originals":
        return evidence.firsts
    if arm.rows == "searched":
        # Images of different classes are no copies of each other, for a model that draws by class.
        by_class = "class_column" in COURSES[name].flags
        kinds = evidence.labels if by_class else np.zeros(len(evidence.rows), np.int64)
        left = []
        for kind in np.unique(kinds):
            rows = np.flatnonzero(kinds == kind)
            found = find_duplicates(array([evidence.rows[row] for row in rows])).representative
            left.append(rows[found == np.arange(len(found))])
        return np.sort(np.concatenate(left))
    return np.arange(len(evidence.rows))


def config_of(name: str, arm: str, seed: int, output: Path, extra: dict[str, Any]) -> Config:
    """The settings of one run."""
    course, each = COURSES[name], ARMS[arm]
    steps = course.round_steps // each.shards
    flags = {
        **course.flags,
        **each.flags,
        **(_LATENT.get(arm, {}) if is_latent(name) else {}),
        **extra,
        "num_shards": each.shards,
        "merge_every_steps": steps,
        "max_train_steps": steps * course.judged[-1],
        "output_dir": str(output),
        "seed": seed,
        "report_to": "none",
        "checkpoints_total_limit": 1,
        "checkpointing_steps": 10**9,
        "lr_warmup_steps": course.flags["lr_warmup_steps"] // each.shards,
    }
    return Config.from_flags(**flags)


def network(
    size: int, channels: int, classes: int | None, seed: int, prediction_type: str = "epsilon"
) -> DDPMPipeline:
    """A small network with random weights: 0.9 M parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=LEVELS,
            layers_per_block=1,
            down_block_types=(*("DownBlock2D",) * (len(LEVELS) - 1), "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * (len(LEVELS) - 1)),
            norm_num_groups=8,
            attention_head_dim=8,
            num_class_embeds=classes,
        )
    return DDPMPipeline(unet, DDPMScheduler(prediction_type=prediction_type))


def base(name: str, seed: int, home: Path) -> Any:
    """The pipeline that a set's runs start from, in memory."""
    if is_latent(name):
        return DiffusionPipeline.from_pretrained(str(ROOT / "demo" / "pipeline"), dtype=torch.float32)
    if name in FINE_TUNED:
        return DiffusionPipeline.from_pretrained(str(trained_base(home)))
    size = COURSES[name].flags["resolution"]
    if name == "emoji":
        # Predicting noise, so short a training does not find the white ground.
        return network(size, 3, None, seed, "v_prediction")
    return network(size, 1, 10 if name == "garments-class" else None, seed)


def trained_base(home: Path) -> Path:
    """The base of garments of unseen classes: trained once on 8,000 garments of the other classes, for six passes."""
    output = home / "garments-base"
    # Two runs that begin together train it once.
    with FileLock(output.with_suffix(".lock")):
        if not (output / "model_index.json").is_file():
            _train_base(output)
    return output


def _train_base(output: Path) -> None:
    images = seen_classes()
    images = images._replace(images=[small(image, 16) for image in images.images])
    settings = {**_GARMENTS, **_OFF, "num_shards": 1}
    config = Config.from_flags(
        **settings, max_train_steps=3000, merge_every_steps=500, output_dir=str(output), report_to="none",
        checkpointing_steps=10**9, checkpoints_total_limit=1, resume_from_checkpoint="latest",
    )  # fmt: skip
    Trainer(config, pipeline=network(16, 1, None, 0), dataset=table(images)).train()

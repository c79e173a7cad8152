"""From what a trial took to what the whole run will take: seconds, memory and disk."""

from collections.abc import Iterable

from ..config.config import Config
from ..data.dataset import TrainingImages
from ..distributed.placement import Placement
from ..method.schedule import Schedule
from ..training.class_images import missing
from .trial import STEPS, Trial

# Phases in which everything that training keeps is there.
_WITH_CLONES = ("looking", "training", "merging", "saving")


def seconds(
    config: Config, trial: Trial, schedule: Schedule, placement: Placement, num_images: int
) -> dict[str, float]:
    """How long each part of the run takes.

    A step is taken to cost by its images; checking clones out and bringing them together by their number; looks of a
    rule by what a round visits; checkpoints by their bytes.

    Args:
        schedule: of the run.
        placement: of its shards on its ranks.
        num_images: to be encoded, if there is a cache.
    """
    took, rounds = trial.seconds, schedule.remaining_rounds([0] * len(schedule.shard_sizes))
    waves, clones = len(list(placement.waves())), trial.config.ensemble.num_shards
    one_after_the_other = [max(schedule.visits(shard) for shard in wave) for wave in placement.waves()]
    by_image = trial.step_seconds / max(trial.images, 1)
    by_step = trial.step_seconds / max(trial.steps, 1)
    checked_out = max(_mean(took["training"][1:]) - STEPS * by_step, 0.0)
    merged = sum(took["merging"][-clones:]) / clones
    looked = sum(took["looking"][-2:]) * schedule.visits_a_round / max(trial.images / max(trial.steps, 1) * STEPS, 1)
    larger = trial.needs.run.checkpoint / max(trial.needs.trial.checkpoint, 1)
    checkpoints = rounds + sum(schedule.total_steps) // config.checkpoint.checkpointing_steps
    estimate = {
        "getting ready": sum(sum(took.get(phase, ())) for phase in ("reading", "loading", "preparing")),
        "class images": _drawing_class(config, trial) / placement.num_ranks,
        "encoding": _encoding(config, trial, num_images) / placement.num_ranks,
        "training": by_image * sum(one_after_the_other) / placement.group_size + rounds * waves * checked_out,
        "merging": rounds * waves * merged,
        "looking at losses": rounds * looked / placement.num_ranks,
        "checkpoints": checkpoints * took["saving"][-2] * larger,
        "validation images": _drawing(config, trial, rounds),
        "saving the result": took["saving"][-1],
    }
    return {part: value for part, value in estimate.items() if value >= 0.05}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _drawing_class(config: Config, trial: Trial) -> float:
    """Of the class images that are not there yet; 0 if all are."""
    if not config.prior.is_on or not (left := missing(config)):
        return 0.0
    return sum(trial.seconds["drawing class images"]) / trial.drawn * len(left)


def _encoding(config: Config, trial: Trial, num_images: int) -> float:
    return sum(trial.seconds["encoding"]) / trial.encoded * num_images if config.data.cache_latents else 0.0


def _drawing(config: Config, trial: Trial, rounds: int) -> float:
    """Of all validation images; the round before training and the last one have some, too."""
    if "drawing" not in trial.seconds:
        return 0.0
    settings, last = config.validation, rounds % config.validation.validation_rounds != 0
    times = 1 + rounds // settings.validation_rounds + last
    return (
        by_drawn_image(trial) * settings.num_validation_images * num_prompts(config) * times * _longer(config, trial)
    )


def by_drawn_image(trial: Trial) -> float:
    """Seconds for a validation image of the trial; 0 if none was drawn."""
    drawn = trial.seconds.get("drawing")
    return drawn[-1] / trial.config.validation.num_validation_images if drawn else 0.0


def num_prompts(config: Config) -> int:
    """Of the validation images; a model without prompts draws once."""
    return max(1, len(config.validation.validation_prompts))


def _longer(config: Config, trial: Trial) -> float:
    return config.validation.validation_inference_steps / trial.config.validation.validation_inference_steps


def drawing_for_audit(config: Config, trial: Trial) -> float:
    """Seconds for the images that the audit draws; 0 if the trial drew none."""
    steps = config.audit.num_inference_steps / trial.config.validation.validation_inference_steps
    return by_drawn_image(trial) * config.audit.num_images * steps


def memory(trial: Trial, *, device_is_host: bool, offloaded: bool) -> dict[str, int]:
    """The most bytes of host memory of a rank in each phase, with the clones that the trial did without."""
    here, there = (need.memory(device_is_host=device_is_host, offloaded=offloaded) for need in trial.needs)
    return {phase: size + (there - here) * (phase in _WITH_CLONES) for phase, size in trial.host.items()}


def cache(trial: Trial, images: Iterable[TrainingImages]) -> int:
    """Bytes in the cache of what the run encodes: all images, and each caption once."""
    sets = list(images)
    captions = {text for each in sets for texts in each.captions for text in texts}
    image, caption = trial.rows
    return image * sum(map(len, sets)) + caption * len(captions)


def disk(config: Config, trial: Trial, rounds: int) -> dict[str, int]:
    """Bytes of what the run leaves on the disk, and of one checkpoint more while it is written."""
    limit = config.checkpoint.checkpoints_total_limit or rounds
    kept = min(limit, rounds) + 1 + (config.training.stop_when == "auto")
    parts = {f"{kept} checkpoints": kept * trial.needs.run.checkpoint, "the result": trial.result}
    if config.checkpoint.save_every_rounds is not None and (saved := rounds // config.checkpoint.save_every_rounds):
        parts[f"{saved} rounds"] = saved * trial.result
    return parts

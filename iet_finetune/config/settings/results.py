"""What a run shows, measures, keeps and publishes; nothing of it decides the weights."""

from dataclasses import dataclass

from ..flags import other
from .checks import at_least_one, not_negative, require


@dataclass(frozen=True)
class ValidationConfig:
    """Images drawn during training, always from the same prompts and seeds."""

    validation_prompts: tuple[str, ...] = other(
        (),
        "Prompts (or names of classes) drawn before training and after rounds.",
        scope="public",
        brief=True,
    )
    num_validation_images: int = other(4, "Images a prompt.", smoke=1)
    validation_rounds: int = other(
        1, "Draw after every this many rounds (always before the first and after the last).", smoke=1
    )
    validation_inference_steps: int = other(25, "Denoising steps of a validation image.", smoke=2)
    validation_guidance_scale: float | None = other(
        None, "Guidance of validation images; what the pipeline draws with by default if not given.", needs="prompts"
    )

    def __post_init__(self) -> None:
        for name in ("num_validation_images", "validation_rounds", "validation_inference_steps"):
            at_least_one(name, getattr(self, name))
        not_negative("validation_guidance_scale", self.validation_guidance_scale or 0.0)


@dataclass(frozen=True)
class AuditConfig:
    """Measuring how much the finished pipeline repeats its training images, and how good its images are."""

    audit: bool = other(
        False,
        "Audit the pipeline when it is finished; `iet-finetune audit` does it later.",
        names=("pipeline", "dataset"),
        smoke=False,
    )
    holdout_data_dir: str | None = other(
        None,
        "Folder of images that were never trained on, read like `--train_data_dir`; or see `--holdout_fraction`.",
        scope="local",
        names=("heldout_images",),
        audit="run",
    )
    num_images: int = other(1000, "Images that are drawn and measured.", audit="run")
    prompts: str = other(
        "train",
        "What they are drawn from: the captions (or classes) of the training images (train) or of those held out "
        "(heldout), the empty prompt (none), or a text file with a prompt a line.",
        scope="local",
        per_machine=False,
        audit="run",
    )
    scheduler: str | None = other(
        None,
        "Scheduler of diffusers to draw with, such as DDIMScheduler; the pipeline's own if not given.",
        scope="public",
        audit="run",
    )
    num_inference_steps: int = other(50, "Denoising steps of an image.", audit="run")
    sampling_guidance_scale: float | None = other(
        None, "Guidance to draw with; what the pipeline draws with by default if not given.", audit="run"
    )
    eval_batch_size: int = other(16, "Images drawn, and images measured, at once.", audit="noted")
    generated_dir: str | None = other(
        None, "Folder of generated images to measure instead of drawing any.", scope="local", audit="run"
    )
    features: tuple[str, ...] = other(
        ("effnet_lite0",),
        "What images are compared by besides their pixels: effnet_lite0, which needs no network, a vision model of "
        "transformers (Hub id or folder; DINOv2, CLIP), or a TorchScript file (SSCD).",
        scope="local",
        per_machine=False,
        audit="run",
    )
    clip_model: str | None = other(
        None, "CLIP model (Hub id or folder) for the CLIP score.", scope="local", per_machine=False, audit="run"
    )
    reference_model: str | None = other(
        None,
        "Pipeline that has not seen the images, to calibrate membership inference by; the base model if known.",
        scope="local",
        per_machine=False,
        audit="run",
    )
    membership_images: int = other(1000, "Images of each side whose losses are measured.", audit="recorded")
    membership_draws: int = other(8, "Draws of noise level and noise for each of them.", audit="recorded")

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "eval_batch_size", "membership_images"):
            at_least_one(name, getattr(self, name))
        not_negative("sampling_guidance_scale", self.sampling_guidance_scale or 0.0)
        require(self.membership_draws >= 8, f"`--membership_draws` must be at least 8, not {self.membership_draws}.")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept so that an interrupted run can go on."""

    checkpointing_steps: int = other(
        500, "Write a checkpoint every this many steps of all clones, and at every merge."
    )
    checkpoints_total_limit: int | None = other(None, "How many checkpoints to keep; all if not given.", smoke=1)
    save_every_rounds: int | None = other(
        None,
        "Save the pipeline or LoRA file after every this many rounds, too, in `rounds` in `--output_dir`.",
    )
    resume_from_checkpoint: str | None = other(
        None,
        'Checkpoint folder to go on from, or "latest" (which starts over if there is none).',
        scope="local",
        per_machine=False,
        brief='"latest": go on from the last checkpoint, if there is one.',
    )

    def __post_init__(self) -> None:
        at_least_one("checkpointing_steps", self.checkpointing_steps)
        at_least_one("checkpoints_total_limit", self.checkpoints_total_limit)
        at_least_one("save_every_rounds", self.save_every_rounds)


@dataclass(frozen=True)
class LoggingConfig:
    """Progress and trackers."""

    logging_dir: str = other(
        "logs", "Folder of the trackers' files inside `--output_dir`.", scope="local", per_machine=False
    )
    logging_steps: int = other(10, "Read losses back from the device every this many steps.")
    report_to: str = other(
        "tensorboard",
        "Tracker.",
        choices=("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "all", "none"),
        smoke="none",
    )
    tracker_project_name: str | None = other(
        None, "Project name for the tracker; the name of `--output_dir` if not given.", scope="public"
    )

    def __post_init__(self) -> None:
        at_least_one("logging_steps", self.logging_steps)


@dataclass(frozen=True)
class HubConfig:
    """Publishing the result."""

    push_to_hub: bool = other(False, "Upload the finished pipeline with its model card.", smoke=False)
    hub_token: str | None = other(
        None, "Token for the upload; the stored login if not given. Never written anywhere.", scope="secret"
    )
    hub_model_id: str | None = other(
        None, "Repository to push to; the name of `--output_dir` if not given.", scope="public"
    )
    hub_private_repo: bool = other(False, "Make the repository private.")
    push_audit_images: bool = other(
        False, "Upload the audit's report too, which shows training images and their captions."
    )

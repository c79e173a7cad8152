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
    num_validation_images: int = other(4, "Images per prompt.", smoke=1)
    validation_rounds: int = other(
        1, "Rounds between validation images; they are also drawn before the first round and after the last.", smoke=1
    )
    validation_inference_steps: int = other(25, "Denoising steps per validation image.", smoke=2)
    validation_guidance_scale: float | None = other(
        None, "Guidance scale of validation images; the pipeline's default if not given.", needs="prompts"
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
        "Audit the finished pipeline; `iet-finetune audit` does it later.",
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
    num_images: int = other(1000, "Images to draw and measure.", audit="run")
    prompts: str = other(
        "train",
        "What to draw them from: the captions (or classes) of the training images (train) or of held-out images "
        "(heldout), the empty prompt (none), or a text file with one prompt per line.",
        scope="local",
        per_machine=False,
        audit="run",
    )
    scheduler: str | None = other(
        None,
        "diffusers scheduler to draw with, such as DDIMScheduler; the pipeline's own if not given.",
        scope="public",
        audit="run",
    )
    num_inference_steps: int = other(50, "Denoising steps per image.", audit="run")
    sampling_guidance_scale: float | None = other(
        None, "Guidance scale to draw with; the pipeline's default if not given.", audit="run"
    )
    eval_batch_size: int = other(16, "Images to draw, or to measure, at once.", audit="noted")
    generated_dir: str | None = other(
        None, "Folder of generated images to measure instead of drawing any.", scope="local", audit="run"
    )
    features: tuple[str, ...] = other(
        (),
        "Features to compare images by, besides pixels: effnet_lite0, which works offline, a vision model of "
        "transformers (Hub id or folder; DINOv2, CLIP), or a TorchScript file (SSCD). By default DINOv2 if it is in "
        "the Hub's cache or the model comes from the Hub, else effnet_lite0.",
        scope="local",
        per_machine=False,
        audit="run",
    )
    clip_model: str | None = other(
        None, "CLIP model (Hub id or folder) for the CLIP score.", scope="local", per_machine=False, audit="run"
    )
    reference_model: str | None = other(
        None,
        "Pipeline that has not seen the images, to calibrate membership inference; the base model if known.",
        scope="local",
        per_machine=False,
        audit="run",
    )
    membership_images: int = other(
        1000, "Training images, and held-out images, whose losses are measured.", audit="recorded"
    )
    membership_draws: int = other(8, "Draws of noise level and noise for each image.", audit="recorded")

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "eval_batch_size", "membership_images"):
            at_least_one(name, getattr(self, name))
        not_negative("sampling_guidance_scale", self.sampling_guidance_scale or 0.0)
        require(self.membership_draws >= 8, f"`--membership_draws` must be at least 8, not {self.membership_draws}.")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept so that an interrupted run can go on."""

    checkpointing_steps: int = other(
        500, "Steps of all clones together between two checkpoints; every merge writes one too."
    )
    checkpoints_total_limit: int | None = other(None, "Number of checkpoints to keep; all if not given.", smoke=1)
    save_every_rounds: int | None = other(
        None,
        "Also save the pipeline or LoRA file every N rounds, under `rounds` in `--output_dir`.",
    )
    resume_from_checkpoint: str | None = other(
        None,
        'Checkpoint folder to go on from, or "latest", which starts from the beginning if there is none.',
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
    logging_steps: int = other(10, "Steps between two readings of the losses from the device.")
    report_to: str = other(
        "tensorboard",
        "Tracker that the numbers are sent to.",
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
        False, "Also upload the audit's report, which shows training images and their captions."
    )

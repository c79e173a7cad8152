"""The settings of a run by group: frozen dataclasses whose fields are the flags and the keys of YAML files."""

from dataclasses import dataclass, fields

from ..errors import UserError
from .flags import flag
from .registry import MERGE_RULES, SHARDINGS, SKIP_RULES, Entry

# Networks that `--model_config` knows by name.
PRESETS = ("afhq_dog", "cifar10", "cifar100", "fashion_mnist")
DEFAULT_MERGE_EPOCHS = 5
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def require(condition: bool, message: str) -> None:
    """Raises a `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _at_least_one(name: str, value: int | None) -> None:
    require(value is None or value >= 1, f"`--{name}` must be at least 1, not {value}.")


def _not_negative(name: str, value: float) -> None:
    require(value >= 0, f"`--{name}` must be 0 or more, not {value}.")


def _probability(name: str, value: float) -> None:
    require(0 <= value <= 1, f"`--{name}` must be in [0, 1], not {value}.")


@dataclass(frozen=True)
class ModelConfig:
    """The pipeline that is fine-tuned."""

    pretrained_model_name_or_path: str | None = flag(None, "Hub id or folder of the diffusers pipeline to fine-tune.")
    model_config: str | None = flag(
        None,
        "Instead, train from scratch: a JSON or YAML file with the configuration of a UNet2DModel and, if wanted, "
        "of a DDPMScheduler as `scheduler`, or one of " + ", ".join(PRESETS) + ".",
    )
    revision: str | None = flag(None, "Revision of the pipeline on the Hub: branch, tag or commit.")
    variant: str | None = flag(None, "Variant of the weight files to load, such as fp16.")
    cache_dir: str | None = flag(None, "Where downloaded models, data sets and encoded images are kept.")
    prediction_type: str | None = flag(
        None,
        "What the denoiser predicts, if the scheduler's own setting is to be overridden.",
        choices=("epsilon", "v_prediction"),
    )
    save_dtype: str | None = flag(
        None,
        "Precision of the saved denoiser; as loaded when not given.",
        choices=("float32", "float16", "bfloat16"),
    )

    def __post_init__(self) -> None:
        if self.model_config is None:
            return
        for name in ("pretrained_model_name_or_path", "revision", "variant"):
            value = getattr(self, name)
            require(
                value is None, f"`--model_config` starts from scratch, without `--{name} {value}`: give one of them."
            )


@dataclass(frozen=True)
class DataConfig:
    """The images, their captions, and what is done to them before training."""

    train_data_dir: str | None = flag(None, "Folder of images, with captions in metadata.jsonl or metadata.csv.")
    dataset_name: str | None = flag(None, "Data set on the Hub, or a folder in any format that `datasets` reads.")
    dataset_config_name: str | None = flag(None, "Configuration of the data set, where it has several.")
    dataset_split: str = flag("train", "Split of the data set to train on.")
    image_column: str = flag("image", "Column with the images.")
    caption_column: str = flag("text", "Column with the captions: text, or a list of texts of which one is drawn.")
    class_column: str | None = flag(
        None,
        "Column with the classes, for a model that takes them: numbers from 0, or texts, numbered in sorted order.",
    )
    max_train_samples: int | None = flag(None, "Train on a random subset of this many images.")
    holdout_fraction: float = flag(0.0, "Share of the images kept out of training, for the audit.")
    resolution: int = flag(512, "Side of the square training images in pixels.")
    center_crop: bool = flag(False, "Crop at the centre; otherwise at a place drawn once for each image.")
    random_flip: bool = flag(False, "Mirror half of the images, drawn anew in every pass.")
    image_interpolation_mode: str = flag(
        "lanczos", "Filter for resizing.", choices=("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
    )
    caption_dropout: float = flag(0.0, "Probability that a caption is replaced by the empty one.")
    cache_latents: bool = flag(
        True, "Encode images and captions once, before training, and keep that for this run and others."
    )
    dataloader_num_workers: int = flag(0, "Processes that read images ahead; 0 reads in the main process.")

    def __post_init__(self) -> None:
        require(
            self.train_data_dir is None or self.dataset_name is None,
            "`--train_data_dir` and `--dataset_name` cannot both be given: choose one source of images.",
        )
        require(self.resolution >= 8, f"`--resolution` must be at least 8 pixels, not {self.resolution}.")
        _at_least_one("max_train_samples", self.max_train_samples)
        _probability("caption_dropout", self.caption_dropout)
        require(
            0 <= self.holdout_fraction < 1, f"`--holdout_fraction` must be in [0, 1), not {self.holdout_fraction}."
        )
        _not_negative("dataloader_num_workers", self.dataloader_num_workers)


@dataclass(frozen=True)
class EnsembleConfig:
    """Iterative ensemble training: how the data is split, and when and how the clones are merged."""

    num_shards: int = flag(
        4, "K: how many shards the data is split into, each with its own clone. 1 is plain training."
    )
    merge_every_epochs: int | None = flag(None, "Passes of each clone between two merges (5 if neither is given).")
    merge_every_steps: int | None = flag(None, "Steps of each clone between two merges, instead of passes.")
    shard_strategy: str = flag(
        "iid", "How images are spread over the shards.", choices=SHARDINGS.names, resume="fixed"
    )
    shard_by_column: str | None = flag(None, "Column whose values every shard holds in equal shares (stratified).")
    merge_weighting: str = flag(
        "samples",
        "Weight of a clone in the merge: its shard's number of images, or 1.",
        choices=("samples", "uniform"),
    )
    merge_rule: str = flag(
        "mean", "How the clones become the next denoiser.", choices=MERGE_RULES.names, resume="fixed"
    )
    optimizer_across_rounds: str = flag(
        "keep",
        "Optimizer moments at a merge: each clone keeps its own, starts anew, or takes up the average of all.",
        choices=("keep", "reset", "average"),
    )
    outer_lr: float = flag(1.0, "Step from the round's start towards the mean of the clones; 1 goes all the way.")
    outer_momentum: float = flag(0.0, "Nesterov momentum of that step over the rounds; DiLoCo's is 0.9.")
    offload_dir: str | None = flag(
        None, "Folder on a fast disk for what waits between the clones' turns, instead of the machine's memory."
    )

    def __post_init__(self) -> None:
        _at_least_one("num_shards", self.num_shards)
        _at_least_one("merge_every_epochs", self.merge_every_epochs)
        _at_least_one("merge_every_steps", self.merge_every_steps)
        require(
            self.merge_every_epochs is None or self.merge_every_steps is None,
            "`--merge_every_epochs` and `--merge_every_steps` cannot both be given: choose one.",
        )
        require(
            self.shard_strategy not in ("iid", "stratified")
            or (self.shard_strategy == "stratified") == (self.shard_by_column is not None),
            "`--shard_strategy stratified` and `--shard_by_column COLUMN` go together: give both or neither.",
        )
        require(self.outer_lr > 0, f"`--outer_lr` must be above 0, not {self.outer_lr}.")
        require(0 <= self.outer_momentum < 1, f"`--outer_momentum` must be in [0, 1), not {self.outer_momentum}.")


@dataclass(frozen=True)
class AdapterConfig:
    """Training a LoRA adapter (arXiv 2106.09685) instead of the whole denoiser."""

    use_lora: bool = flag(False, "Train a LoRA adapter on the frozen denoiser.")
    rank: int = flag(4, "r, the rank of the adapter's matrices.")
    lora_alpha: int | None = flag(None, "The adapter's update is multiplied by alpha / r; alpha = r if not given.")
    lora_dropout: float = flag(0.0, "Dropout before the adapter's matrices.")
    lora_layers: str | None = flag(
        None, "Names of the layers that get an adapter, separated by commas; the attention projections if not given."
    )
    use_rslora: bool = flag(False, "Multiply by alpha / sqrt(r) instead, as rsLoRA does.")
    use_dora: bool = flag(False, "Refused: a DoRA update is not low-rank, so clones could not be merged exactly.")
    lora_merge: str = flag(
        "exact",
        "exact: the merged update is the mean of the clones' updates. average: the mean of each matrix, as in FedIT. "
        "freeze_a: only B is trained, and averaged, as in FFA-LoRA.",
        choices=("exact", "average", "freeze_a"),
    )
    lora_export: str | None = flag(
        None,
        "What is saved if the update needs more than rank r. truncate: the best LoRA file of rank r. full_rank: an "
        "exact LoRA file of higher rank. fuse: a whole pipeline. If not given: full_rank up to rank 4 r, else fuse.",
        choices=("truncate", "full_rank", "fuse"),
    )

    def __post_init__(self) -> None:
        _at_least_one("rank", self.rank)
        _at_least_one("lora_alpha", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, f"`--lora_dropout` must be in [0, 1), not {self.lora_dropout}.")
        require(
            not self.use_dora,
            "`--use_dora`: a DoRA update is not low-rank, so clones could not be merged exactly; leave it out.",
        )
        require(
            self.lora_layers is None or all(self.layer_names),
            f"`--lora_layers {self.lora_layers}` has an empty name: separate names of layers by single commas.",
        )
        if not self.use_lora:
            self._require_nothing_else()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names in `--lora_layers`."""
        return tuple(name.strip() for name in (self.lora_layers or "").split(","))

    def _require_nothing_else(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            given = field.name if value is True else f"{field.name} {value}"
            require(value == field.default, f"`--{given}` does nothing without `--use_lora`: give both.")


@dataclass(frozen=True)
class AGCConfig:
    """Anti-gradient control: which samples of a step give no gradient."""

    agc_threshold: float = flag(
        0.8, "Skip samples whose loss is below this share of the loss bank's value; 0 switches AGC off."
    )
    agc_decay: float = flag(0.8, "d: how slowly the loss bank's moving average forgets.")
    agc_bins: int | None = flag(
        None, "Entries of the loss bank, by noise level; one a timestep if not given, 100 with flow matching."
    )

    def __post_init__(self) -> None:
        require(0 <= self.agc_threshold < 1, f"`--agc_threshold` must be in [0, 1), not {self.agc_threshold}.")
        _at_least_one("agc_bins", self.agc_bins)
        require(0 <= self.agc_decay < 1, f"`--agc_decay` must be in [0, 1), not {self.agc_decay}.")


SKIP_RULES.entries["agc"] = Entry("agc", "iet_finetune.method.agc:AntiGradientControl", AGCConfig)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at a time, in which precision, and with which loss."""

    output_dir: str = flag("sd-model-finetuned", "Where the pipeline, checkpoints and records are written.")
    seed: int = flag(0, "Seed of every random draw.")
    train_batch_size: int = flag(16, "Images in a micro-batch of one clone.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches in a step.")
    num_train_epochs: int = flag(100, "Passes over the whole data.")
    max_train_steps: int | None = flag(None, "Steps of each clone; overrides `--num_train_epochs`.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    mixed_precision: str | None = flag(
        None,
        "Precision of the denoiser's forward pass; Accelerate's setting if not given.",
        choices=("no", "fp16", "bf16"),
    )
    allow_tf32: bool = flag(False, "Allow TF32 matrix products on NVIDIA GPUs.")
    channels_last: bool = flag(
        False, "Lay out the denoiser's convolutions with the channels last; try it with half precision on GPUs."
    )
    compile: bool = flag(
        False, "Compile the denoiser with torch.compile, once for all clones; takes minutes before the first step."
    )
    snr_gamma: float | None = flag(None, "Gamma of the min-SNR loss weights; 5.0 is usual. Off if not given.")
    skip_rule: str = flag(
        "agc",
        "Which samples of a step give no gradient; agc: anti-gradient control.",
        choices=SKIP_RULES.names,
        resume="fixed",
    )
    noise_offset: float = flag(0.0, "Scale of an extra noise that is constant over each channel.")
    weighting_scheme: str | None = flag(
        None,
        "Flow matching: how noise levels are drawn (logit_normal, mode, else uniformly) and losses weighted "
        "(sigma_sqrt, cosmap, else equally); the family's own if not given.",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
    )
    logit_mean: float = flag(0.0, "Mean of the logit-normal distribution of noise levels.")
    logit_std: float = flag(1.0, "Standard deviation of the logit-normal distribution.")
    mode_scale: float = flag(1.29, "Scale of the distribution `mode`.")
    max_sequence_length: int | None = flag(
        None, "Tokens that T5 makes of a caption; what the pipeline draws with by default if not given."
    )
    guidance_scale: float | None = flag(None, "Guidance that Flux.1 dev is told in training; 3.5 if not given.")
    smoke: bool = flag(
        False,
        "Try the recipe out in seconds: a tiny random model of its kind, made-up images with its columns, two short "
        "rounds; what comes out lies in the folder `OUTPUT_DIR-smoke`.",
    )
    ddp_timeout: int = flag(300, "Seconds without a sign of life after which a rank counts as dead and all stop.")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"`--seed` must be in [0, 2^63), not {self.seed}.")
        for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps"):
            _at_least_one(name, getattr(self, name))
        _at_least_one("max_sequence_length", self.max_sequence_length)
        _not_negative("guidance_scale", self.guidance_scale or 0.0)
        require(self.logit_std > 0, f"`--logit_std` must be above 0, not {self.logit_std}.")
        require(self.ddp_timeout >= 3, f"`--ddp_timeout` must be at least 3 seconds, not {self.ddp_timeout}.")
        require(self.snr_gamma is None or self.snr_gamma > 0, f"`--snr_gamma` must be above 0, not {self.snr_gamma}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate, and the moving average of the weights."""

    learning_rate: float = flag(1e-4, "Learning rate after warm-up.")
    scale_lr: bool = flag(False, "Multiply the learning rate by batch size and accumulation steps.")
    lr_scheduler: str = flag("constant", "Course of the learning rate over a clone's steps.", choices=SCHEDULES)
    lr_warmup_steps: int = flag(500, "Steps of a clone over which the learning rate rises from 0.")
    use_8bit_adam: bool = flag(False, "Keep the optimizer's moments in 8 bits (needs the package bitsandbytes).")
    adam_beta1: float = flag(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = flag(0.999, "Decay of AdamW's second moment.")
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = flag(1.0, "Norm to which a step's gradient is clipped; 0 switches clipping off.")
    use_ema: bool = flag(False, "Keep a moving average of the weights and save that.")
    ema_max_decay: float = flag(0.9999, "Highest decay of the moving average.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "max_grad_norm"):
            _not_negative(name, getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`--{name}` must be in [0, 1), not {value}.")
        _probability("ema_max_decay", self.ema_max_decay)
        require(
            self.lr_scheduler != "polynomial" or self.learning_rate == 0 or self.learning_rate > 1e-7,
            f"`--learning_rate {self.learning_rate}` must be above 1e-07, at which `--lr_scheduler polynomial` ends.",
        )


@dataclass(frozen=True)
class ValidationConfig:
    """Pictures drawn while training, always from the same prompts and seeds."""

    validation_prompts: tuple[str, ...] = flag(
        (), "Prompts (or names of classes) drawn before training and after rounds."
    )
    num_validation_images: int = flag(4, "Images a prompt.")
    validation_rounds: int = flag(1, "Draw after every this many rounds (always before the first and after the last).")
    validation_inference_steps: int = flag(25, "Denoising steps of a validation image.")
    validation_guidance_scale: float | None = flag(
        None, "Guidance of validation images; what the pipeline draws with by default if not given."
    )

    def __post_init__(self) -> None:
        for name in ("num_validation_images", "validation_rounds", "validation_inference_steps"):
            _at_least_one(name, getattr(self, name))
        _not_negative("validation_guidance_scale", self.validation_guidance_scale or 0.0)


@dataclass(frozen=True)
class AuditConfig:
    """Measuring how much the finished pipeline repeats its training images, and how good its pictures are."""

    audit: bool = flag(False, "Audit the pipeline when it is finished; `iet-finetune audit` does it later.")
    holdout_data_dir: str | None = flag(
        None, "Folder of images that were never trained on, read like `--train_data_dir`; or see `--holdout_fraction`."
    )
    num_images: int = flag(1000, "Pictures that are drawn and judged.")
    prompts: str = flag(
        "train",
        "What they are drawn from: the captions (or classes) of the training images (train) or of those held out "
        "(heldout), the empty prompt (none), or a text file with a prompt a line.",
    )
    scheduler: str | None = flag(
        None, "Scheduler of diffusers to draw with, such as DDIMScheduler; the pipeline's own if not given."
    )
    num_inference_steps: int = flag(50, "Denoising steps of a picture.")
    sampling_guidance_scale: float | None = flag(
        None, "Guidance to draw with; what the pipeline draws with by default if not given."
    )
    eval_batch_size: int = flag(16, "Pictures drawn, and images judged, at once.")
    generated_dir: str | None = flag(None, "Folder of generated images to judge instead of drawing any.")
    features: tuple[str, ...] = flag(
        ("effnet_lite0",),
        "What images are compared by besides their pixels: effnet_lite0, which needs no network, a vision model of "
        "transformers (Hub id or folder; DINOv2, CLIP), or a TorchScript file (SSCD).",
    )
    clip_model: str | None = flag(None, "CLIP model (Hub id or folder) for the CLIP score.")
    reference_model: str | None = flag(
        None, "Pipeline that has not seen the images, to calibrate membership inference by; the base model if known."
    )
    membership_images: int = flag(1000, "Images of each side that losses are taken of.")
    membership_draws: int = flag(8, "Draws of noise level and noise for each of them.")

    def __post_init__(self) -> None:
        for name in ("num_images", "num_inference_steps", "eval_batch_size", "membership_images"):
            _at_least_one(name, getattr(self, name))
        _not_negative("sampling_guidance_scale", self.sampling_guidance_scale or 0.0)
        require(self.membership_draws >= 8, f"`--membership_draws` must be at least 8, not {self.membership_draws}.")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept so that an interrupted run can go on."""

    checkpointing_steps: int = flag(500, "Write a checkpoint every this many steps of all clones, and at every merge.")
    checkpoints_total_limit: int | None = flag(None, "How many checkpoints to keep; all if not given.")
    resume_from_checkpoint: str | None = flag(
        None, 'Checkpoint folder to go on from, or "latest" (which starts anew if there is none).'
    )

    def __post_init__(self) -> None:
        _at_least_one("checkpointing_steps", self.checkpointing_steps)
        _at_least_one("checkpoints_total_limit", self.checkpoints_total_limit)


@dataclass(frozen=True)
class LoggingConfig:
    """Progress and trackers."""

    logging_dir: str = flag("logs", "Folder of the trackers' files inside `--output_dir`.")
    logging_steps: int = flag(10, "Read losses back from the device every this many steps.")
    report_to: str = flag(
        "tensorboard", "Tracker.", choices=("tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "all", "none")
    )
    tracker_project_name: str = flag("text2image-fine-tune", "Project name for the tracker.")

    def __post_init__(self) -> None:
        _at_least_one("logging_steps", self.logging_steps)


@dataclass(frozen=True)
class HubConfig:
    """Publishing the result."""

    push_to_hub: bool = flag(False, "Upload the finished pipeline with its model card.")
    hub_token: str | None = flag(
        None,
        "Token for the upload; the stored login if not given. Never written anywhere.",
        resume="other",
        scope="secret",
    )
    hub_model_id: str | None = flag(None, "Repository to push to; the name of `--output_dir` if not given.")
    hub_private_repo: bool = flag(False, "Make the repository private.")
    push_audit_images: bool = flag(
        False, "Upload the audit's report too, which shows training images and their captions."
    )

"""How a clone trains: length, batch, precision, loss and optimizer."""

from dataclasses import dataclass

from ..flags import fixed, free, other
from ..registry import SKIP_RULES
from .checks import at_least_one, not_negative, probability, require

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at a time, in which precision, and with which loss."""

    output_dir: str = other(
        "sd-model-finetuned",
        "Where the pipeline, checkpoints and records are written.",
        brief="Where the result is written.",
        scope="local",
        audit="given",
        audit_help="Where the audit and its images are written; by default `audit` in the folder of the model.",
    )
    seed: int = fixed(
        0,
        "Seed of every random draw.",
        audit="recorded",
        audit_help="Seed of the images and of every other draw; by default that of training.",
    )
    train_batch_size: int = fixed(16, "Images in a micro-batch of one clone.", smoke=2, brief=True)
    gradient_accumulation_steps: int = fixed(1, "Micro-batches in a step.", smoke=1)
    num_train_epochs: int = free(100, "Passes over the whole data.", brief=True)
    max_train_steps: int | None = free(None, "Steps of each clone; overrides `--num_train_epochs`.", smoke=2)
    total_train_steps: int | None = free(
        None,
        "Instead of `--max_train_steps`: steps of all clones together, divided so that all images are visited equally "
        "often, and rounded up for each clone.",
        smoke=None,
        instead_of="max_train_steps",
    )
    gradient_checkpointing: bool = free(False, "Recompute activations in the backward pass to save memory.")
    mixed_precision: str | None = free(
        None,
        "Precision of the denoiser's forward pass; Accelerate's setting if not given.",
        choices=("no", "fp16", "bf16"),
        smoke="no",
        brief="Precision of the forward pass; bf16 on newer GPUs.",
        audit="given",
        audit_help="Precision of the denoiser; by default half precision on a GPU, and fp32 on a CPU.",
    )
    allow_tf32: bool = free(False, "Allow TF32 matrix products on NVIDIA GPUs.")
    channels_last: bool = fixed(
        False,
        "Use the channels-last memory format for convolutions; try it with half precision on GPUs.",
    )
    compile: bool = free(
        False,
        "Compile the denoiser with torch.compile, once for all clones; takes minutes before the first step.",
    )
    snr_gamma: float | None = free(
        None, "Gamma of the min-SNR loss weights; 5.0 is usual. Off if not given.", needs="noise schedule"
    )
    skip_rule: str = fixed(
        "agc",
        "Which samples of a step to skip. agc: those with an unusually low loss (anti-gradient control). guard: those "
        "of images whose loss has fallen further than held-out images' losses. calibrated_agc: those of images whose "
        "loss has fallen further below the base model's than other images'.",
        choices=SKIP_RULES.names,
    )
    stop_when: str = fixed(
        "end",
        "auto: stop once the loss of held-out images no longer falls, and keep the round where it was lowest. end: "
        "take all steps, and keep the last round.",
        choices=("end", "auto"),
        smoke="end",
    )
    stop_patience: int = fixed(3, "With `--stop_when auto`: stop after this many looks in a row without a lower loss.")
    noise_offset: float = free(0.0, "Scale of extra noise that is constant over each channel.")
    weighting_scheme: str | None = free(
        None,
        "Flow matching: how noise levels are drawn (logit_normal, mode, else uniformly) and losses are weighted "
        "(sigma_sqrt, cosmap, else equally); the model family's own if not given.",
        choices=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        needs="flow matching",
    )
    logit_mean: float = free(0.0, "Mean of the logit-normal distribution of noise levels.", needs="flow matching")
    logit_std: float = free(1.0, "Standard deviation of the logit-normal distribution.", needs="flow matching")
    mode_scale: float = free(1.29, "Scale of the distribution `mode`.", needs="flow matching")
    max_sequence_length: int | None = free(
        None,
        "Longest caption for T5, in tokens; the pipeline's default if not given.",
        needs="T5",
        audit="run",
    )
    guidance_scale: float | None = free(
        None, "Guidance passed to Flux.1 dev in training; 3.5 if not given.", needs="guidance embedding", audit="run"
    )
    smoke: bool = free(
        False,
        "Try the recipe in seconds, with a tiny random model of its kind, made-up images and two short rounds; the "
        "result goes to the folder `OUTPUT_DIR-smoke`.",
        names=("pipeline", "dataset"),
        smoke=False,
        brief="Try it in seconds, on a tiny random model and made-up images.",
    )
    dry_run: bool = other(
        False,
        "Say what would run, and how much memory, disk and time it would take, from a few measured steps, and end; "
        "`iet-finetune plan` does the same.",
        smoke=False,
    )
    ddp_timeout: int = other(
        300, "Seconds without a sign of life after which a rank counts as dead and all ranks stop."
    )

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"`--seed` must be in [0, 2^63), not {self.seed}.")
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "total_train_steps",
            "stop_patience",
        ):
            at_least_one(name, getattr(self, name))
        require(
            self.max_train_steps is None or self.total_train_steps is None,
            "`--max_train_steps` (of each clone) and `--total_train_steps` (of all) cannot both be given: choose one.",
        )
        require(
            self.stop_when == "auto" or self.stop_patience == TrainingConfig.stop_patience,
            f"`--stop_patience {self.stop_patience}` does nothing without `--stop_when auto`: give both.",
        )
        at_least_one("max_sequence_length", self.max_sequence_length)
        not_negative("guidance_scale", self.guidance_scale or 0.0)
        require(self.logit_std > 0, f"`--logit_std` must be above 0, not {self.logit_std}.")
        require(self.ddp_timeout >= 3, f"`--ddp_timeout` must be at least 3 seconds, not {self.ddp_timeout}.")
        require(self.snr_gamma is None or self.snr_gamma > 0, f"`--snr_gamma` must be above 0, not {self.snr_gamma}.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate, and the moving average of the weights."""

    learning_rate: float = free(1e-4, "Learning rate after warm-up.", brief=True)
    scale_lr: bool = free(False, "Multiply the learning rate by batch size and accumulation steps.")
    lr_scheduler: str = free("constant", "Learning-rate schedule over a clone's steps.", choices=SCHEDULES)
    lr_warmup_steps: int = free(500, "Steps of each clone during which the learning rate rises from 0.", smoke=0)
    use_8bit_adam: bool = fixed(
        False, "Keep the optimizer state in 8 bits (needs the package bitsandbytes).", smoke=False
    )
    adam_beta1: float = free(0.9, "Decay of AdamW's first moment.")
    adam_beta2: float = free(0.999, "Decay of AdamW's second moment.")
    adam_weight_decay: float = free(1e-2, "AdamW's weight decay.")
    adam_epsilon: float = free(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = free(1.0, "Norm to clip gradients to; 0 switches clipping off.")
    use_ema: bool = fixed(
        False, "Keep a moving average of the weights (EMA), and save it instead of the last weights."
    )
    ema_max_decay: float = free(0.9999, "Highest decay of the moving average.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon", "max_grad_norm"):
            not_negative(name, getattr(self, name))
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`--{name}` must be in [0, 1), not {value}.")
        probability("ema_max_decay", self.ema_max_decay)
        require(
            self.lr_scheduler != "polynomial" or self.learning_rate == 0 or self.learning_rate > 1e-7,
            f"`--learning_rate {self.learning_rate}` must be above 1e-07, at which `--lr_scheduler polynomial` ends.",
        )

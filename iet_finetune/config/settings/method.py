"""The method's settings: shards, clones and merges, LoRA adapters, and anti-gradient control."""

from dataclasses import dataclass, fields

from ..flags import fixed, free, other
from ..registry import MERGE_RULES, SHARDINGS, SKIP_RULES, Entry
from .checks import at_least_one, not_negative, require

DEFAULT_MERGE_EPOCHS = 5
LORA_FORMATS = ("diffusers", "kohya")
QUANTISED = ("nf4", "int8")


@dataclass(frozen=True)
class EnsembleConfig:
    """Iterative ensemble training: how the data is split, and when and how the clones are merged."""

    num_shards: int = fixed(
        4,
        "K: the number of shards that the data is split into, each with its own clone. 1 is plain training.",
        brief="Shards of the data, each with its own clone; 1: plain training.",
    )
    merge_every_epochs: int | None = fixed(
        None,
        "Passes of each clone over its shard between two merges; 5 if neither this nor the steps are given.",
        smoke=None,
        brief="Passes of each clone over its shard between two merges; 5 if not given.",
    )
    merge_every_steps: int | None = fixed(
        None, "Steps of each clone between two merges, instead of passes.", smoke=1, instead_of="merge_every_epochs"
    )
    shard_strategy: str = fixed("iid", "How images are distributed over the shards.", choices=SHARDINGS.names)
    shard_by_column: str | None = fixed(
        None, "With `stratified`: the column whose values every shard gets in equal shares.", scope="public"
    )
    merge_weighting: str = fixed(
        "samples",
        "Weight of a clone in the merge: its shard's number of images (samples), or 1 (uniform).",
        choices=("samples", "uniform"),
    )
    merge_rule: str = fixed("mean", "How the clones are combined into the next denoiser.", choices=MERGE_RULES.names)
    optimizer_across_rounds: str = free(
        "keep",
        "Optimizer state after a merge: each clone keeps its own, starts with none, or gets the average of all.",
        choices=("keep", "reset", "average"),
    )
    outer_lr: float = free(
        1.0,
        "Learning rate of the outer optimizer, from the round's start to the clones' mean; 1: all the way.",
    )
    outer_momentum: float = free(0.0, "Nesterov momentum of the outer optimizer; DiLoCo uses 0.9.")
    offload_dir: str | None = other(
        None,
        "Folder on a fast disk for the tensors of idle clones, instead of the machine's memory.",
        scope="local",
        smoke=None,
    )

    def __post_init__(self) -> None:
        at_least_one("num_shards", self.num_shards)
        at_least_one("merge_every_epochs", self.merge_every_epochs)
        at_least_one("merge_every_steps", self.merge_every_steps)
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

    use_lora: bool = fixed(
        False,
        "Train a LoRA adapter on the frozen denoiser.",
        brief="Train a LoRA adapter, of rank `--rank`, on the frozen denoiser.",
    )
    rank: int = fixed(4, "r, the rank of the adapter's matrices.")
    lora_alpha: int | None = fixed(None, "The adapter's update is multiplied by alpha / r; alpha = r if not given.")
    lora_dropout: float = free(0.0, "Dropout before the adapter's matrices.")
    lora_layers: str | None = fixed(
        None,
        "Names of the layers that get an adapter, separated by commas; the attention projections if not given.",
        scope="public",
    )
    use_rslora: bool = fixed(False, "Multiply by alpha / sqrt(r) instead, as rsLoRA does.")
    init_lora: str | None = other(
        None,
        "LoRA file, or a folder with one, to start the adapter from: in any format, of rank `--rank` or lower.",
        scope="local",
        smoke=None,
    )
    quantize_base: str | None = fixed(
        None,
        "Hold the frozen denoiser in 4 bits (nf4, as QLoRA does) or 8 bits (int8); the adapter stays in fp32.",
        choices=QUANTISED,
        names=("pipeline",),
    )
    quantize_encoders: str | None = fixed(
        None,
        "Hold the text encoders in 4 bits (nf4) or 8 bits (int8): less memory, and less exact captions.",
        choices=QUANTISED,
        names=("pipeline",),
        needs="captions",
    )
    lora_remainder_rank: int | None = fixed(
        None,
        "With `--quantize_base`: highest rank of the part of a merged update that a layer's adapter cannot hold; 8 "
        "times `--rank` if not given, and at most half the layer's smaller side.",
    )
    use_dora: bool = other(False, "Refused: a DoRA update is not low-rank, so clones could not be merged exactly.")
    lora_merge: str = fixed(
        "exact",
        "exact: the merged update is the mean of the clones' updates. average: each matrix is averaged, as in FedIT. "
        "freeze_a: only B is trained and averaged, as in FFA-LoRA.",
        choices=("exact", "average", "freeze_a"),
    )
    lora_export: str | None = other(
        None,
        "What to save if the update needs more than rank r. truncate: the best LoRA file of rank r. full_rank: an "
        "exact LoRA file of higher rank. fuse: a whole pipeline. If not given: truncate if that loses at most 1 % of "
        "the update's energy, else full_rank.",
        choices=("truncate", "full_rank", "fuse"),
    )
    lora_format: str | None = other(
        None,
        "Names of the layers in the LoRA file: those of kohya's scripts, or of diffusers' `save_lora_weights`. If not "
        "given: the ones that diffusers, ComfyUI and A1111 all load, which are kohya's for a UNet, else diffusers'.",
        choices=LORA_FORMATS,
    )

    def __post_init__(self) -> None:
        at_least_one("rank", self.rank)
        at_least_one("lora_alpha", self.lora_alpha)
        at_least_one("lora_remainder_rank", self.lora_remainder_rank)
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
        require(
            self.lora_remainder_rank is None or (self.quantize_base is not None and self.lora_merge == "exact"),
            f"`--lora_remainder_rank {self.lora_remainder_rank}` does nothing without `--quantize_base` and "
            "`--lora_merge exact`: leave it out.",
        )

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

    agc_threshold: float = fixed(
        0.8, "Skip samples whose loss is below this fraction of the loss bank's value; 0 switches AGC off."
    )
    agc_decay: float = fixed(0.8, "d: how slowly the loss bank's moving average forgets.")
    agc_bins: int | None = fixed(
        None, "Entries of the loss bank, by noise level; one per timestep if not given, 100 with flow matching."
    )
    agc_bias_correction: bool = fixed(
        False, "Correct the loss bank for its start at 0; without it, AGC skips hardly anything at first."
    )

    def __post_init__(self) -> None:
        require(0 <= self.agc_threshold < 1, f"`--agc_threshold` must be in [0, 1), not {self.agc_threshold}.")
        at_least_one("agc_bins", self.agc_bins)
        require(0 <= self.agc_decay < 1, f"`--agc_decay` must be in [0, 1), not {self.agc_decay}.")


SKIP_RULES.entries["agc"] = Entry("agc", "iet_finetune.method.agc_rule:AGCRule", AGCConfig)


@dataclass(frozen=True)
class GuardConfig:
    """The guard: which training images rest, by how far their losses have fallen below those of held-out images."""

    guard_tau: float = fixed(
        1.0,
        "An image rests once its loss has fallen this many robust deviations further than held-out images'.",
    )
    guard_reference: int = fixed(
        1, "Falls are measured from the end of this round; 0: from the base pipeline, if it knows the subject."
    )
    guard_levels: tuple[float, ...] = fixed(
        (0.01, 0.02, 0.04), "Noise levels at which losses are looked at, as parts of the schedule (sigma with flows)."
    )
    guard_best_levels: int | None = fixed(
        None,
        "Keep so many of these levels, at which training images are told best from held-out ones; all if not given.",
    )
    guard_draws: int = fixed(1, "Draws of noise at each of these levels.")
    guard_below: float = fixed(0.3, "Images rest at lower noise levels than this; above it they go on teaching.")
    guard_pull: float = fixed(
        0.0,
        "Weight with which resting images learn the reference's prediction, which teaches away what was memorized; 0 "
        "leaves them silent.",
    )
    guard_budget: float = fixed(
        0.05, "Time that looking may take, as a part of the training's; images take turns where it is short."
    )

    def __post_init__(self) -> None:
        require(self.guard_tau > 0, f"`--guard_tau` must be above 0, not {self.guard_tau}.")
        not_negative("guard_reference", self.guard_reference)
        require(
            len(self.guard_levels) > 0 and all(0 < level < 1 for level in self.guard_levels),
            f"`--guard_levels` must be between 0 and 1, not {' '.join(map(str, self.guard_levels)) or 'none'}.",
        )
        at_least_one("guard_draws", self.guard_draws)
        at_least_one("guard_best_levels", self.guard_best_levels)
        require(
            self.guard_best_levels is None or self.guard_best_levels <= len(self.guard_levels),
            f"`--guard_best_levels {self.guard_best_levels}` is more than the {len(self.guard_levels)} of "
            "`--guard_levels`.",
        )
        not_negative("guard_pull", self.guard_pull)
        require(0 < self.guard_below <= 1, f"`--guard_below` must be in (0, 1], not {self.guard_below}.")
        require(self.guard_budget > 0, f"`--guard_budget` must be above 0, not {self.guard_budget}.")


SKIP_RULES.entries["guard"] = Entry("guard", "iet_finetune.method.guard:Guard", GuardConfig)


@dataclass(frozen=True)
class CalibratedConfig:
    """Calibrated AGC: images are skipped whose losses have fallen further below the base model's than others'."""

    calibrated_tau: float = fixed(
        1.0,
        "An image is skipped once its loss has fallen this many robust deviations further than its shard's.",
    )
    calibrated_decay: float = fixed(0.8, "d: how slowly an image's moving average over its visits forgets.")
    calibrated_visits: int = fixed(3, "Visits at low noise before an image is judged, and counts for judging others.")
    calibrated_cap: float = fixed(0.25, "Largest share of a shard's images that may be skipped at once.")
    calibrated_below: float = fixed(
        0.3, "Losses are compared, and images skipped, only at noise levels below this; above it all are trained on."
    )
    calibrated_every: int = fixed(1, "Compare only in every N-th pass; comparing takes a third of a step's time.")

    def __post_init__(self) -> None:
        require(self.calibrated_tau > 0, f"`--calibrated_tau` must be above 0, not {self.calibrated_tau}.")
        require(
            0 <= self.calibrated_decay < 1, f"`--calibrated_decay` must be in [0, 1), not {self.calibrated_decay}."
        )
        at_least_one("calibrated_visits", self.calibrated_visits)
        require(0 < self.calibrated_cap <= 1, f"`--calibrated_cap` must be in (0, 1], not {self.calibrated_cap}.")
        require(
            0 < self.calibrated_below <= 1, f"`--calibrated_below` must be in (0, 1], not {self.calibrated_below}."
        )
        at_least_one("calibrated_every", self.calibrated_every)


SKIP_RULES.entries["calibrated_agc"] = Entry(
    "calibrated_agc", "iet_finetune.method.calibrated:CalibratedAGC", CalibratedConfig
)

"""One run's configuration: from flags, a command line, a YAML file, and back."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .flags import build_parser, convert, flag_specs, nearest, parse_arguments, read_yaml
from .settings import (
    AdapterConfig,
    AGCConfig,
    AuditConfig,
    CheckpointConfig,
    DataConfig,
    EnsembleConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
    require,
)

SECRET_FLAGS = ("hub_token",)
# Of each pair only one may be given.
ALTERNATIVES = (
    ("pretrained_model_name_or_path", "model_config"),
    ("train_data_dir", "dataset_name"),
    ("merge_every_epochs", "merge_every_steps"),
)


GROUPS: dict[str, tuple[str, type]] = {
    "model": ("Model", ModelConfig),
    "data": ("Data", DataConfig),
    "ensemble": ("Iterative ensemble training", EnsembleConfig),
    "adapter": ("LoRA", AdapterConfig),
    "agc": ("Anti-gradient control", AGCConfig),
    "training": ("Training", TrainingConfig),
    "optimizer": ("Optimizer", OptimizerConfig),
    "validation": ("Validation", ValidationConfig),
    "checkpoint": ("Checkpoints", CheckpointConfig),
    "audit": ("Audit", AuditConfig),
    "logging": ("Logging", LoggingConfig),
    "hub": ("Hub", HubConfig),
}


@dataclass(frozen=True)
class Config:
    """One run's settings by group; every field of every group is one flag and one YAML key."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    adapter: AdapterConfig = AdapterConfig()
    agc: AGCConfig = AGCConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    audit: AuditConfig = AuditConfig()
    logging: LoggingConfig = LoggingConfig()
    hub: HubConfig = HubConfig()

    def __post_init__(self) -> None:
        require(
            not (self.optimizer.use_8bit_adam and self.ensemble.optimizer_across_rounds == "average"),
            "`--optimizer_across_rounds average` cannot average the 8-bit moments of `--use_8bit_adam`: choose one.",
        )
        for name, plain in (("outer_lr", 1), ("outer_momentum", 0)) if self.merges_exactly else ():
            value = getattr(self.ensemble, name)
            require(
                value == plain,
                f"`--{name} {value}` does not go with `--lora_merge exact`: leave it out, or choose another merge.",
            )

    @classmethod
    def from_flags(cls, **flags: Any) -> "Config":
        """A configuration from flat flag values, as in `Config.from_flags(num_shards=8, learning_rate=1e-5)`.

        Raises:
            UserError: an unknown flag or a value that the flag does not take.
        """
        return cls._from_values(_converted(flags, "`--NAME`"))

    @classmethod
    def from_command_line(cls, argv: list[str], prog: str | None = None) -> "Config":
        """The configuration that `--config FILE` and the flags of a command line describe; flags override the file.

        Args:
            prog: what `--help` calls the program; the script's name if not given.

        Raises:
            UserError: what is wrong, naming the flag, or the key and the file.
        """
        parser = build_parser("Fine-tune a diffusers pipeline with IET-AGC.", dict(GROUPS.values()), prog)
        given = parse_arguments(parser, argv, flag_names())
        config = cls.layered(given)
        config.check_sources()
        return config

    @classmethod
    def layered(cls, given: dict[str, Any], below: dict[str, Any] | None = None) -> "Config":
        """The configuration of raw flag values, of the file that `config` among them names, and of what lies below.

        Of what stands in several of them, the flag itself counts first, then the file.

        Args:
            given: as `parse_arguments` returns them.
            below: flag values from elsewhere.

        Raises:
            UserError: what is wrong, naming the flag, or the key and the file.
        """
        flags = {name: value for name, value in given.items() if name != "config"}
        path = given.get("config")
        in_file = {} if path is None else _converted(read_yaml(path, flag_names()), f"`NAME` in `--config {path}`")
        layers = [_converted(below or {}, "`--NAME`"), in_file, _converted(flags, "`--NAME`")]
        values: dict[str, Any] = {}
        for layer in layers:
            for one, other in (*ALTERNATIVES, *(pair[::-1] for pair in ALTERNATIVES)):
                if one in layer and other not in layer:
                    # What lies above overrides: choosing one of two there unsets the other here.
                    values.pop(other, None)
            values |= layer
        return cls._from_values(values)

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "Config":
        names = {name: [spec.name for spec in flag_specs(group)] for name, (_, group) in GROUPS.items()}
        parts = {name: {flag: values[flag] for flag in flags if flag in values} for name, flags in names.items()}
        return cls(**{name: group(**parts[name]) for name, (_, group) in GROUPS.items()})

    def check_sources(self) -> None:
        """Raise a `UserError` unless a pipeline, or a network to begin with, and a source of images are given."""
        require(
            self.model.pretrained_model_name_or_path is not None or self.model.model_config is not None,
            "`--pretrained_model_name_or_path` is missing: give the Hub id or folder of a diffusers pipeline, or "
            "`--model_config` to train from scratch.",
        )
        require(
            self.data.train_data_dir is not None or self.data.dataset_name is not None,
            "no images: give `--train_data_dir FOLDER` or `--dataset_name NAME`.",
        )

    def to_flags(self) -> dict[str, Any]:
        """Every effective flag by name, secrets left out, in plain YAML types; the inverse of `from_flags`."""
        flat: dict[str, Any] = {}
        for name in GROUPS:
            flat.update(dataclasses.asdict(getattr(self, name)))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items() if k not in SECRET_FLAGS}

    @property
    def merges_exactly(self) -> bool:
        """Whether LoRA adapters are trained whose updates are merged rather than their matrices."""
        return self.adapter.use_lora and self.adapter.lora_merge == "exact"

    @property
    def output_path(self) -> Path:
        """`--output_dir` as a path."""
        return Path(self.training.output_dir)


def flag_names() -> list[str]:
    """The names of all flags, in the order of `--help`."""
    return [spec.name for _, group in GROUPS.values() for spec in flag_specs(group)]


def _converted(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values in their flags' types; `where`, with the flag for its first NAME, begins an error."""
    specs = {spec.name: spec for _, group in GROUPS.values() for spec in flag_specs(group)}
    for name in values:
        if name not in specs:
            raise UserError(f"unknown flag {where.replace('NAME', name, 1)}.{nearest(name, specs)}")
    return {name: convert(specs[name], value, where.replace("NAME", name, 1)) for name, value in values.items()}

"""One run's configuration: from flags, a command line, a YAML file, and back."""

import dataclasses
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import CLASS_FOLDER
from .command_line import parse_arguments, training_parser
from .flags import FlagSpec, convert, flag_specs
from .recipes import read_yaml
from .registry import REGISTRIES, RESERVED, Entry, Registry, rule_groups
from .settings import (
    AdapterConfig,
    AGCConfig,
    AuditConfig,
    CalibratedConfig,
    CheckpointConfig,
    DataConfig,
    EnsembleConfig,
    GuardConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PriorConfig,
    TrainingConfig,
    ValidationConfig,
    require,
)
from .unknown import unknown

GROUPS: dict[str, tuple[str, type]] = {
    "model": ("Model", ModelConfig),
    "data": ("Data", DataConfig),
    "prior": ("Prior preservation", PriorConfig),
    "ensemble": ("Iterative ensemble training", EnsembleConfig),
    "adapter": ("LoRA", AdapterConfig),
    "agc": ("Anti-gradient control", AGCConfig),
    "guard": ("Guard", GuardConfig),
    "calibrated_agc": ("Calibrated anti-gradient control", CalibratedConfig),
    "training": ("Training", TrainingConfig),
    "optimizer": ("Optimizer", OptimizerConfig),
    "validation": ("Validation", ValidationConfig),
    "checkpoint": ("Checkpoints", CheckpointConfig),
    "audit": ("Audit", AuditConfig),
    "logging": ("Logging", LoggingConfig),
    "hub": ("Hub", HubConfig),
}


RESERVED |= {spec.name for _, group in GROUPS.values() for spec in flag_specs(group)}


def _rules_from_outside() -> dict[str, type]:
    """Title -> dataclass of the flags of registered rules, but for those that are groups of `Config` itself."""
    own = [group for _, group in GROUPS.values()]
    return {title: group for title, group in rule_groups().items() if group not in own}


@dataclass(frozen=True)
class Config:
    """One run's settings by group; every field of every group is one flag and one YAML key.

    Attributes:
        rules: the flags of registered rules from outside the package, one dataclass a rule; see `chosen`.
        is_smoke: whether it is a recipe that `--smoke` has shrunk; no flag.
    """

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prior: PriorConfig = PriorConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    adapter: AdapterConfig = AdapterConfig()
    agc: AGCConfig = AGCConfig()
    guard: GuardConfig = GuardConfig()
    calibrated_agc: CalibratedConfig = CalibratedConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    audit: AuditConfig = AuditConfig()
    logging: LoggingConfig = LoggingConfig()
    hub: HubConfig = HubConfig()
    rules: tuple[Any, ...] = field(default_factory=lambda: tuple(group() for group in _rules_from_outside().values()))
    is_smoke: bool = False

    def __post_init__(self) -> None:
        require(
            not (self.optimizer.use_8bit_adam and self.ensemble.optimizer_across_rounds == "average"),
            "`--optimizer_across_rounds average` cannot average the 8-bit moments of `--use_8bit_adam`: choose one.",
        )
        plain = {"outer_lr": 1, "outer_momentum": 0, "merge_rule": "mean"}
        for name, default in plain.items() if self.merges_exactly else ():
            value = getattr(self.ensemble, name)
            require(
                value == default,
                f"`--{name} {value}` does not go with `--lora_merge exact`: leave it out, or choose another merge.",
            )
        for registry in REGISTRIES:
            self._refuse_of_others(registry)

    def _refuse_of_others(self, registry: Registry) -> None:
        """Raises a `UserError` for a flag of a rule that is not the chosen one."""
        chosen, _ = self.chosen(registry)
        for entry in registry.entries.values():
            for each in fields(entry.config) if entry.config and entry is not chosen else ():
                value = getattr(self._settings_of(entry), each.name)
                require(
                    value == each.default,
                    f"`--{each.name} {value}` does nothing with `--{registry.flag} {chosen.name}`: leave it out.",
                )

    def chosen(self, registry: Registry) -> tuple[Entry, Any]:
        """The rule of a kind that the flags choose, as in `entry, settings = config.chosen(SKIP_RULES)`.

        Returns:
            its entry, whose `load()` is the class or function, and its flags as an instance of `entry.config`, or None
            if it has no flags.
        """
        entry = registry.entries[self.to_flags()[registry.flag]]
        return entry, self._settings_of(entry)

    def _settings_of(self, entry: Entry) -> Any:
        of_rule = entry.config and entry.config()
        return next((group for group in self._groups() if type(group) is entry.config), of_rule)

    def _groups(self) -> tuple[Any, ...]:
        return (*(getattr(self, name) for name in GROUPS), *self.rules)

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
        parser = training_parser("Fine-tune a diffusers pipeline with IET-AGC.", flag_groups(), prog)
        given = parse_arguments(parser, argv, flag_names(), others_too=True)
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
        alternatives = [(spec.name, spec.instead_of) for spec in all_flags().values() if spec.instead_of]
        values: dict[str, Any] = {}
        for layer in layers:
            for one, other in alternatives:
                # The upper layer overrides: choosing one of two there unsets the other here.
                for upper, lower in ((one, other), (other, one)):
                    if upper in layer and lower not in layer:
                        values.pop(lower, None)
            values |= layer
        return cls._from_values(values)

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "Config":
        def made(group: type) -> Any:
            return group(**{each.name: values[each.name] for each in fields(group) if each.name in values})

        rules = tuple(made(group) for group in _rules_from_outside().values())
        return cls(**{name: made(group) for name, (_, group) in GROUPS.items()}, rules=rules)

    def check_sources(self, *, pipeline: bool = False, dataset: bool = False, heldout_images: bool = False) -> None:
        """Raises a `UserError` unless a pipeline, or a network to begin with, and a source of images are given.

        Args:
            pipeline, dataset, heldout_images: whether they are passed as objects; no flag may name others then.
        """
        require(
            pipeline or self.model.pretrained_model_name_or_path is not None or self.model.model_config is not None,
            "`--pretrained_model_name_or_path` is missing: give the Hub id or folder of a diffusers pipeline, or "
            "`--model_config` to train from scratch.",
        )
        require(
            dataset or self.data.train_data_dir is not None or self.data.dataset_name is not None,
            "no images: give `--train_data_dir FOLDER` or `--dataset_name NAME`.",
        )
        objects = {"pipeline": pipeline, "dataset": dataset, "heldout_images": heldout_images}
        for kind, passed in objects.items():
            if passed:
                self._refuse_names_of(kind)

    def _refuse_names_of(self, kind: str) -> None:
        flags, defaults = self.to_flags(), type(self)().to_flags()
        for name, spec in all_flags().items():
            wanted = kind not in spec.names or flags[name] == defaults[name]
            words = "held-out images that are" if kind == "heldout_images" else f"a {kind} that is"
            beside = f"{words} passed as an object"
            require(wanted, f"`--{name} {flags.get(name)}` does not go with {beside}: leave it out.")

    def to_flags(self) -> dict[str, Any]:
        """Every effective flag by name, secrets left out, in plain YAML types; the inverse of `from_flags`."""
        flat: dict[str, Any] = {}
        for group in self._groups():
            flat.update(dataclasses.asdict(group))
        secret = {spec.name for spec in all_flags().values() if spec.scope == "secret"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items() if k not in secret}

    @property
    def merges_exactly(self) -> bool:
        """Whether LoRA adapters are trained whose updates are merged rather than their matrices."""
        return self.adapter.use_lora and self.adapter.lora_merge == "exact"

    @property
    def output_path(self) -> Path:
        """`--output_dir` as a path."""
        return Path(self.training.output_dir)

    @property
    def class_path(self) -> Path:
        """The folder of the class images, `--class_data_dir` or one in the output folder."""
        return Path(self.prior.class_data_dir or self.output_path / CLASS_FOLDER)


def flag_groups() -> dict[str, type]:
    """All flags: title in `--help-all` -> dataclass, those of registered rules last."""
    return dict(GROUPS.values()) | _rules_from_outside()


def all_flags() -> dict[str, FlagSpec]:
    """All flags by name, in the order of `--help-all`."""
    return {spec.name: spec for group in flag_groups().values() for spec in flag_specs(group)}


def flag_names() -> list[str]:
    """The names of all flags, in the order of `--help-all`."""
    return list(all_flags())


def _converted(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values in their flags' types; `where`, with the flag for its first NAME, begins an error."""
    specs = all_flags()
    if strange := [name for name in values if name not in specs]:
        raise unknown(strange, specs)
    return {name: convert(specs[name], value, where.replace("NAME", name, 1)) for name, value in values.items()}

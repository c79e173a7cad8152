"""What plugs in by name: skip rules, ways to shard, and merge rules, each with flags of its own.

A rule from outside is one file that registers it and then starts a run:

    @register_skip_rule("reference")
    class BelowReference:
        @dataclass(frozen=True)
        class Config:
            reference_share: float = flag(0.8, "Skip below this share of ...", resume="fixed")

    if __name__ == "__main__":
        sys.exit(run(lambda: train(sys.argv[1:])))

Its flags then appear in `--help-all`, YAML files, a run's identity and what it publishes. The package finds the chosen
rule and its settings with `entry, settings = config.chosen(SKIP_RULES)` and `entry.load()`.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from .flags import flag_specs

Rule = TypeVar("Rule")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered rule.

    Attributes:
        name: the value of the flag that chooses it.
        rule: the class or function, or "module:attribute" of one that is imported only when it is used.
        config: frozen dataclass of its flags; None if it has none.
    """

    name: str
    rule: Any
    config: type | None = None

    def load(self) -> Any:
        """The class or function itself."""
        if not isinstance(self.rule, str):
            return self.rule
        module, _, attribute = self.rule.partition(":")
        return getattr(importlib.import_module(module), attribute)


class Registry:
    """The rules of one kind by name, in the order of their registration.

    Args:
        flag: the flag that chooses one of them.
        kind: what they are called in messages and titles.
        entries: those of the package.
    """

    def __init__(self, flag: str, kind: str, *entries: Entry) -> None:
        self.flag, self.kind = flag, kind
        self.entries = {entry.name: entry for entry in entries}

    def names(self) -> tuple[str, ...]:
        """The names that the flag may have now."""
        return tuple(self.entries)

    def register(self, name: str, config: type | None = None) -> Callable[[Rule], Rule]:
        """A decorator that registers a class or function under this name.

        Args:
            config: frozen dataclass of its flags; the rule's attribute `Config`, if it has one, when not given.

        Raises:
            ValueError: the name, or the name of a flag, is taken.
            TypeError: `config` is not a frozen dataclass, or a field of it lacks a fact that a flag must declare.
        """

        def decorate(rule: Rule) -> Rule:
            if name in self.entries:
                raise ValueError(f"there is a {self.kind} {name!r} already: choose another name.")
            group = config or getattr(rule, "Config", None)
            if group is not None:
                _check_flags(f"{self.kind} {name!r}", group)
            self.entries[name] = Entry(name, rule, group)
            return rule

        return decorate


SKIP_RULES = Registry("skip_rule", "skip rule")
SHARDINGS = Registry(
    "shard_strategy",
    "sharding",
    Entry("iid", "iet_finetune.method.sharding:iid"),
    Entry("stratified", "iet_finetune.method.sharding:stratified"),
)
MERGE_RULES = Registry("merge_rule", "merge rule", Entry("mean", "iet_finetune.method.merging:Mean"))
REGISTRIES = (SKIP_RULES, SHARDINGS, MERGE_RULES)
# Options that are no rule's; `Config` adds its own flags.
RESERVED = {"config", "help", "help_all", "help_from"}


def register_skip_rule(name: str, config: type | None = None) -> Callable[[Rule], Rule]:
    """Registers a class as a rule for `--skip_rule`; arguments and errors as `Registry.register`."""
    return SKIP_RULES.register(name, config)


def register_sharding(name: str, config: type | None = None) -> Callable[[Rule], Rule]:
    """Registers a function as a way to split the images for `--shard_strategy`; as `Registry.register`."""
    return SHARDINGS.register(name, config)


def register_merge_rule(name: str, config: type | None = None) -> Callable[[Rule], Rule]:
    """Registers a class as a rule for `--merge_rule`; arguments and errors as `Registry.register`."""
    return MERGE_RULES.register(name, config)


def rule_groups() -> dict[str, type]:
    """The flags of all registered rules: title in `--help-all` -> dataclass."""
    return {
        f"{registry.kind} {entry.name}".capitalize(): entry.config
        for registry in REGISTRIES
        for entry in registry.entries.values()
        if entry.config is not None
    }


def _check_flags(owner: str, group: type) -> None:
    # The params are where a dataclass keeps that it is frozen; typeshed leaves them out.
    if not dataclasses.is_dataclass(group) or not group.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # no stub has it
        raise TypeError(f"the flags of {owner} must be the fields of a frozen dataclass, not {group!r}.")
    taken = RESERVED | {spec.name for other in rule_groups().values() for spec in flag_specs(other)}
    for spec in flag_specs(group):
        if spec.name in taken:
            raise ValueError(f"{owner} has a flag `--{spec.name}`, which exists already: choose another name.")

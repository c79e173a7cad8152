"""The configuration: one set of names for fields, flags and YAML keys, and every bad value named in one line."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.config.config import GROUPS, Config, flag_names
from iet_finetune.config.flags import FlagSpec, flag_specs
from iet_finetune.errors import UserError

SPECS = {spec.name: spec for _, group in GROUPS.values() for spec in flag_specs(group)}
# Flags of LoRA, which need `use_lora`; one of them is always refused.
ADAPTER = [spec.name for spec in flag_specs(GROUPS["adapter"][1])]
REFUSED = "use_dora"
# Flags of prior preservation, which need `class_prompt`.
PRIOR = [spec.name for spec in flag_specs(GROUPS["prior"][1])]
# Flags by the skip rule without which they are refused.
OF_RULES = {rule: [spec.name for spec in flag_specs(GROUPS[rule][1])] for rule in ("agc", "guard", "calibrated_agc")}
SOURCES = ("--pretrained_model_name_or_path", "sd", "--train_data_dir", "cats")


def message_of(function, *arguments, **keywords) -> str:
    """The message of the `UserError` that a call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def write(folder: Path, **flags: Any) -> str:
    """The path of a YAML file with these keys."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(flags), encoding="utf-8")
    return str(path)


# Values that are allowed for every flag of their type, so that any of them may be combined.
SCALARS = {
    int: st.integers(8, 10**9),
    float: st.floats(1e-6, 0.999),
    bool: st.booleans(),
    # argparse takes a lone -- for the end of the flags, also behind an equals sign.
    str: st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "--"),
}
PLACES = SCALARS[str].filter(lambda text: text and "\0" not in text and not text.startswith("~"))


def values_of(spec: FlagSpec) -> st.SearchStrategy:
    """Allowed values of a flag, as they stand in a configuration."""
    scalar = st.sampled_from(spec.choices) if spec.choices else PLACES if spec.is_place else SCALARS[spec.scalar]
    many = st.lists(scalar).map(tuple) if spec.many else scalar
    return st.none() | many if spec.optional else many


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any configuration that sets any of the flags."""
    names = draw(st.sets(st.sampled_from(flag_names()))) - {REFUSED}
    flags = {name: draw(values_of(SPECS[name])) for name in sorted(names)}
    if flags.get("train_data_dir") is not None:
        flags.pop("dataset_name", None)
    if flags.get("model_config") is not None:
        flags |= dict.fromkeys(("pretrained_model_name_or_path", "revision", "variant", "base_config"))
    if flags.get("use_8bit_adam") and flags.get("optimizer_across_rounds") == "average":
        flags.pop("use_8bit_adam")
    if flags.get("max_train_steps") is not None:
        flags.pop("total_train_steps", None)
    if flags.get("merge_every_epochs") is not None:
        flags.pop("merge_every_steps", None)
    if flags.get("lora_remainder_rank") is not None:
        flags |= {"quantize_base": "int8", "lora_merge": "exact"}
    if names & set(ADAPTER):
        flags |= {"use_lora": True, "lora_layers": draw(st.none() | st.just("to_q, proj_in"))}
        flags |= {"outer_lr": 1.0, "outer_momentum": 0.0} if flags.get("lora_merge", "exact") == "exact" else {}
    for rule in OF_RULES.keys() - {flags.get("skip_rule", "agc")}:
        flags = {name: value for name, value in flags.items() if name not in OF_RULES[rule]}
    if flags.get("stop_when", "end") != "auto":
        flags.pop("stop_patience", None)
    if names & set(PRIOR):
        flags["class_prompt"] = f"a {flags.get('class_prompt') or 'dog'}"
    if flags.get("default_caption") is not None:
        flags.pop("instance_prompt", None)
    if flags.get("guard_levels") == ():
        flags.pop("guard_levels")
    if (flags.get("guard_best_levels") or 0) > len(flags.get("guard_levels", (0.01, 0.02, 0.04))):
        flags.pop("guard_best_levels")
    flags["aspect_ratio_buckets"] = draw(st.sampled_from([None, "auto", "64x32, 32x64"]))
    if flags["aspect_ratio_buckets"] is None:
        flags.pop("upscale", None)
    stratified = flags.get("shard_strategy") == "stratified"
    flags["shard_by_column"] = draw(SCALARS[str]) if stratified else None
    return Config.from_flags(**flags)


def without_secrets(config: Config) -> Config:
    """The same configuration with every secret at its default."""
    return dataclasses.replace(config, hub=dataclasses.replace(config.hub, hub_token=None))


def base_of(config: Config) -> dict[str, Any]:
    """The flag that says what is trained: a pipeline, unless the configuration begins with a network."""
    return {"pretrained_model_name_or_path": "sd" if config.model.model_config is None else None}


@given(configs())
def test_a_configuration_comes_back_from_its_flags(config):
    assert Config.from_flags(**config.to_flags()) == without_secrets(config)


@given(configs())
def test_a_configuration_comes_back_from_its_yaml_file(tmp_path_factory, config):
    flags = {**config.to_flags(), **base_of(config)}
    flags["train_data_dir"] = None if flags["dataset_name"] is not None else "cats"
    path = write(tmp_path_factory.getbasetemp(), **flags)
    assert Config.from_command_line(["--config", path]).to_flags() == flags


def on_the_command_line(flags: dict[str, Any]) -> list[str]:
    """Arguments that set these flags; what is none is left out."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


@given(configs())
def test_a_configuration_comes_back_from_the_command_line(config):
    # A prompt that begins with a dash would be a flag.
    prompts = [prompt for prompt in config.validation.validation_prompts if not prompt.startswith("-")]
    # And none at all can only be written in a file.
    features = [name for name in config.audit.features if not name.startswith("-")] or ["x"]
    flags = {**config.to_flags(), **base_of(config), "validation_prompts": prompts, "features": features}
    flags["train_data_dir"] = None if flags["dataset_name"] is not None else "cats"
    assert Config.from_command_line(on_the_command_line(flags)).to_flags() == flags


def test_every_field_is_a_flag_with_a_sentence_of_help_and_a_name_of_its_own():
    fields = [field for _, group in GROUPS.values() for field in dataclasses.fields(group)]
    assert flag_names() == [field.name for field in fields]
    assert len(set(flag_names())) == len(fields)
    assert {field.name for field in dataclasses.fields(Config)} == {*GROUPS, "rules", "is_smoke"}
    for spec in SPECS.values():
        assert spec.help.strip().endswith((".", ")")), f"--{spec.name}: {spec.help!r}"


@pytest.mark.parametrize("name", [name for name in SPECS if name != REFUSED])
def test_every_flag_can_be_given(name):
    spec = SPECS[name]
    value = spec.choices[-1] if spec.choices else {int: 9, float: 0.5, bool: True, str: "x"}[spec.scalar]
    value = "auto" if name == "aspect_ratio_buckets" else value
    flags = {spec.name: [value] if spec.many else value}
    flags |= {"shard_strategy": "stratified", "shard_by_column": "x"} if spec.name.startswith("shard_") else {}
    flags |= {"use_lora": True} if name in ADAPTER else {}
    flags |= {"class_prompt": "x"} if name in PRIOR else {}
    flags |= {"stop_when": "auto"} if name == "stop_patience" else {}
    flags |= {"quantize_base": "nf4"} if name == "lora_remainder_rank" else {}
    flags |= {"guard_levels": [0.1] * 9} if name == "guard_best_levels" else {}
    flags |= next(({"skip_rule": rule} for rule in ("guard", "calibrated_agc") if name in OF_RULES[rule]), {})
    sources = {"dataset_name": SOURCES[:2], "model_config": SOURCES[2:]}.get(spec.name, SOURCES)
    config = Config.from_command_line([*sources, *on_the_command_line(flags)])
    (owner,) = (name for name, (_, group) in GROUPS.items() if spec.name in group.__dataclass_fields__)
    assert getattr(getattr(config, owner), spec.name) == (tuple(flags[spec.name]) if spec.many else value)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_value_of_another_type_is_refused_by_name_wherever_it_stands(tmp_path, spec):
    wrong = "maybe" if spec.scalar is not str else 5
    assert f"`--{spec.name}`" in message_of(Config.from_flags, **{spec.name: wrong})
    path = write(tmp_path, **{spec.name: wrong})
    message = message_of(Config.from_command_line, [*SOURCES, "--config", path])
    assert message.startswith(f"`{spec.name}` in `--config {path}` must be of type {spec.scalar.__name__}")


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.choices], ids=lambda spec: spec.name)
def test_a_value_that_is_no_choice_is_answered_with_the_choices(spec):
    message = message_of(Config.from_command_line, [*SOURCES, f"--{spec.name}", "sideways"])
    assert message == f"`--{spec.name}` must be one of {', '.join(spec.choices or ())}, not 'sideways'."


def test_what_only_an_adapter_has_is_refused_without_one():
    for name in set(ADAPTER) - {"use_lora", REFUSED}:
        spec = SPECS[name]
        value = spec.choices[-1] if spec.choices else {int: 9, float: 0.5, bool: True, str: "x"}[spec.scalar]
        shown = name if value is True else f"{name} {value}"
        assert message_of(Config.from_flags, **{name: value}) == (
            f"`--{shown}` does nothing without `--use_lora`: give both."
        )


@pytest.mark.parametrize("sizes", ["", "64", "64x", "0x64", "64x32,", "64x32, 64x32", "automatic"])
def test_what_is_no_list_of_different_sizes_is_refused(sizes):
    message = message_of(Config.from_flags, aspect_ratio_buckets=sizes)
    assert message.startswith(f"`--aspect_ratio_buckets {sizes}`")


@pytest.mark.parametrize("layers", ["", "to_q,", ",to_q", "to_q,,to_k", " , to_q"])
def test_an_empty_name_of_a_layer_is_refused(layers):
    assert message_of(Config.from_flags, use_lora=True, lora_layers=layers).startswith(f"`--lora_layers {layers}` has")


def test_dora_is_refused_with_the_reason():
    assert message_of(Config.from_flags, use_lora=True, use_dora=True).startswith("`--use_dora`: a DoRA update is not")


@pytest.mark.parametrize("flags", [{"outer_lr": 0.5}, {"outer_momentum": 0.9}])
def test_an_outer_optimizer_goes_with_the_mean_of_matrices_only(flags):
    Config.from_flags(use_lora=True, lora_merge="average", **flags)
    assert "`--lora_merge exact`" in message_of(Config.from_flags, use_lora=True, **flags)


BELOW_ONE = {
    *("max_train_samples", "num_shards", "merge_every_epochs", "merge_every_steps", "train_batch_size"),
    *("rank", "lora_alpha", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps"),
    "total_train_steps",
    "num_validation_images",
    *("validation_rounds", "validation_inference_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("logging_steps", "max_sequence_length", "save_every_rounds"),
}
BELOW_ZERO = {
    *("dataloader_num_workers", "seed", "learning_rate", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon"),
    *("max_grad_norm", "validation_guidance_scale", "guidance_scale"),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in sorted(BELOW_ONE)),
        *((name, -1) for name in sorted(BELOW_ZERO)),
        *((name, value) for name in ("agc_threshold", "agc_decay", "adam_beta1", "adam_beta2") for value in (-0.1, 1)),
        *((name, value) for name in ("caption_dropout", "ema_max_decay") for value in (-0.1, 1.1)),
        *(("holdout_fraction", value) for value in (-0.1, 1)),
        *(("snr_gamma", value) for value in (0, -5)),
        ("resolution", 7),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(name, value):
    message = message_of(Config.from_flags, **{name: value})
    assert f"`--{name}`" in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 1) for name in sorted(BELOW_ONE)),
        *((name, 0) for name in sorted(BELOW_ZERO)),
        *((name, 0) for name in ("agc_threshold", "agc_decay", "holdout_fraction", "caption_dropout")),
        *((name, 1) for name in ("caption_dropout", "ema_max_decay")),
        ("resolution", 8),
    ],
)
def test_the_ends_of_a_range_are_in_it(name, value):
    needed = {"use_lora": True} if name in ADAPTER else {}
    assert Config.from_flags(**{name: value}, **needed).to_flags()[name] == value


@pytest.mark.parametrize(
    "flags",
    [
        {"train_data_dir": "cats", "dataset_name": "dogs"},
        {"merge_every_epochs": 1, "merge_every_steps": 1},
        {"max_train_steps": 1, "total_train_steps": 1},
        {"default_caption": "a", "instance_prompt": "b"},
        {"shard_strategy": "stratified"},
        {"shard_by_column": "label"},
        {"upscale": False},
    ],
)
def test_flags_that_exclude_or_need_each_other_are_named_together(flags):
    pair = {"shard_strategy", "shard_by_column"} if next(iter(flags)).startswith("shard_") else set(flags)
    pair = {"no_upscale", "aspect_ratio_buckets"} if "upscale" in flags else pair
    message = message_of(Config.from_flags, **flags)
    assert all(f"`--{name}" in message for name in pair)


@pytest.mark.parametrize("missing", SOURCES[::2])
def test_a_run_needs_a_pipeline_and_images(missing):
    argv = [part for pair in (SOURCES[:2], SOURCES[2:]) if pair[0] != missing for part in pair]
    assert f"`{missing}" in message_of(Config.from_command_line, argv)


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path, num_shards=2, use_ema=True, seed=7, validation_prompts=["a cat", "a dog"])
    argv = [*SOURCES, "--num_shards", "8", "--config", path, "--no_use_ema", "--validation_prompts", "a fish"]
    config = Config.from_command_line(argv)
    assert config.ensemble.num_shards == 8
    assert config.optimizer.use_ema is False
    assert config.validation.validation_prompts == ("a fish",)
    assert config.training.seed == 7
    assert config.training.train_batch_size == Config().training.train_batch_size


def test_an_optional_number_of_the_file_can_be_taken_back(tmp_path):
    path = write(tmp_path, max_train_steps=5)
    assert Config.from_command_line([*SOURCES, "--config", path]).training.max_train_steps == 5
    taken_back = Config.from_command_line([*SOURCES, "--config", path, "--max_train_steps", "none"])
    assert taken_back.training.max_train_steps is None


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 1e-5\n", encoding="utf-8")
    assert Config.from_command_line([*SOURCES, "--config", str(path)]).optimizer.learning_rate == 1e-5


def test_one_value_is_a_list_of_one(tmp_path):
    path = write(tmp_path, validation_prompts="a cat")
    config = Config.from_command_line([*SOURCES, "--config", path])
    assert config.validation.validation_prompts == ("a cat",)


def test_an_unknown_flag_or_key_names_its_neighbour(tmp_path):
    assert message_of(Config.from_command_line, ["--num_shard", "3"]).endswith("Did you mean `--num_shards`?")
    path = write(tmp_path, num_shard=3)
    message = message_of(Config.from_command_line, ["--config", path])
    assert message == f"unknown key `num_shard` in `--config {path}`. Did you mean `num_shards`?"
    assert "`--num_shard`" in message_of(Config.from_flags, num_shard=3)


def test_all_unknown_flags_are_named_at_once_also_those_of_other_trainers():
    expected = (
        "unknown flags: `--foo`; `--num_shard` (did you mean `--num_shards`?); `--xformers` (it is not needed: "
        "torch's own attention is used)."
    )
    argv = [*SOURCES, "--foo", "1", "--num_shard=3", "--xformers"]
    assert message_of(Config.from_command_line, argv) == expected
    assert message_of(Config.from_flags, foo=1, num_shard=3, xformers=True, seed=1) == expected


def printed(capsys, *argv: str) -> str:
    """What a command line that only asks for help prints."""
    with pytest.raises(SystemExit) as stop:
        Config.from_command_line(list(argv))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_the_flags_that_matter_most_in_groups_with_one_line_each(capsys, option):
    shown = printed(capsys, *SOURCES, option)
    main = [spec for spec in SPECS.values() if spec.brief]
    assert 12 <= len(main) <= 16
    listed = [line for line in shown.splitlines() if line.startswith("  --")]
    assert [line.split()[0] for line in listed[3:]] == [f"--{spec.name}" for spec in main]
    for spec, line in zip(main, listed[3:], strict=True):
        assert (spec.help if spec.brief is True else spec.brief) in line
        assert len(line) <= 119
    assert "\nIterative ensemble training:\n  --num_shards" in shown
    assert "`--help-all` shows the others too" in shown
    assert len(shown.splitlines()) <= 50


@pytest.mark.parametrize("option", ["--help-all", "--help_all"])
def test_help_all_shows_every_flag_with_its_help(capsys, option):
    text = " ".join(printed(capsys, option).split())
    for spec in SPECS.values():
        assert f"--{spec.name} " in text.replace(",", "")
    # argparse may break a line after a hyphen.
    assert all(spec.help.replace(" ", "") in text.replace(" ", "") for spec in SPECS.values())


def test_secrets_are_never_written_down():
    config = Config.from_flags(hub_token="hf_secret", hub_model_id="me/cats")
    assert config.hub.hub_token == "hf_secret"
    assert "hf_secret" not in yaml.safe_dump(config.to_flags())
    assert set(flag_names()) - set(config.to_flags()) == {"hub_token"}


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training = None


def test_names_and_defaults_are_those_of_diffusers_text_to_image_script():
    # examples/text_to_image/train_text_to_image.py of diffusers 0.42.
    theirs = {
        "output_dir": "sd-model-finetuned",
        "image_column": "image",
        "caption_column": "text",
        "resolution": 512,
        "center_crop": False,
        "random_flip": False,
        "image_interpolation_mode": "lanczos",
        "train_batch_size": 16,
        "num_train_epochs": 100,
        "max_train_steps": None,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-4,
        "scale_lr": False,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 500,
        "snr_gamma": None,
        "use_8bit_adam": False,
        "allow_tf32": False,
        "use_ema": False,
        "dataloader_num_workers": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "mixed_precision": None,
        "logging_dir": "logs",
        "report_to": "tensorboard",
        "checkpointing_steps": 500,
        "checkpoints_total_limit": None,
        "resume_from_checkpoint": None,
        "noise_offset": 0,
        "push_to_hub": False,
        "hub_model_id": None,
    }
    ours = Config().to_flags()
    assert {name: ours[name] for name in theirs} == theirs


def test_one_of_two_alternatives_on_the_command_line_unsets_the_other_in_the_file(tmp_path):
    path = write(tmp_path, merge_every_epochs=3, dataset_name="me/cats", max_train_steps=7)
    argv = [*SOURCES, "--config", path, "--merge_every_steps", "10", "--total_train_steps", "9"]
    config = Config.from_command_line(argv)
    assert (config.training.max_train_steps, config.training.total_train_steps) == (None, 9)
    assert config.ensemble.merge_every_steps == 10
    assert config.ensemble.merge_every_epochs is None
    assert config.data.dataset_name is None

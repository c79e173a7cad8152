"""A dataclass field is a flag and a YAML key, and a bad value is named in one line."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_finetune.config.command_line import build_parser, parse_arguments
from iet_finetune.config.flags import FlagSpec, convert, flag, flag_specs, nearest
from iet_finetune.config.recipes import read_yaml
from iet_finetune.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Oven:
    """A field of every kind that a flag may have."""

    degrees: int = flag(180, "How hot, up to 100 % of what it can.", resume="other")
    hours: float = flag(1.5, "How long.", resume="other")
    minutes: int | None = flag(None, "How long, instead of hours.", resume="other")
    fan: bool = flag(False, "Whether the fan runs.", resume="other")
    light: bool = flag(True, "Whether it is lit.", resume="other")
    dish: str = flag("bread", "What is in it.", resume="other", scope="public")
    cook: str | None = flag(None, "Who put it there.", resume="other", scope="local")
    heat: str = flag("top", "Where the heat is.", choices=("top", "bottom"), resume="fixed")
    guests: tuple[str, ...] = flag((), "Who eats.", resume="free", scope="public", smoke=())


SPECS = {spec.name: spec for spec in flag_specs(Oven)}


def parse(*argv: str) -> dict:
    """What a command line with these arguments gives."""
    return parse_arguments(build_parser("Bake.", {"Oven": Oven}), list(argv), list(SPECS))


def message_of(function, *arguments) -> str:
    """The message of the `UserError` that a call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_flag_is_read_off_its_field():
    assert SPECS["minutes"] == FlagSpec(
        "minutes", int, True, False, None, "How long, instead of hours.", None, resume="other"
    )
    assert SPECS["guests"] == FlagSpec("guests", str, False, True, (), "Who eats.", None, resume="free", smoke=())
    assert SPECS["heat"].choices == ("top", "bottom")
    assert list(SPECS) == [field.name for field in dataclasses.fields(Oven)]


@pytest.mark.parametrize(
    ("name", "value", "converted"),
    [
        ("degrees", 200, 200),
        ("degrees", "200", 200),
        ("hours", 2, 2.0),
        ("hours", "1e-5", 1e-5),
        ("minutes", None, None),
        ("minutes", "none", None),
        ("minutes", "None", None),
        ("cook", "none", "none"),
        ("cook", None, None),
        ("fan", True, True),
        ("guests", "Ada", ("Ada",)),
        ("guests", ["Ada", "Bo"], ("Ada", "Bo")),
        ("guests", (), ()),
        ("heat", "bottom", "bottom"),
    ],
)
def test_a_value_becomes_the_type_of_its_flag(name, value, converted):
    result = convert(SPECS[name], value, "`--x`")
    assert result == converted
    assert type(result) is type(converted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("degrees", 1.5),
        ("degrees", "hot"),
        ("degrees", True),
        ("degrees", None),
        ("degrees", "none"),
        ("degrees", [180]),
        ("degrees", {"top": 180}),
        ("hours", "long"),
        ("hours", False),
        ("hours", float("nan")),
        ("hours", "inf"),
        ("hours", "1e400"),
        pytest.param("hours", 10**400, id="hours-more than a float holds"),
        ("fan", "true"),
        ("fan", 1),
        ("fan", None),
        ("dish", 3),
        ("dish", True),
        ("heat", "left"),
        ("heat", "TOP"),
        ("guests", None),
        ("guests", [1]),
        ("guests", [["Ada"]]),
        ("guests", {"a": "b"}),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value):
    assert f"`--{name}`" in message_of(convert, SPECS[name], value, f"`--{name}`")


def test_a_wrong_choice_is_answered_with_the_right_ones():
    assert message_of(convert, SPECS["heat"], "left", "`--heat`") == "`--heat` must be one of top, bottom, not 'left'."


def test_a_wrong_type_is_answered_with_the_right_one():
    assert message_of(convert, SPECS["degrees"], "hot", "`--degrees`") == "`--degrees` must be of type int, not 'hot'."


@given(
    spec=st.sampled_from(list(SPECS.values())),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=4,
    ),
)
def test_whatever_yaml_holds_is_converted_or_refused_in_one_line(spec, value):
    refusals = []
    try:
        converted = convert(spec, value, f"`{spec.name}`")
    except UserError as error:
        refusals.append(str(error))
    for message in refusals:
        assert len(message.splitlines()) == 1
        assert f"`{spec.name}`" in message
    if not refusals:
        items = converted if spec.many else [converted]
        assert all(type(item) is spec.scalar or (item is None and spec.optional) for item in items)


def test_what_names_a_place_may_differ_between_machines():
    assert [spec.name for spec in SPECS.values() if spec.is_per_machine] == ["cook"]


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (
            dataclasses.field(default=1),
            "`Planted.timer` is no flag: declare it with `flag(default, help, resume=...)`.",
        ),
        (flag(1, "How long."), "the flag `Planted.timer` must declare resume= as one of fixed, free, other."),
        (flag(1, "How long.", resume="never"), "must declare resume= as one of fixed, free, other."),
        (flag("1", "How long.", resume="free"), "must declare scope= as one of public, local, named, secret."),
        (
            flag(1, "How long.", resume="free", scope="mine"),
            "must declare scope= as one of public, local, named, secre",
        ),
        (
            flag(1, "How long.", resume="free", audit=True),
            "must declare audit= as one of given, run, recorded, noted.",
        ),
        (flag(1, "How long.", resume="free", smok=2), "declares smok=, which is no fact of a flag."),
    ],
)
def test_a_flag_without_its_facts_is_refused_by_name(planted, message):
    kind = str if planted.default == "1" else int
    group = dataclasses.make_dataclass("Planted", [("timer", kind, planted)], frozen=True)
    with pytest.raises(TypeError, match=re.escape(message)):
        flag_specs(group)


def test_only_what_is_on_the_command_line_is_given():
    assert parse() == {}
    assert parse("--degrees", "200", "--fan", "--guests", "Ada", "Bo") == {
        "degrees": "200",
        "fan": True,
        "guests": ["Ada", "Bo"],
    }


def test_a_switch_can_be_switched_off():
    assert parse("--no_fan") == {"fan": False}
    assert parse("--no_fan", "--fan") == {"fan": True}


@pytest.mark.parametrize("argv", [["--degrees", "-5"], ["--degrees=-5"]])
def test_a_negative_number_is_a_value_and_not_a_flag(argv):
    assert parse(*argv) == {"degrees": "-5"}


@pytest.mark.parametrize("value", ["true", "True", "yes", "1", "false", "no", "0", "NO"])
def test_a_switch_may_have_a_value_after_an_equals_sign(value):
    assert parse(f"--fan={value}") == {"fan": value.lower() in ("true", "yes", "1")}


def test_a_value_that_looks_like_a_switch_with_a_value_stays_as_it_is():
    assert parse("--dish=--fan=true", "--guests", "fan=true") == {"dish": "--fan=true", "guests": ["fan=true"]}


def test_all_unknown_flags_are_named_at_once_each_with_its_neighbour():
    message = message_of(parse, "--degree", "200", "--xyzzy=1", "--fan", "--guets", "Ada", "Bo", "--xyzzy", "2")
    assert message == (
        "unknown flags: `--degree` (did you mean `--degrees`?); `--xyzzy`; `--guets` (did you mean `--guests`?)."
    )


def test_flags_of_other_trainers_are_only_spoken_of_in_a_run():
    argv = ["--network_dim", "8"]
    parser = build_parser("Bake.", {"Oven": Oven})
    assert message_of(parse, *argv) == "unknown flag `--network_dim`."
    said = message_of(lambda: parse_arguments(parser, argv, list(SPECS), others_too=True))
    assert said == "unknown flag `--network_dim`. It is `--rank` here: together with `--use_lora`."


def test_an_unknown_flag_names_its_neighbour():
    assert message_of(parse, "--degree", "200") == "unknown flag `--degree`. Did you mean `--degrees`?"
    assert message_of(parse, "--no_fans") == "unknown flag `--no_fans`. Did you mean `--fan`?"
    assert message_of(parse, "--xyzzy=1") == "unknown flag `--xyzzy`."


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--degrees"], "--degrees"),
        (["--guests"], "--guests"),
        (["--fan=maybe"], "`--fan` is a switch: it takes true or false (or yes, no, 1, 0), not 'maybe'."),
        (["--fan="], "`--fan` is a switch"),
        (["--no_fan=false"], "--no_fan"),
        (["--fan", "yes"], "'yes': every value follows a flag, that of a switch after an equals sign"),
        (["bread"], "'bread'"),
        (["-d", "5"], "'-d'"),
    ],
)
def test_what_does_not_fit_the_flags_is_named(argv, culprit):
    assert culprit in message_of(parse, *argv)


def test_flags_are_not_abbreviated():
    assert "`--deg`" in message_of(parse, "--deg", "200")


def test_help_shows_every_flag_with_its_text_and_default():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(shown.getvalue().split())
    for spec in SPECS.values():
        assert f"--{spec.name}" in text
        assert spec.help in text
    assert "(default: 180)" in text
    assert "--fan Whether the fan runs. (default: off)" in text
    assert "--light, --no_light Whether it is lit. (default: on)" in text
    assert "{top,bottom}" in text


@pytest.mark.parametrize(("name", "neighbour"), [("degres", " Did you mean `degrees`?"), ("xyzzy", "")])
def test_the_nearest_name_is_offered_if_one_is_near(name, neighbour):
    assert nearest(name, SPECS) == neighbour


def write(folder: Path, text: str) -> str:
    """The path of a YAML file with this text."""
    path = folder / "oven.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_yaml_file_is_a_mapping_of_keys_to_values(tmp_path):
    path = write(tmp_path, "# Sunday\ndegrees: 200\nhours: 1e-5\nguests: [Ada, Bo]\nminutes: null\n")
    assert read_yaml(path, list(SPECS)) == {"degrees": 200, "hours": "1e-5", "guests": ["Ada", "Bo"], "minutes": None}


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_yaml_file_gives_nothing(tmp_path, text):
    assert read_yaml(write(tmp_path, text), list(SPECS)) == {}


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("degree: 200", "unknown key `degree`"),
        ("3: 200", "unknown key `3`"),
        ("- degrees", "not a list"),
        ("degrees", "not a str"),
        ("degrees: [200", "not valid YAML"),
        ("degrees: 1\n\tfan: 2", "not valid YAML"),
        ("? [degrees]\n: 200", "not valid YAML"),
        ("degrees: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("dish: 2024-99-99", "not valid YAML"),
        ("degrees: 180\ndegrees: 200", "degrees"),
    ],
)
def test_a_yaml_file_with_anything_else_is_refused_by_name(tmp_path, text, culprit):
    path = write(tmp_path, text)
    message = message_of(read_yaml, path, list(SPECS))
    assert culprit in message
    assert f"`--config {path}`" in message


def test_all_unknown_keys_are_named_at_once(tmp_path):
    path = write(tmp_path, "degree: 200\nfan: true\nxformers: true\nxyzzy: 1\n")
    assert message_of(read_yaml, path, list(SPECS)) == (
        f"unknown keys in `--config {path}`: `degree` (did you mean `degrees`?); `xformers` (it is not needed: "
        "torch's own attention is used); `xyzzy`."
    )


def test_an_unknown_key_names_its_neighbour(tmp_path):
    message = message_of(read_yaml, write(tmp_path, "degree: 200"), list(SPECS))
    assert message.endswith("Did you mean `degrees`?")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        assert f"`--config {path}` cannot be read" in message_of(read_yaml, str(path), list(SPECS))
    (tmp_path / "latin.yaml").write_bytes("dish: Brötchen".encode("latin-1"))
    assert "latin.yaml` cannot be read" in message_of(read_yaml, str(tmp_path / "latin.yaml"), list(SPECS))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError(), "ValueError"),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    ],
)
def test_an_exception_is_quoted_by_its_first_line(error, line):
    assert one_line(error) == line

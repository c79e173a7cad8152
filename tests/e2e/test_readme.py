"""What the README and the pages in docs/ tell the reader to type works as it stands there."""

import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate.commands.launch import launch_command_parser
from tiny import save_images, save_tiny_sd, tiny_sd
from torch.distributed.run import get_args_parser

from iet_finetune import Config
from iet_finetune.cli.audit_command import audit_parser
from iet_finetune.cli.convert_command import convert_parser
from iet_finetune.cli.data_command import data_parser
from iet_finetune.cli.doctor_command import doctor_parser
from iet_finetune.config.config import flag_names
from iet_finetune.config.foreign import TRAINERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
# What parses the words between a launcher's name and the script's.
LAUNCHERS = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}
# Of launchers, and of commands that have flags of their own.
OTHER_FLAGS = {
    flag.removeprefix("--")
    for parser in (*LAUNCHERS.values(), audit_parser(), data_parser(), doctor_parser(), convert_parser())
    for flag in parser._option_string_actions
}


def blocks(language: str, containing: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return [block for block in found if containing in block]


def test_agc_fits_into_a_foreign_loop_in_the_lines_shown():
    (block,) = blocks("python", "AntiGradientControl")
    prediction = torch.randn(4, 3, 8, 8, requires_grad=True)
    target, timesteps = torch.randn(4, 3, 8, 8), torch.tensor([1, 5, 5, 999])
    scope = {"F": F, "prediction": prediction, "target": target, "timesteps": timesteps}
    exec(block, scope)
    expected = F.mse_loss(prediction, target)
    assert scope["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert prediction.grad.abs().sum() > 0
    assert scope["agc"].bank.count_nonzero() == 3


def test_models_merge_with_the_line_shown():
    (block,) = blocks("python", "merge_state_dicts")
    unet, unet_a, unet_b = (tiny_sd(seed=seed).unet for seed in (0, 1, 2))
    exec(block, {"unet": unet, "unet_a": unet_a, "unet_b": unet_b})
    expected = 0.6 * unet_a.conv_in.weight + 0.4 * unet_b.conv_in.weight
    torch.testing.assert_close(unet.conv_in.weight, expected)


def test_the_whole_run_from_python_works_and_the_result_loads(tmp_path, monkeypatch):
    save_tiny_sd(tmp_path / "base")
    save_images(tmp_path / "my_photos", 8)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", "Trainer(config)")
    small = "num_shards=4, resolution=16, max_train_steps=1, report_to='none',"
    block = block.replace("num_shards=4,", small).replace("stable-diffusion-v1-5/stable-diffusion-v1-5", "base")
    exec(block, {})
    (block,) = blocks("python", "from_pretrained")
    scope: dict = {}
    exec(block.replace('asleep")', 'asleep", num_inference_steps=1)'), scope)
    assert scope["image"].size == (16, 16)
    tree = re.search(r"```\nmy_model/\n(.*?)```", README, flags=re.DOTALL)[1]
    named = re.findall(r"^    ([\w.]+(?:, [\w.]+)*)", tree, flags=re.MULTILINE)
    for name in [name for line in named for name in line.split(", ")]:
        assert (tmp_path / "my_model" / name).exists() or name in ("validation", "rounds", "checkpoint"), name


def test_the_run_with_objects_and_a_callback_works_as_shown(tmp_path, monkeypatch, capsys):
    save_images(tmp_path / "images", 8)
    dataset = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", "callbacks=")
    small = "num_shards=4, resolution=16, max_train_steps=1, report_to='none'"
    exec(block.replace("num_shards=4", small), {"pipeline": tiny_sd(), "dataset": dataset})
    assert re.search(r"^1 \d+\.\d+$", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_shell_command_has_only_flags_that_exist():
    (block,) = blocks("bash", "train_iet_agc.py")
    words = shlex.split(block.replace("\\\n", " ").split("train_iet_agc.py")[1])
    config = Config.from_command_line(words)
    assert config.ensemble.num_shards == 4
    assert len(config.validation.validation_prompts) == 2


def commands(text: str) -> list[str]:
    """The commands of all shell blocks that start the script, each on one line."""
    shell = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    return [line for line in shell.replace("\\\n", " ").splitlines() if "train_iet_agc.py" in line]


@pytest.mark.parametrize("command", commands(README + "".join(PAGES.values())))
def test_a_command_has_only_flags_that_its_launcher_and_the_script_know(command, tmp_path, monkeypatch):
    (tmp_path / "my_run.yaml").write_text("pretrained_model_name_or_path: base\ntrain_data_dir: my_photos\n")
    monkeypatch.chdir(tmp_path)
    before, after = command.split("train_iet_agc.py")
    launcher = re.sub(r"^(\w+=\w+ )*", "", before).strip()
    for name, parser in LAUNCHERS.items():
        if launcher.startswith(name):
            typed = parser.parse_args([*shlex.split(launcher.removeprefix(name)), "train_iet_agc.py"])
            file = getattr(typed, "config_file", None)
            assert file is None or (ROOT / file).is_file()
            break
    else:
        assert launcher == "python"
    Config.from_command_line(shlex.split(after))


@pytest.mark.parametrize("text", [README, *PAGES.values()], ids=["README", *PAGES])
def test_every_flag_named_in_a_text_exists(text):
    negated = {f"no_{name}" for name, default in Config().to_flags().items() if isinstance(default, bool)}
    # The page about other trainers names their flags; tests/config/test_foreign.py looks at what it says of them.
    foreign = {name for trainer in TRAINERS.values() for name in trainer.flags} if text == PAGES["coming-from"] else ()
    declared = re.findall(r"^ +(\w+): \w+ = flag\(", text, flags=re.MULTILINE)  # by a page's own program
    for name in re.findall(r"`--(\w+)", text):
        assert name in {*flag_names(), *negated, *OTHER_FLAGS, *declared, *foreign, "config", "help"}, name


def test_the_defaults_in_the_table_of_flags_are_those_of_the_flags():
    defaults = Config().to_flags()
    for name, default in re.findall(r"^\| `--(\w+)` \|.*\| (\w[\w.]*) \|$", README, flags=re.MULTILINE):
        assert str(defaults[name]).removesuffix(".0") == default, name


@pytest.mark.parametrize("command", sorted({*re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE)}))
def test_the_makefile_has_the_commands(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(f"docs/{name}.md" for name in PAGES)]
)
def test_files_a_page_links_to_are_there(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).is_file(), target

"""Reruns the paper's experiment on one data set: trains by IET-AGC and plainly, audits both, prints its table.

SET is cifar10, cifar100, afhq_dog or laion10k. Without --run or --smoke the program prints what it would run, as
commands to paste, with the hours and the memory that they need on a card: counted, not measured.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import heldout
from counted import CARDS, GB, Cost, audit_cost, training_cost
from made_up import save_features, save_folders, save_table, shrunk
from paper_table import OURS, PLAIN, PLAIN_STEPS, SIMILARITY, print_table_of
from running import ROOT, as_flags

from iet_finetune import Config, UserError
from iet_finetune.audit.flags import check_extra
from iet_finetune.audit.report.record import read_audit
from iet_finetune.cli import main as iet_finetune
from iet_finetune.config.flags import nearest

Flags = Mapping[str, Any]
# What the steps call: as words of a process, and as a function of this one; both end with an exit code.
PROGRAMS: dict[str, tuple[list[str], Callable[[list[str]], int]]] = {
    "iet-finetune": ([sys.executable, "-m", "iet_finetune"], iet_finetune),
    "python benchmarks/heldout.py": ([sys.executable, str(ROOT / "benchmarks" / "heldout.py")], heldout.main),
}
# Model -> end of its recipe's name.
RECIPES = {OURS: "", PLAIN: "_plain", PLAIN_STEPS: "_plain_steps"}
SSCD = "sscd_disc_large.torchscript.pt"


@dataclass(frozen=True)
class Experiment:
    """One data set of the paper.

    Attributes:
        title: for people.
        recipe: of IET-AGC.
        images: how many there are to train on.
        drawing: flags of the audit that say what is drawn.
        memorization: the measures of the paper.
        test_split: the held-out images are this split of the data set;
        held_out_dir: or those of this folder;
        fraction: or else this fraction of the images, which training leaves out.
    """

    title: str
    recipe: str
    images: int
    drawing: Flags
    memorization: tuple[str, ...] = ("mq_0.3", "mq_0.4")
    test_split: str | None = None
    held_out_dir: str | None = None
    fraction: float = 0.0

    @property
    def by_similarity(self) -> bool:
        """Whether copies are found by SSCD."""
        return self.memorization == SIMILARITY


# 65,536 is the paper's number of images.
PIXELS = {"num_images": 65_536, "scheduler": "DDIMScheduler", "num_inference_steps": 100, "eval_batch_size": 256}
LATENTS = {"num_images": 10_000, "num_inference_steps": 50, "eval_batch_size": 16, "mixed_precision": "bf16"}
EXPERIMENTS = {
    "cifar10": Experiment("CIFAR-10", "cifar10", 50_000, PIXELS, test_split="test"),
    "cifar100": Experiment("CIFAR-100", "cifar100", 50_000, PIXELS, test_split="test"),
    "afhq_dog": Experiment("AFHQ-Dog", "afhq_dog", 4_739, PIXELS, held_out_dir="data/afhq/val/dog"),
    "laion10k": Experiment("LAION-10k", "laion10k_sd21", 10_000, LATENTS, SIMILARITY, fraction=0.1),
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: what it does.
        program: one of `PROGRAMS`.
        arguments: of the program.
        done: the file that it writes last.
        cost: counts what it needs; None where that is nothing to speak of.
    """

    title: str
    program: str
    arguments: tuple[str, ...]
    done: Path
    cost: Callable[[], Cost] | None = None

    @property
    def line(self) -> str:
        """The command as it is typed."""
        return f"{self.program} {shlex.join(self.arguments)}"

    def run(self, here: bool) -> int:
        """Runs it in this process or in one of its own; returns its exit code."""
        words, function = PROGRAMS[self.program]
        if here:
            return function(list(self.arguments))
        return subprocess.run([*words, *self.arguments], check=False).returncode


@dataclass(frozen=True)
class Changes:
    """Flags behind the commands' own ones, which win: none in earnest.

    Attributes:
        training: from the recipe's configuration.
        held_out, audit: for all models.
    """

    training: Callable[[Config], Flags] = lambda config: {}
    held_out: Flags = field(default_factory=dict)
    audit: Flags = field(default_factory=dict)


def tiny(experiment: Experiment, world: Path) -> Changes:
    """Changes that leave seconds of each command, and in the folder `world` the data and networks that they name."""
    config = recipe(experiment.recipe)
    side = shrunk(config, world / "shrunk")["resolution"]
    data, held_out = world / "images", world / "held-out"
    if config.data.dataset_name is not None:
        images = {"dataset_name": save_table(data, config, side)}
    else:
        save_folders(data, held_out if experiment.held_out_dir is not None else None, side)
        images = {"train_data_dir": data}
    features = [save_features(world / f"{name}.pt") for name in ("made_up", "sscd_made_up")]
    audit = {"num_images": 20, "num_inference_steps": 2, "membership_images": 8, "eval_batch_size": 10}
    audit |= {"mixed_precision": "no", "features": features if experiment.by_similarity else features[:1]}
    if experiment.held_out_dir is not None:
        audit |= {"holdout_data_dir": held_out}
    return Changes(
        lambda each: {**shrunk(each, world / Path(each.training.output_dir).name), **images},
        {**images, "cache_dir": world / "cache"},
        audit,
    )


def recipe(name: str) -> Config:
    """The configuration of a recipe."""
    return Config.from_command_line(["--config", name])


def models_of(experiment: Experiment, folder: Path, with_plain_steps: bool) -> dict[str, tuple[str, Path]]:
    """Of each model its recipe and its folder."""
    names = {model: experiment.recipe + end for model, end in RECIPES.items()}
    return {
        model: (name, folder / Path(recipe(name).training.output_dir).name)
        for model, name in names.items()
        if with_plain_steps or model != PLAIN_STEPS
    }


def steps_of(
    experiment: Experiment,
    models: Mapping[str, tuple[str, Path]],
    folder: Path,
    sscd: str,
    changes: Changes = Changes(),
) -> list[Step]:
    """Everything that leads to the table, in order."""
    steps = []
    held_out: dict[str, Any] = {}
    if experiment.test_split is not None:
        saved = folder / f"{experiment.recipe}-{experiment.test_split}"
        held_out = {"holdout_data_dir": saved}
        steps.append(_save_held_out(experiment, saved, changes.held_out))
    elif experiment.held_out_dir is not None:
        held_out = {"holdout_data_dir": experiment.held_out_dir}
    features = {"features": ["effnet_lite0", sscd]} if experiment.by_similarity else {}
    for model, (name, output) in models.items():
        config = recipe(name)
        training = {"output_dir": output, "resume_from_checkpoint": "latest"}
        training |= {"holdout_fraction": experiment.fraction} if experiment.fraction else {}
        auditing = {**held_out, **experiment.drawing, **features}
        steps += [
            Step(
                f"train: {model}",
                "iet-finetune",
                ("train", "--config", name, *as_flags({**training, **changes.training(config)})),
                output / "README.md",
                lambda config=config: training_cost(config, round(experiment.images * (1 - experiment.fraction))),
            ),
            Step(
                f"audit: {model}",
                "iet-finetune",
                ("audit", "--model", str(output), *as_flags({**auditing, **changes.audit})),
                audit_file(output).with_name("report.html"),
                lambda config=config: _drawing_cost(config, experiment.drawing),
            ),
        ]
    return steps


def _save_held_out(experiment: Experiment, folder: Path, changes: Flags) -> Step:
    data = recipe(experiment.recipe).data
    flags = {"dataset_name": data.dataset_name, "dataset_split": experiment.test_split}
    flags |= {"image_column": data.image_column, "output_dir": folder}
    flags |= {"class_column": data.class_column} if data.class_column is not None else {}
    arguments = tuple(as_flags({**flags, **changes}))
    return Step("save the held-out images", "python benchmarks/heldout.py", arguments, folder / heldout.LAST)


def _drawing_cost(config: Config, drawing: Flags) -> Cost:
    sizes = ("num_images", "num_inference_steps", "eval_batch_size")
    return audit_cost(config, **{name: drawing[name] for name in sizes})


def audit_file(output: Path) -> Path:
    """Where the audit of a model is."""
    return output / "audit" / "audit.json"


def print_plan(experiment: Experiment, steps: Sequence[Step], name: str) -> None:
    """Prints the commands; all else are comments, so that a shell can be given the whole."""
    card = CARDS[name]
    about = (
        f"The paper's experiment on {experiment.title}. Hours and memory are counted, not measured: the arithmetic of "
        f"the denoiser on one {name}, which is assumed to reach {card.reached:.0%} of the {card.bf16:g} TFLOP/s in "
        f"bf16 and {card.tf32:g} in TF32 (PyTorch's default for convolutions in fp32) of its data sheet. On the GPU: "
        "weights, gradients, AdamW's state, the moving average, and activations in fp32; on the host: idle clones. "
        "Not counted: the optimizer's steps, reading, encoding and decoding images, checkpoints, what an audit does "
        f"besides drawing, other parts of the pipeline, and libraries. Held-out images: {_held_out_words(experiment)}."
    )
    print(_comment(about))
    total = 0.0
    for number, step in enumerate(steps, 1):
        words = f"# {number}. {step.title}"
        if step.cost is not None:
            cost = step.cost()
            hours = card.hours(cost.flops, cost.half)
            total += hours
            words += f": {hours:.1f} hours, {cost.device / GB:.1f} GB of GPU memory"
            words += f", {cost.host / GB:.1f} GB of the host's" if cost.host else ""
            words += f" - MORE THAN THE {card.memory:g} GB OF THIS CARD" if cost.device / GB > card.memory else ""
        print(f"\n{words}\n{step.line}")
    ending = f"Together {total:.1f} hours. `--run` does it on a machine with a GPU and prints the table; `--smoke` "
    print(f"\n{_comment(ending + 'tries all of it in a minute on a CPU, with tiny networks and made-up images.')}")


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _held_out_words(experiment: Experiment) -> str:
    if experiment.test_split is not None:
        return f"the split `{experiment.test_split}`, saved to a folder, as an audit takes them only from one"
    if experiment.held_out_dir is not None:
        return f"the folder {experiment.held_out_dir}"
    return f"{experiment.fraction:.0%} of the images, which training leaves out, as there is no test split"


def print_results(experiment: Experiment, models: Mapping[str, tuple[str, Path]]) -> None:
    """Prints the paper's table from the models' audits.

    Raises:
        UserError: an audit cannot be read.
    """
    files = {model: audit_file(output) for model, (_, output) in models.items()}
    audits = {model: read_audit(file, str(file)) for model, file in files.items()}
    print_table_of(experiment.title, audits, experiment.memorization)


def run_steps(steps: Sequence[Step], here: bool) -> int:
    """Runs the steps that are not done; returns the exit code of the first that fails, or 0."""
    for step in steps:
        if step.done.is_file():
            print(f"# done before, {step.done} is there: {step.line}", flush=True)
            continue
        print(f"$ {step.line}", flush=True)
        if code := step.run(here):
            line = f"paper.py: stopped by exit code {code} of `{step.line}`; the same command goes on from there"
            print(line, file=sys.stderr)
            return code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`--help` lists the flags).")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: what is wrong.
    """
    parser = _Parser("paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", metavar="SET", help=", ".join(EXPERIMENTS))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", action="store_true", help="run the commands; repeated, go on where it was stopped")
    what.add_argument("--smoke", action="store_true", help="run all of it in a minute, on made-up images")
    parser.add_argument("--with_plain_steps", action="store_true", help="also train plainly for the steps of a clone")
    parser.add_argument("--card", help=f"GPU that hours are counted for: {', '.join(CARDS)} (default: H100 80 GB)")
    parser.add_argument("--sscd", metavar="FILE", help=f"of laion10k: TorchScript file of SSCD (default: {SSCD})")
    parser.add_argument("--dir", help="for models and audits (default: outputs; with --smoke one that is removed)")
    args = parser.parse_args(argv)
    if args.set not in EXPERIMENTS:
        given = "is missing" if args.set is None else f"`{args.set}` is unknown"
        hint = nearest(args.set or "", EXPERIMENTS)
        raise UserError(f"SET {given}: give one of {', '.join(EXPERIMENTS)}.{hint}")
    if args.card not in (None, *CARDS):
        hint = nearest(args.card, CARDS)
        raise UserError(f"`--card {args.card}` is unknown: give one of {', '.join(CARDS)}.{hint}")
    if args.card is not None and (args.run or args.smoke):
        raise UserError("`--card` does nothing where commands are run: leave it out.")
    if args.sscd is not None and (args.smoke or not EXPERIMENTS[args.set].by_similarity):
        raise UserError("`--sscd` is for laion10k without `--smoke` only: leave it out.")
    return args


def check_run(experiment: Experiment, sscd: str) -> None:
    """Raises a `UserError` for what would end a run after hours and can be seen now."""
    import torch

    check_extra()
    if experiment.by_similarity and not Path(sscd).is_file():
        raise UserError(f"`--sscd {sscd}` is no file: download one of SSCD's TorchScript files, and give its path.")
    if experiment.held_out_dir is not None and not Path(experiment.held_out_dir).is_dir():
        raise UserError(f"`{experiment.held_out_dir}` is no folder: put the held-out images of the data set there.")
    if not torch.cuda.is_available():
        raise UserError("`--run` needs a GPU: leave it out for the plan, or try `--smoke`.")


def smoke(experiment: Experiment, folder: Path, with_plain_steps: bool) -> int:
    """Runs everything in small; returns the exit code."""
    models = models_of(experiment, folder, with_plain_steps)
    steps = steps_of(experiment, models, folder, SSCD, tiny(experiment, folder / "made-up"))
    code = run_steps(steps, here=True)
    if not code:
        print_results(experiment, models)
        print("These numbers mean nothing: tiny networks, two steps of training, images of noise.")
    return code


def main(argv: list[str]) -> int:
    """Print the plan, or run it and print the table; returns the exit code, 2 after an error of the user."""
    try:
        args = parse(argv)
        experiment, sscd = EXPERIMENTS[args.set], args.sscd or SSCD
        if args.smoke and args.dir is None:
            with tempfile.TemporaryDirectory(prefix="iet_finetune-paper-") as folder:
                return smoke(experiment, Path(folder), args.with_plain_steps)
        folder = Path(args.dir or "outputs")
        if args.smoke:
            return smoke(experiment, folder, args.with_plain_steps)
        models = models_of(experiment, folder, args.with_plain_steps)
        steps = steps_of(experiment, models, folder, sscd)
        if not args.run:
            print_plan(experiment, steps, args.card or "H100 80 GB")
            return 0
        check_run(experiment, sscd)
        code = run_steps(steps, here=False)
        if not code:
            print_results(experiment, models)
        return code
    except UserError as error:
        print(f"paper.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The model card: what was trained, on what, how, how to load it, and what was not measured."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed in __all__

from ..config.settings import DEFAULT_MERGE_EPOCHS
from ..files import LORA_NAME, written_beside
from .audit_section import HEADING, audit_section, results

CARD_NAME = "README.md"
AUDIT_NAME, AUDIT_FORMAT = "audit/audit.json", "iet_finetune.audit"
GRID_TITLE = "Sample grid"
LIMITS = "## Limits"
# The card is written before the repository's id is known; the push puts the id in this name's place.
THIS_REPOSITORY = '"this-repository"'
PAPER = "[arXiv 2407.15328](https://arxiv.org/abs/2407.15328)"
MERGES = {
    "exact": "the mean of their updates",
    "average": "the mean of each matrix (FedIT)",
    "freeze_a": "the mean of B, with A frozen (FFA-LoRA)",
}
UNCONDITIONAL = ("DDPM", "DDIM", "PNDM", "KarrasVe", "ScoreSdeVe", "LDM")


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about a run; each value is measured or given, none is made up."""

    base_model: str | None  # `--pretrained_model_name_or_path` as given; None: trained from scratch
    base_license: str | None  # what `base_license` found; None: not known
    pipeline_class: str  # such as "StableDiffusionPipeline"
    flags: dict[str, Any]  # `Config.to_flags()`
    num_images: int  # images trained on, held-out ones not among them
    num_distinct_images: int  # those of them with different contents
    num_heldout: int  # images kept out of training
    rounds: int  # merges done
    steps: int  # steps of all clones together
    skip_rates: tuple[float, ...]  # fraction of samples skipped, by round
    sample_grid: str | None  # picture, relative to the output folder
    versions: dict[str, str]  # package: version
    lora_export: str | None = None  # what became of the adapter, in words; None: the whole denoiser was trained
    class_names: tuple[str, ...] | None = None  # of the classes by number; None: the model takes no classes
    absent: tuple[str, ...] = ()  # components that the pipeline does without, and that loading must be told are None


def base_license(source_folder: Path) -> str | None:
    """The licence named in the header of `source_folder/README.md`; None when there is not exactly one.

    `source_folder` holds the base pipeline's `model_index.json`. Nothing is guessed: no file, no readable header, no
    `license` in it, a list of several, or "unknown" all give None.
    """
    path = Path(source_folder) / CARD_NAME
    if not path.is_file():
        return None
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) and found not in ("", "unknown") else None


def is_hub_id(name: str | None) -> bool:
    """Whether `name` reads as `owner/name` on the Hub and is not a path that exists here."""
    return name is not None and name.count("/") == 1 and not Path(name).exists() and name_fault(name) is None


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as the name of a repository on the Hub, in the client's words; None if nothing is."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def write_model_card(output_dir: Path, facts: CardFacts) -> Path:
    """Write `output_dir/README.md`, replacing the one that is there, and return its path.

    Whether the pipeline is a LoRA file and whether an audit was made is read from `output_dir`. A base pipeline or a
    data set that is not a Hub id is not named: a local path never reaches the card.

    Raises:
        ValueError: `facts.sample_grid` is not a file inside `output_dir`.
    """
    output_dir = Path(output_dir)
    if facts.sample_grid is not None and not (output_dir / facts.sample_grid).is_file():
        raise ValueError(f"sample_grid {facts.sample_grid!r} is not a file in {output_dir}")
    is_lora = (output_dir / LORA_NAME).is_file()
    sections = [
        _introduction(facts),
        _loading(facts, is_lora),
        _samples(facts),
        _recipe(facts),
        _data(facts),
        _skipping(facts),
        _limits(audited=(output_dir / AUDIT_NAME).is_file()),
        _license(facts),
        _versions(facts),
    ]
    text = f"---\n{_metadata(facts, is_lora).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    path = output_dir / CARD_NAME
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
    show_audit(output_dir)
    return path


def show_audit(output_dir: Path) -> None:
    """Puts what `audit/audit.json` says, if it is there, into the card that is there, in the place of what it said.

    Nothing else of the card is changed.
    """
    path, file = output_dir / CARD_NAME, output_dir / AUDIT_NAME
    if not path.is_file() or not file.is_file():
        return
    audit = json.loads(file.read_text(encoding="utf-8"))
    if audit.get("format") != AUDIT_FORMAT:
        return
    card = ModelCard.load(path)
    data, datasets = card.data, card.data.get("datasets")
    data.model_name = output_dir.resolve().name
    data.eval_results = results(audit, data.get("pipeline_tag"), datasets[0] if datasets else None)
    sections = [part for part in re.split(r"^(?=## )", card.text, flags=re.MULTILINE) if not part.startswith(HEADING)]
    limits = next((i for i, part in enumerate(sections) if part.startswith(LIMITS)), len(sections))
    sections[limits : limits + 1] = [f"{audit_section(audit)}\n\n", f"{_limits(audited=True)}\n\n"]
    text = f"---\n{data.to_yaml()}\n---\n\n{''.join(sections).strip()}\n"
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _metadata(facts: CardFacts, is_lora: bool) -> ModelCardData:
    task = _task(facts)
    tags = [task, "diffusers", "iet-agc", "memorization"]
    if facts.pipeline_class.startswith("StableDiffusion"):
        tags.append("stable-diffusion")
    if is_lora:
        tags.append("lora")
    dataset = facts.flags.get("dataset_name")
    return ModelCardData(
        base_model=facts.base_model if is_hub_id(facts.base_model) else None,
        datasets=[str(dataset)] if is_hub_id(dataset) else None,
        library_name="diffusers",
        license=facts.base_license,
        pipeline_tag=task,
        tags=[tag for tag in tags if tag is not None],
    )


def _task(facts: CardFacts) -> str | None:
    if facts.pipeline_class.startswith("DiT") or facts.class_names is not None:
        return None  # class labels go in, and the Hub has no name for that task
    return "unconditional-image-generation" if facts.pipeline_class.startswith(UNCONDITIONAL) else "text-to-image"


def _introduction(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    source = base if is_hub_id(facts.base_model) else "a local pipeline"
    began = "Trained from scratch" if facts.base_model is None else f"Fine-tuned from {source}"
    shards, threshold = facts.flags["num_shards"], facts.flags["agc_threshold"]
    trained = "LoRA adapter" if facts.flags["use_lora"] else "denoiser"
    ensemble = (
        f"The data was split into {shards} shards; in each round every shard trained its own clone of the {trained}, "
        f"and the clones were averaged into the {trained} of the next round."
        if shards > 1
        else "The data was not split (one shard), so no clones were averaged."
    )
    control = (
        f"A sample whose loss was below {threshold:g} of the moving average for its timestep was skipped."
        if threshold > 0
        else "Anti-gradient control was off: no sample was skipped."
    )
    return (
        f"# {facts.pipeline_class} {'trained' if facts.base_model is None else 'fine-tuned'} with IET-AGC\n\n"
        f"{began} with IET-AGC (iterative ensemble training with anti-gradient control, {PAPER}), "
        f"meant to keep a diffusion model from memorizing single training images. {ensemble} {control}"
    )


def _loading(facts: CardFacts, is_lora: bool) -> str:
    base = json.dumps(facts.base_model) if is_hub_id(facts.base_model) else '"the-base-pipeline"'
    lines = ["from diffusers import DiffusionPipeline", ""]
    without = "".join(f", {name}=None" for name in facts.absent)
    if facts.class_names is not None:
        lines = ["from iet_finetune import ClassConditionalPipeline", ""]
        lines.append(f"pipeline = ClassConditionalPipeline.from_pretrained({THIS_REPOSITORY})")
        lines.append("image = pipeline(class_labels=[0]).images[0]")
    elif is_lora:
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({base}{without})")
        lines.append(f"pipeline.load_lora_weights({THIS_REPOSITORY})")
    else:
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({THIS_REPOSITORY}{without})")
    if _task(facts) == "text-to-image":
        prompts = facts.flags.get("validation_prompts") or ["a photo"]
        lines.append(f"image = pipeline({json.dumps(prompts[0], ensure_ascii=False)}).images[0]")
    elif _task(facts) is not None:
        lines.append("image = pipeline().images[0]")
    return "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```" + _classes(facts)


def _classes(facts: CardFacts) -> str:
    names = facts.class_names or ()
    if all(name == str(number) for number, name in enumerate(names)):
        return f"\n\nClasses: 0 to {len(names) - 1}." if names else ""
    told = ", ".join(f"{number} {' '.join(name.split())}" for number, name in enumerate(names))
    return f"\n\nClasses: {told}."


def _samples(facts: CardFacts) -> str:
    if facts.sample_grid is None:
        return ""
    prompts = "\n".join(
        f"- `` {' '.join(prompt.split())} ``" for prompt in facts.flags.get("validation_prompts") or []
    )
    return f"## Samples\n\n![{GRID_TITLE}]({quote(facts.sample_grid)})\n\n{prompts}".rstrip()


def _recipe(facts: CardFacts) -> str:
    return "## Recipe\n\n" + _table(("setting", "value"), _recipe_rows(facts))


def _recipe_rows(facts: CardFacts) -> list[tuple[str, object]]:
    flags = facts.flags
    merge_steps, threshold = flags["merge_every_steps"], flags["agc_threshold"]
    passes = flags["merge_every_epochs"] or DEFAULT_MERGE_EPOCHS
    batch, accumulation = flags["train_batch_size"], flags["gradient_accumulation_steps"]
    # diffusers' plain "constant" has no warm-up, whatever the flag says.
    warm_up = "" if flags["lr_scheduler"] == "constant" else f", {flags['lr_warmup_steps']} warm-up steps"
    rows: list[tuple[str, object]] = [
        ("shards (K)", f"{flags['num_shards']} ({flags['shard_strategy']})"),
        ("local training between merges", f"{merge_steps} steps" if merge_steps else f"{passes} passes"),
        ("merges", facts.rounds),
        *_adapter_rows(facts),
        ("weight of a clone in the merge", flags["merge_weighting"]),
        ("optimizer moments at a merge", flags["optimizer_across_rounds"]),
        ("AGC threshold", f"{threshold:g}" if threshold else "0 (off)"),
        ("AGC decay (d)", f"{flags['agc_decay']:g}"),
        ("steps of all clones together", facts.steps),
        ("learning rate", f"{flags['learning_rate']:g}" + (f" x {batch * accumulation}" if flags["scale_lr"] else "")),
        ("learning rate schedule", flags["lr_scheduler"] + warm_up),
        ("AdamW", f"beta {flags['adam_beta1']:g} and {flags['adam_beta2']:g}, decay {flags['adam_weight_decay']:g}"),
        ("images in a clone's step", f"{batch} x {accumulation} = {batch * accumulation}"),
        ("moving average of the weights", f"up to {flags['ema_max_decay']:g}" if flags["use_ema"] else "no"),
        ("mixed precision", flags["mixed_precision"] or "Accelerate's setting"),
        ("resolution", flags["resolution"]),
        ("mirrored at random", "yes" if flags["random_flip"] else "no"),
        ("captions dropped", f"{flags['caption_dropout']:g}"),
        ("min-SNR gamma", "off" if flags["snr_gamma"] is None else f"{flags['snr_gamma']:g}"),
        ("noise offset", f"{flags['noise_offset']:g}"),
        ("seed", flags["seed"]),
    ]
    return rows


def _adapter_rows(facts: CardFacts) -> list[tuple[str, object]]:
    flags = facts.flags
    if not flags["use_lora"]:
        return []
    alpha = flags["rank"] if flags["lora_alpha"] is None else flags["lora_alpha"]
    scaling = ", scaled as in rsLoRA" if flags["use_rslora"] else ""
    return [
        ("LoRA", f"rank {flags['rank']}, alpha {alpha}{scaling}, dropout {flags['lora_dropout']:g}"),
        ("layers with an adapter", flags["lora_layers"] or "attention projections"),
        ("merge of adapters", MERGES[flags["lora_merge"]]),
        ("saved as", facts.lora_export),
    ]


def _data(facts: CardFacts) -> str:
    dataset = facts.flags.get("dataset_name")
    source = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if is_hub_id(dataset) else "a local data set"
    return (
        f"## Data\n\nTrained on {facts.num_images} images ({facts.num_distinct_images} distinct) from {source}. "
        f"{facts.num_heldout} images were held out of training."
    )


def _skipping(facts: CardFacts) -> str:
    if facts.flags["agc_threshold"] == 0 or not facts.skip_rates:
        return ""
    rows = [(number, f"{100 * rate:.2f} %") for number, rate in enumerate(facts.skip_rates, start=1)]
    return "## Samples skipped by anti-gradient control\n\n" + _table(("round", "skipped"), rows)


def _limits(audited: bool) -> str:
    measured = (
        f"What was measured of this pipeline's memorization is in [{AUDIT_NAME}]({AUDIT_NAME}); anything else was not."
        if audited
        else "Memorization of this pipeline: not measured."
    )
    return (
        f"{LIMITS}\n\n"
        f"{measured} Less measured extraction is no guarantee that a training image cannot be extracted: only "
        "differential privacy gives one, and this training is not differentially private. What the base model "
        "gets wrong, this one may get wrong too."
    )


def _license(facts: CardFacts) -> str:
    if facts.base_model is None:
        said = "This card sets none: the weights began at random, and whoever trained them may choose one."
    elif facts.base_license is None:
        said = (
            "The base model's licence could not be read, so this card sets none. Look it up before you use or share "
            "the weights."
        )
    else:
        said = f"That of the base model: {facts.base_license}."
    return f"## License\n\n{said}"


def _versions(facts: CardFacts) -> str:
    return "## Versions\n\n" + ", ".join(f"{package} {version}" for package, version in facts.versions.items())


def _table(header: tuple[str, str], rows: list[tuple[Any, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {left} | {right} |" for left, right in rows])

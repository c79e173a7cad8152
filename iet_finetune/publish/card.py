"""The model card: what was trained, on what, how, how to load it, and what was not measured."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not listed in __all__
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..audit.report.record import FORMAT as AUDIT_FORMAT
from ..audit.report.record import AuditRecord
from ..config.registry import REGISTRIES
from ..config.settings import DEFAULT_MERGE_EPOCHS
from ..errors import UserError, one_line, warn
from ..files import LORA_NAME, written_beside
from .audit_section import audit_section, results
from .upload_list import AUDIT_NAME, CARD_NAME, GRID_TITLE, public_flags

# What the card says, without paths and secrets, and a digest of the card that was written from it; never uploaded.
FACTS_NAME = "card.json"
# The card is written before the repository's id is known; the push puts the id in this name's place.
THIS_REPOSITORY = '"this-repository"'
# Of diffusers: loads the text-to-image pipeline with the models of one that draws from a picture.
TEXT_LOADER = "AutoPipelineForText2Image"
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
    sample_grid: str | None  # image, relative to the output folder
    versions: dict[str, str]  # package: version
    lora_export: str | None = None  # what became of the adapter, in words; None: the whole denoiser was trained
    class_names: tuple[str, ...] | None = None  # of the classes by number; None: the model takes no classes
    num_left_out: int = 0  # copies of those trained on
    absent: tuple[str, ...] = ()  # components that the pipeline does without, and that loading must be given as None
    init_lora_rank: int | None = None  # of the LoRA file that the adapter began from; None: an update of 0
    num_class_images: int = 0  # trained beside them for prior preservation
    num_class_images_drawn: int = 0  # those of them that the base model drew
    saved_as: str | None = None  # the class of the saved pipeline, where that draws from a picture


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
    """Write `output_dir/README.md` and the facts it is made from, and return its path; a card that was edited stays.

    Whether the pipeline is a LoRA file and whether an audit was made is read from `output_dir`. A base pipeline or a
    data set that is not a Hub id is not named: a local path never reaches the card.

    Raises:
        ValueError: `facts.sample_grid` is not a file inside `output_dir`.
        UserError: the facts of an earlier card are damaged.
    """
    output_dir = Path(output_dir)
    if facts.sample_grid is not None and not (output_dir / facts.sample_grid).is_file():
        raise ValueError(f"sample_grid {facts.sample_grid!r} is not a file in {output_dir}")
    _write(output_dir, _public(facts, is_lora=(output_dir / LORA_NAME).is_file()))
    return output_dir / CARD_NAME


def show_audit(output_dir: Path) -> None:
    """Write the card anew from the facts stored beside it, with what `audit/audit.json` says if there is one.

    Raises:
        UserError: the stored facts are damaged.
    """
    if stored := _stored(output_dir):
        _write(output_dir, stored["facts"])
    elif (output_dir / CARD_NAME).is_file():
        warn(f"`{output_dir / CARD_NAME}` is left as it is: {FACTS_NAME}, from which it was written, is missing.")


def _stored(output_dir: Path) -> dict[str, Any]:
    """The content of `card.json`; empty if it is not there."""
    file = output_dir / FACTS_NAME
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {"facts": dict(stored["facts"]), "written": str(stored["written"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"`{file}` is damaged: {one_line(error)}. Remove it, and resume the run to write it."
        ) from None


def _write(output_dir: Path, facts: dict[str, Any]) -> None:
    path, written = output_dir / CARD_NAME, _stored(output_dir).get("written")
    text = _render(output_dir, facts)
    # After a kill between the two files the card may be the new one already.
    edited = path.is_file() and _digest(path.read_text(encoding="utf-8")) not in (written, _digest(text))
    if edited:
        warn(f"`{path}` was edited and is left as it is: remove it, and resume or audit, to have it written anew.")
    else:
        with written_beside(path) as partial:
            partial.write_text(text, encoding="utf-8")
    record = {"facts": facts, "written": written if edited else _digest(text)}
    with written_beside(output_dir / FACTS_NAME) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _public(facts: CardFacts, is_lora: bool) -> dict[str, Any]:
    """The facts in JSON's types: without flags that are not public, and names only where they are Hub ids."""
    base, dataset = (name if is_hub_id(name) else None for name in (facts.base_model, facts.flags.get("dataset_name")))
    flags = public_flags(facts.flags, [base, dataset])
    changed = {"base_model": base, "dataset": dataset, "flags": flags, "rules": _rules(flags)}
    return asdict(facts) | changed | {"from_scratch": facts.base_model is None, "is_lora": is_lora}


def _rules(flags: dict[str, Any]) -> dict[str, Any]:
    """The chosen rules from outside the package by kind, and their flags by name."""
    rules: dict[str, Any] = {}
    for registry in REGISTRIES:
        entry = registry.entries.get(flags.get(registry.flag, ""))
        if entry is not None and not isinstance(entry.rule, str):
            own = fields(entry.config) if entry.config is not None else ()
            rules |= {registry.kind: entry.name} | {each.name: flags[each.name] for each in own if each.name in flags}
    return rules


def _render(output_dir: Path, facts: dict[str, Any]) -> str:
    audit = _audit(output_dir / AUDIT_NAME)
    names = facts["class_names"] or ()
    return _template().render(
        facts=facts,
        metadata=_metadata(output_dir, facts, audit).to_yaml(),
        task=_task(facts),
        repository=THIS_REPOSITORY,
        without="".join(f", {name}=None" for name in facts["absent"]),
        loader="DiffusionPipeline" if facts.get("saved_as") is None else TEXT_LOADER,
        numbered=all(name == str(number) for number, name in enumerate(names)),
        grid_title=GRID_TITLE,
        default_merge_epochs=DEFAULT_MERGE_EPOCHS,
        merges=MERGES,
        audit=audit_section(audit) if audit is not None else None,
        audited=AUDIT_NAME if (output_dir / AUDIT_NAME).is_file() else None,
    )


@cache
def _template() -> Template:
    # Not escaped: it is Markdown.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)
    return environment.get_template("card.md.jinja")


def _audit(file: Path) -> AuditRecord | None:
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return AuditRecord.from_json(values, f"`{file}`") if values.get("format") == AUDIT_FORMAT else None


def _metadata(output_dir: Path, facts: dict[str, Any], audit: AuditRecord | None) -> ModelCardData:
    task, dataset = _task(facts), facts["dataset"]
    tags = [task, "diffusers", "iet-agc", "memorization"]
    if facts["pipeline_class"].startswith("StableDiffusion"):
        tags.append("stable-diffusion")
    if facts["is_lora"]:
        tags.append("lora")
    return ModelCardData(
        base_model=facts["base_model"],
        datasets=[dataset] if dataset else None,
        eval_results=results(audit, task, dataset) if audit is not None else None,
        library_name="diffusers",
        license=facts["base_license"],
        model_name=output_dir.resolve().name if audit is not None else None,
        pipeline_tag=task,
        tags=[tag for tag in tags if tag is not None],
    )


def _task(facts: dict[str, Any]) -> str | None:
    if facts["pipeline_class"].startswith("DiT") or facts["class_names"] is not None:
        return None  # class labels go in, and the Hub has no name for that task
    return "unconditional-image-generation" if facts["pipeline_class"].startswith(UNCONDITIONAL) else "text-to-image"

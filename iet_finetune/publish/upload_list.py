"""The allow-list of a push: which files of a finished run may leave the machine, and what is taken out of them."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard

from ..config.config import all_flags
from ..config.flags import FlagSpec
from ..errors import UserError, one_line
from ..files import LORA_NAME
from ..pages.page import LOCAL_BEGINS, LOCAL_ENDS

Files = dict[str, Path | bytes]

CARD_NAME = "README.md"
GRID_TITLE = "Sample grid"
INDEX_NAME = "model_index.json"
CONFIG_NAME = "training_config.yaml"
AUDIT_NAME, REPORT_NAME = "audit/audit.json", "audit/report.html"
OWN_FILES = (INDEX_NAME, LORA_NAME, CARD_NAME, CONFIG_NAME, AUDIT_NAME, REPORT_NAME)
COMPONENT_SUFFIXES = (".json", ".safetensors")
TOKENIZER_FILES = ("merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "chat_template.jinja")
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
# diffusers and transformers note in a configuration where it was loaded from: a folder of this machine.
ORIGIN_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
LOCAL_PATH = re.compile(r"(file://|~/|/[^/\s]+/|[A-Za-z]:[\\/]|\\\\)")


def upload_list(output_dir: Path, audit_images: bool = False) -> Files:
    """Everything that may be uploaded: path in the repository to local file, or to bytes where the copy differs.

    The folders of the components that `model_index.json` names (configurations, tokenizer files, safetensors), that
    file itself, a LoRA file, the model card with the sample grid it shows, the training configuration and
    `audit/audit.json`. Configurations lose what names a folder of this machine; the local files stay as they are.

    Args:
        audit_images: whether the audit's report, which shows training images, goes too.

    Raises:
        UserError: no finished pipeline, a component that is missing or has its weights in pickles only, no card, or
            a file that cannot be read.
    """
    files: Files = {}
    if (output_dir / INDEX_NAME).is_file():
        for component in component_names(_read_json(output_dir / INDEX_NAME)):
            files |= _component_files(output_dir, component)
        files[INDEX_NAME] = _public_json(output_dir / INDEX_NAME)
    if (output_dir / LORA_NAME).is_file():
        files[LORA_NAME] = output_dir / LORA_NAME
    if not files:
        raise UserError(f"`{output_dir}` holds no finished pipeline: neither {INDEX_NAME} nor {LORA_NAME} is in it.")
    card = _read_card(output_dir)
    files |= {CARD_NAME: str(card).encode(), **_grid(output_dir, card)}
    if (output_dir / CONFIG_NAME).is_file():
        files[CONFIG_NAME] = _public_config(output_dir / CONFIG_NAME, card)
    if (output_dir / AUDIT_NAME).is_file():
        files[AUDIT_NAME] = _public_json(output_dir / AUDIT_NAME)
    if audit_images:
        files[REPORT_NAME] = _public_report(output_dir / REPORT_NAME)
    return files


def component_names(index: Any) -> list[str]:
    """The folders that the contents of a `model_index.json` name, in its order."""
    entries = index.items() if isinstance(index, dict) else ()
    # A component is `[library, class]`; one that the pipeline does without is `[null, null]`.
    named = (name for name, value in entries if isinstance(value, list) and len(value) == 2 and value[1] is not None)
    return [name for name in named if re.fullmatch(r"[A-Za-z]\w*", name)]


def _component_files(output_dir: Path, component: str) -> Files:
    folder = output_dir / component
    present = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    allowed = [path for path in present if path.suffix in COMPONENT_SUFFIXES or path.name in TOKENIZER_FILES]
    suffixes = {path.suffix for path in present}
    if ".safetensors" not in suffixes and suffixes & PICKLE_SUFFIXES:
        raise UserError(f"`{folder}` has its weights only as pickles, which are not uploaded: save safetensors.")
    if not allowed:
        raise UserError(f"`{output_dir}` is not complete: {INDEX_NAME} names {component}, but its files are missing.")
    return {
        f"{component}/{path.name}": _public_json(path) if path.name.endswith("config.json") else path
        for path in allowed
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be read: {one_line(error)}.") from None


def _public_json(path: Path) -> bytes:
    values = _read_json(path)
    public = _without_paths(values)
    if public == values:
        return path.read_bytes()
    return (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _public_report(path: Path) -> bytes:
    """The report without what names folders of this machine."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"`--push_audit_images`: `{path}` cannot be read: {one_line(error)}. Audit first.") from None
    return re.sub(f"{LOCAL_BEGINS}.*?{LOCAL_ENDS}", "", text, flags=re.DOTALL).encode()


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if k not in ORIGIN_KEYS and not _is_path(v)}
    return [_without_paths(item) for item in value if not _is_path(item)] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and LOCAL_PATH.match(value) is not None


def _read_card(output_dir: Path) -> ModelCard:
    path = output_dir / CARD_NAME
    if not path.is_file():
        raise UserError(f"`{path}` is missing: a pipeline is not published without its model card.")
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"`{path}` is not a model card: {one_line(error)}.") from None


def _grid(output_dir: Path, card: ModelCard) -> Files:
    shown = re.search(rf"^!\[{GRID_TITLE}\]\((.+?)\)$", card.text, flags=re.MULTILINE)
    if shown is None:
        return {}
    path = (output_dir / unquote(shown[1])).resolve()
    if not path.is_file() or not path.is_relative_to(output_dir.resolve()):
        raise UserError(f"`{output_dir / CARD_NAME}` shows `{shown[1]}`, which is not a file in that folder.")
    return {path.relative_to(output_dir.resolve()).as_posix(): path}


def _public_config(path: Path, card: ModelCard) -> bytes:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"`{path}` cannot be read: {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"`{path}` must hold `key: value` lines, not a {type(values).__name__}.")
    # The card was written where a relative folder could be distinguished from a Hub id, so what it names is public.
    public = [*_listed(card.data.get("base_model")), *_listed(card.data.get("datasets"))]
    return yaml.safe_dump(public_flags(values, public), sort_keys=False, allow_unicode=True).encode()


def public_flags(values: Mapping[str, Any], public: Collection[Any]) -> dict[str, Any]:
    """The flags among `values`, in the order of `--help-all`, that may leave this machine.

    Args:
        public: ids on the Hub; a base pipeline or dataset that is not among them is a folder, and left out.
    """

    def is_public(spec: FlagSpec, value: Any) -> bool:
        named = spec.scope == "named" and value in (None, *spec.known, *public)
        return (spec.scope == "public" or named) and not _is_path(value)

    specs = all_flags()
    return {name: values[name] for name, spec in specs.items() if name in values and is_public(spec, values[name])}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

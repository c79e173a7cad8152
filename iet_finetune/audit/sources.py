"""The pipelines and images of an audit: found and listed before any weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from datasets import Dataset

from ..config.config import Config
from ..data.dataset import TrainingImages, load_folder, load_table
from ..data.files import find_files, has_captions
from ..errors import UserError
from ..families.single_file import is_file
from .inputs.dataset import load_real_images
from .inputs.ledger import LedgerCounts, check_split, read_ledger
from .inputs.pipelines import LoraReader, SubjectSource, find_subject
from .request import AuditRequest


@dataclass(frozen=True)
class AuditSources:
    """What an audit measures, and with what it is compared.

    Attributes:
        model, reference: the audited pipeline and the one that calibrates membership inference, not yet loaded.
        training, heldout: as load_real_images returns them, without held-out images that the ledger knows.
        generated: the images to audit; None draws them.
        ledger: empty if the model was not trained here.
        warnings: what the reader of the report should know.
    """

    model: SubjectSource | None
    reference: SubjectSource | None
    training: TrainingImages
    heldout: TrainingImages
    generated: TrainingImages | None
    ledger: LedgerCounts
    warnings: tuple[str, ...]


def find_sources(
    request: AuditRequest,
    model: SubjectSource | None = None,
    reference: SubjectSource | None = None,
    tables: Mapping[str, Dataset] | None = None,
    read_lora: LoraReader | None = None,
) -> AuditSources:
    """Finds what the request names; names first, then images.

    Args:
        model, reference: pipelines that are loaded already, instead of those of the request.
        tables: by the name of the flag, images in memory instead of those that it names.
        read_lora: reads LoRA files that diffusers does not; None leaves all to diffusers.

    Raises:
        UserError: something is missing or wrong; says how to fix it.
    """
    config, tables = request.config, tables or {}
    generated = tables.get("generated_dir", config.audit.generated_dir)
    _check_base_config(request)
    if model is None and request.model is not None:
        model = find_subject(config, request.model, "model", read_lora)
    if model is None and generated is None:
        raise UserError("nothing to judge: give `--model DIR_OR_HUB_ID`, or `--generated_dir FOLDER`.")
    reference = reference or _find_reference(request)
    needs_captions = config.audit.clip_model is not None or (model is not None and model.needs_captions)
    training, heldout = load_real_images(config, needs_captions, tables)
    ledger = read_ledger(request.ledger)
    heldout, warnings = check_split(training, heldout, ledger)
    holds_out = config.data.holdout_fraction and config.audit.holdout_data_dir is None and not request.split_is_known
    if holds_out and not ledger and "holdout_data_dir" not in tables:
        warnings = (_doubt(config.data.holdout_fraction), *warnings)
    images = None if generated is None else _generated(generated, config)
    return AuditSources(model, reference, training, heldout, images, ledger, warnings)


def _check_base_config(request: AuditRequest) -> None:
    given = request.config.model.base_config
    loaded = [request.config.model, *([request.reference] if request.reference is not None else [])]
    names = [request.model, *(model.pretrained_model_name_or_path for model in loaded)]
    if given is not None and not any(name is not None and is_file(name) for name in names):
        raise UserError(f"`--base_config {given}` is for a checkpoint file, and none is given: leave it out.")


def _doubt(fraction: float) -> str:
    return (
        f"the held-out images are {fraction:g} of the data, and there is no record that the model was trained without "
        "them: if it was not, all that is compared with them says too little."
    )


def _find_reference(request: AuditRequest) -> SubjectSource | None:
    if request.reference is None or request.model is None:
        return None
    config = replace(request.config, model=request.reference)
    try:
        return find_subject(config, str(request.reference.pretrained_model_name_or_path), "reference_model")
    except UserError:
        if request.reference_is_asked:
            raise
        return None


def _generated(images: str | Dataset, config: Config) -> TrainingImages:
    """The given images, with their prompts if there are captions."""
    data = replace(config.data, class_column=None)
    if isinstance(images, Dataset):
        return load_table("generated_images", images, data, captions=data.caption_column in images.column_names)
    captions = has_captions(find_files(images))
    return load_folder("generated_dir", images, data, captions=captions, cache_dir=config.model.cache_dir)

"""A checkpoint in one file, in the layout of its original code, which diffusers' `from_single_file` reads."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from torch import nn

from ..config.settings import ModelConfig
from ..errors import UserError, one_line
from .inputs import check_inputs
from .stored import FLOATS, Header, Stored, read_header, stored_of

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# What `from_single_file` fetches of a repository: configurations and vocabularies.
_CONFIGURATION = ("*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model")
# How the names of a component's tensors begin, and whether diffusers takes each tensor as it is, mapped from the file.
# Elsewhere it cuts some in pieces, joins them or puts them into fp32, which copies them.
_PARTS = (
    ("model.diffusion_model.joint_blocks.", "denoiser", False),
    ("model.diffusion_model.double_blocks.", "denoiser", False),
    ("model.diffusion_model.single_blocks.", "denoiser", False),
    ("model.diffusion_model.", "denoiser", True),
    ("first_stage_model.", "vae", True),
    ("vae.", "vae", True),
    ("cond_stage_model.transformer.", "text_encoder", True),
    ("cond_stage_model.model.", "text_encoder", False),
    ("conditioner.embedders.0.", "text_encoder", True),
    ("conditioner.embedders.1.", "text_encoder_2", False),
    ("text_encoders.clip_l.", "text_encoder", True),
    ("text_encoders.clip_g.", "text_encoder_2", True),
    ("text_encoders.t5xxl.", "t5", False),
)
# Of files of SD 3 and Flux that hold the transformer alone, a tensor that each has: there names begin with nothing.
_BARE = ("joint_blocks.0.context_block.adaLN_modulation.1.bias", "double_blocks.0.img_attn.norm.key_norm.scale")
_FIRST_LAYER, _VAE_LAYER = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"
# Others have 1.
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
# Marks of numbers that mean something only together with others in the file.
_SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax", ".quant_state")


def is_file(name: str) -> bool:
    """Whether a base's name is that of a checkpoint file rather than of a folder or repository."""
    # Unlike pathlib's, these return False for a name that is too long for the system.
    return os.path.isfile(name) or (Path(name).suffix in (SUFFIX, ".ckpt") and not os.path.isdir(name))


def read_checkpoint(model: ModelConfig) -> Header:
    """Returns the names, precisions and shapes of the tensors in the file that `model` names; reads none of them.

    Raises:
        UserError: no such file, a pickle, a damaged file, or no text-to-image model in its original layout.
    """
    name = str(model.pretrained_model_name_or_path)
    path, it = Path(name), flag(model)
    if path.suffix in PICKLES:
        raise UserError(f"{it} is a pickle, which can run code when it is read: get the model as a {SUFFIX} file.")
    if path.suffix != SUFFIX:
        raise UserError(f"{it} is no {SUFFIX} file: give one, or the folder or Hub id of a diffusers pipeline.")
    if not path.is_file():
        raise UserError(f"{it}: there is no such file here. Download it first.")
    if model.variant is not None:
        raise UserError(f"`--variant {model.variant}` does nothing with one file ({it}): leave it out.")
    try:
        header = read_header(path)
    except Exception as error:  # safetensors has errors of its own
        raise UserError(f"{it} is damaged: {one_line(error).rstrip('.')}. Get the file anew.") from None
    _check_layout(header, it)
    if _FIRST_LAYER in header:
        latents = header[_VAE_LAYER][1][1] if _VAE_LAYER in header else 4
        check_inputs(it, "unet", taken=header[_FIRST_LAYER][1][1], given=latents)
    return header


def holds_lora(file: Path) -> bool:
    """Whether a file holds an adapter rather than a model; what is damaged is refused when it is read."""
    try:
        return _is_lora(read_header(file))
    except Exception:  # safetensors has errors of its own
        return False


def _is_lora(header: Header) -> bool:
    return any("lora_" in name or ".lora" in name for name in header)


def flag(model: ModelConfig) -> str:
    """The words with which errors about a base begin."""
    return f"`--pretrained_model_name_or_path {model.pretrained_model_name_or_path}`"


def _check_layout(header: Header, it: str) -> None:
    if _is_lora(header):
        raise UserError(f"{it} is a LoRA file, not a base: give the model that it is for.")
    if not any(_part(name, header)[0] == "denoiser" for name in header):
        raise UserError(
            f"{it} holds no text-to-image model in its original layout, as it is offered for download in one file: "
            "for another one, give the folder or Hub id of the pipeline."
        )
    if scaled := next((name for name in header if name.endswith(_SCALED)), None):
        raise UserError(f"{it} is quantized (it holds `{scaled}`): get the file in fp16, bf16 or fp32.")


def configuration(model: ModelConfig, header: Header) -> Path:
    """Returns the folder with the configuration of the checkpoint: `--base_config`, or as diffusers infers it.

    Raises:
        UserError: there is none here, and the Hub did not give it.
    """
    given = model.base_config
    if given is not None and os.path.isdir(given):
        return Path(given)
    if given is not None and os.path.exists(given):
        raise UserError(f"`--base_config {given}` is a file: give the folder or Hub id of a diffusers pipeline.")
    repository = given or inferred(header)
    try:
        return Path(
            snapshot_download(
                repository, revision=model.revision, cache_dir=model.cache_dir, allow_patterns=list(_CONFIGURATION)
            )
        )
    except Exception as error:  # the Hub's client raises whatever comes
        reason = one_line(error).rstrip(".")
        if given is not None:
            raise UserError(
                f"`--base_config {given}` is no folder here, and the Hub did not give it ({reason}). Check the name "
                "and the network."
            ) from None
        raise UserError(
            f"{flag(model)} looks like {repository}, whose configuration the Hub did not give ({reason}): name one "
            "with `--base_config`, the folder or Hub id of a diffusers pipeline of that kind."
        ) from None


def inferred(header: Header) -> str:
    """The id of the pipeline on the Hub that diffusers takes a checkpoint's configuration from."""
    shapes = {name: torch.empty(shape, device="meta") for name, (_, shape) in header.items()}
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def stored_parts(header: Header, classes: Mapping[str, list[str]]) -> dict[str, Stored]:
    """Returns what the file holds of each component of a pipeline with these classes.

    A component with numbers of several precisions, or of one that torch does not compute in, is taken as fp32.
    """
    parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    copied: set[str] = set()
    for name, tensor in header.items():
        role, is_mapped = _part(name, header)
        part = _component(role, classes)
        if part is not None:
            parts.setdefault(part, {})[name] = tensor
            copied |= set() if is_mapped else {part}
    return {part: _stored(tensors, part not in copied) for part, tensors in parts.items()}


def unused(header: Header) -> list[str]:
    """The tensors that belong to none of a pipeline's components, such as moving averages."""
    return [name for name in header if _part(name, header)[0] is None]


def _part(name: str, header: Header) -> tuple[str | None, bool]:
    """What a tensor belongs to, and whether it stays mapped."""
    for start, role, is_mapped in _PARTS:
        if name.startswith(start):
            return role, is_mapped
    return ("denoiser" if any(layer in header for layer in _BARE) else None), False


def _component(role: str | None, classes: Mapping[str, list[str]]) -> str | None:
    if role == "denoiser":
        return next((name for name in ("unet", "transformer") if name in classes), None)
    if role == "t5":
        return next((name for name, (_, kind) in classes.items() if kind.startswith("T5Encoder")), None)
    return role if role in classes else None


def _stored(tensors: Header, is_mapped: bool) -> Stored:
    stored = stored_of(tensors, sum(_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in tensors.values()))
    if stored.has_others or len(set(stored.dtypes.values())) > 1:
        floats = {name: torch.float32 for name, (dtype, _) in tensors.items() if dtype in FLOATS}
        return replace(stored, dtypes=floats, has_others=True)
    return replace(stored, is_mapped=is_mapped)


def load_checkpoint(
    file: Path, folder: Path, class_name: str, dtypes: Mapping[str, torch.dtype], others: Mapping[str, Any]
) -> Any:
    """Loads a checkpoint file with diffusers' `from_single_file`, each component in its own precision.

    Args:
        folder: the configuration.
        dtypes: component in the file -> precision; one call takes one precision, and so there is a call for each.
        others: components that are not in the file, or None for those that the pipeline does without.

    Raises:
        UserError: diffusers reads no such pipeline from one file, or tensors are missing.
    """
    kind: Any = getattr(diffusers, class_name, None)
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"diffusers reads no {class_name} from one file")
    held, pipeline = dict(others), None
    for dtype in dict.fromkeys(dtypes.values()):
        later = [name for name, of_part in dtypes.items() if name not in held and of_part != dtype]
        arguments = {"config": str(folder), "dtype": dtype, "local_files_only": True}
        try:
            pipeline = kind.from_single_file(str(file), **arguments, **dict.fromkeys(later), **held)
        except NotImplementedError as error:
            # What torch says of a tensor without a value.
            if "meta" in str(error):
                raise UserError("it lacks tensors that the configuration asks for") from None
            raise
        held |= {name: pipeline.components[name] for name, of_part in dtypes.items() if of_part == dtype}
    for name, part in pipeline.components.items() if pipeline is not None else ():
        _check_complete(name, part)
    return pipeline


def _check_complete(name: str, part: Any) -> None:
    """diffusers leaves tensors without values where the file has none."""
    tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())} if isinstance(part, nn.Module) else {}
    missing = [tensor for tensor, value in tensors.items() if value.is_meta]
    if missing:
        raise UserError(f"it has no {name}.{missing[0]}, which the configuration asks for")


def check_all_used(name: str, denoiser: nn.Module, stored: Stored) -> None:
    """Raises a `UserError` if the file has more weights than the denoiser.

    diffusers leaves out what it has no place for. With the configuration of a model with fewer layers, another model
    would come out.
    """
    held = sum(tensor.numel() for tensor in denoiser.state_dict().values())
    if stored.numbers > held:
        raise UserError(f"its {name} has {stored.numbers:,} numbers, and the configuration has room for {held:,}")

"""Everything that determines the bits of an encoded image or caption, as the key of its cache folder."""

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.transforms import ImageTransform
from ..environment import environment, uses_tf32
from ..families.base import Family
from ..families.encoding import Encoder

# Other versions of these packages may compute other bits.
_PACKAGES = ("iet_finetune", "torch", "diffusers", "transformers", "tokenizers")


def image_facts(family: Family, encoder: Encoder, transform: ImageTransform, device: torch.device) -> dict[str, Any]:
    """Returns everything that image rows depend on besides the images and their crops.

    Args:
        transform: of images of one size, so that rows have one shape. Squares have the same rows in all runs.
    """
    (size,) = transform.buckets.sizes
    return {
        **_common_facts(family, encoder, device),
        "images": transform.scaling,
        "latents": list(family.latent_shape_of(size)),
        "models": _models(family, family.image_encoders),
    }


def caption_facts(family: Family, encoder: Encoder, device: torch.device) -> dict[str, Any]:
    """Returns everything that caption rows depend on besides the captions."""
    tokenizers = {
        name: _tokenizer_digest(component)
        for name, component in sorted(family.pipeline.components.items())
        if isinstance(component, PreTrainedTokenizerBase)
    }
    return {
        **_common_facts(family, encoder, device),
        "max_sequence_length": family.config.training.max_sequence_length,
        "tokenizers": tokenizers,
        # SD 3 without T5 pads with zeros to the width of its transformer.
        "width": _settings(family.denoiser).get("joint_attention_dim"),
        "models": _models(family, family.caption_encoders),
        **_precisions(family, device),
    }


def _common_facts(family: Family, encoder: Encoder, device: torch.device) -> dict[str, Any]:
    return {
        "pipeline": type(family.pipeline).__name__,
        "family": _class_digest(type(family)),
        "encoded at once": encoder.chunk,
        "made by": _machine(device),
    }


def _precisions(family: Family, device: torch.device) -> dict[str, Any]:
    """What text encoders compute in, where that is not fp32; nothing on a CPU."""
    there = [name for name in family.caption_encoders if getattr(family.pipeline, name, None) is not None]
    dtypes = {name: family.encoding_dtype(name, device) for name in there}
    half = {name: str(dtype) for name, dtype in dtypes.items() if dtype != torch.float32}
    return {"computed in": half} if half else {}


def _machine(device: torch.device) -> dict[str, Any]:
    facts = environment()
    found = {name: facts["versions"][name] for name in _PACKAGES} | {"device": device.type}
    if device.type == "cpu":
        return found | {"processor": facts["processor"], "threads": facts["threads"]}
    return found | {"accelerator": facts["accelerator"], "tf32": uses_tf32()}


def _class_digest(kind: type) -> str:
    """Digest of the name of a family's class and of the source files of the class and its bases."""
    digest = hashlib.blake2b(f"{kind.__module__}.{kind.__qualname__}".encode(), digest_size=16)
    for base in kind.__mro__:
        if issubclass(base, Family):
            try:
                digest.update(Path(inspect.getfile(base)).read_bytes())
            except (OSError, TypeError):  # defined interactively: it may differ each time
                digest.update(os.urandom(16))
    return digest.hexdigest()


def _models(family: Family, names: Sequence[str]) -> dict[str, str]:
    models = {name: getattr(family.pipeline, name, None) for name in names}
    return {name: _model_digest(model) for name, model in models.items() if model is not None}


def _model_digest(model: nn.Module) -> str:
    """Digest of a model's class, settings and all bits of its weights in fp32, in which it encodes."""
    # transformers notes the precision in which a model is held.
    settings = {key: value for key, value in dict(_settings(model)).items() if key != "dtype" and key[0] != "_"}
    # Not cryptographic but as fast as memory: a text encoder may have 20 GB and is hashed at every start.
    digest = xxhash.xxh3_128(f"{type(model).__name__} {json.dumps(settings, default=str, sort_keys=True)}".encode())
    for name, tensor in model.state_dict().items():
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", {})
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer's class, vocabulary, rules and lengths."""
    digest = hashlib.blake2b(type(tokenizer).__name__.encode(), digest_size=16)
    lengths = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side)
    digest.update(repr((*lengths, tokenizer.special_tokens_map)).encode())
    if hasattr(tokenizer, "backend_tokenizer"):
        # Without the padding and truncation of its last use.
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        digest.update(json.dumps(rules).encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_vocabulary(folder)):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()

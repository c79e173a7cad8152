"""What tells one pipeline's weights from another's."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


def pipeline_fingerprint(pipeline: Any) -> str:
    """Returns a hash of the weights of all models of any pipeline and of its scheduler's settings."""
    settings = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    digest = hashlib.blake2b(json.dumps(settings, default=str).encode(), digest_size=16)
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            _hash_weights(digest, name, component)
        for adapter in getattr(component, "peft_config", {}).values():
            # They scale the adapter's matrices.
            digest.update(f"{adapter.lora_alpha} {adapter.alpha_pattern} {adapter.use_rslora}".encode())
    return digest.hexdigest()


def _hash_weights(digest: Any, name: str, module: nn.Module, samples: int = 4096) -> None:
    # At most `samples` evenly spaced values of each tensor: hashing gigabytes would take too long. They count, not the
    # precision in which they are held.
    for key, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        chosen = flat[:: max(1, flat.numel() // samples)].cpu().contiguous()
        chosen = chosen.float() if chosen.is_floating_point() else chosen
        digest.update(f"{name} {key} {tuple(tensor.shape)} {chosen.dtype}".encode())
        digest.update(chosen.view(torch.uint8).numpy().tobytes())

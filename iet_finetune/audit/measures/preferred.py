"""Which features tell images apart best, of those that can be had here."""

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging as hub_logging

from .features import DEFAULT_FEATURES

# Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023; 346 MB.
PREFERRED = "facebook/dinov2-base"
_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def preferred_features(online: bool) -> tuple[str, ...]:
    """What `--features` should be: DINOv2's if its files are here or, if `online`, come from the Hub now; else the
    default, whose weights a package brings.

    A run that needs them at its end finds out before it begins.
    """
    verbosity = hub_logging.get_verbosity()
    # Without a network it complains of each of its attempts.
    hub_logging.set_verbosity_error()
    try:
        for name in _FILES:
            hf_hub_download(PREFERRED, name, local_files_only=not online)
    except OSError:  # of whatever the Hub, the network or the disk may refuse
        return DEFAULT_FEATURES
    finally:
        hub_logging.set_verbosity(verbosity)
    return (PREFERRED,)

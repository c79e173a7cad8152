"""Which flags an audit takes, and what of them can be checked before anything heavy is imported."""

import importlib.util
import os

from ..config.config import Config, all_flags
from ..errors import UserError

PROGRAM = "iet-finetune audit"
FLAGS = {name: spec for name, spec in all_flags().items() if spec.audit is not None}
# What is taken over from the configuration of a run that was trained here.
OF_THE_RUN = tuple(name for name, spec in FLAGS.items() if spec.audit != "given")
# What `audit.json` says was set, without what names a folder of this machine.
SETTINGS = tuple(name for name, spec in FLAGS.items() if spec.audit in ("recorded", "noted"))
EXTRA = ("scipy", "torchmetrics")


def check_audit(config: Config) -> None:
    """Raises a `UserError` for what would make an audit fail at the end of a long run and can be seen at its start."""
    check_extra()
    audit = config.audit
    for name in ("holdout_data_dir", "generated_dir"):
        folder = getattr(audit, name)
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"`--{name} {folder}` is not a folder. Give the folder that holds the images.")
    if audit.generated_dir is None and audit.prompts not in ("train", "heldout", "none"):
        from ..audit.inputs.samples import read_prompts

        read_prompts(audit.prompts)


def check_extra() -> None:
    """Raises a `UserError` if packages that only an audit needs are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"an audit needs {' and '.join(missing)}: `pip install 'iet_finetune[audit]'`.")

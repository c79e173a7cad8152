"""The flags of other trainers and what each is here; imported only where somebody asks."""

from .answers import Answer as Answer
from .answers import Trainer as Trainer
from .diffusers import DIFFUSERS
from .kohya import KOHYA
from .simpletuner import SIMPLETUNER

# By the value of `--help-from`; where two have a flag of one name, an unknown flag is taken for that of the first.
TRAINERS = {"diffusers": DIFFUSERS, "kohya": KOHYA, "simpletuner": SIMPLETUNER}


def answer_to(flag: str) -> Answer | None:
    """What a flag of another trainer, given without dashes, is here; None if none of them has it."""
    name = flag.replace("-", "_")
    return next((trainer.flags[name] for trainer in TRAINERS.values() if name in trainer.flags), None)

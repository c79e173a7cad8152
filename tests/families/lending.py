"""Families whose encoders note where they are sent."""

from collections.abc import Callable
from typing import Any

from iet_finetune.families.stable_diffusion import StableDiffusion


def travelling(family: StableDiffusion, names: tuple[str, ...], refuses: str = "") -> list[tuple[str, str]]:
    """Makes these components of the family note, in the list that is returned, where they are sent.

    They stay where they are, as there may be no other device; on one that `refuses` there is no room for it.
    """
    journeys: list[tuple[str, str]] = []

    def noted(name: str) -> Callable[[Any], None]:
        def to(device: Any) -> None:
            journeys.append((name, str(device)))
            if name == refuses and str(device) == "cuda":
                raise RuntimeError("out of memory")

        return to

    for name in names:
        getattr(family.pipeline, name).to = noted(name)
    return journeys

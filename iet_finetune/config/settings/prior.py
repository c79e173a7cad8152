"""DreamBooth's prior preservation: images of the subject's class, trained beside the images of the subject."""

from dataclasses import dataclass, fields

from ..flags import fixed, other
from .checks import not_negative, require


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation (DreamBooth, arXiv 2208.12242, section 3.2); `--class_prompt` switches it on."""

    class_prompt: str | None = fixed(
        None,
        'Prompt for images of the class, such as "a photo of a dog"; also the caption of class images that have none. '
        "One class image is trained beside each training image, so that the model still draws others of the class.",
        needs="captions",
        scope="public",
    )
    class_data_dir: str | None = other(
        None,
        "Folder of class images; if there are too few, more are drawn into it. If not given: `class_images` in "
        "`--output_dir`.",
        scope="local",
        per_machine=False,
    )
    num_class_images: int = fixed(
        100, "Number of class images to have; the base model draws missing ones before training."
    )
    prior_loss_weight: float = fixed(1.0, "Weight of the mean loss of a step's class images.")

    def __post_init__(self) -> None:
        not_negative("num_class_images", self.num_class_images)
        require(self.prior_loss_weight > 0, f"`--prior_loss_weight` must be above 0, not {self.prior_loss_weight}.")
        require(
            self.class_prompt is None or self.class_prompt.strip() != "",
            "`--class_prompt` is empty: say what class the images are of.",
        )
        for each in fields(self) if self.class_prompt is None else ():
            value = getattr(self, each.name)
            require(
                value == each.default, f"`--{each.name} {value}` does nothing without `--class_prompt`: give both."
            )

    @property
    def is_on(self) -> bool:
        """Whether class images are trained beside the others."""
        return self.class_prompt is not None

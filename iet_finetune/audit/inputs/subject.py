"""The audited pipeline on its device: what it takes, and how it draws."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image

from ...errors import UserError, one_line
from ...families import Family
from ...families.decoding import one_at_a_time
from ...families.precision import HALF, bytes_to_compute, predicting
from ...families.prompts import encode_prompts
from ...families.quiet import quiet_loading


@dataclass
class Subject:
    """A pipeline, and the device that it computes on.

    On a CPU all of it is there. For a GPU its models wait on the host, and only those are on the device that a phase
    needs: encoders while something is encoded, the denoiser and the VAE while images are drawn.

    Attributes:
        name: what the report calls it: its id on the Hub, or the name of its folder.
        family: how images and prompts become what its denoiser takes; None for a kind of pipeline that cannot be
            trained here, which can be drawn with all the same.
        pipeline: draws, without safety checker and progress bar.
        class_name: as in model_index.json.
        fingerprint: of all its weights.
        precision: of the denoiser: `no`, `bf16` or `fp16`. On a CPU, and where the family is not known, autocast to it
            is around all that is drawn; elsewhere around the denoiser alone.
        travels: whether its models wait on the host.
    """

    name: str
    class_name: str
    family: Family | None
    pipeline: Any
    device: torch.device
    fingerprint: str
    precision: str = "no"
    travels: bool = False

    @property
    def denoiser(self) -> Any:
        """The network that takes the noise away; None if the pipeline has none by a usual name."""
        return getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)

    @property
    def is_grey(self) -> bool:
        """Whether its images have one channel."""
        settings = getattr(self.denoiser, "config", None)
        return getattr(self.pipeline, "vae", None) is None and getattr(settings, "in_channels", 3) == 1

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline draws from text."""
        return "prompt" in inspect.signature(self.pipeline.__call__).parameters

    @property
    def takes_classes(self) -> bool:
        """Whether the pipeline draws by class."""
        return "class_labels" in inspect.signature(self.pipeline.__call__).parameters

    @property
    def native_resolution(self) -> int | None:
        """The side of its images in pixels by default; None if it does not say."""
        size = getattr(self.pipeline, "default_sample_size", None)
        if size is None and self.denoiser is not None:
            size = getattr(self.denoiser.config, "sample_size", None)
        has_vae = getattr(self.pipeline, "vae", None) is not None
        factor = getattr(self.pipeline, "vae_scale_factor", 1) if has_vae else 1
        return size * factor if isinstance(size, int) else None

    @property
    def default_guidance(self) -> float | None:
        """The guidance that the pipeline draws with by default; None if it takes none."""
        parameter = inspect.signature(self.pipeline.__call__).parameters.get("guidance_scale")
        return float(parameter.default) if parameter is not None and _is_number(parameter.default) else None

    def call_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it draw as it was trained."""
        return {} if self.family is None else self.family.call_options

    @property
    def options(self) -> dict[str, Any]:
        """Settings beside its weights and its scheduler that decide what it predicts, in types of JSON."""
        options = dict(self.call_options())
        if self.family is not None and (guidance := self.family.config.training.guidance_scale) is not None:
            options["guidance_scale"] = guidance
        return options

    @property
    def weights_to_draw(self) -> int:
        """Bytes of the models that are on the device while images are drawn, if they travel."""
        assert self.family is not None
        half = HALF.get(self.precision, torch.float32)
        beside = (getattr(self.family.pipeline, name, None) for name in self.family.image_encoders)
        others = sum(bytes_to_compute(part) for part in beside if part is not None)
        return bytes_to_compute(self.family.denoiser, half, layers_alone=True) + others

    @contextmanager
    def lent(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, these encoders are on the device, and nothing else of what travels."""
        assert self.family is not None
        if not self.travels:
            yield
            return
        with self.family.lent(names, self.device), one_at_a_time(self.pipeline, self.device):
            yield

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Inside, the denoiser is on the device in its precision, and nothing else of what travels."""
        half = HALF.get(self.precision)
        if self.family is not None and self.travels:
            # Pipelines without a VAE draw their noise in the precision of the weights.
            has_vae = getattr(self.family.pipeline, "vae", None) is not None
            with predicting(self.family.denoiser, self.device, half, rounds=has_vae):
                yield
        elif half is None:
            yield
        else:
            with torch.autocast(self.device.type, dtype=half):
                yield

    @contextmanager
    def drawing(self, calls: Sequence[Callable[[], object]]) -> Iterator[None]:
        """Inside, these calls may draw: all that they need is on the device.

        Args:
            calls: each calls the pipeline once. Where models travel, their prompts are encoded before.
        """
        with ExitStack() as stack:
            if self.family is not None and self.travels:
                family, encoders = self.family, self.family.caption_encoders
                prompts = encode_prompts(family, self.pipeline, calls, self.device)
                beside = [name for name in family.beside_denoiser if prompts is None or name not in encoders]
                stack.enter_context(family.lent(beside, self.device))
                if prompts is not None:
                    stack.enter_context(prompts.answering(self.pipeline, encoders, self.device))
            stack.enter_context(self.predicting())
            yield

    def draw(
        self,
        prompts: Sequence[str],
        classes: Sequence[int],
        generators: list[torch.Generator],
        *,
        steps: int,
        guidance: float | None,
        size: int,
    ) -> list[Image.Image]:
        """One RGB image a generator; of prompts and classes it takes what it knows.

        Raises:
            UserError: the pipeline cannot be called in this way.
        """
        known = inspect.signature(self.pipeline.__call__).parameters
        wanted: dict[str, Any] = {
            "prompt": list(prompts),
            "class_labels": list(classes),
            "batch_size": len(generators),
            "height": size,
            "width": size,
            "num_inference_steps": steps,
            "generator": generators,
            **self.call_options(),
        }
        if guidance is not None:
            wanted["guidance_scale"] = guidance
        arguments = {name: value for name, value in wanted.items() if name in known}
        try:
            # Quiet: a pipeline repeats for every batch which prompts are too long for it.
            with torch.no_grad(), quiet_loading(), one_at_a_time(self.pipeline, self.device):
                images = self.pipeline(**arguments).images
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"`--model {self.name}`: a {self.class_name} could not draw ({one_line(error).rstrip('.')}): draw "
                "yourself, and give the images with `--generated_dir`."
            ) from None
        return [image.convert("RGB") for image in images]

    def set_scheduler(self, name: str) -> None:
        """Draws with another scheduler of diffusers from now on.

        Raises:
            UserError: there is none of that name, or it does not take the settings of the pipeline's own.
        """
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise UserError(f"`--scheduler {name}` is no scheduler of diffusers: one is DDIMScheduler.")
        flow = type(self.pipeline.scheduler).__name__.startswith("FlowMatch")
        if flow != name.startswith("FlowMatch"):
            raise UserError(f"`--scheduler {name}` does not draw with a {self.class_name}: leave it out.")
        with quiet_loading():
            scheduler = kind.from_config(self.pipeline.scheduler.config)
        if isinstance(self.pipeline, diffusers.DDIMPipeline) and not isinstance(scheduler, diffusers.DDIMScheduler):
            # That pipeline draws by DDIM alone; its sister takes what there is.
            self.pipeline = diffusers.DDPMPipeline(unet=self.denoiser, scheduler=scheduler)
            self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = scheduler


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

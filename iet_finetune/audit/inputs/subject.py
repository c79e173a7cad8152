"""The pipeline that is audited: found, loaded and put on the device, whoever trained it."""

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from ...config.config import Config
from ...errors import UserError, one_line
from ...families import FAMILIES, Family, PipelineSource, family_class, find_pipeline, load_pipeline
from ...families.base import pipeline_fingerprint
from ...families.loading import quiet_loading
from ...files import LORA_NAME


@dataclass
class Subject:
    """A pipeline on its device.

    Attributes:
        name: what the report calls it: its id on the Hub, or the name of its folder.
        family: how images and prompts become what its denoiser takes; None for a kind of pipeline that cannot be
            trained here, which can be drawn with all the same.
        pipeline: draws, without safety checker and progress bar.
        class_name: as in model_index.json.
        fingerprint: of all its weights.
    """

    name: str
    class_name: str
    family: Family | None
    pipeline: Any
    device: torch.device
    fingerprint: str

    @property
    def denoiser(self) -> Any:
        """The network that takes the noise away; None if the pipeline has none by a usual name."""
        return getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)

    @property
    def is_grey(self) -> bool:
        """Whether its pictures have one channel."""
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
        """The side of its pictures in pixels unless it is told another; None if it does not say."""
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
        """What the pipeline must be told to draw as it was trained."""
        return {} if self.family is None else self.family.call_options

    @property
    def told(self) -> dict[str, Any]:
        """Settings beside its weights and its scheduler that decide what it predicts, in types of JSON."""
        told = dict(self.call_options())
        if self.family is not None and (guidance := self.family.config.training.guidance_scale) is not None:
            told["guidance_scale"] = guidance
        return told

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
        """One RGB picture a generator; of prompts and classes it takes what it knows.

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
            with torch.no_grad(), quiet_loading():
                images = self.pipeline(**arguments).images
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"`--model {self.name}`: a {self.class_name} could not draw ({one_line(error).rstrip('.')}): draw "
                "yourself, and give the pictures with `--generated_dir`."
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


@dataclass(frozen=True)
class Found:
    """A pipeline that was found, before its weights are loaded.

    Attributes:
        name: Hub id or folder, as given.
        flag: the flag that named it.
        config: how it, or the base of its LoRA file, is loaded.
        lora: the folder of its LoRA file, if it is one.
    """

    name: str
    flag: str
    config: Config
    source: PipelineSource
    lora: Path | None

    @property
    def needs_captions(self) -> bool:
        """Whether the pipeline draws from text."""
        if self.source.class_name in FAMILIES:
            return family_class(self.source, self.config.model).needs_captions
        kind = getattr(diffusers, self.source.class_name, None)
        return kind is not None and "prompt" in inspect.signature(kind.__call__).parameters

    def load(self, device: torch.device) -> Subject:
        """The pipeline with its weights.

        Raises:
            UserError: it cannot be loaded; names the flag.
        """
        with self.blamed():
            pipeline: Any = load_pipeline(self.source, self.config.model)
            family = None
            if self.source.class_name in FAMILIES:
                family = family_class(self.source, self.config.model)(pipeline, self.config)
        if self.lora is not None:
            _add_lora(pipeline, self.lora, self.flag)
        fingerprint = pipeline_fingerprint(pipeline)
        if family is not None:
            family.place(device)
            family.denoiser.requires_grad_(False).eval()
            # By DDIM, by class and without a safety checker, as while training.
            pipeline = family.sampling_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return Subject(shown(self.name), self.source.class_name, family, pipeline.to(device), device, fingerprint)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """An error inside names the flag that the pipeline came from."""
        trained = f"`--pretrained_model_name_or_path {self.config.model.pretrained_model_name_or_path}`"
        try:
            yield
        except UserError as error:
            if self.lora is not None:
                raise
            raise UserError(str(error).replace(trained, f"`--{self.flag} {self.name}`")) from None


def find_subject(config: Config, name: str, flag: str) -> Found:
    """Finds a pipeline on the Hub or in a folder, or a LoRA file with its base; loads no weights.

    Args:
        config: how it is loaded; `--pretrained_model_name_or_path` is the base of a LoRA file.
        name: Hub id or folder.
        flag: what errors call it, such as `model`.

    Raises:
        UserError: it is not there; names the flag.
    """
    folder = Path(name)
    is_lora = (folder / LORA_NAME).is_file() and not (folder / "model_index.json").is_file()
    base = config.model.pretrained_model_name_or_path if is_lora else name
    if base is None:
        raise UserError(
            f"`--{flag} {name}` is a LoRA file: say with `--pretrained_model_name_or_path` which pipeline it is for."
        )
    config = replace(config, model=replace(config.model, pretrained_model_name_or_path=base, model_config=None))
    found = Found(name, flag, config, PipelineSource(None, "", {}, {}), folder if is_lora else None)
    with found.blamed():
        return replace(found, source=find_pipeline(config.model))


def _add_lora(pipeline: Any, folder: Path, flag: str) -> None:
    try:
        with quiet_loading():
            pipeline.load_lora_weights(str(folder))
    except Exception as error:  # a pipeline that loads none, a damaged file, layers that are not there
        raise UserError(
            f"`--{flag} {folder}`: its LoRA file does not fit the base ({one_line(error).rstrip('.')}): give its "
            "own with `--pretrained_model_name_or_path`."
        ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(name: str) -> str:
    """A name without the folders of this machine."""
    return os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name

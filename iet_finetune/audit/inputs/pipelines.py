"""The pipelines of an audit before they are put to work: stored ones, and those of a notebook."""

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor, nn

from ...config.config import Config
from ...environment import has_bf16
from ...errors import UserError, one_line, warn
from ...families import (
    FAMILIES,
    Family,
    PipelineSource,
    family_class,
    find_pipeline,
    load_as_stored,
    load_pipeline,
    move_pipeline,
)
from ...families.fingerprint import pipeline_fingerprint
from ...families.precision import HALF
from ...families.quiet import quiet_loading
from ...families.single_file import holds_lora, is_file
from ...files import LORA_NAME
from .subject import Subject

# Reads a LoRA file whose names diffusers does not load, under names that it does; None for other files.
LoraReader = Callable[[Path], Mapping[str, Tensor] | None]


class SubjectSource(Protocol):
    """A pipeline before it is put to work."""

    @property
    def needs_captions(self) -> bool:
        """Whether the pipeline draws from text."""

    def load(self, device: torch.device) -> Subject:
        """The pipeline on the device."""


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline that was found, before its weights are loaded.

    Attributes:
        name: Hub id or folder, as given.
        flag: the flag that named it.
        config: how it, or the base of its LoRA file, is loaded.
        lora: its LoRA file, if it is one.
        read_lora: reads LoRA files that diffusers does not; None leaves all to diffusers.
    """

    name: str
    flag: str
    config: Config
    source: PipelineSource
    lora: Path | None
    read_lora: LoraReader | None = None

    @property
    def needs_captions(self) -> bool:
        """Whether the pipeline draws from text."""
        return _needs_captions(self.source, self.config, getattr(diffusers, self.source.class_name, None))

    def load(self, device: torch.device) -> Subject:
        """The pipeline with its weights.

        Raises:
            UserError: it cannot be loaded; names the flag.
        """
        source = self.source
        precision = precision_on(device, self.config, source.class_name, has_vae="vae" in source.classes)
        # Where the denoiser is rounded to half precision anyway, the host need not hold it in fp32.
        as_stored = _travels(source.class_name, device) and precision in HALF
        with self.blamed():
            pipeline: Any = (load_as_stored if as_stored else load_pipeline)(source, self.config.model)
            family = _family(source, pipeline, self.config, precision)
        if self.lora is not None:
            self._add_lora(pipeline, self.lora)
        return _subject(shown(self.name), source.class_name, pipeline, family, device, precision)

    def _add_lora(self, pipeline: Any, file: Path) -> None:
        read = self.read_lora(file) if self.read_lora is not None else None
        try:
            with quiet_loading():
                pipeline.load_lora_weights(str(file) if read is None else dict(read))
        except Exception as error:  # a pipeline that loads none, a damaged file, layers that are not there
            raise UserError(
                f"`--{self.flag} {self.name}`: its LoRA file does not fit the base ({one_line(error).rstrip('.')}): "
                "give its own with `--pretrained_model_name_or_path`."
            ) from None

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """An error inside names the flag that the pipeline came from."""
        try:
            yield
        except UserError as error:
            raise UserError(self.by_its_flag(str(error))) from None

    def by_its_flag(self, text: str) -> str:
        """A line about the pipeline with the flag that it came from."""
        trained = f"`--pretrained_model_name_or_path {self.config.model.pretrained_model_name_or_path}`"
        return text if self.lora is not None else text.replace(trained, f"`--{self.flag} {self.name}`")


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline in memory, which stays its owner's: whoever uses it does so inside `kept_as_it_is`."""

    pipeline: Any
    config: Config

    @property
    def needs_captions(self) -> bool:
        """Whether the pipeline draws from text."""
        return _needs_captions(self._source, self.config, type(self.pipeline))

    @property
    def _source(self) -> PipelineSource:
        return PipelineSource(None, type(self.pipeline).__name__, {}, {})

    def load(self, device: torch.device) -> Subject:
        """The pipeline on the device, in a shell of its own: its scheduler may be exchanged.

        Raises:
            UserError: a model of it is not in fp32.
        """
        for name, model in models(self.pipeline).items():
            dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()} - {torch.float32}
            if dtypes:
                raise UserError(
                    f"the pipeline's {name} is in {dtypes.pop()}: load it with `torch_dtype=torch.float32`, and give "
                    "`mixed_precision` for speed."
                )
        pipeline, name = copy.copy(self.pipeline), str(self.pipeline.config.get("_name_or_path") or "")
        class_name, has_vae = self._source.class_name, getattr(pipeline, "vae", None) is not None
        precision = precision_on(device, self.config, class_name, has_vae=has_vae)
        family = _family(self._source, pipeline, self.config, precision)
        if _travels(class_name, device):
            move_pipeline(pipeline, torch.device("cpu"))
        return _subject(shown(name) or class_name, class_name, pipeline, family, device, precision)


@contextlib.contextmanager
def kept_as_it_is(pipeline: Any) -> Iterator[None]:
    """The pipeline's models have their device, mode and `requires_grad` back afterwards."""
    whole = list(models(pipeline).values())
    devices = [(model, tensor.device) for model in whole if (tensor := next(model.parameters(), None)) is not None]
    modes = [(module, module.training) for model in whole for module in model.modules()]
    trained = [(tensor, tensor.requires_grad) for model in whole for tensor in model.parameters()]
    try:
        yield
    finally:
        for model, device in devices:
            model.to(device)
        for module, training in modes:
            module.training = training
        for tensor, requires_grad in trained:
            tensor.requires_grad_(requires_grad)


def models(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name."""
    return {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}


def _needs_captions(source: PipelineSource, config: Config, kind: Any) -> bool:
    if source.class_name in FAMILIES:
        return family_class(source, config.model).needs_captions
    return kind is not None and "prompt" in inspect.signature(kind.__call__).parameters


def precision_on(device: torch.device, config: Config, class_name: str, *, has_vae: bool) -> str:
    """The precision of the denoiser: `no`, `bf16` or `fp16`.

    Where none is given it is half precision on a GPU, except for a kind of pipeline that no family knows and for one
    that draws pixels: that is small, and takes its noise in the precision of its weights.
    """
    if config.training.mixed_precision is not None:
        return config.training.mixed_precision
    if not has_vae or not _travels(class_name, device):
        return "no"
    return "bf16" if has_bf16(device) else "fp16"


def _travels(class_name: str, device: torch.device) -> bool:
    """Whether the models of such a pipeline are on the device only while they are needed."""
    return device.type != "cpu" and class_name in FAMILIES


def _family(source: PipelineSource, pipeline: Any, config: Config, precision: str) -> Family | None:
    if source.class_name not in FAMILIES:
        return None
    config = replace(config, training=replace(config.training, mixed_precision=precision))
    return family_class(source, config.model)(pipeline, config)


def _subject(
    name: str, class_name: str, pipeline: Any, family: Family | None, device: torch.device, precision: str
) -> Subject:
    fingerprint, travels = pipeline_fingerprint(pipeline), _travels(class_name, device)
    if family is not None:
        family.place(device, encoders=not travels)
        family.denoiser.requires_grad_(False).eval()
        # By DDIM, by class and without a safety checker, as while training.
        pipeline = family.sampling_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if not travels:
        pipeline = pipeline.to(device)
    return Subject(name, class_name, family, pipeline, device, fingerprint, precision, travels)


def find_subject(config: Config, name: str, flag: str, read_lora: LoraReader | None = None) -> StoredPipeline:
    """Finds a pipeline on the Hub, in a folder or in a file, or a LoRA file with its base; loads no weights.

    Args:
        config: how it is loaded; `--pretrained_model_name_or_path` is the base of a LoRA file, and `--base_config` is
            for what is a checkpoint file.
        name: Hub id, folder or checkpoint file, or a LoRA file.
        flag: what errors call it, such as `model`.
        read_lora: as `StoredPipeline` has it.

    Raises:
        UserError: it is not there; names the flag.
    """
    lora = _lora_file(Path(name))
    base = config.model.pretrained_model_name_or_path if lora is not None else name
    if base is None:
        raise UserError(
            f"`--{flag} {name}` is a LoRA file: say with `--pretrained_model_name_or_path` which pipeline it is for."
        )
    base_config = config.model.base_config if is_file(base) else None
    model = replace(config.model, pretrained_model_name_or_path=base, model_config=None, base_config=base_config)
    config = replace(config, model=model)
    found = StoredPipeline(name, flag, config, PipelineSource(None, "", {}, {}), lora, read_lora)
    with found.blamed():
        found = replace(found, source=find_pipeline(config.model))
        if found.source.class_name in FAMILIES:
            # Refuses what takes more than noise and text, before anything is drawn.
            family_class(found.source, config.model)
    for note in found.source.notes:
        warn(found.by_its_flag(note))
    return found


def _lora_file(path: Path) -> Path | None:
    """The LoRA file that is there, or in a folder that is no pipeline."""
    if path.is_file():
        return path if holds_lora(path) else None
    file = path / LORA_NAME
    return file if file.is_file() and not (path / "model_index.json").is_file() else None


def shown(name: str) -> str:
    """A name without the folders of this machine."""
    return os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name

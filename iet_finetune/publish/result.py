"""A run's result: a pipeline or a LoRA file in the requested precision, and the line that loads it."""

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.config import Config
from ..families import Family, PipelineSource, amend_saved, load_as_stored, restored, round_pipeline, save_pipeline
from ..files import LORA_NAME
from ..lora.adapters import Adapter
from ..lora.export import Export, plain_shapes, plan_export
from ..lora.file import write_lora
from .base_files import are_plain, header_of, take_over
from .card import TEXT_LOADER


class Result:
    """Saves the live denoiser, which holds the merged weights or their moving average.

    Args:
        family: the pipeline with the live denoiser.
        adapter: its LoRA layers, or None if the whole denoiser was trained.
        source: where the pipeline came from.
        by_class: whether it draws by class.
        accelerator: what prepared the denoiser.
        config: the run's settings.
    """

    def __init__(
        self,
        family: Family,
        adapter: Adapter | None,
        source: PipelineSource,
        by_class: bool,
        accelerator: Accelerator,
        config: Config,
    ) -> None:
        self._family, self._adapter, self._source = family, adapter, source
        self._by_class = by_class
        self._accelerator = accelerator
        self._config = config
        self._dtype = getattr(torch, config.model.save_dtype) if config.model.save_dtype is not None else None
        self._export = self._plan_export()

    @property
    def words(self) -> str | None:
        """How the adapter was exported; None if the whole denoiser was trained."""
        return self._export.words if self._export is not None else None

    def other_forms(self, folder: Path) -> str | None:
        """How to get another form of the adapter in `folder`; None where there is nothing to gain."""
        if self._export is None or self._adapter is None or self._export.layers is None:
            return None
        if self._export.higher:
            rank, name = self._adapter.rank, shlex.quote(str(folder))
            other = shlex.quote(f"{folder}-rank-{rank}")
            return f"a smaller file, cut to rank {rank}: iet-finetune merge {name} --rank {rank} --output {other}"
        if self._export.cut:
            return "to keep all of it, in a file of higher rank, train with `--lora_export full_rank`"
        return None

    def save(self, folder: Path) -> None:
        """Creates the folder and writes the pipeline or LoRA file into it; call it once."""
        if self._export is None or self._export.layers is None:
            self._save_pipeline(folder, self._plain_pipeline)
        else:
            folder.mkdir()
            write_lora(folder / LORA_NAME, self._export.layers, self._config.adapter.lora_format)

    def save_copy(self, folder: Path) -> None:
        """As `save`, of a pipeline that is trained on afterwards, as if nothing had been saved."""
        if self._export is not None and self._export.layers is not None:
            self.save(folder)
            return
        with restored(self._family.pipeline):
            self._save_pipeline(folder, self._copied_pipeline)

    def how_to_load(self, folder: Path) -> str:
        """The expression that loads it from `folder`."""
        if self._export is not None and self._export.layers is not None:
            return f"pipeline.load_lora_weights({_quoted(folder)})"
        loader = "ClassConditionalPipeline" if self._by_class else "DiffusionPipeline"
        if self._source.saved_as is not None:
            loader = TEXT_LOADER
        without = "".join(f", {name}=None" for name in self._source.absent)
        return f"{loader}.from_pretrained({_quoted(folder)}{without})"

    def _plan_export(self) -> Export | None:
        if self._adapter is None:
            return None
        family = self._family
        form = self._config.adapter.lora_export if family.loads_lora else "fuse"
        return plan_export(self._adapter, family.denoiser_name, form, self._dtype or torch.float32)

    def _save_pipeline(self, folder: Path, made: Callable[[dict[str, torch.dtype]], Any]) -> None:
        if self._adapter is not None and self._base_is_there():
            self._fuse_files(self._adapter, folder)
            return
        name, dtypes = self._family.denoiser_name, dict(self._source.dtypes)
        if self._dtype is not None:
            dtypes = {part: dtype for part, dtype in dtypes.items() if not part.startswith(f"{name}/")}
            dtypes[name] = self._dtype
        with self._family.as_it_came():
            save_pipeline(made(dtypes), folder, dtypes, self._source.own_index)

    def _base_is_there(self) -> bool:
        """Whether the base's files hold the denoiser as it came, tensor by tensor."""
        source, name = self._source, self._family.denoiser_name
        if not are_plain(source) or name not in source.stored or source.stored[name].has_others:
            return False
        stored = {tensor: shape for tensor, (_, shape) in header_of(source, name).items()}
        return stored == plain_shapes(self._family.denoiser)

    def _fuse_files(self, adapter: Adapter, folder: Path) -> None:
        """Adds the update to the weights on their way from the base's files to the result's; nothing else is read."""

        def fused(tensor: str, weight: Tensor) -> Tensor:
            layer = tensor.removesuffix(".weight")
            return adapter.fused(layer, weight) if layer != tensor and layer in adapter.layers else weight

        pipeline, name = self._family.pipeline, self._family.denoiser_name
        dtypes = {} if self._dtype is None else {name: self._dtype}
        take_over(self._source, folder, {name: fused}, dtypes, but=("scheduler",))
        # What the run wrote into it, such as `--prediction_type`.
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)
        amend_saved(folder, self._source.own_index)

    def _plain_pipeline(self, dtypes: dict[str, torch.dtype]) -> Any:
        """The pipeline with the trained denoiser, without an adapter; `dtypes` are those that it will be saved in."""
        family, adapter = self._family, self._adapter
        if adapter is not None and (adapter.is_rounded or self._config.adapter.quantize_encoders is not None):
            pipeline: Any = load_as_stored(self._source, self._config.model)
            if not adapter.quantised:
                # A weight that is rounded when it is written need not be held in fp32 before.
                round_pipeline(pipeline, dtypes)
            adapter.fuse(pipeline.components[family.denoiser_name])
            # What the run wrote into it, such as `--prediction_type`.
            pipeline.register_modules(scheduler=family.pipeline.scheduler)
            return pipeline
        if adapter is not None:
            adapter.fuse()
            adapter.remove()
        self._accelerator.unwrap_model(family.denoiser, keep_fp32_wrapper=False)
        return self._with_usual_order()

    def _copied_pipeline(self, dtypes: dict[str, torch.dtype]) -> Any:
        """The same, of which nothing is taken apart: an adapter is added to the weights of another denoiser."""
        family, adapter = self._family, self._adapter
        if adapter is None:
            return self._with_usual_order()
        if adapter.is_rounded:
            return self._plain_pipeline(dtypes)
        live: Any = family.denoiser
        with torch.random.fork_rng(devices=[]):
            plain = type(live).from_config(live.config)
        weights = {name: tensor for name, tensor in live.state_dict().items() if "lora_" not in name}
        plain.load_state_dict({name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()})
        adapter.fuse(plain)
        pipeline = copy.copy(family.pipeline)
        pipeline.register_modules(**{family.denoiser_name: plain})
        return pipeline

    def _with_usual_order(self) -> Any:
        """The pipeline, its denoiser's weights laid out as files hold them."""
        self._family.denoiser.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # not in torch's stubs
        return self._family.pipeline


def _quoted(folder: Path) -> str:
    """A string of Python to copy from the terminal."""
    return json.dumps(str(folder), ensure_ascii=False)

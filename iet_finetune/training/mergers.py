"""Which merge goes with which settings, and what it needs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config.config import Config
from ..config.registry import MERGE_RULES
from ..distributed.groups import Placement, Ranks
from ..ensemble.budget import Need
from ..ensemble.ema import EMA
from ..ensemble.host import HostMemory
from ..ensemble.merger import Merger, MergesClones
from ..ensemble.trainable import Trainable
from ..lora.adapters import Adapter
from ..lora.average import ExactAverageMerger
from ..lora.merger import ExactMerger, FactorMerger
from ..method.merging import CloneRule, Layout, SumRule


def merge_rule(config: Config) -> SumRule | CloneRule:
    """The rule that `--merge_rule` names, with its flags."""
    entry, settings = config.chosen(MERGE_RULES)
    rule: SumRule | CloneRule = entry.load()(settings)
    return rule


def build_mergers(
    config: Config,
    trainable: Trainable,
    adapter: Adapter | None,
    ema: EMA | None,
    ranks: Ranks,
    host: HostMemory,
) -> dict[str, MergesClones]:
    """The mergers of the "denoiser", and of its moving average, the "ema", if there is one.

    Args:
        trainable: the live tensors, holding what the run starts from.
        adapter: the LoRA layers, or None if the whole denoiser is trained.
        ema: the live moving average, or None.
    """
    ensemble = config.ensemble
    only = ensemble.num_shards == ranks.size == 1
    mergers: dict[str, MergesClones] = {}
    if adapter is not None and config.merges_exactly:
        mergers["denoiser"] = main = ExactMerger("denoiser", adapter, trainable.tensors, ranks, host)
        if ema is not None:
            mergers["ema"] = ExactAverageMerger("ema", adapter, ema.tensors, main, ranks, host)
    else:
        shared: dict[str, Any] = {"only_clone": only, "rule": merge_rule(config)}
        outer = ensemble.outer_lr, ensemble.outer_momentum
        mergers["denoiser"] = (
            Merger("denoiser", trainable.tensors, ranks, host, outer=outer, **shared)
            if adapter is None
            else FactorMerger("denoiser", adapter, trainable.tensors, ranks, host, outer=outer, **shared)
        )
        if ema is not None:
            mergers["ema"] = Merger("ema", ema.tensors, ranks, host, measured=False, **shared)
    return mergers


def need_of_mergers(
    config: Config, trainable: Trainable, adapter: Adapter | None, ema: EMA | None, placement: Placement
) -> Need:
    """Bytes on each rank of what `build_mergers` makes, and of what the adapter holds for it."""
    average = _bytes_merged(ema.tensors) if ema is not None else None
    weights = _bytes_merged(trainable.tensors)
    if adapter is not None and config.merges_exactly:
        need = adapter.need(placement) + ExactMerger.need(weights, adapter, placement)
        return need if average is None else need + ExactMerger.need(average, adapter, placement)
    rule, outer = merge_rule(config), (config.ensemble.outer_lr, config.ensemble.outer_momentum)
    need = Merger.need(weights, placement, outer, rule)
    return need if average is None else need + Merger.need(average, placement, rule=rule)


def _bytes_merged(tensors: Mapping[str, Tensor]) -> int:
    return 4 * Layout(tensors).size

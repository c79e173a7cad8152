"""Which merge goes with which settings."""

import torch

from ..config.config import Config
from ..distributed.groups import Ranks
from ..ensemble.ema import EMA
from ..ensemble.host import HostMemory
from ..ensemble.merger import Merger, MergesClones
from ..ensemble.optimizers import fresh_optimizer_state, named_state
from ..ensemble.trainable import Trainable
from ..lora.adapters import Adapter
from ..lora.merger import ExactAverageMerger, ExactMerger, FactorMerger


def build_mergers(
    config: Config,
    trainable: Trainable,
    adapter: Adapter | None,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    ranks: Ranks,
    host: HostMemory,
) -> dict[str, MergesClones]:
    """The mergers of the denoiser, of its moving average and of the moments, as far as the settings ask for them.

    Args:
        trainable: the live tensors, holding what the run starts from.
        adapter: the LoRA layers, or None if the whole denoiser is trained.
        optimizer: works on the trainable's parameters.
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
        outer = ensemble.outer_lr, ensemble.outer_momentum
        mergers["denoiser"] = (
            Merger("denoiser", trainable.tensors, ranks, host, only_clone=only, outer=outer)
            if adapter is None
            else FactorMerger("denoiser", adapter, trainable.tensors, ranks, host, only_clone=only, outer=outer)
        )
        if ema is not None:
            mergers["ema"] = Merger("ema", ema.tensors, ranks, host, only_clone=only, measured=False)
    if ensemble.optimizer_across_rounds == "average":
        start = named_state(fresh_optimizer_state(optimizer))
        mergers["moments"] = Merger("moments", start, ranks, host, only_clone=only, measured=False)
    return mergers

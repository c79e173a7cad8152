"""The memory that training keeps on a rank, all parts together."""

from typing import Any

from ..config.config import Config
from ..config.registry import SKIP_RULES
from ..distributed.groups import Placement
from ..ensemble.across_rounds import POLICIES
from ..ensemble.budget import Need
from ..ensemble.ema import EMA
from ..ensemble.optimizers import state_bytes
from ..ensemble.trainable import Trainable
from ..lora.adapters import Adapter
from ..method.rules import SkipRule
from .lending import REFERENCE
from .mergers import need_of_mergers


def need_of_run(
    config: Config, trainable: Trainable, adapter: Adapter | None, ema: EMA | None, placement: Placement, rank: int
) -> Need:
    """Bytes on a rank of what training keeps; of all the tensors only names and sizes count.

    Args:
        adapter: the LoRA layers, or None if the whole denoiser is trained.
        ema: the moving average, or None.
    """
    size = sum(parameter.nbytes for parameter in trainable.parameters.values())
    policy = POLICIES[config.ensemble.optimizer_across_rounds]
    below = adapter.nbytes if adapter is not None and config.merges_exactly and placement.num_shards > 1 else 0
    entry, settings = config.chosen(SKIP_RULES)
    rule = entry.load()
    needs = [
        trainable.need(placement),
        policy.need(state_bytes(size, config.optimizer), placement, rank),
        need_of_mergers(config, trainable, adapter, ema, placement),
        *([ema.need(placement)] if ema is not None else []),
        need_of_rule(rule, settings, size, below),
        # Gradients of class images are kept apart, where those of what skipped samples learn instead are too.
        Need(device=size if config.prior.is_on and not rule.teaches(settings) else 0),
    ]
    return sum(needs, Need())


def need_of_rule(rule: type[SkipRule], config: Any, weights: int, below: int) -> Need:
    """What a rule takes: the networks that it borrows, and gradients of what skipped samples learn instead.

    Args:
        config: the values of the rule's flags.
        weights: bytes of the trained tensors.
        below: of the frozen weights below adapters that are merged exactly, which change from round to round.
    """
    borrowed = rule.borrows_with(config)
    changed = sum(which != "merged" for which in borrowed)
    return Need(
        device=(len(borrowed) + rule.teaches(config)) * weights + changed * below,
        checkpoint=weights + below if REFERENCE in borrowed else 0,
    )

"""`iet-finetune fit`: chooses the settings for somebody's own images by rules, and gives a reason for each.

docs/fit.md lists the rules in a table, with the evidence that they rest on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

# Fewer held-out images cannot tell when to stop; the guard needs as many.
LEAST_HELDOUT = 8
# The largest share of a small set that is held out.
MOST_HELDOUT_SHARE = 0.3
HELDOUT_SHARE = 0.1
# Images keep their shapes if squares would cut off more than this, on average.
MOST_CUT = 0.05
GB = 10**9
# The flags that may be chosen.
CHOSEN = (
    *("dedup", "num_shards", "holdout_fraction", "agc_bins", "agc_bias_correction", "skip_rule", "stop_when"),
    *("num_train_epochs", "merge_every_epochs", "use_lora", "rank", "learning_rate", "lr_scheduler"),
    *("lr_warmup_steps", "use_ema", "caption_dropout", "resolution", "aspect_ratio_buckets", "train_batch_size"),
    *("gradient_accumulation_steps", "mixed_precision", "gradient_checkpointing", "validation_prompts"),
    *("num_validation_images", "checkpoints_total_limit", "audit", "features"),
)


@dataclass(frozen=True)
class Circumstances:
    """What the rules look at.

    Attributes:
        images: how many distinct ones there are.
        side: pixels of the median image's shorter side.
        own_side: of the images that the base model draws.
        adapters: whether LoRA adapters are trained, not the whole denoiser.
        prompts: some captions of the images; none for a model without prompts.
        cut: the share of the images that squares would cut off, on average; 0 where the model draws only squares.
        device_memory: bytes of the GPU; None without one.
        has_bf16: whether the GPU computes in bf16.
        can_audit: whether the packages that an audit needs are installed.
        features: what an audit can compare images by.
    """

    images: int
    side: int
    own_side: int
    adapters: bool
    prompts: tuple[str, ...] = ()
    cut: float = 0.0
    device_memory: int | None = None
    has_bf16: bool = True
    can_audit: bool = True
    features: tuple[str, ...] = ("effnet_lite0",)


class Choice(NamedTuple):
    """A flag's value, and why."""

    flag: str
    value: Any
    reason: str


def choose(found: Circumstances) -> list[Choice]:
    """The settings that fit the circumstances, in the order in which they are printed."""
    return [
        *_against_memorization(found),
        *_how_long(found),
        *_what_is_trained(found),
        *_what_fits(found),
        *_what_is_seen(found),
    ]


def held_out_share(images: int) -> float | None:
    """The share to hold out so that there are `LEAST_HELDOUT` images; None for a set that is too small."""
    # Shares are rounded to whole images, and to two digits here.
    share = max(HELDOUT_SHARE, -(-100 * LEAST_HELDOUT // images) / 100) if images else 1.0
    return share if share <= MOST_HELDOUT_SHARE else None


def _against_memorization(found: Circumstances) -> Iterator[Choice]:
    yield Choice("dedup", "near", "repeated images are memorized first")
    yield Choice("num_shards", 1, "measured on small sets: at the same quality, splitting did not lower memorization")
    share = held_out_share(found.images)
    if share is None:
        yield Choice("holdout_fraction", 0.0, f"{found.images} images are too few to hold any out")
        yield Choice("agc_bins", _bins(found.images), "with so few images, each noise level is visited seldom")
        yield Choice("agc_bias_correction", True, "so that the method acts from the first rounds on")
        return
    yield Choice("holdout_fraction", share, "tells when to stop, and gives the audit something to compare with")
    yield Choice("skip_rule", "guard", "skips images whose loss has fallen further than held-out images' losses")


def _bins(images: int) -> int:
    """So few noise levels that each is visited some forty times in forty passes, ten at most."""
    return max(2, min(10, images // 2))


def _how_long(found: Circumstances) -> Iterator[Choice]:
    if held_out_share(found.images) is None:
        yield Choice("num_train_epochs", 60, "a rule of thumb: without held-out images, nothing tells when to stop")
        yield Choice("merge_every_epochs", 10, "validation images after every tenth pass")
        return
    passes = max(10, min(200, 60_000 // found.images))
    yield Choice("stop_when", "auto", "stops once the model gets no better on held-out images; keeps the best round")
    yield Choice("num_train_epochs", passes, "at most")
    yield Choice("merge_every_epochs", 4 if passes >= 40 else 1, "passes between two looks at the held-out images")


def _what_is_trained(found: Circumstances) -> Iterator[Choice]:
    if found.adapters:
        rank = 4 if found.images < 100 else 8 if found.images < 1000 else 16
        yield Choice("use_lora", True, "needs little memory, and has less room to memorize single images")
        yield Choice("rank", rank, "the fewer images, the lower")
    yield Choice("learning_rate", 1e-4 if found.adapters else 1e-5, "usual for " + _kind(found))
    yield Choice("lr_scheduler", "constant_with_warmup", "the run may end early")
    yield Choice("lr_warmup_steps", 50, "a short warm-up")
    yield Choice("use_ema", True, "the moving average of the weights draws better than the last step")
    if found.prompts:
        yield Choice("caption_dropout", 0.1, "keeps classifier-free guidance working")


def _kind(found: Circumstances) -> str:
    return "LoRA adapters" if found.adapters else "a whole denoiser"


def _what_fits(found: Circumstances) -> Iterator[Choice]:
    resolution = found.own_side
    if found.side * 2 <= found.own_side:
        resolution = max(64, found.own_side // 2)
    small = resolution < found.own_side
    reason = "half of what the base model draws, as your images are small" if small else "what the base model draws"
    yield Choice("resolution", resolution, reason)
    if found.cut > MOST_CUT:
        cut = f"squares would cut off {found.cut:.0%} of the images, on average"
        yield Choice("aspect_ratio_buckets", "auto", cut)
    memory = found.device_memory
    if memory is None:
        yield Choice("train_batch_size", 4, "usual")
        return
    batch = 4 if memory >= 15 * GB else 2 if memory >= 10 * GB else 1
    yield Choice("train_batch_size", batch, f"for a GPU of {memory / GB:.0f} GB")
    if batch < 4:
        yield Choice("gradient_accumulation_steps", 4 // batch, "four images in each step")
    yield Choice("mixed_precision", "bf16" if found.has_bf16 else "fp16", "half the memory, and faster")
    if memory < 30 * GB:
        yield Choice("gradient_checkpointing", True, "saves memory, and costs a fifth of the speed")


def _what_is_seen(found: Circumstances) -> Iterator[Choice]:
    if found.prompts:
        yield Choice("validation_prompts", list(found.prompts), "some of your captions")
        yield Choice("num_validation_images", 2, "for each prompt")
    yield Choice("checkpoints_total_limit", 2, "a checkpoint can be as large as the model")
    if found.can_audit:
        yield Choice("audit", True, "to measure what the result remembers")
        bundled = found.features == ("effnet_lite0",)
        reason = (
            "DINOv2 tells images apart better, but is not available here" if bundled else "tells images apart well"
        )
        yield Choice("features", list(found.features), reason)
    else:
        yield Choice("audit", False, "its packages are missing: pip install 'iet_finetune[audit]'")

"""An adapter's factors as peft keeps them, and the matrix of which they are factors; LoRA's scaling."""

import math

from torch import Tensor

from .spectra import LowRank, float64


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor before B A in LoRA's update: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def fold_scaling(factors: LowRank, scaling: float) -> LowRank:
    """The update scaling · B A of an adapter's factors B and A, half of it in each, so that balanced ones stay so.

    Float64; fp32 factors that `unfold_scaling` takes out of it again are, in fp32, the same bit for bit.
    """
    root = _root(scaling)
    return LowRank(float64(factors.up) * root, float64(factors.down) * root)


def unfold_scaling(update: LowRank, scaling: float) -> LowRank:
    """The factors B and A, float64, of which scaling · B A is the update."""
    root = _root(scaling)
    return LowRank(float64(update.up) / root, float64(update.down) / root)


def as_matrix(up_weight: Tensor, down_weight: Tensor) -> LowRank:
    """peft's `lora_B.weight` and `lora_A.weight` of a linear or convolution layer, as the factors of one matrix.

    up · down is then the update of the layer's weight, (out, in, kh, kw) as (out, in·kh·kw), without the scaling.

    Args:
        up_weight: (out, r), or (out, r, 1, 1) of a convolution.
        down_weight: (r, in), or (r, in, kh, kw).

    Raises:
        ValueError: the shapes are not those of such a pair; a grouped convolution's are not.
    """
    up, down = up_weight.detach().flatten(1), down_weight.detach().flatten(1)
    if up_weight.dim() != down_weight.dim() or up.shape[1] != down.shape[0] or math.prod(up_weight.shape[2:]) != 1:
        shapes = f"{tuple(up_weight.shape)} and {tuple(down_weight.shape)}"
        raise ValueError(f"weights of shape {shapes} are not the up and down of one layer without groups")
    return LowRank(up, down)


def as_weights(matrix: LowRank, up_like: Tensor, down_like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as weights of a layer whose own look like these but may have another rank; what `as_matrix` undoes.

    Returns:
        (out, r) and (r, in), or (out, r, 1, 1) and (r, in, kh, kw), of the same dtype and device as those.
    """
    up = matrix.up.reshape(matrix.up.shape[0], matrix.rank, *up_like.shape[2:])
    down = matrix.down.reshape(matrix.rank, *down_like.shape[1:])
    return up.to(up_like), down.to(down_like)


def _root(scaling: float) -> float:
    if not 0 < scaling < math.inf:
        raise ValueError(f"LoRA's scaling must be positive, not {scaling}")
    return math.sqrt(scaling)

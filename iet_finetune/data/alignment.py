"""How much of an image another one explains when it is laid upon it: moved, scaled, brighter or darker.

Gauss-Newton steps on the squared difference, as in Lucas and Kanade, "An Iterative Image Registration Technique with
an Application to Stereo Vision", 1981, with gain and bias as further unknowns.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Scales may be so far from 1, and shifts that much of half a side, in all and in one step.
MOST_SCALE, MOST_SHIFT, MOST_STEP = 1.35, 0.5, 0.1
# Variance, of values in [0, 1], that counts as nothing: flat images explain each other.
NOTHING = 1e-3
# Of a part of the frame that is compared, beside what lies outside the other image.
LEAST_SEEN = 0.6
# So near to white a value may have been cut off.
CUT_OFF = 0.01
_DAMPING = 1e-3


@dataclass(frozen=True)
class Placement:
    """Where points (x, y) of n images, in [-1, 1]², lie in their partners: at (a x + c, b y + d).

    Attributes:
        scale, shift: (n, 2) fp32: a, b and c, d.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, count: int) -> "Placement":
        """Each point lies where it is."""
        return cls(torch.ones(count, 2), torch.zeros(count, 2))

    def at(self, rows: Tensor) -> "Placement":
        """Of some of the images."""
        return Placement(self.scale[rows], self.shift[rows])


def align(images: Tensor, partners: Tensor, placed: Placement, steps: int) -> Placement:
    """Moves the partners so that they explain the images better.

    Args:
        images, partners: (n, C, H, W) fp32 in [0, 1].
        placed: where to begin.
        steps: of Gauss-Newton.
    """
    for _ in range(steps):
        moved, seen = _moved(partners, placed)
        known = seen * ~(_cut_off(images) | _cut_off(moved))
        unknowns = _least_squares(_jacobian(moved, placed) * known[..., None], images * known)
        gain = unknowns[:, 4:5].clamp(0.3, 3.0)
        steps_ = (unknowns[:, :4] / gain).clamp(-MOST_STEP, MOST_STEP)
        placed = Placement(
            (placed.scale + steps_[:, :2]).clamp(1 / MOST_SCALE, MOST_SCALE),
            (placed.shift + steps_[:, 2:]).clamp(-MOST_SHIFT, MOST_SHIFT),
        )
    return placed


class Left(NamedTuple):
    """What is left of n images when their partners, as they are placed, are taken off with the best gain and bias.

    The first three are 1 where less than `LEAST_SEEN` of an image is covered.

    Attributes:
        share: (n,) of the image's variance.
        part: (n,) the greatest mean difference, in [0, 1], of a part of an 8 x 8 grid.
        difference: (n,) root mean square of the difference, in [0, 1].
        gain, bias: (n,) what a partner's values were multiplied by, and what was added.
    """

    share: Tensor
    part: Tensor
    difference: Tensor
    gain: Tensor
    bias: Tensor


def left(images: Tensor, partners: Tensor, placed: Placement) -> Left:
    """What the partners do not explain; arguments as those of `align`."""
    moved, seen = _moved(partners, placed)
    known = seen * ~(_cut_off(images) | _cut_off(moved))
    columns = torch.stack([moved, torch.ones_like(moved)], -1) * known[..., None]
    gain, bias = _least_squares(columns, images * known).T[..., None, None, None]
    over = images - gain * moved - bias
    # White may have been cut off: it says that a value was so great at least.
    over = torch.where(_cut_off(images), over.clamp(min=0), over)
    over = torch.where(_cut_off(moved), over.clamp(max=0), over)
    over = over * seen
    covered = seen.mean(dim=(1, 2, 3)).clamp(min=1e-6)
    mean = ((images * seen).mean(dim=(1, 2, 3)) / covered)[:, None, None, None]
    variance = (((images - mean) * seen) ** 2).mean(dim=(1, 2, 3)) / covered
    squares = (over**2).mean(dim=(1, 2, 3)) / covered
    part = F.adaptive_avg_pool2d(over, 8).abs().flatten(1).amax(dim=1)
    measures = (squares / (variance + NOTHING)).clamp(max=1), part, squares.sqrt()
    share, part, difference = (each.masked_fill(covered < LEAST_SEEN, 1.0) for each in measures)
    return Left(share, part, difference, gain.flatten(), bias.flatten())


def _cut_off(values: Tensor) -> Tensor:
    return values > 1 - CUT_OFF


def _moved(partners: Tensor, placed: Placement) -> tuple[Tensor, Tensor]:
    """The partners as they are placed, and (n, 1, H, W) 1 where they cover the frame."""
    matrix = torch.zeros(len(partners), 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = placed.scale.T
    matrix[:, :, 2] = placed.shift
    grid = F.affine_grid(matrix, list(partners.shape), align_corners=False)
    seen = (grid.abs() <= 1).all(dim=-1)[:, None].float()
    return F.grid_sample(partners, grid, padding_mode="border", align_corners=False), seen


def _jacobian(moved: Tensor, placed: Placement) -> Tensor:
    """(n, C, H, W, 6): derivatives by the two scales and shifts, and the terms of gain and bias."""
    height, width = moved.shape[2:]
    wide = F.pad(moved, (1, 1, 1, 1), "replicate")
    # By the place in the frame; by the place in the partner it is that over the scale.
    across = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) * (width / 4) / placed.scale[:, 0, None, None, None]
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) * (height / 4) / placed.scale[:, 1, None, None, None]
    x, y = ((torch.arange(side) + 0.5) * 2 / side - 1 for side in (width, height))
    return torch.stack([across * x, down * y[:, None], across, down, moved, torch.ones_like(moved)], -1)


def _least_squares(columns: Tensor, values: Tensor) -> Tensor:
    """(n, p): what each of the columns (n, ..., p) counts for their sum to come next to the values (n, ...)."""
    columns, values = columns.flatten(1, -2), values.flatten(1)[..., None]
    transposed = columns.transpose(1, 2)
    damping = _DAMPING * torch.eye(columns.shape[-1])
    return torch.linalg.solve(transposed @ columns + damping, transposed @ values)[..., 0]

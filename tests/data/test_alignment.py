"""One image is laid on another: where it lies is found, and what it leaves is what a slow search leaves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from iet_finetune.data.alignment import Placement, align, left


def smooth_images(count, side=32, seed=0, channels=3):
    """(count, channels, side, side) fp32 in [0.1, 0.9]."""
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False).clamp(0, 1) * 0.8 + 0.1


def laid(image, scale, shift):
    """The image (C, H, W) seen at (a x + c, b y + d) of its own coordinates in [-1, 1], by SciPy; and what is seen."""
    height, width = image.shape[1:]
    y, x = ((np.arange(side) + 0.5) * 2 / side - 1 for side in (height, width))
    y, x = np.meshgrid(y * scale[1] + shift[1], x * scale[0] + shift[0], indexing="ij")
    places = (y + 1) * height / 2 - 0.5, (x + 1) * width / 2 - 0.5
    moved = [map_coordinates(channel.numpy(), places, order=1, mode="nearest") for channel in image]
    return np.stack(moved), (abs(x) <= 1) & (abs(y) <= 1)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_a_moved_image_is_put_back(shape):
    scale, shift = (1.06, 0.95), (0.07, -0.11)
    partners = F.interpolate(smooth_images(8), shape, mode="bicubic", align_corners=False).clamp(0.02, 0.9)
    images = torch.stack([torch.from_numpy(0.8 * laid(each, scale, shift)[0] + 0.05) for each in partners]).float()
    placed = align(images, partners, Placement.identity(8), steps=15)
    torch.testing.assert_close(placed.scale, torch.tensor(scale).expand(8, 2), atol=0.01, rtol=0)
    torch.testing.assert_close(placed.shift, torch.tensor(shift).expand(8, 2), atol=0.01, rtol=0)
    over = left(images, partners, placed)
    assert over.share.max() < 1e-3
    torch.testing.assert_close(over.gain, torch.full((8,), 0.8), atol=0.02, rtol=0)
    torch.testing.assert_close(over.bias, torch.full((8,), 0.05), atol=0.02, rtol=0)


def test_what_is_left_is_what_the_formula_says():
    images, partners = smooth_images(6, seed=1), smooth_images(6, seed=2)
    scale, shift = (0.9, 1.1), (0.2, -0.1)
    placed = Placement(torch.tensor(scale).repeat(6, 1), torch.tensor(shift).repeat(6, 1))
    over = left(images, partners, placed)
    for number in range(6):
        moved, seen = laid(partners[number], scale, shift)
        ours, theirs = images[number].numpy()[:, seen].ravel(), moved[:, seen].ravel()
        (gain, bias), *_ = np.linalg.lstsq(np.stack([theirs, np.ones_like(theirs)], 1), ours, rcond=None)
        residual = (images[number].numpy() - gain * moved - bias) * seen
        squares = (residual**2).sum() / (3 * seen.sum())
        np.testing.assert_allclose(over.share[number], squares / (ours.var() + 1e-3), rtol=1e-3)
        np.testing.assert_allclose(over.difference[number], squares**0.5, rtol=1e-3)
        parts = residual.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4))
        np.testing.assert_allclose(over.part[number], abs(parts).max(), rtol=1e-2)


def test_what_was_cut_off_at_white_is_not_held_against_an_image():
    image = smooth_images(1, seed=3)
    brighter = (image * 1.5).clamp(max=1)
    assert (brighter == 1).float().mean() > 0.1
    here = Placement.identity(1)
    for ours, theirs in ((brighter, image), (image, brighter)):
        assert left(ours, theirs, here).share < 1e-4
    # But it is where the other one is darker than white says.
    assert left(brighter, torch.where(brighter == 1, 0.2, image), here).share > 0.1


def test_an_image_that_is_hardly_covered_is_not_explained():
    image = smooth_images(1, seed=4)
    away = Placement(torch.ones(1, 2), torch.full((1, 2), 0.9))
    assert all(measure == 1 for measure in left(image, image, away)[:3])

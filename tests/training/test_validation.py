"""How the pictures drawn while training are put side by side."""

import numpy as np
from PIL import Image

from iet_finetune.training.validation import grid


def squares(count: int, side: int = 28) -> list[Image.Image]:
    """Grey squares, each of a shade of its own."""
    return [Image.new("L", (side, side), shade) for shade in range(count)]


def test_pictures_without_a_prompt_stand_in_rows_of_eight():
    sheet = np.asarray(grid([squares(19)], [""]))
    assert sheet.shape == (3 * 28, 8 * 28, 3)
    for place in range(19):
        assert (sheet[place // 8 * 28 : place // 8 * 28 + 28, place % 8 * 28 : place % 8 * 28 + 28] == place).all()
    assert (sheet[56:, 3 * 28 :] == 255).all()


def test_fewer_than_eight_pictures_make_one_row():
    assert grid([squares(2)], [""]).size == (56, 28)


def test_every_prompt_has_a_row_with_its_name_above():
    sheet = grid([squares(9, 32), squares(9, 32)], ["bag", "hat"])
    assert sheet.size == (9 * 32, 2 * (32 + 16))
    assert np.asarray(sheet.crop((0, 0, 160, 16))).min() < 100

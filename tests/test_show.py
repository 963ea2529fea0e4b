"""Pictures for notebooks: amounts land on the pixels that they stand for, numbers in their cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from idc.show import COLOURS, film, heat, matrix, plot, side_by_side


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def close_to(picture: Image.Image, colour: str) -> np.ndarray:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels(picture) - wanted) < 8).all(-1)


def test_heat_lies_on_the_frames_and_patches_of_its_tokens() -> None:
    amount = torch.zeros(3, 2, 2)
    amount[1, 0, 1] = 1.0  # the second latent frame stands for frames 1 to 4
    shown = heat(torch.zeros(3, 9, 32, 32), amount)
    bright = shown[0] > shown[0].min() + 0.1
    expected = torch.zeros(9, 32, 32, dtype=torch.bool)
    expected[1:5, :16, 16:] = True
    assert torch.equal(bright, expected)
    assert shown.shape == (3, 9, 32, 32)
    assert shown.abs().max() <= 1


def test_heat_on_the_videos_own_grid_and_of_nothing() -> None:
    amount = torch.rand(5, 16, 16)
    shown = heat(torch.zeros(3, 5, 16, 16), amount, high=1.0)
    order = amount[0].flatten().argsort()
    assert (shown[0, 0].flatten()[order].diff() >= 0).all()
    assert torch.isfinite(heat(torch.zeros(3, 5, 16, 16), torch.zeros(2, 2, 2))).all()


@pytest.mark.parametrize("grid", [(4, 2, 2), (2, 3, 2)])
def test_heat_refuses_a_grid_that_does_not_fit(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        heat(torch.zeros(3, 5, 16, 16), torch.zeros(grid))


def test_matrix_is_the_darker_the_larger_and_empty_without_a_number() -> None:
    picture = pixels(matrix([[0.0, 0.5, 1.0, None]], ["row"], ["a", "b", "c", "d"]))
    line = picture[picture.shape[0] - 17]  # through the cells, below their numbers
    fills = [tuple(c) for c in line]
    runs = [c for i, c in enumerate(fills) if i >= 20 and fills[i - 20 : i] == [c] * 20]
    seen = [c for i, c in enumerate(runs) if i == 0 or runs[i - 1] != c]
    assert (255, 255, 255) in seen
    assert (0, 114, 178) in seen
    assert any(0 < c[0] < 255 for c in seen)


def test_a_curve_stays_at_its_height_and_has_gaps() -> None:
    high = close_to(plot({"a": [1.0, 1.0, None, 1.0]}, width=300), COLOURS[0])
    low = close_to(plot({"a": [0.0, 0.0, None, 0.0]}, width=300), COLOURS[0])
    height = [np.nonzero(found[:, 44:345])[0].mean() for found in (high, low)]
    assert height[1] - height[0] == pytest.approx(190, abs=3)
    assert high[:, 60:140].any(0).all()  # from 0 to 1
    assert not high[:, 160:330].any()  # from 1 over the gap to 3


def test_curves_without_values_and_names_that_would_collide() -> None:
    assert plot({}).size[0] > 0
    assert plot({"a": []}).size[0] > 0
    many = plot({f"curve {n}": [0.5] for n in range(6)})
    rows = [np.nonzero(close_to(many, colour)[:, 510:])[0].mean() for colour in COLOURS]
    assert (np.diff(rows) > 10).all()


def test_film_shows_each_clip_with_its_references() -> None:
    one = film({"a": torch.ones(3, 5, 16, 16)})
    two = film({"a": torch.ones(3, 5, 16, 16), "b": -torch.ones(3, 5, 16, 16)}, {"b": [torch.zeros(3, 8, 8)]})
    assert two.width > one.width
    assert two.height > one.height
    assert (pixels(two)[-80, :200] == 0).any()  # the black clip is the lower row
    pair = side_by_side(one, two)
    assert pair.size == (one.width + two.width + 12, two.height)

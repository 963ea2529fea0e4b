"""Sizes of references and clips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.data.images import cover_crop, fit_reference, reference_size, to_float

SIDES = st.integers(1, 3000)


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.sampled_from([256, 4096, 65536, 262144]))
def test_references_stay_under_the_cap_in_multiples_of_16(height: int, width: int, cap: int):
    new_height, new_width = reference_size(height, width, cap)
    assert new_height % 16 == new_width % 16 == 0
    assert new_height * new_width <= cap
    assert min(new_height, new_width) >= 16
    assert new_height < height + 16
    assert new_width < width + 16


@pytest.mark.parametrize(
    ("size", "cap", "expected"),
    [((32, 32), 262144, (32, 32)), ((1080, 1920), 262144, (384, 672)), ((1000, 1000), 4096, (64, 64))],
)
def test_the_aspect_ratio_is_kept(size: tuple, cap: int, expected: tuple):
    assert reference_size(*size, cap) == expected


def test_pictures_that_fit_are_left_alone_and_others_keep_their_colours():
    picture = torch.rand(3, 32, 48) * 2 - 1
    assert torch.equal(fit_reference(picture, 65536), picture)
    flat = torch.full((3, 100, 70), 0.25)
    assert torch.allclose(fit_reference(flat, 4096), torch.tensor(0.25), atol=1e-5)
    edge = torch.where(torch.arange(100) < 50, -1.0, 1.0).expand(3, 100, 100)
    assert fit_reference(edge, 1024).abs().max() <= 1  # bicubic overshoots at edges


def test_clips_are_covered_and_cropped_where_told():
    ramp = torch.arange(96, dtype=torch.uint8).expand(2, 3, 32, 96)
    for offset, first in ((0.0, 0), (0.5, 32), (1.0, 64)):
        assert torch.equal(cover_crop(ramp, 32, 32, (0.5, offset)), ramp[..., first : first + 32])
    assert cover_crop(ramp, 16, 32).shape == (2, 3, 16, 32)
    assert cover_crop(torch.zeros(1, 3, 31, 45, dtype=torch.uint8), 32, 48).shape == (1, 3, 32, 48)


def test_bytes_map_to_the_ends_of_the_range():
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]

"""Boxes that detectors find in pictures, and which of them count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from idc.models.pretrained import Picture

MOST_BOXES = 100  # of one picture


class Detection(NamedTuple):
    """A box in pixels of the picture, within it and with an area, and the detector's confidence in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float
    score: float

    def crop(self, picture_HWC: Picture) -> Picture:
        """The pixels of the box, its sides rounded outwards where rounding would leave nothing."""
        height, width = picture_HWC.shape[:2]
        left, top = min(round(self.left), width - 1), min(round(self.top), height - 1)
        return picture_HWC[top : max(top + 1, round(self.bottom)), left : max(left + 1, round(self.right))]


def corners(boxes_N4: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), float32."""
    x, y, width, height = boxes_N4.float().unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)


def best_boxes(
    boxes_N4: Tensor, scores_N: Tensor, size: tuple[int, ...], threshold: float, nms: float
) -> list[Detection]:
    """Boxes of a confidence above `threshold`, cut to the picture, without lesser ones that overlap a better one by
    more than `nms` (intersection over union); best first, at most 100. Those of less than a pixel are dropped.

    Args:
        boxes_N4: left, top, right, bottom in pixels.
        size: the picture's (height, width).
    """
    height, width = size
    kept_N = scores_N > threshold
    limits = boxes_N4.new_tensor([width, height, width, height])
    boxes_N4 = boxes_N4[kept_N].clamp(boxes_N4.new_zeros(4), limits).cpu()
    order = scores_N[kept_N].cpu().argsort(descending=True, stable=True)
    boxes_N4, scores = boxes_N4[order], scores_N[kept_N].cpu()[order]
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(-1)
    best: list[int] = []
    alive_N = area_N >= 1
    while alive_N.any() and len(best) < MOST_BOXES:
        first = int(alive_N.int().argmax())
        best.append(first)
        overlap_N = (
            torch.minimum(boxes_N4[:, 2:], boxes_N4[first, 2:]) - torch.maximum(boxes_N4[:, :2], boxes_N4[first, :2])
        ).clamp(min=0)
        shared_N = overlap_N.prod(-1)
        alive_N = alive_N & (shared_N / (area_N + area_N[first] - shared_N) <= nms)
        alive_N[first] = False
    rows = torch.cat([boxes_N4, scores[:, None]], 1)[best].tolist()
    return [Detection(left, top, right, bottom, score) for left, top, right, bottom, score in rows]

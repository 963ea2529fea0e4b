"""What of a picture is subject and what is background, without a network: enough for pictures of one subject."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Mask, Pixels

_EVEN = 12  # levels by which a plain background's colours may differ from those at the picture's edge
_CUT_SIDE = 160  # pixels: GrabCut takes seconds on more
_PLAIN = 0.9  # of the border's pixels that are one colour make a background plain


def subject_mask(picture_HWC: Pixels, seed: int = 0) -> Mask:
    """What of a picture is subject, bool `[H, W]`.

    Before a plain background (nearly all of the border in one colour) what is not joined to the border in that colour;
    else what GrabCut finds from a rectangle just inside the border. All of the picture where neither finds anything.
    """
    import cv2

    height, width = picture_HWC.shape[:2]
    colour = np.array(edge_colour(picture_HWC))
    even = (np.abs(picture_HWC.astype(np.int16) - colour) <= _EVEN).all(-1)
    border = np.concatenate([even[0], even[-1], even[:, 0], even[:, -1]])
    if border.mean() >= _PLAIN:
        _, parts = cv2.connectedComponents(even.astype(np.uint8), connectivity=4)
        rim = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
        inside = ~np.isin(parts, np.unique(rim[border])) if border.any() else np.ones_like(even)
        return inside if inside.any() else np.ones((height, width), bool)
    return _grab_cut(picture_HWC, seed)


def _grab_cut(picture_HWC: Pixels, seed: int) -> Mask:
    import cv2

    height, width = picture_HWC.shape[:2]
    scale = min(1.0, _CUT_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if min(size) < 16:
        return np.ones((height, width), bool)
    small = np.ascontiguousarray(cv2.resize(picture_HWC, size, interpolation=cv2.INTER_AREA)[..., ::-1])
    labels: NDArray[np.uint8] = np.zeros((size[1], size[0]), np.uint8)
    margin = max(1, min(size) // 20)
    rectangle = (margin, margin, size[0] - 2 * margin, size[1] - 2 * margin)
    cv2.setRNGSeed(seed % 2**31)  # its first clusters are drawn
    cv2.grabCut(small, labels, rectangle, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_RECT)
    inside = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    whole = np.asarray(cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST), bool)
    return whole if whole.any() else np.ones((height, width), bool)


def edge_colour(picture_HWC: Pixels) -> tuple[float, ...]:
    """The median colour of the border."""
    edge = np.concatenate([picture_HWC[0], picture_HWC[-1], picture_HWC[:, 0], picture_HWC[:, -1]])
    return tuple(float(value) for value in np.median(edge, axis=0))

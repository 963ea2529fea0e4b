"""Where a new shot begins."""

from __future__ import annotations

import numpy as np


def is_cut(before: np.ndarray, now: np.ndarray) -> bool:
    """Whether a new shot begins between two successive RGB uint8 frames `[H, W, 3]`: their colours hardly overlap."""
    return bool(np.minimum(_colours(before), _colours(now)).sum() < 0.5)


def _colours(picture: np.ndarray) -> np.ndarray:
    """Shares of 4 x 4 x 4 colours in each quarter of a picture, which sum to 1."""
    step = max(1, min(picture.shape[:2]) // 90)
    codes = picture[::step, ::step].astype(np.int64) // 64 @ np.array([16, 4, 1])
    height, width = codes.shape
    parts = [
        codes[y : y + (height + 1) // 2, x : x + (width + 1) // 2] for y in (0, height // 2) for x in (0, width // 2)
    ]
    histogram = np.concatenate([np.bincount(part.ravel(), minlength=64) for part in parts])
    return histogram / histogram.sum()

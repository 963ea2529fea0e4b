"""Words placed by their frequency, none over another: a word cloud, the same for the same counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMALLEST, LARGEST = 13.0, 64.0  # pixels of type
ASCENT, DESCENT = 0.76, 0.24  # of the size
MARGIN = 3.0
FILLED = 0.5  # share of the room that words may take
TURN, GROWTH = 0.35, 3.2  # radians a try, and pixels of radius a turn


class Placed(NamedTuple):
    """A word at its place: the left end of its base line, its size and its width in pixels."""

    word: str
    times: int
    x: float
    y: float
    size: float
    width: float


def place_words(counts: Sequence[tuple[str, int]], width: float, height: float) -> list[Placed]:
    """Place the words in a rectangle, the most frequent first and in the middle, the others in a spiral around it.

    The area of a word's type goes with its count. Words that find no place are left out.

    Args:
        counts: most frequent first.
    """
    if not counts:
        return []
    boxes = np.zeros((0, 4))
    placed: list[Placed] = []
    for (word, count), size in zip(counts, _sizes(counts, width * height), strict=True):
        long = text_width(word, size)
        box = _find(boxes, long + 2 * MARGIN, size * (ASCENT + DESCENT), width, height)
        if box is None:
            continue
        boxes = np.vstack([boxes, box])
        placed.append(Placed(word, count, float(box[0]) + MARGIN, float(box[1]) + size * ASCENT, size, long))
    return placed


def _sizes(counts: Sequence[tuple[str, int]], room: float) -> list[float]:
    """Sizes of type that go with the square root of the counts, the largest such that all words fill half the room."""
    most, least = counts[0][1], counts[-1][1]
    shares = [math.sqrt((count - least) / (most - least)) if most > least else 0.5 for _, count in counts]
    widths = [text_width(word, 1.0) for word, _ in counts]
    low, high = SMALLEST, LARGEST
    for _ in range(12):
        middle = (low + high) / 2
        sizes = [SMALLEST + (middle - SMALLEST) * share for share in shares]
        full = sum(width * size * size for width, size in zip(widths, sizes, strict=True)) > FILLED * room
        low, high = (low, middle) if full else (middle, high)
    return [SMALLEST + (low - SMALLEST) * share for share in shares]


def text_width(word: str, size: float) -> float:
    """About how wide a word is in a bold sans-serif type; Pillow's own font is measured, so that it is the same
    wherever the figure is drawn."""
    from PIL import ImageFont

    return 1.1 * ImageFont.load_default(40).getlength(word) * size / 40


def _find(boxes: np.ndarray, wide: float, tall: float, width: float, height: float) -> np.ndarray | None:
    """The first free box (left, top, right, bottom) on the spiral from the middle, or None."""
    if wide > width or tall > height:
        return None
    flat = width / height
    turns = int(max(width, height) / GROWTH * 2 * math.pi / TURN)
    angles = TURN * np.arange(turns)
    radii = GROWTH * angles / (2 * math.pi)
    lefts = width / 2 + radii * np.cos(angles) * math.sqrt(flat) - wide / 2
    tops = height / 2 + radii * np.sin(angles) / math.sqrt(flat) - tall / 2
    free = (lefts >= 0) & (tops >= 0) & (lefts + wide <= width) & (tops + tall <= height)
    for left, top, right, bottom in boxes:
        free &= (lefts >= right) | (lefts + wide <= left) | (tops >= bottom) | (tops + tall <= top)
    places = np.flatnonzero(free)
    if not places.size:
        return None
    left, top = lefts[places[0]], tops[places[0]]
    return np.array([left, top, left + wide, top + tall])

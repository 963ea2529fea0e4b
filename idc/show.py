"""Pictures for notebooks, drawn with Pillow alone: clips in rows, heat maps over frames, tables of numbers, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idc.types import TEMPORAL_FACTOR, Sample, Subject

if TYPE_CHECKING:
    from PIL.Image import Image

# Okabe and Ito's palette, told apart by the colour-blind; and dark to light by way of red, for amounts.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
RAMP = np.array([[10, 10, 40], [95, 20, 110], [190, 55, 85], [248, 140, 20], [252, 250, 160]], np.float64)
INK, RULE = "#222222", "#d8d8d8"
CELL, LINE = 58, 18  # pixels: the width of a table's cell, the height of a line of text


def film(
    clips: Mapping[str, Tensor],
    references: Mapping[str, Sequence[Tensor]] | None = None,
    frames: int = 6,
    height: int = 96,
) -> Image:
    """Clips as rows of frames with their label below, and references behind them (`idc.curate.sheet`).

    Args:
        clips: label -> `[3, T, H, W]` in [-1, 1].
        references: label -> pictures `[3, H, W]` in [-1, 1]; a label may be missing.
        frames: of each clip, evenly spaced. height: of a row, in pixels.
    """
    from PIL import Image

    from idc.curate.sheet import contact_sheet

    behind = references or {}
    samples = [
        Sample(label, "", clip.detach().cpu(), tuple(Subject(picture) for picture in behind.get(label, ())), fps=1.0)
        for label, clip in clips.items()
    ]
    return Image.fromarray(contact_sheet(samples, frames, height))


def heat(video_CTHW: Tensor, amount_THW: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """The clip in grey under a heat map.

    Args:
        video_CTHW: in [-1, 1].
        amount_THW: on the video's own grid, or on a coarser one of its latents or tokens: T' frames of which the
            first stands for one frame and each other for four, and sides that divide the video's.
        low, high: the amounts that are darkest and lightest; `high` is by default the largest.

    Returns:
        a clip like `video_CTHW`.

    Raises:
        ValueError: for amounts on a grid that does not fit the video.
    """
    frames, height, width = video_CTHW.shape[1:]
    if len(amount_THW) != frames:
        repeats = torch.tensor([1] + [TEMPORAL_FACTOR] * (len(amount_THW) - 1))
        amount_THW = amount_THW.detach().cpu().repeat_interleave(repeats, 0)
    rows, columns = amount_THW.shape[1:]
    if len(amount_THW) != frames or height % rows or width % columns:
        raise ValueError(f"amounts on a grid of {tuple(amount_THW.shape)} for a video of {tuple(video_CTHW.shape[1:])}")
    amount = amount_THW.detach().cpu().repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
    high = float(amount.max()) if high is None else high
    share = ((amount - low) / max(high - low, 1e-12)).clamp(0, 1)
    colour = torch.from_numpy(_ramp(share.numpy())).movedim(-1, 0).float() / 127.5 - 1
    return 0.4 * video_CTHW.detach().cpu().mean(0, keepdim=True) + 0.6 * colour


def matrix(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    low: float = 0.0,
    high: float = 1.0,
) -> Image:
    """Numbers as a table whose cells are the darker the larger they are; None is an empty cell."""
    from PIL import Image, ImageDraw

    left = 16 + max((_width(name) for name in rows), default=0)
    cell = max(CELL, *(12 + _width(name) for name in columns))
    top = 10 + LINE * (2 if title else 1)
    image = Image.new("RGB", (max(left + cell * len(columns), _width(title)) + 12, top + 30 * len(rows) + 10), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), title, INK, _font(13))
    for x, name in enumerate(columns):
        draw.text((left + cell * (x + 0.5), top - 8), name, INK, _font(), anchor="ms")
    for y, (name, line) in enumerate(zip(rows, values, strict=True)):
        middle = top + 30 * y + 15
        draw.text((left - 8, middle), name, INK, _font(), anchor="rm")
        for x, value in enumerate(line):
            box = (left + cell * x, middle - 15, left + cell * (x + 1) - 2, middle + 13)
            if value is None or not math.isfinite(value):
                draw.rectangle(box, outline=RULE)
                continue
            share = min(max((value - low) / max(high - low, 1e-12), 0.0), 1.0)
            # From white to the palette's blue.
            fill = tuple(round(255 + share * (end - 255)) for end in (0, 114, 178))
            draw.rectangle(box, fill=fill, outline=RULE)
            ink = "white" if share > 0.55 else INK
            draw.text((left + cell * (x + 0.5), middle), f"{value:.2f}", ink, _font(), anchor="mm")
    return image


def plot(
    curves: Mapping[str, Sequence[float | None]],
    title: str = "",
    x_label: str = "frame",
    low: float = 0.0,
    high: float = 1.0,
    width: int = 460,
    height: int = 190,
) -> Image:
    """Curves over 0, 1, 2, ...; where a value is None the curve has a gap. Each is named at its end.

    Curves that coincide are drawn a little beside each other.
    """
    from PIL import Image, ImageDraw

    right = 24 + max((_width(name) for name in curves), default=0)
    x0, y0, x1, y1 = 44, 34, 44 + width, 34 + height
    image = Image.new("RGB", (x1 + right, y1 + 40), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), title, INK, _font(13))
    last = max((len(curve) for curve in curves.values()), default=0) - 1

    def place(x: int, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * x / max(last, 1), y1 - (y1 - y0) * (value - low) / (high - low)

    for part in range(5):
        value = low + (high - low) * part / 4
        _, y = place(0, value)
        draw.line((x0, y, x1, y), RULE)
        draw.text((x0 - 6, y), f"{value:.2g}", INK, _font(), anchor="rm")
    for x in range(0, last + 1, max(1, last // 8)):
        draw.text((place(x, low)[0], y1 + 6), str(x), INK, _font(), anchor="mt")
    draw.text(((x0 + x1) / 2, y1 + 22), x_label, INK, _font(), anchor="mt")
    names_end: list[float] = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [None if value is None else place(x, value) for x, value in enumerate(curve)]
        points = [None if point is None else (point[0], point[1] + 2.5 * number) for point in places]
        for one, two in pairwise(points):
            if one is not None and two is not None:
                draw.line((*one, *two), colour, 2)
        for point in points:
            if point is not None:
                draw.ellipse((point[0] - 2.5, point[1] - 2.5, point[0] + 2.5, point[1] + 2.5), colour)
        drawn = [point for point in points if point is not None]
        y = drawn[-1][1] if drawn else y1
        while any(abs(y - other) < LINE - 4 for other in names_end):
            y += 2  # names of curves that end at the same height stand below each other
        names_end.append(y)
        draw.text((x1 + 10, y), name, colour, _font(), anchor="lm")
    return image


def side_by_side(*pictures: Image, gap: int = 12) -> Image:
    """Pictures in one row on white, aligned at the top."""
    from PIL import Image

    size = sum(p.width for p in pictures) + gap * (len(pictures) - 1), max(p.height for p in pictures)
    image, left = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        image.paste(picture, (left, 0))
        left += picture.width + gap
    return image


def _ramp(share: NDArray[Any]) -> NDArray[np.float64]:
    """[0, 1] -> RGB in 0 to 255, as a last dimension."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(share, stops, RAMP[:, channel]) for channel in range(3)], -1)


def _font(size: int = 11) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text)) if text else 0

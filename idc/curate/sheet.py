"""A page to look at: one row a sample, with some of its frames and then its references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from idc.types import Sample

MARGIN = 6


def contact_sheet(samples: Sequence[Sample], frames: int = 6, row_height: int = 128) -> np.ndarray:
    """Draw samples as an RGB uint8 page `[H, W, 3]`.

    Each row has `frames` frames of the clip, evenly spaced from its first to its last, then the references behind a
    wider gap, and the caption below. Sides keep their proportions.
    """
    from PIL import Image, ImageDraw

    rows = [_row(sample, frames, row_height) for sample in samples]
    widths = [sum(gap + picture.width for gap, picture in row) for row in rows]
    step = row_height + 16 + MARGIN
    page = Image.new("RGB", (max(widths, default=0) + 2 * MARGIN, len(rows) * step + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        left, top = MARGIN, MARGIN + number * step
        for gap, picture in row:
            page.paste(picture, (left + gap, top))
            left += gap + picture.width
        text = ": ".join(part for part in (sample.id, sample.caption) if part)
        draw.text((MARGIN, top + row_height + 2), _fit(text, page.width), fill="black")
    return np.asarray(page)


def _row(sample: Sample, frames: int, height: int) -> list:
    """(gap before it, picture) for each picture of a row."""
    shown: list[tuple[int, Tensor]] = []
    if sample.video_CTHW is not None:
        count = sample.video_CTHW.shape[1]
        ranks = np.unique(np.linspace(0, count - 1, min(frames, count)).round().astype(int))
        shown += [(2, sample.video_CTHW[:, rank]) for rank in ranks.tolist()]
    shown += [(4 * MARGIN if not number else 2, s.image_CHW) for number, s in enumerate(sample.subjects)]
    return [(gap, _picture(image, height)) for gap, image in shown]


def _picture(image_CHW: Tensor, height: int):
    from PIL import Image

    pixels = image_CHW.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    width = max(1, round(pixels.shape[1] * height / pixels.shape[0]))
    return Image.fromarray(pixels).resize((width, height))


def _fit(text: str, width: int) -> str:
    """The text cut to what fits a line of `width` pixels in Pillow's default font, of about 6 pixels a letter."""
    letters = max(8, width // 6 - 3)
    text = text.encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= letters else text[: letters - 3] + "..."

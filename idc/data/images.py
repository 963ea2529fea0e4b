"""Sizes: references keep their aspect ratio under an area cap; clips are scaled to cover their bucket and cropped.

Resizing is antialiased bicubic on uint8, which torch does without converting to float.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from idc.types import SPATIAL_MULTIPLE


def reference_size(height: int, width: int, max_area: int) -> tuple[int, int]:
    """The size nearest to the picture's aspect ratio with sides in multiples of 16 and an area of at most `max_area`.

    Pictures are never enlarged beyond the next multiple of 16. `max_area` is in pixels: n transformer tokens cover
    256 n pixels.
    """
    scale = min(1.0, math.sqrt(max_area / (height * width)))
    step = SPATIAL_MULTIPLE
    new_height, new_width = (max(step, round(side * scale / step) * step) for side in (height, width))
    while new_height * new_width > max_area and max(new_height, new_width) > step:
        # Rounding up crossed the cap: shorten the side that then departs less from the aspect ratio.
        tall, wide = (new_height - step, new_width), (new_height, new_width - step)
        options = [size for size in (tall, wide) if min(size) >= step]
        new_height, new_width = min(options, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))
    return new_height, new_width


def resize(images_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of uint8 or float images; the same tensor where the size fits already."""
    if images_NCHW.shape[-2:] == (height, width):
        return images_NCHW
    return F.interpolate(images_NCHW, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def fit_reference(image_CHW: Tensor, max_area: int) -> Tensor:
    """A float reference in [-1, 1] at `reference_size`; clamped, as bicubic overshoots at edges."""
    height, width = reference_size(image_CHW.shape[1], image_CHW.shape[2], max_area)
    return resize(image_CHW[None], height, width)[0].clamp(-1, 1)


def cover_crop(video_TCHW: Tensor, height: int, width: int, offset: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Scale uint8 frames so that they cover (height, width), then crop.

    `offset` in [0, 1] says where the crop lies in what is left over: (0.5, 0.5) is the centre, (0, 0) the top left.
    """
    have_height, have_width = video_TCHW.shape[-2:]
    scale = max(height / have_height, width / have_width)
    scaled = (max(height, round(have_height * scale)), max(width, round(have_width * scale)))
    video_TCHW = resize(video_TCHW, *scaled)
    top = round(offset[0] * (scaled[0] - height))
    left = round(offset[1] * (scaled[1] - width))
    return video_TCHW[..., top : top + height, left : left + width]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)

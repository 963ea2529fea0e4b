"""Sizes: references keep their aspect ratio under an area cap (`idc.pictures`); clips cover their bucket, cropped."""

from __future__ import annotations

from torch import Tensor

from idc.pictures import fit_reference, reference_size, resize, to_float

__all__ = ["cover_crop", "fit_reference", "reference_size", "resize", "to_float"]


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

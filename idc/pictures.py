"""Pictures as the model sees them, from whatever a user gives: stages, training and the pipeline all read them here.

A picture is turned upright (EXIF), what is transparent becomes white, and a reference keeps its aspect ratio under an
area cap. Resizing is antialiased bicubic.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.types import SPATIAL_MULTIPLE

MOST_ASPECT = 200  # of a picture's sides that networks on pictures take: the limit of Qwen's image processor
REFERENCE_AREA = 1024 * 256  # pixels: 1024 tokens a reference
_SLACK = 0.01  # values beyond the range by less are rounding, and are clamped


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


def to_float(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1]."""
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)


def read_picture(path: str | Path) -> Tensor:
    """A picture file as float32 `[3, H, W]` in [-1, 1].

    Raises:
        UserError: if it is missing or cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return _decoded(opened)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture: {error}") from None


def reference_pixels(picture: Any) -> Tensor:
    """A reference in any form as float32 `[3, H, W]` in [-1, 1], at its own size.

    Args:
        picture: the path of a file; a PIL image; an array `[H, W, 3]` (uint8, or float in [0, 1]) or `[H, W, 4]`
            (uint8 with alpha); or a tensor `[3, H, W]` (uint8, or float in [-1, 1]).

    Raises:
        UserError: for anything else, and for values out of range.
    """
    from PIL import Image

    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[-1] == 4:
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        try:
            return _decoded(picture)
        except (OSError, ValueError, SyntaxError) as error:  # opened, and damaged further on
            raise UserError(f"reference: cannot be read as a picture: {error}") from None
    return _channels_first(picture, "reference", "H, W")


def clip_pixels(clip: Any) -> Tensor:
    """A clip as float32 `[3, T, H, W]` in [-1, 1].

    Args:
        clip: an array `[T, H, W, 3]` (uint8, or float in [0, 1]), or a tensor `[3, T, H, W]` (uint8, or float in
            [-1, 1]).

    Raises:
        UserError: for anything else, and for values out of range.
    """
    return _channels_first(clip, "source", "T, H, W")


def _decoded(picture: Any) -> Tensor:
    """Of a PIL image."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return to_float(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)).contiguous()


def _channels_first(pixels: Any, name: str, sides: str) -> Tensor:
    rule = f"must be [3, {sides}] as a tensor, or [{sides}, 3] as an array"
    if not isinstance(pixels, (Tensor, np.ndarray)):
        raise UserError(f"{name} of type {type(pixels).__name__}: {rule}")
    is_array = not isinstance(pixels, Tensor)
    shape, channels = tuple(pixels.shape), -1 if is_array else 0
    if len(shape) != sides.count(",") + 2 or shape[channels] != 3 or 0 in shape:
        raise UserError(f"{name} of shape {shape}: {rule}")
    found = torch.from_numpy(np.array(pixels)).movedim(-1, 0) if isinstance(pixels, np.ndarray) else pixels.detach()
    if found.dtype is torch.uint8:
        return to_float(found).contiguous()
    low, high = (0, 1) if is_array else (-1, 1)
    form = f"a float {'array' if is_array else 'tensor'} is in [{low}, {high}], bytes are uint8"
    if not found.is_floating_point():
        raise UserError(f"{name} of {found.dtype}: {form}")
    found = found.to(torch.float32)
    least, most = (float(value) for value in found.aminmax())
    if not (low - _SLACK <= least and most <= high + _SLACK):
        raise UserError(f"{name} with values from {least:.6g} to {most:.6g}: {form}")
    return (found * 2 - 1 if is_array else found).clamp(-1, 1).contiguous()

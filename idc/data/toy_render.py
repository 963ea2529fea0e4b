"""Pixels of the toy world: anti-aliased shapes with textures, and backgrounds, as numpy arrays in [0, 1].

Object coordinates (u, v) have their origin at a subject's centre, u to the right and v down, and the radius as their
unit, so that a texture scales and turns with its subject.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# Saturated against pale: subjects and backgrounds can be told apart by chroma alone, which the scorers rely on.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 38, 44),
    "green": (34, 160, 60),
    "blue": (44, 76, 228),
    "yellow": (244, 208, 32),
    "magenta": (224, 60, 204),
    "cyan": (28, 196, 208),
}
BACKGROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "grey": (168, 168, 168),
    "pale blue": (188, 212, 240),
    "pale green": (196, 232, 196),
    "sand": (232, 212, 180),
}
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "dotted")
PATTERNS = ("plain", "graded", "checked", "striped")

DARK = 0.28  # brightness of the dark part of a texture, as a share of the subject's colour
SHADE = 0.74  # brightness of the darker tone of a background
TILE = 16  # pixels: a background's tiles follow the codec's 8-pixel cells, so that they cost it nothing
BAND = 0.3  # radii: half the height of the dark band across a striped subject
DOT_RADIUS = 0.4  # radii: one dark dot in the middle
SOFTNESS = 1.6  # pixels from inside to outside across an edge


def signed_distance(shape: str, u: Array, v: Array) -> Array:
    """Distance to the outline in radii, negative inside (exact near straight edges, a bound elsewhere)."""
    if shape == "circle":
        return np.hypot(u, v) - 0.96
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.84
    if shape == "triangle":  # equilateral, point up, its centroid at the origin
        return np.maximum(v - 0.62, 0.8660254 * np.abs(u) - 0.5 * v - 0.62)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1.08, b - 0.34), np.maximum(a - 0.34, b - 1.08))
    raise ValueError(f"shape={shape!r}: one of {SHAPES}")


def tone(texture: str, u: Array, v: Array, radius: float) -> Array:
    """Brightness of a texture in [DARK, 1]; `radius` in pixels sets the width of its anti-aliased edges."""
    if texture == "plain":
        return np.ones_like(u)
    if texture == "striped":
        dark = _soft_step(np.abs(v) - BAND, radius)
    elif texture == "dotted":
        dark = _soft_step(np.hypot(u, v) - DOT_RADIUS, radius)
    else:
        raise ValueError(f"texture={texture!r}: one of {TEXTURES}")
    return 1 - (1 - DARK) * dark


def object_coordinates(size: int, offset: Array, radius: float, angle: float) -> tuple[Array, Array]:
    """(u, v) `[K, size, size]` of the pixels of K windows; `offset` `[K, 2]` is the centre (x, y) in window pixels."""
    pixels = np.arange(size, dtype=np.float32) + 0.5
    x = ((pixels[None, None, :] - offset[:, 0, None, None]) / radius).astype(np.float32)
    y = ((pixels[None, :, None] - offset[:, 1, None, None]) / radius).astype(np.float32)
    if angle == 0:
        x, y = np.broadcast_arrays(x, y)
        return x, y
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def sprite(
    shape: str, texture: str, size: int, offset: Array, radius: float, angle: float = 0.0
) -> tuple[Array, Array]:
    """Coverage and tone `[K, size, size]` of one subject in K windows (see `object_coordinates`); angle in radians."""
    u, v = object_coordinates(size, offset, radius, angle)
    return _soft_step(signed_distance(shape, u, v), radius), tone(texture, u, v, radius)


def _soft_step(distance: Array, radius: float) -> Array:
    """1 inside (distance < 0), 0 outside, with an edge SOFTNESS pixels wide; `distance` is in radii."""
    return np.clip(0.5 - distance * (radius / SOFTNESS), 0, 1)


def background(colour: str, pattern: str, height: int, width: int) -> Array:
    """A still background `[height, width, 3]` in [0, 1]."""
    rgb = np.asarray(BACKGROUND_COLOURS[colour], np.float32) / 255
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    if pattern == "plain":
        dark = np.zeros((height, width), np.float32)
    elif pattern == "graded":
        dark = np.broadcast_to((rows + 0.5) / height, (height, width)).astype(np.float32) * 1.5
    elif pattern == "checked":
        dark = ((rows // TILE + columns // TILE) % 2).astype(np.float32)
    elif pattern == "striped":
        dark = np.broadcast_to(columns // TILE % 2, (height, width)).astype(np.float32)
    else:
        raise ValueError(f"pattern={pattern!r}: one of {PATTERNS}")
    return rgb * (1 - (1 - SHADE) * dark[..., None])


def paste(canvas: Array, colour: str, shape: str, texture: str, centres: Array, radius: float, angle: float) -> None:
    """Draw a subject into `canvas` `[T, H, W, 3]` at `centres` `[T, 2]` (x, y), in pixels; parts outside are cut."""
    _, height, width, _ = canvas.shape
    half = int(np.ceil(1.45 * radius)) + 1  # the farthest point of any shape is 1.24 radii away
    corners = np.floor(centres).astype(int) - half
    cover, bright = sprite(shape, texture, 2 * half + 1, (centres - corners).astype(np.float32), radius, angle)
    rgb = np.asarray(COLOURS[colour], np.float32) / 255
    for frame, (x, y) in enumerate(corners):
        rows, columns = slice(max(y, 0), min(y + 2 * half + 1, height)), slice(max(x, 0), min(x + 2 * half + 1, width))
        inside = (frame, slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))
        target = canvas[frame, rows, columns]
        target += cover[inside][..., None] * (bright[inside][..., None] * rgb - target)

"""Finding the toy world's subjects in a video: pixels -> blobs of one hue -> tracks with shapes and textures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from idc.data import toy_render as render

Array = NDArray[np.floating]

BLUR = 0.7  # pixels: takes out noise, leaves stripes of 9 pixels
DARK = 0.36  # a pixel whose largest channel is below is a texture's dark part; backgrounds stay above 0.4
VIVID = 0.5  # chroma along the nearest subject colour, as a share of that colour's; backgrounds stay below 0.35
SATURATED = 0.55  # (max - min) / max: subjects keep theirs, 0.73 to 0.87, in shade; backgrounds stay below 0.25
MARGIN = 3  # pixels around subjects that do not count as background: edges and the codec's ringing
REACH = 0.25  # short sides that a subject may move from frame to frame

# Opponent chroma plane: red-green, yellow-blue. Orthonormal, so that distances are those of RGB.
CHROMA = np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32)
CHROMA /= np.linalg.norm(CHROMA, axis=1, keepdims=True)
NAMES = tuple(render.COLOURS)
RGB = np.array([render.COLOURS[name] for name in NAMES], np.float32) / 255
HUES = RGB @ CHROMA.T  # [6, 2]


@dataclass(frozen=True)
class Track:
    """One blob followed through the frames.

    Attributes:
        colour: name of its hue.
        frames: indices of the frames that show it, ascending.
        centres: (x, y) in pixels `[len(frames), 2]`.
        shapes, textures: by name, the share of its frames in which that template fits best.
    """

    colour: str
    frames: NDArray[np.int64]
    centres: Array
    shapes: dict[str, float]
    textures: dict[str, float]

    @property
    def looks(self) -> dict[str, str]:
        """The most frequent shape and texture, and the colour."""
        shape = max(self.shapes, key=self.shapes.__getitem__)
        return {"colour": self.colour, "shape": shape, "texture": max(self.textures, key=self.textures.__getitem__)}


def to_frames(video: object, size: tuple[int, int, int]) -> Array:
    """uint8 `[T, H, W, 3]` or float `[3, T, H, W]` in [-1, 1] -> float `[T, H, W, 3]` in [0, 1], lightly blurred.

    Raises:
        ValueError: for another type, shape or size than `size` (T, H, W), and for values that are not finite.
    """
    if hasattr(video, "detach"):
        video = video.detach().float().cpu().numpy()
    array = np.asarray(video)
    if array.dtype != np.uint8:
        if array.ndim != 4 or array.shape[0] != 3 or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{array.dtype} video of shape {array.shape}: must be uint8 THWC or float CTHW")
        if not np.isfinite(array).all():
            raise ValueError("the video has values that are not finite")
        array = np.moveaxis(array, 0, -1).astype(np.float32) / 2 + 0.5
    else:
        array = array.astype(np.float32) / 255
    if array.shape != (*size, 3):
        raise ValueError(f"video of shape {array.shape}: the spec asks for {(*size, 3)}")
    return ndimage.gaussian_filter(np.clip(array, 0, 1), (0, BLUR, BLUR, 0))


def find_tracks(frames: Array, radius: float) -> tuple[list[Track], NDArray[np.bool_]]:
    """Follow every blob that is seen in at least half of the frames.

    Args:
        frames: `[T, H, W, 3]` in [0, 1].
        radius: of the smallest asked subject in pixels; blobs under a quarter of its area are ringing, not subjects.

    Returns:
        the tracks, and a mask `[T, H, W]` of the pixels that are clear of all subjects.
    """
    hue = _hue_of_pixels(frames)
    least = 0.25 * 2.0 * radius**2  # a triangle, the smallest shape, has 2.0 radii squared
    chains: list[list[tuple[int, Array, NDArray[np.bool_]]]] = []
    owners: list[int] = []
    for frame, classes in enumerate(hue):
        for colour in range(len(NAMES)):
            blobs = _blobs(classes == colour, least)
            mine = [chain for chain, owner in zip(chains, owners, strict=True) if owner == colour]
            for blob, centre in blobs:
                near = [
                    c for c in mine if c[-1][0] < frame and _distance(c[-1][1], centre) < REACH * min(hue.shape[1:])
                ]
                if near:
                    min(near, key=lambda c: _distance(c[-1][1], centre)).append((frame, centre, blob))
                else:
                    chains.append([(frame, centre, blob)])
                    owners.append(colour)
    tracks = [
        _track(chain, owner, frames)
        for chain, owner in zip(chains, owners, strict=True)
        if 2 * len(chain) >= len(frames)
    ]
    around = ndimage.generate_binary_structure(2, 2)[None]
    return tracks, ~ndimage.binary_dilation(hue >= 0, around, iterations=MARGIN)


def _hue_of_pixels(frames: Array) -> NDArray[np.int64]:
    """`[T, H, W]`: index of the subject colour that a pixel belongs to, -1 for background."""
    chroma = frames @ CHROMA.T
    along = chroma @ (HUES / (HUES**2).sum(1, keepdims=True)).T  # [T, H, W, 6], 1 at the pure colour
    cosine = chroma @ (HUES / np.linalg.norm(HUES, axis=1, keepdims=True)).T
    nearest = cosine.argmax(-1)
    red, green, blue = np.moveaxis(frames, -1, 0)  # numpy's maximum over a last axis of 3 takes ten times as long
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    vivid = np.take_along_axis(along, nearest[..., None], -1)[..., 0] > VIVID
    vivid |= (high - low > SATURATED * high) & (high > DARK)
    dark = ~vivid & (high < DARK)
    hue = np.where(vivid, nearest, -1)
    for frame in range(len(frames)):
        if vivid[frame].any():  # dark parts belong to the subject around them
            distance, (rows, columns) = ndimage.distance_transform_edt(~vivid[frame], return_indices=True)
            inside = dark[frame] & (distance < 8)
            hue[frame][inside] = nearest[frame][rows[inside], columns[inside]]
    return hue


def _blobs(mask: NDArray[np.bool_], least: float) -> list[tuple[NDArray[np.bool_], Array]]:
    """Connected regions of at least `least` pixels with their centres (x, y)."""
    if mask.sum() < least:
        return []
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    blobs = []
    for label in np.flatnonzero(areas >= least) + 1:
        blob = labels == label
        rows, columns = np.nonzero(blob)
        blobs.append((blob, np.array([columns.mean() + 0.5, rows.mean() + 0.5], np.float32)))
    return blobs


def _distance(a: Array, b: Array) -> float:
    return float(np.hypot(*(a - b)))


def _track(chain: list[tuple[int, Array, NDArray[np.bool_]]], colour: int, frames: Array) -> Track:
    shapes, textures = dict.fromkeys(render.SHAPES, 0.0), dict.fromkeys(render.TEXTURES, 0.0)
    for frame, centre, blob in chain:
        shape, radius = _fit_shape(blob, centre)
        shapes[shape] += 1 / len(chain)
        textures[_fit_texture(frames[frame], blob, centre, shape, radius, colour)] += 1 / len(chain)
    return Track(
        colour=NAMES[colour],
        frames=np.array([frame for frame, _, _ in chain]),
        centres=np.stack([centre for _, centre, _ in chain]),
        shapes=shapes,
        textures=textures,
    )


@cache
def _area(shape: str) -> float:
    """Area in radii squared, counted on a fine grid."""
    u, v = np.meshgrid(*2 * [np.linspace(-1.5, 1.5, 601, dtype=np.float32)])
    return float((render.signed_distance(shape, u, v) < 0).mean() * 9)


def _coordinates(blob: NDArray[np.bool_], centre: Array, radius: float) -> tuple[Array, Array]:
    rows, columns = np.indices(blob.shape, np.float32)
    return (columns + 0.5 - centre[0]) / radius, (rows + 0.5 - centre[1]) / radius


def _fit_shape(blob: NDArray[np.bool_], centre: Array) -> tuple[str, float]:
    """The shape that overlaps best (intersection over union) at the blob's centre and area, and its radius."""
    area, best = float(blob.sum()), ("", 0.0, -1.0)
    for shape in render.SHAPES:
        radius = (area / _area(shape)) ** 0.5
        template = render.signed_distance(shape, *_coordinates(blob, centre, radius)) < 0
        overlap = (template & blob).sum() / max((template | blob).sum(), 1)
        best = max(best, (shape, radius, float(overlap)), key=lambda item: item[2])
    return best[0], best[1]


def _fit_texture(frame: Array, blob: NDArray[np.bool_], centre: Array, shape: str, radius: float, colour: int) -> str:
    """The texture whose brightness pattern fits best, each scaled by least squares, away from the outline."""
    u, v = _coordinates(blob, centre, radius)
    inside = blob & (render.signed_distance(shape, u, v) < -1.0 / radius)
    if not inside.any():
        return render.TEXTURES[0]
    bright = (frame[inside] @ RGB[colour]) / float(RGB[colour] @ RGB[colour])

    def misfit(texture: str) -> float:
        tone = render.tone(texture, u[inside], v[inside], radius)
        return float(((bright - tone * (bright @ tone) / (tone @ tone)) ** 2).sum())

    return min(render.TEXTURES, key=misfit)

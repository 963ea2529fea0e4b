"""Plain augmentation: the paper's baseline for references (B.2, Figure S.11), and what it does without a model.

The subject is tinted, turned, scaled, tilted and cropped, and may be put before another background. It stays in its
pose and light, which is why the paper finds it of "limited visual diversity". What it makes is a copy by
intent: the cap on copies does not hold for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Pixels
from idc.curate.synthetic.editors import ImageEditor, check_request
from idc.curate.synthetic.masks import edge_colour, subject_mask
from idc.errors import UserError, nearest

Background = Literal["keep", "white", "flat", "blur"]


class Augmentation(ImageEditor):
    """Draws one change of colour and of place for the first picture; the prompt and other pictures are not looked at.

    Args:
        colour: brightness, contrast and saturation are multiplied by 1 - colour to 1 + colour each, in [0, 1).
        rotation: most degrees either way, in [0, 180].
        scale: least and most enlargement.
        perspective: how far corners move, as a share of the sides, in [0, 0.4].
        crop: most of each side that is cut off at an edge, in [0, 0.4].
        flip: mirror half the pictures. Off: writing, and what is on one side of somebody, would be wrong.
        background: "keep" it; "white"; "flat", one drawn colour; or "blur", the picture itself out of focus. What is
            subject is told from a plain background by its colour, else by GrabCut (Rother et al. 2004).

    Raises:
        UserError: for settings out of range.
    """

    backend: ClassVar[str] = "augmentation"
    copies: ClassVar[bool] = True

    def __init__(
        self,
        colour: float = 0.2,
        rotation: float = 15.0,
        scale: tuple[float, float] = (0.8, 1.1),
        perspective: float = 0.08,
        crop: float = 0.05,
        flip: bool = False,
        background: Background = "keep",
    ) -> None:
        for name, value, most in (("perspective", perspective, 0.4), ("crop", crop, 0.4), ("rotation", rotation, 180)):
            if not 0 <= value <= most:
                raise UserError(f"{name}={value}: must be from 0 to {most}")
        if not 0 <= colour < 1:
            raise UserError(f"colour={colour}: must be at least 0 and below 1")
        if len(scale) != 2 or not 0.1 <= scale[0] <= scale[1] <= 10:
            raise UserError(f"scale={scale}: must be (least, most), from 0.1 to 10")
        if background not in get_args(Background):
            raise UserError(f"background={background!r}: no such one{nearest(background, get_args(Background))}")
        self.colour, self.rotation, self.scale, self.perspective = colour, rotation, tuple(scale), perspective
        self.crop, self.flip, self.background = crop, flip, background

    @property
    def name(self) -> str:
        return "augmentation"

    @property
    def version(self) -> str:
        return "1"

    @property
    def origin(self) -> str:
        return "augmented"

    def edit(self, pictures: Sequence[Pixels], prompt: str, seed: int, size: tuple[int, int]) -> Pixels:
        """As `ImageEditor.edit`; the picture keeps its aspect ratio, within `size`, and is not enlarged to fill it."""
        check_request(self, pictures, prompt, size)
        rng = np.random.Generator(np.random.PCG64(seed))
        draws = rng.uniform(-1, 1, 16)  # one stream, drawn whole: a setting at 0 does not shift the others
        picture = pictures[0]
        tinted = self._tint(picture, draws[:3])
        scale, mirrored = self._enlargement(draws[3]), self.flip and draws[4] < 0
        transform, fitted = self._transform(picture.shape[:2], size, scale, mirrored, draws[5:])
        moved = _warp(tinted, transform, fitted, edge_colour(tinted))
        if self.background == "keep":
            return moved
        inside = _warp((subject_mask(picture, seed) * 255).astype(np.uint8), transform, fitted, (0.0,))
        return _blend(moved, self._behind(moved, rng), inside)

    def _tint(self, picture: Pixels, draws: NDArray[np.float64]) -> Pixels:
        brightness, contrast, saturation = 1 + self.colour * draws
        colours = picture.astype(np.float32) * brightness
        grey = colours @ np.array([0.299, 0.587, 0.114], np.float32)
        colours = grey[..., None] + (colours - grey[..., None]) * saturation
        mean = float(grey.mean())
        return np.clip(mean + (colours - mean) * contrast, 0, 255).round().astype(np.uint8)

    def _enlargement(self, drawn: float) -> float:
        low, high = (math.log(bound) for bound in self.scale)
        return math.exp(low + (high - low) * (drawn + 1) / 2)

    def _transform(
        self,
        shape: tuple[int, ...],
        size: tuple[int, int],
        enlarged: float,
        mirrored: bool,
        draws: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], tuple[int, int]]:
        """The homography `[3, 3]` from the picture to the result, and the result's (width, height)."""
        import cv2

        height, width = shape
        cut = np.abs(draws[1:5]) * self.crop  # left, top, right, bottom
        left, top, right, bottom = cut[0] * width, cut[1] * height, (1 - cut[2]) * width, (1 - cut[3]) * height
        fit = min(1.0, size[0] / (bottom - top), size[1] / (right - left))
        fitted = max(1, round((right - left) * fit)), max(1, round((bottom - top) * fit))
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        angle = math.radians(self.rotation * draws[0])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        target = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (np.array(fitted) / 2) * enlarged
        target = target * (-1, 1) if mirrored else target
        target += self.perspective * np.resize(draws[5:11], (4, 2)) * fitted / 2
        target = target @ turn.T + np.array(fitted) / 2
        transform = cv2.getPerspectiveTransform(corners.astype(np.float32), target.astype(np.float32))
        return np.asarray(transform, np.float64), fitted

    def _behind(self, moved: Pixels, rng: np.random.Generator) -> Pixels:
        import cv2

        if self.background == "blur":
            return np.asarray(cv2.GaussianBlur(moved, (0, 0), max(2.0, max(moved.shape[:2]) / 16)), np.uint8)
        colour = rng.integers(0, 256, 3) if self.background == "flat" else np.array([255, 255, 255])
        return np.broadcast_to(colour.astype(np.uint8), moved.shape)


def _warp(
    picture: Pixels, transform: NDArray[np.float64], fitted: tuple[int, int], outside: tuple[float, ...]
) -> Pixels:
    import cv2

    shrinking = math.sqrt(abs(float(np.linalg.det(transform[:2, :2]))))
    if shrinking < 0.7:  # against aliasing
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.4 / shrinking), np.uint8)
    return np.asarray(cv2.warpPerspective(picture, transform, fitted, borderValue=outside), np.uint8)


def _blend(front: Pixels, behind: Pixels, alpha: NDArray[np.uint8]) -> Pixels:
    share = alpha[..., None].astype(np.float32) / 255
    return (front * share + behind * (1 - share)).round().astype(np.uint8)

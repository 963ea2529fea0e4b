"""Where things are after a picture was cropped and scaled: boxes and masks go with the pixels.

Three pictures: the source's upright one; the cropped one, which `idc.curate.reading` gives; and the clip's, which is
the cropped one scaled and cut to size. Subjects' boxes and masks are in pixels of the cropped one until the clip is
cut, and of the clip from then on. Tracks are in pixels of the source for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from idc.curate.candidate import Box, Candidate, CuratedSubject, Mask
from idc.curate.reading import crop_of, inspect
from idc.types import SPATIAL_MULTIPLE

if TYPE_CHECKING:
    from idc.models.faces import Face

RESIZE = ("crop", "short-side")


class Shape(Protocol):
    """What `View.fit` goes by: the sample's height and width in pixels, and how a picture is made to fit."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def resize(self) -> str: ...


@dataclass(frozen=True)
class View:
    """What a sample shows of a video's picture: scaled by `scale`, then `height` x `width` from the centre."""

    source_height: int
    source_width: int
    height: int
    width: int
    scale: float

    @classmethod
    def fit(cls, height: int, width: int, shape: Shape) -> View:
        """The view of a `height` x `width` picture under the settings; its aspect is kept."""
        if shape.resize == "short-side":
            scale = min(shape.height, shape.width) / min(height, width)
            whole = [max(1, round(side * scale) // SPATIAL_MULTIPLE) * SPATIAL_MULTIPLE for side in (height, width)]
            return cls(height, width, whole[0], whole[1], scale)
        return cls.fill(height, width, shape.height, shape.width)

    @classmethod
    def fill(cls, height: int, width: int, to_height: int, to_width: int) -> View:
        """The view that fills `to_height` x `to_width`; what is too much of the picture is cut off evenly."""
        return cls(height, width, to_height, to_width, max(to_height / height, to_width / width))

    @property
    def scaled(self) -> tuple[int, int]:
        """(height, width) of the whole picture once scaled, before it is cut: whole pixels."""
        return (
            max(self.height, round(self.source_height * self.scale)),
            max(self.width, round(self.source_width * self.scale)),
        )

    @property
    def offset(self) -> tuple[int, int]:
        """(top, left) of the sample within the scaled picture."""
        height, width = self.scaled
        return (height - self.height) // 2, (width - self.width) // 2

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Scale and crop an RGB uint8 frame `[H, W, 3]`."""
        import cv2

        height, width = self.scaled
        method = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(picture, (width, height), interpolation=method) if self.scale != 1 else picture
        return self._cut(picture)

    def shows(self, face: Face) -> bool:
        """Whether the middle of a face, in the source's pixels, is within the view."""
        x, y = face.centre
        across = abs(x - self.source_width / 2) * self.scale
        down = abs(y - self.source_height / 2) * self.scale
        return across <= self.width / 2 and down <= self.height / 2

    def box(self, box: Box) -> Box:
        """A box of the picture in the sample's pixels; it may lie outside."""
        (height, width), (top, left) = self.scaled, self.offset
        down, across = height / self.source_height, width / self.source_width
        return Box(box.left * across - left, box.top * down - top, box.right * across - left, box.bottom * down - top)

    def back(self, box: Box) -> Box:
        """A box of the sample in the picture's pixels: the inverse of `box`."""
        (height, width), (top, left) = self.scaled, self.offset
        down, across = height / self.source_height, width / self.source_width
        return Box(
            (box.left + left) / across, (box.top + top) / down, (box.right + left) / across, (box.bottom + top) / down
        )

    def mask(self, mask: Mask) -> Mask:
        """A mask of the picture as the sample shows it: True where more than half of a pixel is."""
        import cv2

        height, width = self.scaled
        method = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR
        scaled = cv2.resize(mask.astype(np.float32), (width, height), interpolation=method)
        return np.ascontiguousarray(self._cut(np.asarray(scaled)) > 0.5)

    def _cut(self, picture: np.ndarray) -> np.ndarray:
        top, left = self.offset
        return picture[top : top + self.height, left : left + self.width]


def within(box: Box, height: int, width: int) -> Box:
    """The part of a box that a picture shows; without area where it shows nothing."""
    left, right = (min(max(side, 0.0), float(width)) for side in (box.left, box.right))
    top, bottom = (min(max(side, 0.0), float(height)) for side in (box.top, box.bottom))
    return Box(left, top, right, bottom)


def box_of_mask(mask: Mask) -> Box | None:
    """The smallest box around a mask, or None for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def recropped(candidate: Candidate, crop: Box, least: float) -> tuple[Candidate, list[str]]:
    """The candidate with another crop (pixels of the source), its subjects' boxes and masks moved with it.

    Returns:
        the candidate, and the names of subjects of which less than `least` is left: they are removed. A mask that is
        not of the cropped picture's size is of another picture, and goes.
    """
    info = inspect(candidate).video
    old = crop_of(candidate, info.height, info.width)
    changed = candidate.changed(crop=crop)
    left, top, right, bottom = crop_of(changed, info.height, info.width)
    x, y = left - old[0], top - old[1]

    def box_there(box: Box) -> Box:
        return Box(box.left - x, box.top - y, box.right - x, box.bottom - y)

    def mask_there(mask: Mask) -> Mask:
        moved = np.zeros((bottom - top, right - left), np.bool_)
        part = mask[max(y, 0) : y + bottom - top, max(x, 0) : x + right - left]
        moved[max(-y, 0) : max(-y, 0) + part.shape[0], max(-x, 0) : max(-x, 0) + part.shape[1]] = part
        return moved

    old_size, size = (old[3] - old[1], old[2] - old[0]), (bottom - top, right - left)
    subjects, gone = _moved(candidate.subjects, box_there, mask_there, old_size, size, least)
    return changed.changed(subjects=subjects), gone


def viewed(candidate: Candidate, view: View, least: float) -> tuple[tuple[CuratedSubject, ...], list[str]]:
    """The candidate's subjects with boxes and masks in pixels of `view`, and the names of those of which the view
    shows less than `least` of the box's area (of the mask's, where there is no box)."""
    old_size, size = (view.source_height, view.source_width), (view.height, view.width)
    return _moved(candidate.subjects, view.box, view.mask, old_size, size, least)


def _moved(
    subjects: Sequence[CuratedSubject],
    box_there: Callable[[Box], Box],
    mask_there: Callable[[Mask], Mask],
    old_size: tuple[int, int],
    size: tuple[int, int],
    least: float,
) -> tuple[tuple[CuratedSubject, ...], list[str]]:
    kept: list[CuratedSubject] = []
    gone: list[str] = []
    for subject in subjects:
        share, box = 1.0, subject.box
        mask = subject.mask if subject.mask is not None and subject.mask.shape == old_size else None
        if mask is not None:
            # Of the new picture's pixels, how many the mask would take if all of it were shown.
            whole = float(mask.sum()) * box_there(Box(0.0, 0.0, 1.0, 1.0)).area
            mask = mask_there(mask)
            share = float(mask.sum()) / whole if whole else 0.0
        if box is not None:
            moved = box_there(box)
            box = within(moved, *size)
            share = box.area / moved.area if moved.area else 0.0
        if share < least or not share:
            gone.append(subject.name)
        else:
            kept.append(replace(subject, box=box, mask=mask))
    return tuple(kept), gone


def view_of(candidate: Candidate) -> View | None:
    """How the candidate's clip was cut from its cropped picture; None before it is cut."""
    known = candidate.meta.get("cut", {}).get("view")
    return View(**known) if known else None


def plain_view(view: View) -> dict[str, Any]:
    """For the candidate's meta; `view_of` reads it."""
    return asdict(view)

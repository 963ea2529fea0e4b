"""A detector and a segmenter that see colours, so that boxes and masks are known to the pixel; pictures for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from idc.curate.candidate import Box, Candidate, CuratedSubject
from idc.models.grounding import Detection, Detector, Prompt, Query, Sam

COLOURS = {"red ball": (255, 0, 0), "green car": (0, 255, 0), "blue cat": (0, 0, 255), "person": (255, 255, 0)}
GREY = 90


class ByColour(Detector):
    """Finds what a colour fills: the bounds of its pixels, of a confidence that grows with their number."""

    def __init__(self) -> None:
        super().__init__("by/colour", 0.25, 0.7, "float32")
        self.asked: list[list[str]] = []  # the labels of each call

    def _build(self) -> None:
        self._model = _Nothing()

    def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
        self.asked.append([query.label for query in queries])
        return [self._look(query.picture, query.label) for query in queries]

    def _look(self, picture: np.ndarray, label: str) -> list[Detection]:
        if label not in COLOURS:
            return []
        rows, columns = np.nonzero((np.abs(picture.astype(int) - COLOURS[label]) < 60).all(-1))
        if not len(rows):
            return []
        box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        return [Detection(*map(float, box), min(0.99, 0.5 + len(rows) / picture[..., 0].size))]


class _Nothing:
    def to(self, *args: Any) -> None:
        pass


class Coloured(Sam):
    """The mask of a box: what in it is not grey."""

    def __init__(self) -> None:
        super().__init__("by/colour")
        self.asked: list[int] = []  # boxes in each call

    def _build(self) -> None:
        self._model = _Nothing()

    def masks_each(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        self.asked.append(sum(len(prompt.boxes) for prompt in prompts))
        return [self._masks_of(*prompt) for prompt in prompts]

    def _masks_of(self, picture_HWC: np.ndarray, boxes: Sequence[Detection]) -> np.ndarray:
        coloured = picture_HWC.max(-1).astype(int) - picture_HWC.min(-1) > 60
        return np.stack([coloured] * len(boxes)) if boxes else np.zeros((0, *picture_HWC.shape[:2]), np.bool_)


def frame(*things: tuple[str, tuple[int, int, int, int]], size: tuple[int, int] = (96, 160)) -> np.ndarray:
    """A grey picture with (left, top, right, bottom) of each thing filled."""
    picture = np.full((*size, 3), GREY, np.uint8)
    for name, (left, top, right, bottom) in things:
        picture[top:bottom, left:right] = COLOURS[name]
    return picture


def candidate(frames: Sequence[np.ndarray], *subjects: CuratedSubject | str, **more: Any) -> Candidate:
    named = [CuratedSubject(s) if isinstance(s, str) else s for s in subjects]
    more = {"caption": ", ".join(s.name for s in named), **more}
    return Candidate("clip", "films", "film", "", clip=np.stack(frames), fps=16.0, subjects=tuple(named), **more)


def one(outcomes: list[Any]) -> Any:
    ((outcome,),) = outcomes
    return outcome


def followed(name: str, face: Box, rank: int = 0) -> CuratedSubject:
    return CuratedSubject(
        name, "person", face, score=0.9, track=((rank, face),), embedding=np.ones(1, np.float32), embedder="sface",
        meta={"looks": {"every": 1}},
    )  # fmt: skip

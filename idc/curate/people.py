"""Following people through a video by their faces, and choosing where to take a reference picture of each.

Identity is followed by the face's place alone: boxes of successive looks are one person where they overlap or lie
close together. A track therefore ends at a cut, at a long turn of the head and behind an obstacle, and the same person
coming back is a new track: references are never taken across such a gap, so they are never of somebody else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from idc.models.faces import Face, affinity

MIN_SIGHTINGS = 3  # fewer are mostly false alarms of the detector
GOOD_SHARE = 0.85  # references are drawn among sightings at least this good, relative to the best

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Sighting(NamedTuple):
    """A face seen at a tick (frame number at the target rate, or rank of a source's frame).

    `alone` where no other face is in its crop; `yaw` in degrees and `sharpness` as `idc.curate.face_quality` measures
    them, 0 where nobody did.
    """

    tick: int
    face: Face
    alone: bool
    yaw: float = 0.0
    sharpness: float = 0.0


@dataclass
class Track:
    """One person's face over a stretch of the video, ticks rising."""

    sightings: list[Sighting] = field(default_factory=list)

    def within(self, first: int, last: int) -> list[Sighting]:
        """Sightings at ticks first to last, both included."""
        return [sighting for sighting in self.sightings if first <= sighting.tick <= last]


class Tracker:
    """Join faces of successive looks into tracks.

    Args:
        patience: ticks that a face may stay unseen before its track ends.
        size: (height, width) of the picture, for the crops.
        score: a track is a person if the median of its faces' confidence is at least this. Single faces may be less
            sure (a turned head), while cartoon animals score about 0.8 all along.
        enough: a track of fewer sightings is nobody.
    """

    def __init__(self, patience: int, size: tuple[int, int], score: float = 0.88, enough: int = MIN_SIGHTINGS) -> None:
        self._patience, self._size, self._score, self._enough = patience, size, score, enough
        self._open: list[Track] = []
        self._done: list[Track] = []

    def look(self, tick: int, faces: Sequence[Face], quality: Sequence[tuple[float, float]] = ()) -> list[Track]:
        """Add the faces seen at a tick, with the yaw and sharpness of each where they are known; each one's track.

        The closest pairs are joined first; each face and track is used once.
        """
        self._close([t for t in self._open if tick - t.sightings[-1].tick > self._patience])
        pairs = sorted(
            ((affinity(track.sightings[-1].face, face), i, j))
            for i, track in enumerate(self._open)
            for j, face in enumerate(faces)
        )
        joined: dict[int, Track] = {}
        taken: set[int] = set()
        for strength, i, j in reversed(pairs):
            if strength > 0 and i not in taken and j not in joined:
                taken.add(i)
                joined[j] = self._open[i]
        for j, face in enumerate(faces):
            crop = head_and_shoulders(face, *self._size)
            alone = not any(_touches(crop, other) for k, other in enumerate(faces) if k != j)
            if j not in joined:
                joined[j] = Track()
                self._open.append(joined[j])
            joined[j].sightings.append(Sighting(tick, face, alone, *(quality[j] if quality else ())))
        return [joined[j] for j in range(len(faces))]

    def split(self, track: Track) -> Track:
        """The last sighting of a track is somebody else's: the track ends before it, and a new one begins with it."""
        self._close([track])
        new = Track([track.sightings.pop()])
        self._open.append(new)
        return new

    def cut(self) -> None:
        """A new shot begins: nobody is followed across."""
        self._close(list(self._open))

    def finish(self) -> list[Track]:
        """All tracks seen often and surely enough, in order of appearance."""
        self.cut()
        tracks = [
            track
            for track in self._done
            if len(track.sightings) >= self._enough
            and np.median([sighting.face.score for sighting in track.sightings]) >= self._score
        ]
        return sorted(tracks, key=lambda track: track.sightings[0][:2])

    def _close(self, tracks: list[Track]) -> None:
        self._done += tracks
        self._open = [track for track in self._open if not any(track is closed for closed in tracks)]


def head_and_shoulders(face: Face, height: int, width: int, margin: float = 2.2) -> Box:
    """A square of `margin` face heights around a face, a little low to take in the shoulders, moved into the picture.

    Where the picture is too small for it, the square is as large as fits: nothing is padded.
    """
    side = max(1, min(round(margin * face.height), height, width))
    x, y = face.centre
    left = min(max(round(x - side / 2), 0), width - side)
    top = min(max(round(y + 0.12 * face.height - side / 2), 0), height - side)
    return left, top, left + side, top + side


def whole_body(face: Face, height: int, width: int) -> Box:
    """Where the whole person is whose face this is, upright, within a picture of `height` x `width`: by the body's
    usual proportions, 3 faces wide and 8 high."""
    x, _ = face.centre
    left, right = max(0, round(x - 1.5 * face.height)), min(width, round(x + 1.5 * face.height))
    top, bottom = max(0, round(face.top - 0.5 * face.height)), min(height, round(face.top + 7.5 * face.height))
    return left, top, max(right, left + 1), max(bottom, top + 1)


def choose_reference(track: Track, first: int, last: int, gap: int, seed: str) -> Sighting | None:
    """The first choice at least `gap` ticks before tick `first` or after `last`, or None where nothing is."""
    away = [s for s in track.sightings if s.tick <= first - max(1, gap) or s.tick >= last + max(1, gap)]
    return next(iter(by_quality(away, seed)), None)


def size_and_score(sighting: Sighting) -> float:
    """How good a reference a sighting makes: the surer and larger, the better."""
    return sighting.face.score * sighting.face.height


def by_quality(
    sightings: Sequence[Sighting], seed: str, quality: Callable[[Sighting], float] = size_and_score
) -> list[Sighting]:
    """In which order sightings are tried as references.

    Only those with nobody else in the crop, where there are any. The first is drawn by `seed` among the good ones, so
    that the windows of a long track do not all get the same picture; the others follow by falling quality.
    """
    left = [s for s in sightings if s.alone] or list(sightings)
    if not left:
        return []
    values = [quality(s) for s in left]
    good = [n for n, value in enumerate(values) if value >= GOOD_SHARE * max(values)]
    first = random.Random(seed).choice(good)
    others = sorted((n for n in range(len(left)) if n != first), key=lambda n: -values[n])
    return [left[n] for n in (first, *others)]


def subject_names(subjects: int) -> list[str]:
    """Words for the people of a window, from left to right."""
    if subjects == 1:
        return ["person"]
    if subjects == 2:
        return ["person on the left", "person on the right"]
    return [f"person {number} from the left" for number in range(1, subjects + 1)]


def _touches(box: Box, face: Face) -> bool:
    left, top, right, bottom = box
    return left < face.left + face.width and face.left < right and top < face.top + face.height and face.top < bottom

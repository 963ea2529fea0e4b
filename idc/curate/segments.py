"""Long videos in segments: units of their own, so that a film is worked on by many and goes on where it was stopped.

Segments tile the frames. A shot belongs to the one that it begins in, which looks beyond its end for the shot's, so
that shots come out as they do of the whole. Where one goes on for more than `LONGEST_AFTER` frames behind a border, it
is ended there and another begins: a lecture of one shot is as many as it has segments. What is decided at a border
depends on the frames around it alone, so that both sides decide alike without knowing of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LONGEST_AFTER = 1500  # frames: a minute of film
LEAD = 200  # frames before a segment from which shots are looked for: detectors remember less
LATE = 250  # frames by which they may be late with what they find
STEP = 50  # LEAD begins at multiples of it, as TransNetV2's windows do over the whole file


class Segment(NamedTuple):
    """One of `total` equal parts of a file's frames, from 0."""

    number: int
    total: int

    def span(self, frames: int) -> tuple[int, int]:
        """[first, end) of its frames."""
        return frames * self.number // self.total, frames * (self.number + 1) // self.total

    def look(self, frames: int) -> tuple[int, int]:
        """[first, end) of the frames that tell where its shots are."""
        first, end = self.span(frames)
        return max(0, first - LEAD) // STEP * STEP, min(frames, end + LONGEST_AFTER + LATE)

    def __str__(self) -> str:
        return f"{self.number + 1} of {self.total}"


class Transition(NamedTuple):
    """Where one shot goes over into the next: frame `end` is the first no longer of the one, `start` the first of the
    other. At a hard cut both are equal; what lies between, in a soft one, belongs to neither."""

    end: int
    start: int


def shot_edges(found: Sequence[Transition], segment: Segment, frames: int) -> list[Transition]:
    """Edges of the shots that begin in a segment: one more than there are shots, none where no shot begins in it.

    Args:
        found: transitions by rank in the file, rising, of all that `segment.look` shows, or up to the first behind the
            segment's end.
        segment: of the file.
        frames: of the file.
    """
    first, end = segment.span(frames)
    edges = [Transition(first, first)] if not first or _ended(found, first, frames) else []
    edges += [transition for transition in found if first <= transition.start < end]
    if not edges:
        return []
    if end == frames or _ended(found, end, frames):
        return [*edges, Transition(end, end)]
    return [*edges, _behind(found, end) or Transition(frames, frames)]


def _behind(found: Sequence[Transition], border: int) -> Transition | None:
    """The first transition to a shot that begins at the border or behind it, if it is near enough."""
    first = next((transition for transition in found if transition.start >= border), None)
    return first if first is not None and first.end <= border + LONGEST_AFTER else None


def _ended(found: Sequence[Transition], border: int, frames: int) -> bool:
    """Whether the shot at the border is ended by it."""
    return _behind(found, border) is None and frames > border + LONGEST_AFTER

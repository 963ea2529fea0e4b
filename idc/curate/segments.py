"""Long videos in segments: units of their own, so that a film is worked on by many and goes on where it was stopped.

Segments tile the frames. A shot belongs to the one that it begins in, which looks beyond its end for the shot's, so
that shots come out as they do of the whole. Where one goes on behind a border for more than a quarter of a segment, it
is ended there and another begins: a lecture of one shot is as many as it has segments. What is decided at a border
depends on the frames around it alone, so that both sides decide alike without knowing of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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

    def reach(self, frames: int) -> int:
        """How many frames a shot may go on behind a border and stay whole; the same for all segments of a file."""
        return frames // self.total // 4

    def look(self, frames: int) -> tuple[int, int]:
        """[first, end) of the frames that tell where its shots are."""
        first, end = self.span(frames)
        return max(0, first - LEAD) // STEP * STEP, min(frames, end + self.reach(frames) + LATE)

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
    reach = segment.reach(frames)

    def behind(border: int) -> Transition | None:
        """The first transition to a shot that begins at the border or behind it, if it is near enough."""
        near = next((transition for transition in found if transition.start >= border), None)
        return near if near is not None and near.end <= border + reach else None

    def is_ended(border: int) -> bool:
        """Whether the shot at the border is ended by it."""
        return behind(border) is None and frames > border + reach

    edges = [Transition(first, first)] if not first or is_ended(first) else []
    edges += [transition for transition in found if first <= transition.start < end]
    if not edges:
        return []
    if end == frames or is_ended(end):
        return [*edges, Transition(end, end)]
    return [*edges, behind(end) or Transition(frames, frames)]

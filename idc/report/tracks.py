"""What the identity tracking of a video says of its subjects: how like their references they are, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from idc.metrics.results import Result

IDENTITY = "identity"


@dataclass(frozen=True)
class Track:
    """A subject over a video: its similarity to its own reference in each judged frame, None where it is not seen."""

    name: str
    similarity: tuple[float | None, ...]

    @property
    def mean(self) -> float | None:
        """Mean over the frames in which the subject is seen."""
        seen = [value for value in self.similarity if value is not None]
        return math.fsum(seen) / len(seen) if seen else None


@dataclass(frozen=True)
class Identity:
    """The tracking of one video.

    Attributes:
        tracks: one a reference, in the prompt's order.
        frames: ranks of the judged frames in the video.
        confusion: subjects (rows) against references (columns): in how many frames a subject was nearest to which.
        rates: shares of frames by name, such as "swapped", "missing" and "doubled".
    """

    tracks: tuple[Track, ...]
    frames: tuple[int, ...]
    confusion: tuple[tuple[float, ...], ...]
    rates: Mapping[str, float]


def identity(details: Mapping[str, Any]) -> Identity | None:
    """The tracking in a result's details, or None where there is none."""
    subjects = details.get("subjects") or ()
    if not subjects:
        return None
    tracks = tuple(Track(str(s.get("name", "")), _numbers(s.get("similarity", ()))) for s in subjects)
    confusion = tuple(tuple(float(count) for count in row) for row in details.get("confusion", ()))
    rates = {str(name): float(rate) for name, rate in dict(details.get("rates", {})).items() if rate is not None}
    frames = tuple(int(rank) for rank in details.get("frames", ()))
    longest = max(len(track.similarity) for track in tracks)
    return Identity(tracks, frames if len(frames) == longest else tuple(range(longest)), confusion, rates)


def subject_mean(result: Result) -> float | None:
    """Mean over a video's subjects of their mean similarity (table S.7, "Avg FaceSim")."""
    means = _means(result)
    return math.fsum(means) / len(means) if means else None


def subject_min(result: Result) -> float | None:
    """The mean similarity of a video's least similar subject (table S.7, "Min FaceSim")."""
    return min(_means(result), default=None)


def _means(result: Result) -> list[float]:
    """Per subject; one that is never seen counts as 0, the floor of a similarity, for it is surely not preserved."""
    found = identity(result.details)
    return [track.mean or 0.0 for track in found.tracks] if found else []


def _numbers(values: Sequence[Any]) -> tuple[float | None, ...]:
    return tuple(None if value is None else float(value) for value in values)

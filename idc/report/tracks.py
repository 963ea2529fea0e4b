"""What the identity tracking of a video says of its subjects: how like their references they are, frame by frame.

The details are those of `idc.metrics.identity.IdentityTracking` and of the toy world's `ToyIdentity`. They come from
a file, so they are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from idc.metrics.results import Result

METRICS = ("identity", "toy_identity")  # whose details have this form, the one that goes first first
RATES = ("missing", "swapped", "unsure", "doubled")


@dataclass(frozen=True)
class Track:
    """A subject over a video's judged frames: its cosine to its reference, None where it is missing, and its state."""

    name: str
    identity: float | None
    similarity: tuple[float | None, ...]
    states: tuple[str, ...]


@dataclass(frozen=True)
class Identity:
    """The tracking of one video of N subjects.

    Attributes:
        tracks: N of them, in the prompt's order.
        confusion: N rows of N + 1 shares: of the sightings of a subject's body, those that look like each reference;
            the last column is "like none". Empty where it is not known.
        rates: means over subjects and frames, by name (`RATES`).
    """

    tracks: tuple[Track, ...]
    confusion: tuple[tuple[float, ...], ...]
    rates: Mapping[str, float]


def identity(details: Mapping[str, Any]) -> Identity | None:
    """The tracking in a result's details; None where there is none, or none of this form."""
    try:
        subjects = details["subjects"]
        lines = details["similarity"]
        states = details.get("states") or [[]] * len(subjects)
        tracks = tuple(
            Track(
                str(subject["name"]),
                _number(subject.get("identity")),
                tuple(_number(value) for value in line),
                tuple(str(state) for state in row),
            )
            for subject, line, row in zip(subjects, lines, states, strict=True)
        )
        confusion = tuple(tuple(float(share) for share in row) for row in details.get("confusion", ()))
        if any(len(row) != len(tracks) + 1 for row in confusion) or len(confusion) not in (0, len(tracks)):
            confusion = ()
        rates = {name: rate for name in RATES if (rate := _number(details.get(name))) is not None}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return Identity(tracks, confusion, rates) if tracks else None


def subject_mean(result: Result) -> float | None:
    """Mean identity of a video's subjects (table S.7, "Avg FaceSim"); None where it was not tracked."""
    return _number(result.details.get("average"))


def subject_min(result: Result) -> float | None:
    """Identity of a video's least similar subject (table S.7, "Min FaceSim"); None where it was not tracked."""
    return _number(result.details.get("minimum"))


def subject_rate(result: Result, rate: str) -> float | None:
    """One of `RATES` of a video, as a share of subjects and frames; None where it was not tracked."""
    return _number(result.details.get(rate))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

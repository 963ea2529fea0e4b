"""Exact scorers of the toy world: what a video shows, against what its `ToySpec` asked for.

Nothing is learned. Subjects are saturated or dark and backgrounds are neither, so a threshold finds them; hue tells
the colours apart, overlap with the world's own templates the shapes and textures. The scorers do not look for a
subject where the spec has it: a generated video may place it anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from idc.data import toy_render as render
from idc.data.toy import ToySpec
from idc.data.toy_tracks import Track, find_tracks, to_frames

ATTRIBUTES = ("colour", "shape", "texture")
BACKGROUND_TOLERANCE = 0.12  # of the range [0, 1], largest channel: tones and colours are at least 0.16 apart
STILL = 0.05  # a path that stays within this radius (short sides) counts as no motion


@dataclass(frozen=True)
class SubjectScore:
    """How one asked-for subject came out; `track` is None where it is missing, and then the rest means nothing.

    Attributes:
        found: what the video shows in its place: colour, shape and texture by name.
        presence: share of the frames that show it.
        colour, shape, texture: 1 or 0 for the colour; the share of its frames that look like the right shape or
            texture more than like any other.
        motion: how well its path agrees with the asked one in [0, 1] (see `motion_score`), None if not measurable.
        leaks: attributes that show another subject's value in place of its own.
    """

    track: Track | None
    found: Mapping[str, str] = field(default_factory=dict)
    presence: float = 0.0
    colour: float = 0.0
    shape: float = 0.0
    texture: float = 0.0
    motion: float | None = None
    leaks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToyScore:
    """The scores of one video, all in [0, 1], 1 is best; None where a score has nothing to stand on.

    Attributes:
        background: share of the pixels clear of subjects that are within 0.12 of the asked background.
        count: 1 for the right number of subjects, 1 - |found - asked| / asked otherwise, not below 0.
        presence: mean share of the frames in which each asked subject is seen; a missing one has 0.
        colour, shape, texture, motion: means over the subjects that were found (see `SubjectScore`).
        separation: 1 - leaks / chances, a chance being an attribute of a found subject of which another asked
            subject has a different value.
        total: 0.2 background + 0.2 count + 0.6 mean over the asked subjects of
            presence x mean(colour, shape, texture, motion), a missing one counting 0; a background that cannot be
            judged counts 0.
        missing, extra, doubled, swapped: numbers of asked subjects without a track, of tracks beyond the asked
            number, of tracks that look in all three attributes like a subject that has a better one, and of pairs
            that wear each other's colour.
        reasons: for each score that is None, why.
    """

    background: float | None = None
    count: float | None = None
    presence: float | None = None
    colour: float | None = None
    shape: float | None = None
    texture: float | None = None
    motion: float | None = None
    separation: float | None = None
    total: float | None = None
    missing: int = 0
    extra: int = 0
    doubled: int = 0
    swapped: int = 0
    subjects: tuple[SubjectScore, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    NAMES = ("background", "count", "presence", "colour", "shape", "texture", "motion", "separation", "total")

    def as_dict(self) -> dict[str, float | None]:
        """The nine scores by name."""
        return {name: getattr(self, name) for name in self.NAMES}


def score_video(video: object, spec: ToySpec) -> ToyScore:
    """Score one clip against what was asked for.

    Args:
        video: uint8 `[T, H, W, 3]`, or a float array or tensor `[3, T, H, W]` in [-1, 1].
        spec: what was asked for, as in `Sample.meta["toy"]` (through `ToySpec.from_json`).

    Returns:
        the scores. A video that cannot be judged (wrong shape, NaN) has None everywhere and the reason under "video".
    """
    try:
        frames = to_frames(video, (spec.frames, spec.height, spec.width))
    except ValueError as error:
        return ToyScore(reasons={"video": str(error)})
    tracks, clear = find_tracks(frames, min(spec.radius_px(index) for index in range(len(spec.subjects))))
    pairs = _assign(tracks, spec)
    subjects = tuple(_subject_score(spec, index, pairs) for index in range(len(spec.subjects)))
    return _summary(spec, tracks, subjects, _background(frames, clear, spec))


def motion_score(spec: ToySpec, index: int, track: Track, target: Track | None = None) -> float | None:
    """Agreement of a track with the asked motion, in [0, 1].

    A subject that moves or bounces: cosine between its path and the asked one, both centred, negative counting 0,
    times min(1, 2 x its amplitude / the asked one): half the way is enough, the direction counts. One that stays: 1
    while it keeps within 0.05 short sides of its mean place, falling to 0 at 0.15. One that orbits: clockwise angle
    swept about its target over half the asked angle, in [0, 1]; None without a track of the target.
    """
    subject, side = spec.subjects[index], min(spec.height, spec.width)
    path = track.centres - track.centres.mean(0)
    amplitude = float(np.sqrt((path**2).sum(1).mean()))
    if subject.action == "stays":
        reach = float(np.hypot(*path.T).max()) / side
        return float(np.clip(1.5 - reach / (2 * STILL), 0, 1))
    if subject.action == "orbits":
        if target is None:
            return None
        shared, mine, theirs = np.intersect1d(track.frames, target.frames, return_indices=True)
        if len(shared) < 2:
            return None
        offset = track.centres[mine] - target.centres[theirs]
        angle = np.unwrap(np.arctan2(offset[:, 1], offset[:, 0]))
        return float(np.clip((angle[-1] - angle[0]) / (0.5 * subject.sweep), 0, 1))
    asked = spec.centres()[index][track.frames]
    asked = asked - asked.mean(0)
    wanted = float(np.sqrt((asked**2).sum(1).mean()))
    if wanted == 0 or len(path) < 2:
        return None
    cosine = float((path * asked).sum(1).mean() / max(amplitude * wanted, 1e-6))
    return max(cosine, 0.0) * min(1.0, 2 * amplitude / wanted)


def _assign(tracks: list[Track], spec: ToySpec) -> dict[int, Track]:
    """Subject -> track by the best sum of colour, shape, texture and half the motion (Hungarian method)."""

    def likeness(index: int, track: Track) -> float:
        subject = spec.subjects[index]
        looks = (track.colour == subject.colour) + track.shapes[subject.shape] + track.textures[subject.texture]
        # Presence breaks ties: of two doubles, the one that stays on screen is the subject.
        return looks + 0.5 * (motion_score(spec, index, track) or 0.0) + 0.1 * len(track.frames) / spec.frames

    gains = np.array([[likeness(index, track) for track in tracks] for index in range(len(spec.subjects))])
    rows, columns = linear_sum_assignment(gains, maximize=True) if tracks else ((), ())
    return {int(row): tracks[column] for row, column in zip(rows, columns, strict=True)}


def _subject_score(spec: ToySpec, index: int, pairs: Mapping[int, Track]) -> SubjectScore:
    track, subject = pairs.get(index), spec.subjects[index]
    if track is None:
        return SubjectScore(None)
    others = [other for number, other in enumerate(spec.subjects) if number != index]
    leaks = tuple(
        name
        for name in ATTRIBUTES
        if track.looks[name] != getattr(subject, name)
        and track.looks[name] in {getattr(other, name) for other in others}
    )
    return SubjectScore(
        track=track,
        found=track.looks,
        presence=len(track.frames) / spec.frames,
        colour=float(track.colour == subject.colour),
        shape=track.shapes[subject.shape],
        texture=track.textures[subject.texture],
        motion=motion_score(spec, index, track, pairs.get(-1 if subject.target is None else subject.target)),
        leaks=leaks,
    )


def _summary(
    spec: ToySpec, tracks: list[Track], subjects: tuple[SubjectScore, ...], background: float | None
) -> ToyScore:
    asked, found = len(subjects), [subject for subject in subjects if subject.track is not None]
    reasons = {} if background is not None else {"background": "no pixel is clear of subjects"}
    means: dict[str, float | None] = {}
    for name in (*ATTRIBUTES, "motion"):
        values = [value for value in (getattr(subject, name) for subject in found) if value is not None]
        means[name] = float(np.mean(values)) if values else None
        if not values:
            reasons[name] = "no subject was found" if not found else "no path could be measured"
    chances = sum(
        any(getattr(other, name) != getattr(mine, name) for other in spec.subjects)
        for mine, score in zip(spec.subjects, subjects, strict=True)
        if score.track is not None
        for name in ATTRIBUTES
    )
    leaks = sum(len(subject.leaks) for subject in found)
    if not chances:
        reasons["separation"] = "no subject was found" if not found else "one subject has nobody to leak from"
    count = max(0.0, 1 - abs(len(tracks) - asked) / asked)
    return ToyScore(
        background=background,
        count=count,
        presence=float(np.mean([subject.presence for subject in subjects])),
        **means,
        separation=1 - leaks / chances if chances else None,
        total=0.2 * (background or 0.0) + 0.2 * count + 0.6 * float(np.mean([_worth(s) for s in subjects])),
        missing=asked - len(found),
        extra=max(0, len(tracks) - asked),
        doubled=_doubled(spec, tracks),
        swapped=_swapped(spec, subjects),
        subjects=subjects,
        reasons=reasons,
    )


def _worth(subject: SubjectScore) -> float:
    parts = [subject.colour, subject.shape, subject.texture]
    return subject.presence * float(np.mean(parts if subject.motion is None else [*parts, subject.motion]))


def _doubled(spec: ToySpec, tracks: list[Track]) -> int:
    looks = [tuple(track.looks[name] for name in ATTRIBUTES) for track in tracks]
    asked = [tuple(getattr(subject, name) for name in ATTRIBUTES) for subject in spec.subjects]
    return sum(max(0, looks.count(look) - 1) for look in asked)


def _swapped(spec: ToySpec, subjects: tuple[SubjectScore, ...]) -> int:
    found = [subject.found.get("colour") for subject in subjects]
    asked = [subject.colour for subject in spec.subjects]
    pairs = [(i, j) for i in range(len(asked)) for j in range(i)]
    return sum(found[i] == asked[j] and found[j] == asked[i] for i, j in pairs)


def _background(frames: NDArray[np.float32], clear: NDArray[np.bool_], spec: ToySpec) -> float | None:
    if not clear.any():
        return None
    asked = render.background(spec.background_colour, spec.background_pattern, spec.height, spec.width)
    near: NDArray[np.bool_] = np.logical_and.reduce(np.abs(frames - asked) <= BACKGROUND_TOLERANCE, axis=-1)
    return float(near[clear].mean())

"""The toy world's exact scorers as metrics: what a clip shows against the `ToySpec` in its `meta["toy"]`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from idc.data.toy import ToySpec, ToySubject
from idc.data.toy_scoring import ATTRIBUTES, SubjectScore, ToyScore, score_video
from idc.metrics.base import Clip, Score, VideoMetric

ALIKE = 0.6  # of the attributes: two of three, so that a subject with one wrong attribute still looks like itself


class ToyMetric(VideoMetric):
    """What the exact scorers found in a clip of the toy world, as `summary` puts it."""

    frames = None

    def applies(self, clip: Clip) -> bool:
        return "toy" in clip.meta

    def score(self, clip: Clip) -> Score:
        judged = judge(clip)
        return judged if isinstance(judged, Score) else self.summary(*judged)

    @abstractmethod
    def summary(self, spec: ToySpec, scores: ToyScore) -> Score:
        """The score of a clip that could be judged."""


class ToyScores(ToyMetric):
    """`ToyScore.total` in [0, 1]: background, count, and each subject's presence, looks and motion.

    `details`: the nine scores of `ToyScore` by name (null with a reason under `reasons`), `missing`, `extra`,
    `doubled`, `swapped` (numbers of subjects), and `subjects`, each with name, presence, colour, shape, texture,
    motion, leaks and what was found in its place.

    >>> import numpy as np
    >>> ToyScores().score(Clip("a", np.zeros((9, 64, 64, 3), np.uint8))).reason
    'the clip has no toy spec in its meta["toy"]'
    """

    name = "toy"

    def summary(self, spec: ToySpec, scores: ToyScore) -> Score:
        assert scores.total is not None
        return Score(
            scores.total,
            details={
                **scores.as_dict(),
                **{name: getattr(scores, name) for name in ("missing", "extra", "doubled", "swapped")},
                "subjects": [
                    _plain(subject, asked) for subject, asked in zip(scores.subjects, spec.subjects, strict=True)
                ],
                "reasons": dict(scores.reasons),
            },
        )


class ToyIdentity(ToyMetric):
    """Mean over the asked subjects of presence x mean(colour, shape, texture right), in [0, 1]; a missing one has 0.

    What motion, background and extra subjects are like does not matter. `details` are those of
    `identity.IdentityTracking`, as far as the toy world has them, where the likeness of a subject to a reference is
    the share of the three attributes that it has in common with it; and `exact`, the share of the asked subjects that
    are there with all three attributes right in most of their frames.

    >>> import numpy as np
    >>> from idc.data.toy import ToyWorld, render_clip
    >>> spec = ToyWorld().spec(0)
    >>> round(ToyIdentity().score(Clip("0", render_clip(spec), meta={"toy": spec.to_json()})).value, 2)
    1.0
    """

    name = "toy_identity"

    def summary(self, spec: ToySpec, scores: ToyScore) -> Score:
        identity = [subject.presence * likeness(subject, asked) for subject, asked in _pairs(scores, spec)]
        return Score(float(np.mean(identity)), details=_identity_details(spec, scores, identity))


def judge(clip: Clip) -> tuple[ToySpec, ToyScore] | Score:
    """What the clip's spec asks for and the scores against it, or the failure."""
    if "toy" not in clip.meta:
        return Score.failed('the clip has no toy spec in its meta["toy"]')
    try:
        spec = ToySpec.from_json(clip.meta["toy"])
    except (TypeError, KeyError, AttributeError) as error:
        return Score.failed(f'meta["toy"] is no toy spec: {error}')
    scores = score_video(clip.frames_THWC, spec)
    if scores.total is None:
        return Score.failed(scores.reasons["video"])
    return spec, scores


def likeness(subject: SubjectScore, asked: ToySubject) -> float:
    """How far a found subject looks like an asked one: mean over colour, shape and texture of the share of its frames
    that show the right one; 0 where it was not found."""
    track = subject.track
    if track is None:
        return 0.0
    return (float(track.colour == asked.colour) + track.shapes[asked.shape] + track.textures[asked.texture]) / 3


def _identity_details(spec: ToySpec, scores: ToyScore, identity: list[float]) -> dict[str, Any]:
    count, found = len(identity), [subject.track is not None for subject in scores.subjects]
    table = np.array([[likeness(subject, asked) for asked in spec.subjects] for subject in scores.subjects])
    # The diagonal wins ties: a subject that looks as much like itself as like another is itself.
    looks = (table + 1e-6 * np.eye(count)).argmax(1)
    looks[table.max(1) < ALIKE] = count
    shown = [set(() if subject.track is None else subject.track.frames.tolist()) for subject in scores.subjects]
    states = [
        ["missing" if t not in frames else "seen" if looks[n] in (n, count) else "swapped" for t in range(spec.frames)]
        for n, frames in enumerate(shown)
    ]
    rates = {rate: [row.count(rate) / spec.frames for row in states] for rate in ("missing", "swapped")}
    exact = [
        subject.track is not None and min(subject.colour, subject.shape, subject.texture) > 0.5
        for subject in scores.subjects
    ]
    return {
        "subjects": [
            {
                "name": asked.name,
                "reference": n,
                "kind": "object",
                "identity": identity[n],
                "similarity": float(table[n, n]) if found[n] else None,
                "missing": rates["missing"][n],
                "swapped": rates["swapped"][n],
            }
            for n, asked in enumerate(spec.subjects)
        ],
        "average": float(np.mean(identity)),
        "minimum": min(identity),
        "exact": float(np.mean(exact)),
        **{rate: float(np.mean(values)) for rate, values in rates.items()},
        "doubled": min(1.0, scores.doubled / count),
        "similarity": [
            [float(table[n, n]) if t in frames else None for t in range(spec.frames)] for n, frames in enumerate(shown)
        ],
        "states": states,
        "confusion": [[float(found[n] and looks[n] == m) for m in range(count + 1)] for n in range(count)],
        "likeness": [row.tolist() if found[n] else [None] * count for n, row in enumerate(table)],
        "strangers": float(scores.extra),
        "not_judged": [],
    }


def _pairs(scores: ToyScore, spec: ToySpec) -> list[tuple[SubjectScore, ToySubject]]:
    return list(zip(scores.subjects, spec.subjects, strict=True))


def _plain(subject: SubjectScore, asked: ToySubject) -> Mapping[str, Any]:
    names = ("presence", *ATTRIBUTES, "motion")
    wanted = {name: asdict(asked)[name] for name in ATTRIBUTES}
    scores = {name: getattr(subject, name) for name in names} if subject.track is not None else dict.fromkeys(names)
    return {
        "name": asked.name,
        "asked": wanted,
        "found": dict(subject.found),
        **scores,
        "presence": subject.presence,
        "leaks": list(subject.leaks),
    }

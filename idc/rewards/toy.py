"""The paper's four rewards on the toy world's exact scores, so that the same composite runs there.

    face        (1 - lambda) mean_k + lambda min_k over the subjects of presence x share of colour, shape, texture right
    subject     whether the asked subjects, all of the time, and nobody else, are there: looks do not matter
    aesthetics  the background: share of the pixels clear of subjects that are as asked
    natural     motion: how well each subject's path agrees with the asked one, a missing subject counting 0

No two look at the same thing, so that an ablation of one shows in its own column.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod

from idc.data.toy import ToySpec
from idc.data.toy_scoring import ToyScore
from idc.metrics.base import Clip, Score
from idc.metrics.toy import ToyIdentity, judge
from idc.rewards.base import Reward
from idc.rewards.measures import fraction, mean_and_min

_last = threading.local()


def judge_once(clip: Clip) -> tuple[ToySpec, ToyScore] | Score:
    """`idc.metrics.toy.judge`, once for the rewards of a composite that see one clip after each other."""
    if getattr(_last, "clip", None) is not clip:
        _last.judged = judge(clip)
        _last.clip = clip
    return _last.judged


class ToyReward(Reward):
    """What the exact scorers found, as `value` puts it, in [0, 1]. A clip without a toy spec is a failure."""

    thread_safe = True

    def score(self, clip: Clip) -> Score:
        judged = judge_once(clip)
        return judged if isinstance(judged, Score) else self.value(*judged)

    @abstractmethod
    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        """The reward of a clip that could be judged."""


class ToyFace(ToyReward):
    """(1 - lambda) mean_k + lambda min_k of presence x likeness, as `FaceReward` has it; `min_weight` is lambda.

    Raises:
        UserError: for a `min_weight` outside of [0, 1].

    >>> from idc.data.toy import ToyWorld, render_clip
    >>> spec = ToyWorld().spec(0)
    >>> round(ToyFace().score(Clip("0", render_clip(spec), meta={"toy": spec.to_json()})).value, 2)
    1.0
    """

    name = "toy_face"

    def __init__(self, min_weight: float = 0.5) -> None:
        self.min_weight = fraction("min_weight", min_weight)
        self._metric = ToyIdentity()

    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        found = self._metric.summary(spec, scores)
        names = ("average", "minimum", "exact", "missing", "swapped", "doubled")
        details = {name: found.details[name] for name in names}
        return Score(mean_and_min(found, self.min_weight), details=details)


class ToySubject(ToyReward):
    """Mean of `presence` (mean share of the frames in which each asked subject is seen) and `count` (1 for the right
    number of subjects, less by the share of those missing or too many)."""

    name = "toy_subject"

    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        assert scores.presence is not None
        assert scores.count is not None
        return Score(0.5 * (scores.presence + scores.count), details={"count": scores.count})


class ToyAesthetics(ToyReward):
    """The share of the pixels clear of subjects that show the asked background; 0 where no pixel is clear."""

    name = "toy_aesthetics"

    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        return Score(scores.background or 0.0)


class ToyNatural(ToyReward):
    """Mean over the asked subjects of presence x agreement of the path with the asked one; 0 for a missing subject.

    A subject that is there without a measurable path (in one frame, say, or one that orbits a missing one) is left
    out; a clip with no other fails.
    """

    name = "toy_natural"

    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        paths = [
            0.0 if subject.track is None else None if subject.motion is None else subject.presence * subject.motion
            for subject in scores.subjects
        ]
        measured = [path for path in paths if path is not None]
        if not measured:
            return Score.failed("no subject's path can be measured", paths=paths)
        return Score(math.fsum(measured) / len(measured), details={"paths": paths})

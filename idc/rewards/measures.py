"""The four rewards of the paper on real networks, and the plainest reward there is, to bring a run up.

The paper gives no scale for its rewards. Here each is on the scale on which the paper's tables print its metric
(`idc.metrics.total`, protocol "paper"), not cut at its ends.
"""

from __future__ import annotations

from idc.errors import UserError
from idc.metrics.aesthetics import Aesthetics
from idc.metrics.base import Clip, Score
from idc.metrics.identity import IdentityTracking
from idc.metrics.natural import NaturalScore
from idc.metrics.nexus import NexusScore
from idc.metrics.total import scale
from idc.models.faces import FaceBackend
from idc.rewards.base import MetricReward, Reward


class FaceReward(MetricReward):
    """(1 - lambda) mean_k + lambda min_k over the people k asked for, in [0, 1] (facts of the paper, R_face).

    A person's value is the mean over frames of the cosine between the face in the video and that of the reference,
    as `IdentityTracking` finds it: missing, unlike everybody, or on another's body counts 0 in that frame. The minimum
    keeps one person from being bought with another. An item without people has no such reward (`applies`).

    Args:
        faces: finds and tells apart faces; the offline YuNet and SFace where None, where the paper has ArcFace.
        min_weight: the paper's lambda in [0, 1]; table S.7 sweeps 0, .25, .5, .75 and 1.
        threshold: cosine below which a face is nobody; the backend's own where None. A lower one gives a signal to a
            model that is not there yet.
        frames: how many frames are looked at, spread evenly; None for all.

    Raises:
        UserError: for a number out of its range.
    """

    def __init__(
        self,
        faces: FaceBackend | None = None,
        min_weight: float = 0.5,
        threshold: float | None = None,
        frames: int | None = 32,
    ) -> None:
        super().__init__(IdentityTracking(faces, threshold=threshold, frames=frames), "face")
        self.min_weight = fraction("min_weight", min_weight)

    def raw(self, found: Score) -> float:
        return mean_and_min(found, self.min_weight)


class SubjectReward(MetricReward):
    """NexusScore after the paper: mean cosine over all frames of what the references name, in [-1, 1].

    Raises:
        UserError: for a metric of another protocol: the benchmark's divides by the number of frames that show the
            subject, so that a model learns to show it once.
    """

    def __init__(self, metric: NexusScore | None = None) -> None:
        metric = NexusScore("paper") if metric is None else metric
        if not metric.paper:
            raise UserError(
                f"protocol={metric.protocol!r} of SubjectReward: must be 'paper'; the benchmark's NexusScore falls "
                "with each frame that shows the subject"
            )
        super().__init__(metric, "subject", scale("nexusscore", "paper"))


class AestheticReward(MetricReward):
    """LAION's rating, 4 as 0 and 7 as 1 as in the paper's tables, in [-4/3, 2]."""

    def __init__(self, metric: Aesthetics | None = None) -> None:
        super().__init__(metric or Aesthetics(), "aesthetics", scale("aesthetics", "paper"))


class NaturalReward(MetricReward):
    """NaturalScore, 1 as 0 and 5 as 1, in [0, 1]."""

    def __init__(self, metric: NaturalScore | None = None) -> None:
        super().__init__(metric or NaturalScore(), "natural", scale("naturalscore", "paper"))


class Brightness(Reward):
    """Mean pixel in [0, 1]: a run whose reward does not rise on this has a fault elsewhere.

    >>> import numpy as np
    >>> Brightness().score(Clip("white", np.full((1, 4, 4, 3), 255, np.uint8))).value
    1.0
    """

    name = "brightness"
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        return Score(float(clip.frames_THWC.mean()) / 255)


def mean_and_min(found: Score, min_weight: float) -> float:
    """(1 - lambda) mean + lambda minimum of the subjects' identities in the details of a tracking metric."""
    return (1 - min_weight) * found.details["average"] + min_weight * found.details["minimum"]


def fraction(name: str, value: float) -> float:
    """`value`, or `UserError` unless it lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f"{name}={value}: must lie between 0 and 1")
    return float(value)

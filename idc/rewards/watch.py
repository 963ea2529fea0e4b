"""Measures that are watched and never optimised: what a policy gives up, or overdoes, for its reward.

They are terms without weight, `Term(Motion(), weight=0, monitor=True)`, or `PaperReward(watched=[...])`, and
`idc.callbacks.hacking.HackingMonitor` raises an alarm for them. Any metric is one through `MetricReward`: how far
subjects are copies of their references (`CopyPaste`; 1 is no copy), the prompt (`GmeScore`), the benchmark's drift
(`MotionAmplitude`). The diversity of a group is no measure of one clip: `idc.stages.watched`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from idc.metrics.base import Clip, Score
from idc.metrics.motion import MotionAmplitude
from idc.rewards.base import Reward

LUMA = np.array([0.299, 0.587, 0.114], np.float32) / 255  # BT.601, as OpenCV's grey


class Motion(Reward):
    """Mean length of the optical flow in widths of the picture per second, 0 or more; a clip of one frame fails.

    Rewards of likeness favour subjects that stand still (in the paper's table 1 alignment lowers motion). The
    benchmark's motion amplitude, which is in the details as `drift`, cannot tell two that walk apart from two that
    stand. Dense flow on all frames: about 1 s of CPU for 81 frames of 416 x 240.
    """

    name = "motion"
    bounds = (0.0, math.inf)
    thread_safe = True

    def __init__(self) -> None:
        self._metric = MotionAmplitude()
        self.models = self._metric.models

    def score(self, clip: Clip) -> Score:
        found = self._metric.score(clip)
        return found if found.value is None else Score(found.details["widths_per_second"], details=found.details)


class Sharpness(Reward):
    """Variance of the Laplacian (4 neighbours) of the luma in [0, 1], mean over frames; in [0, 16].

    At the clip's own size, without its border: compare it between clips of one size. Blur lowers it, and so do flat
    pictures; noise and ringing raise it. Frames of fewer than 3 x 3 pixels fail.

    >>> Sharpness().score(Clip("flat", np.full((1, 8, 8, 3), 90, np.uint8))).value
    0.0
    """

    name = "sharpness"
    bounds = (0.0, 16.0)
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        if min(clip.frames_THWC.shape[1:3]) < 3:
            return Score.failed("frames of fewer than 3 x 3 pixels have no Laplacian")
        return _over_frames(clip, lambda frame_HWC: float(_laplacian(frame_HWC).var(dtype=np.float64)))


class Saturation(Reward):
    """Mean over pixels and frames of the largest less the smallest of red, green and blue, in [0, 1]: 0 is grey.

    That is HSV's saturation times its value, because the saturation alone makes noise in the dark as loud as colours.
    """

    name = "saturation"
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        return _over_frames(clip, lambda frame_HWC: float(np.ptp(frame_HWC, axis=-1).mean(dtype=np.float64)) / 255)


def _laplacian(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of the luma, `[H - 2, W - 2]`."""
    luma_HW = frame_HWC.astype(np.float32) @ LUMA
    neighbours = luma_HW[:-2, 1:-1] + luma_HW[2:, 1:-1] + luma_HW[1:-1, :-2] + luma_HW[1:-1, 2:]
    return np.asarray(neighbours - 4 * luma_HW[1:-1, 1:-1], np.float32)


def _over_frames(clip: Clip, measure: Callable[[NDArray[np.uint8]], float]) -> Score:
    frames = [measure(frame_HWC) for frame_HWC in clip.frames_THWC]  # one at a time: a clip in floats is large
    return Score(math.fsum(frames) / len(frames), details={"frames": frames})

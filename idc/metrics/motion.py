"""Motion amplitude: OpenS2V-Eval's net drift from dense optical flow, with the magnitude that it loses beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from idc.metrics.base import Clip, Score, VideoMetric

GRID_WIDTH = 16  # columns that a flow map is reduced to


def farneback_flow(frames_THWC: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """Dense flow between neighbouring frames: T - 1 maps `[H, W, 2]` of (x, y) in pixels per frame.

    Farneback's method as OpenS2V-Eval runs it: pyramid scale 0.5, 3 levels, window 15, 3 iterations, polynomials of 5
    pixels with sigma 1.2. Grey values weigh red as if it were blue, and blue as red, as there.

    Args:
        frames_THWC: RGB uint8 `[T, H, W, 3]` at native size.
    """
    import cv2

    greys = (cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames_THWC)
    for before, after in pairwise(greys):
        flow = np.zeros((*before.shape, 2), np.float32)  # overwritten: flags has no OPTFLOW_USE_INITIAL_FLOW
        yield np.asarray(cv2.calcOpticalFlowFarneback(before, after, flow, 0.5, 3, 15, 3, 5, 1.2, 0), np.float32)


def reduce_flow(flow_HWC: NDArray[np.float32]) -> NDArray[np.float32]:
    """A flow map area-resized to 16 columns, `[max(1, int(H * 16 / W)), 16, 2]`."""
    import cv2

    height, width, _ = flow_HWC.shape
    size = GRID_WIDTH, max(1, int(height * (GRID_WIDTH / width)))
    return np.asarray(cv2.resize(flow_HWC, size, interpolation=cv2.INTER_AREA), np.float32)


def net_drift(flows: Iterable[NDArray[np.float32]]) -> float:
    """|mean of the signed flow over time, place and both components| of reduced maps, in pixels per frame.

    It is the drift along the diagonal and no amplitude: opposite motions, zooms and dx = -dy give 0.
    """
    return abs(float(np.mean([flow.mean(dtype=np.float64) for flow in flows])))


class MotionAmplitude(VideoMetric):
    """OpenS2V-Eval's motion amplitude ("Motion" in 1.0 and in the paper's tables), cut at 1.

    It depends on resolution and frame rate. The details give the `drift` without the cut and what it loses, the
    `magnitude`: the flow vectors' mean length in pixels per frame, and in `widths_per_second` of the picture, which
    compares between sizes and rates. A clip of one frame fails.

    >>> import numpy as np
    >>> from idc.metrics.base import Clip
    >>> metric = MotionAmplitude()
    >>> metric.update(Clip("still", np.zeros((3, 32, 32, 3), np.uint8)))
    >>> metric.compute().item()
    0.0
    """

    name = "motion_amplitude"
    frames = None
    models = ("Farneback optical flow (OpenCV)",)

    def score(self, clip: Clip) -> Score:
        if len(clip.frames_THWC) < 2:
            return Score.failed("one frame: motion takes at least two")
        reduced, lengths = [], []
        for flow_HWC in farneback_flow(clip.frames_THWC):  # one map at a time: a whole clip's take gigabytes
            reduced.append(reduce_flow(flow_HWC))
            lengths.append(float(np.linalg.norm(flow_HWC, axis=-1).mean(dtype=np.float64)))
        drift, magnitude = net_drift(reduced), float(np.mean(lengths))
        details = {
            "drift": drift,
            "magnitude": magnitude,
            "widths_per_second": magnitude * clip.fps / clip.frames_THWC.shape[2],
        }
        return Score(min(drift, 1.0), details=details)

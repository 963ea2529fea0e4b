"""Motion smoothness (OpenS2V-Eval 1.1): where the judged quality of a short window jumps, a frame is an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from idc.metrics.base import Clip, Score, VideoMetric
from idc.metrics.qalign import QAlignRater

WINDOW = 3
THRESHOLD = 0.025


class FrameRater(Protocol):
    """What judges a window of frames: the benchmark's is Q-Align's video score.

    Attributes:
        name: of the model.
    """

    name: str

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the model; idempotent."""

    def unload(self) -> None:
        """Free it."""

    def rate(self, frames_THWC: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> float:
        """Quality in [0, 1] of RGB uint8 frames `[T, H, W, 3]` as one video."""


def sliding_windows(total: int, size: int = WINDOW) -> NDArray[np.int64]:
    """The window of frames that stands for each frame, `[total, size]`, padded at the ends as the benchmark does.

    The frame is in the middle (left of it for even sizes). Frames too near the start get frame 0 alone, `size` times.
    Too near the end, the window's first frame is repeated at its front; a window that starts at frame 0 has its last
    one repeated at its end.
    """
    left = (size - 1) // 2
    windows = []
    for frame in range(total):
        start = max(0, frame - left)
        window = list(range(start, min(total, frame + size - left)))
        lacking = size - len(window)
        if frame < left:
            window = [0] * size
        elif start == 0:
            window += [window[-1]] * lacking
        else:
            window = [start] * lacking + window
        windows.append(window)
    return np.array(windows, np.int64)


def artifact_frames(scores: Sequence[float], threshold: float = THRESHOLD) -> list[int]:
    """Frames on either side of a step between neighbouring scores that is larger than `threshold`, sorted."""
    steps = np.flatnonzero(np.abs(np.diff(scores)) > threshold)
    return np.union1d(steps, steps + 1).tolist()


class MotionSmoothness(VideoMetric):
    """1 - artifact frames / frames, in [0, 1].

    A clip of one frame fails: the benchmark's rule would call it perfectly smooth.

    Args:
        rater: judges a window of 3 frames; by default `QAlignRater`, the five-level rule for the quality of a video.

    >>> import numpy as np
    >>> from idc.metrics.base import Clip
    >>> class Brightness:
    ...     name = "brightness"
    ...     def load(self, device="cpu"): ...
    ...     def unload(self): ...
    ...     def rate(self, frames_THWC): return float(frames_THWC.mean()) / 255
    >>> metric = MotionSmoothness(Brightness())
    >>> metric.update(Clip("still", np.zeros((4, 8, 8, 3), np.uint8)))
    >>> metric.compute().item()
    1.0
    """

    name = "motion_smoothness"
    held = ("rater",)
    frames = None

    def __init__(self, rater: FrameRater | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rater: FrameRater = QAlignRater() if rater is None else rater
        self.models = (self.rater.name,)

    def score(self, clip: Clip) -> Score:
        total = len(clip.frames_THWC)
        if total < 2:
            return Score.failed("one frame: smoothness takes at least two")
        quality = [float(self.rater.rate(clip.frames_THWC[window])) for window in sliding_windows(total)]
        artifacts = artifact_frames(quality)
        return Score(1 - len(artifacts) / total, details={"quality": quality, "artifacts": artifacts})

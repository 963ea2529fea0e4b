"""Q-Align: how good a video looks, from the five words that an image-text model might go on with.

The published scorer (q-future/one-align, mPLUG-Owl2) has no native class in transformers: the judge is any image-text
model, asked in one-align's words with the chat template of its own. Scores of different judges do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from idc.errors import UserError, nearest
from idc.metrics.base import Clip, Score, VideoMetric
from idc.models.judges import ImageTextJudge, JudgeError

Task = Literal["quality", "aesthetics"]
Kind = Literal["video", "image"]

LEVELS = ("excellent", "good", "fair", "poor", "bad")
WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
SIDE = 448  # pixels
CLIP_MEAN = (122, 116, 104)  # CLIP's mean colour, which one-align pads with


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities of the five levels.

    Raises:
        ValueError: for another number of logits, or one that is not finite.
    """
    if len(logits) != len(LEVELS) or not all(map(math.isfinite, logits)):
        raise ValueError(f"{len(LEVELS)} finite logits are needed, not {list(logits)}")
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def expectation(probabilities: Sequence[float]) -> float:
    """The five levels' probabilities weighted with `WEIGHTS`, in [0, 1] (Wu et al. 2023, Q-Align, section 3.2).

    The other public scale, 1 to 5, is 1 + 4 x.
    """
    return math.fsum(w * p for w, p in zip(WEIGHTS, probabilities, strict=True))


def pad_square(image_HWC: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.uint8]:
    """The picture centred on a square of CLIP's mean colour, resized (bicubic) to `side` x `side` pixels."""
    from PIL import Image

    height, width = image_HWC.shape[:2]
    longest = max(height, width)
    square = Image.new("RGB", (longest, longest), CLIP_MEAN)
    square.paste(Image.fromarray(image_HWC), ((longest - width) // 2, (longest - height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))


class QAlignRater:
    """Rates frames as one input, by the five-level rule; what `MotionSmoothness` asks window by window.

    Args:
        judge: an image-text model; the logits that a server shows do not suffice.
        task: "quality" or "aesthetics".
        kind: what the question calls the input, "video" or "image".

    Raises:
        UserError: for another task or kind.
    """

    def __init__(self, judge: ImageTextJudge | None = None, task: Task = "quality", kind: Kind = "video") -> None:
        for key, value, choices in (("task", task, get_args(Task)), ("kind", kind, get_args(Kind))):
            if value not in choices:
                raise UserError(f"{key}={value!r}: no such {key}{nearest(value, choices)}")
        self.judge, self.task, self.kind = judge or ImageTextJudge(), task, kind
        self.name = self.judge.name

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the judge; idempotent."""
        self.judge.load(device)

    def unload(self) -> None:
        """Free it."""
        self.judge.unload()

    def probabilities(self, frames_THWC: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[float]:
        """The probability of each of `LEVELS` for RGB uint8 frames `[T, H, W, 3]`."""
        question = f"How would you rate the {self.task} of this {self.kind}?"
        answer = f"The {self.task} of the {self.kind} is"
        return softmax(self.judge.level_logits([pad_square(frame) for frame in frames_THWC], question, answer, LEVELS))

    def rate(self, frames_THWC: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> float:
        """The rating in [0, 1] of RGB uint8 frames `[T, H, W, 3]`."""
        return expectation(self.probabilities(frames_THWC))


class QAlign(VideoMetric):
    """Q-Align of the frames at one a second, as ONE input of several pictures (`kind="video"`), or the mean over them
    judged one by one (`kind="image"`). In [0, 1], the scale of the paper's 0.351 and 0.410.

    The paper names neither task nor kind: the default is the quality of the video. Needs all frames, at their rate.

    Args:
        judge, task, kind: as of `QAlignRater`. Results for aesthetics go by the name "qalign_aesthetics".

    Example:
        >>> expectation(softmax([0.0, 0.0, 0.0, 0.0, 0.0]))
        0.5
    """

    name = "qalign"
    held = ("rater",)
    frames = None

    def __init__(
        self, judge: ImageTextJudge | None = None, task: Task = "quality", kind: Kind = "video", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.rater = QAlignRater(judge, task, kind)
        self.models = (self.rater.name,)
        if task == "aesthetics":
            self.name = "qalign_aesthetics"

    def score(self, clip: Clip) -> Score:
        if not (math.isfinite(clip.fps) and clip.fps > 0):
            return Score.failed(f"fps={clip.fps}: one frame a second cannot be taken")
        indices = range(0, len(clip.frames_THWC), max(1, round(clip.fps)))
        frames = [clip.frames_THWC[index] for index in indices]
        groups = [frames] if self.rater.kind == "video" else [[frame] for frame in frames]
        try:
            probabilities = [self.rater.probabilities(group) for group in groups]
        except JudgeError as error:
            return Score.failed(str(error))
        values = [expectation(group) for group in probabilities]
        details = {
            "frames": list(indices),
            "values": values,
            "probabilities": [dict(zip(LEVELS, group, strict=True)) for group in probabilities],
        }
        return Score(math.fsum(values) / len(values), details=details)

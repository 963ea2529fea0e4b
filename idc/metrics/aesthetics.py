"""Aesthetics: LAION's predictor over 32 frames, as OpenS2V-Eval computes it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from idc.metrics.base import Clip, Score, VideoMetric, sample_frames
from idc.models.aesthetic import AestheticPredictor
from idc.models.pretrained import sliver


class Aesthetics(VideoMetric):
    """Mean predicted rating of 32 frames, on the raters' scale: it is kept within [0, 10].

    The benchmark's range of 4 to 7 belongs to `idc.metrics.total.normalise`.

    Args:
        predictor: LAION's head on CLIP ViT-L/14.
        frames: how many are rated.

    >>> Aesthetics().models
    ('LAION aesthetic head', 'openai/clip-vit-large-patch14')
    """

    name = "aesthetics"
    held = ("predictor",)
    bounds: ClassVar[tuple[float, float]] = (0.0, 10.0)

    def __init__(self, predictor: AestheticPredictor | None = None, frames: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.predictor = predictor if predictor is not None else AestheticPredictor()
        self.frames = frames
        self.models = ("LAION aesthetic head", self.predictor.clip.name)

    def score(self, clip: Clip) -> Score:
        # A short video's frames are taken more than once, but rated once.
        frames, places = np.unique(sample_frames(len(clip.frames_THWC), self.frames), return_inverse=True)
        if reason := sliver(clip.frames_THWC[0]):
            return Score.failed(reason)
        ratings = self.predictor.predict(list(clip.frames_THWC[frames])).double()[places]
        if not ratings.isfinite().all():
            return Score.failed("the predictor gave a rating that is not finite")
        return Score(ratings.mean().clamp(*self.bounds).item(), details={"ratings": ratings.tolist()})

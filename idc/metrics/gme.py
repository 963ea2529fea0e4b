"""GmeScore: how well the frames match the prompt, by GME-Qwen2-VL, as OpenS2V-Eval computes it.

The paper's appendix C tells of one vector for the whole video and Qwen2.5-VL; no such encoder is published, and its
tables' figures for other systems are the benchmark's. All protocols use the benchmark's rule.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from idc.errors import UserError
from idc.metrics.base import Clip, Score, VideoMetric, sample_frames
from idc.models.embedders import GMEEmbedder, ImageTextEmbedder

INSTRUCTION = "Find an image that matches the given text."


class GmeScore(VideoMetric):
    """Mean cosine of 32 frames to the prompt, in [-1, 1]. A clip without a prompt fails.

    Args:
        embedder: GME by default; with CLIP it is the older CLIPScore, on another scale.
        frames: how many are compared.

    >>> GmeScore().models
    ('Alibaba-NLP/gme-Qwen2-VL-7B-Instruct',)
    """

    name = "gmescore"
    held = ("embedder",)
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __init__(self, embedder: ImageTextEmbedder | None = None, frames: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedder = embedder if embedder is not None else GMEEmbedder()
        self.frames = frames
        self.models = (self.embedder.name,)

    def score(self, clip: Clip) -> Score:
        if not clip.prompt.strip():
            return Score.failed("no prompt to compare with")
        self.embedder.load(self.embedder.device)  # what is missing there is no fault of the clip's
        # A short video's frames are taken more than once, but embedded once.
        frames, places = np.unique(sample_frames(len(clip.frames_THWC), self.frames), return_inverse=True)
        try:
            frames_ND = self.embedder.embed_images(list(clip.frames_THWC[frames])).double()[places]
        except UserError as error:
            return Score.failed(str(error))
        prompt_D = self.embedder.embed_texts([clip.prompt], INSTRUCTION)[0].double()
        cosines = frames_ND @ prompt_D
        if not cosines.isfinite().all():
            return Score.failed("the model gave a vector that is not finite")
        return Score(cosines.mean().clamp(*self.bounds).item(), details={"cosines": cosines.tolist()})

"""NaturalScore: how natural a video looks to a judge that sees 16 of its frames, an integer from 1 to 5.

Departs from OpenS2V-Eval: the question is our own and also asks about pasted-in subjects; the frames follow the
benchmark's usual rule (`sample_frames`) where its script takes every (T // 16)th and so misses the end; temperature 0
and a seed per run. The paper names neither frames, runs nor scale: all protocols are computed alike.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from idc.errors import UserError, nearest
from idc.metrics.base import Clip, Score, VideoMetric, sampled
from idc.models.judges import ImageTextJudge, Judge, JudgeError, quote

LONG_SIDE = 512  # pixels
LOWEST, HIGHEST = 1, 5

# A question is never edited, only followed by another version: scores under different versions do not compare.
QUESTIONS = {
    "v1": """\
The pictures are frames of one video, in order and evenly spaced over its length. Judge how natural the video looks, \
that is, how easily a careful viewer would take it for a recording of something real. Look at each of these:

1. Physics and common sense. Weight, contact, motion, light, shadows and reflections behave as in the real world, and \
what happens could happen.
2. Bodies and things. Faces, hands, limbs, animals and objects have the right parts in the right proportions, and \
move as such things move.
3. Continuity. From frame to frame nothing melts, flickers, appears, vanishes, multiplies or changes its identity, and \
motion neither freezes nor jumps.
4. Belonging. Nobody and nothing looks cut out of another picture and pasted in: light, scale, perspective, sharpness \
and edges fit the scene, and the subject turns, moves and reacts instead of holding one pose or expression throughout.
5. Traces of generation. No smeared texture, garbled writing, waxy skin, warped background or halo.

Give one integer:
5 - nothing gives it away; it passes for a recording
4 - natural on the whole; small and rare faults only
3 - in doubt; several small faults, or one that is plain to see
2 - clearly artificial; plain faults in much of the video
1 - artificial at first sight; grave faults throughout

How well or badly it was filmed, and how beautiful it is, do not count. Answer with the integer alone.""",
}

_SCORE = re.compile(r"(?:(?:score|answer|rating)\s*[:=]\s*)?([1-5])\.?", re.IGNORECASE)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)


def parse_score(answer: str) -> int:
    """The integer from 1 to 5 that an answer states, and nothing beside it.

    Accepts "4", "4.", "Score: 4", "**4**", '{"score": 4}' (other keys may stand beside it), each also in a code fence.

    Raises:
        ValueError: for anything else ("4/10", "3.7", "6", "4 or 5", prose, nothing), quoting the answer.

    Example:
        >>> parse_score("Score: 4")
        4
    """
    text = answer.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1]
    if found := _SCORE.fullmatch(text.replace("*", "").strip()):
        return int(found[1])
    if text.startswith("{") and (score := _json_score(text)) is not None:
        return score
    raise ValueError(f"not an integer from {LOWEST} to {HIGHEST}: {quote(answer)}" if text else "the answer is empty")


def _json_score(text: str) -> int | None:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    scores = [value for key, value in pairs if key == "score"]
    if len(scores) != 1:
        return None
    score = int(scores[0]) if isinstance(scores[0], str) and re.fullmatch("[1-5]", scores[0]) else scores[0]
    return score if type(score) is int and LOWEST <= score <= HIGHEST else None


def long_side(image_HWC: NDArray[np.uint8], pixels: int = LONG_SIDE) -> NDArray[np.uint8]:
    """The picture reduced or enlarged so that its longer side has `pixels`, the shorter one cut to an integer."""
    import cv2

    height, width = image_HWC.shape[:2]
    scale = pixels / max(height, width)
    size = max(1, int(width * scale + 1e-9)), max(1, int(height * scale + 1e-9))
    if size == (width, height):
        return image_HWC
    return cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


class NaturalScore(VideoMetric):
    """The mean of several runs of a judge over 16 frames with a long side of 512 pixels; in [1, 5].

    A run that has no answer, or an answer that is no score, fails the clip: a mean of fewer runs is another measure.
    In one process decoding is greedy, where all runs are the same and one is made for all.

    Args:
        judge: an image-text model in this process, or behind a server.
        runs: how many answers are asked for; the benchmark's 3.
        seed: run i is asked with seed + i.
        question: version of the question, a key of `QUESTIONS`.

    Raises:
        UserError: for a question that does not exist or runs below 1.

    Example:
        >>> parse_score('{"score": 4}'), QUESTIONS["v1"].splitlines()[-1][-30:]
        (4, 'Answer with the integer alone.')
    """

    name = "naturalscore"
    held = ("judge",)
    frames = 16
    bounds = (float(LOWEST), float(HIGHEST))

    def __init__(
        self, judge: Judge | None = None, runs: int = 3, seed: int = 0, question: str = "v1", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if runs < 1:
            raise UserError(f"runs={runs}: must be at least 1; the benchmark's is 3")
        if question not in QUESTIONS:
            raise UserError(f"question={question!r}: no such version{nearest(question, QUESTIONS)}")
        self.judge: Judge = judge or ImageTextJudge()
        self.runs, self.seed, self.question = runs, seed, question
        self.models = (self.judge.name,)

    def score(self, clip: Clip) -> Score:
        pictures = [long_side(frame) for frame in sampled(clip, self.frames)]
        seeds = [self.seed + run for run in range(self.runs)]
        asked = {"judge": self.judge.name, "question": self.question, "seeds": seeds}
        try:
            answers = self.judge.answers(pictures, QUESTIONS[self.question], seeds)
        except JudgeError as error:
            return Score.failed(str(error), **asked)
        try:
            runs = [parse_score(answer) for answer in answers]
        except ValueError as error:
            return Score.failed(f"the judge's answer: {error}", **asked, answers=answers)
        return Score(math.fsum(runs) / len(runs), details={**asked, "runs": runs})

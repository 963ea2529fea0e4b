"""Filters by what a few frames measure: technical quality, motion, aesthetics, and scores that are already there.

Each keeps its numbers as scores of the candidate, also of those that pass, so that limits can be set afterwards from
the statistics of what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from idc.curate.candidate import Box, Candidate, Outcome, Pixels, Step
from idc.curate.geometry import recropped
from idc.curate.looks import bars_of, luma, pairs, scaled
from idc.curate.reading import clip_frames, crop_of, inspect
from idc.data.video import VideoError
from idc.errors import UserError, nearest
from idc.metrics.base import Clip
from idc.metrics.motion import MotionAmplitude
from idc.models.aesthetic import AestheticPredictor
from idc.models.pretrained import sliver
from idc.rewards.watch import Sharpness

BLACK, WHITE = 20, 240  # luma up to and from which a pixel is black or white: broadcast's are 16 and 235
FULL = 0.98  # share of such pixels that makes a frame black or white
STILL = 0.4  # mean difference of luma up to which two frames are one: what coding noise makes of it
SHARP_SIDE = 256  # shorter side in pixels at which sharpness is measured
MOTION_SIDE = 128  # and motion: the flow is found by detail of a few pixels, and falls short where there is none
STILL_SECONDS = 0.25  # apart: closer frames repeat where a film's rate was raised
MOTION_SECONDS = 1 / 16  # apart: frames of a clip at Wan's rate

Limits = Sequence[float | None]


class Rule(NamedTuple):
    """A score must lie from `least` to `most`, where they are not None; `reason` says what it means if it does not."""

    score: str
    least: float | None
    most: float | None
    reason: str


def judged(candidate: Candidate, step: str, rules: Iterable[Rule]) -> Outcome:
    """The candidate, or its drop by the first rule that its scores break, with the number and the limit.

    A score that is not there breaks no rule.
    """
    for score, least, most, reason in rules:
        value = candidate.scores.get(score)
        if value is not None and least is not None and not value >= least:
            return candidate.dropped(step, reason, f"{score}={value:.6g}, at least {least:g}")
        if value is not None and most is not None and not value <= most:
            return candidate.dropped(step, reason, f"{score}={value:.6g}, at most {most:g}")
    return candidate


def check_limits(name: str, limits: Limits) -> tuple[float | None, float | None]:
    """[least, most] as a pair.

    Raises:
        UserError: for anything but two numbers in order, either of which may be null.
    """
    if isinstance(limits, str) or not isinstance(limits, Sequence) or len(limits) != 2:
        raise UserError(f"{name}={limits!r}: give [least, most], either may be null, such as [4.5, null]")
    least, most = limits
    if any(isinstance(side, str) or (side is not None and math.isnan(side)) for side in limits):
        raise UserError(f"{name}={list(limits)}: limits are numbers or null")
    if least is not None and most is not None and least > most:
        raise UserError(f"{name}={list(limits)}: the least is above the most; did you mean {[most, least]}?")
    return least, most


class TechnicalFilter(Step):
    """Drops what is blurred, dark, glaring, black, white, frozen or too small; crops black bars away.

    Scores: `sharpness` (variance of the Laplacian of luma in [0, 1], frames scaled to a shorter side of 256 pixels,
    mean over frames; real shots in focus have 0.0003, where much is out of focus or flat, to 0.01), `brightness` (mean
    luma), `dark` and `glaring` (share of pixels that are black or white, mean over frames), `black` and `white` (share
    of frames that are all so), `frozen` (share of the looks at which nothing changes within a quarter of a second; none
    for still images), each in [0, 1];
    `short_side` in pixels. The share of the picture that bars took is in meta["technical filter"]["bars"].
    """

    def __init__(
        self,
        frames: int = 8,
        min_sharpness: float = 0.0002,
        brightness: Limits = (0.08, 0.92),
        max_dark: float = 0.8,
        max_glaring: float = 0.5,
        max_blank: float = 0.1,
        max_frozen: float = 0.5,
        min_side: int = 256,
        crop_bars: bool = True,
        max_bars: float = 0.5,
        min_visible: float = 0.25,
    ) -> None:
        """
        Args:
            frames: how many are looked at, each with another a quarter of a second behind.
            min_sharpness: least `sharpness`.
            brightness: least and most `brightness`, None for no limit.
            max_dark, max_glaring: most share of black or white pixels, bars cropped; stills may be bright and white.
            max_blank: most share of black frames, and of white ones.
            max_frozen: most share of looks without change; 1 keeps still pictures.
            min_side: least shorter side in pixels, bars cropped.
            crop_bars: crop black bars that all frames have; boxes and masks move with the crop.
            max_bars: most share of the picture that bars may take.
            min_visible: share of a subject's box that must be left by the crop, or it is removed.

        Raises:
            UserError: for a number out of its range.
        """
        for name, value, least in (
            ("frames", frames, 1),
            ("min_side", min_side, 1),
            ("min_sharpness", min_sharpness, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value}: must be {least} or more")
        shares = {"max_dark": max_dark, "max_glaring": max_glaring, "max_blank": max_blank, "max_frozen": max_frozen}
        for name, value in {**shares, "max_bars": max_bars, "min_visible": min_visible}.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value}: a share, from 0 to 1")
        self.frames, self.min_sharpness, self.min_side = frames, min_sharpness, min_side
        self.brightness = check_limits("brightness", brightness)
        self.max_dark, self.max_glaring, self.max_blank, self.max_frozen = max_dark, max_glaring, max_blank, max_frozen
        self.crop_bars, self.max_bars, self.min_visible = crop_bars, max_bars, min_visible

    @property
    def models(self) -> tuple[str, ...]:
        return ("variance of the Laplacian of BT.601 luma",)

    def apply(self, candidate: Candidate) -> Outcome:
        pictures, later, _ = pairs(candidate, self.frames, STILL_SECONDS)
        uncut = candidate.clip is None and candidate.encoded is None
        bars = bars_of(luma(pictures), BLACK) if self.crop_bars and uncut else None
        if bars is not None:
            taken = 1 - bars.area / (pictures.shape[1] * pictures.shape[2])
            if taken > self.max_bars:
                return candidate.dropped(self.name, "mostly black bars", f"{taken:.2f}, max_bars={self.max_bars:g}")
            candidate = self._without_bars(candidate, bars, taken)
            part = np.s_[:, int(bars.top) : int(bars.bottom), int(bars.left) : int(bars.right)]
            pictures, later = pictures[part], later[part]
        least, most = self.brightness
        on_white = (
            Rule("white", None, self.max_blank, "white frames"),
            Rule("brightness", None, most, "too bright"),
            Rule("glaring", None, self.max_glaring, "too bright"),
        )
        rules = (
            Rule("short_side", self.min_side, None, "picture too small"),
            Rule("black", None, self.max_blank, "black frames"),
            Rule("brightness", least, None, "too dark"),
            Rule("dark", None, self.max_dark, "too dark"),
            *(on_white if len(later) else ()),  # pictures of subjects are shown on white
            Rule("frozen", None, self.max_frozen, "frozen"),
            Rule("sharpness", self.min_sharpness, None, "blurred"),
        )
        return judged(candidate.scored(**technical_scores(pictures, later)), self.name, rules)

    def _without_bars(self, candidate: Candidate, bars: Box, taken: float) -> Candidate:
        info = inspect(candidate).video
        left, top, _, _ = crop_of(candidate, info.height, info.width)
        crop = Box(bars.left + left, bars.top + top, bars.right + left, bars.bottom + top)
        candidate, gone = recropped(candidate, crop, self.min_visible)
        note: dict[str, Any] = {"bars": round(taken, 4), **({"cropped out": gone} if gone else {})}
        return candidate.changed(meta={self.name: note})


def technical_scores(pictures_THWC: Pixels, later_THWC: Pixels) -> dict[str, float]:
    """The scores of `TechnicalFilter` of frames `[T, H, W, 3]`, and `[T or 0, H, W, 3]` what each has become."""
    import cv2

    lumas_THW = luma(pictures_THWC)
    dark, glaring = (lumas_THW <= BLACK).mean(axis=(1, 2)), (lumas_THW >= WHITE).mean(axis=(1, 2))
    scores = {
        "short_side": float(min(pictures_THWC.shape[1:3])),
        "brightness": float(lumas_THW.mean(dtype=np.float64)) / 255,
        "dark": float(dark.mean()),
        "glaring": float(glaring.mean()),
        "black": float((dark >= FULL).mean()),
        "white": float((glaring >= FULL).mean()),
    }
    sharpness = Sharpness().score(Clip("frames", scaled(pictures_THWC, SHARP_SIDE))).value
    scores["sharpness"] = 0.0 if sharpness is None else sharpness
    if len(later_THWC):
        change = [cv2.absdiff(*both).mean() for both in zip(lumas_THW, luma(later_THWC), strict=True)]
        scores["frozen"] = float((np.array(change) <= STILL).mean())
    return scores


class MotionFilter(Step):
    """Drops shots in which too little or too much moves.

    Score `motion`: mean length of the dense optical flow in widths of the picture per second, by the measure of
    `MotionAmplitude`, over pairs of frames a sixteenth of a second apart, scaled down to a shorter side of 128 pixels.
    Still images pass without a score. At full size that flow finds too little motion wherever the picture is soft.
    """

    def __init__(self, motion: Limits = (0.01, 1.5), frames: int = 8) -> None:
        """
        Args:
            motion: least and most, in widths per second; None for no limit.
            frames: how many pairs are compared.

        Raises:
            UserError: for a number out of its range.
        """
        if frames < 1:
            raise UserError(f"frames={frames}: must be 1 or more")
        self.motion, self.frames = check_limits("motion", motion), frames

    @property
    def models(self) -> tuple[str, ...]:
        return MotionAmplitude.models

    def apply(self, candidate: Candidate) -> Outcome:
        pictures, later, apart = pairs(candidate, self.frames, MOTION_SECONDS)
        if not len(later):
            return candidate
        metric, speeds = MotionAmplitude(), []
        small = [scaled(frames, MOTION_SIDE, enlarge=False) for frames in (pictures, later)]
        for before, after, seconds in zip(*small, apart, strict=True):
            score = metric.score(Clip(candidate.key, np.stack([before, after]), fps=1 / float(seconds)))
            speeds.append(score.details["widths_per_second"])
        least, most = self.motion
        rules = (
            Rule("motion", least, None, "too little motion"),
            Rule("motion", None, most, "too much motion"),
        )
        return judged(candidate.scored(motion=float(np.mean(speeds))), self.name, rules)


class AestheticFilter(Step):
    """Drops what people are predicted to rate low.

    Score `aesthetic`: LAION's predictor (`AestheticPredictor`), mean over frames, about 1 to 10.
    """

    heavy = True

    def __init__(
        self,
        predictor: AestheticPredictor | None = None,
        aesthetic: Limits = (4.0, None),
        frames: int = 4,
        batch: int = 8,
    ) -> None:
        """
        Args:
            predictor: LAION's head on CLIP ViT-L/14 from the hub where None.
            aesthetic: least and most; None for no limit.
            frames: how many are rated.
            batch: candidates whose frames go through the network together.

        Raises:
            UserError: for a number out of its range.
        """
        if frames < 1 or batch < 1:
            raise UserError(f"frames={frames}, batch={batch}: must be 1 or more")
        self.predictor = AestheticPredictor() if predictor is None else predictor
        self.aesthetic, self.frames, self.batch = check_limits("aesthetic", aesthetic), frames, batch

    @property
    def models(self) -> tuple[str, ...]:
        return (f"LAION aesthetic head on {self.predictor.clip.name} ({self.predictor.fingerprint})",)

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.predictor,)

    def describe(self) -> Mapping[str, Any]:
        """Settings, the networks by their fingerprint."""
        settings = {"aesthetic": list(self.aesthetic), "frames": self.frames, "batch": self.batch}
        return {"class": "AestheticFilter", "predictor": self.predictor.fingerprint, **settings}

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        outcomes: list[Outcome | None] = []
        pictures: list[Pixels] = []
        owners: list[int] = []
        for number, candidate in enumerate(candidates):
            try:
                numbers, frames = clip_frames(candidate, self.frames)
            except VideoError as error:
                outcomes.append(candidate.dropped(self.name, "unreadable video", str(error)))
                continue
            if reason := sliver(frames[0]):
                outcomes.append(candidate.dropped(self.name, "no aesthetic score", reason))
                continue
            distinct = np.unique(numbers, return_index=True)[1]  # a short clip's frames are given more than once
            pictures += list(frames[distinct])
            owners += [number] * len(distinct)
            outcomes.append(None)
        ratings = self.predictor.predict(pictures).double().numpy() if pictures else np.zeros(0)
        owner = np.array(owners)
        return [
            [known if known is not None else self._judged(candidate, ratings[owner == number])]
            for number, (candidate, known) in enumerate(zip(candidates, outcomes, strict=True))
        ]

    def _judged(self, candidate: Candidate, ratings: Any) -> Outcome:
        rating = float(ratings.mean())
        if not math.isfinite(rating):
            return candidate.dropped(self.name, "no aesthetic score", "the predictor gave a rating that is not finite")
        least, most = self.aesthetic
        rules = (
            Rule("aesthetic", least, None, "low aesthetic score"),
            Rule("aesthetic", None, most, "high aesthetic score"),
        )
        return judged(candidate.scored(aesthetic=rating), self.name, rules)


MISSING = ("drop", "keep")


class ScoreFilter(Step):
    """Drops by scores that are already there: a dataset's own, or those of earlier steps."""

    def __init__(self, scores: Mapping[str, Limits], missing: str = "drop") -> None:
        """
        Args:
            scores: [least, most] by name of the score, either may be None, such as {"aesthetic": [4.5, None]}.
            missing: what becomes of a candidate that lacks one of them: "drop" or "keep".

        Raises:
            UserError: for limits out of order, no score at all, or another word for `missing`.
        """
        if not scores:
            raise UserError("scores={}: name at least one, such as {aesthetic: [4.5, null]}")
        if missing not in MISSING:
            raise UserError(f"missing={missing!r} is not known{nearest(missing, MISSING)}")
        self.scores = {name: check_limits(name, limits) for name, limits in scores.items()}
        self.missing = missing

    def apply(self, candidate: Candidate) -> Outcome:
        lacking = [name for name in self.scores if name not in candidate.scores]
        if lacking and self.missing == "drop":
            hint = nearest(lacking[0], candidate.scores)
            return candidate.dropped(self.name, f"no score {lacking[0]}", f"of {len(candidate.scores)} scores{hint}")
        rules = [
            rule
            for name, (least, most) in self.scores.items()
            for rule in (Rule(name, least, None, f"{name} too low"), Rule(name, None, most, f"{name} too high"))
        ]
        return judged(candidate, self.name, rules)

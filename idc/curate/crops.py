"""Reference pictures of subjects: cut out by the mask on white, from the frame that they were found on, or from another
moment at which the detector finds them again.

A crop of the very frame teaches a model to paste it: it is the last choice, and comes behind all other references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from idc.curate.candidate import (
    Box,
    Candidate,
    CuratedSubject,
    Mask,
    Outcome,
    Pixels,
    Reference,
    Step,
    encode_png,
)
from idc.curate.embed import picture_of
from idc.curate.finding import FindingStep, Plan, boxes_for, masks_for
from idc.curate.geometry import box_of_mask, view_of, within
from idc.curate.grounding import mask_within
from idc.curate.reading import frame_times, inspect, look, source_corners, span_of, window_ranks
from idc.data.video import VideoError
from idc.errors import UserError, nearest
from idc.models.grounding import Detection, Detector, Prompt, Query, Sam

BACKGROUNDS = ("white", "keep")
WHITE = np.uint8(255)


class CropError(Exception):
    """A subject that gives no picture; the message is a phrase without numbers."""


@dataclass(frozen=True)
class CropRules:
    """How a subject becomes a picture, and which do not.

    Attributes:
        background: "white" outside of the mask, or "keep" the picture in the crop's rectangle.
        margin: around the mask, as a share of its longer side, as far as the picture goes.
        min_side: least side of the mask's bounds in pixels; a smaller subject gives no picture.
        min_pixels: least number of the mask's pixels.
        most_edges: how many of the picture's four edges the mask may touch: 0 for whole subjects only; 1 allows people
            whom the lower edge cuts off; 4 anything.
        speck: parts of the mask that are smaller than this share of its largest part are taken away.
        hole: holes of at most this share of the mask's area are filled.

    Raises:
        UserError: for a number out of its range, or an unknown background.
    """

    background: str = "white"
    margin: float = 0.05
    min_side: int = 64
    min_pixels: int = 2048
    most_edges: int = 2
    speck: float = 0.1
    hole: float = 0.02

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise UserError(f"background={self.background!r}: no such choice{nearest(self.background, BACKGROUNDS)}")
        for name, most in (("most_edges", 4), ("speck", 1), ("hole", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{name}={value}: must lie between 0 and {most}")
        if self.margin < 0 or self.min_side < 1 or self.min_pixels < 1:
            told = f"margin={self.margin}, min_side={self.min_side}, min_pixels={self.min_pixels}"
            raise UserError(f"{told}: must be at least 0, 1 and 1")

    def cut(self, picture_HWC: Pixels, mask_HW: Mask) -> tuple[Pixels, Box, dict[str, Any]]:
        """The subject's picture, where it was cut out of `picture_HWC` (whole pixels), and facts for the provenance.

        Raises:
            CropError: where a rule forbids it.
        """
        mask = clean_mask(mask_HW, self.speck, self.hole)
        bounds = box_of_mask(mask)
        if bounds is None:
            raise CropError("empty mask")
        height, width = mask.shape
        tall, wide, pixels = bounds.bottom - bounds.top, bounds.right - bounds.left, int(mask.sum())
        if min(tall, wide) < self.min_side or pixels < self.min_pixels:
            raise CropError("too few pixels")
        edges = (bounds.left == 0) + (bounds.top == 0) + (bounds.right == width) + (bounds.bottom == height)
        if edges > self.most_edges:
            raise CropError("cut off by the picture's edge")
        around = round(self.margin * max(tall, wide))
        box = within(
            Box(bounds.left - around, bounds.top - around, bounds.right + around, bounds.bottom + around), height, width
        )
        left, top, right, bottom = map(int, box)
        crop = picture_HWC[top:bottom, left:right]
        if self.background == "white":
            crop = np.where(mask[top:bottom, left:right, None], crop, WHITE)
        return np.ascontiguousarray(crop), box, {"pixels": pixels, "edges": edges}


class SubjectCrops(Step):
    """Gives each subject with a mask its picture from the frame that the mask is of, behind the references that it has.

    A place is shown whole, white where the other subjects are. Origin is "same_frame"; the reference's meta has the
    number of the frame, the source's rank, and the crop's box in pixels of the source. A subject that gives no picture
    has the reason in meta["no_crop"]; without any reference and without a followed face it is removed.

    Drops: "no subject with a clean crop".
    """

    def __init__(self, rules: CropRules | None = None, refused: str = "remove") -> None:
        """
        Args:
            rules: how it is cut out, and which are not.
            refused: what becomes of subjects that then have no reference: "remove", or "keep" for later steps.

        Raises:
            UserError: for an unknown choice.
        """
        if refused not in (choices := ("remove", "keep")):
            raise UserError(f"refused={refused!r}: no such choice{nearest(refused, choices)}")
        self.rules, self.refused = CropRules() if rules is None else rules, refused

    def apply(self, candidate: Candidate) -> Outcome:
        kept: list[CuratedSubject] = []
        removed: dict[str, str] = {}
        for subject in candidate.subjects:
            try:
                reference = self._reference(candidate, subject)
                kept.append(replace(subject, references=(*subject.references, reference)))
            except CropError as error:
                if self.refused == "remove" and not subject.references and not subject.track:
                    removed[subject.name] = str(error)
                else:
                    kept.append(replace(subject, meta={**subject.meta, "no_crop": str(error)}))
        if removed and not kept:
            told = ", ".join(f"{name!r}: {reason}" for name, reason in removed.items())
            return candidate.dropped(self.name, "no subject with a clean crop", told)
        return candidate.changed(subjects=tuple(kept), meta={self.name: {"removed": removed}} if removed else {})

    def _reference(self, candidate: Candidate, subject: CuratedSubject) -> Reference:
        if subject.kind == "place":
            return self._place(candidate, subject)
        if subject.mask is None:
            raise CropError("no mask")
        picture = picture_of(candidate, subject)
        if picture.shape[:2] != subject.mask.shape:
            raise CropError("mask of another size")
        crop, box, facts = self.rules.cut(picture, subject.mask)
        facts |= {"frame": subject.frame, "box": source_box(candidate, box)}
        return reference_of(candidate, crop, _rank(candidate, subject.frame), "same_frame", facts)

    def _place(self, candidate: Candidate, place: CuratedSubject) -> Reference:
        others = [s for s in candidate.subjects if s.mask is not None and s.kind != "place"]
        frame = others[0].frame if others else place.frame
        picture = picture_of(candidate, replace(place, frame=frame)).copy()
        for subject in others:
            if subject.frame == frame and subject.mask is not None and subject.mask.shape == picture.shape[:2]:
                picture[subject.mask] = WHITE
        whole = Box(0.0, 0.0, float(picture.shape[1]), float(picture.shape[0]))
        facts = {"frame": frame, "box": source_box(candidate, whole)}
        return reference_of(candidate, picture, _rank(candidate, frame), "same_frame", facts)


class FoundAgain(FindingStep):
    """Gives a subject a picture from another moment of the shot, at which the detector finds it again by its words.

    For what has no face to be followed by (those who have one get theirs from `idc.curate.references.OtherMoment`):
    frames at least `gap` seconds off the window are searched, and where the shot has none, with in_clip=True, frames of
    the clip at least `gap` seconds off the subject's own. The surest box whose mask is fit to be cut is taken, and
    becomes the first reference, of origin "other_moment". Words alone may find another of its kind: `similarity` is
    left open for `EmbedSubjects`, and `CheckReferences` sorts out what is not alike. Who is not found again keeps what
    it has, with the reason in meta["no_reference"].
    """

    def __init__(
        self,
        detector: Detector | None = None,
        segmenter: Sam | None = None,
        rules: CropRules | None = None,
        looks: int = 6,
        gap: float = 1.0,
        in_clip: bool = False,
        min_likeness: float = 0.5,
        batch: int = 4,
    ) -> None:
        """
        Args:
            detector: looks for words; its threshold is the least confidence. GroundingDINO at 0.25 where None.
            segmenter: cuts out what a box is around; SAM where None.
            rules: how it is cut out, and which are not.
            looks: frames that are searched at most, evenly spaced.
            gap: least time in seconds to the window (to the subject's frame within it).
            in_clip: whether moments of the clip itself will do.
            min_likeness: least ratio of the box's area to the subject's, and of the inverse: something of quite another
                size is something else, or a part of it; in [0, 1].
            batch: candidates at a time; `looks` frames of each are in memory.

        Raises:
            UserError: for a number out of its range.
        """
        super().__init__(detector, segmenter, batch)
        if looks < 1 or gap < 0 or not 0 <= min_likeness <= 1:
            raise UserError(
                f"looks={looks}, gap={gap}, min_likeness={min_likeness}: at least 1, at least 0, and from 0 to 1"
            )
        self.rules = CropRules() if rules is None else rules
        self.looks, self.gap, self.in_clip, self.min_likeness = looks, gap, in_clip, min_likeness

    def plan(self, candidate: Candidate) -> Plan:
        wanted = {n: subject for n, subject in enumerate(candidate.subjects) if self._wants(subject)}
        ranks = {n: self._ranks(candidate, subject) for n, subject in wanted.items()}
        # Subjects of one frame search the same ones.
        frames = {some: list(look(candidate, some)) if some else [] for some in set(ranks.values())}
        queries = [
            Query(picture, subject.name, shown)
            for n, subject in wanted.items()
            for shown in ([_shown(candidate, subject)] if ranks[n] else [])
            for picture in frames[ranks[n]]
        ]
        boxes = iter((yield from boxes_for(queries)))
        left = {n: self._likely(candidate, s, [next(boxes) for _ in ranks[n]]) for n, s in wanted.items()}
        references: dict[int, Reference] = {}
        while left := {n: few for n, few in left.items() if few and n not in references}:
            tried = {n: few.pop(0) for n, few in left.items()}
            prompts = [Prompt(frames[ranks[n]][number], [box]) for n, (box, number) in tried.items()]
            found = yield from masks_for(prompts)
            for (n, (box, number)), (mask,) in zip(tried.items(), found, strict=True):
                cut = self._cut(candidate, ranks[n][number], frames[ranks[n]][number], box, mask)
                references |= {n: cut} if cut else {}
        subjects = list(candidate.subjects)
        for n, subject in wanted.items():
            if n in references:
                subjects[n] = replace(subject, references=(references[n], *subject.references))
            else:
                reason = "not found again" if ranks[n] else "no other moment"
                subjects[n] = replace(subject, meta={**subject.meta, "no_reference": reason})
        return candidate.changed(subjects=tuple(subjects)) if wanted else candidate

    def _wants(self, subject: CuratedSubject) -> bool:
        elsewhere = any(reference.origin in ("other_moment", "other_video") for reference in subject.references)
        return subject.box is not None and subject.kind != "place" and not subject.track and not elsewhere

    def _ranks(self, candidate: Candidate, subject: CuratedSubject) -> tuple[int, ...]:
        """Frames of the source to search: off the window, or else in it; none where there is no source to ask."""
        try:
            times = frame_times(inspect(candidate).video)
        except VideoError:
            return ()
        window = window_ranks(candidate)
        first, end = candidate.meta.get("shots", {}).get("span", span_of(candidate))
        away = [r for r in range(first, end) if _apart(times, r, window[0], window[-1]) >= self.gap - 1e-6]
        if not away and self.in_clip:
            own = window[subject.frame]
            away = [r for r in dict.fromkeys(window) if r != own and abs(times[r] - times[own]) >= self.gap - 1e-6]
        chosen = np.linspace(0, len(away) - 1, min(self.looks, len(away))).round().astype(int)
        return tuple(away[number] for number in chosen)

    def _likely(
        self, candidate: Candidate, subject: CuratedSubject, looks: Sequence[Sequence[Detection]]
    ) -> list[tuple[Detection, int]]:
        """Each look's best box with the look's number, the surest first, but for those of quite another size."""
        size = source_area(candidate, subject)
        best = [(max(boxes, key=lambda box: box.score), number) for number, boxes in enumerate(looks) if boxes]
        ratios = [Box(*box[:4]).area / size for box, _ in best]
        likely = [b for b, ratio in zip(best, ratios, strict=True) if min(ratio, 1 / ratio) >= self.min_likeness]
        return sorted(likely, key=lambda found: (-found[0].score, found[1]))

    def _cut(self, candidate: Candidate, rank: int, picture: Pixels, box: Detection, mask: Mask) -> Reference | None:
        """The subject's picture from a frame of the source; None where the mask is not fit to be cut."""
        inside = mask_within(mask, Box(*box[:4]))
        try:
            crop, cut, facts = self.rules.cut(picture, np.zeros_like(mask) if inside is None else inside)
        except CropError:
            return None
        facts |= {"score": round(box.score, 6), "box": _whole(source_corners(candidate, cut))}
        window = window_ranks(candidate)
        facts |= {"in_clip": True} if window[0] <= rank <= window[-1] else {}
        return reference_of(candidate, crop, rank, "other_moment", facts)


def clean_mask(mask_HW: Mask, speck: float, hole: float) -> Mask:
    """The mask without small parts and small holes; parts hang together over corners, what is around them does not.

    Args:
        speck: parts smaller than this share of the largest part go.
        hole: holes of at most this share of the mask's area are filled.
    """
    import cv2

    if not mask_HW.any():
        return mask_HW
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    cleaned = np.isin(parts, np.flatnonzero(areas >= max(1, speck * areas.max())))
    _, gaps, stats, _ = cv2.connectedComponentsWithStats((~cleaned).astype(np.uint8), connectivity=4)
    outside = np.unique(np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]))
    small = np.flatnonzero(stats[:, cv2.CC_STAT_AREA] <= hole * cleaned.sum())
    holes = np.setdiff1d(small, [0, *outside])  # 0 is the mask itself
    return cleaned | np.isin(gaps, holes)


def source_box(candidate: Candidate, box: Box) -> list[int]:
    """A box in pixels of the clip (before it is cut, of the cropped source) in whole pixels of the source's picture."""
    view = view_of(candidate) if candidate.clip is not None else None
    return _whole(source_corners(candidate, view.back(box) if view else box))


def source_area(candidate: Candidate, subject: CuratedSubject) -> float:
    """Area of a subject's box in square pixels of the cropped source."""
    assert subject.box is not None
    view = view_of(candidate) if candidate.clip is not None else None
    return max(1.0, (view.back(subject.box) if view else subject.box).area)


def reference_of(candidate: Candidate, crop: Pixels, rank: int, origin: str, facts: dict[str, Any]) -> Reference:
    """A PNG of a crop, with where and when it was taken; without the time where there is no source to ask."""
    try:
        seconds: float | None = round(float(frame_times(inspect(candidate).video)[rank]), 4)
    except (VideoError, IndexError):
        seconds = None
    return Reference(encode_png(crop), "png", origin, candidate.video, seconds, meta={**facts, "rank": rank})


def _whole(box: Box) -> list[int]:
    return [round(side) for side in box]


def _rank(candidate: Candidate, frame: int) -> int:
    """Of the source's frame that the clip's frame is; the same number for a clip whose source is not told."""
    if candidate.ranks or candidate.clip is not None:
        return candidate.ranks[frame] if candidate.ranks else frame
    return range(*span_of(candidate))[frame]


def _apart(times: Any, rank: int, first: int, last: int) -> float:
    """Seconds between a frame and a window; negative within it."""
    return float(max(times[first] - times[rank], times[rank] - times[last]))


def _shown(candidate: Candidate, subject: CuratedSubject) -> Pixels:
    """What a detector that goes by pictures looks for."""
    return subject.references[0].pixels() if subject.references else picture_of(candidate, subject)

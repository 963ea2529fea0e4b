"""Where the subjects are: boxes and masks on one frame of the clip, double labels made one, rules of size and number.

After OpenS2V-5M: GroundingDINO at 0.25 and SAM on the first frame; one person under several labels has nearly the same
box; kept are clips of one to four subjects of more than 8% of the picture each. Its second threshold of 0.25, for
words, decides which label a box gets where all labels are asked at once; here each one is asked by itself.

Boxes and masks are in pixels of what `idc.curate.reading.clip_frames` gives: of the cropped source, or of the clip once
it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from idc.curate.candidate import Box, Candidate, CuratedSubject, Mask, Outcome, Pixels, Step
from idc.curate.embed import picture_of
from idc.curate.finding import FindingStep, Plan, boxes_for, masks_for
from idc.curate.geometry import view_of, within
from idc.curate.reading import clip_box, clip_frames, size_of, window_ranks
from idc.curate.words import locate
from idc.errors import UserError, nearest
from idc.models.grounding import Detection, Detector, Prompt, Query, Sam

PERSON = "person"  # what a followed face's body is searched by where the caption has no words for it
PRIORITY = ("person", "face", "object", "clothing", "place")  # of kinds, where labels are merged
INSIDE = 0.8  # share of a face's box that lies in its person's box
NEAR = 2  # looks within which a followed face counts as seen


class _Found(NamedTuple):
    """What was found on one frame: boxes by their subjects' numbers."""

    frame: int
    picture: Pixels
    boxes: Mapping[int, Detection]

    @property
    def merit(self) -> tuple[int, float, int]:
        return len(self.boxes), math.fsum(box.score for box in self.boxes.values()), -self.frame


class Ground(FindingStep):
    """Finds each subject's box by its words and cuts out its mask, all on one frame of the clip.

    The detector is asked for each subject by itself and its best box is taken; of a person who is followed by the face,
    the best one around the face. Subjects that are not found, or of which nothing is cut out, are removed; who is
    followed stays, with the box of the face. Subjects that came with a box keep it, get a mask where they have none,
    and decide on which frame the others are searched. Places have no box. meta["ground"] tells the frame and who was
    not found.

    Drops: "no subject found".
    """

    def __init__(
        self,
        detector: Detector | None = None,
        segmenter: Sam | None = None,
        frames: int = 1,
        min_area: float = 0.0,
        max_area: float = 0.95,
        min_subjects: int = 1,
        batch: int = 8,
    ) -> None:
        """
        Args:
            detector: looks for words; its threshold is the least confidence. GroundingDINO at 0.25 where None.
            segmenter: cuts out what a box is around; SAM where None.
            frames: 1 takes the first one, as OpenS2V-5M does; of more, evenly spaced, the one on which most subjects
                are found, then with the highest sum of confidences, then the earliest.
            min_area, max_area: of a box, as shares of the picture. A box around everything is how the detector says
                that it found nothing.
            min_subjects: fewer drop the candidate.
            batch: candidates at a time.

        Raises:
            UserError: for a number out of its range.
        """
        super().__init__(detector, segmenter, batch)
        check_area(min_area, max_area)
        for name, value, least in (("frames", frames, 1), ("min_subjects", min_subjects, 0)):
            if value < least:
                raise UserError(f"{name}={value}: must be at least {least}")
        self.frames, self.min_area, self.max_area, self.min_subjects = frames, min_area, max_area, min_subjects

    def plan(self, candidate: Candidate) -> Plan:
        frames = self._frames(candidate)
        sought = {n: s for n, s in enumerate(candidate.subjects) if s.kind != "place" and not _given(s)}
        labels = {n: _label(candidate, subject) for n, subject in sought.items()}
        queries = [Query(picture, label, picture) for _, picture in frames for label in labels.values()]
        boxes = iter((yield from boxes_for(queries)))
        looks = [self._look(candidate, n, picture, {k: next(boxes) for k in labels}) for n, picture in frames]
        best = max(looks, key=lambda found: found.merit)
        asked = {n: Prompt(best.picture, [box]) for n, box in best.boxes.items()}
        asked |= _unmasked(candidate, dict(frames))
        found = yield from masks_for(list(asked.values()))
        masks = {
            n: mask_within(mask, Box(*prompt.boxes[0][:4]))
            for (n, prompt), (mask,) in zip(asked.items(), found, strict=True)
        }
        return self._outcome(candidate, best, masks)

    def _outcome(self, candidate: Candidate, best: _Found, masks: Mapping[int, Mask | None]) -> Outcome:
        subjects: list[CuratedSubject] = []
        missing: list[str] = []
        for n, subject in enumerate(candidate.subjects):
            if subject.kind == "place":
                subjects.append(subject)
            elif _given(subject):
                subjects.append(replace(subject, mask=masks[n]) if n in masks else subject)
            elif (mask := masks.get(n)) is not None:
                *box, score = best.boxes[n]
                subjects.append(replace(subject, box=Box(*box), mask=mask, frame=best.frame, score=round(score, 6)))
            elif subject.track:
                subjects.append(subject)
            else:
                missing.append(subject.name)
        count = sum(subject.kind != "place" for subject in subjects)
        if count < self.min_subjects:
            unseen = ", ".join(map(repr, missing)) or "none asked"
            detail = f"{count}, at least {self.min_subjects}; not found: {unseen}"
            return candidate.dropped(self.name, "no subject found", detail)
        told = {"frame": best.frame, **({"not found": missing} if missing else {})}
        return candidate.changed(subjects=tuple(subjects), meta={self.name: told})

    def _frames(self, candidate: Candidate) -> list[tuple[int, Pixels]]:
        """Frames of the clip to search, with their numbers."""
        anchors = [s for s in candidate.subjects if _given(s)]
        if anchors:
            counts = [s.frame for s in anchors]
            anchor = max(anchors, key=lambda s: (counts.count(s.frame), -s.frame))
            return [(anchor.frame, picture_of(candidate, anchor))]
        numbers, pictures = clip_frames(candidate, self.frames)
        return list({int(n): picture for n, picture in zip(numbers, pictures, strict=True)}.items())

    def _look(
        self, candidate: Candidate, frame: int, picture: Pixels, boxes: Mapping[int, Sequence[Detection]]
    ) -> _Found:
        """The best box of each subject that is found on a frame, of those that the detector gave for it."""
        best: dict[int, Detection] = {}
        height, width = picture.shape[:2]
        for n, found in boxes.items():
            fitting = [d for d in found if self.min_area <= Box(*d[:4]).area / (height * width) <= self.max_area]
            if candidate.subjects[n].track:
                face = face_on(candidate, candidate.subjects[n], frame)
                fitting = [d for d in fitting if face is not None and share_inside(face, Box(*d[:4])) >= INSIDE]
            if fitting:
                best[n] = max(fitting, key=lambda d: d.score)
        return _Found(frame, picture, best)


class MergeLabels(Step):
    """Makes one subject of those that are the same: nearly the same box on the same frame, or a followed face within a
    person's box.

    Which name stays: one that the caption has, then that of a person before an object's and that before a piece of
    clothing's, then the surer box's, then the earlier one. The merged subject has all references, the face's track and
    embedding, and the other names under meta["also"]; it is a person where one of them is. A face belongs to the
    smallest person's box around it, and a person has one face, the one highest up in the picture. Subjects are taken in
    the order of that rule and join the first that is kept already: with A like B and B like C, C stays where it is
    not like A.
    """

    def __init__(self, iou: float = 0.8, unnamed: str = "keep") -> None:
        """
        Args:
            iou: boxes that overlap by at least this, in (0, 1], are of one subject.
            unnamed: a followed person whom no word of the caption is found for: "keep", or "remove".

        Raises:
            UserError: for a number out of its range or an unknown choice.
        """
        if not 0 < iou <= 1:
            raise UserError(f"iou={iou}: must be above 0 and at most 1; OpenS2V-5M's labels want about 0.8")
        if unnamed not in (choices := ("keep", "remove")):
            raise UserError(f"unnamed={unnamed!r}: no such choice{nearest(unnamed, choices)}")
        self.iou, self.unnamed = iou, unnamed

    def apply(self, candidate: Candidate) -> Outcome:
        subjects = list(candidate.subjects)
        order = sorted(range(len(subjects)), key=lambda n: _rank(subjects[n], candidate.caption, n))
        groups: dict[int, list[int]] = {}
        for n in order:
            mine = subjects[n]
            same = (k for k in groups if _same_box(subjects[k], mine, self.iou))
            groups.setdefault(next(same, n), []).append(n)
        self._add_faces(candidate, groups)
        kept = [merge([subjects[n] for n in groups[k]]) for k in sorted(groups)]
        if self.unnamed == "remove":
            kept = [s for s in kept if not s.track or locate(s.name, candidate.caption)]
        if not kept and subjects:
            return candidate.dropped(self.name, "no subject that the caption names")
        return candidate.changed(subjects=tuple(kept))

    def _add_faces(self, candidate: Candidate, groups: dict[int, list[int]]) -> None:
        """Followed faces that are groups of their own join the group of their person."""
        subjects = candidate.subjects
        lone = [k for k, members in groups.items() if len(members) == 1 and _is_face(subjects[k])]
        people = [k for k in groups if _body(subjects[k]) and not any(subjects[n].track for n in groups[k])]
        pairs = []
        for k in lone:
            for p in people:
                body = subjects[p].box
                face = face_on(candidate, subjects[k], subjects[p].frame)
                if body is not None and face is not None and share_inside(face, body) >= INSIDE:
                    pairs.append((body.area, face.top, k, p))
        for _, _, k, p in sorted(pairs):
            if k in groups and p in people:
                people.remove(p)
                groups[p] += groups.pop(k)


class SubjectLimits(Step):
    """Keeps subjects of a fitting size and candidates of a fitting number of them: OpenS2V-5M's rule for pairs.

    Followed faces without a body, and places, have no size. Drops: "too few subjects", "too many subjects".
    """

    def __init__(
        self,
        min_area: float = 0.08,
        max_area: float = 1.0,
        min_subjects: int = 1,
        max_subjects: int = 4,
        too_many: str = "drop",
    ) -> None:
        """
        Args:
            min_area, max_area: of a subject's box, as shares of the picture; others are removed.
            min_subjects, max_subjects: how many a candidate has.
            too_many: "drop" the candidate, or keep the "largest" subjects (those without a size first).

        Raises:
            UserError: for a number out of its range or an unknown choice.
        """
        check_area(min_area, max_area)
        if not 0 <= min_subjects <= max_subjects:
            raise UserError(f"min_subjects={min_subjects}, max_subjects={max_subjects}: must rise from 0")
        if too_many not in (choices := ("drop", "largest")):
            raise UserError(f"too_many={too_many!r}: no such choice{nearest(too_many, choices)}")
        self.min_area, self.max_area, self.too_many = min_area, max_area, too_many
        self.min_subjects, self.max_subjects = min_subjects, max_subjects

    def apply(self, candidate: Candidate) -> Outcome:
        shares = [_area(candidate, subject) for subject in candidate.subjects]
        fitting = [n for n, share in enumerate(shares) if share is None or self.min_area <= share <= self.max_area]
        removed = [subject.name for n, subject in enumerate(candidate.subjects) if n not in fitting]
        if len(fitting) > self.max_subjects:
            if self.too_many == "drop":
                return candidate.dropped(self.name, "too many subjects", f"{len(fitting)}, at most {self.max_subjects}")
            sizes = [math.inf if (share := shares[n]) is None else share for n in range(len(shares))]
            kept = sorted(fitting, key=lambda n: (-sizes[n], n))[: self.max_subjects]
            removed += [candidate.subjects[n].name for n in fitting if n not in kept]
            fitting = sorted(kept)
        if len(fitting) < self.min_subjects:
            told = ", ".join(f"{s.name!r} {share:.3f}" for s, share in _sized(candidate.subjects, shares)) or "none"
            detail = f"{len(fitting)}, at least {self.min_subjects} of {self.min_area:g} to {self.max_area:g}; {told}"
            return candidate.dropped(self.name, "too few subjects", detail)
        subjects = tuple(candidate.subjects[n] for n in fitting)
        return candidate.changed(subjects=subjects, meta={self.name: {"removed": removed}} if removed else {})


def check_area(least: float, most: float) -> None:
    """Raise `UserError` unless two shares of the picture rise within [0, 1]."""
    if not 0 <= least < most <= 1:
        raise UserError(f"min_area={least}, max_area={most}: shares of the picture, the first below the second")


def share_inside(inner: Box, outer: Box) -> float:
    """Which share of `inner` lies in `outer`, in [0, 1]; 0 for a box without area."""
    width = min(inner.right, outer.right) - max(inner.left, outer.left)
    height = min(inner.bottom, outer.bottom) - max(inner.top, outer.top)
    return max(0.0, width) * max(0.0, height) / inner.area if inner.area else 0.0


def mask_within(mask_HW: Mask, box: Box) -> Mask | None:
    """The part of a mask that lies in the box, its sides rounded outwards; None where nothing does."""
    left, top, right, bottom = math.floor(box.left), math.floor(box.top), math.ceil(box.right), math.ceil(box.bottom)
    inside = np.zeros_like(mask_HW)
    inside[max(top, 0) : bottom, max(left, 0) : right] = mask_HW[max(top, 0) : bottom, max(left, 0) : right]
    return inside if inside.any() else None


def face_on(candidate: Candidate, subject: CuratedSubject, frame: int) -> Box | None:
    """Where a followed face is on a frame of the clip, in its pixels, by the nearest look at it; None where no look is
    near."""
    if not subject.track:
        return None
    ranks = window_ranks(candidate)
    if not 0 <= frame < len(ranks):
        return None
    rank, box = min(subject.track, key=lambda look: abs(look[0] - ranks[frame]))
    if abs(rank - ranks[frame]) > NEAR * subject.meta.get("looks", {}).get("every", 1):
        return None
    there, view = clip_box(candidate, box), view_of(candidate)
    return view.box(there) if view else there


def merge(subjects: Sequence[CuratedSubject]) -> CuratedSubject:
    """One subject of several, by the first one's name and place; what it lacks comes from the others."""
    first, *others = subjects
    if not others:
        return first
    followed = next((s for s in subjects if s.track), first)
    known = next((s for s in subjects if s.embedding is not None), first)
    placed = next((s for s in subjects if s.mask is not None), first)
    looks = {"looks": followed.meta["looks"]} if "looks" in followed.meta else {}
    return replace(
        first,
        kind="person" if any(s.kind == "person" for s in subjects) else first.kind,
        box=placed.box,
        mask=placed.mask,
        frame=placed.frame,
        score=placed.score,
        track=followed.track,
        embedding=known.embedding,
        embedder=known.embedder,
        references=tuple(reference for s in subjects for reference in s.references),
        meta={**first.meta, **looks, "also": [s.name for s in others]},
    )


def _given(subject: CuratedSubject) -> bool:
    """Whether it came with a box."""
    return subject.box is not None and not subject.track


def _label(candidate: Candidate, subject: CuratedSubject) -> str:
    return PERSON if subject.track and not locate(subject.name, candidate.caption) else subject.name


def _unmasked(candidate: Candidate, frames: Mapping[int, Pixels]) -> dict[int, Prompt]:
    """What is to be cut out of subjects that came with a box and without a mask; `frames` are known by their number."""
    asked: dict[int, Prompt] = {}
    for n, subject in enumerate(candidate.subjects):
        if subject.kind == "place" or subject.box is None or subject.track or subject.mask is not None:
            continue
        picture = frames[subject.frame] if subject.frame in frames else picture_of(candidate, subject)
        box = within(subject.box, *picture.shape[:2])
        if box.area >= 1:
            asked[n] = Prompt(picture, [Detection(*box, 1.0)])
    return asked


def _rank(subject: CuratedSubject, caption: str, place: int) -> tuple[bool, int, float, int]:
    kind = PRIORITY.index(subject.kind) if subject.kind in PRIORITY else len(PRIORITY)
    return not locate(subject.name, caption), kind, -subject.score, place


def _same_box(a: CuratedSubject, b: CuratedSubject, iou: float) -> bool:
    both_followed = bool(a.track) and bool(b.track)  # two people, however close
    if a.box is None or b.box is None or a.frame != b.frame or both_followed:
        return False
    return a.box.overlap(b.box) >= iou


def _is_face(subject: CuratedSubject) -> bool:
    return bool(subject.track) and subject.mask is None


def _body(subject: CuratedSubject) -> bool:
    return subject.kind == "person" and subject.mask is not None and not subject.track


def _area(candidate: Candidate, subject: CuratedSubject) -> float | None:
    """Of a subject's box, as a share of the picture; None for a place and for a face without a body."""
    if subject.box is None or subject.kind == "place" or _is_face(subject):
        return None
    if subject.mask is not None:
        height, width = subject.mask.shape
    else:
        height, width = size_of(candidate) if candidate.clip is None else candidate.clip.shape[1:3]
    return subject.box.area / (height * width)


def _sized(subjects: Sequence[CuratedSubject], shares: Sequence[float | None]) -> list[tuple[CuratedSubject, float]]:
    return [(s, share) for s, share in zip(subjects, shares, strict=True) if share is not None]

"""References of people from another moment than the clip's, so that copying them does not pay.

A reference that is cut out of the very clip teaches a model to paste it. One of another moment shows the same person in
another pose; that it is the same person, and nobody else, is checked by the face's embedding, and that it is no near
copy by correlating the pixels (`idc.metrics.copy_paste`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from idc.curate.candidate import (
    PEOPLE,
    Box,
    Candidate,
    CuratedSubject,
    Outcome,
    Pixels,
    Reference,
    Step,
)
from idc.curate.crops import CropError, CropRules, reference_of
from idc.curate.describing import model_version
from idc.curate.face_quality import frontal_and_sharp, sharpness, yaw
from idc.curate.faces import (
    REJOIN_MARGIN,
    box_of,
    embedder_name,
    faces_at,
    in_source,
    looks_every,
    median_embedding,
    sightings_of,
    window_of,
)
from idc.curate.grounding import mask_within
from idc.curate.people import Sighting, by_quality, head_and_shoulders, whole_body
from idc.curate.reading import frame_times, inspect, source_corners, stream
from idc.errors import UserError, nearest
from idc.metrics.copy_paste import compare, face_view
from idc.models.faces import DetectedFace, Embedding, Face, FaceBackend, YuNetSFace
from idc.models.grounding import Detection

CROPS = ("head", "whole")
COMPARED = 4  # moments of the window that a reference must not be a copy of
SURVEYS = 2  # videos whose faces are remembered
REASON = "no_reference"  # in a subject's meta: why it has none from another moment


class Segmenter(Protocol):
    """Cuts out what boxes are around, as `idc.models.grounding.Sam`."""

    name: str

    def masks(self, picture_HWC: Pixels, boxes: Sequence[Detection]) -> NDArray[np.bool_]:
        """bool `[N, H, W]`, one mask a box."""

    def load(self, device: torch.device | str = "cpu") -> Any:
        """Load the network; idempotent."""

    def unload(self) -> None:
        """Free the network."""


class Moment(NamedTuple):
    """A face at some rank of the source: the frame (cropped as the candidate says), the face in its pixels, and whether
    nobody else's face is in the reference's crop."""

    rank: int
    frame: Pixels
    face: DetectedFace
    alone: bool


class Found(NamedTuple):
    """A face somewhere in a video, in pixels of the source's picture, and its embedding."""

    sighting: Sighting
    embedding: Embedding


class OtherMoment(Step):
    """Gives the people of a clip a reference from another moment of the shot, or else of another shot of the video.

    The moment is at least `gap` seconds before or behind the window, and one at which the person was followed there
    by place (`FaceTracks`); among the sharp, large and frontal looks one is drawn by the candidate's key. It is taken
    if the face there is the subject's (cosine of at least `threshold`, and more alike to him than to any other
    subject), nobody else is in the crop, and it is no near copy of a moment of the window. Where none is, the reason is
    in the subject's meta["no_reference"], and `CheckReferences` decides what becomes of it. References that a subject
    has already come behind the new one.
    """

    heavy = True

    def __init__(
        self,
        faces: FaceBackend | None = None,
        gap: float = 0.5,
        crop: str = "head",
        size: int = 0,
        count: int = 1,
        tries: int = 5,
        threshold: float | None = None,
        max_similarity: float = 0.98,
        max_copied: float = 0.85,
        min_turn: float = 0.0,
        other_shots: float = 0.0,
        same_frame: bool = False,
        segmenter: Segmenter | None = None,
        rules: CropRules | None = None,
    ) -> None:
        """
        Args:
            faces: finds and tells apart faces; the offline YuNet and SFace where None.
            gap: least time in seconds between the window and the moment.
            crop: "head" for a square of head and shoulders, "whole" for the body as far as the picture shows it.
            size: side in pixels that heads are scaled to, and the longer side of whole people; 0 as they are cut.
            count: how many references a subject gets at most.
            tries: how many moments of a shot are looked at, for each subject.
            threshold: least cosine to the subject's face; the backend's own where None.
            max_similarity: largest cosine; above it, it is the same picture of him.
            max_copied: largest correlation of the face's fine structure with any of four moments of the window, in
                [0, 1]. In a shot of a talking head, frames within half a second have 0.9, later ones 0.4 to 0.8.
            min_turn: least difference of the head's turn from the window's, in degrees.
            other_shots: looks a second into the rest of the video, where the shot has no moment; 0 for never. The face
                must then be alike to `threshold` and 0.2.
            same_frame: where all else fails take the best moment of the window itself, whose origin is "same_frame".
            segmenter: cuts the person in the crop out, such as `idc.models.grounding.Sam`; None keeps the background.
            rules: what is around him then, white by default, and which pictures do not do.

        Raises:
            UserError: for a value out of its range.
        """
        for name, value in (("gap", gap), ("size", size), ("min_turn", min_turn), ("other_shots", other_shots)):
            if value < 0:
                raise UserError(f"{name}={value}: must be 0 or more")
        for name, value in (("count", count), ("tries", tries)):
            if value < 1:
                raise UserError(f"{name}={value}: must be 1 or more")
        if crop not in CROPS:
            raise UserError(f"crop={crop!r}{nearest(crop, CROPS)}")
        self.faces = YuNetSFace() if faces is None else faces
        self.threshold = self.faces.threshold if threshold is None else threshold
        if not -1 <= self.threshold < max_similarity <= 1:
            raise UserError(
                f"threshold={self.threshold}, max_similarity={max_similarity}: cosines, the first below the second"
            )
        if not 0 < max_copied <= 1:
            raise UserError(f"max_copied={max_copied}: a correlation, above 0 and at most 1")
        self.gap, self.crop, self.size, self.count, self.tries = gap, crop, size, count, tries
        self.max_similarity, self.max_copied, self.min_turn = max_similarity, max_copied, min_turn
        self.other_shots, self.same_frame = other_shots, same_frame
        self.segmenter, self.rules = segmenter, CropRules() if rules is None else rules
        self._surveys: OrderedDict[Any, list[Found]] = OrderedDict()

    @property
    def models(self) -> tuple[str, ...]:
        return self.faces.models + (() if self.segmenter is None else (model_version(self.segmenter),))

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.faces,) if self.segmenter is None else (self.faces, self.segmenter)

    def apply(self, candidate: Candidate) -> Outcome:
        people = [n for n, s in enumerate(candidate.subjects) if s.kind in PEOPLE and s.track]
        windows = self._in_window(candidate, people)
        known = {n: self._embedding(candidate.subjects[n], windows[n]) for n in people}
        subjects = list(candidate.subjects)
        for n in people:
            own = known[n]
            if own is None:
                subjects[n] = _without(subjects[n], "no face is found in the clip")
                continue
            others = [vector for m, vector in known.items() if m != n and vector is not None]
            subjects[n] = self._with_references(candidate, subjects[n], windows[n], own, others)
        return candidate.changed(subjects=tuple(subjects))

    def _with_references(
        self,
        candidate: Candidate,
        subject: CuratedSubject,
        window: Sequence[Moment],
        own: Embedding,
        others: Sequence[Embedding],
    ) -> CuratedSubject:
        found: list[Reference] = []
        reasons: list[str] = []
        for moment in self._moments(candidate, subject, own):
            vector = self.faces.embed(moment.frame, moment.face)
            reason = self._refuse(moment, vector, window, own, others)
            try:
                if not reason:
                    found.append(self._cut(candidate, moment, float(vector @ own), "other_moment"))
            except CropError as error:
                reason = str(error)
            reasons += [reason] if reason else []
            if len(found) == self.count:
                break
        if not found and self.same_frame:
            inside = [x for x in sightings_of(subject) if in_window(candidate, x)]
            best = by_quality(inside, f"{candidate.key}/{subject.name}", frontal_and_sharp)[:1]
            with suppress(CropError):  # why there is no other one is what counts
                for _, moment in self._look(candidate, best):
                    cosine = float(self.faces.embed(moment.frame, moment.face) @ own)
                    found.append(self._cut(candidate, moment, cosine, "same_frame"))
        why = reasons[0] if reasons else "no other moment"
        subject = subject if found and found[0].origin != "same_frame" else _without(subject, why)
        return replace(subject, references=(*found, *subject.references))

    def _moments(self, candidate: Candidate, subject: CuratedSubject, own: Embedding) -> Iterator[Moment]:
        """Where else the person is, best first: followed there, then elsewhere in the video."""
        first, last = window_of(candidate)
        times = frame_times(inspect(candidate).video)
        away = [s for s in sightings_of(subject) if self._far(times, s.tick, first, last)]
        ranked = by_quality(away, f"{candidate.key}/{subject.name}", frontal_and_sharp)
        yield from self._one_by_one(candidate, _spread(ranked, times, self.gap, self.tries))
        if not self.other_shots:
            return
        shot = [s.tick for s in sightings_of(subject)]
        least = min(1.0, self.threshold + REJOIN_MARGIN)
        elsewhere = [
            found.sighting
            for found in self._survey(candidate)
            if float(found.embedding @ own) >= least
            and self._far(times, found.sighting.tick, first, last)
            and not shot[0] <= found.sighting.tick <= shot[-1]
        ]
        ranked = by_quality(elsewhere, f"{candidate.key}/{subject.name}", frontal_and_sharp)
        yield from self._one_by_one(candidate, _spread(ranked, times, self.gap, self.tries))

    def _one_by_one(self, candidate: Candidate, sightings: Sequence[Sighting]) -> Iterator[Moment]:
        """As `_look`, reading a frame only when it is asked for: mostly the first one will do."""
        for sighting in sightings:
            yield from (moment for _, moment in self._look(candidate, [sighting]))

    def _survey(self, candidate: Candidate) -> list[Found]:
        """All faces of the whole video at `other_shots` looks a second; remembered for the last few videos, since
        their clips ask one after another."""
        info = inspect(candidate)
        key = (info.path, info.video, candidate.crop)
        if key not in self._surveys:
            whole = candidate.changed(span=None)
            found = []
            for rank, frame in stream(whole, looks_every(whole, self.other_shots)):
                faces = self.faces.detect(frame)
                for face in faces:
                    alone = self._alone(face, faces, frame)
                    quality = yaw(face.landmarks), sharpness(frame, face)
                    sighting = Sighting(rank, in_source(candidate, face.box), alone, *quality)
                    found.append(Found(sighting, self.faces.embed(frame, face)))
            self._surveys[key] = found
            while len(self._surveys) > SURVEYS:
                self._surveys.popitem(last=False)
        return self._surveys[key]

    def _far(self, times: NDArray[np.float64], rank: int, first: int, last: int) -> bool:
        away = times[first] - times[rank] if rank < first else times[rank] - times[last]
        return not first <= rank <= last and bool(away >= self.gap - 1e-6)  # times are rounded

    def _in_window(self, candidate: Candidate, people: Sequence[int]) -> dict[int, list[Moment]]:
        """A few moments at which the clip itself shows each of the people, given by their numbers; of the frames
        only what is around the face."""
        owners: list[int] = []
        wanted: list[Sighting] = []
        for n in people:
            inside = [s for s in sightings_of(candidate.subjects[n]) if in_window(candidate, s)]
            numbers = np.linspace(0, len(inside) - 1, min(COMPARED, len(inside))).astype(int)
            wanted += [inside[number] for number in numbers]
            owners += [n] * len(numbers)
        moments: dict[int, list[Moment]] = {n: [] for n in people}
        for number, moment in self._look(candidate, wanted):
            height, width = moment.frame.shape[:2]
            left, top, right, bottom = head_and_shoulders(moment.face.box, height, width, 4.0)
            near = np.ascontiguousarray(moment.frame[top:bottom, left:right])
            moments[owners[number]].append(moment._replace(frame=near, face=moment.face.moved(-left, -top)))
        return moments

    def _look(self, candidate: Candidate, sightings: Sequence[Sighting]) -> Iterator[tuple[int, Moment]]:
        """Number of the sighting and what this step's backend sees there."""
        for number, frame, face, faces in faces_at(candidate, self.faces, sightings):
            yield number, Moment(sightings[number].tick, frame, face, self._alone(face, faces, frame))

    def _alone(self, face: DetectedFace, faces: Sequence[DetectedFace], frame: Pixels) -> bool:
        crop = self._box(face.box, frame)
        return not any(crop.overlap(box_of(other.box)) for other in faces if other is not face)

    def _box(self, face: Face, frame: Pixels) -> Box:
        height, width = frame.shape[:2]
        return Box(*(whole_body if self.crop == "whole" else head_and_shoulders)(face, height, width))

    def _embedding(self, subject: CuratedSubject, window: Sequence[Moment]) -> Embedding | None:
        """What the subject looks like: as known by the same networks, or by the moments of the window."""
        if subject.embedding is not None and subject.embedder == embedder_name(self.faces):
            return subject.embedding
        return median_embedding([self.faces.embed(m.frame, m.face) for m in window]) if window else None

    def _refuse(
        self, moment: Moment, vector: Embedding, window: Sequence[Moment], own: Embedding, others: Sequence[Embedding]
    ) -> str:
        """Why a moment, whose face has the embedding `vector`, gives no reference, or ""."""
        cosine = float(vector @ own)
        if not moment.alone:
            return "somebody else in the crop"
        if cosine < self.threshold or any(float(vector @ other) >= cosine for other in others):
            return "not surely the same person"
        if cosine > self.max_similarity:
            return "a near copy of the clip"
        turn = yaw(moment.face.landmarks)
        if any(abs(turn - yaw(seen.face.landmarks)) < self.min_turn for seen in window):
            return "no other pose"
        if _copied(moment, window) > self.max_copied:
            return "a near copy of the clip"
        return ""

    def _cut(self, candidate: Candidate, moment: Moment, cosine: float, origin: str) -> Reference:
        """The reference of a moment.

        Raises:
            CropError: where the segmenter finds nobody in it who is fit to be cut out.
        """
        frame, face = moment.frame, moment.face
        box = self._box(face.box, frame)
        left, top, right, bottom = map(round, box)
        picture = frame[top:bottom, left:right]
        if self.segmenter is not None:
            mask = mask_within(self.segmenter.masks(frame, [Detection(*box, face.score)])[0], box)
            if mask is None:
                raise CropError("empty mask")
            picture, box, _ = self.rules.cut(frame, mask)
        facts = {
            "box": [round(side) for side in source_corners(candidate, box)],
            "face_height": round(face.box.height, 1),
            "yaw": round(yaw(face.landmarks), 1),
            "sharpness": round(sharpness(frame, face), 6),
        }
        reference = reference_of(candidate, _scaled(picture, self.size), moment.rank, origin, facts)
        return replace(reference, similarity=round(cosine, 4), model=embedder_name(self.faces))


def in_window(candidate: Candidate, sighting: Sighting) -> bool:
    """Whether the clip shows the moment of a sighting."""
    first, last = window_of(candidate)
    return first <= sighting.tick <= last


def _without(subject: CuratedSubject, reason: str) -> CuratedSubject:
    return replace(subject, meta={**subject.meta, REASON: reason})


def _spread(ranked: Sequence[Sighting], times: NDArray[np.float64], gap: float, count: int) -> list[Sighting]:
    """The first `count` that are `gap` seconds apart of each other, then others: where one moment does not do, its
    neighbours do not either."""
    chosen: list[Sighting] = []
    for sighting in ranked:
        if all(abs(times[sighting.tick] - times[other.tick]) >= gap for other in chosen):
            chosen.append(sighting)
    chosen += [sighting for sighting in ranked if sighting not in chosen]
    return chosen[:count]


def _copied(moment: Moment, window: Sequence[Moment]) -> float:
    """How far a moment's face repeats any of the window's, in [0, 1]."""
    view = face_view(moment.frame, moment.face.landmarks)
    return max((compare(view, face_view(seen.frame, seen.face.landmarks)).subject for seen in window), default=0.0)


def _scaled(picture_HWC: Pixels, side: int) -> Pixels:
    """The picture with its longer side at `side` pixels; as it is where that is 0."""
    if not side:
        return picture_HWC
    from PIL import Image

    height, width = picture_HWC.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.LANCZOS))

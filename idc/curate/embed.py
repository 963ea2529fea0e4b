"""Embeddings of subjects, by which they are recognised in other clips: faces of people, pictures of all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from idc.curate.candidate import Candidate, CuratedSubject, Outcome, Pixels, Step, check_kinds
from idc.curate.describing import model_version
from idc.curate.face_quality import frontal_and_sharp
from idc.curate.faces import (
    PEOPLE,
    embedder_name,
    face_at,
    faces_at,
    median_embedding,
    sightings_of,
    window_of,
)
from idc.curate.reading import look, window_ranks
from idc.data.video import VideoError
from idc.errors import UserError
from idc.metrics.identity import masked_crop
from idc.models.embedders import ImageTextEmbedder
from idc.models.faces import DetectedFace, Embedding, FaceBackend, YuNetSFace
from idc.models.grounding import Detection

REASON = "no_embedding"  # in a subject's meta: why it has none


class EmbedFaces(Step):
    """Embeds the faces of people: the median of the best looks into the window at who is followed, or else the face in
    the subject's box. References that nobody compared get their similarity to it.

    Who has an embedding by the same networks keeps it. Where no face is found, the reason is in the subject's
    meta["no_embedding"].
    """

    heavy = True

    def __init__(self, faces: FaceBackend | None = None, looks: int = 5) -> None:
        """
        Args:
            faces: finds and embeds faces; the offline YuNet and SFace where None.
            looks: how many at most, of a track.

        Raises:
            UserError: for less than one look.
        """
        if looks < 1:
            raise UserError(f"looks={looks}: must be 1 or more")
        self.faces = YuNetSFace() if faces is None else faces
        self.looks = looks

    @property
    def models(self) -> tuple[str, ...]:
        return self.faces.models

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.faces,)

    def apply(self, candidate: Candidate) -> Outcome:
        subjects = [self._embedded(candidate, s) if s.kind in PEOPLE else s for s in candidate.subjects]
        return candidate.changed(subjects=tuple(subjects))

    def _embedded(self, candidate: Candidate, subject: CuratedSubject) -> CuratedSubject:
        name = embedder_name(self.faces)
        if subject.embedding is None or subject.embedder != name:
            vectors = self._followed(candidate, subject) if subject.track else self._boxed(candidate, subject)
            if not vectors:
                return replace(subject, meta={**subject.meta, REASON: "no face is found in the clip"})
            subject = replace(subject, embedding=median_embedding(vectors), embedder=name)
        assert subject.embedding is not None
        others = [None if r.similarity is not None else self._largest(r.pixels()) for r in subject.references]
        return _compared(subject, others, name)

    def _followed(self, candidate: Candidate, subject: CuratedSubject) -> list[Embedding]:
        first, last = window_of(candidate)
        inside = [s for s in sightings_of(subject) if first <= s.tick <= last]
        best = sorted(inside, key=frontal_and_sharp, reverse=True)[: self.looks]
        return [self.faces.embed(frame, face) for _, frame, face, _ in faces_at(candidate, self.faces, best)]

    def _boxed(self, candidate: Candidate, subject: CuratedSubject) -> list[Embedding]:
        if subject.box is None:
            return []
        frame = picture_of(candidate, subject)
        face = face_at(subject.box, self.faces.detect(frame))
        return [self.faces.embed(frame, face)] if face else []

    def _largest(self, picture: Pixels) -> Embedding | None:
        face: DetectedFace | None = max(self.faces.detect(picture), key=lambda face: face.box.area, default=None)
        return None if face is None else self.faces.embed(picture, face)


class EmbedSubjects(Step):
    """Embeds what a picture tells apart: objects, clothes, places. Crops are laid on grey outside their masks.

    References that nobody compared get their similarity to it. Pictures go through the network in batches of one size,
    the last one filled up, so that a picture's numbers do not depend on how many come with it. A picture that the
    network cannot take, such as a sliver, has no vector: the reason is in the subject's meta["no_embedding"], and a
    reference stays one that nobody compared.
    """

    heavy = True

    def __init__(
        self,
        embedder: ImageTextEmbedder,
        kinds: Sequence[str] = ("object", "clothing", "place"),
        batch: int = 8,
    ) -> None:
        """
        Args:
            embedder: CLIP, SigLIP or another of `idc.models.embedders`.
            kinds: of subjects that are embedded.
            batch: candidates at a time.

        Raises:
            UserError: for less than one, or a kind that there is none of.
        """
        if batch < 1:
            raise UserError(f"batch={batch}: must be 1 or more")
        check_kinds("kinds", kinds)
        self.embedder, self.kinds, self.batch = embedder, tuple(kinds), batch

    @property
    def models(self) -> tuple[str, ...]:
        return (model_version(self.embedder),)

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.embedder,)

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        jobs: list[list[tuple[int, list[Pixels]]]] = []
        dropped: dict[int, Outcome] = {}
        for n, candidate in enumerate(candidates):
            try:
                jobs.append(self._pictures(candidate))
            except VideoError as error:
                jobs.append([])
                dropped[n] = candidate.dropped(self.name, "unreadable video", str(error))
        every = [picture for job in jobs for _, pictures in job for picture in pictures]
        reasons = [self.embedder.unfit(picture) for picture in every]
        known = iter(self._vectors([picture for picture, reason in zip(every, reasons, strict=True) if not reason]))
        vectors = iter([(None if reason else next(known), reason) for reason in reasons])
        name = model_version(self.embedder)
        outcomes: list[Sequence[Outcome]] = []
        for n, (candidate, job) in enumerate(zip(candidates, jobs, strict=True)):
            subjects = list(candidate.subjects)
            for number, pictures in job:
                (own, reason), *others = (next(vectors) for _ in pictures)
                subject = subjects[number]
                if own is None:
                    subjects[number] = replace(subject, meta={**subject.meta, REASON: reason})
                    continue
                compared = [vector for vector, _ in others]
                subjects[number] = _compared(replace(subject, embedding=own, embedder=name), compared, name)
            outcomes.append([dropped.get(n) or candidate.changed(subjects=tuple(subjects))])
        return outcomes

    def _pictures(self, candidate: Candidate) -> list[tuple[int, list[Pixels]]]:
        """Of each subject to embed its number, its crop and its references' pictures."""
        return [
            (n, [crop_of_subject(candidate, subject), *(reference.pixels() for reference in subject.references)])
            for n, subject in enumerate(candidate.subjects)
            if subject.kind in self.kinds and (subject.box is not None or subject.mask is not None)
        ]

    def _vectors(self, pictures: Sequence[Pixels]) -> list[Embedding]:
        """Unit vectors, float32 `[D]` each."""
        if not pictures:
            return []
        size = getattr(self.embedder, "batch", 1)
        blank = np.zeros((32, 32, 3), np.uint8)
        filled = [*pictures, *[blank] * (-len(pictures) % size)]
        return list(self.embedder.embed_images(filled).numpy()[: len(pictures)])


def picture_of(candidate: Candidate, subject: CuratedSubject) -> Pixels:
    """The clip's frame that a subject's box and mask are of, RGB uint8 `[H, W, 3]`; of the cropped source before the
    clip is cut.

    Raises:
        VideoError: where the frame cannot be read.
    """
    if candidate.clip is not None:
        if not 0 <= subject.frame < len(candidate.clip):
            raise VideoError(f"frame {subject.frame} of a clip of {len(candidate.clip)} frames")
        return candidate.clip[subject.frame]
    ranks = window_ranks(candidate)
    if not 0 <= subject.frame < len(ranks):
        raise VideoError(f"frame {subject.frame} of a clip of {len(ranks)} frames")
    return look(candidate, [ranks[subject.frame]])[0]


def crop_of_subject(candidate: Candidate, subject: CuratedSubject) -> Pixels:
    """What the clip shows of a subject: its mask laid on grey, else its box, at least a pixel wide and high."""
    picture = picture_of(candidate, subject)
    if subject.mask is not None and subject.mask.any():
        return masked_crop(picture, subject.mask)
    if subject.box is None:
        return picture
    return Detection(*subject.box, subject.score).crop(picture)


def _compared(subject: CuratedSubject, vectors: Sequence[Embedding | None], model: str) -> CuratedSubject:
    """The subject, its references compared with it by their vectors where that was not done before."""
    assert subject.embedding is not None
    references = [
        replace(reference, similarity=round(float(vector @ subject.embedding), 4), model=model)
        if reference.similarity is None and vector is not None
        else reference
        for reference, vector in zip(subject.references, vectors, strict=True)
    ]
    return replace(subject, references=tuple(references))

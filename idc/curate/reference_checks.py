"""The last word on references: which are good enough, and what becomes of subjects that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from idc.curate.candidate import Candidate, CuratedSubject, Outcome, Pixels, Reference, Step, check_kinds
from idc.curate.references import REASON
from idc.data.video import VideoError
from idc.errors import UserError, nearest
from idc.metrics.base import Clip
from idc.rewards.watch import Sharpness

LACKING = ("drop subject", "drop candidate", "keep")
ORIGINS = ("same_frame", "other_moment", "other_video", "given", "augmented", "generated")
FOREIGN = "reference of another origin"
SHARP_SIDE = 224  # pixels of the longer side at which sharpness is measured


class CheckReferences(Step):
    """Takes from each subject the references that are too small, blurred, unlike it, or near copies of the clip.

    A subject that is left with none goes, or its candidate does, or it stays without, as `lacking` says. The counted
    reason is that of its first reference, or why none was found in the first place.
    """

    def __init__(
        self,
        min_side: int = 64,
        min_sharpness: float = 0.0,
        min_similarity: float = -1.0,
        max_similarity: float = 1.0,
        origins: Sequence[str] = ORIGINS,
        kinds: Sequence[str] = (),
        lacking: str = "drop subject",
        min_subjects: int = 1,
    ) -> None:
        """
        Args:
            min_side: least shorter side in pixels.
            min_sharpness: least variance of the Laplacian of the luma in [0, 1], at a longer side of 224 pixels.
            min_similarity, max_similarity: of a reference to its subject, cosines in [-1, 1]; one that nobody compared
                passes. They mean what the embedder that compared them means: see `kinds`.
            origins: that are let through; "generated" stands for all backends.
            kinds: of subjects that are looked at; all where empty.
            lacking: what becomes of a subject without references: "drop subject", "drop candidate" or "keep".
            min_subjects: a candidate that is left with fewer goes, too; 0 keeps clips without subjects.

        Raises:
            UserError: for a value out of its range.
        """
        for name, value in (("min_side", min_side), ("min_sharpness", min_sharpness), ("min_subjects", min_subjects)):
            if value < 0:
                raise UserError(f"{name}={value}: must be 0 or more")
        if not -1 <= min_similarity <= max_similarity <= 1:
            raise UserError(
                f"min_similarity={min_similarity}, max_similarity={max_similarity}: cosines, the first not above the "
                "second"
            )
        check_kinds("kinds", kinds)
        if lacking not in LACKING:
            raise UserError(f"lacking={lacking!r}{nearest(lacking, LACKING)}")
        unknown = [origin for origin in origins if origin not in ORIGINS]
        if unknown:
            raise UserError(f"origins: {unknown[0]!r} is none{nearest(unknown[0], ORIGINS)}")
        self.min_side, self.min_sharpness = min_side, min_sharpness
        self.min_similarity, self.max_similarity = min_similarity, max_similarity
        self.origins, self.kinds, self.lacking, self.min_subjects = tuple(origins), tuple(kinds), lacking, min_subjects

    def apply(self, candidate: Candidate) -> Outcome:
        kept: list[CuratedSubject] = []
        removed: dict[str, str] = {}
        reason, detail = "no subject", f"0 subjects, at least {self.min_subjects}"
        for subject in candidate.subjects:
            if self.kinds and subject.kind not in self.kinds:
                kept.append(subject)
                continue
            good, faults = self._sorted(subject)
            if good or self.lacking == "keep":
                kept.append(replace(subject, references=good))
                continue
            reason, detail = faults[0] if faults else ("no reference", "")
            if reason in ("no reference", FOREIGN) and REASON in subject.meta:
                reason = str(subject.meta[REASON])
            detail = f"{subject.name}: {detail}" if detail else subject.name
            if self.lacking == "drop candidate":
                return candidate.dropped(self.name, reason, detail)
            removed[subject.name] = reason
        if len(kept) < self.min_subjects:
            return candidate.dropped(self.name, reason, detail)
        return candidate.changed(subjects=tuple(kept), meta={self.name: {"removed": removed}} if removed else {})

    def _sorted(self, subject: CuratedSubject) -> tuple[tuple[Reference, ...], list[tuple[str, str]]]:
        """The good references, and of each other one the reason and the detail."""
        good, faults = [], []
        for reference in subject.references:
            fault = self._fault(reference)
            if fault is None:
                good.append(reference)
            else:
                faults.append(fault)
        return tuple(good), faults

    def _fault(self, reference: Reference) -> tuple[str, str] | None:
        if reference.origin.partition(":")[0] not in self.origins:
            return FOREIGN, reference.origin
        if reference.similarity is not None:
            if reference.similarity < self.min_similarity:
                return "reference unlike the subject", f"{reference.similarity:.3f} below {self.min_similarity:g}"
            if reference.similarity > self.max_similarity:
                return "reference too like the clip", f"{reference.similarity:.3f} above {self.max_similarity:g}"
        try:
            picture = reference.pixels()
        except VideoError as error:
            return "unreadable reference", str(error)
        if min(picture.shape[:2]) < self.min_side:
            return "reference too small", f"{picture.shape[1]}x{picture.shape[0]}, at least {self.min_side}"
        value = picture_sharpness(picture) if self.min_sharpness else None
        if value is not None and value < self.min_sharpness:
            return "reference not sharp", f"{value:.6f} below {self.min_sharpness:g}"
        return None


def picture_sharpness(picture_HWC: Pixels) -> float:
    """Variance of the Laplacian of the luma in [0, 1] at a longer side of 224 pixels; in [0, 16]."""
    import cv2

    height, width = picture_HWC.shape[:2]
    scale = SHARP_SIDE / max(height, width)
    size = max(3, round(width * scale)), max(3, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = np.asarray(cv2.resize(picture_HWC, size, interpolation=method), np.uint8)
    return Sharpness().score(Clip("reference", scaled[None])).value or 0.0

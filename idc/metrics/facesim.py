"""FaceSim: is the person of the reference the person in the video? OpenS2V-Eval's rule over any face backend.

The rule is one for all three protocols: v1.0 and v1.1 share it and the paper's appendix describes none of its own.
`CurricularFace` is the benchmark's figure that enters the total (`cur`), `InsightFacePack` its second figure (`arc`),
`YuNetSFace` the same rule with networks that come with the install (`sface`), whose figures are not comparable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score, VideoMetric, sampled
from idc.models.faces import DetectedFace, Embedding, FaceBackend, Picture, YuNetSFace

CATEGORIES = ("singlehuman", "singleface", "faceobj", "humanobj")  # the items with one person
GREY = 128
PADDING = 0.25  # of the picture's sides, on each side

T = TypeVar("T")


class FaceSim(VideoMetric):
    """Cosine between the face of the reference and the largest face of each frame, mean over frames, in [0, 1].

    As in OpenS2V-Eval (facts read from its code): only items with one person are scored; the reference is the first
    that shows a face or a human; of 32 frames the largest face counts; a picture without a face is tried again with
    grey padding of a quarter of its sides; cosines below 0 count 0; frames without a face are skipped; a video
    without any face scores 0. Under `cur` the benchmark also skips frames whose cosine is not above 0, under `arc` it
    does not; both are kept. Departures, which are the benchmark's own intentions: a reference without a face is a
    failure with a reason and does not drop out of the count; a clip without a category is scored.

    `details`: `similarity`, the cosine before the floor for each frame (null without a face); `embedding`, its name;
    `reference`, the index of the reference.

    >>> import numpy as np
    >>> metric = FaceSim(YuNetSFace())
    >>> blank = np.zeros((2, 32, 32, 3), np.uint8)
    >>> metric.score(Clip("a", blank, references=(Reference(blank[0], "man", "human"),))).reason
    'no face is found in the reference picture of man'
    """

    name = "facesim"
    held = ("faces",)

    def __init__(self, faces: FaceBackend | None = None, variant: str = "") -> None:
        """
        Args:
            faces: finds and tells apart faces; the offline YuNet and SFace where None.
            variant: for a second figure beside the one that enters the total: its results go by
                "facesim_<variant>", such as the benchmark's "facesim_arc".

        Raises:
            UserError: for a variant that is no word of lower-case letters, digits and "_".
        """
        super().__init__()
        if variant:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", variant):
                raise UserError(f"variant={variant!r}: must be lower-case letters, digits and '_', such as 'arc'")
            self.name = f"{type(self).name}_{variant}"
        self.faces = YuNetSFace() if faces is None else faces
        self.models = self.faces.models

    def applies(self, clip: Clip) -> bool:
        """The benchmark's items with one person; without a category, those that show people."""
        return clip.category in CATEGORIES or (not clip.category and first_person(clip.references) is not None)

    def score(self, clip: Clip) -> Score:
        found = first_person(clip.references)
        if found is None:
            return Score.failed("no reference is of the kind face or human")
        reference = clip.references[found]
        face = face_embedding(reference.image_HWC, self.faces)
        if face is None:
            return Score.failed(
                f"no face is found in the reference picture of {reference.name or f'subject {found + 1}'}"
            )
        cosines = face_similarity(face, sampled(clip, self.frames), self.faces)
        return Score(
            mean_similarity(cosines, skip_unlike=self.faces.name == "cur"),
            details={"similarity": cosines, "embedding": self.faces.name, "reference": found},
        )


def first_person(references: Iterable[Reference]) -> int | None:
    """Index of the first reference of kind "face" or "human"."""
    return next((index for index, reference in enumerate(references) if reference.kind in ("face", "human")), None)


def face_similarity(reference_D: Embedding, frames_THWC: NDArray[np.uint8], faces: FaceBackend) -> list[float | None]:
    """Cosine in [-1, 1] of the largest face of each frame to a unit embedding; None for a frame without a face."""
    embeddings = for_each(frames_THWC, lambda frame: face_embedding(frame, faces))
    return [None if embedding is None else float(embedding @ reference_D) for embedding in embeddings]


def for_each(frames_THWC: NDArray[np.uint8], look: Callable[[Picture], T]) -> list[T]:
    """`look` at each frame, once only where a frame is repeated, as `sample_frames` does in short clips."""
    found: list[T] = []
    for t, frame in enumerate(frames_THWC):
        found.append(found[-1] if t and np.array_equal(frame, frames_THWC[t - 1]) else look(frame))
    return found


def mean_similarity(cosines: Iterable[float | None], skip_unlike: bool = False) -> float:
    """Mean in [0, 1] of the cosines, floored at 0, over frames with a face; 0 where there is none.

    `skip_unlike` leaves out frames whose cosine is not above 0 (the benchmark's `cur`).
    """
    values = [max(0.0, cosine) for cosine in cosines if cosine is not None]
    values = [value for value in values if value > 0 or not skip_unlike]
    # Cosines of float32 units can exceed 1 by a rounding error.
    return min(1.0, math.fsum(values) / len(values)) if values else 0.0


def face_embedding(picture_HWC: Picture, faces: FaceBackend) -> Embedding | None:
    """Embedding of the largest face, or None where there is none."""
    found = largest_face(picture_HWC, faces)
    return None if found is None else faces.embed(*found)


def largest_face(picture_HWC: Picture, faces: FaceBackend) -> tuple[Picture, DetectedFace] | None:
    """The largest face and the picture to embed it from: the given one, or one padded where it was found only so."""
    found = find_faces(picture_HWC, faces)
    if found is None:
        return None
    picture, detected = found
    return picture, max(detected, key=lambda face: face.box.area)


def find_faces(picture_HWC: Picture, faces: FaceBackend) -> tuple[Picture, list[DetectedFace]] | None:
    """All faces, with the picture that their places refer to; None where there is none, with grey padding neither.

    Padding helps with a face that fills its picture: detectors expect one with surroundings.
    """
    detected = faces.detect(picture_HWC)
    if detected:
        return picture_HWC, detected
    top, left = (int(side * PADDING) for side in picture_HWC.shape[:2])
    padded = np.pad(picture_HWC, ((top, top), (left, left), (0, 0)), constant_values=GREY)
    detected = faces.detect(padded)
    if not detected:
        return None
    if faces.crops_padding:
        return padded, detected
    return picture_HWC, [face.moved(-left, -top) for face in detected]

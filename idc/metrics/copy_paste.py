"""Copy-paste: is the subject a copy of its reference PICTURE, beyond being the same person or thing?

A model that pastes its reference into the frame scores best in every likeness metric. What gives it away is that the
very pixels come back: pose, expression, light, hair, clothes, background. Both pictures are brought to one crop around
the subject (scale, place and turn do not matter), aligned to the pixel, and correlated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score, VideoMetric, sample_frames, sampled
from idc.metrics.facesim import find_faces, for_each
from idc.metrics.tracking import match
from idc.models.faces import (
    ARCFACE_LANDMARKS,
    Embedding,
    FaceBackend,
    Picture,
    YuNetSFace,
    similarity_transform,
)

SIDE = 128  # of the common crop in pixels
COVER = 2.4  # an aligned face's crop (ArcFace's 112 pixels) goes this often into the common one
SMALLEST = 0.001  # of the frame: a smaller mask is no sighting
LEAST = 64  # pixels that both pictures must have of a part for it to be compared


class Copy(NamedTuple):
    """How far a frame repeats a reference, each in [0, 1], 1 for the same pixels; None where too little is in both.

    Attributes:
        subject: correlation of the fine structure within the subject: pose, expression, light.
        surroundings: the same around it: hair, clothes, background.
    """

    subject: float
    surroundings: float | None

    @property
    def value(self) -> float:
        """Mean of the two, or the first alone."""
        return self.subject if self.surroundings is None else 0.5 * (self.subject + self.surroundings)


class View(NamedTuple):
    """A subject within a picture: `transform` [2, 3] takes the picture to the common crop; `inside` `[SIDE, SIDE]` says
    where in the crop the subject is."""

    picture_HWC: Picture
    transform: NDArray[np.float64]
    inside: NDArray[np.bool_]


class CopyPaste(VideoMetric):
    """How far the subjects are copies of their reference pictures, in [0, 1]; lower is better.

    For each subject and frame the mean of two correlations (`Copy`): within the subject and around it. Measured on
    five people: pastes, also rescaled, turned or compressed, 0.87 to 1.0; the same person in another clip about 0.2,
    in another second of one shot 0.0 to 0.8; other people 0.1 to 0.36. Nearly equal frames of one shot count as
    copies, rightly: a reference cut from the very clip is one. The clip's value is the mean over frames, then over
    subjects. Frames in which a subject is not found are left out; a clip in which none is found fails.

    People (references of kind "face" and "human") are compared with the faces most like theirs, however unlike that
    is: a small blurred paste may be past recognition. Objects are found by the clip's masks.

    `details`: `subjects`, a list of {name, reference (its index), value, highest, subject, surroundings, frames (T
    values, null where not found)}; `not_judged`, names of the references left out.

    >>> import numpy as np
    >>> blank = np.zeros((2, 32, 32, 3), np.uint8)
    >>> CopyPaste().score(Clip("a", blank, references=(Reference(blank[0], "dog"),))).reason
    'no subject is seen that could be compared: dog'
    """

    name = "copy_paste"
    held = ("faces",)
    higher_is_better = False

    def __init__(self, faces: FaceBackend | None = None, frames: int | None = 8) -> None:
        """
        Args:
            faces: finds and tells apart faces; the offline YuNet and SFace where None.
            frames: how many frames are compared, spread evenly; None for all.

        Raises:
            UserError: for fewer than one frame.
        """
        super().__init__()
        if frames is not None and frames < 1:
            raise UserError(f"frames={frames}: must be 1 or more, or None for all frames")
        self.faces = YuNetSFace() if faces is None else faces
        self.frames = frames
        self.models = self.faces.models

    def applies(self, clip: Clip) -> bool:
        """An item that shows people, or comes with masks of its objects."""
        return clip.masks_TNHW is not None or any(r.kind in ("face", "human") for r in clip.references)

    def score(self, clip: Clip) -> Score:
        if not clip.references:
            return Score.failed("the clip has no references")
        copies = self._people(clip) | self._objects(clip)
        subjects = [_subject(clip.references[n], n, row) for n, row in sorted(copies.items()) if any(row)]
        seen = {subject["reference"] for subject in subjects}
        missing = [r.name or f"subject {n + 1}" for n, r in enumerate(clip.references) if n not in seen]
        if not subjects:
            return Score.failed(f"no subject is seen that could be compared: {', '.join(missing)}")
        value = math.fsum(subject["value"] for subject in subjects) / len(subjects)
        return Score(value, details={"subjects": subjects, "not_judged": missing})

    def _people(self, clip: Clip) -> dict[int, list[Copy | None]]:
        known: dict[int, tuple[View, Embedding]] = {}
        for n, reference in enumerate(clip.references):
            if reference.kind in ("face", "human"):
                faces = _faces(reference.image_HWC, self.faces)
                if faces:
                    known[n] = faces[0]
        copies: dict[int, list[Copy | None]] = {n: [] for n in known}
        if not known:
            return copies
        references_ND = np.stack([embedding for _, embedding in known.values()])
        for faces in for_each(sampled(clip, self.frames), lambda frame: _faces(frame, self.faces)):
            likeness = np.array([references_ND @ embedding for _, embedding in faces]).reshape(len(faces), len(known))
            shows = match(likeness, threshold=-2, margin=2).tolist()
            for place, n in enumerate(known):
                found = faces[shows.index(place)][0] if place in shows else None
                copies[n].append(None if found is None else compare(known[n][0], found))
        return copies

    def _objects(self, clip: Clip) -> dict[int, list[Copy | None]]:
        if clip.masks_TNHW is None:
            return {}
        chosen = sample_frames(len(clip.frames_THWC), self.frames).tolist()
        copies: dict[int, list[Copy | None]] = {}
        for n, reference in enumerate(clip.references):
            if reference.kind == "object":
                whole = np.ones(reference.image_HWC.shape[:2], bool)
                view = masked_view(reference.image_HWC, whole if reference.mask_HW is None else reference.mask_HW)
                found = [masked_view(clip.frames_THWC[t], clip.masks_TNHW[t, n]) for t in chosen]
                copies[n] = [None if view is None or other is None else compare(view, other) for other in found]
        return copies


def face_view(picture_HWC: Picture, landmarks_52: NDArray[np.floating]) -> View:
    """A face and what is around it: head, shoulders and some background."""
    scale = SIDE / 112 / COVER
    transform = similarity_transform(landmarks_52, (ARCFACE_LANDMARKS - 56) * scale + SIDE / 2)
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    return View(picture_HWC, transform, (columns / (40 * scale)) ** 2 + (rows / (52 * scale) - 0.04) ** 2 < 1)


def masked_view(picture_HWC: Picture, mask_HW: NDArray[np.bool_]) -> View | None:
    """A masked subject in the middle third of the crop's area, by its centre and area; None where the mask is empty."""
    import cv2

    if mask_HW.mean() < SMALLEST:
        return None
    rows, columns = np.nonzero(mask_HW)
    scale = SIDE * math.sqrt(1 / 3) / math.sqrt(len(rows))
    centre = np.array([columns.mean(), rows.mean()])
    transform = np.c_[np.eye(2) * scale, SIDE / 2 - scale * centre]
    inside = cv2.warpAffine(mask_HW.astype(np.float32), transform, (SIDE, SIDE)) > 0.5
    return View(picture_HWC, transform, np.asarray(inside))


def compare(reference: View, frame: View) -> Copy:
    """How far `frame` repeats `reference` (see `Copy`)."""
    a, a_there = _crop(reference)
    b, b_there = _align(a, a_there & reference.inside, *_crop(frame))
    there = a_there & b_there
    inside, around = there & reference.inside, there & ~_grown(reference.inside)
    subject = _correlation(_fine(a, there, 6), _fine(b, there, 6), inside)
    return Copy(subject or 0.0, _correlation(_fine(a, there, 12), _fine(b, there, 12), around))


def _faces(picture_HWC: Picture, faces: FaceBackend) -> list[tuple[View, Embedding]]:
    found = find_faces(picture_HWC, faces)
    if found is None:
        return []
    picture, detected = found
    ordered = sorted(detected, key=lambda face: -face.box.area)
    return [(face_view(picture, face.landmarks), faces.embed(picture, face)) for face in ordered]


def _crop(view: View) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Luma of the common crop, and where the picture reaches."""
    import cv2

    luma = np.asarray(cv2.cvtColor(np.ascontiguousarray(view.picture_HWC), cv2.COLOR_RGB2GRAY), np.float32)
    scale = math.sqrt(abs(float(np.linalg.det(view.transform[:, :2]))))
    if scale < 0.7:  # against aliasing
        luma = np.asarray(cv2.GaussianBlur(luma, (0, 0), 0.5 / scale), np.float32)
    crop = cv2.warpAffine(luma, view.transform, (SIDE, SIDE))
    there = cv2.warpAffine(np.ones_like(luma), view.transform, (SIDE, SIDE)) > 0.99
    return np.asarray(cv2.GaussianBlur(crop, (0, 0), 1.0)), np.asarray(there)


def _align(
    a: NDArray[np.float32], inside: NDArray[np.bool_], b: NDArray[np.float32], there: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`b` moved by the small affine map that correlates it best with `a` within `inside` (ECC, Evangelidis 2008).

    Landmarks are good to a pixel or two, which is enough to hide that two pictures are one.
    """
    import cv2

    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-3)
    mask = inside.astype(np.uint8)
    try:
        _, warp = cv2.findTransformECC(a, b, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, criteria, mask, 5)
    except cv2.error:  # it does not converge for pictures that have nothing in common
        return b, there
    if np.abs(warp[:, :2] - np.eye(2)).max() > 0.25 or np.abs(warp @ (SIDE / 2, SIDE / 2, 1) - SIDE / 2).max() > 12:
        return b, there
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(b, warp, (SIDE, SIDE), flags=flags)
    reach = cv2.warpAffine(there.astype(np.float32), warp, (SIDE, SIDE), flags=flags) > 0.99
    return np.asarray(moved), np.asarray(reach)


def _fine(luma: NDArray[np.float32], there: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """Structure finer than `sigma` pixels, as all upright faces share the coarse one; nothing enters from outside
    `there`, since the pictures end at different places."""
    import cv2

    weight = there.astype(np.float32)
    coarse = cv2.GaussianBlur(luma * weight, (0, 0), sigma) / np.maximum(cv2.GaussianBlur(weight, (0, 0), sigma), 1e-3)
    return luma - np.asarray(coarse)


def _grown(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    import cv2

    return cv2.dilate(inside.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32], where: NDArray[np.bool_]) -> float | None:
    """Zero-mean normalised correlation, negative counting 0; None for too few pixels or a flat picture."""
    if where.sum() < LEAST:
        return None
    x, y = (values[where].astype(np.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return min(1.0, max(0.0, float((x * y).sum()) / scale)) if scale > 1e-3 else None


def _subject(reference: Reference, index: int, copies: Sequence[Copy | None]) -> dict[str, Any]:
    found = [copy for copy in copies if copy is not None]
    around = [copy.surroundings for copy in found if copy.surroundings is not None]
    values = [copy.value for copy in found]
    return {
        "name": reference.name or f"subject {index + 1}",
        "reference": index,
        "value": math.fsum(values) / len(values),
        "highest": max(values),
        "subject": math.fsum(copy.subject for copy in found) / len(found),
        "surroundings": math.fsum(around) / len(around) if around else None,
        "frames": [None if copy is None else copy.value for copy in copies],
    }

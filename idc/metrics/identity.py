"""Identity of several subjects over time: who is seen when, who wears whose face, who is missing or there twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from idc.data.cuts import is_cut
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score, VideoMetric, sample_frames
from idc.metrics.facesim import GREY, face_embedding, find_faces, for_each
from idc.metrics.tracking import STATES, Seen, Sighting, Tracking, follow, track
from idc.models.faces import Embedding, FaceBackend, YuNetSFace
from idc.models.pretrained import sliver

PEOPLE = ("face", "human")
SMALLEST = 0.001  # of the frame: a smaller mask is no sighting


class ImageEmbedder(Protocol):
    """Anything that maps pictures to unit vectors in which alike subjects are close, e.g. CLIP's or DINO's."""

    models: tuple[str, ...]

    def embed_images(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """RGB uint8 pictures `[H, W, 3]` of any sizes -> unit rows `[N, D]`."""

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the network; idempotent."""

    def unload(self) -> None:
        """Free the network."""


class IdentityTracking(VideoMetric):
    """Mean over subjects and frames of each subject's likeness to its reference, in [0, 1].

    People (references of kind "face" and "human") are found by their faces, which are matched to the references frame
    by frame (`tracking.match`) and followed by place, so that somebody who turns away is not lost and a body that
    changes its face is noticed. Other subjects, where the clip has their masks and an `embedder` is given, are
    compared as masked crops; then the mask says whose body it is. A subject that is missing in a frame, or whose face
    sits on another's body, counts 0 there; a second copy of it costs nothing here and has its own rate.

    A subject that nothing shows scores 0; a person's reference without a face fails the clip, since the figure would
    silently be about fewer subjects. Backgrounds, and objects without mask or embedder, are not judged.

    `details`, plain JSON for N judged subjects in T frames (null where there is no number):

        subjects        N of {name, reference (its index), kind, identity (mean that enters the score), similarity
                        (mean where it is seen, null if never), missing, swapped, unsure, doubled (shares of frames)}
        average, minimum  of `identity` over the subjects, the paper's table S.7
        missing, swapped, unsure, doubled  means of the shares over the subjects
        similarity      N lists of T cosines, null where the subject is missing
        states          N lists of T of "missing", "seen", "unsure", "swapped"
        doubled_frames  N lists of frames in which two look like the subject
        confusion       N lists of N + 1: of the sightings of subject n's body, the share that looks like reference m;
                        the last column is "like none"
        likeness        N lists of N: mean cosine of subject n's body to reference m, null where it was never seen or
                        never compared (a person with an object)
        strangers       mean number of faces in a frame that are nobody's
        not_judged      names of references left out

    >>> import numpy as np
    >>> blank = np.zeros((2, 32, 32, 3), np.uint8)
    >>> IdentityTracking().score(Clip("a", blank, references=(Reference(blank[0], "dog"),))).reason
    'no subject can be judged: no reference shows a person, and for others masks or an embedder are missing'
    """

    name = "identity"
    held = ("faces", "embedder")

    def __init__(
        self,
        faces: FaceBackend | None = None,
        embedder: ImageEmbedder | None = None,
        threshold: float | None = None,
        margin: float = 0.1,
        frames: int | None = 32,
    ) -> None:
        """
        Args:
            faces: finds and tells apart faces; the offline YuNet and SFace where None.
            embedder: for subjects with masks.
            threshold: cosine below which a face is nobody; the backend's own where None.
            margin: of two references, a face may be matched to the less alike one if that is within this cosine.
            frames: how many frames are looked at, spread evenly; None for all, which notices the shortest swaps.

        Raises:
            UserError: for a number out of its range.
        """
        super().__init__()
        if frames is not None and frames < 1:
            raise UserError(f"frames={frames}: must be 1 or more, or None for all frames")
        if threshold is not None and not -1 <= threshold < 1:
            raise UserError(f"threshold={threshold}: must lie between -1 and 1, as cosines do")
        if not 0 <= margin <= 2:
            raise UserError(f"margin={margin}: must lie between 0 and 2, a difference of cosines")
        self.faces = YuNetSFace() if faces is None else faces
        self.embedder, self.margin, self.frames = embedder, margin, frames
        self.threshold = self.faces.threshold if threshold is None else threshold
        self.models = self.faces.models + (() if embedder is None else tuple(embedder.models))

    def applies(self, clip: Clip) -> bool:
        """An item that shows people; with an embedder, one of objects too."""
        judged = PEOPLE if self.embedder is None else (*PEOPLE, "object")
        return any(reference.kind in judged for reference in clip.references)

    def score(self, clip: Clip) -> Score:
        people = [n for n, reference in enumerate(clip.references) if reference.kind in PEOPLE]
        masked = clip.masks_TNHW is not None and self.embedder is not None
        objects = [n for n, reference in enumerate(clip.references) if reference.kind == "object" and masked]
        if not people and not objects:
            return Score.failed(
                "no subject can be judged: no reference shows a person, and for others masks or an embedder are missing"
            )
        chosen = sample_frames(len(clip.frames_THWC), self.frames)
        frames = clip.frames_THWC[chosen]
        parts: list[tuple[list[int], Tracking]] = []
        if people:
            embeddings = [face_embedding(clip.references[n].image_HWC, self.faces) for n in people]
            for n, embedding in zip(people, embeddings, strict=True):
                if embedding is None:
                    name = clip.references[n].name or f"subject {n + 1}"
                    return Score.failed(f"no face is found in the reference picture of {name}")
            known = [embedding for embedding in embeddings if embedding is not None]
            parts.append((people, track_faces(frames, known, self.faces, self.threshold, self.margin)))
        if objects:
            assert clip.masks_TNHW is not None
            assert self.embedder is not None
            pictures = [clip.references[n] for n in objects]
            for n, reference in zip(objects, pictures, strict=True):
                if reason := sliver(masked_crop(reference.image_HWC, reference.mask_HW)):
                    return Score.failed(f"reference {n + 1}: {reason}")
            masks_TNHW = clip.masks_TNHW[chosen][:, objects]
            parts.append((objects, track_regions(frames, masks_TNHW, pictures, self.embedder)))
        return _summary(clip.references, parts)


def track_faces(
    frames_THWC: NDArray[np.uint8],
    references: Sequence[Embedding],
    faces: FaceBackend,
    threshold: float,
    margin: float = 0.1,
) -> Tracking:
    """Who of N people, given by unit embeddings of their faces, is seen in each frame (T at least 1)."""
    cuts = {t for t in range(1, len(frames_THWC)) if is_cut(frames_THWC[t - 1], frames_THWC[t])}

    def look(frame: NDArray[np.uint8]) -> list[Seen]:
        # A face found only with padding is placed in the padded frame: it is a large one, which moves little.
        picture, detected = find_faces(frame, faces) or (frame, [])
        return [Seen(face.box, faces.embed(picture, face)) for face in detected]

    seen = for_each(frames_THWC, look)
    known_ND = np.stack(references)
    sightings = [
        Sighting(frame, body, known_ND @ face.embedding_D)
        for frame, (row, bodies) in enumerate(zip(seen, follow(seen, cuts), strict=True))
        for face, body in zip(row, bodies, strict=True)
    ]
    return track(sightings, len(references), len(frames_THWC), threshold, margin)


def track_regions(
    frames_THWC: NDArray[np.uint8],
    masks_TNHW: NDArray[np.bool_],
    references: Sequence[Reference],
    embedder: ImageEmbedder,
) -> Tracking:
    """What each of N masked subjects looks like in each frame, against the N references.

    Crops and references are laid on grey outside their masks. Likeness among such pictures has no common zero, so
    that there is no threshold: a region looks like the reference that it is most like. A sliver is no sighting.
    """
    large = np.argwhere(masks_TNHW.mean((2, 3), dtype=np.float64) >= SMALLEST).tolist()
    regions = [(t, n, masked_crop(frames_THWC[t], masks_TNHW[t, n])) for t, n in large]
    places = [(t, n) for t, n, crop in regions if not sliver(crop)]
    crops = [crop for _, _, crop in regions if not sliver(crop)]
    pictures = [masked_crop(reference.image_HWC, reference.mask_HW) for reference in references]
    vectors = np.asarray(embedder.embed_images([*pictures, *crops]), np.float64)
    likeness = vectors[len(pictures) :] @ vectors[: len(pictures)].T
    sightings = [Sighting(t, n, row) for (t, n), row in zip(places, likeness, strict=True)]
    owners = {n: n for n in range(len(references))}
    return track(sightings, len(references), len(frames_THWC), threshold=-1.01, margin=0.0, owners=owners)


def masked_crop(picture_HWC: NDArray[np.uint8], mask_HW: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """The mask's bounding box cut out, grey where the mask is not; the whole picture without a mask or an empty one."""
    if mask_HW is None or not mask_HW.any():
        return picture_HWC
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return np.where(mask_HW[box][..., None], picture_HWC[box], np.uint8(GREY))


def _summary(references: Sequence[Reference], parts: Sequence[tuple[list[int], Tracking]]) -> Score:
    judged = sorted((n, part, row) for part, (indices, _) in enumerate(parts) for row, n in enumerate(indices))
    trackings = [tracking for _, tracking in parts]
    subjects = [_subject(references[n], n, trackings[part], row) for n, part, row in judged]
    identity = [subject["identity"] for subject in subjects]
    size = len(judged)
    confusion = [[0.0] * (size + 1) for _ in judged]
    likeness: list[list[float | None]] = [[None] * size for _ in judged]
    for i, (_, part, row) in enumerate(judged):
        confusion[i][size] = float(trackings[part].confusion_NM[row, -1])
        for j, (_, other, column) in enumerate(judged):
            if other == part:
                confusion[i][j] = float(trackings[part].confusion_NM[row, column])
                likeness[i][j] = _number(trackings[part].likeness_NN[row, column])
    details: dict[str, Any] = {
        "subjects": subjects,
        "average": math.fsum(identity) / size,
        "minimum": min(identity),
        **{rate: math.fsum(s[rate] for s in subjects) / size for rate in ("missing", "swapped", "unsure", "doubled")},
        "similarity": [[_number(x) for x in trackings[part].similarity_NT[row]] for _, part, row in judged],
        "states": [[STATES[x] for x in trackings[part].states_NT[row]] for _, part, row in judged],
        "doubled_frames": [np.flatnonzero(trackings[part].doubled_NT[row]).tolist() for _, part, row in judged],
        "confusion": confusion,
        "likeness": likeness,
        "strangers": math.fsum(tracking.strangers for tracking in trackings),
        "not_judged": [r.name for n, r in enumerate(references) if n not in {index for index, _, _ in judged}],
    }
    return Score(details["average"], details=details)


def _subject(reference: Reference, index: int, tracking: Tracking, row: int) -> dict[str, Any]:
    return {
        "name": reference.name or f"subject {index + 1}",
        "reference": index,
        "kind": reference.kind,
        "identity": float(tracking.identity_N[row]),
        "similarity": _number(tracking.seen_similarity_N[row]),
        **{rate: float(tracking.rate(rate)[row]) for rate in ("missing", "swapped", "unsure", "doubled")},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)

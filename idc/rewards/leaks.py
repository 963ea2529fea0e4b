"""Anti-leak reward: each subject like itself, and like nobody else (facts of this project, formulation C; the paper
names a contrastive mechanism and specifies none)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from idc.data.toy import ToySpec
from idc.data.toy_scoring import ToyScore
from idc.errors import UserError
from idc.metrics.base import Clip, Score, sample_frames
from idc.metrics.facesim import face_embedding, find_faces, for_each
from idc.metrics.identity import PEOPLE
from idc.metrics.toy import ToyIdentity
from idc.metrics.tracking import match
from idc.models.faces import FaceBackend, YuNetSFace
from idc.rewards.base import Reward
from idc.rewards.toy import ToyReward

SAME_PERSON = 0.46  # the usual cosine of two real pictures of one person; above it copy-paste begins


def leak_margins(likeness_NN: NDArray[np.floating], ceiling: float) -> NDArray[np.float64]:
    """For each subject k: min(likeness to its own reference, `ceiling`) - the largest likeness to another's.

    Args:
        likeness_NN: row k: of what is taken for subject k, to each of the N references; NaN where it is missing.
        ceiling: likeness above which more of it earns nothing.

    Returns:
        `[N]`; 0 for a missing subject, which is neither like itself nor like another. One subject alone has nobody to
        be like, and keeps the first part.
    """
    likeness = np.asarray(likeness_NN, np.float64)
    own = np.minimum(np.diagonal(likeness), ceiling)
    others = np.where(np.eye(len(likeness), dtype=bool), -np.inf, likeness).max(1) if len(likeness) > 1 else 0.0
    return np.nan_to_num(own - others, nan=0.0)


class AntiLeak(Reward):
    """Mean over people and frames of min(cos(g_k, r_k), c) - max over m != k of cos(g_k, r_m), in [-2, 1 + c].

    The faces g of each frame are matched to the references r by the largest sum of cosines (Hungarian method), however
    unlike they are; faces beyond their number are nobody's, and a person without a face adds 0 in that frame: beside
    it belongs a reward that pays for being there.

    `details`: `subjects`, the mean margin of each person; `reference`, their indices.

    Args:
        faces: finds and tells apart faces; the offline YuNet and SFace where None.
        ceiling: c, the usual cosine between two real pictures of one person under this backend (0.46 under ArcFace's).
        frames: how many frames are looked at, spread evenly; None for all.

    Raises:
        UserError: for a number out of its range.
    """

    name = "anti_leak"

    def __init__(self, faces: FaceBackend | None = None, ceiling: float = SAME_PERSON, frames: int | None = 32) -> None:
        if frames is not None and frames < 1:
            raise UserError(f"frames={frames}: must be 1 or more, or None for all frames")
        self.faces = YuNetSFace() if faces is None else faces
        self.ceiling, self.frames = _check_ceiling(ceiling), frames
        self.models = self.faces.models
        self.bounds = (-2.0, 1.0 + ceiling)

    def load(self, device: torch.device | str = "cpu") -> None:
        self.faces.load(device)

    def unload(self) -> None:
        self.faces.unload()

    def applies(self, clip: Clip) -> bool:
        return any(reference.kind in PEOPLE for reference in clip.references)

    def score(self, clip: Clip) -> Score:
        people = [n for n, reference in enumerate(clip.references) if reference.kind in PEOPLE]
        if not people:
            return Score.failed("no reference shows a person")
        known = []
        for n in people:
            embedding = face_embedding(clip.references[n].image_HWC, self.faces)
            if embedding is None:
                name = clip.references[n].name or f"subject {n + 1}"
                return Score.failed(f"no face is found in the reference picture of {name}")
            known.append(embedding)
        known_ND = np.stack(known)

        def look(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
            picture, detected = find_faces(frame_HWC, self.faces) or (frame_HWC, [])
            seen = [self.faces.embed(picture, face) for face in detected]
            return leak_margins(assigned(seen, known_ND), self.ceiling)

        frames = clip.frames_THWC[sample_frames(len(clip.frames_THWC), self.frames)]
        margins_TN = np.stack(for_each(frames, look))
        details = {"subjects": margins_TN.mean(0).tolist(), "reference": people}
        return Score(float(margins_TN.mean()), details=details)


class ToyAntiLeak(ToyReward):
    """The same over colour, shape and texture, in [-1, c]: likeness is the share of the three in common.

    Subjects that were asked to share an attribute have the smaller margin in all rollouts of a group alike. A subject
    adds its margin for the share of the frames that show it.

    Raises:
        UserError: for a ceiling outside of (0, 1].
    """

    name = "toy_anti_leak"

    def __init__(self, ceiling: float = 1.0) -> None:
        self.ceiling = _check_ceiling(ceiling)
        self.bounds = (-1.0, ceiling)
        self._metric = ToyIdentity()

    def value(self, spec: ToySpec, scores: ToyScore) -> Score:
        likeness_NN = np.array(self._metric.summary(spec, scores).details["likeness"], np.float64)  # None becomes NaN
        presence_N = np.array([subject.presence for subject in scores.subjects])
        margins_N = presence_N * leak_margins(likeness_NN, self.ceiling)
        return Score(float(margins_N.mean()), details={"subjects": margins_N.tolist()})


def assigned(seen: Sequence[NDArray[np.floating]], known_ND: NDArray[np.floating]) -> NDArray[np.float64]:
    """Row k: cosines `[N]` of the face matched to reference k; NaN where none is left for it."""
    likeness_NN = np.full((len(known_ND), len(known_ND)), np.nan)
    if seen:
        likeness_FN = np.stack(seen) @ known_ND.T
        for face, n in enumerate(match(likeness_FN, threshold=-2, margin=4).tolist()):
            if n >= 0:
                likeness_NN[n] = likeness_FN[face]
    return likeness_NN


def _check_ceiling(ceiling: float) -> float:
    if not 0 < ceiling <= 1:
        raise UserError(f"ceiling={ceiling}: must lie above 0 and not above 1, as likeness does")
    return ceiling

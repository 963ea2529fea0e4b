"""Who is who in a video: sightings of subjects against references, over time.

A sighting is a face (or the region of a subject) in one frame with its likeness to every reference; its body is what
it belongs to over time: a track that is followed by place, or a mask that is known. Faces are matched to references
frame by frame; bodies tell what a frame alone cannot: that somebody turned away is still there, and that a body has
changed its face.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from idc.models.faces import Embedding, Face, affinity

NOBODY = -1
STATES = ("missing", "seen", "unsure", "swapped")


class Seen(NamedTuple):
    """A face in a frame: its box in pixels and its unit embedding."""

    box: Face
    embedding_D: Embedding


class Sighting(NamedTuple):
    """Something in frame `frame` that belongs to `body`, with its cosine to each of the N references."""

    frame: int
    body: int
    likeness_N: NDArray[np.floating]


@dataclass(frozen=True)
class Tracking:
    """Who was seen when. N references, T frames.

    Attributes:
        similarity_NT: cosine of what shows reference n in frame t; NaN where nothing does.
        states_NT: index into `STATES`: nothing shows the reference; it is seen; it is there by continuity of its body
            alone (a face turned away or distorted); it is seen, but on somebody else's body.
        doubled_NT: two or more sightings look like the reference.
        confusion_NM: row n: of the sightings of the body of n, the share that looks like reference m; in the last
            column, like none. Rows of bodies never seen are 0.
        likeness_NN: row n: mean cosine of the body of n to reference m; NaN for bodies never seen.
        strangers: mean number of sightings in a frame that show no reference and look like none.
    """

    similarity_NT: NDArray[np.float64]
    states_NT: NDArray[np.int64]
    doubled_NT: NDArray[np.bool_]
    confusion_NM: NDArray[np.float64]
    likeness_NN: NDArray[np.float64]
    strangers: float

    def rate(self, state: str) -> NDArray[np.float64]:
        """Share of the frames, for each reference: one of `STATES`, or "doubled"."""
        marked = self.doubled_NT if state == "doubled" else self.states_NT == STATES.index(state)
        return marked.mean(1)

    @property
    def identity_N(self) -> NDArray[np.float64]:
        """Mean over all frames of the similarity in [0, 1]: what is missing or on somebody else's body counts 0."""
        there = (self.states_NT == STATES.index("seen")) | (self.states_NT == STATES.index("unsure"))
        return np.where(there, np.clip(np.nan_to_num(self.similarity_NT), 0, 1), 0.0).mean(1)

    @property
    def seen_similarity_N(self) -> NDArray[np.float64]:
        """Mean similarity in [0, 1] over the frames that show the reference on any body; NaN where none does."""
        shown = ~np.isnan(self.similarity_NT)
        total = np.where(shown, np.clip(np.nan_to_num(self.similarity_NT), 0, 1), 0.0).sum(1)
        return np.divide(total, shown.sum(1), out=np.full(len(total), np.nan), where=shown.any(1))


def match(likeness_FN: NDArray[np.floating], threshold: float, margin: float) -> NDArray[np.int64]:
    """For each of F sightings of one frame the reference that it shows, or `NOBODY`; each reference at most once.

    The pairs have the largest sum of cosines (Hungarian method) among those of at least `threshold` in which no other
    reference is like the sighting by more than `margin` more: a second picture of A is not B for want of a better B.
    """
    shows = np.full(len(likeness_FN), NOBODY)
    if likeness_FN.size == 0:
        return shows
    allowed = (likeness_FN >= threshold) & (likeness_FN >= likeness_FN.max(1, keepdims=True) - margin)
    # Above any cosine, so that two matches are worth more than one.
    rows, columns = linear_sum_assignment(np.where(allowed, 3 + likeness_FN, 0.0), maximize=True)
    chosen = allowed[rows, columns]
    shows[rows[chosen]] = columns[chosen]
    return shows


def look(likeness_FN: NDArray[np.floating], threshold: float) -> NDArray[np.int64]:
    """For each sighting the reference that it is most like, whatever others are; `NOBODY` below `threshold`."""
    if likeness_FN.size == 0:
        return np.full(len(likeness_FN), NOBODY)
    return np.where(likeness_FN.max(1) >= threshold, likeness_FN.argmax(1), NOBODY)


def follow(frames: Sequence[Sequence[Seen]], cuts: Collection[int] = (), patience: int = 3) -> list[list[int]]:
    """The body of each face: faces of successive frames are one body where they lie close together (`affinity`).

    Looks decide only between faces that both may be it, so that people who pass each other keep their bodies and a
    face that changes in its place is noticed. A body ends at a cut (`cuts` are the first frames of new shots) and
    after more than `patience` frames without a face.
    """
    latest: dict[int, tuple[int, Seen]] = {}
    bodies: list[list[int]] = []
    count = 0
    for frame, faces in enumerate(frames):
        latest = {} if frame in cuts else {b: last for b, last in latest.items() if frame - last[0] <= patience + 1}
        gains = np.array([[_bond(last, face) for face in faces] for _, last in latest.values()])
        found = [NOBODY] * len(faces)
        if gains.size:
            for row, column in zip(*linear_sum_assignment(gains, maximize=True), strict=True):
                if gains[row, column] > 0:
                    found[column] = list(latest)[row]
        for index, face in enumerate(faces):
            if found[index] == NOBODY:
                found[index], count = count, count + 1
            latest[found[index]] = (frame, face)
        bodies.append(found)
    return bodies


def track(
    sightings: Sequence[Sighting],
    references: int,
    frames: int,
    threshold: float,
    margin: float,
    owners: Mapping[int, int] | None = None,
) -> Tracking:
    """Put together who was seen when.

    Args:
        sightings: in any order.
        references, frames: N and T, both at least 1.
        threshold, margin: see `match`.
        owners: body -> the reference that it belongs to, where that is known (masks). Otherwise a body belongs to the
            reference that it shows most often, and of several to the first.
    """
    likeness = np.array([s.likeness_N for s in sightings]).reshape(len(sightings), references)
    shows = np.full(len(sightings), NOBODY)
    order = sorted(range(len(sightings)), key=lambda i: sightings[i].frame)
    by_frame: list[list[int]] = [[] for _ in range(frames)]
    for index in order:
        by_frame[sightings[index].frame].append(index)
    for group in by_frame:
        shows[group] = match(likeness[group], threshold, margin)
    looks = look(likeness, threshold)
    by_body: dict[int, list[int]] = {}
    for index in order:
        by_body.setdefault(sightings[index].body, []).append(index)
    if owners is None:
        owners = {body: _owner(shows[group]) for body, group in by_body.items()}
    carried = _carry(sightings, by_body, by_frame, shows, looks)
    similarity, states = np.full((references, frames), np.nan), np.zeros((references, frames), np.int64)
    doubled = np.zeros((references, frames), bool)
    for index, sighting in enumerate(sightings):
        subject = int(shows[index])
        if subject != NOBODY:
            similarity[subject, sighting.frame] = likeness[index, subject]
            kind = "unsure" if carried[index] else "seen"
            kind = kind if owners.get(sighting.body, NOBODY) == subject else "swapped"
            states[subject, sighting.frame] = STATES.index(kind)
    for frame, group in enumerate(by_frame):
        doubled[:, frame] = np.bincount(looks[group][looks[group] >= 0], minlength=references) > 1
    confusion, means = _by_owner(by_body, owners, likeness, looks, references)
    strangers = int(((shows == NOBODY) & (looks == NOBODY)).sum())
    return Tracking(similarity, states, doubled, confusion, means, strangers / frames)


def _bond(last: Seen, face: Seen) -> float:
    near = affinity(last.box, face.box)
    return near + 0.5 * (1 + float(last.embedding_D @ face.embedding_D)) if near > 0 else 0.0


def _owner(shows: NDArray[np.int64]) -> int:
    # Counter keeps the order of first sight, and max takes the first of equals.
    counts = Counter(shows[shows != NOBODY].tolist())
    return max(counts, key=counts.__getitem__) if counts else NOBODY


def _carry(
    sightings: Sequence[Sighting],
    by_body: Mapping[int, Sequence[int]],
    by_frame: Sequence[Sequence[int]],
    shows: NDArray[np.int64],
    looks: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Give faces like nobody to whom their body showed before and after, unless that one is seen elsewhere.

    Changes `shows`; returns which sightings it did that for.
    """
    carried = np.zeros(len(sightings), bool)
    sure = shows.copy()
    for group in by_body.values():
        named = [place for place, index in enumerate(group) if sure[index] != NOBODY]
        for place, index in enumerate(group):
            if sure[index] != NOBODY or looks[index] != NOBODY or not named:
                continue
            around = {int(sure[group[p]]) for p in _neighbours(named, place)}
            if len(around) == 1 and around.isdisjoint(shows[by_frame[sightings[index].frame]].tolist()):
                shows[index] = around.pop()
                carried[index] = True
    return carried


def _neighbours(named: Sequence[int], place: int) -> list[int]:
    before = [p for p in named if p < place][-1:]
    return before + [p for p in named if p > place][:1]


def _by_owner(
    by_body: Mapping[int, Sequence[int]],
    owners: Mapping[int, int],
    likeness: NDArray[np.floating],
    looks: NDArray[np.int64],
    references: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    confusion = np.zeros((references, references + 1))
    means = np.full((references, references), np.nan)
    for subject in range(references):
        mine = [i for body, group in by_body.items() if owners.get(body, NOBODY) == subject for i in group]
        if mine:
            # NOBODY is -1, the last column.
            confusion[subject] = np.bincount(looks[mine] % (references + 1), minlength=references + 1) / len(mine)
            means[subject] = likeness[mine].mean(0)
    return confusion, means

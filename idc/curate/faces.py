"""People by their faces: who is in a shot, where, how well seen, and which of them are in a window of it.

Within a shot people are followed by place (`idc.curate.people`), and by looks where the picture changes much. Who
leaves and comes back begins a new track; tracks that look alike and are never seen at the same time are then joined
into one person.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from idc.curate.candidate import PEOPLE, Box, Candidate, CuratedSubject, Outcome, Pixels, Step
from idc.curate.face_quality import frontal_and_sharp, sharpness, yaw
from idc.curate.people import MIN_SIGHTINGS, Sighting, Track, Tracker, subject_names
from idc.curate.reading import clip_box, frame_times, inspect, pick, source_corners, span_of, stream
from idc.data.cuts import is_cut
from idc.errors import UserError
from idc.models.faces import DetectedFace, Embedding, Face, FaceBackend, YuNetSFace, affinity, unit

BEST_LOOKS = 5  # of a track, from which its embedding is made
# Above the backend's threshold: joining two people by mistake is worse than counting one twice. Under SFace one person
# in one video has 0.7 and more, while alike people have up to 0.47, above its threshold of 0.363.
REJOIN_MARGIN = 0.2


def embedder_name(faces: FaceBackend) -> str:
    """What a face's embedding is by, for `CuratedSubject.embedder`: "sface (yunet-2023mar, sface-2021dec)"."""
    return f"{faces.name} ({', '.join(faces.models)})"


def median_embedding(vectors: Sequence[Embedding]) -> Embedding:
    """One unit vector, float32 `[D]`, for several looks at one person: the median of each number, so that one bad look
    changes little."""
    return unit(np.median(np.stack(vectors).astype(np.float64), axis=0))


def box_of(face: Face) -> Box:
    """A face's place as corners."""
    return Box(face.left, face.top, face.left + face.width, face.top + face.height)


def face_at(box: Box, faces: Iterable[DetectedFace]) -> DetectedFace | None:
    """Of the faces with their middle in a box the largest; a person's box has one face, and those of people behind."""
    inside = [
        face
        for face in faces
        if box.left <= face.box.centre[0] <= box.right and box.top <= face.box.centre[1] <= box.bottom
    ]
    return max(inside, key=lambda face: face.box.area, default=None)


LOOKS: dict[str, Any] = {"score": 1.0, "alone": True, "yaw": 0.0, "sharpness": 0.0}  # columns, and what none means


def faces_at(
    candidate: Candidate, faces: FaceBackend, sightings: Sequence[Sighting]
) -> Iterator[tuple[int, Pixels, DetectedFace, list[DetectedFace]]]:
    """(number of the sighting, frame, face, all faces of the frame) for each sighting at whose place `faces` sees a
    face, in pixels of the frame, which is cropped as the candidate says. By rising rank, a frame at a time."""
    for rank, frame in pick(candidate, sorted({s.tick for s in sightings})) if sightings else ():
        seen = faces.detect(frame)
        for number, sighting in enumerate(sightings):
            if sighting.tick != rank:
                continue
            place = clip_box(candidate, box_of(sighting.face))
            wanted = sighting.face._replace(left=place.left, top=place.top)
            face = max(seen, key=lambda face: affinity(wanted, face.box), default=None)
            if face is not None and affinity(wanted, face.box) > 0:
                yield number, frame, face, seen


def sightings_of(subject: CuratedSubject) -> list[Sighting]:
    """Where a subject's face is seen, ticks being ranks; what `FaceTracks` did not write counts as sure, alone,
    frontal."""
    known = subject.meta.get("looks", {})
    size = len(subject.track)
    columns = [known.get(name, [default] * size) for name, default in LOOKS.items()]
    return [
        Sighting(rank, Face(box.left, box.top, box.right - box.left, box.bottom - box.top, score), alone, turn, sharp)
        for (rank, box), score, alone, turn, sharp in zip(subject.track, *columns, strict=True)
    ]


def with_sightings(subject: CuratedSubject, sightings: Sequence[Sighting]) -> CuratedSubject:
    """The subject with this track, and its qualities in the columns of meta["looks"]."""
    looks = {
        **subject.meta.get("looks", {}),
        "score": [round(s.face.score, 4) for s in sightings],
        "alone": [s.alone for s in sightings],
        "yaw": [round(s.yaw, 1) for s in sightings],
        "sharpness": [round(s.sharpness, 6) for s in sightings],
    }
    track = tuple((s.tick, Box(*(round(value, 2) for value in box_of(s.face)))) for s in sightings)
    return replace(subject, track=track, meta={**subject.meta, "looks": looks})


@dataclass
class _Person:
    """One or more tracks of somebody, and the (quality, rank, embedding) of the best looks."""

    tracks: list[Track]
    best: list[tuple[float, int, Embedding]]

    @property
    def embedding(self) -> Embedding:
        return _median(self.best)

    def meets(self, other: _Person) -> bool:
        """Whether both are seen at one time, so that they are two."""
        return any(
            a.sightings[0].tick <= b.sightings[-1].tick and b.sightings[0].tick <= a.sightings[-1].tick
            for a in self.tracks
            for b in other.tracks
        )


class FaceTracks(Step):
    """Finds the people of a shot: a subject of kind "person" for each, with where its face is seen and its embedding.

    OpenS2V-5M's rule is the default: confidence above 0.65, for at least 81 frames on end. The track's boxes are those
    of the face. Scores of the candidate: `people` (how many), `face_height` (pixels), `face_sharpness` (`sharpness`)
    and `face_yaw` (degrees from frontal), each the median along a track, of the person who is seen worst.
    """

    heavy = True

    def __init__(
        self,
        faces: FaceBackend | None = None,
        looks_per_second: float = 5.0,
        least_score: float = 0.65,
        median_score: float = 0.88,
        min_frames: int = 81,
        min_face: float = 0.1,
        rejoin: float | None = None,
        require_faces: bool = False,
    ) -> None:
        """
        Args:
            faces: finds and tells apart faces; the offline YuNet and SFace where None.
            looks_per_second: how often faces are searched.
            least_score: of a face; in (0, 1).
            median_score: of a person's faces along a track. Cartoon animals have about 0.8 under YuNet; other
                detectors' confidences are on other scales.
            min_frames: of the source, for which a face is seen on end at least once.
            min_face: least height of a face as a share of the picture's; smaller ones are passers-by.
            rejoin: cosine from which a track goes on with another that was interrupted; the backend's threshold and
                0.2 where None, 1 never.
            require_faces: drop shots in which nobody is seen.

        Raises:
            UserError: for a number out of its range.
        """
        if looks_per_second <= 0:
            raise UserError(f"looks_per_second={looks_per_second}: must be above 0")
        for name, value in (("least_score", least_score), ("median_score", median_score)):
            if not 0 < value < 1:
                raise UserError(f"{name}={value}: must lie between 0 and 1")
        if min_frames < 0:
            raise UserError(f"min_frames={min_frames}: must be 0 or more")
        if not 0 <= min_face < 1:
            raise UserError(f"min_face={min_face}: a share of the picture's height, 0 or more and below 1")
        if rejoin is not None and not 0 < rejoin <= 1:
            raise UserError(f"rejoin={rejoin}: a cosine above 0 and at most 1")
        self.faces = YuNetSFace(min_confidence=least_score) if faces is None else faces
        self.looks_per_second, self.least_score, self.median_score = looks_per_second, least_score, median_score
        self.min_frames, self.min_face, self.require_faces = min_frames, min_face, require_faces
        self.rejoin = min(1.0, self.faces.threshold + REJOIN_MARGIN) if rejoin is None else rejoin

    @property
    def models(self) -> tuple[str, ...]:
        return self.faces.models

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.faces,)

    def apply(self, candidate: Candidate) -> Outcome:
        every = looks_every(candidate, self.looks_per_second)
        people = [p for p in self._join(self._follow(candidate, every)) if self._long_enough(p, candidate, every)]
        if not people and self.require_faces:
            return candidate.dropped(self.name, "nobody in it", f"no face is seen for {self.min_frames} frames on end")
        names = free_names([f"person {number}" for number in range(1, len(people) + 1)], candidate.subjects)
        subjects = [self._subject(candidate, name, p, every) for name, p in zip(names, people, strict=True)]
        found = candidate.changed(subjects=(*candidate.subjects, *subjects))
        return found.scored(**face_scores(subjects))

    def _follow(self, candidate: Candidate, every: int) -> list[_Person]:
        """The tracks of the candidate's span, each with its best looks, in pixels of the cropped picture."""
        tracker: Tracker | None = None
        best: dict[int, list[tuple[float, int, Embedding]]] = {}
        before: Pixels | None = None
        changed = -1  # the last rank by which the picture has changed much: a cut that went unnoticed, or only light
        enough = 1 if inspect(candidate).is_image else MIN_SIGHTINGS
        for rank, frame in stream(candidate, every):
            tracker = tracker or Tracker(2 * every, (frame.shape[0], frame.shape[1]), self.median_score, enough)
            if before is not None and is_cut(before, frame):
                changed = rank
            before = frame
            tall = self.min_face * frame.shape[0]
            detected = [f for f in self.faces.detect(frame) if f.score > self.least_score and f.box.height >= tall]
            qualities = [(yaw(face.landmarks), sharpness(frame, face)) for face in detected]
            tracks = tracker.look(rank, [face.box for face in detected], qualities)
            for face, track in zip(detected, tracks, strict=True):
                vector: Embedding | None = None
                if len(track.sightings) > 1 and track.sightings[-2].tick < changed:
                    vector = self.faces.embed(frame, face)
                    if vector @ _median(best[id(track)]) < self.faces.threshold:
                        track = tracker.split(track)
                quality = frontal_and_sharp(track.sightings[-1])
                looks = best.setdefault(id(track), [])  # the tracker holds all its tracks, so that none shares an id
                if len(looks) < BEST_LOOKS or quality > looks[0][0]:
                    vector = self.faces.embed(frame, face) if vector is None else vector
                    heapq.heappush(looks, (quality, rank, vector))
                    if len(looks) > BEST_LOOKS:
                        heapq.heappop(looks)
        return [_Person([track], best[id(track)]) for track in (tracker.finish() if tracker else ())]

    def _join(self, people: list[_Person]) -> list[_Person]:
        """Tracks of one person joined, the most alike first."""
        alike = [
            (float(a.embedding @ b.embedding), i, j)
            for (i, a), (j, b) in combinations(enumerate(people), 2)
            if not a.meets(b)
        ]
        owner = list(range(len(people)))
        for cosine, i, j in sorted(alike, key=lambda pair: -pair[0]):
            one, other = people[owner[i]], people[owner[j]]
            if cosine >= self.rejoin and one is not other and not one.meets(other):
                one.tracks += other.tracks
                one.best = heapq.nlargest(BEST_LOOKS, one.best + other.best, key=lambda look: look[:2])
                owner = [owner[i] if number == owner[j] else number for number in owner]
        return [people[number] for number in sorted(set(owner))]

    def _long_enough(self, person: _Person, candidate: Candidate, every: int) -> bool:
        if inspect(candidate).is_image:
            return True
        # Who was seen at a look is taken to be there until the next one.
        runs = (track.sightings[-1].tick + every - track.sightings[0].tick for track in person.tracks)
        return max(runs) >= self.min_frames

    def _subject(self, candidate: Candidate, name: str, person: _Person, every: int) -> CuratedSubject:
        sightings = sorted((s for track in person.tracks for s in track.sightings), key=lambda s: s.tick)
        moved = [s._replace(face=in_source(candidate, s.face)) for s in sightings]
        score = round(float(np.median([s.face.score for s in sightings])), 4)
        subject = CuratedSubject(
            name,
            "person",
            score=score,
            embedding=person.embedding,
            embedder=embedder_name(self.faces),
            meta={"looks": {"every": every}},
        )
        return with_sightings(subject, moved)


def _median(looks: Sequence[tuple[float, int, Embedding]]) -> Embedding:
    return median_embedding([vector for _, _, vector in looks])


class PeopleInWindow(Step):
    """Keeps of the people of a shot those who are seen in the window, and names them from left to right: "person", or
    "person on the left" and "person on the right", or "person 1 from the left" and so on.

    Behind `Windows` and before `Cut`: `box` is then the face in the cropped source's frame, as of every step there,
    and `frame` the clip's frame nearest to the best look at it. Subjects that nobody followed stay as they are.
    """

    def __init__(
        self,
        max_people: int = 4,
        keep_without_people: bool = False,
        min_presence: float = 0.0,
        reach: float = 60.0,
    ) -> None:
        """
        Args:
            max_people: a window with more of them is dropped.
            keep_without_people: keep windows in which no followed person is seen.
            min_presence: share of the looks into the window at which somebody must be seen to belong to it; below it,
                but above 0, he is a passer-by whom no subject names. 0: once is enough.
            reach: seconds before and behind the window up to which a track is kept; references come from there.

        Raises:
            UserError: for a number out of its range.
        """
        if max_people < 0:
            raise UserError(f"max_people={max_people}: must be 0 or more")
        if not 0 <= min_presence <= 1:
            raise UserError(f"min_presence={min_presence}: a share, from 0 to 1")
        if reach < 0:
            raise UserError(f"reach={reach}: seconds, 0 or more")
        self.max_people, self.keep_without_people = max_people, keep_without_people
        self.min_presence, self.reach = min_presence, reach

    def apply(self, candidate: Candidate) -> Outcome:
        first, last = window_of(candidate)
        followed = [s for s in candidate.subjects if s.track and s.kind in PEOPLE]
        others = tuple(s for s in candidate.subjects if not (s.track and s.kind in PEOPLE))
        seen: list[tuple[float, CuratedSubject]] = []
        for subject in followed:
            inside = [s for s in sightings_of(subject) if first <= s.tick <= last]
            looks = (last - first) // max(1, subject.meta.get("looks", {}).get("every", 1)) + 1
            if inside and len(inside) >= self.min_presence * looks:
                seen.append((float(np.mean([s.face.centre[0] for s in inside])), self._placed(candidate, subject)))
        if not seen and not self.keep_without_people:
            return candidate.dropped(self.name, "nobody in it")
        if len(seen) > self.max_people:
            return candidate.dropped(self.name, "too many people", f"{len(seen)}, at most {self.max_people}")
        people = [subject for _, subject in sorted(seen, key=lambda item: item[0])]
        names = free_names(subject_names(len(people)), others)
        named = [replace(subject, name=name) for subject, name in zip(people, names, strict=True)]
        kept = candidate.changed(subjects=(*named, *others))
        return kept.scored(**face_scores(named, first, last))

    def _placed(self, candidate: Candidate, subject: CuratedSubject) -> CuratedSubject:
        """The subject with its box on one frame of the clip, and its track no longer than `reach` allows."""
        first, last = window_of(candidate)
        times = frame_times(inspect(candidate).video)
        since, until = times[first] - self.reach, times[last] + self.reach
        near = [s for s in sightings_of(subject) if since <= times[s.tick] <= until]
        best = max((s for s in near if first <= s.tick <= last), key=frontal_and_sharp)
        ranks = candidate.ranks or range(first, last + 1)
        frame = min(range(len(ranks)), key=lambda number: abs(ranks[number] - best.tick))
        return with_sightings(replace(subject, box=clip_box(candidate, box_of(best.face)), frame=frame), near)


def window_of(candidate: Candidate) -> tuple[int, int]:
    """First and last rank of the source that the clip shows; of the span before a window is chosen."""
    if candidate.ranks:
        return candidate.ranks[0], candidate.ranks[-1]
    first, end = span_of(candidate)
    return first, end - 1


def in_source(candidate: Candidate, face: Face) -> Face:
    """`source_corners` of a face."""
    corners = source_corners(candidate, box_of(face))
    return face._replace(left=corners.left, top=corners.top)


def free_names(wanted: Sequence[str], others: Iterable[CuratedSubject]) -> list[str]:
    """Names of a candidate's subjects are unique: those that others have are told apart by "again"."""
    taken, names = {subject.name for subject in others}, []
    for name in wanted:
        while name in taken:
            name += " again"
        taken.add(name)
        names.append(name)
    return names


def looks_every(candidate: Candidate, per_second: float) -> int:
    """Every how many source frames to look for so many looks a second, by the source's mean rate; at least 1."""
    return max(1, round((inspect(candidate).video.fps or per_second) / per_second))


def face_scores(subjects: Sequence[CuratedSubject], first: int = 0, last: float = math.inf) -> dict[str, float]:
    """`people`, and of the one seen worst `face_height`, `face_sharpness` and `face_yaw` (see `FaceTracks`), over the
    looks at ranks `first` to `last`."""
    scores = {"people": float(len(subjects))}
    rows = [[s for s in sightings_of(subject) if first <= s.tick <= last] for subject in subjects]
    if all(rows) and rows:
        scores["face_height"] = round(min(float(np.median([s.face.height for s in row])) for row in rows), 2)
        scores["face_sharpness"] = min(float(np.median([s.sharpness for s in row])) for row in rows)
        scores["face_yaw"] = max(float(np.median([abs(s.yaw) for s in row])) for row in rows)
    return scores

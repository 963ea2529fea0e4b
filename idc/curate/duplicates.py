"""Clips that are there twice: a shot in two uploads, encoded anew, or the same span of a video in two sources."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Candidate, CuratedSubject, Dropped, Outcome, Pixels, Reference, Step
from idc.curate.collection import CollectionStep, Survivors
from idc.curate.fingerprints import distance, from_text, mirrored, near_pairs, perceptual_hash, to_text
from idc.curate.reading import clip_frames
from idc.data.video import decode_frames
from idc.errors import UserError, nearest
from idc.metrics.base import sample_frames

FINGERPRINT = "fingerprint"  # key in the `meta` of candidates (a list of hashes) and of references (one)
NEAR, OVERLAP = "near duplicate", "same span in two sources"
AT_ONCE = 512  # rows of which all are compared with all
Rows = NDArray[np.int64]


class Fingerprint(Step):
    """Hashes a few frames of the clip and every reference, for `Duplicates` and `Exclude` (`idc.curate.fingerprints`).

    A clip whose frames are mostly flat (a black screen, a title card) gets an empty list: nothing is known of it.

    Args:
        frames: of the clip, chosen as the metrics choose theirs.
    """

    def __init__(self, frames: int = 4) -> None:
        if frames < 1:
            raise UserError(f"frames={frames}: must be 1 or more; 4 is usual")
        self.frames = frames

    def apply(self, candidate: Candidate) -> Outcome:
        hashes = [perceptual_hash(picture) for picture in self._pictures(candidate)]
        flat = sum(hash is None for hash in hashes)
        texts = [] if 2 * flat > len(hashes) else [to_text(hash or 0) for hash in hashes]
        subjects = tuple(_with_fingerprints(subject) for subject in candidate.subjects)
        return candidate.changed(meta={FINGERPRINT: texts}, subjects=subjects)

    def _pictures(self, candidate: Candidate) -> Pixels:
        if candidate.clip is None and candidate.encoded is not None:
            return decode_frames(candidate.encoded.mp4, sample_frames(candidate.encoded.frames, self.frames).tolist())
        return clip_frames(candidate, self.frames)[1]


def _with_fingerprints(subject: CuratedSubject) -> CuratedSubject:
    def hashed(reference: Reference) -> Reference:
        hash = perceptual_hash(reference.pixels())
        return replace(reference, meta={**reference.meta, FINGERPRINT: None if hash is None else to_text(hash)})

    return replace(subject, references=tuple(hashed(reference) for reference in subject.references))


class Duplicates(CollectionStep):
    """Drops of clips that are nearly the same all but one: that with the highest score `prefer`, else the first.

    Windows of one video are never duplicates of each other: a calm shot goes on. Of one video that two sources have
    under the same id, spans that overlap are.

    Args:
        bits: clips are the same if their hashes differ in at most this many bits in all (of 64 a frame). On real clips
            with 4 frames: re-encoded and scaled copies 0 to 10, other clips above 90; a border of 3% cut off 13 to 36.
        mirrored: clips turned left for right are the same, too.
        overlap: spans of one video are the same from this share of the shorter one on, in (0, 1].
        prefer: name of a score; candidates without it come last. "" prefers those that come first.

    Raises:
        UserError: for a number out of its range; from `decide` for a score that no candidate has.
    """

    def __init__(self, bits: int = 15, mirrored: bool = True, overlap: float = 0.5, prefer: str = "") -> None:
        if bits < 0:
            raise UserError(f"bits={bits}: must be 0 or more; 15 is usual")
        if not 0 < overlap <= 1:
            raise UserError(f"overlap={overlap}: a share above 0 and at most 1; 0.5 is usual")
        self.bits, self.mirrored, self.overlap, self.prefer = bits, mirrored, overlap, prefer

    def decide(self, survivors: Survivors) -> Iterable[Dropped]:
        table = _Table(survivors, self.prefer)
        found = table.overlapping(self.overlap)
        hashed = np.array([row for row in table.order if table.place[row] >= 0 and row not in found], np.int64)
        near = self._near(table, hashed)
        for row, candidate in enumerate(survivors):
            if row in found:
                yield candidate.dropped(self.name, OVERLAP, f"of {table.keys[found[row]]}")
            elif row in near:
                yield candidate.dropped(self.name, NEAR, f"of {table.keys[near[row]]}")

    def _near(self, table: _Table, rows: Rows) -> dict[int, int]:
        """Dropped row -> the best of the kept rows that it is near to. `rows` are in the order of preference.

        The first half is settled by itself; what of the second is near to one that is kept goes; the rest is settled by
        itself. So no more than the near neighbours of rows that stay are ever held, however often a clip is there.
        """
        if len(rows) <= AT_ONCE:
            return self._settle(table, rows)
        half = len(rows) // 2
        gone = self._near(table, rows[:half])
        kept = _without(rows[:half], gone)
        place = {row: number for number, row in enumerate(kept.tolist())}
        for worse, better in self._pairs(table, rows[half:], kept):
            for row, other in zip(worse.tolist(), better.tolist(), strict=True):
                if row not in gone or place[other] < place[gone[row]]:
                    gone[row] = other
        return gone | self._near(table, _without(rows[half:], gone))

    def _settle(self, table: _Table, rows: Rows) -> dict[int, int]:
        """As `_near`, by comparing all with all."""
        near = table.films[rows][:, None] != table.films[rows]
        own = table.hashes[table.place[rows]]
        least = distance(own[:, None], own)
        if self.mirrored:
            least = np.minimum(least, distance(own[:, None], mirrored(own)))
        near &= least <= self.bits
        kept = np.zeros(len(rows), bool)
        gone: dict[int, int] = {}
        for number, row in enumerate(rows.tolist()):
            first = int(np.argmax(near[number] & kept))  # 0 where there is none, too
            if near[number, first] and kept[first]:
                gone[row] = int(rows[first])
            else:
                kept[number] = True
        return gone

    def _pairs(self, table: _Table, rows: Rows, others: Rows) -> Iterator[tuple[Rows, Rows]]:
        """Near ones of different videos, in blocks."""
        own, other = table.hashes[table.place[rows]], table.hashes[table.place[others]]
        for turned in (other, mirrored(other)) if self.mirrored else (other,):
            for left, right in near_pairs(own, turned, self.bits):
                apart = table.films[rows[left]] != table.films[others[right]]
                yield rows[left][apart], others[right][apart]


def _without(rows: Rows, gone: Mapping[int, int]) -> Rows:
    return np.array([row for row in rows.tolist() if row not in gone], np.int64)


class _Table:
    """What is compared, a row a survivor: a few numbers each, besides its key.

    Attributes:
        keys: of the candidates. films: number of (source, video), int64 `[N]`.
        place: row of `hashes`, or -1 for a candidate without a fingerprint. hashes: uint64 `[M, F]`.
        order: rows, the preferred first.
    """

    def __init__(self, survivors: Survivors, prefer: str) -> None:
        self.keys: list[str] = []
        numbers: dict[tuple[str, str], int] = {}
        films, place, hashes, scores = array("q"), array("q"), array("Q"), array("d")
        spans: dict[str, list[tuple[int, str, tuple[int, int] | None]]] = defaultdict(list)
        frames = 0
        named: set[str] = set()
        for row, candidate in enumerate(survivors):
            named.update(candidate.scores)
            self.keys.append(candidate.key)
            films.append(numbers.setdefault((candidate.source, candidate.video), len(numbers)))
            scores.append(-candidate.scores.get(prefer, -np.inf) if prefer else 0.0)
            spans[candidate.video].append((row, candidate.source, candidate.span))
            texts = candidate.meta.get(FINGERPRINT) or []
            if texts and len(texts) != (frames := frames or len(texts)):
                raise UserError(
                    f"{candidate.key}: a fingerprint of {len(texts)} frames among others of {frames}; remove the work "
                    "folder, and all are made alike"
                )
            place.append(len(hashes) // frames if texts else -1)
            hashes.extend(from_text(texts).tolist())
        if prefer and self.keys and prefer not in named:
            raise UserError(f"prefer={prefer!r}: no candidate has that score{nearest(prefer, named)}")
        self.films, self.place = np.array(films, np.int64), np.array(place, np.int64)
        self.hashes = np.array(hashes, np.uint64).reshape(-1, max(frames, 1))
        self.order: list[int] = np.argsort(np.array(scores), kind="stable").tolist()
        self._spans = {video: some for video, some in spans.items() if len({source for _, source, _ in some}) > 1}

    def overlapping(self, share: float) -> dict[int, int]:
        """Dropped row -> kept row, of videos that several sources have."""
        rank = {row: number for number, row in enumerate(self.order)} if self._spans else {}
        gone: dict[int, int] = {}
        for some in self._spans.values():
            kept: list[tuple[int, str, tuple[int, int] | None]] = []
            for row, source, span in sorted(some, key=lambda item: rank[item[0]]):
                same = (other for other, from_, its in kept if from_ != source and _overlap(span, its) >= share)
                if (first := next(same, None)) is not None:
                    gone[row] = first
                else:
                    kept.append((row, source, span))
        return gone


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> float:
    """Share of the shorter span that the other has, too; a span that is not told is the whole video."""
    if a is None or b is None:
        return 1.0
    shorter = min(a[1] - a[0], b[1] - b[0])
    return max(0, min(a[1], b[1]) - max(a[0], b[0])) / shorter if shorter > 0 else 0.0

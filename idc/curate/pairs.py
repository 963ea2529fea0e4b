"""The same subject in videos of different shoots: its picture there is the reference here.

A reference from the clip itself teaches to copy it. One of the same person or thing on another day, in other light and
another pose, does not (OpenS2V-Nexus' cross-video pairs; facts on them: text cosine 0.6, image cosine 0.6, and
near-duplicates up to 0.998, which teach to copy all the same and are left out here).
"""

from __future__ import annotations

import inspect
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Candidate, CuratedSubject, check_kinds
from idc.curate.collection import Adopt, CollectionStep, Survivors
from idc.curate.given_pairs import given_pairs, picture_of
from idc.curate.names import NameVectors
from idc.curate.split import HELD_OUT, SPLIT
from idc.errors import UserError
from idc.models.embedders import ImageTextEmbedder

Rows = NDArray[np.int64]
SLACK = 1e-4  # by which a product of float32 may be off


@cache
def face_thresholds() -> Mapping[str, float]:
    """Cosine from which two faces are one person, by name of the face backend: each backend's own default."""
    from idc.models.face_packs import CurricularFace, InsightFacePack
    from idc.models.faces import YuNetSFace

    kinds = (YuNetSFace, InsightFacePack, CurricularFace)
    return {kind.name: float(inspect.signature(kind).parameters["threshold"].default) for kind in kinds}


class CrossVideoPairs(CollectionStep):
    """Lets subjects take over references of the same subject in another source video.

    Two subjects are one if the same network embedded them, they are of one kind, their names are alike and their cosine
    lies within bounds. Both are on the same side of the split. Of several partners the most similar one gives its
    picture, and of one clip's subjects only one takes a partner's, since two people are not the same third.

    Args:
        low: least cosine.
        thresholds: least cosine by the first word of `CuratedSubject.embedder`, in the place of `low`; for face
            backends (sface, arc, cur) their own thresholds, unless given here.
        near_duplicate: largest cosine: above, they are nearly the same picture.
        text_similarity: least likeness of the names, in [0, 1]: of their words, or by `text`.
        text: embeds the names; None compares their words.
        named: kinds whose names must be alike. Faces are told apart better by what they look like.
        mutual: only pairs of which each is the other's most similar one.
        first: the reference comes before the subject's own ones.
        given: take the pairs that a source knows of its candidates (OpenS2V-5M's), too; they come before those found
            here, and `low` and `text_similarity` do not hold for them.
        block: subjects compared with as many others at a time; memory is its square times 16 bytes. What is decided
            does not depend on it.
        device: where products are computed. What is decided does not depend on it: what is near is computed once more.
    """

    after_split: ClassVar[bool] = True

    def __init__(
        self,
        low: float = 0.6,
        thresholds: Mapping[str, float] | None = None,
        near_duplicate: float = 0.98,
        text_similarity: float = 0.6,
        text: ImageTextEmbedder | None = None,
        named: Sequence[str] = ("object", "clothing", "place"),
        mutual: bool = False,
        first: bool = True,
        given: bool = True,
        block: int = 4096,
        device: str = "cpu",
    ) -> None:
        for name, value in (("low", low), ("near_duplicate", near_duplicate), *(thresholds or {}).items()):
            if not -1 <= value <= 1:
                raise UserError(f"{name}={value}: a cosine, in [-1, 1]")
        if low >= near_duplicate:
            raise UserError(f"low={low}: must be below near_duplicate={near_duplicate}, or nothing lies between them")
        if not 0 <= text_similarity <= 1:
            raise UserError(f"text_similarity={text_similarity}: how alike names are, in [0, 1]; 0.6 is usual")
        check_kinds("named", named)
        if block < 1:
            raise UserError(f"block={block}: must be 1 or more; 4096 is usual")
        self.low, self.near_duplicate, self.text_similarity = low, near_duplicate, text_similarity
        self.thresholds = {**face_thresholds(), **(thresholds or {})}
        self.text, self.named, self.mutual, self.first, self.given = text, tuple(named), mutual, first, given
        self._block, self._device = block, device

    def decide(self, survivors: Survivors) -> Iterable[Adopt]:
        groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
        videos: dict[str, int] = {}
        for candidate in survivors:
            for number, subject in enumerate(candidate.subjects):
                if subject.embedding is not None and subject.embedder:
                    video = videos.setdefault(candidate.video, len(videos))
                    groups[subject.embedder, subject.kind].add(candidate, number, subject, video)
        known = given_pairs(survivors, self.near_duplicate, self.first) if self.given else {}
        found: dict[str, list[Adopt]] = defaultdict(list)
        if self.text is not None:
            self.text.load(self._device)
        for (embedder, kind), group in groups.items():
            with group:
                for adopt in self._within(group, embedder, kind):
                    found[adopt.key].append(adopt)
        if self.text is not None:
            self.text.unload()
        for candidate in survivors:
            offers = sorted(found.get(candidate.key, ()), key=lambda adopt: (-adopt.similarity, adopt.subject))
            yield from _one_each([*known.get(candidate.key, ()), *offers])

    def _within(self, group: _Group, embedder: str, kind: str) -> Iterator[Adopt]:
        """The best partner of each subject of a group that has one."""
        low = self.thresholds.get(embedder.split(" ")[0], self.low)
        rows, others, cosines = self._closest(group, kind, low)
        partner = dict(zip(rows.tolist(), others.tolist(), strict=True))
        for row, other, cosine in zip(rows.tolist(), others.tolist(), cosines.tolist(), strict=True):
            if group.pictures[other] < 0 or (self.mutual and partner.get(other) != row):
                continue
            own, theirs = (group.keys[row], group.numbers[row]), (group.keys[other], group.numbers[other])
            yield Adopt(*own, *theirs, group.pictures[other], round(cosine, 6), self.first, embedder)

    def _closest(self, group: _Group, kind: str, low: float) -> tuple[Rows, Rows, NDArray[np.float64]]:
        """(row, its most similar row within bounds, their cosine) of all that have one, rows rising; of several that
        are equally similar, the first. In blocks of products, of which those that may be the best are computed once
        more, exactly and one by one: what is found depends neither on the blocks nor on where they were computed."""
        vectors = group.vectors()
        names = NameVectors(*group.unique_names(), self.text) if kind in self.named else None
        givers = np.arange(len(group)) if self.mutual else np.flatnonzero(np.array(group.pictures) >= 0)
        videos, splits = np.array(group.videos), np.array(group.splits)
        best, cosines = np.full(len(group), -1), np.full(len(group), -np.inf)
        for start in range(0, len(group), self._block):
            rows = np.arange(start, min(start + self._block, len(group)))
            for begin in range(0, len(givers), self._block):
                others = givers[begin : begin + self._block]
                products = self._products(vectors, rows, others)
                allowed = (videos[rows][:, None] != videos[others]) & (splits[rows][:, None] == splits[others])
                if names is not None:
                    allowed &= names.between(rows, others) >= self.text_similarity - SLACK
                allowed &= (products >= low - SLACK) & (products <= self.near_duplicate + SLACK)
                # What surely lies within bounds rules out what is surely less similar.
                sure = allowed & (products >= low + SLACK) & (products <= self.near_duplicate - SLACK)
                reached = np.maximum(np.where(sure, products, -np.inf).max(1, initial=-np.inf) - SLACK, cosines[rows])
                allowed &= products >= reached[:, None] - SLACK
                self._settle(vectors, rows, others, allowed, low, best, cosines)
        rows = np.flatnonzero(best >= 0)
        return rows, best[rows], cosines[rows]

    def _products(self, vectors: NDArray[np.float32], rows: Rows, others: Rows) -> NDArray[np.float32]:
        """Cosines of some rows to others, `[len(rows), len(others)]`, to `SLACK`."""
        import torch

        own, other = (torch.from_numpy(vectors[some]).to(self._device) for some in (rows, others))
        return (own @ other.T).cpu().numpy()

    def _settle(
        self,
        vectors: NDArray[np.float32],
        rows: Rows,
        others: Rows,
        allowed: NDArray[np.bool_],
        low: float,
        best: Rows,
        cosines: NDArray[np.float64],
    ) -> None:
        """Put into `best` and `cosines` what is better among the allowed pairs of `rows` and `others`."""
        places = np.nonzero(allowed)
        for start in range(0, len(places[0]), self._block):
            row, other = (
                some[place[start : start + self._block]] for some, place in zip((rows, others), places, strict=True)
            )
            exact = np.einsum("nd,nd->n", vectors[row].astype(np.float64), vectors[other].astype(np.float64))
            within = (exact >= low) & (exact <= self.near_duplicate)
            row, other, exact = row[within], other[within], exact[within]
            order = np.lexsort((other, -exact, row))
            firsts = order[np.unique(row[order], return_index=True)[1]]  # of each row its most similar one
            row, other, exact = row[firsts], other[firsts], exact[firsts]
            better = (exact > cosines[row]) | ((exact == cosines[row]) & (other < best[row]))
            best[row[better]], cosines[row[better]] = other[better], exact[better]


def _one_each(offers: Iterable[Adopt]) -> Iterator[Adopt]:
    """Of one candidate's offers, best first, one a subject and one from each subject elsewhere."""
    takers: set[int] = set()
    givers: set[tuple[str, int]] = set()
    for adopt in offers:
        giver = adopt.other, adopt.other_subject
        if adopt.subject not in takers and giver not in givers:
            takers.add(adopt.subject)
            givers.add(giver)
            yield adopt


class _Group:
    """Subjects of one kind, embedded by one network: a few numbers each in memory, their vectors in a file."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.numbers, self.videos, self.splits = array("q"), array("q"), array("b")
        self.pictures = array("q")
        self._names: dict[str, int] = {}
        self._name_of = array("q")
        self._dim = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    def __len__(self) -> int:
        return len(self.keys)

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, candidate: Candidate, number: int, subject: CuratedSubject, video: int) -> None:
        """Add a subject; `video` is the number of its candidate's video."""
        assert subject.embedding is not None
        self._dim = self._dim or len(subject.embedding)
        if len(subject.embedding) != self._dim:
            raise UserError(
                f"{candidate.key}: an embedding of {len(subject.embedding)} numbers by {subject.embedder!r}, which "
                f"gave {self._dim} before; two networks have one name"
            )
        self._file.write(np.asarray(subject.embedding, "<f4").tobytes())
        self.keys.append(candidate.key)
        self.numbers.append(number)
        self.videos.append(video)
        self.splits.append(candidate.meta.get(SPLIT) == HELD_OUT)
        self.pictures.append(picture_of(subject))
        self._name_of.append(self._names.setdefault(subject.name, len(self._names)))

    def vectors(self) -> NDArray[np.float32]:
        """float32 `[N, D]`, mapped from the file."""
        self._file.flush()
        return np.memmap(self._file, "<f4", "r", shape=(len(self), self._dim))

    def unique_names(self) -> tuple[list[str], Rows]:
        """All names once, and the number of each row's."""
        return list(self._names), np.array(self._name_of, np.int64)

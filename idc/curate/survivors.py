"""The survivors of the steps over all parts, streamed: known facts in one pass, clips and pictures by number."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from idc.curate.candidate import Candidate, Dropped
from idc.curate.chunks import ENCODE, OPEN
from idc.curate.parts import Count, Part, add_counts
from idc.data import storage

TWICE = "key comes twice"


class Parts:
    """Everything that the steps came to, in the order of the units (`collection.Collected`).

    Of candidates with one key the first is a survivor, the others are drops. Holds paths and a few numbers a part, no
    open files.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self.counts: list[Count] = []
        self._twice: set[int] = set()  # numbers among all candidates
        self._open: Part | None = None
        hashes, lengths = [], []
        for name in self.names:
            part = self._part(name)
            lengths.append(len(part))
            add_counts(self.counts, part.counts)
            hashes.append(np.fromiter((_hash(key) for key in part.keys), np.uint64))
        self._ends = list(accumulate(lengths))
        self._find_twice(np.concatenate(hashes) if hashes else np.zeros(0, np.uint64))
        self._hidden = sorted(self._twice)

    def _find_twice(self, hashes: np.ndarray) -> None:
        """Eight bytes a key tell which may come twice; only these are compared by themselves."""
        values, times = np.unique(hashes, return_counts=True)
        again = values[times > 1]
        if not len(again):
            return
        suspects = set(np.flatnonzero(np.isin(hashes, again)).tolist())
        seen: set[str] = set()
        number = 0
        for name in self.names:
            for key in self._part(name).keys:
                if number in suspects:
                    if key in seen:
                        self._twice.add(number)
                    seen.add(key)
                number += 1
        count = next(count for count in reversed(self.counts) if count.step == ENCODE)
        count.kept -= len(self._twice)
        count.dropped += len(self._twice)

    def __len__(self) -> int:
        return (self._ends[-1] if self._ends else 0) - len(self._twice)

    def __iter__(self) -> Iterator[Candidate]:
        number = 0
        for name in self.names:
            for candidate in self._part(name):
                if number not in self._twice:
                    yield candidate
                number += 1

    def drops(self) -> Iterator[Dropped]:
        """What the steps dropped, in the order of the units."""
        number = 0
        for name in self.names:
            part = self._part(name)
            yield from part.drops()
            for candidate in part if self._twice else ():
                if number in self._twice:
                    yield candidate.dropped(ENCODE, TWICE, "in the collection")
                number += 1

    def load(self, number: int, clip: bool = True) -> Candidate:
        """Survivor `number` of the order, from 0, with its references' images, and with `clip` its clip and masks."""
        place = self._place(number)
        index = bisect_right(self._ends, place)
        within = place - (self._ends[index - 1] if index else 0)
        return self._part(self.names[index]).load(within, clip)

    def _place(self, number: int) -> int:
        """A survivor's number among all candidates of the parts."""
        if not 0 <= number < len(self):
            raise IndexError(f"survivor {number} of {len(self)}")
        for hidden in self._hidden:
            number += hidden <= number
        return number

    @property
    def units(self) -> int:
        """How many units were opened."""
        return sum(count.came for count in self.counts if count.step == OPEN)

    def _part(self, name: str) -> Part:
        """The last one is kept: candidates are mostly asked for in order."""
        if self._open is None or self._open.name != name:
            self._open = Part(storage.join(self.folder, name))
        return self._open


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")

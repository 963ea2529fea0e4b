"""Counting a stream of any length in bounded memory: words and names, and how numbers are spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MOST_KEYS = 200_000  # distinct names that are counted exactly
DIGITS = 4  # significant ones of a number whose quantiles are asked for
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class Tally:
    """How often each name comes. Beyond `most` different ones the rarest are forgotten, their number is kept.

    A name that makes up more than one in `most / 2` of all is never forgotten, and its count then falls short by no
    more than that share (Manku and Motwani, "Approximate frequency counts over data streams", 2002).
    """

    most: int = MOST_KEYS
    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    forgotten: int = 0

    def add(self, name: str, count: int = 1) -> None:
        """Count a name."""
        self.total += count
        self.counts[name] += count
        if len(self.counts) > self.most:
            self._forget()

    def update(self, names: Iterable[str]) -> None:
        """Count each of some names once."""
        before = self.counts.total()
        self.counts.update(names)
        self.total += self.counts.total() - before
        if len(self.counts) > self.most:
            self._forget()

    def top(self, count: int | None = None) -> list[tuple[str, int]]:
        """The most frequent names; those of equal counts by the alphabet."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:count]

    def _forget(self) -> None:
        """The rarer half goes; ties by the alphabet, so that nothing depends on the order of a hash."""
        kept = dict(self.top(self.most // 2))
        self.forgotten += sum(self.counts.values()) - sum(kept.values())
        self.counts = Counter(kept)


@dataclass
class Spread:
    """Count, mean, extremes and quantiles of finite numbers.

    Numbers are kept to 4 significant digits, at most 9,000 of a decade and sign, so that memory does not grow with
    their number and the order that they come in does not matter: quantiles are right to a relative 0.05%, and exact
    for numbers that need no more digits. Count, mean and extremes are exact.
    """

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    values: Counter[float] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        """Count a number."""
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.values[float(f"{value:.{DIGITS - 1}e}")] += 1

    def quantile(self, share: float) -> float:
        """The smallest of the numbers that `share` of them do not exceed; `share` in (0, 1]."""
        wanted, passed = share * self.count, 0
        for value, count in sorted(self.values.items()):
            passed += count
            if passed >= wanted - 1e-9:
                return value
        return self.most

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; without any number only their count."""
        if not self.count:
            return {"count": 0}
        told = {f"p{round(100 * share)}": self.quantile(share) for share in QUANTILES}
        mean = self.total / self.count
        return {"count": self.count, "mean": mean, "min": self.least, **told, "max": self.most}

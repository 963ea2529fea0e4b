"""Whether raters can be trusted: agreement with each other, with themselves, and with known answers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from idc.study.ranking import percentile_interval, resample
from idc.study.store import Answer

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Share:
    """A share of `count`, with Wilson's interval; `value` is None where there is nothing to count."""

    hits: int
    count: int

    @property
    def value(self) -> float | None:
        return self.hits / self.count if self.count else None

    @property
    def interval(self) -> Interval:
        return wilson(self.hits, self.count)


def wilson(hits: int, count: int, z: float = 1.959964) -> Interval:
    """Wilson's score interval (1927) of a binomial share; None for a count of 0."""
    if not count:
        return None
    share, square = hits / count, z * z
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Agreement:
    """Krippendorff's alpha: 1 is full agreement, 0 what chance gives.

    Attributes:
        alpha: None where no unit has two values, or all values are the same.
        interval: bootstrap over units, 95%.
        units: units with at least two values; values: of those units.
    """

    alpha: float | None
    interval: Interval
    units: int
    values: int


def krippendorff_alpha(units: Iterable[Sequence[Hashable]], draws: int = 1000, seed: int = 0) -> Agreement:
    """Nominal alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: missing data allowed).

    Args:
        units: for each thing that was judged, the values that its raters gave; units with fewer than two are left out.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in pairable for value in unit}, key=str)
    index = {value: n for n, value in enumerate(values)}
    counts = np.zeros((len(pairable), len(values)))
    for row, unit in zip(counts, pairable, strict=True):
        for value in unit:
            row[index[value]] += 1
    raters = counts.sum(1)
    total = int(raters.sum())
    if len(values) < 2:
        return Agreement(None, None, len(pairable), total)
    disagreement = (raters**2 - (counts**2).sum(1)) / (raters - 1)

    def alpha(weights: np.ndarray) -> np.ndarray:
        marginals = weights @ counts
        n = marginals.sum(-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return 1 - (n - 1) * (weights @ disagreement) / (n**2 - (marginals**2).sum(-1))

    interval: Interval = None
    if len(pairable) > 1 and draws:
        drawn = alpha(resample(len(pairable), draws, seed))
        if np.isfinite(drawn).any():
            low, high = percentile_interval(np.where(np.isfinite(drawn), drawn, np.nan))
            interval = float(low), float(high)
    return Agreement(float(alpha(np.ones(len(pairable)))), interval, len(pairable), total)


def preferred(answer: Answer) -> str | None:
    """The system that an answer prefers, None for no difference."""
    return {"left": answer.left, "right": answer.right, "tie": None}[answer.choice]


def rater_agreement(answers: Iterable[Answer], draws: int = 1000, seed: int = 0) -> Agreement:
    """Alpha over units of one item, one pair of systems and one criterion; values are the system preferred or a tie."""
    units: dict[Hashable, list[Hashable]] = defaultdict(list)
    for answer in answers:
        pair = tuple(sorted((answer.left, answer.right)))
        units[answer.item, pair, answer.criterion].append(preferred(answer) or "")
    return krippendorff_alpha(units.values(), draws, seed)


@dataclass(frozen=True)
class Consistency:
    """Repeated questions, their sides swapped: the same answer again, and the opposite one."""

    same: Share
    reversed: Share


def self_consistency(answers: Iterable[Answer]) -> Consistency:
    """Compare each repeat's answer with the one given before; pairs with a skipped answer are left out."""
    first: dict[Hashable, Answer] = {}
    repeats: list[Answer] = []
    for answer in answers:
        if answer.choice == "skip":
            continue
        if answer.kind == "repeat":
            repeats.append(answer)
        else:
            first[answer.rater, answer.position, answer.criterion] = answer
    kinds: Counter[str] = Counter()
    for again in repeats:
        before = first.get((again.rater, again.repeats, again.criterion))
        if before is not None:
            was, is_ = preferred(before), preferred(again)
            kinds["same" if was == is_ else "other" if None in (was, is_) else "reversed"] += 1
    total = sum(kinds.values())
    return Consistency(Share(kinds["same"], total), Share(kinds["reversed"], total))


def left_share(answers: Iterable[Answer]) -> Share:
    """How often the left side was preferred, of the answers that prefer one; 0.5 without a bias."""
    choices = Counter(answer.choice for answer in answers if answer.kind == "compare")
    return Share(choices["left"], choices["left"] + choices["right"])


def caught(answers: Iterable[Answer]) -> Mapping[int, Share]:
    """Per rater how many catch answers are right: the intact video preferred. "No difference" is wrong here."""
    right: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for answer in answers:
        if answer.kind == "catch" and answer.choice != "skip":
            total[answer.rater] += 1
            right[answer.rater] += bool(preferred(answer))
    return {rater: Share(right[rater], count) for rater, count in sorted(total.items())}

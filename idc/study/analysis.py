"""What the answers say: shares of preference, Bradley-Terry strengths with intervals, and how far raters agree.

Intervals are percentiles of a bootstrap over raters, because answers of one rater hang together; with fewer than five
raters over single answers, which is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from idc.errors import UserError
from idc.study.agreement import (
    Agreement,
    Consistency,
    Interval,
    Share,
    caught,
    left_share,
    preferred,
    rater_agreement,
    self_consistency,
)
from idc.study.questions import CRITERIA, Study
from idc.study.ranking import (
    PRIOR,
    best_shares,
    bradley_terry,
    components,
    has_finite_maximum,
    percentile_interval,
    resample,
)
from idc.study.store import Answer

FEW_RATERS = 5
LEVEL = 0.95


@dataclass(frozen=True)
class AnalysisSettings:
    """How answers are read.

    Attributes:
        catch_pass: raters with a smaller share of right catch answers are left out.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """

    catch_pass: float = 0.75
    draws: int = 2000
    seed: int = 0

    def check(self) -> None:
        """Raise `UserError` naming the value and the rule."""
        if not 0 <= self.catch_pass <= 1:
            raise UserError(f"--catch-pass {self.catch_pass}: is a share, from 0 (keep everybody) to 1")
        if self.draws < 100:
            raise UserError(f"--draws {self.draws}: must be at least 100 for an interval")


@dataclass(frozen=True)
class SystemResult:
    """One system by one criterion.

    Attributes:
        wins, ties, losses: over all its comparisons.
        share: (wins + ties / 2) / comparisons, None without any; 0.5 is even.
        strength: Bradley-Terry log strength, mean 0 over the systems; None where it cannot be had.
        best: share of "best of all" that the strengths imply (`idc.study.ranking.best_shares`).
        *_interval: 95%.
    """

    system: str
    wins: int
    ties: int
    losses: int
    share: float | None
    share_interval: Interval
    strength: float | None
    strength_interval: Interval
    best: float | None
    best_interval: Interval

    @property
    def comparisons(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class PairResult:
    """How often `a` was preferred to `b`, neither, and `b` to `a`."""

    a: str
    b: str
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class CriterionResult:
    """All systems by one criterion. `note` says what was done where strengths have no finite or no common estimate."""

    criterion: str
    title: str
    answers: int
    systems: tuple[SystemResult, ...]
    pairs: tuple[PairResult, ...]
    agreement: Agreement
    note: str = ""


@dataclass(frozen=True)
class RaterCounts:
    """Who took part.

    Attributes:
        joined: opened the questionnaire; answered: gave an answer; finished: answered every question.
        excluded: number of each rater left out, with their share of right catch answers.
        unchecked: kept without an answered catch question.
    """

    joined: int
    answered: int
    finished: int
    excluded: dict[int, Share] = field(default_factory=dict)
    unchecked: int = 0


@dataclass(frozen=True)
class Analysis:
    """What `idc study report` prints. `criteria` is of the kept raters, `everyone` of all."""

    raters: RaterCounts
    criteria: tuple[CriterionResult, ...]
    everyone: tuple[CriterionResult, ...]
    catches: Share
    consistency: Consistency
    left: Share
    agreement: Agreement
    skipped: int
    median_seconds: float | None
    clusters: str
    settings: AnalysisSettings


def analyse(
    study: Study,
    answers: Sequence[Answer],
    joined: int,
    finished: int,
    settings: AnalysisSettings | None = None,
) -> Analysis:
    """Read all answers.

    Args:
        answers: as `Store.answers` gives them.
        joined, finished: numbers of raters.

    Raises:
        UserError: for bad settings.
    """
    settings = settings or AnalysisSettings()
    settings.check()
    checks = caught(answers)
    excluded = {r: share for r, share in checks.items() if (share.value or 0) < settings.catch_pass}
    kept = [answer for answer in answers if answer.rater not in excluded]
    raters = {answer.rater for answer in answers}
    kept_raters = raters - set(excluded)
    counted = _counted(kept)
    return Analysis(
        raters=RaterCounts(joined, len(raters), finished, excluded, len(kept_raters - set(checks))),
        criteria=_by_criterion(study, counted, settings),
        everyone=_by_criterion(study, _counted(answers), settings),
        catches=Share(sum(s.hits for s in checks.values()), sum(s.count for s in checks.values())),
        consistency=self_consistency(kept),
        left=left_share(kept),
        agreement=rater_agreement(counted, settings.draws, settings.seed),
        skipped=len({answer.question for answer in answers if answer.choice == "skip"}),
        median_seconds=_median_seconds(kept),
        clusters="raters" if _by_rater(counted) else "answers",
        settings=settings,
    )


def _counted(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that tell of systems: neither catches nor repeats nor skipped ones."""
    return [answer for answer in answers if answer.kind == "compare" and answer.choice != "skip"]


def _by_rater(counted: Sequence[Answer]) -> bool:
    return len({answer.rater for answer in counted}) >= FEW_RATERS


def _median_seconds(answers: Sequence[Answer]) -> float | None:
    seconds = {answer.question: answer.seconds for answer in answers if answer.choice != "skip"}
    return statistics.median(seconds.values()) if seconds else None


def _by_criterion(study: Study, counted: Sequence[Answer], settings: AnalysisSettings) -> tuple[CriterionResult, ...]:
    by_rater = _by_rater(counted)
    return tuple(
        _criterion(study, key, title, [a for a in counted if a.criterion == key], by_rater, settings)
        for key, title, _ in CRITERIA
    )


def _criterion(
    study: Study, key: str, title: str, answers: Sequence[Answer], by_rater: bool, settings: AnalysisSettings
) -> CriterionResult:
    systems = study.systems
    wins_CSS, ties_CSS = _tables(systems, answers, by_rater)
    wins, ties = wins_CSS.sum(0), ties_CSS.sum(0)
    halves_CSS = wins_CSS + ties_CSS / 2
    weights = resample(len(halves_CSS), settings.draws, settings.seed) if len(halves_CSS) else np.zeros((0, 0))
    drawn_DSS = np.tensordot(weights, halves_CSS, 1)
    shares, share_intervals = _shares(wins + ties / 2, drawn_DSS)
    strengths, best, note = _strengths(systems, wins + ties / 2, drawn_DSS)
    rows = tuple(
        SystemResult(
            system,
            int(wins[n].sum()),
            int(ties[n].sum()),
            int(wins[:, n].sum()),
            shares[n],
            share_intervals[n],
            *(strengths[n] if strengths else (None, None)),
            *(best[n] if best else (None, None)),
        )
        for n, system in enumerate(systems)
    )
    pairs = tuple(
        PairResult(systems[i], systems[j], int(wins[i, j]), int(ties[i, j]), int(wins[j, i]))
        for i, j in combinations(range(len(systems)), 2)
    )
    agreement = rater_agreement(answers, settings.draws, settings.seed)
    return CriterionResult(key, title, len(answers), rows, pairs, agreement, note)


def _tables(systems: Sequence[str], answers: Sequence[Answer], by_rater: bool) -> tuple[np.ndarray, np.ndarray]:
    """Wins and ties `[clusters, S, S]`, row preferred to column; ties stand on both sides of the diagonal."""
    index = {system: n for n, system in enumerate(systems)}
    clusters: dict[object, int] = {}
    for answer in answers:
        clusters.setdefault(answer.rater if by_rater else answer.question, len(clusters))
    wins, ties = np.zeros((2, len(clusters), len(systems), len(systems)))
    for answer in answers:
        cluster = clusters[answer.rater if by_rater else answer.question]
        winner, left, right = preferred(answer), index[answer.left], index[answer.right]
        if winner is None:
            ties[cluster, [left, right], [right, left]] += 1
        else:
            loser = right if winner == answer.left else left
            wins[cluster, index[winner], loser] += 1
    return wins, ties


def _shares(halves: np.ndarray, drawn: np.ndarray) -> tuple[list[float | None], list[Interval]]:
    def share(table: np.ndarray) -> np.ndarray:
        won, lost = table.sum(-1), table.sum(-2)
        with np.errstate(invalid="ignore"):
            return won / (won + lost)

    values = share(halves)
    return [None if np.isnan(v) else float(v) for v in values], _intervals(share(drawn), ~np.isnan(values))


Estimates = list[tuple[float | None, Interval]]


def _strengths(
    systems: Sequence[str], halves: np.ndarray, drawn: np.ndarray
) -> tuple[Estimates | None, Estimates | None, str]:
    compared = (halves + halves.T) > 0
    groups = components(compared)
    if not compared.any():
        return None, None, "no answers"
    if len(groups) > 1:
        names = " | ".join(", ".join(systems[n] for n in group) for group in groups)
        return None, None, f"no common scale: these groups were never compared with each other: {names}"
    prior = PRIOR * compared
    note = ""
    if not has_finite_maximum(halves):
        note = f"some systems were never beaten by the others, so {PRIOR:g} win each way is added to every pair"
    values, draws = bradley_terry(halves, prior), bradley_terry(drawn, prior)
    everyone = np.ones(len(systems), dtype=bool)
    strengths = list(zip(values.tolist(), _intervals(draws, everyone), strict=True))
    best = list(zip(best_shares(values).tolist(), _intervals(best_shares(draws), everyone), strict=True))
    return strengths, best, note


def _intervals(draws: np.ndarray, known: np.ndarray) -> list[Interval]:
    if not len(draws):
        return [None] * len(known)
    intervals: list[Interval] = []
    for column, is_known in zip(draws.T, known, strict=True):
        if is_known and not np.isnan(column).all():
            low, high = percentile_interval(column, LEVEL)
            intervals.append((float(low), float(high)))
        else:
            intervals.append(None)
    return intervals

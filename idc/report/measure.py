"""What a table's cell says of a run: the mean, its interval, how many videos it stands on, or why it is blank."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from idc.errors import UserError, counted, nearest
from idc.metrics.results import Result, Run
from idc.metrics.total import DOMAINS, METRICS, PROTOCOLS, normalise, weights
from idc.report.bootstrap import LEVEL, RESAMPLES, Floats, interval, resampled_means
from idc.report.tracks import METRICS as TRACKERS
from idc.report.tracks import RATES, subject_mean, subject_min, subject_rate

# Which of the benchmark's categories a domain holds; () for all of them.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "open": (),
    "single": ("singlehuman", "singleface", "singleobj"),
    "human": ("singlehuman", "singleface"),
}

# The toy world has scorers of its own, exact ones, and so its tables have a protocol of their own.
TOY = {
    "facesim": "toy_identity",
    "total": "toy",
    "aesthetics": "toy_background",
    "qalign": "toy_motion",
    "naturalscore": "toy_motion",
    "nexusscore": "toy_presence",
}
# Scores in the details of the metric "toy" that columns may read.
TOY_PARTS = ("background", "motion", "presence")


def toy_part(result: Result, part: str) -> float | None:
    """A score in the details of the toy world's exact scorers; None where there is none."""
    value = result.details.get(part)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# Columns that are read from the details of a metric instead of its value.
DERIVED: dict[str, Callable[[Result], float | None]] = {
    "subject_mean": subject_mean,
    "subject_min": subject_min,
    **{f"subject_{rate}": partial(subject_rate, rate=rate) for rate in RATES},
    **{f"toy_{part}": partial(toy_part, part=part) for part in TOY_PARTS},
}
FEWER = "over fewer videos than expected: what has no score, or one that the protocol leaves out, is in no mean"
FEWER_PARTS = "a part of it is a mean over fewer videos than expected"


@dataclass(frozen=True)
class Cell:
    """A mean over videos, or a blank with its reason.

    Attributes:
        value: as a fraction in [0, 1]; raw for a metric without finite bounds; None for a blank.
        low, high: of the bootstrap interval; None with fewer than two scored videos.
        scored, expected: videos with a score, and videos that should have one. For a total: videos that miss no score.
        reason: why the cell is blank.
        shared: networks that judge here and that rewarded the system in training.
        notes: what else a reader must know before comparing it with the cells above and below.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    scored: int = 0
    expected: int = 0
    reason: str = ""
    shared: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Measured:
    """The scores of one run in one domain, and what tables say of them.

    Args:
        run: as `read_run` gives it.
        domain: "open", "single" or "human": which items count (`idc.metrics.total`).
        resamples, seed: of the bootstrap.
        renamed: metric to read in place of a column's key, such as {"video_quality": "qalign_aesthetics"}.

    Raises:
        UserError: if the domain has none of the run's items.
    """

    def __init__(
        self,
        run: Run,
        domain: str = "open",
        resamples: int = RESAMPLES,
        seed: int = 0,
        level: float = LEVEL,
        renamed: dict[str, str] | None = None,
    ) -> None:
        self.run, self.domain = run, domain
        self.resamples, self.seed, self.level = resamples, seed, level
        if domain not in DOMAINS:
            raise UserError(f"--domain {domain}: no such domain{nearest(domain, DOMAINS)}")
        categories = CATEGORIES[domain]
        # Sorted, so that the interval does not depend on the order in which a run lists its items.
        self.ids = sorted(id for id, category in run.info.items.items() if not categories or category in categories)
        if not self.ids:
            names = ", ".join(sorted(set(run.info.items.values()) - {""})) or "none"
            raise UserError(f"{run.path}: no item of the domain {domain!r}; its categories are {names}")
        self.common = False
        self.renamed = (self._toy_columns() if run.info.protocol == "toy" else {}) | (renamed or {})

    def _toy_columns(self) -> dict[str, str]:
        """The toy world's scorers in place of a column's own metric, unless only that one was measured."""
        return {key: toy for key, toy in TOY.items() if self._looked_at(toy) or not self._looked_at(key)}

    @property
    def runs(self) -> tuple[Measured, ...]:
        """The runs that it stands on: itself."""
        return (self,)

    def _looked_at(self, metric: str) -> bool:
        found = (self.run.results.get((id, self.metric(metric))) for id in self.ids)
        return any(result is not None and result.applies for result in found)

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Each counted item with what it asks for, "" where no result says."""
        asked = {id: result.prompt for (id, _), result in self.run.results.items() if result.prompt}
        return {id: asked.get(id, "") for id in self.ids}

    def shared_items(self, other: Measured) -> list[str]:
        """The items that both runs were asked for: equal ids, and no prompts that differ."""
        theirs = other.prompts
        return [
            id for id, prompt in self.prompts.items() if id in theirs and (not prompt or theirs[id] in ("", prompt))
        ]

    def keep(self, ids: Collection[str]) -> None:
        """Count these items only, which all runs of a table share.

        Raises:
            UserError: if none would be left.
        """
        kept = [id for id in self.ids if id in ids]
        if not kept:
            raise UserError(
                f"--common: {self.run.path} shares none of its {counted(len(self.ids), 'item')} with all other runs"
            )
        self.ids, self.common = kept, True
        for name in ("total", "prompts"):
            self.__dict__.pop(name, None)

    def cell(self, column: str) -> Cell:
        """The cell of a table's column: "total" or a metric, or the one that is read in its place (`renamed`)."""
        return self.total if self.renamed.get(column, column) == "total" else self._mean(self._read(column))

    def measure(self, key: str) -> Cell:
        """The cell of a metric under its own name, whatever the tables' columns read."""
        return self._mean(key)

    def _read(self, column: str) -> str:
        return self.renamed.get(column, column)

    @cached_property
    def total(self) -> Cell:
        """The weighted sum of the protocol; blank, with the reason, unless all of its metrics have a mean."""
        try:
            parts = weights(self.run.info.protocol, self.domain)
        except UserError as error:
            return Cell(None, reason=str(error), expected=len(self.ids))
        cells = {key: self._mean(self._read(key)) for key in parts}
        # In brief: the notes of their own cells say what went wrong, at the length that it takes.
        missing = [f"{key} ({cell.reason.partition(': ')[0]})" for key, cell in cells.items() if cell.value is None]
        if missing:
            more = "; their own notes say why" if any(": " in cell.reason for cell in cells.values()) else ""
            reason = f"no total without {', '.join(missing)}{more}"
            return Cell(None, reason=reason, expected=len(self.ids))
        values_VM = np.stack([self._values(self._read(key))[0] for key in parts], axis=1)
        applies_VM = np.stack([self._values(self._read(key))[1] for key in parts], axis=1)
        weight_M = np.array(list(parts.values()))
        value = math.fsum(parts[key] * (cell.value or 0.0) for key, cell in cells.items())
        span = self._interval(resampled_means(values_VM, self.resamples, self.seed) @ weight_M, values_VM)
        scored = int((~np.isnan(values_VM) | ~applies_VM).all(axis=1).sum())
        shared = tuple(dict.fromkeys(model for cell in cells.values() for model in cell.shared))
        notes = (FEWER_PARTS,) if scored < len(self.ids) else ()
        return Cell(value, *span, scored, len(self.ids), shared=shared, notes=notes)

    def shared_models(self, metric: str) -> tuple[str, ...]:
        """Networks of a metric that the system was rewarded by."""
        rewards = set(self.run.info.rewards)
        return tuple(model for model in self.run.info.metrics.get(metric, {}).get("models", ()) if model in rewards)

    def metric(self, key: str) -> str:
        """The metric whose results `key` stands for, which may be derived from its details."""
        if key.removeprefix("toy_") in TOY_PARTS:
            return "toy"
        return (self.tracker or TRACKERS[0]) if key in DERIVED else key

    @property
    def tracker(self) -> str | None:
        """The run's metric that tracks identity."""
        return next((name for name in TRACKERS if name in self.run.info.metrics), None)

    def value(self, result: Result, key: str) -> float | None:
        """What one video adds to a column's mean, as a fraction: the protocol's, else of the metric's bounds.

        `key` may be derived from the metric's details; a failed result adds nothing, and neither does a
        NexusScore of exactly 0 in the benchmark's own protocols, which leave it out of the mean.
        """
        protocol = self.run.info.protocol
        if result.value is None:
            return None
        if key in DERIVED:
            return DERIVED[key](result)
        if key not in METRICS or protocol not in PROTOCOLS:
            return self._within_bounds(key, result.value)
        if key == "nexusscore" and protocol.startswith("opens2v") and result.value == 0:
            return None
        return normalise(key, result.value, protocol)

    def _within_bounds(self, metric: str, raw: float) -> float:
        low, high = self.run.info.metrics[metric].get("bounds", (0.0, 1.0))
        if isinstance(low, str) or isinstance(high, str) or high <= low:  # infinite bounds are words in run.json
            return raw
        return (raw - low) / (high - low)

    def _mean(self, key: str) -> Cell:
        metric = self.metric(key)
        values, applies = self._values(key)
        scored, expected = int((~np.isnan(values)).sum()), int(applies.sum())
        if not scored:
            return Cell(None, reason=self._why(metric, expected), expected=expected)
        means = resampled_means(values[:, None], self.resamples, self.seed)[:, 0]
        mean = math.fsum(values[~np.isnan(values)]) / scored
        span = self._interval(means, values[:, None])
        notes = (FEWER,) if scored < expected else ()
        return Cell(mean, *span, scored, expected, shared=self.shared_models(metric), notes=notes)

    def _values(self, key: str) -> tuple[Floats, np.ndarray]:
        """Per video: its score (NaN without one), and whether one is expected."""
        metric = self.metric(key)
        results = [self.run.results.get((id, metric)) for id in self.ids]
        values = [None if result is None else self.value(result, key) for result in results]
        filled = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        return filled, np.array([result is None or result.applies for result in results])

    def _interval(self, means: Floats, values_VM: Floats) -> tuple[float | None, float | None]:
        if (~np.isnan(values_VM)).sum(axis=0).min() < 2:
            return None, None
        return interval(means, self.level) or (None, None)

    def _why(self, metric: str, expected: int) -> str:
        if metric not in self.run.info.metrics:
            return "not measured"
        if not expected:
            return "applies to none of the items"
        reasons = [r.reason for r in self.run.of(metric) if r.value is None and r.id in set(self.ids)]
        first = f": {reasons[0]}" if reasons else ""
        return f"0 of {expected} videos have a score{first}"

"""Runs of one system that differ by their seed alone: one row, with an interval over seeds in place of videos."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from idc.errors import counted
from idc.report.measure import Cell, Measured

SEED = "seed"  # the entry of run.json's `columns` that tells them apart


class Replicates(Measured):
    """Several runs as one: each cell is the mean over the runs' cells, with Student's t interval over them.

    A cell that is blank in one run is blank here. A single run's videos do not matter for the interval: it says how
    far the next seed may lie away, and with few seeds it is wide.

    Args:
        members: runs that `together` found, two or more.
    """

    def __init__(self, members: Sequence[Measured]) -> None:
        first = members[0]
        self.members = tuple(members)
        columns = {key: value for key, value in first.run.info.columns.items() if key != SEED}
        self.run = replace(first.run, info=replace(first.run.info, columns=columns))
        self.domain, self.level, self.renamed = first.domain, first.level, first.renamed
        self.ids, self.common = first.ids, first.common

    def cell(self, column: str) -> Cell:
        return self._over(lambda member: member.cell(column))

    def measure(self, key: str) -> Cell:
        return self._over(lambda member: member.measure(key))

    @property
    def runs(self) -> tuple[Measured, ...]:
        return self.members

    def _over(self, read: Callable[[Measured], Cell]) -> Cell:
        cells = [read(member) for member in self.members]
        expected = sum(cell.expected for cell in cells)
        for member, cell in zip(self.members, cells, strict=True):
            if cell.value is None:
                return Cell(None, reason=f"{member.run.path.name}: {cell.reason}", expected=expected)
        values = [cell.value for cell in cells if cell.value is not None]
        mean = math.fsum(values) / len(values)
        half = half_width(values, self.level)
        shared = tuple(dict.fromkeys(model for cell in cells for model in cell.shared))
        seeds = ", ".join(str(member.run.info.columns.get(SEED)) for member in self.members)
        spread = f"{counted(len(values), 'run')} (seeds {seeds}); the interval is Student's t over them"
        notes = tuple(dict.fromkeys([spread, *(note for cell in cells for note in cell.notes)]))
        scored = sum(cell.scored for cell in cells)
        low, high = mean - half, mean + half
        if all(0 <= value <= 1 for value in values):  # fractions: a few seeds say nothing of what cannot be
            low, high = max(low, 0.0), min(high, 1.0)
        return Cell(mean, low, high, scored, expected, shared=shared, notes=notes)


def half_width(values: Sequence[float], level: float) -> float:
    """Half of the interval of a mean of two or more values, by Student's t."""
    from scipy.stats import t

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(t.ppf((1 + level) / 2, len(values) - 1)) * spread


def together(runs: Sequence[Measured]) -> list[Measured]:
    """Runs that differ by the `seed` in their columns alone as one each; the others as they are, in their order."""
    groups: dict[str, list[Measured]] = {}
    for measured in runs:
        info = measured.run.info
        rest = {key: value for key, value in info.columns.items() if key != SEED}
        same = [info.system, info.protocol, rest, measured.ids, sorted(measured.renamed.items())]
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(measured)
    found: list[Measured] = []
    for members in groups.values():
        seeds = [json.dumps(member.run.info.columns.get(SEED)) for member in members]
        alone = len(members) == 1 or "null" in seeds or len(set(seeds)) < len(seeds)
        found += members if alone else [Replicates(members)]
    return found

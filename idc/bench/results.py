"""From outcomes to rows: medians and quartiles, achieved operations, ratios to peers by round, aims; and the JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from idc.bench.cases import WHOLE, Outcome, Repeat

SCHEMA = 1  # of the JSON


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles, of `n` values."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        if len(values) == 1:
            return cls(1, *[float(values[0])] * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(len(values), median, low, high)


@dataclass(frozen=True)
class Ratio:
    """How many times as long as `to` the row takes: one value a round, the median and the extremes of these."""

    to: str
    rounds: tuple[float, ...]
    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """A case's line. Seconds are of one repeat; `tflops` is achieved TFLOP/s without recomputation, `share` that of the
    measured ceiling, the larger of both. `planner_share` is what `idc plan --share` takes: operations of forward and
    backward with recomputation, over their time and the stated peak."""

    group: str
    name: str
    status: str
    seconds: Spread | None
    parts: Mapping[str, Spread]
    rounds: tuple[tuple[Repeat, ...], ...]
    flops: int
    tflops: float | None
    share: float | None
    planner_share: float | None
    per_second: float | None
    peak_gib: float | None
    ratio: Ratio | None
    settings: Mapping[str, str]
    counts: Mapping[str, float]
    note: str


@dataclass(frozen=True)
class Aim:
    """A figure that the project aims at on one 80 GB GPU at the paper's size.

    Attributes:
        what: is measured.
        wanted: in words.
        measured: the figure, in `unit`; None where it could not be measured.
        met: None without a figure.
        note: why there is none, or on how it was taken.
    """

    what: str
    wanted: str
    measured: float | None
    unit: str
    met: bool | None
    note: str = ""


def at_least(what: str, measured: float | None, bound: float, unit: str, note: str = "") -> Aim:
    """Met from `bound` on."""
    return Aim(what, f"at least {show(bound, unit)}", measured, unit, _compared(measured, lambda x: x >= bound), note)


def below(what: str, measured: float | None, bound: float, unit: str, note: str = "") -> Aim:
    """Met below `bound`."""
    return Aim(what, f"below {show(bound, unit)}", measured, unit, _compared(measured, lambda x: x < bound), note)


def at_most(what: str, measured: float | None, bound: float, unit: str, note: str = "") -> Aim:
    """Met up to `bound`."""
    return Aim(what, f"at most {show(bound, unit)}", measured, unit, _compared(measured, lambda x: x <= bound), note)


def _compared(measured: float | None, holds: Callable[[float], bool]) -> bool | None:
    return None if measured is None else holds(measured)


def show(value: float | None, unit: str) -> str:
    """A figure in its unit: "share", "times" or "points" (of a hundred)."""
    if value is None:
        return "-"
    return {"share": f"{value:.1%}", "times": f"{value:.2f} times", "points": f"{100 * value:.1f} points"}[unit]


def rows_of(outcomes: Sequence[Outcome], ceiling_tflops: float | None, stated_tflops: float | None = None) -> list[Row]:
    """A row each, in order; `ceiling_tflops` is the device's measured one, `stated_tflops` the peak of `idc plan`."""
    return [_row(outcome, outcomes, ceiling_tflops, stated_tflops) for outcome in outcomes]


def _row(outcome: Outcome, outcomes: Sequence[Outcome], ceiling: float | None, stated: float | None) -> Row:
    case = outcome.case
    repeats = [repeat for one in outcome.rounds for repeat in one]
    seconds = Spread.of([repeat[WHOLE] for repeat in repeats])
    names = list(dict.fromkeys(name for repeat in repeats for name in repeat if name != WHOLE))
    parts = {name: Spread.of([repeat.get(name, 0.0) for repeat in repeats]) for name in names}
    flops = case.flops() if callable(case.flops) else case.flops
    tflops = flops / seconds.median / 1e12 if seconds and flops else None
    return Row(
        group=outcome.group,
        name=case.name,
        status=outcome.status,
        seconds=seconds,
        parts={name: spread for name, spread in parts.items() if spread is not None},
        rounds=tuple(map(tuple, outcome.rounds)),
        flops=flops,
        tflops=tflops,
        share=tflops / ceiling if tflops and ceiling else None,
        planner_share=_planner_share(case.work, repeats, stated),
        per_second=case.items / seconds.median if seconds and case.items else None,
        peak_gib=None if outcome.peak_bytes is None else outcome.peak_bytes / 2**30,
        ratio=_ratio(outcome, outcomes),
        settings=dict(case.settings),
        counts=dict(case.counts),
        note=case.note,
    )


def _planner_share(work: int, repeats: Sequence[Repeat], stated: float | None) -> float | None:
    # The optimiser's time is left out: the planner adds its own.
    if not (work and repeats and stated):
        return None
    seconds = _median(repeats, ("forward", "backward"))
    return work / seconds / (1e12 * stated) if seconds else None


def _ratio(outcome: Outcome, outcomes: Sequence[Outcome]) -> Ratio | None:
    ours = next((o for o in outcomes if o.group == outcome.group and o.case.name == outcome.case.against), None)
    if ours is None:
        return None
    values = ratios(outcome.rounds, ours.rounds)
    if not values:
        return None
    return Ratio(ours.case.name, tuple(values), statistics.median(values), min(values), max(values))


def ratios(
    longer: Sequence[Sequence[Repeat]], shorter: Sequence[Sequence[Repeat]], parts: Sequence[str] = (WHOLE,)
) -> list[float]:
    """Of the medians of each round that both came through, in the sum of `parts`."""
    return [
        _median(a, parts) / _median(b, parts)
        for a, b in zip(longer, shorter, strict=False)
        if a and b and _median(b, parts) > 0
    ]


def _median(repeats: Sequence[Repeat], parts: Sequence[str]) -> float:
    return statistics.median(sum(repeat.get(part, 0.0) for part in parts) for repeat in repeats)


@dataclass
class Report:
    """All of a run of `idc bench`.

    Attributes:
        command: `train`, `generate`, `grpo` or `data`.
        setup: sizes and settings, as plain values.
        environment: device, versions, command line, commit.
        ceiling: of the device, measured at the start and at the end of the run: `tflops`, `dtype` and the sweep of the
            larger, which shares are of, `tflops_start` and `tflops_end`.
        rows, aims: the tables. interrupted: by the user, so that rows are missing.
        checks: what was compared so that the comparison is fair, by name.
        kernels: of `--profile`.
        at_the_aims: whether this run is of the size and on the kind of device that the aims are for.
    """

    command: str
    setup: dict[str, Any]
    environment: dict[str, Any]
    ceiling: dict[str, Any] | None = None
    rows: list[Row] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    at_the_aims: bool = False

    def row(self, name: str, group: str | None = None) -> Row | None:
        """The first row of that name that was measured."""
        named = (row for row in self.rows if row.name == name and group in (None, row.group))
        return next((row for row in named if row.seconds is not None), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": SCHEMA, **asdict(self)}

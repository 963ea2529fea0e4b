"""The paper's tables, filled from runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from idc.errors import UserError, counted, nearest
from idc.metrics.total import total_score
from idc.report.layout import LAYOUTS, TABLE_1, Column, Layout, Row, normal_name
from idc.report.measure import Cell, Measured

FURTHER = "Further Systems"
PRINTED = "paper, printed"
# The most by which a printed total of the benchmark's own rows misses the one of its columns (SkyReels: 0.012).
ROUNDING = 0.0125


@dataclass(frozen=True)
class Line:
    """A row of a filled table. `cells` and `printed` follow the table's columns; None and "" are blanks.

    `notes` are of the row as a whole: that it stands on other items than the rest.
    """

    title: str
    group: str
    cells: tuple[Cell | None, ...]
    changes: tuple[float | None, ...]
    printed: tuple[str, ...]
    measured: Measured | None = None
    printed_notes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A filled table, for `idc.report.render`."""

    layout: Layout
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    protocol: str
    domain: str
    with_published: bool = False
    level: float = 0.95

    @property
    def filled(self) -> bool:
        """Whether any cell has a figure of a run."""
        return any(cell is not None and cell.value is not None for line in self.lines for cell in line.cells)

    @property
    def caption(self) -> str:
        commits = sorted({short_commit(line.measured.run.info.commit) for line in self.lines if line.measured})
        protocol = f" Protocol {self.protocol}, {self.domain} domain." if self.protocol else " No runs."
        spans = (
            f" In brackets the {self.level:.0%} bootstrap interval over videos, then videos scored / expected."
            if commits
            else ""
        )
        commit = f" Commit {', '.join(commits)}." if commits else ""
        printed = f' Columns "{PRINTED}" are the paper\'s own figures, not ours.' if self.with_published else ""
        if printed and self.protocol not in ("", "paper", "opens2v-1.0"):
            printed += f" They are of protocol paper and do not compare with {self.protocol}."
        reads = "".join(
            f" Column {c.title} reads {' or '.join(names)}."
            for c in self.columns
            if (names := _reads(self.lines, c)) not in ([], [c.key])
        )
        common = next((len(line.measured.ids) for line in self.lines if line.measured and line.measured.common), None)
        items = "" if common is None else f" Over the {counted(common, 'item')} that all runs share."
        return f"{self.layout.caption}{protocol}{items}{reads}{spans}{commit}{printed}"


@dataclass(frozen=True)
class Chosen:
    """Which run stands in which row of a table, and those that stand in none."""

    rows: Mapping[int, Measured]
    further: tuple[Measured, ...] = ()


@dataclass
class Assignment:
    """What `--row` said: row's name, or "TABLE:name" -> run."""

    by_name: dict[str, Measured] = field(default_factory=dict)

    def take(self, layout: Layout, row: Row) -> Measured | None:
        """The run named for a row of a table; one named for this table alone goes first."""
        for prefix in (f"{layout.number}:", ""):
            for name in (*row.names, row.title):
                if (run := self.by_name.get(prefix + normal_name(name))) is not None:
                    return run
        return None


def short_commit(commit: str) -> str:
    """A commit as a caption names it, with what it says of local changes."""
    name, plus, changes = commit.partition("+")
    return name[:12] + plus + changes or "unknown"


def check_one_protocol(runs: Sequence[Measured], protocol: str | None = None) -> list[Measured]:
    """The runs of `protocol`, or all of them where they share one.

    Raises:
        UserError: for runs of several protocols, which no column may hold together; or none of the one asked for.
    """
    by_protocol: dict[str, list[Measured]] = {}
    for measured in runs:
        by_protocol.setdefault(measured.run.info.protocol, []).append(measured)
    if protocol is not None:
        if runs and protocol not in by_protocol:
            raise UserError(f"--protocol {protocol}: no run was judged by it{nearest(protocol, by_protocol)}")
        return by_protocol.get(protocol, [])
    if len(by_protocol) > 1:
        found = "; ".join(f"{name}: {', '.join(str(m.run.path) for m in ms)}" for name, ms in by_protocol.items())
        raise UserError(f"runs of different protocols never stand in one column ({found}); choose with --protocol")
    return list(runs)


def fill(
    layout: Layout,
    runs: Sequence[Measured],
    named: Assignment | None = None,
    domain: str = "open",
    with_published: bool = False,
) -> Table:
    """Put runs into a table's rows.

    Raises:
        UserError: for runs of different protocols, and for two runs that fill the same row.
    """
    runs = check_one_protocol(runs)
    protocol = runs[0].run.info.protocol if runs else ""
    columns = tuple(c for c in layout.columns if not c.protocols or protocol in c.protocols)
    chosen = choose(layout, runs, named or Assignment())
    lines: list[Line] = []
    base: tuple[Cell | None, ...] | None = None
    for place, row in enumerate(layout.rows):
        measured = chosen.rows.get(place)
        title = _toy_title(row, measured) if protocol == "toy" else row.title
        line = _line(columns, title, row.group, measured, base if layout.changes else None)
        printed, notes = _printed(layout, columns, row) if with_published else ((), ())
        lines.append(Line(line.title, line.group, line.cells, line.changes, printed, measured, notes))
        base = base or line.cells
    for measured in chosen.further:
        blank = ("",) * len(columns) if with_published else ()
        line = _line(columns, _title(layout, measured), FURTHER, measured, None)
        lines.append(Line(line.title, FURTHER, line.cells, line.changes, blank, measured, blank))
    lines = _with_notes(lines, columns)
    level = runs[0].level if runs else 0.95
    return Table(layout, columns, tuple(lines), protocol, domain, with_published, level)


def item_notes(runs: Sequence[Measured | None]) -> list[tuple[str, ...]]:
    """For each run, a note where its items are not those that most of the runs stand on (of equals, the first)."""
    there = list({id(run): run for run in runs if run is not None}.values())
    alike = {id(run): sum(_same_items(run, other) for other in there) for run in there}
    usual = max(there, key=lambda run: alike[id(run)], default=None)
    notes: list[tuple[str, ...]] = []
    for run in runs:
        if run is None or usual is None or _same_items(run, usual):
            notes.append(())
        else:
            shared, own = len(run.shared_items(usual)), len(run.ids)
            notes.append((f"other items than {usual.run.info.system}: {shared} shared of {own}; not to be compared",))
    return notes


def _same_items(run: Measured, other: Measured) -> bool:
    return len(run.ids) == len(other.ids) == len(run.shared_items(other))


def _with_notes(lines: Sequence[Line], columns: Sequence[Column]) -> list[Line]:
    """The lines with what forbids to compare one with the next: other items, or another metric in the column."""
    noted = []
    mixed = [len(_reads(lines, column)) > 1 for column in columns]
    for line, notes in zip(lines, item_notes([line.measured for line in lines]), strict=True):
        cells = list(line.cells)
        for place, (cell, column) in enumerate(zip(line.cells, columns, strict=True)):
            if mixed[place] and cell is not None and line.measured is not None:
                read = line.measured.renamed.get(column.key, column.key)
                cells[place] = replace(cell, notes=(f"reads {read}", *cell.notes))
        noted.append(replace(line, cells=tuple(cells), notes=notes))
    return noted


def _toy_title(row: Row, measured: Measured | None) -> str:
    """A run of the toy world never stands under the name of a model of the paper."""
    return row.title if measured is None else f"{measured.run.info.system} (toy)"


def _reads(lines: Sequence[Line], column: Column) -> list[str]:
    """The metrics that the runs of a table show in one column."""
    return sorted({line.measured.renamed.get(column.key, column.key) for line in lines if line.measured})


def choose(layout: Layout, runs: Sequence[Measured], named: Assignment) -> Chosen:
    """Which run fills which row; table 1 also lists systems that no table knows, table S.7 further values."""
    rows: dict[int, Measured] = {}
    taken = {id(measured) for measured in named.by_name.values()}
    free = [measured for measured in runs if id(measured) not in taken]
    for place, row in enumerate(layout.rows):
        measured = named.take(layout, row) or _fitting(layout, row, free)
        if measured is not None:
            rows[place] = measured
    used = {id(measured) for measured in rows.values()}
    left = [measured for measured in free if id(measured) not in used]
    if layout.parameter:
        further = [m for m in left if _parameter(layout, m) is not None and _sweeps(m)]
        further.sort(key=lambda m: _parameter(layout, m) or 0.0)
    else:
        further = [m for m in left if layout is TABLE_1 and not _known(m)]
    return Chosen(rows, tuple(further))


def _fitting(layout: Layout, row: Row, runs: Sequence[Measured]) -> Measured | None:
    if row.parameter is not None:
        wanted = row.parameter
        values = [(m, _parameter(layout, m)) for m in runs if _sweeps(m)]
        fitting = [m for m, value in values if value is not None and math.isclose(value, wanted, abs_tol=1e-9)]
        return _only(layout, row, fitting)
    for name in (*row.names, row.title):
        fitting = [m for m in runs if normal_name(m.run.info.system) == normal_name(name)]
        if fitting:
            return _only(layout, row, fitting)
    return None


def _only(layout: Layout, row: Row, runs: Sequence[Measured]) -> Measured | None:
    if len(runs) > 1:
        paths = ", ".join(str(m.run.path) for m in runs)
        raise UserError(
            f"table {layout.number}, row {row.title!r}: {len(runs)} runs fill it ({paths}); "
            f"give one of them, or say --row {row.name}=RUN"
        )
    return runs[0] if runs else None


def _parameter(layout: Layout, measured: Measured) -> float | None:
    value = measured.run.info.columns.get(layout.parameter)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _sweeps(measured: Measured) -> bool:
    """Whether a run with a value of a sweep belongs to it; an ablation of another part does not."""
    system = normal_name(measured.run.info.system)
    ablations = {normal_name(name) for row in _fixed_rows() for name in row.names if name.startswith("no_")}
    return system not in ablations | {"vanilla", "dpo"}


def _known(measured: Measured) -> bool:
    names = {normal_name(name) for row in _fixed_rows() for name in (*row.names, row.title)}
    system = normal_name(measured.run.info.system)
    return system in names or system.startswith("lambda_")


def _fixed_rows() -> list[Row]:
    return [row for layout in LAYOUTS.values() if not layout.parameter for row in layout.rows]


def _title(layout: Layout, measured: Measured) -> str:
    value = _parameter(layout, measured) if layout.parameter else None
    return measured.run.info.system if value is None else f"{value:g}"


def _line(
    columns: Sequence[Column],
    title: str,
    group: str,
    measured: Measured | None,
    base: tuple[Cell | None, ...] | None,
) -> Line:
    cells = tuple(measured.cell(column.key) if measured else None for column in columns)
    changes = tuple(_change(cell, base[place] if base else None) for place, cell in enumerate(cells))
    return Line(title, group, cells, changes, (), measured)


def _change(cell: Cell | None, base: Cell | None) -> float | None:
    if cell is None or base is None or cell.value is None or not base.value:
        return None
    return cell.value / base.value - 1


def _printed(layout: Layout, columns: Sequence[Column], row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The printed cells in the order of the columns, and what is wrong with each."""
    printed = dict(zip(layout.printed_columns, row.printed, strict=True))
    notes = {key: text for name, key, text in layout.notes if name == row.name}
    if layout is TABLE_1 and (total := computed_total(row)) is not None:
        apart = abs(total - float(printed["total"])) > ROUNDING
        if apart and not notes:
            notes["total"] = f"does not follow from its columns, which give {total:.2f}"
    return tuple(printed.get(c.key, "") for c in columns), tuple(notes.get(c.key, "") for c in columns)


def computed_total(row: Row) -> float | None:
    """The total of a row of table 1 from its printed columns, in per cent, under protocol `paper`."""
    printed = dict(zip(TABLE_1.printed_columns, map(float, row.printed), strict=True))
    return 100 * total_score(
        {key: value / 100 for key, value in printed.items() if key != "total"}, protocol="paper", domain="open"
    )

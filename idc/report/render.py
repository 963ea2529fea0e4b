"""A filled table as Markdown, CSV and LaTeX (booktabs). What a run or a file is called is escaped everywhere."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from idc.report.layout import PERCENT, Column
from idc.report.measure import Cell
from idc.report.tables import PRINTED, Line, Table

DAGGER = "†"


@dataclass
class Notes:
    """Footnotes of a table, each once, marked a, b, c, ..., aa; the dagger is the one of shared models."""

    texts: list[str] = field(default_factory=list)
    shared: dict[str, set[str]] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        """The mark of a note."""
        if text not in self.texts:
            self.texts.append(text)
        place, letters = self.texts.index(text) + 1, ""
        while place:
            place, rest = divmod(place - 1, 26)
            letters = chr(ord("a") + rest) + letters
        return letters

    def marks(self, texts: Iterable[str]) -> str:
        """The marks of several notes."""
        return ",".join(map(self.mark, texts))

    def dagger(self, system: str, models: tuple[str, ...]) -> str:
        self.shared.setdefault(system, set()).update(models)
        return DAGGER

    def lines(self) -> list[tuple[str, str]]:
        """(mark, text) of all notes, the dagger first."""
        shared = [
            (DAGGER, f"{system} was rewarded in training by a model that judges here: {', '.join(sorted(models))}")
            for system, models in self.shared.items()
        ]
        return shared + [(self.mark(text), text) for text in self.texts]


@dataclass(frozen=True)
class Shown:
    """A cell in words: the value, its interval, its counts, the change against the first row, marks of notes."""

    value: str = ""
    span: str = ""
    count: str = ""
    change: str = ""
    marks: str = ""


def shown(cell: Cell | None, column: Column, change: float | None, line: Line, notes: Notes) -> Shown:
    """What a cell says; a blank of a run keeps the mark of its reason, a row without a run says nothing."""
    if cell is None or line.measured is None:
        return Shown()
    system = line.measured.run.info.system
    if cell.value is None:
        return Shown(marks=notes.mark(cell.reason))
    span = ""
    if cell.low is not None and cell.high is not None:
        span = f"[{number(cell.low, column)}, {number(cell.high, column)}]"
    moved = "" if change is None else f"{'↑' if change >= 0 else '↓'}{abs(change):.1%}"
    marks = (notes.dagger(system, cell.shared) if cell.shared else "") + notes.marks(cell.notes)
    unit = "%" if column.unit == PERCENT else ""
    return Shown(number(cell.value, column) + unit, span, f"{cell.scored}/{cell.expected}", moved, marks)


def number(value: float, column: Column) -> str:
    """A value as the paper prints its column: per cent with two decimals, or three decimals; without the sign."""
    return f"{100 * value:.2f}" if column.unit == PERCENT else f"{value:.3f}"


def printed_number(text: str, column: Column) -> str:
    """A figure of the paper with its unit."""
    return f"{text}%" if text and column.unit == PERCENT else text


def grouped(table: Table) -> Iterator[tuple[str, list[Line]]]:
    """(group's heading, its lines) from the top."""
    for group, lines in groupby(table.lines, key=lambda line: line.group):
        yield group, list(lines)


def provenance(table: Table) -> list[str]:
    """One sentence for each row that has a run: which folder, which system, which commit."""
    return [
        f"{line.title}: {m.run.path.name or m.run.path} (system {m.run.info.system}, commit "
        f"{m.run.info.commit or 'unknown'})"
        for line in table.lines
        if line.measured is not None
        for m in line.measured.runs
    ]


# Markdown -----------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with its caption above and its notes below."""
    notes = Notes()
    heads = [table.layout.head, *(f"{column.title} ↑" for column in table.columns)]
    if table.with_published:
        heads += [f"{column.title} ({PRINTED})" for column in table.columns if column.key in _printed_keys(table)]
    lines = [f"**Table {table.layout.number}.** {_markdown(table.caption)}", ""]
    lines += [_row(map(_markdown, heads)), _row(["---"] + ["---:"] * (len(heads) - 1))]
    for group, members in grouped(table):
        if group:
            lines.append(_row([f"*{_markdown(group)}*"] + [""] * (len(heads) - 1)))
        for line in members:
            lines.append(_row(_markdown_cells(table, line, notes)))
    lines += [""] if notes.lines() or provenance(table) else []
    lines += [f"- <sup>{mark}</sup> {_markdown(text)}" for mark, text in notes.lines()]
    lines += [f"- {_markdown(text)}" for text in provenance(table)]
    return "\n".join(lines) + "\n"


def _markdown_cells(table: Table, line: Line, notes: Notes) -> list[str]:
    marks = notes.marks(line.notes)
    cells = [_markdown(line.title) + (f"<sup>{marks}</sup>" if marks else "")]
    for cell, column, change in zip(line.cells, table.columns, line.changes, strict=True):
        s = shown(cell, column, change, line, notes)
        mark = f"<sup>{s.marks}</sup>" if s.marks else ""
        parts = [s.value + mark, f"({s.change})" if s.change else "", s.span, s.count]
        cells.append(" ".join(_markdown(part) if part is not parts[0] else part for part in parts if part))
    for text, note, column in printed_cells(table, line):
        mark = f"<sup>{notes.mark(printed_note(note))}</sup>" if note else ""
        cells.append(printed_number(text, column) + mark)
    return cells


def _row(cells: Iterator[str] | list[str] | map[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]~#])", r"\\\1", text)


# CSV ----------------------------------------------------------------------------------------------------------------


def csv_text(table: Table) -> str:
    """One row a line of the table, one column a number; per cent where the table prints it; blanks are empty."""
    heads = ["table", "group", "row", "system", "run", "protocol", "domain", "commit", "row_note"]
    for column in table.columns:
        unit = "_percent" if column.unit == PERCENT else ""
        key = column.key + unit
        heads += [key, f"{key}_low", f"{key}_high", f"{column.key}_scored", f"{column.key}_expected"]
        heads += [f"{column.key}_note", f"{column.key}_rewarded_by"]
        heads += [f"{column.key}_change_percent"] if table.layout.changes else []
        heads += [f"{key}_printed", f"{column.key}_printed_note"] if table.with_published else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for line in table.lines:
        writer.writerow(_csv_row(table, line))
    return out.getvalue()


def _csv_row(table: Table, line: Line) -> list[str]:
    run = line.measured.run if line.measured else None
    row = [table.layout.number, line.group, line.title]
    row += [run.info.system, _paths(line), run.info.protocol, table.domain, run.info.commit] if run else [""] * 5
    row.append("; ".join(line.notes))
    for place, (cell, column) in enumerate(zip(line.cells, table.columns, strict=True)):
        scale = 100.0 if column.unit == PERCENT else 1.0
        if cell is None:
            row += [""] * 7
        else:
            row += ["" if x is None else f"{scale * x:.6g}" for x in (cell.value, cell.low, cell.high)]
            said = "; ".join(filter(None, (cell.reason, *cell.notes)))
            row += [str(cell.scored), str(cell.expected), said, " ".join(cell.shared)]
        if table.layout.changes:
            change = line.changes[place]
            row.append("" if change is None else f"{100 * change:.6g}")
        if table.with_published:
            row += [line.printed[place], line.printed_notes[place]]
    return row


def _paths(line: Line) -> str:
    return " ".join(str(m.run.path) for m in line.measured.runs) if line.measured else ""


# LaTeX --------------------------------------------------------------------------------------------------------------

LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "λ": r"$\lambda$",
    "†": r"$\dagger$",
}


def latex(table: Table) -> str:
    """A `table*` of booktabs and graphicx; values with their interval and counts in small type below."""
    notes = Notes()
    printed = [column for column in table.columns if column.key in _printed_keys(table)] if table.with_published else []
    width = 1 + len(table.columns) + len(printed)
    body: list[str] = []
    if printed:
        block = len(table.columns)
        spans = ((block, "measured"), (len(printed), PRINTED))
        names = [rf"\multicolumn{{{count}}}{{c}}{{{_latex(name)}}}" for count, name in spans]
        body.append(" & ".join(("", *names)) + r" \\")
        body.append(rf"\cmidrule(lr){{2-{1 + block}}} \cmidrule(lr){{{2 + block}-{width}}}")
    heads = [table.layout.head, *(f"{c.title} ↑" for c in table.columns), *(c.title for c in printed)]
    body.append(" & ".join(map(_latex, heads)) + r" \\")
    for group, members in grouped(table):
        body.append(r"\midrule")
        if group:
            body.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_latex(group)}}}}} \\")
        body += [" & ".join(_latex_cells(table, line, notes)) + r" \\" for line in members]
    below = [rf"\textsuperscript{{{_latex(mark)}}} {_latex(text)}." for mark, text in notes.lines()]
    below += [f"{_latex(text)}." for text in provenance(table)]
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\label{{tab:{table.layout.slug.replace('_', '-')}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        *([r"\par\smallskip", r"{\footnotesize\raggedright " + r"\par ".join(below) + r"\par}"] if below else []),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cells(table: Table, line: Line, notes: Notes) -> list[str]:
    marks = notes.marks(line.notes)
    cells = [_latex(line.title) + (rf"\textsuperscript{{{_latex(marks)}}}" if marks else "")]
    for cell, column, change in zip(line.cells, table.columns, line.changes, strict=True):
        s = shown(cell, column, change, line, notes)
        top = _latex(s.value) + (rf"\textsuperscript{{{_latex(s.marks)}}}" if s.marks else "")
        top += rf" {{\small({_latex(s.change)})}}" if s.change else ""
        small = [part for part in (s.span, s.count) if part]
        if small:
            rows = r" \\[-1pt] ".join(rf"{{\scriptsize {_latex(part)}}}" for part in small)
            top = rf"\begin{{tabular}}[c]{{@{{}}c@{{}}}}{top} \\[-1pt] {rows}\end{{tabular}}"
        cells.append(top)
    for text, note, column in printed_cells(table, line):
        mark = rf"\textsuperscript{{{notes.mark(printed_note(note))}}}" if note else ""
        cells.append(_latex(printed_number(text, column)) + mark)
    return cells


def _latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(letter, letter) for letter in " ".join(text.split()))


# Shared -------------------------------------------------------------------------------------------------------------


def _printed_keys(table: Table) -> set[str]:
    return set(table.layout.printed_columns)


def printed_cells(table: Table, line: Line) -> list[tuple[str, str, Column]]:
    """(printed figure, what is wrong with it, column) of each column that the paper has."""
    if not table.with_published:
        return []
    cells = zip(line.printed, line.printed_notes, table.columns, strict=True)
    return [(text, note, column) for text, note, column in cells if column.key in _printed_keys(table)]


def printed_note(note: str) -> str:
    return f"{PRINTED}: {note}"


FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "csv": csv_text, "tex": latex}

"""Tables of the page as HTML; everything that comes from a run is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from idc.report.layout import Column, metric_title
from idc.report.measure import Cell, Measured
from idc.report.render import (
    Notes,
    grouped,
    number,
    printed_cells,
    printed_note,
    printed_number,
    provenance,
    shown,
)
from idc.report.tables import PRINTED, Line, Table, item_notes
from idc.report.tracks import RATES

MOST_IDS = 20  # named in a row of the table of failures


def table_html(table: Table) -> str:
    """One of the paper's tables as a section with its caption, notes and downloads. Its headings sort."""
    notes = Notes()
    printed = [c for c in table.columns if c.key in table.layout.printed_columns] if table.with_published else []
    width = 1 + len(table.columns) + len(printed)
    heads = [(table.layout.head, "text"), *((f"{c.title}&nbsp;↑", "") for c in table.columns)]
    heads += [(f"{c.title} <small>{PRINTED}</small>", "printed") for c in printed]
    body = []
    for group, members in grouped(table):
        if group:
            body.append(f'<tr class="group"><th colspan="{width}" scope="colgroup">{escape(group)}</th></tr>')
        body += [_row_html(table, line, notes) for line in members]
    slug = table.layout.slug
    files = " ".join(f'<a href="{slug}.{suffix}">{suffix}</a>' for suffix in ("md", "csv", "tex"))
    below = "".join(f"<li><sup>{mark}</sup> {escape(text)}</li>" for mark, text in notes.lines())
    below += "".join(f"<li>{escape(text)}</li>" for text in provenance(table))
    return (
        f'<section class="table" id="{slug}"><h3>Table {table.layout.number} <span class="files">{files}</span></h3>'
        f"<p>{escape(table.caption)}</p>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table {table.layout.number}">'
        f'<table class="sortable"><thead><tr>{"".join(_head(*head) for head in heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f"{f'<ul class=notes>{below}</ul>' if below else ''}</section>"
    )


def blank_tables_html(tables: Sequence[Table]) -> str:
    """Tables without a figure of any run, each folded up under its name; "" where there are none."""
    if not tables:
        return ""
    folded = "".join(
        f"<details><summary>Table {table.layout.number}: {escape(table.layout.caption)}</summary>"
        f"{table_html(table)}</details>"
        for table in tables
    )
    return (
        '<section aria-labelledby="blank-head"><h2 id="blank-head">Tables without figures</h2>'
        f'<p class="hint">No run of this report has a figure in any of their rows.</p>{folded}</section>'
    )


def measures_html(systems: Sequence[tuple[str, Measured]], metrics: Sequence[str]) -> str:
    """All measures of all systems, also those that no table of the paper has."""
    if not systems:
        return '<p class="empty">No run was given.</p>'
    titles = {"total": "Total Score"} | {key: metric_title(key) for key in metrics}
    if any(measured.tracker for _, measured in systems):
        titles |= {"subject_min": "Least subject"} | {f"subject_{rate}": f"{rate.capitalize()} ↓" for rate in RATES}
    notes = Notes()
    heads = _head("System", "text")
    heads += "".join(_head(escape(titles[key])) for key in titles)
    rows = []
    for (name, measured), other in zip(systems, item_notes([measured for _, measured in systems]), strict=True):
        line = Line(name, "", (), (), (), measured, notes=other)
        cells = [(_measure(measured, key), Column(key, titles[key])) for key in titles]
        body = "".join(_cell_html(cell, column, None, line, notes) for cell, column in cells)
        rows.append(f"<tr>{_row_head(line, notes)}{body}</tr>")
    below = "".join(f"<li><sup>{mark}</sup> {escape(text)}</li>" for mark, text in notes.lines())
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All measures">'
        '<table class="sortable" id="measures">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{f'<ul class=notes>{below}</ul>' if below else ''}"
    )


def failures_html(systems: Sequence[tuple[str, Measured]]) -> str:
    """What has no score and why: a row a system and reason, with the metrics and ids."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, measured in systems:
        ids = set(measured.ids)
        for result in measured.run.failures:
            if result.id in ids:
                groups.setdefault((name, result.metric, result.reason or "no reason given"), []).append(result.id)
        for metric in measured.run.info.metrics:
            for id in measured.ids:
                if (id, metric) not in measured.run.results:
                    groups.setdefault((name, metric, "not scored yet"), []).append(id)
        for problem in measured.run.info.problems:
            groups.setdefault((name, "–", problem.reason), []).append(problem.file)
    if not groups:
        return '<p class="empty">Nothing failed: every score that was expected is there.</p>'
    # A video that does not decode fails every metric: that is one row.
    merged: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (name, metric, reason), found in groups.items():
        merged.setdefault((name, reason, tuple(found)), []).append(metric)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="words">{escape(", ".join(metrics))}</td>'
        f'<td class="words">{escape(reason)}</td><td data-value="{len(ids)}">{len(ids)}</td>'
        f'<td class="words ids">{_ids(ids)}</td></tr>'
        for (name, reason, ids), metrics in sorted(merged.items(), key=lambda row: -len(row[0][2]))
    )
    heads = _head("System", "text") + _head("Metrics", "text") + _head("Reason", "text") + _head("Videos")
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Failures"><table class="sortable" id="failed">'
        f'<thead><tr>{heads}<th scope="col" class="words">Which</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _ids(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
    return ", ".join(map(escape, ids[:MOST_IDS])) + more


def _head(title: str, kind: str = "") -> str:
    """A heading that sorts; `title` is HTML."""
    side = ' class="words"' if kind == "text" else f' class="{kind}"' if kind else ""
    return f'<th scope="col"{side} aria-sort="none"><button type="button">{title}</button></th>'


def _row_html(table: Table, line: Line, notes: Notes) -> str:
    cells = [_row_head(line, notes)]
    for cell, column, change in zip(line.cells, table.columns, line.changes, strict=True):
        cells.append(_cell_html(cell, column, change, line, notes))
    for text, note, column in printed_cells(table, line):
        mark = f"<sup>{notes.mark(printed_note(note))}</sup>" if note else ""
        cells.append(f'<td class="printed" data-value="{escape(text)}">{printed_number(text, column)}{mark}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _row_head(line: Line, notes: Notes) -> str:
    marks = notes.marks(line.notes)
    return f'<th scope="row">{escape(line.title)}{f"<sup>{marks}</sup>" if marks else ""}</th>'


def _measure(measured: Measured, key: str) -> Cell:
    return measured.cell(key) if key == "total" else measured.measure(key)


def _cell_html(cell: Cell | None, column: Column, change: float | None, line: Line, notes: Notes) -> str:
    s = shown(cell, column, change, line, notes)
    value = "" if cell is None or cell.value is None else number(cell.value, column)
    mark = f"<sup>{s.marks}</sup>" if s.marks else ""
    moved = f' <span class="change">{s.change}</span>' if s.change else ""
    small = "".join(f"<small>{part}</small>" for part in (s.span, s.count) if part)
    return f'<td data-value="{value}"><b>{s.value}</b>{mark}{moved}{small}</td>'

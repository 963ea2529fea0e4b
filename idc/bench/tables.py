"""What a person reads of a benchmark: the cases, their parts, the aims beside what was measured, the top kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from idc.bench.results import Aim, Report, Row, Spread, show

WIDTH = 150  # of a table that goes into a file
UNSTEADY = 0.1  # by so much two measurements of a ceiling may differ on a device that nobody else uses


def print_report(report: Report, console: Console | None = None) -> None:
    """All tables of a run."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    for line in header(report):
        console.print(line, highlight=False, markup=False)
    for group in dict.fromkeys(row.group for row in report.rows):
        rows = [row for row in report.rows if row.group == group]
        console.print(_cases(group, rows))
        if any(row.parts for row in rows):
            console.print(_parts(group, rows))
    for row in report.rows:
        if row.planner_share is not None and row.name == "ours":
            console.print(
                f"planner's share, {row.group}: {row.planner_share:.1%} of the stated peak, recomputation counted, "
                f"forward and backward alone: idc plan --share {row.planner_share:.3f}",
                highlight=False,
                markup=False,
            )
    for name, value in report.checks.items():
        console.print(f"{name}: {value:.2g}" if isinstance(value, float) else f"{name}: {value}", highlight=False)
    if report.aims:
        console.print(_aims(report.aims, report.at_the_aims))
    if report.kernels:
        cuda = report.environment.get("device", {}).get("type") == "cuda"
        console.print(_kernels(report.kernels, cuda))
    if report.interrupted:
        console.print("interrupted: rows are missing", style="bold")


def header(report: Report) -> Iterator[str]:
    """Device, versions, sizes and ceiling, in lines."""
    env, setup = report.environment, report.setup
    device = env.get("device", {})
    versions = ", ".join(f"{name} {version}" for name, version in env.get("versions", {}).items() if version)
    driver = f", driver {env['driver']}" if env.get("driver") else ""
    yield f"{device.get('name', 'device unknown')}{driver}; {versions}"
    yield f"{env.get('command', '')}  (commit {str(env.get('commit') or 'unknown')[:12]}, {env.get('threads')} threads)"
    if setup:
        spec = setup["spec"]
        width = spec["num_attention_heads"] * spec["attention_head_dim"]
        yield (
            f"{setup['size']}: {spec['num_layers']} layers of width {width}, {setup['frames']} frames of "
            f"{setup['width']}x{setup['height']}, batch {setup['batch']}, {setup['subjects']} subjects"
        )
    if report.ceiling:
        ceiling = report.ceiling
        stated = f" (stated peak {_number(ceiling['stated_tflops'])})" if ceiling.get("stated_tflops") else ""
        yield (
            f"matrix ceiling: {_number(ceiling['tflops'])} TFLOP/s{stated}, {ceiling['dtype']} products of side "
            f"{ceiling['side']}{_both_ceilings(ceiling)}"
        )


def _both_ceilings(ceiling: Mapping[str, Any]) -> str:
    start, end = ceiling.get("tflops_start"), ceiling.get("tflops_end")
    if start is None:
        return ""
    if end is None:
        return "; from the start alone"
    both = f"; {_number(start)} at the start and {_number(end)} at the end, shares are of the larger"
    apart = max(start, end) / min(start, end)
    if apart < 1 + UNSTEADY:
        return both
    return f"{both}. They are {apart:.2f} times apart, by load or heat: shares are uncertain by as much"


def _cases(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for name in ("case", "median", "quartiles", "n", "per s", "TFLOP/s", "of ceiling", "peak GiB", "time against"):
        table.add_column(name, justify="left" if name in ("case", "time against") else "right", overflow="fold")
    table.add_column("with", overflow="fold")
    common = _common(rows)
    if common:
        table.caption = escape("all with " + ", ".join(f"{name} {value}" for name, value in common.items()))
        table.caption_justify = "left"
    for row in rows:
        table.add_row(*_cells(row, common))
    return table


def _common(rows: Sequence[Row]) -> dict[str, str]:
    """Settings that are the same in all rows, where there are several."""
    first, *others = rows
    shared = {
        name: value for name, value in first.settings.items() if all(r.settings.get(name) == value for r in others)
    }
    return shared if others else {}


def _cells(row: Row, common: Mapping[str, str]) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in row.settings.items() if name not in common)
    counts = ", ".join(f"{name} {value:g}" for name, value in row.counts.items())
    words = "; ".join(part for part in (settings, counts, row.note) if part)
    if row.seconds is None:
        return [escape(row.name), *["-"] * 8, escape("; ".join(part for part in (row.status, words) if part))]
    status = "" if row.status == "ok" else f" ({row.status})"
    return [
        escape(row.name + status),
        _time(row.seconds.median),
        f"{_time(row.seconds.low)} to {_time(row.seconds.high)}",
        str(row.seconds.n),
        "-" if row.per_second is None else _number(row.per_second),
        "-" if row.tflops is None else _number(row.tflops),
        "-" if row.share is None else f"{row.share:.1%}",
        "-" if row.peak_gib is None else f"{row.peak_gib:.1f}",
        escape(_ratio(row)),
        escape(words),
    ]


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-"
    spread = f" ({row.ratio.lowest:.2f} to {row.ratio.highest:.2f})" if len(row.ratio.rounds) > 1 else ""
    return f"{row.ratio.median:.2f} x {row.ratio.to}{spread}"


def _parts(title: str, rows: Sequence[Row]) -> Table:
    """Medians of the parts and their share of the sum."""
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    table = Table("case", *names, title=escape(f"{title}, by part"), title_justify="left")
    for row in rows:
        if row.parts:
            total = sum(part.median for part in row.parts.values()) or 1.0
            table.add_row(escape(row.name), *(_part(row.parts.get(name), total) for name in names))
    return table


def _part(spread: Spread | None, total: float) -> str:
    return "-" if spread is None else f"{_time(spread.median)} ({spread.median / total:.0%})"


def _aims(aims: Sequence[Aim], at_the_aims: bool) -> Table:
    caption = None if at_the_aims else "not the aims' size or device: met and missed here say nothing of them"
    table = Table("aim (one 80 GB GPU, 1.3B, 81 frames at 480p)", "wanted", "measured", "", "note", caption=caption)
    table.title, table.title_justify = "aims", "left"
    for aim in aims:
        met = {True: "met", False: "missed", None: "not measured"}[aim.met]
        table.add_row(aim.what, aim.wanted, show(aim.measured, aim.unit), met, aim.note)
    return table


def _kernels(kernels: Sequence[dict[str, Any]], cuda: bool) -> Table:
    what, clock = ("kernel", "device") if cuda else ("operator", "CPU")
    table = Table("case", what, "time", "share", "calls", title=f"top {what}s by {clock} time", title_justify="left")
    for kernel in kernels:
        name = escape(kernel["name"][:90])
        share = f"{kernel['share']:.1%}"
        table.add_row(escape(kernel["case"]), name, _time(kernel["seconds"]), share, str(kernel["calls"]))
    return table


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

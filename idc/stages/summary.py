"""What an evaluation found, on the terminal: every mean with how many were scored, every failure with its reason."""

from __future__ import annotations

import math
import statistics
from typing import Any

from idc.errors import counted
from idc.metrics.results import Run

NAMED = 3  # ids named beside a reason; all of them are in the results


def show(run: Run, console: Any = None) -> None:
    """Print a run's means, failures and problems."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(soft_wrap=True)
    table = Table(title=f"{run.info.system}, protocol {run.info.protocol}", title_justify="left")
    table.add_column("metric")
    for column in ("mean", "n scored / n expected", "seconds a video"):
        table.add_column(column, justify="right")
    for name in run.info.metrics:
        mean, seconds = run.mean(name), [result.seconds for result in run.of(name) if result.value is not None]
        table.add_row(
            name,
            "-" if math.isnan(mean.value) else f"{mean.value:.4f}",
            f"{mean.scored} / {mean.expected}" if mean.complete else f"[bold red]{mean.scored} / {mean.expected}[/]",
            f"{statistics.median(seconds):.3f}" if seconds else "-",
        )
    console.print(table)
    for line in complaints(run):
        console.print(line, markup=False, highlight=False)
    console.print(f"results: {run.path}", markup=False, highlight=False)


def complaints(run: Run) -> list[str]:
    """A line for each reason why something is missing, with the metric, how often and some ids."""
    groups: dict[tuple[str, str], list[str]] = {}
    for result in run.failures:
        groups.setdefault((result.metric, result.reason), []).append(result.id)
    lines = [
        f"{metric}: {reason} ({len(ids)}: {', '.join(ids[:NAMED])}{', ...' if len(ids) > NAMED else ''})"
        for (metric, reason), ids in groups.items()
    ]
    if run.unscored:
        lines.append(f"{counted(run.unscored, 'score')} {'is' if run.unscored == 1 else 'are'} not there yet")
    return lines + [f"{problem.file}: {problem.reason}" for problem in run.info.problems]

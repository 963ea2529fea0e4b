"""What a run shows: how far it is while it works, and a table of its steps at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from idc.curate.parts import Count
from idc.progress import Lines

if TYPE_CHECKING:
    from idc.curate.engine import CurationReport


class Shown:
    """Units done, rate and time left: a bar in a terminal, lines in a log. A context manager.

    Args:
        total: units to be done.
        shown: False shows nothing.
    """

    def __init__(self, total: int, shown: bool = True) -> None:
        from rich.console import Console

        self._total, self._done = total, 0
        console = Console(stderr=True, soft_wrap=True)
        self._bar: Any = None
        self._lines: Lines | None = None
        if shown and total and console.is_terminal:
            self._bar = _bar(console)
        elif shown and total:
            self._lines = Lines("curating: units", total, console)

    def __enter__(self) -> Shown:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("curating", total=self._total, made="")
        return self

    def advance(self, units: int, counts: Sequence[Count]) -> None:
        """So many units more are done; `counts` are of all so far."""
        self._done += units
        if self._lines is not None:
            self._lines.update(self._done)
        if self._bar is not None:
            kept = counts[-1].kept if counts else 0
            dropped = sum(count.dropped for count in counts)
            self._bar.update(self._task, completed=self._done, made=f"{kept} kept, {dropped} dropped")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Units a second, or an hour where that is below one."""

        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            if speed is None:
                return Text("")
            return Text(f"{speed:.1f} units/s" if speed >= 1 else f"{3600 * speed:.0f} units/h")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[made]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def step_table(report: CurationReport) -> Any:
    """The steps in order: what came, what each made more, kept and dropped, and how long this run took over it."""
    from rich.table import Table

    table = Table("step")
    for name in ("in", "made", "kept", "dropped", "faults", "seconds", "items/s"):
        table.add_column(name, justify="right")
    for place, count in enumerate(report.counts):
        worked = report.worked[place] if place < len(report.worked) else 0
        rate = f"{worked / count.seconds:.1f}" if worked and count.seconds else ""
        seconds = f"{count.seconds:.1f}" if count.seconds else ""
        numbers = (count.came, count.made, count.kept, count.dropped, count.failed)
        table.add_row(count.step, *(str(number or "0") for number in numbers), seconds, rate)
    return table


def limit_of(report: CurationReport) -> str:
    """What limits the rate: the step that most of this run's time went into."""
    total = sum(count.seconds for count in report.counts)
    if not total:
        return ""
    slowest = max(report.counts, key=lambda count: count.seconds)
    return f"{slowest.step} takes {100 * slowest.seconds / total:.0f}% of the steps' time"

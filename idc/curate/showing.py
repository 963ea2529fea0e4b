"""What a run shows: how far it is while it works, and a table of its steps at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from idc.curate.parts import Count
from idc.progress import Lines, rate

if TYPE_CHECKING:
    from idc.curate.engine import CurationReport


class Shown:
    """How much is done, the rate and the time left: a bar in a terminal, lines in a log. A context manager.

    Args:
        what: the work.
        shown: False shows nothing.
        total: pieces that it has, where that is known before it begins.
    """

    def __init__(self, what: str, shown: bool = True, total: int = 0) -> None:
        from rich.console import Console

        self._what, self._total, self._done = what, total, 0
        self._console = Console(stderr=True, soft_wrap=True)
        self._bar: Any = _bar(self._console) if shown and self._console.is_terminal else None
        self._lines = Lines(what, total or None, self._console) if shown and self._bar is None else None

    def __enter__(self) -> Shown:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total or None, news="")
        return self

    def advance(self, units: int, counts: Sequence[Count]) -> None:
        """So many units more are done; `counts` are of all so far."""
        kept = counts[-1].kept if counts else 0
        self._update(self._done + units, f"{kept} kept, {sum(count.dropped for count in counts)} dropped")

    def so_far(self, done: int, total: int) -> None:
        """`done` of `total` pieces are done."""
        if total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)
            if self._lines is not None:
                self._lines.total = total
        self._update(done, "")

    def _update(self, done: int, news: str) -> None:
        self._done = done
        if self._lines is not None:
            self._lines.update(done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, news=news)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            if speed is None:
                return Text("")
            return Text(rate(speed))

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[news]}"),
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


def reason_table(report: CurationReport, most: int) -> Any:
    """Why things were dropped, by step and reason; beyond `most` rows only their number."""
    from rich.table import Table

    table = Table("step", "dropped because")
    table.add_column("times", justify="right")
    rows = [
        (step, reason, times)
        for step, reasons in (report.written.dropped if report.written else {}).items()
        for reason, times in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    for step, reason, times in rows[:most]:
        table.add_row(step, reason, str(times))
    if len(rows) > most:
        table.add_row("", f"and {len(rows) - most} reasons more", str(sum(times for _, _, times in rows[most:])))
    return table


def limit_of(report: CurationReport) -> str:
    """What limits the rate: how long each phase took, and the step that most of the steps' time went into."""
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    total = sum(count.seconds for count in report.counts)
    if not total:
        return phases
    slowest = max(report.counts, key=lambda count: count.seconds)
    return f"{phases}; {slowest.step} takes {100 * slowest.seconds / total:.0f}% of the steps' time"

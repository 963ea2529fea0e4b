"""Progress of long work: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between lines


def rate(speed: float) -> str:
    """Pieces a second, or an hour where that is below one."""
    return f"{speed:.1f}/s" if speed >= 1 else f"{3600 * speed:.0f}/h"


class Lines:
    """Says how far a piece of work is, and its rate, at most once in `every` seconds, where output is no terminal.

    Args:
        what: the work, first word of each line.
        total: how many pieces it has; None where nobody knows.
        console: rich's, where the lines go.
    """

    def __init__(self, what: str, total: int | None, console: Any, every: float = EVERY) -> None:
        self.what, self.total, self.console, self.every = what, total, console, every
        self._began = self._printed = time.monotonic()

    def update(self, done: int) -> None:
        """`done` pieces are finished."""
        now = time.monotonic()
        if now - self._printed < self.every:
            return
        self._printed = now
        speed = done / (now - self._began)
        news = f"  {rate(speed)}" if done else ""
        news += f"  {(self.total - done) / speed:.0f} s left" if self.total and done else ""
        self.console.print(f"{self.what} {done}/{self.total or '?'}{news}", highlight=False)


def track(items: Iterable[T], what: str, total: int, shown: bool = True) -> Iterator[T]:
    """Iterate, showing on standard error how many of `total` are done; `shown=False` shows nothing (other ranks)."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    if not shown:
        yield from items
    elif console.is_terminal:
        columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bar:
            yield from bar.track(items, total=total, description=what)
    else:
        lines = Lines(what, total, console)
        for done, item in enumerate(items, 1):
            yield item
            lines.update(done)

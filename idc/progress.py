"""Progress of long work: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between lines


class Lines:
    """Says how far a piece of work is, at most once in `every` seconds, for output that is no terminal.

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
        left = (now - self._began) / max(done, 1) * (self.total - done) if self.total else 0
        time_left = f"  {left:.0f} s left" if self.total and done else ""
        self.console.print(f"{self.what} {done}/{self.total or '?'}{time_left}", highlight=False)


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

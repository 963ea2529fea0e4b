"""Where chunks are worked on: what every executor is given and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from idc.curate.chunks import FAULTS, Work, one_line
from idc.curate.parts import Count, Outcomes, write_part
from idc.curate.plan import Task
from idc.data import storage
from idc.errors import UserError

BEGUN = ".begun"  # ends the names of what executors leave among the parts while they are at work


@dataclass(frozen=True)
class Done:
    """A chunk whose part is written.

    Attributes:
        part: its name.
        units: how many it has.
        counts: by step, with the seconds that each took.
        kept: candidates that are left.
        fault: of its drops by a fault, the first in words; "" where there is none.
    """

    part: str
    units: int
    counts: list[Count] = field(default_factory=list)
    kept: int = 0
    fault: str = ""


class Executor(ABC):
    """Works on chunks, in any order, and writes their parts into a folder or under a URL."""

    @abstractmethod
    def run(self, work: Work, tasks: Sequence[Task], folder: str) -> Iterator[Done]:
        """Yields each chunk once its part is on the disk.

        A chunk whose worker dies is tried once more, and its units are then dropped. Leaving the iterator early ends
        the workers.

        Raises:
            UserError: from a source or a step, for a fault that the user can mend.
        """

    def check(self) -> None:  # noqa: B027  (most need nothing)
        """Raise `UserError` if what it needs is not installed."""


def finish(task: Task, outcomes: Outcomes, folder: str) -> Done:
    """Write the part of a chunk, which is worked on as its candidates are read."""
    with storage.open_atomic(storage.join(folder, task.part)) as stream:
        kept = write_part(stream, outcomes)
    fault = first_fault(outcomes)
    return Done(task.part, task.units, outcomes.counts, kept, fault)


def first_fault(outcomes: Outcomes) -> str:
    """The first drop by a fault, in words."""
    found = next((drop for drop in outcomes.drops if drop.reason in FAULTS), None)
    return "" if found is None else f"{found.step}: {found.video}: {found.detail}"


@contextmanager
def files_in(folder: str) -> Iterator[None]:
    """Works with a run's own files: a disk that is full, or a store that is away, is for the user to mend.

    Raises:
        UserError: for whatever the folder's disk or store has against it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: {one_line(error)}") from error


def work_on(work: Work, task: Task, folder: str) -> Done:
    """A whole chunk in this process, whose networks are loaded.

    Raises:
        UserError: from a source or a step, or where the part cannot be written.
    """
    with files_in(folder), work.here(folder):
        return finish(task, work.encoded(work.through(work.steps, work.opened(task, folder))), folder)

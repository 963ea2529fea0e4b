"""Working on one machine: in this process, or in several that each load every network once."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from idc.curate.chunks import Work, died
from idc.curate.executors import Done, Executor, finish, work_on
from idc.curate.plan import PlanGoneError, Task
from idc.errors import UserError

ATTEMPTS = 2
GRACE = 5.0  # seconds for a worker at rest to end


@dataclass
class LocalExecutor(Executor):
    """On this machine.

    Attributes:
        workers: processes; 0 works in the one that calls, where a crash ends the run.
        device: where networks run; "auto" is the GPUs in turn, one a worker, or the CPU where there is none.
    """

    workers: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"workers={self.workers}: must be 0 or more")

    def run(self, work: Work, tasks: Sequence[Task], folder: str) -> Iterator[Done]:
        if not tasks:
            return
        if self.workers:
            yield from _Pool(self, work, folder).run(tasks)
            return
        work.load(work.steps, self.device_of(0))
        try:
            for task in tasks:
                yield work_on(work, task, folder)
        finally:
            for step in work.steps:
                step.unload()

    def device_of(self, worker: int) -> str:
        """The device of a worker, by its number."""
        if self.device != "auto":
            return self.device
        gpus = torch.cuda.device_count()
        return f"cuda:{worker % gpus}" if gpus else "cpu"


class _Worker:
    """A process, its end of a pipe, and the task that it is at."""

    def __init__(self, number: int, work: Work, folder: str, device: str) -> None:
        # A fork of a process that has used CUDA or threads is not safe.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imported once, and its memory shared
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, folder, device), daemon=True)
        self.process.start()
        theirs.close()
        self.number = number
        self.task: Task | None = None

    def give(self, task: Task) -> bool:
        """Give it a task; False where it is dead."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self.task = task
        return True

    def end(self) -> None:
        """One at rest frees what it holds of the system's, such as semaphores; one at work is not waited for."""
        self.connection.close()
        if self.task is None:
            self.process.join(GRACE)
        self.process.kill()
        self.process.join()


class _Pool:
    """Workers with one task each, the others waiting here: a process that dies takes its own task alone."""

    def __init__(self, executor: LocalExecutor, work: Work, folder: str) -> None:
        self._executor, self._work, self._folder = executor, work, folder
        self._attempts: dict[str, int] = {}
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> Iterator[Done]:
        waiting = deque(tasks)
        try:
            self._workers = [self._start(number) for number in range(min(self._executor.workers, len(tasks)))]
            while waiting or any(worker.task for worker in self._workers):
                for worker in self._workers:
                    if worker.task is None and waiting:
                        self._give(worker, waiting)
                busy = {worker.connection: worker for worker in self._workers if worker.task}
                for connection in wait(list(busy)):
                    done = self._hear(busy[connection], waiting)  # type: ignore[index]  # `wait` is typed for sockets, too
                    if done is not None:
                        yield done
        finally:
            for worker in self._workers:
                worker.end()

    def _start(self, number: int) -> _Worker:
        return _Worker(number, self._work, self._folder, self._executor.device_of(number))

    def _give(self, worker: _Worker, waiting: deque[Task]) -> None:
        if not worker.give(waiting[0]):  # it died at rest, or while it loaded: what it says then is heard first
            worker.task = waiting[0]
        waiting.popleft()

    def _hear(self, worker: _Worker, waiting: deque[Task]) -> Done | None:
        """What a worker says of its task; of a dead one, what becomes of its task."""
        task, worker.task = worker.task, None
        assert task is not None
        try:
            said: Any = worker.connection.recv()
        except (EOFError, OSError):
            return self._dead(worker, task, waiting)
        if isinstance(said, Exception):
            raise said
        return said

    def _dead(self, worker: _Worker, task: Task, waiting: deque[Task]) -> Done | None:
        worker.process.join()
        code = worker.process.exitcode or 0
        worker.end()
        self._workers[self._workers.index(worker)] = self._start(worker.number)
        attempt = self._attempts[task.part] = self._attempts.get(task.part, 0) + 1
        if attempt < ATTEMPTS:
            waiting.appendleft(task)
            return None
        why = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with status {code}"
        detail = f"twice, {why}; -9 is often a lack of memory" if code == -9 else f"twice, {why}"
        return finish(task, died(self._work, task, self._folder, detail), self._folder)


def _serve(connection: Connection, work: Work, folder: str, device: str) -> None:
    """A worker's life: load, then task after task, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(EOFError, OSError):  # of the connection: the parent is gone, or has no more work
        try:
            work.load(work.steps, device)
            while True:
                connection.send(work_on(work, connection.recv(), folder))
        except (EOFError, OSError, PlanGoneError):  # `load` and `work_on` make UserErrors of their own OSErrors
            return
        except UserError as error:
            connection.send(UserError(str(error)))
        except Exception:  # a fault of the kit's own: the parent shows it
            connection.send(RuntimeError(traceback.format_exc()))

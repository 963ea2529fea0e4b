"""Where rewards are computed: in the caller's thread, in threads, or in processes; what is done when they hang or die.

All three give the same breakdowns in the order of submission.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from idc.errors import UserError, counted
from idc.metrics.base import Clip, Score, reason_of
from idc.rewards.base import Reward, call, in_turn
from idc.rewards.composite import Breakdown, Composite

_LONGEST_PAUSE = 60.0


@dataclass
class Scoring:
    """Computes one sample's breakdown; a call that raises is made again. It can be pickled for another process.

    Attributes:
        composite: the rewards.
        retries: how often a call is made again.
        pause: seconds before the first of these, doubled each time up to 60.
        sleep: waits that long.
        device: where networks are loaded.
        threads: of torch within one operation, the same everywhere, as sums depend on it.
    """

    composite: Composite
    retries: int = 2
    pause: float = 1.0
    sleep: Callable[[float], None] = time.sleep
    device: str = "cpu"
    threads: int = 1

    def load(self) -> None:
        """Load all networks, in the process that calls."""
        self.composite.load(self.device)

    def __call__(self, clip: Clip) -> Breakdown:
        retried = 0

        def attempt(reward: Reward, clip: Clip) -> Score:
            nonlocal retried
            reason = ""
            for number in range(self.retries + 1):
                if number:
                    retried += 1
                    self.sleep(min(_LONGEST_PAUSE, self.pause * 2 ** (number - 1)))
                try:
                    return call(reward, clip)
                except UserError as error:
                    return Score.failed(reason_of(error))
                except Exception as error:  # of any reward: tried again, then a failure with its reason
                    reason = reason_of(error)
            return Score.failed(f"{reason} (in {counted(self.retries + 1, 'call')})")

        return replace(self.composite.breakdown(clip, attempt), retried=retried)


class Workers(ABC):
    """Takes samples and gives their breakdowns.

    Args:
        scoring: computes one of them.
        workers: how many at once.
        timeout: seconds without any result after which the samples under way are given up; None waits for ever.
    """

    def __init__(self, scoring: Scoring, workers: int, timeout: float | None) -> None:
        self.scoring, self.workers, self.timeout = scoring, workers, timeout
        self._submitted: dict[Future[Breakdown], tuple[Hashable, Clip]] = {}

    def load(self) -> None:
        """Load the networks, or see to it that they are loaded where they are needed."""
        self.scoring.load()

    def submit(self, key: Hashable, clip: Clip) -> None:
        """Start, or queue, the scoring of a sample."""
        self._submitted[self._start(clip)] = (key, clip)

    def collect(self) -> dict[Hashable, Breakdown]:
        """Wait for all that was submitted since the last time; in the order of submission.

        Raises:
            BaseException: what a fault of the kit itself raised, or `UserError` where networks cannot be loaded.
        """
        submitted, self._submitted = self._submitted, {}
        found: dict[Hashable, Breakdown] = {}
        pending = set(submitted)
        while pending:
            done, pending = wait(pending, self.timeout, FIRST_COMPLETED)
            if not done:
                done = self._give_up(pending)
                pending = pending - done
            for future in done:
                found[submitted[future][0]] = self._result(future, submitted[future][1])
        return {key: found[key] for key, _ in submitted.values()}

    def close(self) -> None:
        """Let go of threads and processes; what was submitted is dropped."""
        for future in self._submitted:
            future.cancel()
        self._submitted = {}

    @abstractmethod
    def _start(self, clip: Clip) -> Future[Breakdown]:
        """A future of the clip's breakdown."""

    def _give_up(self, pending: set[Future[Breakdown]]) -> set[Future[Breakdown]]:
        """Called when nothing came for `timeout` seconds. Returns those futures that are settled by it."""
        return pending

    def _result(self, future: Future[Breakdown], clip: Clip) -> Breakdown:
        return future.result()

    @property
    def _too_slow(self) -> str:
        return f"no score within {self.timeout:g} s"


class Inline(Workers):
    """In the caller's thread, at once. Nothing can interrupt a call, so that there is no timeout."""

    def _start(self, clip: Clip) -> Future[Breakdown]:
        future: Future[Breakdown] = Future()
        future.set_result(self.scoring(clip))
        return future


class Threads(Workers):
    """In threads of this process, while its own thread goes on. A call that hangs cannot be ended: its thread is left
    behind, its sample has no reward, and the others go to new threads. If its reward is not thread-safe it keeps the
    turn, and all others that are not wait in vain, which their reason says."""

    def __init__(self, scoring: Scoring, workers: int, timeout: float | None) -> None:
        super().__init__(scoring, workers, timeout)
        self._open()

    def _open(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Breakdown], Clip] | None] = queue.SimpleQueue()
        for number in range(self.workers):
            # Daemons, which concurrent.futures' are not: one that hangs must not keep the program from ending.
            name = f"reward-{number}"
            threading.Thread(target=_work, args=(self._queue, self.scoring), name=name, daemon=True).start()

    def _start(self, clip: Clip) -> Future[Breakdown]:
        future: Future[Breakdown] = Future()
        self._queue.put((future, clip))
        return future

    def _give_up(self, pending: set[Future[Breakdown]]) -> set[Future[Breakdown]]:
        stuck = {future for future in pending if not future.cancelled() and future.running()}
        waiting: list[tuple[Future[Breakdown], Clip]] = []
        with suppress(queue.Empty):
            while True:
                if (item := self._queue.get_nowait()) is not None:
                    waiting.append(item)
        self._end()
        self._open()
        for item in waiting:
            self._queue.put(item)
        return stuck

    def _result(self, future: Future[Breakdown], clip: Clip) -> Breakdown:
        return future.result() if future.done() else Breakdown.failed(self._too_slow)

    @property
    def _too_slow(self) -> str:
        reason, name = super()._too_slow, in_turn()
        if not name:
            return reason
        return (
            f"{reason}; {name!r} does not return, and it is not thread-safe, so that all such rewards wait for it from "
            "now on: where='pool' ends such calls"
        )

    def _end(self) -> None:
        for _ in range(self.workers):
            self._queue.put(None)

    def close(self) -> None:
        super().close()
        self._end()


def _work(tasks: queue.SimpleQueue[tuple[Future[Breakdown], Clip] | None], scoring: Scoring) -> None:
    while (item := tasks.get()) is not None:
        future, clip = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(scoring(clip))
        except BaseException as error:  # raised again by whoever collects
            future.set_exception(error)


class Pool(Workers):
    """In processes of their own, each with its own networks. When one dies or hangs, all that was under way is scored
    again one sample at a time, so that only the sample that kills or hangs is left without a reward."""

    def __init__(self, scoring: Scoring, workers: int, timeout: float | None) -> None:
        super().__init__(scoring, workers, timeout)
        self._executor: ProcessPoolExecutor | None = None
        self._alone: ProcessPoolExecutor | None = None
        self._ready: Future[Any] | None = None

    def load(self) -> None:
        """Start a process and load there; what the rewards are known to stand on then is known here, too.

        Raises:
            UserError: for networks that cannot be loaded.
        """
        self._open()
        assert self._ready is not None
        try:
            self.scoring.composite.learn(self._ready.result())
        except BrokenProcessPool:
            self._drop()
            raise UserError("rewards: a worker process dies as it loads them; where='process' shows why") from None

    def _open(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = _executor(self.scoring, self.workers)
            self._ready = self._executor.submit(_ready)
        return self._executor

    def _start(self, clip: Clip) -> Future[Breakdown]:
        try:
            return self._open().submit(_score, clip)
        except BrokenProcessPool as error:  # one died while it was idle or at work on another sample
            self._drop()
            broken: Future[Breakdown] = Future()
            broken.set_exception(error)
            return broken

    def collect(self) -> dict[Hashable, Breakdown]:
        if self._ready is not None and self._submitted:
            wait([self._ready])  # loading is no sample's time
        try:
            return super().collect()
        finally:
            if self._alone is not None:
                _kill(self._alone)
                self._alone = None

    def _give_up(self, pending: set[Future[Breakdown]]) -> set[Future[Breakdown]]:
        self._drop()
        return pending

    def _result(self, future: Future[Breakdown], clip: Clip) -> Breakdown:
        if future.done() and not future.cancelled():
            try:
                return future.result()
            except BrokenProcessPool:
                self._drop()
        return self._by_itself(clip)

    def _by_itself(self, clip: Clip) -> Breakdown:
        reason = ""
        for number in range(self.scoring.retries + 1):
            if self._alone is None:
                self._alone = _executor(self.scoring, 1)
                wait([self._alone.submit(_ready)])
            try:
                found = self._alone.submit(_score, clip).result(self.timeout)
                return replace(found, retried=found.retried + 1 + number)
            except TimeoutError:
                reason = self._too_slow
            except BrokenProcessPool:
                reason = "the worker process died"
            _kill(self._alone)
            self._alone = None
        return Breakdown.failed(f"{reason} (in {counted(self.scoring.retries + 1, 'call')})", self.scoring.retries + 1)

    def _drop(self) -> None:
        if self._executor is not None:
            _kill(self._executor)
        self._executor = self._ready = None

    def close(self) -> None:
        super().close()
        self._drop()


# Of this worker process: what scores, and why it cannot.
_loaded: Scoring | None = None
_fault: UserError | None = None


def _executor(scoring: Scoring, workers: int) -> ProcessPoolExecutor:
    # A fork of a process that has used CUDA or threads is not safe.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _initialise, (scoring,))


def _initialise(scoring: Scoring) -> None:
    global _loaded, _fault
    torch.set_num_threads(scoring.threads)
    _loaded, _fault = scoring, None
    try:
        scoring.load()
    except UserError as error:  # raised to whoever asks; an initialiser that raises breaks the pool without a word
        _fault = error


def _ready() -> Any:
    return _here().composite.facts()


def _score(clip: Clip) -> Breakdown:
    return _here()(clip)


def _here() -> Scoring:
    if _fault is not None:
        raise _fault
    assert _loaded is not None
    return _loaded


def _kill(executor: ProcessPoolExecutor) -> None:
    """End its processes, which may hang (`ProcessPoolExecutor.kill_workers`, which Python 3.14 has)."""
    processes: dict[int, Any] = getattr(executor, "_processes", None) or {}
    for process in list(processes.values()):
        process.kill()
    executor.shutdown(wait=False, cancel_futures=True)

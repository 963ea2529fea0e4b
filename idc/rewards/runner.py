"""Rewards while rollouts go on: submit a sample as soon as it is decoded, collect all of them before the update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

import torch

from idc.errors import StoppedError, UserError, counted, nearest
from idc.metrics.base import Clip
from idc.rewards.composite import Breakdown, Composite
from idc.rewards.workers import Inline, Pool, Scoring, Threads, Workers

PLACES: dict[str, type[Workers]] = {"process": Inline, "threads": Threads, "pool": Pool}
ON_FAILURE = ("drop", "stop")


class RewardRunner:
    """Computes the rewards of submitted samples and keeps count of those that have none.

    The breakdowns do not depend on where they are computed, by how many workers, or in which order.

    Args:
        composite: the rewards.
        where: "process": at once, in the caller's thread. "threads": beside the rollouts; rewards that are not
            thread-safe take turns; the place for rewards behind HTTP and for networks on the rollouts' own card.
            "pool": in processes that each load the networks, for rewards that work in Python or may crash.
        workers: threads or processes.
        retries: how often a call that raised is made again. A failed score is a verdict and is final.
        pause: seconds before the first of these, doubled each time up to 60.
        timeout: seconds without any result after which the samples under way are given up ("threads") or scored again
            one by one in a new process ("pool"); None waits for ever. It must be longer than a reward's own tries.
        on_failure: "drop": a sample without a reward leaves its group, counted; "stop": it ends the run.
        max_failure_rate: of the samples of one `collect`, the share above which the run ends all the same.

    Attributes:
        submitted, failed, retried: totals since the start, for the logs.
        sleep: waits between calls; another may be set before `load`.

    Raises:
        UserError: for a setting out of its range.
    """

    def __init__(
        self,
        composite: Composite,
        where: str = "threads",
        workers: int = 4,
        retries: int = 2,
        pause: float = 1.0,
        timeout: float | None = 600.0,
        on_failure: str = "drop",
        max_failure_rate: float = 0.5,
    ) -> None:
        for name, value, choices in (("where", where, tuple(PLACES)), ("on_failure", on_failure, ON_FAILURE)):
            if value not in choices:
                raise UserError(f"{name}={value!r}: no such choice{nearest(value, choices)}")
        for name, number, least in (("workers", workers, 1), ("retries", retries, 0)):
            if number < least:
                raise UserError(f"{name}={number}: must be at least {least}")
        if not 0 <= pause < math.inf:
            raise UserError(f"pause={pause}: must be 0 or more seconds")
        if timeout is not None and not 0 < timeout < math.inf:
            raise UserError(f"timeout={timeout}: must be positive seconds, or null to wait for ever")
        if not 0 <= max_failure_rate <= 1:
            raise UserError(f"max_failure_rate={max_failure_rate}: must lie between 0 and 1")
        self.composite, self.where, self.workers, self.timeout = composite, where, workers, timeout
        self.on_failure, self.max_failure_rate = on_failure, max_failure_rate
        self.retries, self.pause = retries, pause
        self.sleep: Callable[[float], None] = time.sleep
        self._workers: Workers | None = None
        self._keys: set[Hashable] = set()
        self.submitted = self.failed = self.retried = 0

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the networks; idempotent. Without it they are loaded on the CPU with the first sample.

        Raises:
            UserError: for weights that are missing, or a server that is not there.
        """
        if self._workers is None:
            scoring = Scoring(
                self.composite, self.retries, self.pause, self.sleep, str(device), torch.get_num_threads()
            )
            self._workers = PLACES[self.where](scoring, self.workers, self.timeout)
            self._workers.load()

    def submit(self, key: Hashable, clip: Clip) -> None:
        """Take a sample; returns at once but for where="process". Its pixels must not be changed until `collect`.

        Raises:
            UserError: for a key that is under way.
        """
        if key in self._keys:
            raise UserError(f"sample {key!r}: is submitted twice; each sample of a group has a key of its own")
        self.load()
        assert self._workers is not None
        self._workers.submit(key, clip)
        self._keys.add(key)
        self.submitted += 1

    def collect(self, check: bool = True) -> dict[Any, Breakdown]:
        """Breakdowns of all samples submitted since the last time, in that order; waits for them.

        Args:
            check: end the run after `on_failure` and `max_failure_rate` at once. Over several ranks pass False and
                call `check` with the sums over ranks, so that all of them end together.

        Raises:
            UserError: as `check` does, or where networks cannot be loaded.
        """
        if self._workers is None:
            return {}
        self._keys = set()
        found = self._workers.collect()
        failures = failed(found)
        self.failed += len(failures)
        self.retried += sum(breakdown.retried for breakdown in found.values())
        if check:
            self.check(len(failures), len(found), next(iter(failures.values()), ""))
        return found

    def check(self, failures: int, total: int, reason: str = "") -> None:
        """End the run if more samples have no reward than the recipe allows.

        Args:
            failures: of `total` samples.
            reason: of one of them.

        Raises:
            StoppedError: with the numbers, the rule and the reason.
        """
        if not failures:
            return
        found = f"rewards: {failures} of {counted(total, 'sample')} {'has' if failures == 1 else 'have'} no reward"
        why = f": {reason}" if reason else ""
        if self.on_failure == "stop":
            raise StoppedError(f"{found}{why} (on_failure='stop'; with 'drop' they leave their groups)")
        if failures > self.max_failure_rate * total:
            raise StoppedError(f"{found}, more than max_failure_rate={self.max_failure_rate:g} allows{why}")

    def close(self) -> None:
        """End threads and processes and free the networks; a sample under way is dropped. `submit` starts anew."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
            self.composite.unload()
        self._keys = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def failed(breakdowns: Mapping[Any, Breakdown]) -> dict[Any, str]:
    """Samples without a reward, by key, with the reason in one line."""
    return {key: breakdown.reason for key, breakdown in breakdowns.items() if breakdown.total is None}

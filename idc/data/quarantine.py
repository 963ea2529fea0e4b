"""Samples that could not be read: a file that lists them once each, and the rate above which a run stops."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from idc.errors import UserError


class TooManyCorruptError(UserError):
    """More samples than `max_corrupt_rate` could not be read."""


class Record(NamedTuple):
    """One line of the quarantine file."""

    id: str
    shard: str
    key: str
    reason: str
    epoch: int  # in which it was first met


class Quarantine:
    """The known-bad samples of a run, and their file: JSON lines {id, shard, key, reason, epoch}, one an id.

    Ranks and runs may share the file: a writer holds a lock, reads what others added, and appends only what is new in
    one write. A line cut by a kill is passed over. A mended sample comes back once its line is deleted.

    Args:
        path: the file; None keeps records in memory only, each rank its own.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else str(path)
        self._reasons: dict[str, str] = {}
        self._read_to = 0

    @property
    def reasons(self) -> Mapping[str, str]:
        """id -> reason of every known-bad sample."""
        return self._reasons

    def load(self) -> Quarantine:
        """Read what is new in the file, if there is one; returns self."""
        if self.path is None or not os.path.exists(self.path):
            return self
        if os.path.getsize(self.path) < self._read_to:
            self._read_to = 0  # somebody edited the file
        with open(self.path, "rb") as stream:
            stream.seek(self._read_to)
            data = stream.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._read_to += len(complete)
        for line in complete.splitlines():
            try:
                record = json.loads(line)
                self._reasons.setdefault(str(record["id"]), str(record["reason"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill: the sample will be met and recorded again
        return self

    def know(self, reasons: Mapping[str, str]) -> None:
        """Take over the records of a checkpoint."""
        for sample_id, reason in reasons.items():
            self._reasons.setdefault(sample_id, reason)

    def add(self, records: Iterable[Record]) -> None:
        """Record samples; those in the file already are left out."""
        records = list(records)
        if self.path is None or all(record.id in self._reasons for record in records):
            self.know({record.id: record.reason for record in records})
            return
        from filelock import FileLock

        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            self.load()
            new = {record.id: record for record in records if record.id not in self._reasons}
            if new:
                self._append(b"".join(json.dumps(record._asdict()).encode() + b"\n" for record in new.values()))
        self.know({record.id: record.reason for record in records})

    def _append(self, lines: bytes) -> None:
        """One write at the end, on a line of its own also after a line that a kill cut."""
        assert self.path is not None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            os.write(descriptor, lines)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class CorruptRate:
    """Counts samples asked for and samples that failed, each once, and stops the run above a rate.

    Within an epoch three standard deviations are allowed on top, or a few early failures in good data would stop a run;
    at an epoch's end the rate holds exactly.

    Args:
        samples: how many there are in all.
        maximum: failed / asked for, in [0, 1].
        minimum: failures below which the run goes on whatever the rate is.
    """

    def __init__(self, samples: int, maximum: float, minimum: int = 5) -> None:
        if not 0 <= maximum <= 1:
            raise UserError(f"max_corrupt_rate={maximum}: must be in [0, 1]; 0.01 allows one sample in a hundred")
        self._asked, self._failed = bytearray(samples), bytearray(samples)
        self._asked_count = self._failed_count = 0
        self._last_reason = ""
        self.maximum, self.minimum = maximum, minimum

    def count(self, asked: Iterable[int], failed: Mapping[int, str]) -> None:
        """Count the samples of a batch by their ref; `failed` gives reasons."""
        for ref in asked:
            self._asked_count += not self._asked[ref]
            self._asked[ref] = 1
        for ref, self._last_reason in failed.items():
            self._failed_count += not self._failed[ref]
            self._failed[ref] = 1

    def check(self, quarantine: Quarantine, epoch_ends: bool) -> None:
        """Raise `TooManyCorruptError` with the counts and the file's path where the rate is exceeded."""
        expected = self.maximum * self._asked_count
        allowed = expected if epoch_ends else expected + 3 * sqrt(expected)
        if self._failed_count >= self.minimum and self._failed_count > allowed:
            where = f"listed in {quarantine.path}" if quarantine.path else "not written to a file"
            raise TooManyCorruptError(
                f"{self._failed_count} of {self._asked_count} samples could not be read "
                f"({self._failed_count / self._asked_count:.1%}, max_corrupt_rate={self.maximum:.1%}); {where}; "
                f"the last reason: {self._last_reason}"
            )

"""Checking shards by reading and decoding everything in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from idc.data import storage
from idc.data.index import INDEX_NAME, Entry, ShardIndex, build_index
from idc.data.scan import Problem
from idc.data.shards import SampleError, read_sample
from idc.errors import UserError
from idc.types import Bucket


@dataclass
class LintReport:
    """What was checked: the problems found, and how many good samples each bucket has."""

    problems: list[Problem] = field(default_factory=list)
    buckets: Counter[Bucket] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def lint_shards(root: str | Path, on_sample: Callable[[int, int], None] | None = None) -> LintReport:
    """Scan every tar, then read and decode every sample that is, or was, in the index.

    Args:
        root: folder or fsspec URL of shards.
        on_sample: called with (samples done, samples in all), for progress.

    Raises:
        UserError: if there are no shards.
    """
    report = LintReport()
    if not storage.list_tars(root):
        raise UserError(f"{root}: no .tar shards here")
    saved: ShardIndex | None = None
    try:
        saved = ShardIndex.load(root, check_stale=False)
    except UserError as error:
        report.problems.append(Problem(INDEX_NAME, "", str(error)))
    try:
        scanned = build_index(root)
    except UserError as error:  # a member that is refused: a finding like others, but nothing more can be read
        report.problems.append(Problem("", "", str(error)))
        return report
    entries = {(entry.shard, entry.key): entry for entry in scanned.entries}
    indexed = {(entry.shard, entry.key) for entry in saved.entries} if saved else set(entries)
    # Where a sample is indexed, its entry there is what a run will read.
    entries |= {(entry.shard, entry.key): entry for entry in saved.entries} if saved else {}
    bad: dict[tuple[str, str], str] = {}
    for count, (place, entry) in enumerate(sorted(entries.items(), key=lambda item: item[0]), 1):
        reason = "not in the index" if place not in indexed else _check(root, entry)
        if reason:
            bad[place] = reason
        else:
            report.buckets[entry.bucket] += 1
        if on_sample:
            on_sample(count, len(entries))
    for problem in scanned.problems:
        bad.setdefault((problem.shard, problem.key), problem.reason)
    report.problems += [Problem(shard, key, reason) for (shard, key), reason in sorted(bad.items())]
    return report


def _check(root: str | Path, entry: Entry) -> str:
    """Why a sample cannot be used in training, or an empty string."""
    try:
        read_sample(root, entry)
        entry.bucket.check()
    except (SampleError, UserError) as error:
        return str(error)
    return ""

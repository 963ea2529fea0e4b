"""Curation from raw material to shards: through the steps in chunks, over the whole collection, into shards.

A run that ends early, in whatever way, is continued by the same call: chunks whose part is on the disk are done, all
else is done again, and what comes out is what an undisturbed run gives. What is decided over the whole collection and
the shards themselves are made anew each time; that reads no video, and runs only the networks by which
`Exclude` embeds its own list and `CrossVideoPairs` compares names.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

from idc.curate.candidate import Source, Step
from idc.curate.chunks import OPEN, Encoding, Work
from idc.curate.collection import CollectionStep
from idc.curate.decisions import decide
from idc.curate.executors import Done, Executor, files_in
from idc.curate.films import FilmSharing
from idc.curate.guard import Settings, check_shards, clean, locked
from idc.curate.local import LocalExecutor
from idc.curate.parts import Count, Part, add_counts
from idc.curate.plan import PLAN, Plan, make_plan
from idc.curate.sharing import share_networks
from idc.curate.showing import Shown
from idc.curate.survivors import Parts
from idc.curate.writing import STEP as WRITE
from idc.curate.writing import ShardWriting, Written, check_foreign, write_collection
from idc.data import storage
from idc.errors import UserError, make_folder

WORK = "work"
PHASES = ("listing", "steps", "writing")
FEW = 10  # faults below which no rate is judged


@dataclass
class CurationReport:
    """What a run has come to, with the runs before it in the same folder.

    Attributes:
        units: how many units there are.
        done_before: of these, how many earlier runs had done.
        counts: by step, collection steps included; seconds are this run's, the rest is all runs'.
        worked: by step, candidates that came to it in this run, which its seconds were spent on.
        seconds: that this run took for listing the units, working on them, and writing (with what is decided before).
        crossed: references of other videos that were not taken over, since training and held-out videos stay apart.
        written: what writing the shards reports.
    """

    units: int = 0
    done_before: int = 0
    counts: list[Count] = field(default_factory=list)
    worked: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    crossed: int = 0
    written: Written | None = None

    @property
    def kept(self) -> int:
        """Samples in the shards."""
        return self.counts[-1].kept if self.counts else 0

    @property
    def read(self) -> int:
        """Units, and what they became more than one: all that was either kept or dropped."""
        return self.counts[0].came + sum(count.made for count in self.counts) if self.counts else 0

    @property
    def dropped(self) -> int:
        """Of these, how many were dropped."""
        return sum(count.dropped for count in self.counts)


class Curation:
    """A recipe's way from sources to shards.

    Args:
        sources: where raw material comes from; their names tell them apart.
        steps: in their order; each sees what the one before it let through.
        out: folder, or fsspec URL, of the shards; with `work/` inside it, in which there is no more than a lock where
            `work` is elsewhere. Two runs at once are kept apart on local disks; behind URLs, where nothing can be
            locked, the second one notices before it writes that the first has come to its end.
        collection: steps over all survivors, in their order.
        writing: how shards are written.
        executor: where chunks are worked on.
        encoding: how clips are encoded.
        chunk: units in a chunk, on average: what a killed run does again for each worker.
        limit: at most this many units of each source; null for all.
        work: folder or URL of the parts, which all workers must reach; null for `out`/work.
        max_failure_rate: share of faults among all that is read, above which a run stops (from 10 faults on).
        retry_failed: do chunks with faults again that earlier runs finished.
        threads: of torch within one operation, in every worker.
        films_gib: GiB that films behind URLs which are taken in segments may need on each machine, where its workers
            share them: in `work`, or in the temporary folder where that is a URL, until the run ends.
        progress: show progress.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        steps: Sequence[Step],
        out: str,
        collection: Sequence[CollectionStep] = (),
        writing: ShardWriting | None = None,
        executor: Executor | None = None,
        encoding: Encoding | None = None,
        chunk: int = 16,
        limit: int | None = None,
        work: str | None = None,
        max_failure_rate: float = 0.05,
        retry_failed: bool = False,
        threads: int = 1,
        films_gib: float = 64.0,
        progress: bool = True,
    ) -> None:
        for name, value in (("chunk", chunk), ("threads", threads), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        if not 0 < films_gib < math.inf:
            raise UserError(f"films_gib={films_gib:g}: must be a number of GiB, more than 0")
        if not 0 <= max_failure_rate <= 1:
            raise UserError(f"max_failure_rate={max_failure_rate}: must be in [0, 1]")
        if not sources:
            raise UserError("sources: none is given")
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"sources: two are named {name!r}; give each a name of its own")
        self.sources, self.steps, self.collection = tuple(sources), tuple(steps), tuple(collection)
        share_networks([*self.steps, *self.collection])
        self.out, self.writing = str(out), writing or ShardWriting()
        self.executor = executor or LocalExecutor()
        self.encoding = encoding or Encoding()
        self.chunk, self.limit, self.threads = chunk, limit, threads
        self.films = int(films_gib * 2**30)
        self.folder = str(work) if work else storage.join(self.out, WORK)
        self.max_failure_rate, self.retry_failed, self.progress = max_failure_rate, retry_failed, progress

    def run(self) -> CurationReport:
        """Do all that is not done yet, and write the shards.

        Raises:
            UserError: for what the user can mend: other settings than the folder was begun with, shards of another
                recipe in it, another run at work in it, a source without material, weights that are missing, too many
                faults.
        """
        self.executor.check()
        for step in self.collection:
            step.check()
        roots = storage.join(self.out, WORK), self.folder
        for root in (self.out, *roots):
            if not storage.is_url(root):
                make_folder(Path(root), "out")
        with locked(*roots):
            self._check_out()
            clock = [time.monotonic()]
            with files_in(self.folder):
                clean(self.folder)
                settings = self._settings().keep()
            with files_in(self.folder), storage.open_atomic(storage.join(self.folder, PLAN)) as stream:
                plan = make_plan(self.sources, settings, self.chunk, self.limit, self._done(), stream)
            self._check_out(plan)
            report = CurationReport(plan.units, plan.units - plan.left)
            clock.append(time.monotonic())
            try:
                this_run = self._work(plan, self._what(settings))
            finally:
                clean(self.folder)  # of what workers left that died or were ended
            clock.append(time.monotonic())
            parts = Parts(self.folder, plan.parts)
            report.counts = parts.counts or [Count(OPEN)]
            _take_times(report, this_run)
            self._check_out(plan)
            self._finish(parts, report, plan.material)
            clock.append(time.monotonic())
            report.seconds = {name: end - start for name, (start, end) in zip(PHASES, pairwise(clock), strict=True)}
        _check_balance(report)
        return report

    def plan(self) -> Plan:
        """What a run would have to do. Writes nothing and opens no unit.

        Raises:
            UserError: as `run`.
        """
        for step in self.collection:
            step.check()
        self._check_out()
        plan = make_plan(self.sources, self._settings().compare(), self.chunk, self.limit, self._done())
        self._check_out(plan)
        return plan

    def _check_out(self, plan: Plan | None = None) -> None:
        with files_in(self.out):
            check_foreign(self.out, self.writing.prefix)
            check_shards(self.out, self.folder, self.recipe(), plan.material if plan else "")

    def _settings(self) -> Settings:
        return Settings(self.folder, self.sources, self.steps, self.encoding, self.chunk)

    def _what(self, settings: str) -> Work:
        films = FilmSharing(uuid4().hex[:12], self.films)
        return Work(self.sources, self.steps, self.encoding, settings, self.threads, films)

    def _done(self) -> set[str]:
        done = {name for name in storage.list_tars(self.folder) if name.startswith("part-")}
        return {name for name in done if not (self.retry_failed and _has_faults(storage.join(self.folder, name)))}

    def _work(self, plan: Plan, work: Work) -> list[Count]:
        """Work on what is left. Returns this run's counts."""
        counts: list[Count] = []
        with Shown("curating", self.progress, plan.left) as shown:
            for done in self.executor.run(work, plan.todo, self.folder):
                add_counts(counts, done.counts)
                shown.advance(done.units, counts)
                self._check_faults(counts, done)
        return counts

    def _check_faults(self, counts: Sequence[Count], done: Done) -> None:
        faults = sum(count.failed for count in counts)
        if not done.fault or faults < FEW:
            return
        read = counts[0].came + sum(count.made for count in counts)
        if faults > self.max_failure_rate * read:
            raise UserError(
                f"{faults} of {read} failed by a fault, more than max_failure_rate={self.max_failure_rate:g}; "
                f"the last: {done.fault}. Once that is mended, --retry_failed true does them again"
            )

    def _finish(self, parts: Parts, report: CurationReport, material: str) -> None:
        """What is decided over the whole collection, and the shards."""
        decisions = decide(parts, self.collection, self.writing.held_out)
        report.crossed = decisions.crossed
        by_step = Counter(drop.step for drop in decisions.drops.values())
        for name in dict.fromkeys([*(step.name for step in self.collection), *by_step]):
            _append(report.counts, name, by_step[name])
        with Shown("writing shards", self.progress) as shown, files_in(self.out):
            report.written = write_collection(
                parts,
                decisions,
                self.out,
                self.folder,
                self.writing,
                self.recipe(),
                parts.drops(),
                hashlib.sha256(" ".join(parts.names).encode()).hexdigest(),
                material,
                shown.so_far,
            )
        kept = sum(report.written.samples.values())
        _append(report.counts, WRITE, report.counts[-1].kept - kept)

    def recipe(self) -> dict[str, Any]:
        """All settings that decide what is in the shards, plain JSON."""
        return {
            "chunk": self.chunk,
            "encoding": asdict(self.encoding),
            "writing": asdict(self.writing),
            "sources": [dict(source.describe()) for source in self.sources],
            "steps": [dict(step.describe()) for step in self.steps],
            "collection": [dict(step.describe()) for step in self.collection],
        }


def _append(counts: list[Count], name: str, dropped: int) -> None:
    came = counts[-1].kept
    counts.append(Count(name, came, kept=came - dropped, dropped=dropped))


def _has_faults(path: str) -> bool:
    return any(count.failed for count in Part(path).counts)


def _take_times(report: CurationReport, this_run: Sequence[Count]) -> None:
    for place, count in enumerate(this_run):
        report.counts[place].seconds = count.seconds
        report.worked.append(count.came)


def _check_balance(report: CurationReport) -> None:
    """What comes to a step is kept or dropped, and what is kept comes to the next: nothing is lost without a word."""
    came = report.counts[0].came if report.counts else 0
    for count in report.counts:
        if count.came != came or count.came + count.made != count.kept + count.dropped:
            raise RuntimeError(f"counts do not add up at {count.step!r}: {count}; {came} came from before it")
        came = count.kept
    if report.written is None or not report.read == report.kept + report.dropped == report.written.read:
        raise RuntimeError(f"counts do not add up: {report.read} read, {report.kept} kept, {report.dropped} dropped")

"""The plan of a run: which chunks there are, and which of them are still to be done.

Sources are read through once, streamed. A chunk ends where a unit's own hash says so, so that a unit that is added or
taken away somewhere changes its own chunk and no other; what the other chunks came to is used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, NamedTuple

from idc.curate.candidate import Source, Unit
from idc.curate.reaching import UnreachedError
from idc.curate.records import dumps
from idc.data import storage
from idc.errors import UserError

PLAN = "plan.jsonl"  # a line for each chunk that is to be done
LONGEST = 4  # times the usual length
SEGMENT = "segment"  # in the payload of a unit that is part of a long video: number and count


class Task(NamedTuple):
    """A chunk that is to be done: the name of its part, and where its line is in the plan's file."""

    part: str
    offset: int
    size: int
    units: int


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        parts: names of all parts in the order of the units.
        todo: those that are not there yet.
        by_source: how many units each source has.
        material: a digest of all units by source and id, whatever is made of them.
    """

    parts: Sequence[str]
    todo: Sequence[Task]
    by_source: Mapping[str, int]
    material: str = ""

    @property
    def units(self) -> int:
        """How many units there are."""
        return sum(self.by_source.values())

    @property
    def left(self) -> int:
        """Units that are still to be opened."""
        return sum(task.units for task in self.todo)


def make_plan(
    sources: Sequence[Source],
    settings: str,
    chunk: int,
    limit: int | None = None,
    done: Collection[str] = (),
    stream: IO[bytes] | None = None,
) -> Plan:
    """Read the sources' units and write those of the chunks that are still to be done.

    Args:
        sources: in the order of the recipe.
        settings: digest of all that decides what comes out of a unit, but for the source's own settings.
        chunk: units in a chunk, on average.
        limit: at most this many units of each source; None for all.
        done: names of the parts that are there.
        stream: the plan's file; None where nobody will work on it.

    Raises:
        UserError: from a source, or where it gives a unit twice.
    """
    parts: list[str] = []
    todo: list[Task] = []
    known = frozenset(done)
    units = dict.fromkeys((source.name for source in sources), 0)
    offset, material = 0, hashlib.sha256()
    for found in chunks(sources, chunk, limit):
        for unit in found:
            material.update(dumps([sources[unit.source].name, unit.id]).encode() + b"\n")
        line = dumps([list(unit) for unit in found]).encode() + b"\n"
        name = part_name(settings, sources, found)
        parts.append(name)
        units[sources[found[0].source].name] += len(found)
        if name in known:
            continue
        if stream is not None:
            stream.write(line)
        todo.append(Task(name, offset, len(line), len(found)))
        offset += len(line)
    if len(set(parts)) < len(parts):
        raise UserError("a source gives the same units twice; each must come once, under an id of its own")
    return Plan(parts, todo, units, material.hexdigest())


def read_units(sources: Sequence[Source], folder: str, settings: str, task: Task) -> list[Unit]:
    """The units of a chunk.

    Raises:
        PlanGoneError: where the plan is another by now: the run that this worker belonged to is gone.
    """
    try:
        line = storage.read_range(storage.join(folder, PLAN), task.offset, task.size)
        units = [Unit(source, id, payload) for source, id, payload in json.loads(line)]
        if part_name(settings, sources, units) == task.part:
            return units
    except (FileNotFoundError, ValueError, IndexError, TypeError):
        pass
    raise PlanGoneError(f"{folder}/{PLAN} is not the plan of this run any more; is another run at work in that folder?")


class PlanGoneError(UserError):
    """Another run has made its own plan in the folder."""


def chunks(sources: Sequence[Source], chunk: int, limit: int | None = None) -> Iterator[list[Unit]]:
    """The units in consecutive chunks of one source each, of `chunk` units on average and four times that at most. A
    segment of a long video is a chunk of its own: it is work enough."""
    for number, source in enumerate(sources):
        found: list[Unit] = []
        ids: set[str] = set()
        for id, payload in islice(_units(source), limit):
            if id in ids:
                raise UserError(f"source {source.name!r}: the unit {id!r} comes twice; ids must be unique")
            if SEGMENT in payload and found:
                yield found
                found, ids = [], set()
            found.append(Unit(number, id, payload))
            ids.add(id)
            if SEGMENT in payload or len(found) >= LONGEST * chunk or _hash(source.name, id) % chunk == 0:
                yield found
                found, ids = [], set()
        if found:
            yield found


def _units(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A list that ends too early, or says another thing of a file than it did before, is no list."""
    try:
        yield from source.units()
    except UnreachedError as error:
        raise UserError(
            f"source {source.name!r} cannot be listed: {error}; once that is mended, start the same run again"
        ) from error


def part_name(settings: str, sources: Sequence[Source], units: Sequence[Unit]) -> str:
    """The part's file: a digest of the settings, of the source's own, and of the units with their payloads."""
    digest = hashlib.sha256(settings.encode())
    digest.update(dumps(sources[units[0].source].describe()).encode())
    for unit in units:
        digest.update(dumps([sources[unit.source].name, unit.id, unit.payload]).encode())
    return f"part-{digest.hexdigest()[:24]}.tar"


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:8], "big")

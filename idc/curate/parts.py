"""Parts: what became of one chunk of units, in one tar. Written once and whole, read at any place.

A part's name is a digest of the settings and of its units, so that a part that is there is done, whatever came before
or after it in the source. Members: `part.json` (version, units, counts by step), `candidates.jsonl` (a record a line,
see `records`, with the places of its blobs), `drops.jsonl`, then each candidate's clip, masks and pictures. What is
known of the candidates lies together at the beginning, so that passing over it does not read the clips. Nothing is
pickled. The bytes depend on the outcome alone.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from idc.curate.candidate import Candidate, Dropped
from idc.curate.records import decode_blob, drop_record, dumps, encode_blob, put_together, take_apart
from idc.data import storage
from idc.errors import UserError

VERSION = 1
HEADER, CANDIDATES, DROPS = "part.json", "candidates.jsonl", "drops.jsonl"
SPOOLED = 64 << 20  # bytes of blobs that are held in memory before a temporary file takes them


@dataclass
class Count:
    """What a step did to those that came to it: came + made = kept + dropped.

    Attributes:
        step: its name; "source" is the opening of units, where `came` counts units.
        came: candidates that came to it.
        made: how many more there were behind it, where one became several.
        kept, dropped: of these.
        failed: of the dropped, those by a fault instead of a rule.
        seconds: that it took; 0 in files, which must not depend on it.
    """

    step: str
    came: int = 0
    made: int = 0
    kept: int = 0
    dropped: int = 0
    failed: int = 0
    seconds: float = 0.0

    def add(self, other: Count) -> None:
        """Add another chunk's."""
        for name in ("came", "made", "kept", "dropped", "failed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def add_counts(counts: list[Count], more: Sequence[Count]) -> None:
    """Add a chunk's counts to those of others, by their places, since two steps may have one name."""
    for place, count in enumerate(more):
        if place == len(counts):
            counts.append(replace(count))
        else:
            counts[place].add(count)


@dataclass
class Outcomes:
    """What a chunk came to, or on its way between two steps where it is.

    Attributes:
        units: (source, id) of its units in order.
        counts: of the steps so far, in order; the first is "source".
        drops: in the order of the steps, and of arrival within one.
        candidates: those that are left; may be a stream, which fills `counts` and `drops` as it is read.
    """

    units: Sequence[tuple[str, str]]
    counts: list[Count] = field(default_factory=list)
    drops: list[Dropped] = field(default_factory=list)
    candidates: Iterable[Candidate] = ()


def write_part(stream: IO[bytes], outcomes: Outcomes) -> int:
    """Write a part, taking the candidates one at a time. Returns how many there were."""
    lines: list[bytes] = []
    keys: list[str] = []
    with tempfile.SpooledTemporaryFile(SPOOLED) as body:
        # Never closed, which would write the end of a tar between its members.
        tar = tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - not ended: its end blocks come with the whole
        for candidate in outcomes.candidates:
            record, blobs = take_apart(candidate)
            places = {}
            for name, value in blobs.items():
                data = encode_blob(name, value)
                start = _add(tar, f"{candidate.key}.{name}", data)
                places[name] = [start, len(data)]
            lines.append(dumps({**record, "blobs": places}).encode() + b"\n")
            keys.append(candidate.key)
        end = tar.offset
        head = {
            "version": VERSION,
            "units": outcomes.units,
            "keys": keys,
            "counts": [{**asdict(count), "seconds": 0} for count in outcomes.counts],
        }
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as whole:
            _add(whole, HEADER, dumps(head).encode() + b"\n")
            _add(whole, CANDIDATES, b"".join(lines))
            _add(whole, DROPS, b"".join(dumps(drop_record(drop)).encode() + b"\n" for drop in outcomes.drops))
            body.seek(0)
            shutil.copyfileobj(_Limited(body, end), whole.fileobj)  # type: ignore[arg-type]  # reads like a file, which is all that is used
            whole.offset += end
    return len(lines)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member; returns where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = len(data), 0o644, "idc", "idc"
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Limited:
    """The first bytes of a file."""

    def __init__(self, stream: Any, size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data


class Part:
    """A part that was written: a file, an fsspec URL, or its bytes.

    Raises:
        UserError: where it is damaged, with what mends it.
    """

    def __init__(self, source: str | bytes) -> None:
        self._source = source
        self.name = "" if isinstance(source, bytes) else source.rpartition("/")[2]
        self._places: dict[str, tuple[int, int]] = {}
        offset = 0
        for name in (HEADER, CANDIDATES, DROPS):
            try:
                info = tarfile.TarInfo.frombuf(self._read(offset, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                raise self._damaged("no tar header") from None
            if info.name != name:
                raise self._damaged(f"{info.name} in the place of {name}")
            self._places[name] = offset + tarfile.BLOCKSIZE, info.size
            offset += tarfile.BLOCKSIZE + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._body = offset
        head = next(self._records(HEADER), {})
        if head.get("version") != VERSION:
            raise self._damaged(f"version {head.get('version')} in the place of {VERSION}")
        self.units: list[tuple[str, str]] = [(source, id) for source, id in head["units"]]
        self.counts = [Count(**count) for count in head["counts"]]
        self.keys: list[str] = head["keys"]

    def __len__(self) -> int:
        """How many candidates are left."""
        return len(self.keys)

    def __iter__(self) -> Iterator[Candidate]:
        """The candidates without clips, masks and pictures."""
        for record in self._records(CANDIDATES):
            yield put_together(record, {})

    def whole(self) -> Iterator[Candidate]:
        """The candidates with all that they have, one at a time."""
        for record in self._records(CANDIDATES):
            yield self._whole(record)

    def load(self, number: int, clip: bool = True) -> Candidate:
        """One candidate, by its number from 0, with its references' images, and with `clip` its clip and masks."""
        record = self._parsed(self._lines(CANDIDATES)[number], CANDIDATES)
        if not clip:
            record["blobs"] = {name: place for name, place in record["blobs"].items() if ".ref" in name}
        return self._whole(record)

    def drops(self) -> Iterator[Dropped]:
        """What was dropped."""
        for record in self._records(DROPS):
            yield Dropped(**record)

    def outcomes(self) -> Outcomes:
        """All of it, as `write_part` was given it."""
        return Outcomes(self.units, self.counts, list(self.drops()), self.whole())

    def _records(self, member: str) -> Iterator[dict[str, Any]]:
        for line in self._lines(member):
            yield self._parsed(line, member)

    def _lines(self, member: str) -> list[bytes]:
        return self._read(*self._places[member]).split(b"\n")[:-1]

    def _parsed(self, line: bytes, member: str) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError:
            raise self._damaged(f"broken line in {member}") from None

    def _whole(self, record: dict[str, Any]) -> Candidate:
        places: dict[str, list[int]] = record["blobs"]
        if not places:
            return put_together(record, {})
        start = min(begin for begin, _ in places.values())
        end = max(begin + size for begin, size in places.values())
        data = self._read(self._body + start, end - start)
        blobs = {
            name: decode_blob(name, data[begin - start : begin - start + size])
            for name, (begin, size) in places.items()
        }
        return put_together(record, blobs)

    def _read(self, start: int, size: int) -> bytes:
        if isinstance(self._source, bytes):
            data = self._source[start : start + size]
        else:
            data = storage.read_range(self._source, start, size) if size else b""
        if len(data) < size:
            raise self._damaged(f"it ends {size - len(data)} bytes too early")
        return data

    def _damaged(self, why: str) -> UserError:
        where = "a part" if isinstance(self._source, bytes) else self._source
        return UserError(f"{where}: damaged ({why}); remove it, and the same command makes it again")

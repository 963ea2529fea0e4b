"""The index of a folder of shards: where every sample lies and which bucket it belongs to, in one `index.jsonl`.

First line: a header (version, hash, source, the shards with their sizes and times, the problems met). Then one line a
sample. A reader seeks straight to a sample's bytes, so that shuffling, resuming or skipping needs no pass over tars.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from idc.data import storage
from idc.data.scan import VIDEO_EXTS, Member, Problem, Scanned, reference_number, scan_shard
from idc.errors import UserError
from idc.types import Bucket

VERSION = 1
INDEX_NAME = "index.jsonl"
PARSED_AT_ONCE = 10_000  # lines in one call of the JSON parser, which is much faster than a call a line


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard.

    Attributes:
        source: name of the data source, the first part of `id`.
        shard: path of the tar relative to the root.
        key: the sample's key within the tar.
        layout: the members packed as "ext:offset:size,...", so that a million entries stay small; see `members`.
        bucket: frames, height, width, subjects.
        fps: frames per second.
        sha256: over the members' bytes in tar order.
        decoder: what counted the frames.
        caption_words: number of words of the caption; 0 for an empty one.
    """

    source: str
    shard: str
    key: str
    layout: str
    bucket: Bucket
    fps: float
    sha256: str
    decoder: str = ""
    caption_words: int = 0

    @property
    def id(self) -> str:
        """Unique within a mix of sources: source/shard stem/key."""
        return f"{self.source}/{self.shard.removesuffix('.tar')}/{self.key}"

    @property
    def members(self) -> tuple[Member, ...]:
        """Where the sample's files lie in the tar, in tar order."""
        parts = (part.rsplit(":", 2) for part in self.layout.split(","))
        return tuple(Member(ext, int(offset), int(size)) for ext, offset, size in parts)

    @staticmethod
    def pack(members: Iterable[Member]) -> str:
        """The `layout` of some members."""
        return ",".join(f"{ext}:{offset}:{size}" for ext, offset, size in members)


@dataclass(frozen=True)
class ShardStamp:
    """A shard as it was when indexed."""

    shard: str
    size: int
    mtime_ns: int
    samples: int


@dataclass(frozen=True)
class ShardIndex:
    """The entries of one folder of shards.

    `hash` depends on the samples alone (their bytes, places and buckets): not on where the folder lies, on the time,
    or on the source's name.
    """

    root: str
    entries: Sequence[Entry]
    hash: str
    shards: tuple[ShardStamp, ...] = ()
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def buckets(self) -> Counter[Bucket]:
        """How many samples each bucket has."""
        return Counter(entry.bucket for entry in self.entries)

    def save(self) -> str:
        """Write `index.jsonl` into the root, whole or not at all, and return its path."""
        path = storage.join(self.root, INDEX_NAME)
        header = {
            "version": VERSION,
            "hash": self.hash,
            "samples": len(self.entries),
            "source": self.entries[0].source if self.entries else "",
            "shards": [asdict(stamp) for stamp in self.shards],
            "problems": [problem._asdict() for problem in self.problems],
        }
        with storage.open_atomic(path) as stream:
            stream.write(json.dumps(header).encode() + b"\n")
            for entry in self.entries:
                stream.write(_line(entry) + b"\n")
        return path

    @classmethod
    def load(cls, root: str | Path, source: str | None = None, check_stale: bool = True) -> ShardIndex:
        """Read the index of a folder of shards.

        Args:
            root: folder or fsspec URL.
            source: name of the source in the samples' ids, if other than the one it was indexed under.
            check_stale: compare the shards' sizes and times with those that were indexed.

        Raises:
            UserError: if there is no index, it is damaged or older than the shards, with the command that mends it.
        """
        root = str(root)
        path = storage.join(root, INDEX_NAME)
        with _opened(root) as stream:
            header_line, *lines = stream.read().splitlines() or [b""]
        header = _header(path, root, header_line)
        if _hash_lines(lines) != header["hash"]:
            raise _damaged(path, root)
        shards = tuple(ShardStamp(**stamp) for stamp in header["shards"])
        if check_stale:
            check_fresh(root, shards)
        entries = list(_parse(lines, header["source"] if source is None else source))
        problems = tuple(Problem(**problem) for problem in header["problems"])
        return cls(root, entries, header["hash"], shards, problems)

    @classmethod
    def stream(cls, root: str | Path) -> tuple[ShardIndex, int, Iterator[Entry]]:
        """As `load`, for a pass over more entries than shall be held in memory.

        Returns:
            the index without its entries, their number, and the entries one after another.

        Raises:
            UserError: as `load`; where the lines do not match the hash, behind the last of them.
        """
        root = str(root)
        path = storage.join(root, INDEX_NAME)
        with _opened(root) as stream:
            header = _header(path, root, stream.readline())
        shards = tuple(ShardStamp(**stamp) for stamp in header["shards"])
        check_fresh(root, shards)
        problems = tuple(Problem(**problem) for problem in header["problems"])
        return cls(root, (), header["hash"], shards, problems), int(header["samples"]), _stream(root, header)


@contextmanager
def _opened(root: str) -> Iterator[IO[bytes]]:
    """The index file, or a `UserError` that says what to do without one."""
    path = storage.join(root, INDEX_NAME)
    try:
        with storage.open_read(path) as stream:
            yield stream
    except FileNotFoundError:
        if storage.list_tars(root):
            raise UserError(f"{root}: the shards have no {INDEX_NAME} yet; {_mend(root)}") from None
        raise UserError(f"{root}: no shards here; idc shards build makes some from videos") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error}); {_mend(root)}") from error


def _header(path: str, root: str, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}: unreadable ({error}); {_mend(root)}") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise UserError(f"{path}: not an index of version {VERSION}; {_mend(root)}")
    return header


def _stream(root: str, header: dict[str, Any]) -> Iterator[Entry]:
    path = storage.join(root, INDEX_NAME)
    digest = hashlib.sha256()
    with _opened(root) as stream:
        stream.readline()
        while lines := [line.rstrip(b"\n") for line in islice(stream, PARSED_AT_ONCE)]:
            for line in lines:
                digest.update(line + b"\n")
            try:
                yield from _parse(lines, header["source"])
            except (ValueError, KeyError, TypeError) as error:
                raise _damaged(path, root) from error
    if digest.hexdigest() != header["hash"]:
        raise _damaged(path, root)


def _mend(root: str) -> str:
    return f"run: idc shards index {root}"


def _damaged(path: str, root: str) -> UserError:
    return UserError(f"{path}: damaged, its lines do not match the hash in its header; {_mend(root)}")


def make_index(
    root: str | Path, entries: Sequence[Entry], shards: Iterable[ShardStamp], problems: Iterable[Problem] = ()
) -> ShardIndex:
    """An index over `entries`, with its hash."""
    return ShardIndex(
        str(root), entries, _hash_lines(_line(entry) for entry in entries), tuple(shards), tuple(problems)
    )


def build_index(
    root: str | Path, source: str | None = None, on_shard: Callable[[str, int], None] | None = None
) -> ShardIndex:
    """Read every tar of a folder once and return its index (call `save` to write it).

    Args:
        root: folder or fsspec URL with `.tar` shards in WebDataset's layout.
        source: name of the source in the samples' ids; the folder's name by default.
        on_shard: called with a shard's name and its number of samples, for progress.

    Raises:
        UserError: if there are no tars, or one holds a member that is refused.
    """
    name = source or str(root).rstrip("/").rsplit("/", 1)[-1]
    tars = storage.list_tars(root)
    if not tars:
        raise UserError(f"{root}: no .tar shards here")
    entries: list[Entry] = []
    stamps: list[ShardStamp] = []
    problems: list[Problem] = []
    for tar in tars:
        path = storage.join(root, tar)
        found = 0
        keys: set[str] = set()
        for item in scan_shard(path, tar):
            if isinstance(item, Problem):
                problems.append(item)
                continue
            if item.key in keys:
                raise UserError(f"{path}: the key {item.key!r} comes twice")
            keys.add(item.key)
            entry = _entry(name, tar, item, path)
            if isinstance(entry, Problem):
                problems.append(entry)
                continue
            entries.append(entry)
            found += 1
        stamps.append(ShardStamp(tar, *storage.size_and_time(path), found))
        if on_shard:
            on_shard(tar, found)
    return make_index(root, entries, stamps, problems)


def check_fresh(root: str, shards: Sequence[ShardStamp]) -> None:
    """Raise `UserError` with the command to run where shards were changed, added or removed since they were indexed."""
    mend = f"the index is out of date; run: idc shards index {root}"
    known = {stamp.shard for stamp in shards}
    present = set(storage.list_tars(root))
    if known != present:
        name = sorted(known ^ present)[0]
        raise UserError(f"{root}/{name}: {'is gone' if name in known else 'is not indexed'}: {mend}")
    for stamp in shards:
        size, mtime_ns = storage.size_and_time(storage.join(root, stamp.shard))
        if size != stamp.size:
            raise UserError(f"{root}/{stamp.shard}: {size} bytes, {stamp.size} when indexed: {mend}")
        if mtime_ns and stamp.mtime_ns and mtime_ns != stamp.mtime_ns:
            raise UserError(f"{root}/{stamp.shard}: modified since it was indexed: {mend}")


def _line(entry: Entry) -> bytes:
    frames, height, width, subjects = entry.bucket
    record = {
        "shard": entry.shard,
        "key": entry.key,
        "layout": entry.layout,
        "frames": frames,
        "height": height,
        "width": width,
        "subjects": subjects,
        "fps": entry.fps,
        "sha256": entry.sha256,
        "decoder": entry.decoder,
        "caption_words": entry.caption_words,
    }
    return json.dumps(record, separators=(",", ":")).encode()


def _hash_lines(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()


def _parse(lines: Sequence[bytes], source: str) -> list[Entry]:
    """Entries of the lines; equal buckets, shards and decoders are one object each, which keeps a million small."""
    shared: dict[Any, Any] = {}
    entries = []
    gc_was_on = gc.isenabled()
    gc.disable()  # a million new objects, none of them garbage: collections would take most of the time
    try:
        for first in range(0, len(lines), PARSED_AT_ONCE):
            for r in json.loads(b"[" + b",".join(lines[first : first + PARSED_AT_ONCE]) + b"]"):
                bucket = Bucket(r["frames"], r["height"], r["width"], r["subjects"])
                entry = Entry(
                    source,
                    shared.setdefault(r["shard"], r["shard"]),
                    r["key"],
                    r["layout"],
                    shared.setdefault(bucket, bucket),
                    r["fps"],
                    r["sha256"],
                    shared.setdefault(r["decoder"], r["decoder"]),
                    r["caption_words"],
                )
                entries.append(entry)
    finally:
        if gc_was_on:
            gc.enable()
    return entries


def _entry(source: str, shard: str, sample: Scanned, path: str) -> Entry | Problem:
    """The index entry of a scanned sample, or why it has none."""
    key, record = sample.key, sample.record
    exts = {member.ext for member in sample.members}
    videos = [member for member in sample.members if member.ext in VIDEO_EXTS]
    if len(videos) != 1:
        return Problem(shard, key, f"missing member: {len(videos)} clips (.mp4 or .webm), 1 wanted")
    if "txt" not in exts:
        return Problem(shard, key, "missing member: no caption (.txt)")
    subjects = sum(reference_number(ext) >= 0 for ext in exts)
    named = record.get("references", ())
    if isinstance(named, list) and subjects < len(named):
        return Problem(shard, key, f"missing member: {subjects} references, {len(named)} named in its .json")
    try:
        frames, height, width = (int(record[name]) for name in ("frames", "height", "width"))
        fps, decoder = float(record["fps"]), str(record.get("decoder", ""))
    except (KeyError, TypeError, ValueError):
        counted = _count(path, videos[0])
        if isinstance(counted, str):
            return Problem(shard, key, counted)
        frames, height, width, fps, decoder = counted
    bucket = Bucket(frames, height, width, subjects)
    words = len(sample.caption.split())
    return Entry(source, shard, key, Entry.pack(sample.members), bucket, fps, sample.sha256, decoder, words)


def _count(path: str, video: Member) -> tuple[int, int, int, float, str] | str:
    """Frames, height, width and rate of a clip whose JSON does not tell (shards of other tools), or what is wrong."""
    from idc.data.video import VideoError, decoder_version, probe

    try:
        info = probe(storage.read_range(path, video.offset, video.size))
    except VideoError as error:
        return f"broken {video.ext}: {error}"
    return info.frames, info.height, info.width, info.fps, decoder_version()

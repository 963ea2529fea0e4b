"""A folder of generated videos that knows what made each of them, so that a run resumes and none goes stale unnoticed.

    <out>/<id>.mp4               the videos, each there entirely or not at all
    <out>/items.jsonl            what was asked for (`idc.data.benchmark`)
    <out>/references/            reference pictures that came from shards
    <out>/records/<id>.json      a video's hash, and that of everything it was made from
    <out>/manifest.json          the settings of the newest run into the folder
    <out>/failures.jsonl         {"id", "reason"} of each item without a video; absent where there is none

A record is written before its video. A kill between the two leaves a record without its video, and the video is made
again: the same settings give the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from idc.data import storage
from idc.data.benchmark import Item, write_items
from idc.data.plan import stable_hash
from idc.errors import UserError, brief

MANIFEST, RECORDS, FAILURES = "manifest.json", "records", "failures.jsonl"
Existing = Literal["error", "replace"]


class OutputFolder:
    """The folder of one run.

    Args:
        path: where; made where it is missing.
        existing: what to do about videos that were made otherwise than this run would: refuse, or make them again.
    """

    def __init__(self, path: str | Path, existing: Existing = "error") -> None:
        self.path, self.existing = Path(path), existing
        self.settings: dict[str, Any] = {}
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Make the folder, claim it for this run, remove what an interrupted one left unfinished. Rank 0 calls it.

        Raises:
            UserError: if it cannot be written, or another run writes there.
        """
        try:
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
            # A POSIX lock dies with its process, also by kill -9.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if self._lock is None:
                raise UserError(f"out={str(self.path)!r}: cannot be written ({error.strerror})") from None
            self.close()
            raise UserError(f"out={str(self.path)!r}: another run is writing there; give each its own folder") from None
        except OSError as error:
            raise UserError(f"out={str(self.path)!r}: cannot be written ({error.strerror})") from None
        for folder in (self.path, self.path / RECORDS, self.path / "references", self.path / "sources"):
            for unfinished in folder.glob("*.tmp"):
                unfinished.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def plan(self, items: Sequence[Item], settings: Mapping[str, Any]) -> list[str]:
        """Write `items.jsonl` and the manifest; the ids whose videos are still to be made. Rank 0 calls it.

        Args:
            settings: everything that a video depends on besides its item, as plain JSON.

        Raises:
            UserError: for videos that were made otherwise, naming what differs, unless they are to be replaced.
        """
        # 8 and 8.0 are the same setting, whether it was written in a recipe or in Python.
        self.settings = json.loads(json.dumps(settings), parse_float=_number)
        todo, stale = [], []
        for item in items:
            if not self._is_done(item):
                todo.append(item.id)
                if self._is_other(item):
                    stale.append(item.id)
        if stale and self.existing == "error":
            raise UserError(
                f"out={str(self.path)!r}: {len(stale)} of {len(items)} videos there, such as {stale[0]}.mp4, were "
                f"made otherwise{self._difference()}; give another folder, or set model.init_args.existing=replace"
            )
        # First of all: a kill from here on must not leave an old video under the new settings.
        for name in stale:
            self._video(name).unlink(missing_ok=True)
        write_items(self.path, items)
        _write_json(self.path / MANIFEST, {"settings": self.settings, "items": len(items)})
        return todo

    def others(self, items: Sequence[Item]) -> list[str]:
        """Names of videos in the folder that belong to none of the items."""
        wanted = {item.id for item in items}
        return sorted(path.name for path in self.path.glob("*.mp4") if path.stem not in wanted)

    def made(self, items: Sequence[Item]) -> int:
        """How many of the items have a video, once `plan` has removed those that were made otherwise."""
        return sum(self._video(item.id).is_file() for item in items)

    def write(self, item: Item, video: bytes, seed: int, notes: Mapping[str, Any] | None = None) -> None:
        """Put one encoded video into the folder; its record says the seed of its noise, and `notes` of its making."""
        record = {"id": item.id, "seed": seed, "key": self._key(item), "sha256": hashlib.sha256(video).hexdigest()}
        _write_json(self._record(item.id), {**(notes or {}), **record})
        with storage.open_atomic(str(self._video(item.id))) as stream:
            stream.write(video)

    def write_failures(self, failures: Mapping[str, str], items: Sequence[Item]) -> None:
        """Write which items have no video and why, in their order; no file where all have one. Rank 0 calls it."""
        path = self.path / FAILURES
        if not failures:
            path.unlink(missing_ok=True)
            return
        rows = [{"id": item.id, "reason": failures[item.id]} for item in items if item.id in failures]
        with storage.open_atomic(str(path)) as stream:
            stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def _is_done(self, item: Item) -> bool:
        """Whether its video is the one that this run would write, to the byte."""
        record, video = self._read_record(item.id), self._video(item.id)
        if record.get("key") != self._key(item) or not video.is_file():
            return False
        with video.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == record.get("sha256")

    def _is_other(self, item: Item) -> bool:
        """Whether a video of that name comes from elsewhere. A record with this run's key marks a damaged one's own."""
        return self._video(item.id).is_file() and self._read_record(item.id).get("key") != self._key(item)

    def _key(self, item: Item) -> str:
        """Hash of everything that the video is made from, the files' bytes included."""
        files = [*item.references, *(file for file in (item.source, item.mask) if file is not None)]
        return stable_hash([self.settings, item.id, item.prompt, list(map(_digest, files)), item.source is not None])

    def _difference(self) -> str:
        try:
            before = json.loads((self.path / MANIFEST).read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return f" (there is no readable {MANIFEST} that would say how)"
        changes = [
            f"{name} was {brief(repr(then))}, is {brief(repr(now))}"
            for name, then, now in _changes(before, self.settings)
        ]
        return ": " + "; ".join(changes[:4]) if changes else " (another prompt or other files, under the same settings)"

    def _read_record(self, name: str) -> dict[str, Any]:
        try:
            record = json.loads(self._record(name).read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _record(self, name: str) -> Path:
        return self.path / RECORDS / f"{name}.json"

    def _video(self, name: str) -> Path:
        return self.path / f"{name}.mp4"


def _changes(before: Any, after: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, then, now) of all that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        found = [_changes(before.get(key), after.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [change for changes in found for change in changes]
    return [] if before == after else [(name, before, after)]


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return "missing"


def rewards_of(folder: Path) -> tuple[str, ...]:
    """Networks that the model of a folder's videos was rewarded by, as the manifest tells; () where it does not."""
    try:
        names = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]["model"]["rewards"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with storage.open_atomic(str(path)) as stream:
        stream.write((json.dumps(values, indent=1, sort_keys=True) + "\n").encode())

"""What weight files hold, as SHA-256 over every byte: headers or sampled blocks would pass weights that were swapped.

A file is read once and its hash is kept, in this process and, for large files, in `$XDG_CACHE_HOME/idc/hashes`
(`~/.cache/idc/hashes`), beside what the file system says of it: device, inode, size, and the times of its last change.
The inode's change time counts among them, since `cp -p` and `touch` set the other one at will. The first start on a
14B model (57 GB) therefore reads it once more than loading does, at the disk's speed or about a gigabyte a second and
thread, and leaves it in the page cache for loading; later starts look up one small record a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path

from idc.models.manifest import CHUNK_BYTES, hash_files

_PERSISTED_BYTES = CHUNK_BYTES  # smaller files take less than a tenth of a second
_SETTLED_SECONDS = 2.0  # a second write within the clock's step would leave the same times, as git knows
_known: dict[tuple[str, ...], str] = {}


def content_hash(path: Path) -> str:
    """64 hex digits of a file's content, from a record where nothing says that the file has changed.

    Raises:
        OSError: if it cannot be read.
    """
    path = path.resolve()
    state = _state(path)
    if (str(path), *state) not in _known:
        found = _persisted(path, state) if path.stat().st_size >= _PERSISTED_BYTES else _read(path)
        if not _settled(path, state):
            return found
        _known[str(path), *state] = found
    return _known[str(path), *state]


def _state(path: Path) -> list[str]:
    """What the file system says of the content, as strings: nanoseconds exceed what every JSON reader keeps."""
    stat = path.stat()
    return [str(n) for n in (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)]


def _settled(path: Path, state: list[str]) -> bool:
    """Whether the file is still as `state` says and was written long enough ago for a change to show in its times."""
    stat = path.stat()
    return _state(path) == state and time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS


def _read(path: Path) -> str:
    return hash_files(path.parent, [path.name])[path.name].sha256


def _persisted(path: Path, state: list[str]) -> str:
    """From the record on disk. Its lock lets one of a machine's ranks read the weights while the others wait."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "idc" / "hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json").open("a+")
        fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError:  # a home that cannot be written, or without locks: no record
        return _read(path)
    with stream:
        stream.seek(0)
        try:
            record = json.loads(stream.read())
            if record["state"] == state:
                return str(record["sha256"])
        except (ValueError, KeyError, TypeError):  # new, or cut short
            pass
        found = _read(path)
        if _settled(path, state):
            stream.truncate(0)
            json.dump({"path": str(path), "state": state, "sha256": found}, stream)
        return found

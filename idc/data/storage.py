"""Byte ranges and atomic files, on local disks and behind fsspec URLs (s3://, gs://, hf://, http://, memory://)."""

from __future__ import annotations

import io
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from idc.errors import UserError

_PART = re.compile(r"(.+)#(\d+)\+(\d+)", re.DOTALL)
OPEN_FILES = 64  # per process; a shard stays open while samples of it are read


def is_url(root: str | Path) -> bool:
    """Whether `root` is an fsspec URL. `pipe:` (webdataset's way to run a shell) is refused.

    Raises:
        UserError: for a `pipe:` URL.
    """
    text = str(root)
    if text.startswith("pipe:"):
        raise UserError(f"{text!r}: pipe: URLs run a shell command and are refused; give a folder or an fsspec URL")
    return "://" in text


def join(root: str | Path, name: str) -> str:
    """The path or URL of a file in `root`."""
    return f"{str(root).rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def part_path(path: str, start: int, size: int) -> str:
    """The path of a byte range of a file, such as a member of a tar; `open_read` and `size_and_time` know it."""
    return f"{path}#{start}+{size}"


def split_part(path: str) -> tuple[str, int, int] | None:
    """(file, first byte, number of bytes) of a `part_path`; None for the path of a whole file."""
    match = _PART.fullmatch(path)
    return (match[1], int(match[2]), int(match[3])) if match else None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path within it."""
    import fsspec

    return fsspec.core.url_to_fs(url)


class OpenFiles:
    """A small cache of open file descriptors, least recently used closed first; read with `os.pread`.

    Each process has its own: a descriptor inherited through a fork is dropped, not shared. A file that was replaced
    since is opened anew.
    """

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit = limit
        self._pid = os.getpid()
        self._files: OrderedDict[str, tuple[int, int]] = OrderedDict()  # path -> (inode, descriptor)

    def descriptor(self, path: str) -> int:
        """An open descriptor for `path`. Raises OSError where it cannot be opened."""
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        inode = os.stat(path).st_ino
        if path in self._files:
            known, descriptor = self._files[path]
            if known == inode:
                self._files.move_to_end(path)
                return descriptor
            os.close(self._files.pop(path)[1])
        while len(self._files) >= self._limit:
            os.close(self._files.popitem(last=False)[1][1])
        self._files[path] = inode, os.open(path, os.O_RDONLY)
        return self._files[path][1]

    def close(self) -> None:
        """Close every descriptor."""
        while self._files:
            os.close(self._files.popitem()[1][1])


_open_files = OpenFiles()


def read_range(path: str, start: int, size: int) -> bytes:
    """Up to `size` bytes from `start`: fewer where the file ends before. Raises OSError where it cannot be read."""
    if is_url(path):
        fs, inner = filesystem(path)
        return fs.cat_file(inner, start=start, end=start + size)
    descriptor = _open_files.descriptor(path)
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, start)):
        parts.append(part)
        start += len(part)
        size -= len(part)
    return b"".join(parts)


def size_and_time(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns (0 behind a URL), which tell whether an index is stale."""
    if part := split_part(path):
        return part[2], size_and_time(part[0])[1]
    if is_url(path):
        fs, inner = filesystem(path)
        return int(fs.size(inner)), 0
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def list_tars(root: str | Path) -> list[str]:
    """Names of the `.tar` files directly in `root`, sorted."""
    return [name for name in list_names(root) if name.endswith(".tar")]


def list_names(root: str | Path) -> list[str]:
    """Names of what is directly in `root`, sorted; none where there is no such folder."""
    if is_url(root):
        fs, inner = filesystem(str(root))
        if not fs.exists(inner):
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(inner, detail=False))
    return sorted(os.listdir(root)) if os.path.isdir(root) else []


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    if is_url(path):
        fs, inner = filesystem(path)
        if fs.exists(inner):
            fs.rm_file(inner)
        return
    Path(path).unlink(missing_ok=True)


def open_read(path: str) -> IO[bytes]:
    """Open a file or URL for reading bytes. A byte range of one (`part_path`) is read at once. Raises OSError."""
    if part := split_part(path):
        data = read_range(*part)
        if len(data) < part[2]:
            raise OSError(f"ends {part[2] - len(data)} bytes too early")
        return io.BytesIO(data)
    if is_url(path):
        fs, inner = filesystem(path)
        return fs.open(inner, "rb")
    return open(path, "rb")


@contextmanager
def open_atomic(path: str) -> Iterator[IO[bytes]]:
    """Open for writing under a temporary name; the file takes its own name once complete and on disk, or never."""
    if is_url(path):
        fs, inner = filesystem(path)
        temporary = f"{inner}.tmp"
        with fs.open(temporary, "wb") as stream:
            yield stream
        fs.mv(temporary, inner)
        return
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

"""Films behind URLs that are taken in segments: each machine fetches one once, for all its workers.

A run has a folder for them on each machine:

    lock               held for moments, while anything here is counted, linked or removed
    <film>.mp4         a film, under this name once all of it is there
    lock-<film>.mp4    held while it is fetched, so that others wait for it
    reader-*/          of a process while it works on a chunk:
        lock               held as long as that takes, by a living process
        <film>.mp4         a link to the film that it reads
        part               what it is fetching, from the beginning as large as it will be

A link keeps its film readable whatever becomes of the film's name, and the count of links tells which films are in use:
those stay, and who wants more room than there is waits for them. Nobody waits who holds a link, so that no two wait for
one another. Locks are the kernel's and end with their process: what a killed one leaves is found by that, and removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO
from uuid import uuid4

from idc.curate.candidate import Candidate
from idc.curate.reaching import UnreachedError, reaching
from idc.data import storage
from idc.data.video import VideoError
from idc.errors import UserError

FOLDER = "films"  # in that of the parts
SETTING = "films_gib"
LOCK, READER, PART = "lock", "reader-", "part"
COPY_BYTES = 1 << 22
LEFT = 0.02  # share of a disk that films leave to what the run writes
POLL = 0.2  # seconds between two looks for room


@dataclass(frozen=True)
class FilmSharing:
    """How the workers of a run share films; it is pickled to them.

    Attributes:
        run: names the run, so that none reads what an earlier one has fetched.
        limit: bytes that films may take on a machine.
    """

    run: str
    limit: int


def is_taken_in_segments(candidate: Candidate) -> bool:
    """Whether the candidate is, or is a shot of, one segment of a long video, which others may be at work on."""
    shots = candidate.meta.get("shots")
    return candidate.segment is not None or (isinstance(shots, Mapping) and "segment" in shots)


@contextmanager
def fetching(url: str) -> Iterator[None]:
    """As `reaching`, for what is fetched; what is not there is a VideoError."""
    try:
        with reaching(url):
            yield
    except (UserError, UnreachedError):
        raise
    except Exception as error:  # every file system behind fsspec has its own
        text = " ".join(str(error).split())
        raise VideoError(f"cannot be fetched: {type(error).__name__}: {text[:200]}") from error


@contextmanager
def sharing(folder: str, how: FilmSharing | None) -> Iterator[None]:
    """While this process works on a chunk, `shared_film` shares films with others of the run on this machine.

    Args:
        folder: of the parts: films lie in it where it is local, and in the temporary folder where it is a URL.
        how: None shares nothing.
    """
    global _current
    if how is None:
        yield
        return
    _current = Films(_base(folder) / f"{how.run}-{socket.gethostname()}", how.limit)
    try:
        yield
    finally:
        films, _current = _current, None
        films.close()


def shared_film(url: str) -> str | None:
    """A local path of a film, which is good until the chunk is done or another is asked for; a file that is opened
    before that stays open. None where films are not shared, or cannot be on this machine.

    Raises:
        VideoError: if there is no such film, or it is larger than all films together may be.
        UnreachedError: if it does not come, or not in full.
    """
    return _current.path(url) if _current else None


def remove_films(folder: str) -> None:
    """Remove the films of runs into a folder, but for those that somebody is at work on."""
    base = _base(folder)
    with suppress(OSError):
        for run in list(base.iterdir()):
            with suppress(OSError), _locked(run / LOCK):
                if not _readers(run):
                    shutil.rmtree(run)
        base.rmdir()


class Films:
    """A process's hold of the films of its machine, for the time that it works on a chunk.

    Args:
        folder: of the run on this machine.
        limit: bytes that its films may take.
        reader: names the process.
    """

    def __init__(self, folder: Path, limit: int, reader: str = "") -> None:
        self._folder, self._limit = folder, limit
        self._own = folder / f"{READER}{reader or _process()}"
        self._alive: IO[bytes] | None = None
        self._held: Path | None = None
        self._fit = True
        self._turn = threading.Lock()

    def path(self, url: str) -> str | None:
        """As `shared_film`."""
        name = hashlib.sha256(url.encode()).hexdigest()[:32] + PurePosixPath(url).suffix[:8]
        with self._turn:
            if self._held is not None and self._held.name == name and self._held.exists():
                return str(self._held)
            if not self._fit:
                return None
            try:
                self._begin()
                self._let_go()
                with _locked(self._folder / f"{LOCK}-{name}"):
                    if not self._take(name):
                        self._fetch(url, name)
            except OSError:  # a disk that is full, or knows no links or locks: this chunk does without
                self._fit = False
                return None
            self._held = self._own / name
            return str(self._held)

    def close(self) -> None:
        """Let go of what is held."""
        with self._turn:
            if self._alive is not None:
                shutil.rmtree(self._own, ignore_errors=True)
                self._alive.close()
            self._alive = self._held = None

    def _begin(self) -> None:
        if self._alive is not None:
            return
        base = self._folder.parent
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != os.getuid():  # in a temporary folder, somebody's who was there before
            raise PermissionError(f"{base} is another user's")
        with _locked(self._folder / LOCK):
            self._own.mkdir(exist_ok=True)
            self._alive = open(self._own / LOCK, "ab")  # noqa: SIM115 - held until `close`
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.link(self._own / LOCK, self._own / PART)  # told now, not after a film has been fetched in vain
            (self._own / PART).unlink()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.unlink(missing_ok=True)
            self._held = None

    def _take(self, name: str) -> bool:
        """Hold a film that is there, and note when. The time of modification stays: by it a file is known again."""
        film = self._folder / name
        with _locked(self._folder / LOCK):
            try:
                os.link(film, self._own / name)
            except FileNotFoundError:
                return False
            os.utime(film, ns=(time.time_ns(), film.stat().st_mtime_ns))
            return True

    def _fetch(self, url: str, name: str) -> None:
        """Fetch a film and hold it. Raises OSError for what the folder's disk does; as `shared_film` for the rest."""
        size = _size(url)
        if size > self._limit:
            raise VideoError(f"{size} bytes, more than {SETTING} allows ({self._limit} bytes)")
        part = self._own / PART
        while not self._reserve(part, size):
            time.sleep(POLL)
        try:
            with open(part, "r+b") as copy:
                for data in _blocks(url):
                    copy.write(data)
                    if copy.tell() > size:
                        break
                if copy.tell() != size:
                    raise UnreachedError(f"{copy.tell()} bytes came, {size} were announced")
            with _locked(self._folder / LOCK):
                os.link(part, self._own / name)
                os.replace(part, self._folder / name)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> bool:
        """Take room for a film, from those that nobody has used for the longest time; False where all are in use.

        Raises:
            OSError: where the disk has no room, whatever is removed.
        """
        with _locked(self._folder / LOCK):
            films = _films(self._folder)
            linked = [status for reader in _readers(self._folder) for status in _films(reader).values()]
            taken = {status.st_ino: status.st_size for status in (*films.values(), *linked)}
            free = _free(self._folder)
            room = min(self._limit - sum(taken.values()), free)
            for file, status in sorted(films.items(), key=lambda film: film[1].st_atime_ns):
                if room >= size:
                    break
                if status.st_nlink == 1:
                    file.unlink()
                    room, free = room + status.st_size, free + status.st_size
            if free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if room < size:
                return False
            with open(part, "wb") as reserved:
                reserved.truncate(size)
            return True


_current: Films | None = None
_token = (0, "")


def _process() -> str:
    """A name of this process: the same in all chunks, so that what is known of a film goes by its path."""
    global _token
    if _token[0] != os.getpid():
        _token = os.getpid(), f"{os.getpid()}-{uuid4().hex[:8]}"
    return _token[1]


def _base(folder: str) -> Path:
    if storage.is_url(folder):
        return Path(tempfile.gettempdir(), f"idc-films-{os.getuid()}")
    return Path(folder, FOLDER)


def _free(folder: Path) -> int:
    """Bytes that films may still take of the folder's disk: what others have reserved counts as taken, and a share of
    the disk is left to what the run writes."""
    disk = shutil.disk_usage(folder)
    parts = (reader / PART for reader in _readers(folder))
    reserved = sum(max(0, s.st_size - 512 * s.st_blocks) for part in parts if (s := _status(part)) is not None)
    return disk.free - reserved - int(LEFT * disk.total)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _films(place: Path) -> dict[Path, os.stat_result]:
    """What takes room in a folder. Readers remove what is in theirs at any time."""
    found = {}
    with suppress(FileNotFoundError):
        for file in place.iterdir():
            if not file.name.startswith((LOCK, READER)):
                with suppress(FileNotFoundError):
                    found[file] = file.stat()
    return found


def _readers(run: Path) -> list[Path]:
    """Folders of the processes that are at work; those of dead ones are removed. The run's folder is locked."""
    alive = []
    for reader in run.glob(f"{READER}*"):
        try:
            with open(reader / LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(reader, ignore_errors=True)
        except BlockingIOError:
            alive.append(reader)
        except FileNotFoundError:  # killed before it had one, or leaving
            shutil.rmtree(reader, ignore_errors=True)
    return alive


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; the file and its folder are made where they are not there, or not any more."""
    while True:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):
                yield
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name: it may have been removed while its lock was waited for."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _size(url: str) -> int:
    with fetching(url):
        return storage.size_and_time(url)[0]


def _blocks(url: str) -> Iterator[bytes]:
    with fetching(url), storage.open_read(url) as source:
        while data := source.read(COPY_BYTES):
            yield data

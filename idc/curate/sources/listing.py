"""What lies in a folder or bucket: all files below it, in one order and a folder at a time."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from idc.data import storage
from idc.data.scan import IMAGE_EXTS
from idc.errors import UserError

IMAGES = {f".{ext}" for ext in IMAGE_EXTS} | {".bmp", ".tif", ".tiff"}
NOT_VIDEOS = IMAGES | {
    ".aac",
    ".csv",
    ".flac",
    ".gz",
    ".json",
    ".jsonl",
    ".log",
    ".m4a",
    ".md",
    ".mp3",
    ".npy",
    ".ogg",
    ".part",
    ".py",
    ".srt",
    ".tar",
    ".tmp",
    ".txt",
    ".vtt",
    ".wav",
    ".yaml",
    ".yml",
    ".zip",
}
NO_SUFFIX = {"LICENCE", "LICENSE", "README", "NOTICE", "Makefile", "Thumbs.db"}


# Where listings of GCS, S3, Azure, the hub and GitHub tell one content from another, and where those of file://, SFTP,
# WebDAV, FTP, SMB and WebHDFS say when it was written; the first that is there counts.
MARKS = ("md5Hash", "ETag", "etag", "blob_id", "xet_hash", "sha")
TIMES = ("mtime", "modified", "modify", "last_write_time", "modificationTime", "modification_time")
BLOCK = 1 << 15  # bytes that are read of a local file's beginning, middle and end
READERS = 8  # threads: on a network's disk it is the waiting that takes the time
TOGETHER = 256  # files read of before the first of them is given


class File(NamedTuple):
    """A file of a folder.

    Attributes:
        path: relative to the folder, with /.
        size: in bytes; -1 where it cannot be had (a dangling link, a file removed meanwhile).
        mark: changes with the content, such as an ETag; "" where the listing has none. That of a local folder has
            none before `with_marks`.
    """

    path: str
    size: int
    mark: str = ""


def may_be_video(name: str) -> bool:
    """Whether a file's name does not say that it is something else, and is not hidden."""
    base = PurePosixPath(name)
    return not base.name.startswith(".") and base.suffix.lower() not in NOT_VIDEOS and base.name not in NO_SUFFIX


def is_image(name: str) -> bool:
    """Whether a file's name says that it is a picture, and is not hidden."""
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGES


def is_text(name: str) -> bool:
    """Whether a file's name is Unicode, and so can be written down."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def walk(root: str, leave_out: str = "", setting: str = "path") -> Iterator[list[File]]:
    """The files of each folder below `root`, it included, sorted; a folder's own files come before its folders'.

    Hidden files and folders are left out. Links to files count as files; links to folders are not followed, since they
    may lead in a circle. No more than a folder's names are held at once.

    Args:
        root: local folder, or fsspec URL.
        leave_out: a local folder below it that is not looked into (where output goes).
        setting: name of the setting that gave `root`, for errors.

    Raises:
        UserError: if there is no such folder, or one of its folders cannot be read.
    """
    try:
        if storage.is_url(root):
            fs, inner = storage.filesystem(root)
            if not fs.isdir(inner):
                raise UserError(f"{setting}={root}: no such folder")
            yield from _walk_url(fs, inner.rstrip("/"), "")
        elif os.path.isdir(root):
            yield from _walk_local(Path(root), "", Path(leave_out).resolve() if leave_out else None)
        else:
            found = "is a file, not a folder" if os.path.exists(root) else "no such folder"
            raise UserError(f"{setting}={root}: {found}")
    except UserError:
        raise
    except Exception as error:  # every file system behind fsspec has its own
        raise UserError(f"{setting}={root}: cannot be listed ({type(error).__name__}: {error})") from None


def with_marks(files: Sequence[File], root: str) -> Iterator[File]:
    """The files of a local folder with marks of their contents (`content_mark`), in order; others as they are."""
    if storage.is_url(root):
        yield from files
        return
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), TOGETHER):  # not all at once: a limit may end this early
            some = files[start : start + TOGETHER]
            marks = readers.map(content_mark, [os.path.join(root, file.path) for file in some])
            yield from (file._replace(mark=mark) for file, mark in zip(some, marks, strict=True))


def content_mark(path: str) -> str:
    """What tells a local file from others of its size: CRC-32 of its first, middle and last 32 KiB; "" where it cannot
    be read. What is nowhere else is at one of the ends of nearly any video: its index and the sizes of all its frames.
    Where all frames have one size, as in uncompressed footage, it is the picture in the middle that differs."""
    try:
        # One that is no file, such as a pipe that nobody writes to, must not be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return ""
        if hasattr(os, "posix_fadvise"):  # or as much again is read ahead
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        last = max(0, status.st_size - BLOCK)
        starts = sorted({0, last // 2, last}) if status.st_size > BLOCK else [0]
        return "-".join(f"{zlib.crc32(os.pread(descriptor, BLOCK, start)):08x}" for start in starts)
    except OSError:  # of a disk or network that fails: the worker that reads it tells
        return ""
    finally:
        os.close(descriptor)


def _walk_local(root: Path, folder: str, leave_out: Path | None) -> Iterator[list[File]]:
    files, folders = [], []
    with os.scandir(root / folder) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if leave_out is None or Path(entry.path).resolve() != leave_out:
                    folders.append(f"{folder}{entry.name}/")
            elif not _leads_to_a_folder(entry):
                try:
                    size = entry.stat().st_size
                except OSError:
                    size = -1
                files.append(File(f"{folder}{entry.name}", size))
    if files:
        yield sorted(files)
    for below in sorted(folders):
        yield from _walk_local(root, below, leave_out)


def _leads_to_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that cannot be had
        return False


def _walk_url(fs: Any, inner: str, folder: str) -> Iterator[list[File]]:
    files, folders = [], []
    place = f"{inner}/{folder}".rstrip("/")
    for entry in fs.ls(place, detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if not name or name.startswith(".") or entry["name"].strip("/") == place.strip("/"):
            continue  # the last one is a bucket's mark that there is such a folder
        if entry["type"] == "directory":
            folders.append(f"{folder}{name}/")
        else:
            mark = str(next((mark for key in (*MARKS, *TIMES) if (mark := entry.get(key))), "")).strip('"')
            files.append(File(f"{folder}{name}", -1 if entry["size"] is None else entry["size"], mark))
    if files:
        yield sorted(files)
    for below in sorted(folders):
        yield from _walk_url(fs, inner, below)

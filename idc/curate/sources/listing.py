"""What lies in a folder or bucket: all files below it, in one order and a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


# Where listings of GCS, S3, Azure, the hub and GitHub tell one content from another; the first that is there counts.
MARKS = ("md5Hash", "ETag", "etag", "blob_id", "xet_hash", "sha")


class File(NamedTuple):
    """A file of a folder.

    Attributes:
        path: relative to the folder, with /.
        size: in bytes; -1 where it cannot be had (a dangling link, a file removed meanwhile).
        mark: changes with the content, such as an ETag; "" where the listing has none, as that of a local folder.
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
            mark = next((mark for key in MARKS if isinstance(mark := entry.get(key), str) and mark), "").strip('"')
            files.append(File(f"{folder}{name}", -1 if entry["size"] is None else entry["size"], mark))
    if files:
        yield sorted(files)
    for below in sorted(folders):
        yield from _walk_url(fs, inner, below)

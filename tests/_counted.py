"""A bucket that counts how often each file is fetched whole, in all processes; and can kill who fetches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from idc.curate.sources import VideoFolder

LARGE = 1 << 20  # a read of at least that is of who fetches the whole, not of who looks at the header


class _File:
    """A local file that notes large reads beside the folder that it lies in."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed as files are
        self._path = Path(path)
        self._log = self._path.parent.with_suffix(".log")

    def read(self, size: int = -1) -> bytes:
        if size >= LARGE and self._file.tell() == 0:
            with self._log.open("a") as log:
                log.write(f"{self._path.name}\n")
        if size >= LARGE and self._path.parent.with_suffix(".kills").exists():
            size = self._path.stat().st_size // 3
            if self._file.tell() >= size:
                self._path.parent.with_suffix(".kills").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class CountedFileSystem(LocalFileSystem):
    protocol = "counted"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return _File(self._strip_protocol(path)) if mode == "rb" else super().open(path, mode, **kwargs)


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)


def fetched(folder: Path) -> list[str]:
    """Names of the files of a folder that were fetched, one for each time."""
    log = folder.with_suffix(".log")
    return log.read_text().split() if log.exists() else []


class CountedFolder(VideoFolder):
    """A folder of videos as a bucket: that this module is imported makes the bucket known to a worker."""

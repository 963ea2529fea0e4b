"""The manifest of a checkpoint: what belongs to it, how large, with which hashes. No manifest, no checkpoint.

A checkpoint directory `step-00001234/` holds `state.ckpt` (one file, or a directory of shards) and `manifest.json`,
which is written last. Whoever reads a checkpoint checks it against the manifest first: a save that was cut short, a
truncated copy and a flipped bit all end as "not a checkpoint", never as silently mixed weights.

Hashes are SHA-256 over the SHA-256 of 64 MiB chunks. Chunks are hashed by several threads and, when sharded, by the
rank that wrote the file, so that 32 GB take seconds; every byte is covered, unlike hashes of head and tail.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
STATE = "state.ckpt"
KINDS = ("file", "sharded", "deepspeed")
CHUNK_BYTES = 64 << 20
_THREADS = min(8, os.cpu_count() or 1)


class FileRecord(NamedTuple):
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        kind: "file" (single device, DDP), "sharded" (FSDP2) or "deepspeed".
        serial: counts the saves into one directory; the highest is the newest, also after a rewind to an earlier step.
        step, epoch: the optimiser steps and epochs that were completed.
        world_size, strategy, versions: how it was made.
        files: size in bytes and hash by path relative to the checkpoint directory.
    """

    kind: str
    serial: int
    step: int
    epoch: int
    world_size: int
    strategy: str
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises `ValueError` with the reason where there is no readable manifest."""
        try:
            fields: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
            files = {name: FileRecord(*record) for name, record in fields.pop("files").items()}
            manifest = cls(files=files, **fields)
        except FileNotFoundError:
            raise ValueError(f"it has no {MANIFEST}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"its {MANIFEST} is not readable ({error})") from error
        if manifest.kind not in KINDS or not manifest.files:
            raise ValueError(f"its {MANIFEST} is incomplete")
        return manifest

    def write(self, directory: Path) -> None:
        """Write and fsync, the directory entry included."""
        path = directory / MANIFEST
        with path.open("w") as stream:
            json.dump(asdict(self), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        fsync_directory(directory)

    def check(self, directory: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> None:
        """Raise `ValueError` with the reason unless all files are there with the right sizes (and hashes).

        Args:
            share: hash the files `share[0]`, `share[0] + share[1]`, ... alone: the part of one rank of several.
        """
        for name, record in self.files.items():
            path = directory / name
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if (size := path.stat().st_size) != record.size:
                raise ValueError(f"{name} has {size} bytes, the manifest says {record.size}")
        if hashes:
            found = hash_files(directory, sorted(self.files)[share[0] :: share[1]])
            for name, record in found.items():
                if record.sha256 != self.files[name].sha256:
                    raise ValueError(f"the content of {name} does not match its hash")


def read_valid(directory: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> Manifest:
    """The manifest of a checkpoint whose files match it; `ValueError` with the reason otherwise. See `check`."""
    manifest = Manifest.read(directory)
    manifest.check(directory, hashes=hashes, share=share)
    return manifest


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and hash of each file, paths relative to `directory`."""
    records = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name in names:
            path = directory / name
            size = path.stat().st_size
            offsets = range(0, size, CHUNK_BYTES)
            digests = pool.map(_chunk_digest, [path] * len(offsets), offsets)
            records[name] = FileRecord(size, hashlib.sha256(b"".join(digests)).hexdigest())
    return records


def _chunk_digest(path: Path, offset: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return hashlib.sha256(stream.read(CHUNK_BYTES)).digest()


def list_files(directory: Path) -> list[str]:
    """All files below `directory` by relative path, the manifest left out."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in paths if path.name != MANIFEST)


def fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_directory(directory: Path) -> None:
    """Make renames and new entries of a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

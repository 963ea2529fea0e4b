"""Scanning the samples of a tar, for the index. Tars are untrusted: an allow-list of members, nothing unpacked or run.

What is hostile is refused with an error (a pickle, a link, a path outside the folder). What is merely broken is left
out of the index and reported (a truncated tar, a sample without its clip), never lost in silence.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from idc.data import storage
from idc.errors import UserError

ALLOWED = ("mp4", "webm", "json", "txt", "jpg", "jpeg", "png", "webp", "npy", "safetensors")
VIDEO_EXTS = ("mp4", "webm")
IMAGE_EXTS = ("jpg", "jpeg", "png", "webp")
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "bin", "joblib", "dill")


class Member(NamedTuple):
    """One file of a sample within its tar: extension (all after the key's dot), offset of its bytes, and its size."""

    ext: str
    offset: int
    size: int


class Problem(NamedTuple):
    """Something in a shard that is not in the index, and why. `key` is empty where it concerns the whole shard."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Scanned:
    """One sample as it lies in a tar: `sha256` is over its members' bytes in tar order, `record` its JSON."""

    key: str
    members: tuple[Member, ...]
    sha256: str
    record: dict[str, Any]
    caption: str


def scan_shard(path: str, shard: str) -> Iterator[Scanned | Problem]:
    """Yield the samples of the tar at `path`, in order; where it is damaged, a `Problem` ends them.

    Raises:
        UserError: for a member that is refused.
    """
    group: _Group | None = None
    with storage.open_read(path) as stream:
        try:
            for info in _walk(stream):
                _check_member(path, info)
                key, ext = split_name(info.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group.finish()
                    group = _Group(key)
                if any(member.ext == ext for member in group.members):
                    raise UserError(f"{path}: the member {info.name!r} comes twice")
                group.whole = False
                stream.seek(info.offset_data)
                data = _read(stream, info.size, group.digest, keep=ext in ("json", "txt"))
                group.add(Member(ext, info.offset_data, info.size), data)
        except (tarfile.TarError, EOFError, OSError) as error:
            # Between two members, the sample before is whole if it has all that its JSON names, which the index checks;
            # within a member, or without a JSON to tell, it is lost.
            key = group.key if group else ""
            if group is not None and group.whole and "references" in group.record:
                yield group.finish()
                key = ""
            yield Problem(shard, key, f"truncated or damaged tar: {error}")
            return
    if group is not None:
        yield group.finish()


class _Group:
    """The sample being read: consecutive members with one key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.members: list[Member] = []
        self.digest = hashlib.sha256()
        self.record: dict[str, Any] = {}
        self.caption = ""
        self.whole = True  # no member is half read

    def add(self, member: Member, data: bytes) -> None:
        self.whole = True
        self.members.append(member)
        if member.ext == "json":
            self.record = _record(data)
        elif member.ext == "txt":
            self.caption = data.decode("utf-8", "replace").strip()

    def finish(self) -> Scanned:
        return Scanned(self.key, tuple(self.members), self.digest.hexdigest(), self.record, self.caption)


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of its last part, the rest is the extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, ext = base.partition(".")
    return folder + slash + stem, ext


def is_clip(ext: str) -> bool:
    """Whether an extension is that of a clip: "mp4", or "loser.mp4" of a preference pair."""
    return ext.rsplit(".", 1)[-1] in VIDEO_EXTS


def reference_number(ext: str) -> int:
    """k of the extension "refk.png" of a subject's picture, or -1 for any other member."""
    match = re.fullmatch(r"ref(\d+)\.(\w+)", ext)
    return int(match[1]) if match and match[2] in IMAGE_EXTS else -1


def _walk(stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar. Unlike tarfile, damage and a missing end are errors, not a quiet end."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            yield info
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has seen
        end = tar.offset
    stream.seek(end)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise EOFError(f"ends at byte {end} without an end-of-archive mark")
    if block.strip(b"\0"):
        raise EOFError(f"no readable header at byte {end}")


def _check_member(path: str, info: tarfile.TarInfo) -> None:
    name = info.name
    if not info.isfile():
        raise UserError(f"{path}: member {name!r} is a link, folder or device; shards hold plain files only")
    if name.startswith(("/", "pipe:")) or "\\" in name or ".." in name.split("/"):
        raise UserError(f"{path}: member path {name!r} leads outside the shard; refused")
    key, ext = split_name(name)
    last = ext.rsplit(".", 1)[-1].lower()
    if last in PICKLES:
        raise UserError(f"{path}: member {name!r} may hold a pickle, which can run code; refused")
    if not key or last not in ALLOWED or any(c in ext for c in ",:"):
        raise UserError(f"{path}: member {name!r} is of a kind that is not allowed; allowed: {', '.join(ALLOWED)}")


def _read(stream: IO[bytes], size: int, digest: Any, keep: bool) -> bytes:
    kept = []
    while size:
        part = stream.read(min(size, 1 << 20))
        if not part:
            raise EOFError(f"{size} bytes are missing at the end")
        digest.update(part)
        size -= len(part)
        if keep:
            kept.append(part)
    return b"".join(kept)


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}

"""Small shards for the tests, well-formed or not."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from idc.data.index import ShardIndex
from idc.data.shards import ShardWriter
from idc.data.video import encode_video

FRAMES, SIDE = 5, 32


def picture(colour: str, size=(16, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def clip(number: int, frames: int = FRAMES, side: int = SIDE) -> bytes:
    return encode_video(np.full((frames, side, side, 3), 10 * (number % 25), np.uint8), 16, pixel_format="yuv444p")


def write_shards(root: Path, count: int = 7, per_shard: int = 3) -> list[str]:
    """Sample i has i % 3 references and a clip of grey level 10 i (modulo 250)."""
    with ShardWriter(root, "toy", per_shard) as writer:
        for i in range(count):
            writer.write(
                f"sample{i}",
                clip(i),
                f"number {i}, café",
                [("a red man", picture("red"), "png"), ("a dog", picture("blue", kind="WEBP"), "webp")][: i % 3],
                fps=16,
                frames=FRAMES,
                height=SIDE,
                width=SIDE,
                source="made here",
                licence="CC0-1.0",
                meta={"toy": {"number": i}},
            )
    return writer.shards


def write_tar(path: Path, members: list[tuple[str, bytes]], **changes) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))


def whole(key: str = "a") -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", clip(1)), (f"{key}.txt", b"words")]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def corrupt(root: Path) -> dict[str, str]:
    """Damage four samples in four ways after indexing; returns id -> what its reason must say.

    The index stands in `root` and has two shards, the first of 34 samples or more.
    """
    index = ShardIndex.load(root, source="toy", check_stale=False)
    last_shard = index.entries[-1].shard
    inside = [entry for entry in index.entries if entry.shard != last_shard]
    broken, missing, wrong = inside[3], inside[20], inside[33]
    data = bytearray((root / inside[0].shard).read_bytes())
    mp4 = next(member for member in broken.members if member.ext == "mp4")
    data[mp4.offset : mp4.offset + mp4.size] = bytes(mp4.size)  # broken mp4
    json_member = next(member for member in missing.members if member.ext == "json")
    data[json_member.offset - 512 : json_member.offset] = bytes(512)  # missing member: its header is gone
    text = next(member for member in wrong.members if member.ext == "txt")
    header = tarfile.TarInfo(f"{wrong.key}.txt")
    header.size = text.size + 1  # wrong size
    data[text.offset - 512 : text.offset] = header.tobuf()
    (root / inside[0].shard).write_bytes(data)
    tail = index.entries[-1]
    end = max(member.offset + member.size for member in tail.members)
    with open(root / last_shard, "r+b") as stream:
        stream.truncate(end - 10)  # truncated tar
    return {broken.id: "broken", missing.id: "missing member", wrong.id: "wrong size", tail.id: "truncated"}


def restamp(root: Path) -> None:
    """Give the index the shards' present sizes and times, as if the damage had come after the check of them."""
    index = ShardIndex.load(root, check_stale=False)
    stamps = []
    for stamp in index.shards:
        state = (root / stamp.shard).stat()
        stamps.append(replace(stamp, size=state.st_size, mtime_ns=state.st_mtime_ns))
    replace(index, shards=tuple(stamps)).save()

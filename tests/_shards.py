"""Small shards for the tests, well-formed or not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from idc.data.shards import ShardWriter
from idc.data.video import encode_video

FRAMES, SIDE = 5, 32


def picture(colour: str, size=(16, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def clip(number: int, frames: int = FRAMES, side: int = SIDE) -> bytes:
    return encode_video(np.full((frames, side, side, 3), 10 * number, np.uint8), 16, pixel_format="yuv444p")


def write_shards(root: Path, count: int = 7, per_shard: int = 3) -> list[str]:
    """Sample i has i % 3 references and a clip of grey level 10 i."""
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

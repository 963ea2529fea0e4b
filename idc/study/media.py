"""Pictures and videos made anonymous: decoded and encoded anew, alike for every system.

A copy would still tell systems apart, by the container's tags, the encoder's settings in the bit stream, EXIF or sound.
Only pixels and timing go through; every phone plays what comes out (H.264, 4:2:0, faststart).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from idc.data.video import VideoInfo, iterate_video, probe, resample_ranks

CRF = 14
SMALL = 256  # shorter sides below this are enlarged by whole factors: 4:2:0 and the browser's scaling smear tiny clips
REFERENCE_SIDE = 640
CORRUPT_ROWS = 10


@dataclass(frozen=True)
class Media:
    """A file of the page: its random name and its size in pixels."""

    file: str
    width: int
    height: int


def anonymise_video(source: Path, target: Path, height: int = 0) -> Media:
    """Encode the pictures of `source` anew as an H.264 MP4 without sound and tags, at a constant rate.

    Args:
        height: of the copy in pixels, for systems that differ in size; 0 keeps the size, except that videos with a
            side below 256 pixels are enlarged by a whole factor.

    Raises:
        VideoError: if the source cannot be decoded.
    """
    info = probe(source)
    return _encode(_at_constant_rate(source, info), info, target, height)


def corrupt_video(source: Path, target: Path, height: int = 0, seed: int = 0) -> Media:
    """A copy that anyone attentive finds worse by all four criteria: about 10 rows of blocks, colours turned into their
    negative, and the frames in random order. Size, length and rate are those that `anonymise_video` gives."""
    info = probe(source)
    # The frames are kept at the size of the blocks, so that a long video fits in memory.
    tiny = [_blocks(frame) for frame in _at_constant_rate(source, info)]
    random.Random(seed).shuffle(tiny)
    full = (_enlarge(frame, info.height, info.width) for frame in tiny)
    return _encode(full, info, target, height)


def anonymise_picture(source: Path, target: Path) -> Media:
    """A JPEG of a reference picture, upright, at most 640 pixels a side, transparency on white, without any tags.

    Raises:
        OSError: if the file is no picture.
    """
    from PIL import Image, ImageOps

    with Image.open(source) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    page.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE))
    page.convert("RGB").save(target, "JPEG", quality=90)
    return Media(target.name, *page.size)


def _at_constant_rate(source: Path, info: VideoInfo) -> Iterator[np.ndarray]:
    """Frames at the video's mean rate: variable-rate clips repeat or leave out some, others are unchanged."""
    if not info.times or info.fps <= 0:
        yield from iterate_video(source)
        return
    ranks = iter(resample_ranks(info.times, info.fps))
    wanted = next(ranks, None)
    for rank, frame in enumerate(iterate_video(source)):
        while wanted == rank:
            yield frame
            wanted = next(ranks, None)


def _encode(frames: Iterator[np.ndarray], info: VideoInfo, target: Path, height: int) -> Media:
    import av

    width, height = shown_size(info.width, info.height, height)
    method = "POINT" if not width % info.width and not height % info.height else "LANCZOS"
    rate = Fraction(info.fps if info.fps > 0 else 16).limit_denominator(1001)
    options = {"crf": str(CRF), "preset": "medium", "x264-params": "mbtree=0"}
    container_options = {"movflags": "+faststart"}
    with av.open(str(target), "w", format="mp4", container_options=container_options) as container:
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # equal bytes on every machine; videos are encoded side by side
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p", interpolation=method)))
        container.mux(stream.encode())
    return Media(target.name, width, height)


def shown_size(width: int, height: int, wanted_height: int = 0) -> tuple[int, int]:
    """(width, height) of the copy, both even, as 4:2:0 needs; in proportion up to a pixel."""
    if wanted_height:
        return max(2, round(width * wanted_height / height / 2) * 2), max(2, wanted_height // 2 * 2)
    factor = -(-SMALL // min(width, height))
    return max(2, width * factor // 2 * 2), max(2, height * factor // 2 * 2)


def _blocks(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    rows = min(CORRUPT_ROWS, height)
    columns = min(width, max(1, round(rows * width / height)))
    y, x = (np.linspace(0, side - 1, count).astype(int) for side, count in ((height, rows), (width, columns)))
    return 255 - frame[np.ix_(y, x)]


def _enlarge(blocks: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = blocks.shape[:2]
    return blocks[np.ix_(np.arange(height) * rows // height, np.arange(width) * columns // width)]

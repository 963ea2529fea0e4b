"""How steps look at the source of a candidate: a few frames, all frames of a span, frames of the cut clip.

Everything goes by ranks of the source's frames, upright, cropped as the candidate says. A still image is a video of one
frame. No more than what was asked for is ever in memory, and a few frames of a film are sought, not decoded up to. What
was found out about a file (its frames' times) is kept for the last files of `KNOWN_FRAMES` together, since a chunk's
steps all ask again, and each of a whole batch before the next does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from idc.curate.candidate import Box, Candidate, Pixels, decode_image
from idc.curate.films import fetching, is_taken_in_segments, shared_film
from idc.data import storage
from idc.data.video import VideoError, VideoInfo, iterate_video, pick_frames, probe
from idc.errors import UserError

CACHE_BYTES = 16 << 30  # of fetched files, per process; a larger file is not fetched
CACHE_SETTING = "IDC_SOURCE_CACHE_GB"
COPY_BYTES = 1 << 22
KNOWN_FRAMES = 1 << 21  # whose times are kept, some 32 bytes each: of ten films of two hours, or all clips of a chunk
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*")


class SourceInfo(NamedTuple):
    """A source that lies on this machine.

    Attributes:
        path: local file.
        video: what it holds; a still image has one frame, at time 0, and a rate of 0.
        is_image: whether it is a still image.
    """

    path: str
    video: VideoInfo
    is_image: bool


def open_source(candidate: Candidate) -> str:
    """A local path of the candidate's file: its own, or that of a copy fetched from its URL or out of a shard.

    Copies live in a temporary folder of this process, the least recently used ones go first (limit: 16 GiB, or
    IDC_SOURCE_CACHE_GB in the environment); those of films that are taken in segments where all workers of a machine
    share them (`idc.curate.films`).

    Raises:
        VideoError: if there is no such file, or it is too large to be fetched.
        UnreachedError: if it cannot be fetched now.
        UserError: for a `pipe:` URL.
    """
    if not storage.is_url(candidate.path) and not storage.split_part(candidate.path):
        if not os.path.isfile(candidate.path):
            raise VideoError("no such file")
        return candidate.path
    if is_taken_in_segments(candidate) and (film := shared_film(candidate.path)):
        return film
    return _fetched.path(candidate.path)


def inspect(candidate: Candidate) -> SourceInfo:
    """Frames, times, rate and size of the candidate's whole source, before its span and crop.

    Raises:
        VideoError: if it can be read neither as a video nor as an image.
    """
    path = open_source(candidate)
    status = os.stat(path)
    return _known.of(path, status.st_size, status.st_mtime_ns)


def frame_times(info: VideoInfo) -> NDArray[np.float64]:
    """Time of each frame in seconds; at the mean rate where the file carries no timestamps, 25 where not even that."""
    return np.array(info.times) if info.times else np.arange(info.frames) / (info.fps or 25.0)


def span_of(candidate: Candidate) -> tuple[int, int]:
    """[first, end) ranks of the candidate, `end` never past the source's last frame; without a span those of its
    segment, or all.

    Raises:
        VideoError: for a source that cannot be read, or a span with no frame of it.
    """
    frames = inspect(candidate).video.frames
    first, end = candidate.span or (candidate.segment.span(frames) if candidate.segment else (0, frames))
    first, end = max(first, 0), min(end, frames)
    if first >= end:
        what = f"span {candidate.span}" if candidate.span else f"segment {candidate.segment}"
        raise VideoError(f"{what} holds none of its {frames} frames")
    return first, end


def window_ranks(candidate: Candidate) -> Sequence[int]:
    """Rank of the source's frame for each frame of the clip; before its rate is decided, for each of the span."""
    return candidate.ranks or range(*span_of(candidate))


def counted_ranks(candidate: Candidate) -> Sequence[int]:
    """Rank of the source's frame for each number that a subject's `frame` may have: those of the clip once they are
    chosen, those of the span before, and without one all of the source's."""
    return candidate.ranks or range(*(candidate.span or (0, inspect(candidate).video.frames)))


def crop_of(candidate: Candidate, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the candidate's crop in whole pixels of the source's `height` x `width` picture.

    Raises:
        VideoError: for a crop that lies outside of the picture.
    """
    if candidate.crop is None:
        return 0, 0, width, height
    left, top, right, bottom = map(round, candidate.crop)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if left >= right or top >= bottom:
        raise VideoError(f"crop {tuple(candidate.crop)} lies outside of {width}x{height} pixels")
    return left, top, right, bottom


def size_of(candidate: Candidate) -> tuple[int, int]:
    """(height, width) of what `look` and `stream` give."""
    info = inspect(candidate).video
    left, top, right, bottom = crop_of(candidate, info.height, info.width)
    return bottom - top, right - left


def look(candidate: Candidate, ranks: Sequence[int]) -> Pixels:
    """Source frames of rising ranks (repeats allowed), RGB uint8 `[len(ranks), H, W, 3]`, upright and cropped.

    Raises:
        VideoError: where a frame cannot be read, or the size changes between them.
        UserError: for ranks that do not rise.
    """
    pictures = [frame for _, frame in pick(candidate, ranks)]
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError("the frame size changes within the clip")
    return np.stack(pictures)


def stream(candidate: Candidate, every: int = 1) -> Iterator[tuple[int, Pixels]]:
    """(rank, frame) of each `every`-th frame of the candidate's span from its first on, one at a time, cropped.

    Raises:
        VideoError: where a frame cannot be read or the file ends before the span does.
    """
    if every < 1:
        raise UserError(f"every={every}: must be 1 or more")
    first, end = span_of(candidate)
    yield from pick(candidate, range(first, end, every))


def clip_frames(candidate: Candidate, n: int | None) -> tuple[NDArray[np.int64], Pixels]:
    """`n` frames over the clip, chosen as the metrics do, and their numbers within it, from 0 (all where n is None).

    They are the cut clip's own once there is one. Before that they are the source's frames, cropped, which the clip
    will show, or, before its rate is decided, those of the span: boxes found on them are in pixels of the cropped
    source until `Cut` maps them.

    Returns:
        numbers `[n]`, rising; pixels `[n, H, W, 3]`.
    """
    from idc.metrics.base import sample_frames

    if candidate.clip is not None:
        numbers = sample_frames(len(candidate.clip), n)
        return numbers, candidate.clip[numbers]
    ranks = window_ranks(candidate)
    numbers = sample_frames(len(ranks), n)
    return numbers, look(candidate, [ranks[number] for number in numbers])


def clip_box(candidate: Candidate, box: Box) -> Box:
    """A box in pixels of the source's upright picture, in pixels of what `look` gives: moved by the crop."""
    left, top = (max(round(side), 0) for side in (candidate.crop or Box(0, 0, 0, 0))[:2])
    return Box(box.left - left, box.top - top, box.right - left, box.bottom - top)


def source_corners(candidate: Candidate, box: Box) -> Box:
    """`clip_box` undone: a box in pixels of what `look` gives, in pixels of the source's upright picture."""
    left, top = (max(round(side), 0) for side in (candidate.crop or Box(0, 0, 0, 0))[:2])
    return Box(box.left + left, box.top + top, box.right + left, box.bottom + top)


def pick(candidate: Candidate, ranks: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
    """(rank, frame) for each of the rising ranks, as `look` gives them, one at a time.

    Raises:
        VideoError: where a frame cannot be read.
    """
    source = inspect(candidate)
    if source.is_image:
        picture = decode_image(Path(source.path).read_bytes())
        if len(ranks) and ranks[-1] > 0:
            raise VideoError(f"frame {ranks[-1]} wanted of a still image")
        pictures: Iterator[Any] = iter([picture] * len(ranks))
    elif isinstance(ranks, range) and ranks.step == 1:
        pictures = iterate_video(source.path, ranks.start, info=source.video)
    else:
        pictures = pick_frames(source.path, ranks, source.video)
    given = 0
    for rank, picture in zip(ranks, pictures, strict=False):
        left, top, right, bottom = crop_of(candidate, *picture.shape[:2])
        yield rank, np.ascontiguousarray(picture[top:bottom, left:right])
        given += 1
    if given < len(ranks):
        raise VideoError(f"ends before frame {ranks[given]} of {ranks[-1] + 1}")


class _Known:
    """What is known of the files that were looked at last, of at most `most` frames together, or of one file."""

    def __init__(self, most: int) -> None:
        self._most, self._frames = most, 0
        self._infos: OrderedDict[tuple[str, int, int], SourceInfo] = OrderedDict()
        self._turn = threading.Lock()

    def of(self, path: str, size: int, time: int) -> SourceInfo:
        """Of the file that has that size and time of modification.

        Raises:
            VideoError: if it can be read neither as a video nor as an image.
        """
        file = path, size, time
        with self._turn:
            if file in self._infos:
                self._infos.move_to_end(file)
                return self._infos[file]
        info = _look_at(path, size)
        with self._turn:
            if file not in self._infos:
                self._infos[file] = info
                self._frames += info.video.frames
            while self._frames > self._most and len(self._infos) > 1:
                self._frames -= self._infos.popitem(last=False)[1].video.frames
        return info


_known = _Known(KNOWN_FRAMES)


def _look_at(path: str, size: int) -> SourceInfo:
    if not size:
        raise VideoError("the file is empty")
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        height, width = decode_image(Path(path).read_bytes()).shape[:2]
        return SourceInfo(path, VideoInfo(1, 0.0, height, width, (0.0,), (0,)), True)
    return SourceInfo(path, probe(path), False)


class _Fetched:
    """Files fetched from URLs, in a temporary folder of this process, least recently used ones removed first.

    The folder is locked while its process lives: what killed ones left is removed by the next one that fetches.
    """

    def __init__(self) -> None:
        self._pid = -1
        self._folder = Path()
        self._lock: Any = None
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def path(self, url: str) -> str:
        limit = int(float(os.environ.get(CACHE_SETTING) or CACHE_BYTES / 2**30) * 2**30)
        self._begin()
        target = self._target(url)
        if url in self._sizes and target.exists():
            self._sizes.move_to_end(url)
            return str(target)
        with fetching(url):
            size = storage.size_and_time(url)[0]
        if size > limit:
            raise VideoError(f"{size} bytes, more than {CACHE_SETTING} allows ({limit} bytes)")
        self._make_room(limit - size)
        with fetching(url), storage.open_read(url) as source, storage.open_atomic(str(target)) as copy:
            shutil.copyfileobj(source, copy, COPY_BYTES)
        self._sizes[url] = target.stat().st_size
        return str(target)

    def _make_room(self, room: int) -> None:
        while self._sizes and sum(self._sizes.values()) > room:
            url, _ = self._sizes.popitem(last=False)
            self._target(url).unlink(missing_ok=True)

    def _target(self, url: str) -> Path:
        return self._folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + Path(url).suffix[:8])

    def _begin(self) -> None:
        """This process's folder; a fork begins its own."""
        if self._pid == os.getpid():
            return
        base = Path(tempfile.gettempdir())
        for old in base.glob(f"idc-sources-{os.getuid()}-*"):
            _remove_if_left(old)
        self._folder = Path(tempfile.mkdtemp(prefix=f"idc-sources-{os.getuid()}-", dir=base))
        self._lock = open(self._folder / "lock", "wb")  # noqa: SIM115 - held for the process's life
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._sizes.clear()
        self._pid = os.getpid()


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of fetched files whose process has ended."""
    try:
        with open(folder / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # in use, of somebody else, or removed by another process at this moment


_fetched = _Fetched()

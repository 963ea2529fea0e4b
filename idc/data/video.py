"""Frame-exact reading and writing of video files with PyAV: RGB uint8 arrays `[T, H, W, 3]` in and out.

A frame is addressed by its rank in presentation order, found from the packets' own timestamps. Nothing is estimated
from rate x duration, because containers state both wrongly for variable-rate clips.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from idc.errors import UserError, nearest

VideoSource = bytes | str | Path

PIXEL_FORMATS = ("yuv420p", "yuv444p")
SMALL = 256  # pixels of a side below which halved chroma shows
NEAR = 16  # frames that are decoded rather than sought past


class VideoError(Exception):
    """A file that is no video, is broken or holds fewer frames than asked for. The message is a short reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, counted packet by packet.

    Attributes:
        frames: the number of frames shown.
        fps: mean rate, (frames - 1) / (last time - first time); the container's own for a single frame.
        height, width: in pixels, as displayed (after the rotation that phones write).
        times: presentation time of each frame in seconds, rising; empty where the stream carries no timestamps.
        keys: ranks of the frames that decoding can begin at, rising; empty without timestamps.
        truncated: what the header promises and the file does not hold, such as "40 of 100 frames"; "" if nothing.
    """

    frames: int
    fps: float
    height: int
    width: int
    times: tuple[float, ...]
    keys: tuple[int, ...] = ()
    truncated: str = ""


@cache
def decoder_version() -> str:
    """Which decoder the frame counts come from, for the index: "PyAV 18.1.0, libavcodec 62.28.102"."""
    import av

    return f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


def probe(source: VideoSource) -> VideoInfo:
    """Count frames and read the size and times of a video file without decoding more than its first frame.

    Raises:
        VideoError: if the file cannot be opened or has no video.
    """
    with _Reader(source) as reader:
        pts, keys, truncated = reader.packets()
        first = next(reader.frames(), None)
        if first is None:
            raise VideoError("no frame can be decoded")
        height, width = reader.picture(first).shape[:2]
        stream = reader.stream
        times: tuple[float, ...] = ()
        if isinstance(pts, int):
            count = pts
        else:
            count, times = len(pts), tuple(float(p * stream.time_base) for p in pts)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if count > 1 and times and times[-1] > times[0]:
            rate = (count - 1) / (times[-1] - times[0])
        return VideoInfo(count, rate, height, width, times, tuple(keys), truncated)


def stated_seconds(source: IO[bytes] | str) -> float:
    """How long a video is by its header, which may be wrong; 0 where there is none. Reads no more than the header, of
    a file or of what can be sought in. What the reading of a stream raises passes."""
    import av

    try:
        with av.open(source, "r") as container:
            return (container.duration or 0) / av.time_base
    except (av.FFmpegError, ValueError):
        return 0.0


def decode_video(
    source: VideoSource, start: int = 0, frames: int | None = None, threads: int = 1
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode `frames` frames from rank `start` (all that follow where None) to RGB uint8 `[T, H, W, 3]`.

    Raises:
        VideoError: if the file is broken or ends before the last frame asked for.
    """
    if frames is not None and frames < 1:
        raise UserError(f"frames={frames}: must be at least 1")
    pictures: list[np.ndarray] = []
    for picture in iterate_video(source, start, threads):
        pictures.append(picture)
        if frames is not None and len(pictures) == frames:
            break
    if not pictures or (frames is not None and len(pictures) < frames):
        wanted = "a frame" if frames is None else f"{frames} frames"
        raise VideoError(f"{wanted} wanted from frame {start}, {len(pictures)} found")
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError("the frame size changes within the clip")
    return np.stack(pictures)


def iterate_video(
    source: VideoSource, start: int = 0, threads: int = 1, info: VideoInfo | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames from rank `start` on, one at a time, as RGB uint8 `[H, W, 3]`, turned upright.

    `info` is what `probe` says of this file, where that is known: saves reading all its packets for a seek.

    Raises:
        VideoError: if the file cannot be opened or a packet cannot be decoded.
    """
    if start < 0:
        raise UserError(f"start={start}: must be 0 or more")
    with _Reader(source, threads) as reader:
        yield from map(reader.picture, reader.frames(start, info))


def decode_frames(source: VideoSource, ranks: Sequence[int], threads: int = 1) -> np.ndarray:
    """Decode the frames of the given ranks (rising, repeats allowed) to RGB uint8 `[len(ranks), H, W, 3]`."""
    pictures = list(pick_frames(source, ranks, threads=threads))
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError("the frame size changes within the clip")
    return np.stack(pictures)


def pick_frames(
    source: VideoSource, ranks: Sequence[int], info: VideoInfo | None = None, threads: int = 1
) -> Iterator[np.ndarray]:
    """Yield the frames of the given ranks, one at a time, as RGB uint8 `[H, W, 3]`, turned upright.

    What lies between is skipped by seeking where a keyframe allows it: a few frames of a film cost a few groups of
    pictures.

    Args:
        source: the file.
        ranks: rising, repeats allowed.
        info: what `probe` says of this file, where that is known: saves reading all its packets for a seek.
        threads: of the decoder.

    Raises:
        VideoError: if the file cannot be opened, or ends before the last frame asked for.
    """
    if not len(ranks) or ranks[0] < 0 or any(later < earlier for earlier, later in pairwise(ranks)):
        raise UserError(f"ranks={list(ranks)[:8]}: must be a non-empty rising sequence from 0 on")
    if info is None and ranks[-1] > NEAR:
        info = probe(source)
    keys = info.keys if info else ()
    with _Reader(source, threads) as reader:
        frames, after, picture = reader.frames(), 0, None
        for rank in ranks:
            if rank >= after:
                if rank - after > NEAR and bisect_right(keys, rank) > bisect_right(keys, after):
                    frames, after = reader.frames(rank, info), rank
                frame = next(islice(frames, rank - after, None), None)
                if frame is None:
                    raise VideoError(f"frame {rank} wanted, the file ends before")
                after, picture = rank + 1, reader.picture(frame)
            assert picture is not None
            yield picture


def resample_ranks(times: Sequence[float], fps: float) -> list[int]:
    """Ranks of the source frames that show a video at a constant rate: for each tick the nearest frame in time.

    Args:
        times: presentation times of the source in seconds, rising.
        fps: target rate; tick k is at `times[0] + k / fps`, up to the last source time.
    """
    if fps <= 0:
        raise UserError(f"fps={fps}: must be above 0")
    source = np.asarray(times, dtype=np.float64)
    ticks = int(np.floor((source[-1] - source[0]) * fps + 1e-6)) + 1
    wanted = source[0] + np.arange(ticks) / fps
    right = np.clip(np.searchsorted(source, wanted), 1, max(1, len(source) - 1))
    if len(source) == 1:
        return [0]
    left = right - 1
    # A tie goes to the earlier frame, with a tolerance, so that rounding of times does not make frames alternate.
    return np.where(wanted - source[left] <= source[right] - wanted + 1e-6, left, right).tolist()


def pixel_format_for(height: int, width: int) -> str:
    """yuv420p, which plays everywhere, but yuv444p where a side is odd or so small that halved chroma would show."""
    return "yuv444p" if height % 2 or width % 2 or min(height, width) < SMALL else "yuv420p"


def encode_video(
    video_THWC: np.ndarray,
    fps: float,
    crf: float = 18,
    pixel_format: str = "yuv420p",
    preset: str = "medium",
) -> bytes:
    """Encode RGB uint8 `[T, H, W, 3]` to an H.264 MP4; equal input gives equal bytes.

    Args:
        video_THWC: frames; sides must be even for yuv420p.
        fps: constant rate in frames per second.
        crf: 0 (lossless in YUV) to 51.
        pixel_format: yuv420p plays everywhere; yuv444p keeps the colours of tiny clips, which halved chroma smears.
        preset: x264's speed preset.
    """
    import av

    if video_THWC.dtype != np.uint8 or video_THWC.ndim != 4 or video_THWC.shape[-1] != 3 or not video_THWC.shape[0]:
        raise UserError(f"video {video_THWC.dtype} {video_THWC.shape}: must be uint8 [T, H, W, 3] with T of 1 or more")
    if pixel_format not in PIXEL_FORMATS:
        raise UserError(f"pixel_format={pixel_format!r} is not supported{nearest(pixel_format, PIXEL_FORMATS)}")
    height, width = video_THWC.shape[1:3]
    if pixel_format == "yuv420p" and (height % 2 or width % 2):
        raise UserError(f"{width}x{height}: yuv420p needs even sides; crop to even sides or use yuv444p")
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise UserError(f"fps={fps}: must be above 0")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # x264's macroblock tree reads memory that it has not set: with it, tiny clips differ from process to process.
        options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
        stream: Any = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.thread_count = 1
        for picture in video_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


class _Reader:
    """An open container and its first video stream. A context manager: unclosed containers leak in PyAV."""

    def __init__(self, source: VideoSource, threads: int = 1) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        # One for all frames: by itself every frame sets up its own conversion, on all cores from PyAV 17 on, and for
        # clips of 64 pixels that takes four times as long as decoding them.
        options: Any = {"threads": threads} if int(av.__version__.split(".")[0]) >= 17 else {}
        self._to_rgb: Any = partial(VideoReformatter().reformat, format="rgb24", **options)
        self._errors = (av.FFmpegError, ValueError, OSError)
        self._source, self._threads = source, threads
        self.container: Any = None
        self.rewind()

    def rewind(self) -> None:
        """Open the file anew: the only way back to the first frame that holds for every container."""
        import av

        if self.container is not None:
            self.container.close()
        try:
            self.container = av.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source))
        except self._errors as error:
            raise VideoError(f"cannot be opened as a video: {_short(error)}") from error
        streams = self.container.streams.video
        if not streams:
            self.container.close()
            raise VideoError("has no video stream")
        self.stream: Any = streams[0]
        self.stream.codec_context.thread_count = self._threads

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def packets(self) -> tuple[list[int] | int, list[int], str]:
        """Presentation timestamps of all frames in order, or only their number where packets carry none; ranks of the
        keyframes; and what the file's end is missing, as `VideoInfo.truncated` says it."""
        shown: list[tuple[int | None, bool]] = []
        hidden = 0
        try:
            for packet in self.container.demux(self.stream):  # none is kept: a film's take gigabytes
                if packet.size and packet.is_discard:
                    hidden += 1
                elif packet.size:
                    shown.append((packet.pts, packet.is_keyframe))
        except self._errors as error:
            raise VideoError(f"broken packet: {_short(error)}") from error
        pts = [time for time, _ in shown if time is not None]
        truncated = self._truncated(len(shown) + hidden, max(pts, default=0))
        self.rewind()
        if len(set(pts)) < len(shown):
            return len(shown), [], truncated
        keys = {time for time, is_key in shown if is_key}
        pts.sort()
        return pts, [rank for rank, time in enumerate(pts) if time in keys], truncated

    def _truncated(self, packets: int, last: int) -> str:
        """What MP4's count of frames or Matroska's duration promise beyond the packets and the last timestamp. Other
        formats promise nothing, or, as AVI, what they do not mean to keep."""
        if "mp4" in self.container.format.name:
            promised = self.stream.frames
            return f"{packets} of {promised} frames" if packets < promised else ""
        hours, minutes, seconds = ([*self.stream.metadata.get("DURATION", "").split(":"), "", ""])[:3]
        try:
            promised = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        except ValueError:
            return ""
        found = float(last * self.stream.time_base)
        return f"{found:.2f} of {promised:.2f} s" if found < 0.95 * promised - 1 else ""

    def frames(self, start: int = 0, info: VideoInfo | None = None) -> Iterator[Any]:
        """Decoded frames from rank `start` on, by a seek to the keyframe before it where timestamps allow one. `info`
        saves reading all packets for their timestamps."""
        try:
            if start:
                count, wanted = self._timestamp(start, info)
                if start >= count:
                    return
                if wanted is not None:
                    self.container.seek(wanted, stream=self.stream, backward=True)
                    yield from self._from_timestamp(wanted, start)
                    return
            for rank, frame in enumerate(self.container.decode(self.stream)):
                if rank >= start:
                    yield frame
        except self._errors as error:
            raise VideoError(f"cannot be decoded: {_short(error)}") from error

    def _timestamp(self, rank: int, info: VideoInfo | None) -> tuple[int, int | None]:
        """How many frames there are, and the timestamp of one: None where there are none, or no such frame."""
        if info is not None:
            return info.frames, round(info.times[rank] / self.stream.time_base) if rank < len(info.times) else None
        pts = self.packets()[0]
        if isinstance(pts, int):
            return pts, None
        return len(pts), pts[rank] if rank < len(pts) else None

    def picture(self, frame: Any) -> np.ndarray:
        """The frame as RGB uint8 HWC, turned as its display matrix says (phones store portrait clips lying).

        Raises:
            VideoError: for a frame that the decoder could only guess parts of.
        """
        if frame.is_corrupt:
            raise VideoError("damaged frame" + ("" if frame.time is None else f" at {frame.time:.3f} s"))
        picture = self._to_rgb(frame).to_ndarray()
        quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(picture, quarter_turns)) if quarter_turns else picture

    def _from_timestamp(self, wanted: int, start: int) -> Iterator[Any]:
        frames = self.container.decode(self.stream)
        first = next(frames, None)
        if first is None or first.pts is None or first.pts > wanted:
            # The container's seek went past the frame: count from the beginning instead.
            self.rewind()
            for rank, frame in enumerate(self.container.decode(self.stream)):
                if rank >= start:
                    yield frame
            return
        if first.pts == wanted:
            yield first
        for frame in frames:
            if frame.pts is not None and frame.pts >= wanted:
                yield frame


def _short(error: Exception) -> str:
    """One line without the path and errno that FFmpeg's messages carry."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]

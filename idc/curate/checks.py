"""The first look at a file: whether it can be decoded, and what it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from idc.curate.candidate import Candidate, Outcome, Step
from idc.curate.reading import frame_times, inspect, pick, span_of
from idc.data.video import VideoError, VideoInfo, decoder_version
from idc.errors import UserError

# How the reader's messages begin, and the phrase that counts them.
REASONS = {
    "the file is empty": "empty file",
    "no such file": "no such file",
    "cannot be fetched": "cannot be fetched",
    "has no video stream": "no video stream",
    "no frame can be decoded": "no frames",
    "cannot be opened": "no video",
    "no picture": "no picture",
    "the frame size changes": "frame size changes",
    "damaged frame": "damaged frames",
}
JITTER = 0.2  # share of the median interval by which a frame may come early or late at a constant rate
JITTERING = 0.01  # share of the intervals that may be off more, as where single frames are lost
GREY = 2.0  # mean difference of red, green and blue, in 255ths, up to which a picture is grey


class DecodeCheck(Step):
    """Drops files that cannot be decoded or are absurd, and notes what the others are in meta["decode check"].

    The note: frames, fps (mean), seconds, height and width (upright), vfr (variable frame rate: kept, since clips are
    resampled by time), grey, image (a still one), timestamps (whether the file has them), decoder.

    A few frames are decoded over the candidate's span, first and last among them; with `thorough` all of them. What
    breaks between is found by the steps that read there.
    """

    def __init__(
        self,
        min_frames: int = 1,
        min_side: int = 64,
        max_side: int = 8192,
        max_aspect: float = 4.0,
        min_seconds: float = 0.0,
        max_seconds: float = 4 * 3600.0,
        looks: int = 8,
        thorough: bool = False,
    ) -> None:
        """
        Args:
            min_frames: fewer are dropped, images apart.
            min_side, max_side: of the upright picture, in pixels.
            max_aspect: of the longer to the shorter side.
            min_seconds, max_seconds: of the file, images apart.
            looks: how many frames are decoded.
            thorough: decode every frame: costs as much as shot detection.

        Raises:
            UserError: for a number out of its range.
        """
        for name, value, least in (
            ("min_frames", min_frames, 1),
            ("min_side", min_side, 1),
            ("max_side", max_side, min_side),
            ("max_aspect", max_aspect, 1),
            ("min_seconds", min_seconds, 0),
            ("max_seconds", max_seconds, min_seconds),
            ("looks", looks, 1),
        ):
            if value < least:
                raise UserError(f"{name}={value}: must be {least} or more")
        self.min_frames, self.min_side, self.max_side, self.max_aspect = min_frames, min_side, max_side, max_aspect
        self.min_seconds, self.max_seconds, self.looks, self.thorough = min_seconds, max_seconds, looks, thorough

    @property
    def models(self) -> tuple[str, ...]:
        return (decoder_version(),)

    def apply(self, candidate: Candidate) -> Outcome:
        if candidate.clip is not None:
            return candidate  # of a shard: decoded by its source
        try:
            source = inspect(candidate)
            wrong = self._wrong(source.video, source.is_image) or _outside(candidate, source.video)
            if wrong:
                return candidate.dropped(self.name, *wrong)
            grey = self._decode(candidate, source.video)
        except VideoError as error:
            text = str(error)
            reason = next((phrase for start, phrase in REASONS.items() if text.startswith(start)), "broken video")
            return candidate.dropped(self.name, reason, text)
        return candidate.changed(meta={self.name: {**_describe(source.video), "image": source.is_image, "grey": grey}})

    def _wrong(self, info: VideoInfo, is_image: bool) -> tuple[str, str] | None:
        """(reason, detail) of what the file's size, length or end has against it."""
        short, long = sorted((info.height, info.width))
        size = f"{info.width}x{info.height}"
        if info.truncated:
            return "truncated file", f"{info.truncated} are there"
        if short < self.min_side:
            return "picture too small", f"{size}, min_side={self.min_side}"
        if long > self.max_side:
            return "picture too large", f"{size}, max_side={self.max_side}"
        if long > self.max_aspect * short:
            return "shape too long", f"{size}, max_aspect={self.max_aspect:g}"
        if is_image:
            return None
        seconds = duration(info)
        if info.frames < self.min_frames:
            return "too few frames", f"{info.frames}, min_frames={self.min_frames}"
        if seconds < self.min_seconds:
            return "video too short", f"{seconds:.2f} s, min_seconds={self.min_seconds:g}"
        if seconds > self.max_seconds:
            return "video too long", f"{seconds:.0f} s, max_seconds={self.max_seconds:g}"
        return None

    def _decode(self, candidate: Candidate, info: VideoInfo) -> bool:
        """Decode some frames or all; whether they are grey."""
        first, end = span_of(candidate)
        looks = np.unique(np.linspace(first, end - 1, self.looks).astype(int)).tolist()
        sizes: set[tuple[int, ...]] = set()
        colour = 0.0
        wanted = set(looks)
        # The crop is left aside: of frames of several sizes it may lie in one and not in another.
        for rank, frame in pick(candidate.changed(crop=None), range(first, end) if self.thorough else looks):
            sizes.add(frame.shape)
            if len(sizes) > 1:
                raise VideoError(f"the frame size changes at frame {rank} or before")
            if rank in wanted:
                colour = max(colour, float(np.ptp(frame[::8, ::8], axis=-1).mean()))
        return colour <= GREY


def _outside(candidate: Candidate, info: VideoInfo) -> tuple[str, str] | None:
    if candidate.span is not None:
        first, end = candidate.span
        if not 0 <= first < min(end, info.frames):
            return "span outside of the video", f"{first} to {end} of {info.frames} frames"
    if candidate.crop is not None:
        left, top, right, bottom = candidate.crop
        if not (0 <= round(left) < min(round(right), info.width) and 0 <= round(top) < min(round(bottom), info.height)):
            return "crop outside of the picture", f"{tuple(candidate.crop)} of {info.width}x{info.height}"
    return None


def duration(info: VideoInfo) -> float:
    """Seconds from the first frame to the end of the last, which is taken to last as long as the mean one."""
    return info.frames / info.fps if info.fps else 0.0


def is_variable(info: VideoInfo) -> bool:
    """Whether the frames come at a variable rate: more than 1% of the intervals are off the median by over a fifth."""
    if len(info.times) < 3:
        return False
    intervals = np.diff(frame_times(info))
    usual = float(np.median(intervals))
    return bool((np.abs(intervals - usual) > JITTER * usual).mean() > JITTERING)


def _describe(info: VideoInfo) -> dict[str, Any]:
    return {
        "frames": info.frames,
        "fps": round(info.fps, 4),
        "seconds": round(duration(info), 4),
        "height": info.height,
        "width": info.width,
        "vfr": is_variable(info),
        "timestamps": bool(info.times),
        "decoder": decoder_version(),
    }

"""Cutting one video into samples: windows of 4n + 1 frames at a constant rate, with references of the people in them.

Three passes over the file, so that a film needs no more memory than a window: find cuts and faces, take the reference
crops, cut the windows. A reference comes from another moment than the window, so that copying it does not pay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from idc.curate.geometry import RESIZE, View
from idc.curate.people import Box, Sighting, Track, Tracker, choose_reference, head_and_shoulders, subject_names
from idc.data.cuts import is_cut
from idc.data.video import (
    PIXEL_FORMATS,
    VideoError,
    encode_video,
    iterate_video,
    pixel_format_for,
    probe,
    resample_ranks,
)
from idc.errors import UserError, nearest
from idc.models.faces import Face, FaceDetector
from idc.types import check_frames, check_side


@dataclass(frozen=True)
class ClipSettings:
    """How videos are cut. Times are in seconds, sizes in pixels.

    Attributes:
        frames: of a sample, 4n + 1.
        height, width: of a sample, multiples of 16.
        fps: rate that videos are resampled to.
        stride: frames from one window's start to the next; 0 means `frames` (no overlap).
        resize: "crop" fills height x width and crops the centre; "short-side" scales the shorter side to
            min(height, width) and keeps the shape, cropped to multiples of 16.
        upscale: take videos smaller than the sample, too.
        min_face: least height of a face as a share of the picture's; smaller ones are passers-by.
        face_score: least median confidence of a person's face along its track, in (0, 1).
        max_subjects: a window with more people is dropped.
        reference_gap: least time between a window and the moment of a reference.
        reference_size: side of the square references; 0 means min(height, width).
        keep_without_subjects: keep windows in which nobody is seen.
        captions_required: drop videos without a side-car .txt instead of giving a neutral caption.
        looks_per_second: how often faces are searched.
        crf, pixel_format: of the encoded clips; "auto" is that of `pixel_format_for`.
        licence: written into every sample.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    stride: int = 0
    resize: str = "crop"
    upscale: bool = False
    min_face: float = 0.1
    face_score: float = 0.88
    max_subjects: int = 4
    reference_gap: float = 0.25
    reference_size: int = 0
    keep_without_subjects: bool = False
    captions_required: bool = False
    looks_per_second: float = 5.0
    crf: float = 18.0
    pixel_format: str = "auto"
    licence: str = ""

    def __post_init__(self) -> None:
        check_frames(self.frames)
        check_side("height", self.height)
        check_side("width", self.width)
        if self.reference_size:
            check_side("reference_size", self.reference_size)
        if self.resize not in RESIZE:
            raise UserError(f"resize={self.resize!r} is not known{nearest(self.resize, RESIZE)}")
        if self.pixel_format not in ("auto", *PIXEL_FORMATS):
            raise UserError(
                f"pixel_format={self.pixel_format!r} is not known{nearest(self.pixel_format, PIXEL_FORMATS)}"
            )
        for name in ("fps", "looks_per_second"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("stride", "max_subjects", "reference_gap"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not 0 < self.face_score < 1:
            raise UserError(f"face_score={self.face_score}: must lie between 0 and 1")
        if not 0 <= self.min_face < 1:
            raise UserError(f"min_face={self.min_face}: a share of the picture's height, 0 or more and below 1")


@dataclass(frozen=True)
class Clip:
    """One finished sample, ready for `ShardWriter.write`."""

    key: str
    video: bytes
    caption: str
    references: tuple[tuple[str, bytes, str], ...]
    frames: int
    height: int
    width: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Drop:
    """A window (from `seconds` on) or a whole video (`seconds` None) that gave no sample, and why.

    `reason` is one of a few phrases, to be counted; `detail` has the numbers.
    """

    video: str
    seconds: float | None
    reason: str
    detail: str = ""


@dataclass
class _Window:
    """One sample to cut: its first tick and, per subject from left to right, the track and the reference sighting."""

    key: str
    start: int
    people: list[tuple[Track, Sighting]] = field(default_factory=list)


def cut_video(path: Path, name: str, settings: ClipSettings, detector: FaceDetector) -> Iterator[Clip | Drop]:
    """Cut one video.

    Args:
        path: the file. A caption is taken from the .txt file beside it with the same stem.
        name: path relative to the folder of videos; keys are made from it.
        settings: how to cut.
        detector: finds faces.

    Yields:
        a `Clip` or a `Drop` for each window, or one `Drop` for the whole video.
    """
    try:
        yield from _cut(path, name, settings, detector)
    except VideoError as error:
        yield Drop(name, None, "unreadable video", str(error))


def _cut(path: Path, name: str, settings: ClipSettings, detector: FaceDetector) -> Iterator[Clip | Drop]:
    caption = read_caption(path)
    if caption is None and settings.captions_required:
        yield Drop(name, None, "no caption", f"{path.with_suffix('.txt').name} is missing or empty")
        return
    info = probe(path)
    times = info.times or tuple(rank / (info.fps or settings.fps) for rank in range(info.frames))
    ranks = resample_ranks(times, settings.fps)
    if len(ranks) < settings.frames:
        yield Drop(name, None, "too short", f"{len(ranks)} frames at {settings.fps:g} fps, {settings.frames} wanted")
        return
    view = View.fit(info.height, info.width, settings)
    if view.scale > 1 and not settings.upscale:
        yield Drop(name, None, "too small", f"{info.width}x{info.height} for {view.width}x{view.height}")
        return
    cuts, tracks = survey(path, ranks, settings, detector)
    windows = []
    for start in range(0, len(ranks) - settings.frames + 1, settings.stride or settings.frames):
        window = _plan(name, start, ranks, cuts, tracks, view, settings)
        if isinstance(window, Drop):
            yield window
        else:
            windows.append(window)
    references = _take_references(path, ranks, windows, settings)
    for window, video in _take_windows(path, ranks, windows, view, settings):
        pixel_format = settings.pixel_format
        if pixel_format == "auto":
            pixel_format = pixel_format_for(view.height, view.width)
        names = subject_names(len(window.people))
        pictures = [references[s.tick, head_and_shoulders(s.face, info.height, info.width)] for _, s in window.people]
        yield Clip(
            key=window.key,
            video=encode_video(video, settings.fps, settings.crf, pixel_format),
            caption=caption if caption is not None else default_caption(len(names)),
            references=tuple((who, picture, "png") for who, picture in zip(names, pictures, strict=True)),
            frames=settings.frames,
            height=view.height,
            width=view.width,
            meta={
                "video": name,
                "start_seconds": round(window.start / settings.fps, 4),
                "reference_seconds": [round(s.tick / settings.fps, 4) for _, s in window.people],
                "caption_given": caption is not None,
            },
        )


def survey(
    path: Path, ranks: list[int], settings: ClipSettings, detector: FaceDetector
) -> tuple[list[int], list[Track]]:
    """First pass: the ticks at which a new shot begins, and the tracks of all faces."""
    every = max(1, round(settings.fps / settings.looks_per_second))
    cuts: list[int] = []
    tracker: Tracker | None = None
    before: np.ndarray | None = None
    for tick, picture in _ticks(path, ranks):
        tracker = tracker or Tracker(2 * every, (picture.shape[0], picture.shape[1]), settings.face_score)
        if before is not None and is_cut(before, picture):
            cuts.append(tick)
            tracker.cut()
        before = picture
        if tick % every == 0:
            tall = settings.min_face * picture.shape[0]
            tracker.look(tick, [face for face in detector(picture) if face.height >= tall])
    return cuts, tracker.finish() if tracker else []


def _plan(
    name: str,
    start: int,
    ranks: list[int],
    cuts: list[int],
    tracks: list[Track],
    view: View,
    settings: ClipSettings,
) -> _Window | Drop:
    """Decide on one window: who is in it and where their references come from, or why it is dropped."""
    last = start + settings.frames - 1

    def drop(reason: str, detail: str = "") -> Drop:
        return Drop(name, round(start / settings.fps, 4), reason, detail)

    inside = [cut for cut in cuts if start < cut <= last]
    if inside:
        return drop("shot change", f"at {inside[0] / settings.fps:.2f} s")
    repeated = settings.frames - len(set(ranks[start : last + 1]))
    if repeated * 4 > settings.frames:
        return drop("frame rate too low", f"{repeated} of {settings.frames} frames would repeat the one before")
    seen = [(track, [s for s in track.within(start, last) if view.shows(s.face)]) for track in tracks]
    seen = sorted(((t, s) for t, s in seen if s), key=lambda item: float(np.mean([s.face.centre[0] for s in item[1]])))
    if not seen and not settings.keep_without_subjects:
        return drop("nobody in it")
    if len(seen) > settings.max_subjects:
        return drop("too many people", f"{len(seen)}, at most {settings.max_subjects}")
    window = _Window(sample_key(name, start), start)
    gap = round(settings.reference_gap * settings.fps)
    for number, (track, _) in enumerate(seen, 1):
        sighting = choose_reference(track, start, last, gap, f"{window.key}/{number}")
        if sighting is None:
            return drop("no other moment for a reference", f"person {number} of {len(seen)} from the left")
        window.people.append((track, sighting))
    return window


def _take_references(
    path: Path, ranks: list[int], windows: list[_Window], settings: ClipSettings
) -> dict[tuple[int, Box], bytes]:
    """Second pass: the reference crops as PNG by tick and box."""
    from PIL import Image

    side = settings.reference_size or min(settings.height, settings.width)
    wanted: dict[int, list[Face]] = {}
    for window in windows:
        for _, sighting in window.people:
            wanted.setdefault(sighting.tick, []).append(sighting.face)
    taken: dict[tuple[int, Box], bytes] = {}
    for tick, picture in _ticks(path, ranks[: max(wanted, default=-1) + 1]):
        for face in wanted.get(tick, ()):
            box = head_and_shoulders(face, *picture.shape[:2])
            crop = Image.fromarray(picture).crop(box).resize((side, side), Image.Resampling.LANCZOS)
            buffer = BytesIO()
            crop.save(buffer, "PNG")
            taken[tick, box] = buffer.getvalue()
    return taken


def _take_windows(
    path: Path, ranks: list[int], windows: list[_Window], view: View, settings: ClipSettings
) -> Iterator[tuple[_Window, np.ndarray]]:
    """Third pass: each window's frames, uint8 `[T, H, W, 3]`. Only frames of windows that still run are kept."""
    waiting = list(windows)
    running: list[tuple[_Window, list[np.ndarray]]] = []
    end = windows[-1].start + settings.frames if windows else 0
    for tick, picture in _ticks(path, ranks[:end]):
        while waiting and waiting[0].start == tick:
            running.append((waiting.pop(0), []))
        if running:
            shown = view(picture)
            for _, frames in running:
                frames.append(shown)
        if running and len(running[0][1]) == settings.frames:
            window, frames = running.pop(0)
            yield window, np.stack(frames)


def _ticks(path: Path, ranks: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(tick, frame) for each tick, decoding the file once from its beginning."""
    tick = 0
    for rank, picture in enumerate(iterate_video(path) if ranks else ()):
        while tick < len(ranks) and ranks[tick] == rank:
            yield tick, picture
            tick += 1
        if tick == len(ranks):
            return
    if tick < len(ranks):
        raise VideoError(f"ends at frame {tick} of {len(ranks)}")


def read_caption(path: Path) -> str | None:
    """The text of the side-car .txt with the video's stem on one line, or None where it is missing or empty."""
    sidecar = path.with_suffix(".txt")
    text = " ".join(sidecar.read_text("utf-8", "replace").split()) if sidecar.is_file() else ""
    return text or None


def default_caption(subjects: int) -> str:
    """A caption that claims nothing beyond the number of people."""
    if not subjects:
        return "A video."
    words = {1: "a person", 2: "two people", 3: "three people", 4: "four people"}
    return f"A video of {words.get(subjects, f'{subjects} people')}."


def sample_key(name: str, start: int) -> str:
    """A key for the window from tick `start`: readable, unique by a hash of the video's relative path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(name).stem).strip("-")[:48] or "video"
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}-{start:06d}"

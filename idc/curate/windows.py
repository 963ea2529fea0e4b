"""From shots to clips: windows of 4n + 1 frames at a constant rate, then their pixels in a size that training uses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from idc.curate.candidate import Candidate, CuratedSubject, Dropped, Outcome, Step
from idc.curate.geometry import RESIZE, View, plain_view, viewed
from idc.curate.reading import counted_ranks, frame_times, inspect, pick, size_of, span_of
from idc.data.buckets import BucketRule
from idc.data.video import resample_ranks
from idc.errors import UserError, nearest
from idc.types import Bucket, check_frames, check_side

KEY_LENGTH = 80
MAX_REPEATED = 0.25  # share of a window's frames that may repeat the one before


def part_key(key: str, start: int) -> str:
    """The key of the part of a candidate that begins at number `start`; at most 80 characters.

    >>> part_key("film-2b6d9e25", 81)
    'film-2b6d9e25-000081'
    """
    part = f"{key}-{start:06d}"
    if len(part) <= KEY_LENGTH:
        return part
    tail = hashlib.sha256(part.encode()).hexdigest()[:12]
    return f"{part[: KEY_LENGTH - 13]}-{tail}"


class Windows(Step):
    """Cuts a shot into windows of equal length at a constant rate: sets `ranks`, `fps` and `span`.

    For each tick of the rate the frame nearest in time is taken, so that variable rates come out even. A still image
    passes as a clip of one frame. Boxes stay where they are; a box that was found on a frame outside of the window is
    taken away, and the name of its subject noted under meta["windows"]["unplaced"].
    """

    def __init__(
        self,
        frames: int = 81,
        fps: float = 16.0,
        stride: int = 0,
        max_per_shot: int = 0,
        min_frames: int = 0,
    ) -> None:
        """
        Args:
            frames: of a window, 4n + 1.
            fps: of the windows, in frames per second.
            stride: frames from one window's start to the next; 0 means `frames` (no overlap).
            max_per_shot: at most so many, evenly spread over the shot; 0 for all.
            min_frames: a shot shorter than `frames` gives one window of the most frames 4n + 1 that it holds, if they
                are at least so many; 0 means `frames`.

        Raises:
            UserError: for a number out of its range.
        """
        check_frames(frames)
        if min_frames:
            check_frames(min_frames, "min_frames")
        if min_frames > frames:
            raise UserError(f"min_frames={min_frames}: must be at most frames={frames}")
        if fps <= 0:
            raise UserError(f"fps={fps}: must be above 0")
        for name, value in (("stride", stride), ("max_per_shot", max_per_shot)):
            if value < 0:
                raise UserError(f"{name}={value}: must be 0 or more")
        self.frames, self.fps, self.stride, self.max_per_shot = frames, fps, stride, max_per_shot
        self.min_frames = min_frames

    def apply(self, candidate: Candidate) -> Outcome | Sequence[Outcome]:
        if candidate.clip is not None or candidate.encoded is not None:
            return candidate  # of a shard: its window was chosen when that was made
        source = inspect(candidate)
        if source.is_image:
            return candidate.changed(ranks=(0,), span=(0, 1), fps=self.fps)
        first, end = span_of(candidate)
        times = frame_times(source.video)[first:end]
        ticks = [first + rank for rank in resample_ranks(times.tolist(), self.fps)]
        length = min(self.frames, (len(ticks) - 1) // 4 * 4 + 1)
        if length < (self.min_frames or self.frames):
            detail = f"{len(ticks)} frames at {self.fps:g} fps, {self.min_frames or self.frames} wanted"
            return candidate.dropped(self.name, "too short", detail)
        starts = list(range(0, len(ticks) - length + 1, self.stride or length))
        if self.max_per_shot and len(starts) > self.max_per_shot:
            chosen = np.linspace(0, len(starts) - 1, self.max_per_shot).round().astype(int)
            starts = [starts[number] for number in chosen]
        return [self._window(candidate, start, ticks[start : start + length]) for start in starts]

    def _window(self, candidate: Candidate, start: int, ranks: list[int]) -> Outcome:
        # Segments have one key until `Shots` has told their shots apart.
        whole = candidate.segment is None
        key = part_key(candidate.key if whole else part_key(candidate.key, span_of(candidate)[0]), start)
        repeated = len(ranks) - len(set(ranks))
        if repeated > MAX_REPEATED * len(ranks):
            detail = f"{repeated} of {len(ranks)} frames would repeat the one before at {self.fps:g} fps"
            return Dropped(candidate.source, candidate.video, key, self.name, "frame rate too low", detail)
        before = counted_ranks(candidate)
        now = [placed(subject, ranks, before) for subject in candidate.subjects]
        unplaced = [
            new.name
            for old, new in zip(candidate.subjects, now, strict=True)
            if new is not old and new.box is None and new.mask is None
        ]
        return candidate.changed(
            key=key,
            span=(ranks[0], ranks[-1] + 1),
            ranks=tuple(ranks),
            fps=self.fps,
            subjects=tuple(now),
            meta={self.name: {"unplaced": unplaced}} if unplaced else {},
        )


def placed(subject: CuratedSubject, ranks: Sequence[int], before: Sequence[int]) -> CuratedSubject:
    """The subject with the number, among `ranks`, of the frame that its box and mask belong to: the nearest to it;
    without them where it lies outside of all. `before` gives the rank of each frame until now."""
    if subject.box is None and subject.mask is None:
        return subject
    rank = before[subject.frame] if 0 <= subject.frame < len(before) else -1
    if not ranks or not ranks[0] <= rank <= ranks[-1]:
        return replace(subject, box=None, mask=None, frame=0)
    return replace(subject, frame=min(range(len(ranks)), key=lambda number: abs(ranks[number] - rank)))


@dataclass(frozen=True)
class _Shape:
    height: int
    width: int
    resize: str


class Cut(Step):
    """Reads the window's frames, scales and crops them: sets `clip`, and moves boxes and masks into its pixels.

    With `buckets` the size is that of the bucket that training would choose for the candidate (`BucketRule`): the
    nearest shape among those that it fills. Otherwise it is `height` x `width`, or with resize="short-side" the
    picture's own shape with its shorter side at min(height, width). Images take the sizes of all buckets, with one
    frame. A subject of whose box less than `min_visible` is left is removed; meta["cut"] has its name under "cropped
    out", and the view by which boxes went.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]] = (),
        height: int = 480,
        width: int = 832,
        resize: str = "crop",
        max_upscale: float = 1.1,
        max_crop: float = 0.5,
        min_visible: float = 0.25,
    ) -> None:
        """
        Args:
            buckets: [frames, height, width] of each; none: `height` and `width` decide.
            height, width: multiples of 16.
            resize: "crop" or "short-side".
            max_upscale: how much the picture may be enlarged, 1 or more.
            max_crop: share of the picture that may be cut away, in [0, 1).
            min_visible: share of a subject's box in [0, 1] that the clip must show.

        Raises:
            UserError: for a number out of its range, or an unknown resize.
        """
        check_side("height", height)
        check_side("width", width)
        if resize not in RESIZE:
            raise UserError(f"resize={resize!r} is not known{nearest(resize, RESIZE)}")
        if not 0 <= min_visible <= 1:
            raise UserError(f"min_visible={min_visible}: a share of the box, from 0 to 1")
        self.buckets = [list(shape) for shape in buckets]
        self.height, self.width, self.resize = height, width, resize
        self.max_upscale, self.max_crop, self.min_visible = max_upscale, max_crop, min_visible
        for image in (False, True):
            self._rule(1, image)

    def apply(self, candidate: Candidate) -> Outcome:
        if candidate.clip is not None or candidate.encoded is not None:
            return candidate
        if not candidate.ranks:
            raise UserError(f"{candidate.key} has no frames chosen yet; put idc.curate.windows.Windows before it")
        height, width = size_of(candidate)
        still = inspect(candidate).is_image
        view, frames = View.fit(height, width, _Shape(self.height, self.width, self.resize)), len(candidate.ranks)
        shape = Bucket(frames, height, width, 0)
        if self.buckets or self.resize == "crop":
            chosen = self._rule(frames, still).choose(shape)
            if isinstance(chosen, str):
                return candidate.dropped(self.name, _reason(chosen), chosen)
            view, frames = View.fill(height, width, chosen.height, chosen.width), chosen.frames
        elif view.scale > self.max_upscale:
            detail = f"{height}x{width} pixels would be enlarged beyond max_upscale={self.max_upscale}"
            return candidate.dropped(self.name, "too small", detail)
        ranks = candidate.ranks[:frames]
        clip = np.empty((frames, view.height, view.width, 3), np.uint8)
        for number, (rank, frame) in enumerate(pick(candidate, ranks)):
            if frame.shape[:2] != (height, width):
                return candidate.dropped(self.name, "frame size changes", f"at frame {rank} of the source")
            clip[number] = view(frame)
        in_time = [s if s.frame < frames else replace(s, box=None, mask=None, frame=0) for s in candidate.subjects]
        subjects, gone = viewed(candidate.changed(subjects=tuple(in_time)), view, self.min_visible)
        return candidate.changed(
            clip=clip,
            ranks=ranks,
            span=(ranks[0], ranks[-1] + 1),
            subjects=subjects,
            meta={self.name: {"view": plain_view(view), **({"cropped out": gone} if gone else {})}},
        )

    def _rule(self, frames: int, still: bool) -> BucketRule:
        shapes = self.buckets or [[frames, self.height, self.width]]
        if still:
            shapes = [[1, height, width] for _, height, width in shapes]
        return BucketRule(shapes, max_upscale=self.max_upscale, max_crop=self.max_crop)


def _reason(detail: str) -> str:
    """The phrase that counts a bucket rule's reason."""
    if "enlarged" in detail:
        return "too small"
    return "shape too far from every bucket" if "cropped" in detail else "too short"

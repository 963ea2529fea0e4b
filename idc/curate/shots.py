"""Cutting videos into shots. How cuts are found is pluggable: PySceneDetect, TransNetV2, or a comparison of colours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from idc.curate.candidate import Candidate, Dropped, Outcome, Pixels, Step
from idc.curate.reading import counted_ranks, frame_times, inspect, pick, span_of
from idc.curate.segments import Transition, shot_edges
from idc.curate.windows import part_key, placed
from idc.data.cuts import is_cut
from idc.data.video import VideoError
from idc.errors import UserError, nearest

LOOK_WIDTH = 256  # pixels that PySceneDetect's detectors get at most; their thresholds are meant for about this
RING = 256  # thumbnails kept, around cuts that a detector reports late
MAX_BLENDS = 12  # frames that a dissolve may take on either side of where it was found
THUMBNAIL = 48, 27
BLEND = 0.2  # share of the difference of its neighbours that a blend of them may leave unexplained


class ShotDetector(Protocol):
    """Finds transitions in a stream of frames. It holds settings, and networks between `load` and `unload`; nothing of
    one video is there for the next. `heavy` says whether it wants a GPU where there is one."""

    heavy: bool

    @property
    def models(self) -> tuple[str, ...]: ...

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def unload(self) -> None: ...

    def transitions(self, frames: Iterable[Pixels]) -> Iterator[Transition]:
        """Transitions in rising order, by number of the frame from 0 and at most 200 frames late, of RGB uint8
        frames `[H, W, 3]`. The first frame begins no shot."""


class Shots(Step):
    """One candidate per shot, its `span` the shot's frames; shots tile the candidate's span but for soft edges.

    Frame numbers are ours: the detector sees the frames that `idc.curate.reading` decodes, one after another. Videos
    that were converted from another rate have blends of both shots at a cut; such frames are found by comparing small
    pictures around it, whatever the detector, and belong to neither shot, as do short dissolves where one is found.

    A candidate that came with a span (OpenS2V-5M's `cut`) is taken to be one shot. Of a segment of a long video the
    shots are those that begin in it, whole unless they are very long (`idc.curate.segments`). meta["shots"] has number
    and count of the shot within the candidate, and which of its edges are soft. A subject with a box stays with the
    shot that has its frame.
    """

    def __init__(
        self,
        detector: ShotDetector | None = None,
        min_seconds: float = 1.0,
        trim: int = 2,
        search_given: bool = False,
    ) -> None:
        """
        Args:
            detector: PySceneDetect's adaptive detector where None.
            min_seconds: shorter shots are dropped.
            trim: frames taken away besides at each soft edge.
            search_given: look for cuts within spans that came with the material, too.

        Raises:
            UserError: for a number out of its range.
        """
        if min_seconds < 0:
            raise UserError(f"min_seconds={min_seconds}: must be 0 or more")
        if trim < 0:
            raise UserError(f"trim={trim}: must be 0 or more")
        self.detector: ShotDetector = SceneDetect() if detector is None else detector
        self.min_seconds, self.trim, self.search_given = min_seconds, trim, search_given

    @property
    def heavy(self) -> bool:  # type: ignore[override]  # its detector tells, where others have a constant
        """Whether the detector is a network."""
        return self.detector.heavy

    @property
    def models(self) -> tuple[str, ...]:
        return self.detector.models

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.detector,)

    def apply(self, candidate: Candidate) -> Outcome | Sequence[Outcome]:
        if candidate.clip is not None or candidate.encoded is not None or inspect(candidate).is_image:
            return candidate
        first, end = span_of(candidate)
        if candidate.span is not None and not self.search_given:
            return self._shot(candidate.changed(span=(first, end)), {"given": True})
        edges = self._edges(candidate, first, end)
        if not edges:
            return candidate.dropped(self.name, "no shot begins in the segment")
        shots: list[Outcome] = []
        counted = counted_ranks(candidate)
        for number, (before, after) in enumerate(pairwise(edges)):
            start = before.start + (self.trim if before.start > before.end else 0)
            stop = after.end - (self.trim if after.start > after.end else 0)
            note = {
                "number": number,
                "count": len(edges) - 1,
                "soft": [before.start > before.end, after.start > after.end],
                **({"segment": str(candidate.segment)} if candidate.segment else {}),
            }
            span = start, max(start, stop)
            ranks = tuple(rank for rank in candidate.ranks if start <= rank < stop)  # of a shard's clip, all are chosen
            subjects = tuple(placed(subject, ranks or range(*span), counted) for subject in candidate.subjects)
            key = part_key(candidate.key, before.start)
            shot = candidate.changed(key=key, span=span, ranks=ranks, segment=None, subjects=subjects)
            shots.append(self._shot(shot, note))
        return shots

    def _shot(self, shot: Candidate, note: dict[str, Any]) -> Outcome:
        assert shot.span is not None
        start, end = shot.span
        # Windows narrow the candidate's own span. The note is there before the file is asked for: it says whose it is.
        shot = shot.changed(meta={self.name: {**note, "span": [start, end]}})
        info = inspect(shot).video
        times = frame_times(info)[start:end]
        seconds = times[-1] - times[0] + 1 / (info.fps or 25) if len(times) else 0.0
        if not len(times) or seconds < self.min_seconds - 1e-6:
            detail = f"{len(times)} frames, {seconds:.2f} s, min_seconds={self.min_seconds:g}"
            return Dropped(shot.source, shot.video, shot.key, self.name, "shot too short", detail)
        return shot

    def _edges(self, candidate: Candidate, first: int, end: int) -> list[Transition]:
        """Edges of the shots by rank in the source, the first one's beginning and the last one's end among them."""
        if candidate.segment is None or candidate.span is not None:
            return [Transition(first, first), *self._transitions(candidate, first, end), Transition(end, end)]
        frames = inspect(candidate).video.frames
        look = candidate.segment.look(frames)
        return shot_edges(self._transitions(candidate, *look, until=end), candidate.segment, frames)

    def _transitions(self, candidate: Candidate, first: int, end: int, until: int | None = None) -> list[Transition]:
        """Transitions by rank in the source, widened by blended frames, without those at the very beginning or end and
        those that overlap the one before; no more than the first to a shot that begins at `until` or behind it."""
        thumbnails = _Thumbnails()
        found: list[Transition] = []
        waiting: deque[Transition] = deque()  # until the frames behind it have been seen

        def take(transition: Transition) -> None:
            edge = thumbnails.widened(transition)
            if (found[-1].start if found else 0) < edge.end <= edge.start < thumbnails.count:
                found.append(edge)

        def frames() -> Iterator[Pixels]:
            size = None
            for rank, frame in pick(candidate, range(first, end)):
                if size not in (None, frame.shape):
                    raise VideoError(f"the frame size changes at frame {rank}")
                size = frame.shape
                thumbnails.add(frame)
                while waiting and thumbnails.count > waiting[0].start + MAX_BLENDS:
                    take(waiting.popleft())
                if until is not None and found and found[-1].start >= until - first:
                    return
                yield frame

        for transition in self.detector.transitions(frames()):
            waiting.append(transition)
        for transition in waiting:
            take(transition)
        return [Transition(end + first, start + first) for end, start in found]


class _Thumbnails:
    """The last frames of a stream as small pictures, to look around cuts."""

    def __init__(self) -> None:
        self.count = 0
        self._last: deque[np.ndarray] = deque(maxlen=RING)

    def add(self, frame: Pixels) -> None:
        import cv2

        self._last.append(np.asarray(cv2.resize(frame, THUMBNAIL, interpolation=cv2.INTER_AREA), np.float32))
        self.count += 1

    def widened(self, transition: Transition) -> Transition:
        """The transition with the blended frames that lie at it, at most `MAX_BLENDS` on either side."""
        end, start = transition
        for _ in range(MAX_BLENDS):
            before, behind = self._is_blend(end - 1, end - 2, start), self._is_blend(start, end - 1, start + 1)
            if not before and not behind:
                break
            end, start = end - before, start + behind
        return Transition(end, start)

    def _is_blend(self, number: int, before: int, after: int) -> bool:
        """Whether frame `number` is a mixture of two others: neither of them, and nearly nothing else."""
        pictures = [self._get(n) for n in (number, before, after)]
        if any(picture is None for picture in pictures):
            return False
        mixed, one, other = (np.asarray(picture, np.float64) for picture in pictures)
        across = other - one
        length = float((across**2).sum())
        if not length:
            return False
        share = float(((mixed - one) * across).sum()) / length
        rest = float(((mixed - one - share * across) ** 2).sum()) / length
        return 0.15 < share < 0.85 and rest < BLEND**2

    def _get(self, number: int) -> np.ndarray | None:
        oldest = self.count - len(self._last)
        return self._last[number - oldest] if oldest <= number < self.count else None


class ColourCuts:
    """Hard cuts where the colours of successive frames hardly overlap (`idc.data.cuts.is_cut`); needs no package."""

    heavy = False
    models = ("colour overlap",)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Nothing to load."""

    def unload(self) -> None:
        """Nothing to free."""

    def transitions(self, frames: Iterable[Pixels]) -> Iterator[Transition]:
        before: Pixels | None = None
        for number, frame in enumerate(frames):
            if before is not None and is_cut(before, frame):
                yield Transition(number, number)
            before = frame


SCENE_DETECTORS = ("adaptive", "content")


class SceneDetect:
    """PySceneDetect's detectors, fed frame by frame; extra `curate`.

    "adaptive" compares each frame's change with that of the frames before and behind it, so that fast motion is no cut;
    "content" takes any change above the threshold.
    """

    heavy = False

    def __init__(self, method: str = "adaptive", threshold: float | None = None, window: int = 4) -> None:
        """
        Args:
            method: "adaptive" or "content".
            threshold: PySceneDetect's own for the method where None: 3 times the change around, or 27 of 255.
            window: how many frames on either side "adaptive" compares with. PySceneDetect's own 2 misses cuts with a
                blended frame between the shots: the change into it and the change out of it hide each other.

        Raises:
            UserError: for an unknown method, or a number out of its range.
        """
        if window < 1:
            raise UserError(f"window={window}: must be 1 or more")
        if method not in SCENE_DETECTORS:
            raise UserError(f"method={method!r} is not known{nearest(method, SCENE_DETECTORS)}")
        if threshold is not None and threshold <= 0:
            raise UserError(f"threshold={threshold}: must be above 0")
        self.method, self.threshold, self.window = method, threshold, window

    @property
    def models(self) -> tuple[str, ...]:
        for package in ("scenedetect-headless", "scenedetect-core", "scenedetect"):
            try:
                return (f"PySceneDetect {version(package)} ({self.method})",)
            except PackageNotFoundError:
                continue
        return (f"PySceneDetect ({self.method})",)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Only checks that the package is there.

        Raises:
            UserError: if it is not.
        """
        self._detector()

    def unload(self) -> None:
        """Nothing to free."""

    def transitions(self, frames: Iterable[Pixels]) -> Iterator[Transition]:
        import cv2
        from scenedetect.common import FrameTimecode

        detector = self._detector()
        at = FrameTimecode(0, 25.0)  # the rate is not looked at: what is asked for is in frames
        for number, frame in enumerate(frames):
            height, width = frame.shape[:2]
            if width > LOOK_WIDTH:
                size = LOOK_WIDTH, max(1, round(height * LOOK_WIDTH / width))
                frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
            at = FrameTimecode(number, 25.0)
            for cut in detector.process_frame(at, np.ascontiguousarray(frame[..., ::-1])):
                yield Transition(cut.frame_num, cut.frame_num)
        for cut in detector.post_process(at):
            yield Transition(cut.frame_num, cut.frame_num)

    def _detector(self) -> Any:
        try:
            from scenedetect.detectors import AdaptiveDetector, ContentDetector
        except ImportError:
            raise UserError(
                "PySceneDetect is not installed: pip install 'idc[curate]', or give Shots another detector, such as "
                "idc.curate.shots.ColourCuts"
            ) from None
        # Short shots are our own step's matter: merging them here would hide where they are.
        settings: dict[str, Any] = {"min_scene_len": 1}
        if self.method == "adaptive":
            key, kind = "adaptive_threshold", AdaptiveDetector
            settings["window_width"] = self.window
        else:
            key, kind = "threshold", ContentDetector
        return kind(**settings, **({} if self.threshold is None else {key: self.threshold}))

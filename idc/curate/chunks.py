"""What a worker does: open a chunk's units and take their candidates through the steps, one batch at a time.

Steps are a chain of generators, so that a chunk needs the memory of its batches, not of all its clips. A step's
batches are the next `step.batch` candidates of the chunk: they depend on nothing else, and so do the bytes that come
out. An exception in a step drops the candidate that it came with, never the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from idc.curate.candidate import Candidate, Dropped, EncodedClip, Outcome, Source, Step, Unit
from idc.curate.films import FilmSharing, sharing
from idc.curate.parts import Count, Outcomes
from idc.curate.plan import Task, read_units
from idc.curate.reaching import UNREACHED, UnreachedError
from idc.curate.records import settle
from idc.data.video import PIXEL_FORMATS, VideoError, encode_video, pixel_format_for
from idc.errors import UserError, nearest

OPEN, ENCODE = "source", "encode"
STEP_FAILED, SOURCE_FAILED, WORKER_DIED = "step failed", "source failed", "worker died"
FAULTS = (STEP_FAILED, SOURCE_FAILED, WORKER_DIED, UNREACHED)
PRESETS = (
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow", "placebo"),
)


@dataclass(frozen=True)
class Encoding:
    """How clips are encoded.

    Attributes:
        crf: x264's quality, 0 (lossless in YUV) to 51.
        pixel_format: yuv420p plays everywhere; "auto" is yuv444p where a side is under 256 pixels or odd.
        preset: x264's speed preset.
    """

    crf: float = 18.0
    pixel_format: str = "auto"
    preset: str = "medium"

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf={self.crf}: must be in [0, 51]")
        if self.pixel_format not in ("auto", *PIXEL_FORMATS):
            raise UserError(
                f"pixel_format={self.pixel_format!r} is not known{nearest(self.pixel_format, PIXEL_FORMATS)}"
            )
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset!r} is none of x264's{nearest(self.preset, PRESETS)}")

    def __call__(self, candidate: Candidate) -> Outcome:
        """The candidate with its clip as a file in the place of pixels; a drop where it has neither."""
        if candidate.clip is None:
            return candidate if candidate.encoded else candidate.dropped(ENCODE, "no clip", "no step has cut one")
        frames, height, width, _ = candidate.clip.shape
        fps = candidate.fps or (1.0 if frames == 1 else 0.0)  # a still has no rate of its own
        pixels = pixel_format_for(height, width) if self.pixel_format == "auto" else self.pixel_format
        try:
            mp4 = encode_video(candidate.clip, fps, self.crf, pixels, self.preset)
        except UserError as error:
            return candidate.dropped(ENCODE, "cannot be encoded", str(error))
        return candidate.changed(clip=None, encoded=EncodedClip(mp4, frames, height, width), fps=fps)


@dataclass(frozen=True)
class Work:
    """All that a worker needs to know; it is pickled to the workers.

    Attributes:
        sources, steps, encoding: the way from units to parts.
        settings: digest of the steps' and the encoding's settings.
        threads: of torch within one operation, the same everywhere, since sums depend on it.
        films: how films behind URLs are shared by the workers of a machine; None where each fetches its own.
    """

    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    encoding: Encoding
    settings: str
    threads: int = 1
    films: FilmSharing | None = None

    @contextmanager
    def here(self, folder: str) -> Iterator[None]:
        """What this process needs while it works on a chunk; `folder` is that of the parts."""
        with torch_threads(self.threads), sharing(folder, self.films):
            yield

    def load(self, steps: Iterable[Step], device: str) -> None:
        """Load the networks of some of the steps.

        Raises:
            UserError: where that fails, with the step's name.
        """
        for step in steps:
            try:
                step.load(device)
            except UserError as error:
                raise UserError(f"step {step.name!r}: {error}") from error
            except Exception as error:  # of whatever library the network comes from
                raise UserError(f"step {step.name!r} cannot be loaded: {one_line(error)}") from error

    def opened(self, task: Task, folder: str) -> Outcomes:
        """The candidates of a chunk's units."""
        units = read_units(self.sources, folder, self.settings, task)
        names = [(self.sources[unit.source].name, unit.id) for unit in units]
        outcomes = Outcomes(names, [Count(OPEN)])
        outcomes.candidates = self._open(units, outcomes)
        return outcomes

    def through(self, steps: Sequence[Step], outcomes: Outcomes) -> Outcomes:
        """The same outcomes behind some steps; nothing is computed until the candidates are read."""
        for step in steps:
            outcomes.candidates = _apply(step, iter(outcomes.candidates), outcomes, _count(outcomes, step.name))
        return outcomes

    def encoded(self, outcomes: Outcomes) -> Outcomes:
        """The same outcomes with their clips as files; of two with one key, the first is left."""
        outcomes.candidates = _encode(self.encoding, iter(outcomes.candidates), outcomes, _count(outcomes, ENCODE))
        return outcomes

    def _open(self, units: Sequence[Unit], outcomes: Outcomes) -> Iterator[Candidate]:
        count, drops = outcomes.counts[0], _Drops(outcomes, outcomes.counts[0])
        for unit in units:
            source, found = self.sources[unit.source], 0
            count.came += 1
            for outcome in _opening(source, unit, count):
                found += 1
                if isinstance(outcome, Dropped):
                    drops.add(outcome)
                    continue
                try:
                    candidate = settle(outcome)
                except (ValueError, TypeError) as error:
                    drops.add(outcome.dropped(OPEN, SOURCE_FAILED, one_line(error)))
                    continue
                count.kept += 1
                yield candidate
            if not found:
                drops.add(Dropped(source.name, unit.id, "", OPEN, "nothing in it"))
                found = 1
            count.made += found - 1


def one_line(error: Exception) -> str:
    """An error of somebody's code as one line of at most 400 characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:397] + "..."
    known = isinstance(error, UserError | VideoError | UnreachedError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute with that many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count(outcomes: Outcomes, name: str) -> Count:
    outcomes.counts.append(Count(name))
    return outcomes.counts[-1]


class _Drops:
    """Puts drops in the order of the steps, whatever the order in which steps come upon them."""

    def __init__(self, outcomes: Outcomes, count: Count) -> None:
        self._all, self._count = outcomes, count

    def add(self, drop: Dropped) -> None:
        place = sum(count.dropped for count in self._before()) + self._count.dropped
        self._all.drops.insert(place, drop)
        self._count.dropped += 1
        self._count.failed += drop.reason in FAULTS

    def _before(self) -> Iterator[Count]:
        for count in self._all.counts:
            if count is self._count:
                return
            yield count


def _opening(source: Source, unit: Unit, count: Count) -> Iterator[Outcome]:
    """`source.open` timed, with a fault as a drop behind what had come."""
    began = time.monotonic()
    try:
        for outcome in source.open(unit.id, unit.payload):
            count.seconds += time.monotonic() - began
            yield outcome
            began = time.monotonic()
    except UserError:
        raise
    except Exception as error:  # a source's fault costs its unit, with the reason, and not the run
        yield Dropped(source.name, unit.id, "", OPEN, _reason(error, SOURCE_FAILED), one_line(error))
    count.seconds += time.monotonic() - began


def _apply(step: Step, candidates: Iterator[Candidate], outcomes: Outcomes, count: Count) -> Iterator[Candidate]:
    drops = _Drops(outcomes, count)
    while batch := list(islice(candidates, max(1, step.batch))):
        count.came += len(batch)
        began = time.monotonic()
        results = _call(step, batch)
        used = "; ".join(step.models)
        count.seconds += time.monotonic() - began
        for candidate, found in zip(batch, results, strict=True):
            count.made += len(found) - 1
            for outcome in found:
                if isinstance(outcome, Dropped):
                    drops.add(replace(outcome, step=step.name))
                    continue
                try:
                    settled = settle(_with_models(candidate, outcome, step.name, used))
                except (ValueError, TypeError, AttributeError) as error:
                    drops.add(candidate.dropped(step.name, STEP_FAILED, one_line(error)))
                    continue
                count.kept += 1
                yield settled


def _call(step: Step, batch: Sequence[Candidate]) -> list[Sequence[Outcome]]:
    """What became of each. After a fault each is tried alone, so that only the one at fault is dropped."""
    try:
        found = [list(outcomes) for outcomes in step(batch)]
        if len(found) != len(batch) or not all(found):
            raise ValueError(f"gave {sum(map(bool, found))} answers for {len(batch)} candidates")
        return found  # type: ignore[return-value]  # a list of lists is invariant
    except UserError as error:
        raise UserError(f"step {step.name!r}: {error}") from error
    except Exception as error:  # a step's fault costs its candidate, counted: too many stop the run
        if len(batch) > 1:
            return [_call(step, [candidate])[0] for candidate in batch]
        return [[batch[0].dropped(step.name, _reason(error, STEP_FAILED), one_line(error))]]


def _reason(error: Exception, otherwise: str) -> str:
    if isinstance(error, UnreachedError):
        return UNREACHED
    return "unreadable video" if isinstance(error, VideoError) else otherwise


def _with_models(before: Candidate, after: Candidate, step: str, used: str) -> Candidate:
    """What a step gave, with the models that it has (`Step.models`)."""
    as_before = after is before and step in before.models
    if not used or as_before or after.models is not before.models:
        return after
    return after.changed(models={**after.models, step: used})


def _encode(
    encoding: Encoding, candidates: Iterator[Candidate], outcomes: Outcomes, count: Count
) -> Iterator[Candidate]:
    drops = _Drops(outcomes, count)
    keys: set[str] = set()
    for candidate in candidates:
        count.came += 1
        began = time.monotonic()
        outcome: Any
        try:
            outcome = (
                candidate.dropped(ENCODE, "key comes twice", "in its chunk")
                if candidate.key in keys
                else encoding(candidate)
            )
        except Exception as error:  # of FFmpeg's, as a step's
            outcome = candidate.dropped(ENCODE, STEP_FAILED, one_line(error))
        count.seconds += time.monotonic() - began
        if isinstance(outcome, Dropped):
            drops.add(outcome)
            continue
        keys.add(candidate.key)
        count.kept += 1
        yield outcome


def died(work: Work, task: Task, folder: str, detail: str) -> Outcomes:
    """The outcome of a chunk whose worker died, twice: every unit is dropped."""
    units = read_units(work.sources, folder, work.settings, task)
    outcomes = Outcomes([(work.sources[unit.source].name, unit.id) for unit in units], [Count(OPEN)])
    drops = _Drops(outcomes, outcomes.counts[0])
    for source, id in outcomes.units:
        outcomes.counts[0].came += 1
        drops.add(Dropped(source, id, "", OPEN, WORKER_DIED, detail))
    return outcomes

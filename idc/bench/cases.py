"""Cases of a benchmark and how they take turns: warm-up, repeats by the device's clock, peak memory, what failed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from idc.errors import UserError

WHOLE = "whole"
Repeat = dict[str, float]
"""Seconds of one repeat: `whole`, and its parts by name."""


class Clock:
    """Marks on the device's own time line: CUDA events, which do not make the host wait, or the host's clock.

    Args:
        device: that the marks are of.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._names: list[str] = []
        self._marks: list[Any] = [self._now()]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def end(self, part: str) -> None:
        """What was done since the last mark was `part`; a part may come several times."""
        self._names.append(part)
        self._marks.append(self._now())

    def read(self) -> Repeat:
        """The parts in seconds, and `whole`. Waits for the device; what follows the last mark is in `whole` alone."""
        last = self._now()
        if self._cuda:
            last.synchronize()

        def between(a: Any, b: Any) -> float:
            return a.elapsed_time(b) / 1e3 if self._cuda else b - a

        seconds = {WHOLE: between(self._marks[0], last)}
        for name, a, b in zip(self._names, self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + between(a, b)
        return seconds


Step = Callable[[Clock], Any]
Around = AbstractContextManager[Any]
NOTHING: Around = nullcontext()


class Turn(Protocol):
    """So many repeats, which `around` encloses, after so many that do not count.

    A profiler comes as `around`: what the first repeats of a turn build (an optimiser's states) is then not in it.
    """

    def __call__(self, warm_up: int, repeats: int, around: Around = NOTHING, /) -> list[Repeat]: ...


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: in the table.
        turn: runs it.
        against: the case that it is a peer of, or "": its ratio says how many times as long it takes.
        flops: operations of a repeat by the analytic count (`idc.models.cost`), without recomputation; 0 for none.
            Called once it has run where it depends on `counts`.
        work: operations of its forward and backward passes, with recomputation, as `idc plan` counts them; 0 where it
            plans nothing like it, or the case has no parts `forward` and `backward`.
        items: what a repeat makes (clips, videos, batches), for rates; 0 for none.
        settings: what the case ran with, in words: `attention`, `checkpointing`, `compile`, ...
        counts: counted by the case itself while it runs, such as forwards per iteration.
        note: what a reader must know.
    """

    name: str
    turn: Turn
    against: str = ""
    flops: int | Callable[[], int] = 0
    items: float = 0.0
    settings: Mapping[str, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    note: str = ""
    work: int = 0


@dataclass
class Outcome:
    """What a case gave so far.

    Attributes:
        rounds: repeats of each round that the case came through.
        peak_bytes: the most that tensors took while repeats ran; None off a GPU.
        status: "ok", "out of memory", "failed: ..." or "interrupted".
    """

    group: str
    case: Case
    rounds: list[list[Repeat]] = field(default_factory=list)
    peak_bytes: int | None = None
    status: str = "ok"


@dataclass(frozen=True)
class Group:
    """Cases that share weights and take turns. `open` builds what they share and frees it at the end."""

    title: str
    open: Callable[[], AbstractContextManager[Sequence[Case]]]


def stepwise(open_step: Callable[[], AbstractContextManager[Step]], device: torch.device) -> Turn:
    """A turn of steps: `open_step` builds what a step needs for the length of the turn (an optimiser, say)."""

    def turn(warm_up: int, repeats: int, around: Around = NOTHING) -> list[Repeat]:
        with open_step() as step:

            def once() -> Repeat:
                clock = Clock(device)
                step(clock)
                return clock.read()

            for _ in range(warm_up):
                once()
            reset_peak(device)
            with around:
                return [once() for _ in range(repeats)]

    return turn


def run(
    groups: Sequence[Group],
    device: torch.device,
    rounds: int,
    repeats: int,
    warm_up: int,
    outcomes: list[Outcome],
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Fill `outcomes`, which holds all that was measured also where this is interrupted.

    Every other round takes the cases in reverse. A case that runs out of memory or fails is left out from then on.

    Args:
        warm_up: repeats of a case's first turn that do not count; later turns have one.

    Raises:
        KeyboardInterrupt: passed on; the case under way is then marked.
    """
    for group in groups:
        own: list[Outcome] = []
        try:
            with group.open() as cases:
                own = [Outcome(group.title, case) for case in cases]
                outcomes += own
                for number in range(rounds):
                    for outcome in own[:: 1 if number % 2 == 0 else -1]:
                        if outcome.status == "ok":
                            tell(f"{group.title}: {outcome.case.name}, round {number + 1} of {rounds}")
                            _take_turn(outcome, device, repeats, warm_up if number == 0 else 1)
        except Exception as error:  # whatever a peer or a mode raises: a row says so, the others go on
            outcomes.append(Outcome(group.title, Case("all of it", _never), status=reason(error)))
        except KeyboardInterrupt:
            for outcome in own:
                if outcome.status == "ok" and len(outcome.rounds) < rounds:
                    outcome.status = "interrupted"
            raise
        free(device)


def _never(warm_up: int, repeats: int, around: Around = NOTHING) -> list[Repeat]:
    return []


def _take_turn(outcome: Outcome, device: torch.device, repeats: int, warm_up: int) -> None:
    reset_peak(device)
    try:
        outcome.rounds.append(outcome.case.turn(warm_up, repeats))
    except Exception as error:  # as in `run`
        outcome.status = reason(error)
    else:
        if device.type == "cuda":
            outcome.peak_bytes = max(outcome.peak_bytes or 0, torch.cuda.max_memory_allocated(device))
    # Here and not above: the exception would hold the frames, and they what they have allocated.
    free(device)


def reason(error: BaseException) -> str:
    """A status of what was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _out_of_memory(text.lower()):
        return "out of memory"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"failed: {kind}{text[:200]}"


def _out_of_memory(text: str) -> bool:
    # The CPU's allocator, cuDNN and cuBLAS raise plain RuntimeErrors.
    return any(words in text for words in ("out of memory", "can't allocate memory", "alloc_failed"))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free(device: torch.device) -> None:
    """Give back a GPU's memory that nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # after an error of the device itself nothing works
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


@contextmanager
def nothing_shared(*cases: Case) -> Iterator[Sequence[Case]]:
    """Cases that need no common weights."""
    yield cases

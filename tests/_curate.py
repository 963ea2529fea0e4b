"""Small sources and steps for the engine's tests, and runs of them in processes of their own."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idc.curate.candidate import (
    Candidate,
    CuratedSubject,
    EncodedClip,
    Outcome,
    Reference,
    Source,
    Step,
    encode_png,
    key_of,
)
from idc.curate.engine import Curation
from idc.curate.local import LocalExecutor
from idc.curate.writing import ShardWriting
from idc.data import storage
from idc.errors import UserError


@dataclass
class Numbers(Source):
    """Units 0, 1, 2, ...; each is one candidate."""

    count: int = 10
    first: int = 0
    name: str = "numbers"

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number in range(self.first, self.first + self.count):
            yield f"n{number:05d}", {"number": number}

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        key = key_of(id, f"{self.name}/{id}")
        yield Candidate(key, self.name, id, f"/nowhere/{id}.mp4", meta={"number": payload["number"]}, licence="CC0")

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Numbers", "name": self.name}  # which of them there are is no setting


class Again(Numbers):
    """As from shards that were made by other models."""

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        for candidate in super().open(id, payload):
            yield candidate.changed(models={"weigh": "linear 0.1", "idle": "idle 0.1", "caption": "a writer"})


class Resets(Numbers):
    """The store of the parts ends connections, in the worker that takes these."""

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        def ended(path: str) -> Any:
            raise ConnectionResetError(104, "Connection reset by peer")

        storage.open_atomic = ended
        return super().open(id, payload)


@dataclass
class Cut(Step):
    """Gives each a picture of its own, a mask, a reference and an embedding; as a file at once where `encoded`."""

    encoded: bool = True
    size: int = 16

    def apply(self, candidate: Candidate) -> Outcome:
        draw = np.random.default_rng(candidate.meta["number"])
        clip = draw.integers(0, 256, (1, self.size, self.size, 3), dtype=np.uint8)
        subject = CuratedSubject(
            "a number",
            mask=clip[0, :, :, 0] > 127,
            embedding=clip[0, 0, :, 0].astype(np.float32),
            references=(Reference(encode_png(clip[0])),),
        )
        changed = candidate.changed(
            fps=8.0, ranks=(np.int64(0),), subjects=(subject,), caption=f"number {candidate.key}"
        )
        if self.encoded:
            return changed.changed(encoded=EncodedClip(clip.tobytes(), 1, self.size, self.size))
        return changed.changed(clip=clip)


@dataclass
class Split(Step):
    """Every third becomes two, every seventh is dropped."""

    def apply(self, candidate: Candidate) -> Outcome | Sequence[Outcome]:
        number = candidate.meta["number"]
        if number % 7 == 3:
            return candidate.dropped(self.name, "seventh", f"{number} % 7 is 3")
        if number % 3:
            return candidate
        return [candidate.changed(key=f"{candidate.key}-{half}", meta={"half": half}) for half in "ab"]


class Weigh(Step):
    """A network, as far as the engine sees: the score depends on the candidate alone, the batch is noted in a log."""

    heavy = True

    def __init__(self, batch: int = 4, log: str = "") -> None:
        self.batch, self._log = batch, log
        self._net: torch.nn.Linear | None = None

    @property
    def models(self) -> tuple[str, ...]:
        return ("linear 1.0",)

    def load(self, device: torch.device | str = "cpu") -> None:
        if self._net is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self._net = torch.nn.Linear(16, 1).to(device)
            self._note(f"load {os.getpid()}")

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        assert self._net is not None
        self._note("batch " + " ".join(candidate.key for candidate in candidates))
        with torch.no_grad():
            vectors = [torch.from_numpy(candidate.subjects[0].embedding) for candidate in candidates]
            weights = [self._net(vector.to(self._net.weight.device)).cpu() for vector in vectors]
        # As NumPy has it, on purpose: what the next step sees must be a plain number wherever it runs.
        return [[c.scored(weight=w.numpy()[0])] for c, w in zip(candidates, weights, strict=True)]

    def _note(self, line: str) -> None:
        if self._log:
            with open(self._log, "a") as log:
                log.write(line + "\n")


class Idle(Step):
    """Has a model, and nothing to do."""

    models = ("idle 1.0",)

    def apply(self, candidate: Candidate) -> Outcome:
        return candidate


@dataclass
class Heavy(Step):
    """Drops what weighs too much; looks at how plain the data is on the way."""

    limit: float = -60.0

    def apply(self, candidate: Candidate) -> Outcome:
        weight = candidate.scores["weight"]
        assert type(weight) is float
        assert isinstance(candidate.subjects[0].embedding, np.ndarray)
        if weight > self.limit:
            return candidate.dropped(self.name, "too heavy", f"{weight:.3f} > {self.limit}")
        return candidate.changed(meta={"pair": (1, weight)})


@dataclass
class HeavyCut(Cut):
    """`Cut` where the networks are."""

    heavy = True


class Pid(Step):
    """Notes the process that it works in."""

    def __init__(self, log: Path | str) -> None:
        self._log = str(log)

    def apply(self, candidate: Candidate) -> Outcome:
        with open(self._log, "a") as log:
            log.write(f"{os.getpid()}\n")
        return candidate


@dataclass
class Fails(Step):
    """Raises for some numbers."""

    numbers: tuple[int, ...] = ()
    batch: int = 4

    def apply(self, candidate: Candidate) -> Outcome:
        if candidate.meta["number"] in self.numbers:
            raise RuntimeError(f"number {candidate.meta['number']}\nis not liked")
        return candidate


@dataclass
class Dies(Step):
    """Kills its process at some numbers; once only, where a folder is given to remember it in."""

    numbers: tuple[int, ...] = ()
    once: str = ""

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Dies"}  # what comes out is the same, once it has come out

    def apply(self, candidate: Candidate) -> Outcome:
        number = candidate.meta["number"]
        if number in self.numbers:
            mark = Path(self.once, str(number))
            if not self.once or not mark.exists():
                if self.once:
                    mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return candidate


RECIPE = str(Path(__file__).parents[1] / "recipes" / "curate.yaml")
STEPS = (Cut(), Split(), Weigh(), Heavy())


def curation(
    out: Path | str, count: int = 60, workers: int = 0, steps: Sequence[Step] = STEPS, **more: Any
) -> Curation:
    """A small curation: numbers, some split in two, some dropped, with a network's scores."""
    more = {"sources": [Numbers(count)], "chunk": 6, "progress": False, "executor": LocalExecutor(workers), **more}
    more.setdefault("writing", ShardWriting(samples_per_shard=8, held_out=0.2))
    return Curation(steps=steps, out=str(out), **more)


def run(out: str, *args: Any, **kwargs: Any) -> None:
    """A whole run, in a process of its own."""
    curation(out, *args, **kwargs).run()


def files(out: Path | str) -> dict[str, bytes]:
    """What a run has made, but for its own notes and locks."""
    root = Path(out)
    found = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    own = ("lock", "plan.jsonl", "settings.json")
    return {name: data for name, data in found.items() if Path(name).name not in own}


@dataclass
class Interrupts(Step):
    """Sends a process a signal when a number comes, once: `mark` is a file to remember that."""

    number: int
    mark: str
    pid: int
    signal: int

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Interrupts"}

    def apply(self, candidate: Candidate) -> Outcome:
        if candidate.meta["number"] == self.number and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(self.pid, self.signal)
        return candidate


def stopped(out: str, mark: str, log: str, workers: int, number: int) -> None:
    """A run that is sent a signal while it is at number 20; its words go into a file, its status is the command's."""
    from idc.cli import main
    from idc.curate import command

    here = curation(out, workers=workers, steps=(*STEPS, Interrupts(20, mark, os.getpid(), number)))
    command.parse = lambda args: here  # the command as it is, but for its recipe
    with open(log, "w") as words:
        sys.stdout = sys.stderr = words
        status = main(["curate", "--config", RECIPE])
    sys.exit(status)


def peak_growth(out: str, count: int, size: int, answer: str) -> None:
    """How many bytes the peak of memory grows over a run of `count` candidates with clips of `size` bytes, after a run
    of a twentieth of that, which loads all that is ever loaded."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    for number, share in (("warm", count // 20), ("whole", count)):
        before = peak()
        curation(f"{out}-{number}", share, steps=(Clips(size),), chunk=16, writing=ShardWriting()).run()
    Path(answer).write_text(str(peak() - before))


@dataclass
class Clips(Step):
    """Clips that are files of so many bytes, with a picture."""

    size: int = 1024

    def apply(self, candidate: Candidate) -> Outcome:
        mp4 = candidate.meta["number"].to_bytes(8, "big") * (self.size // 8)
        subject = CuratedSubject("a number", references=(Reference(b"picture", "png"),))
        encoded = EncodedClip(mp4, 1, 16, 16)
        return candidate.changed(fps=8.0, caption="a number", encoded=encoded, subjects=(subject,))


class Unready(Cut):
    """A step whose weights are not there."""

    def apply(self, candidate: Candidate) -> Outcome:
        raise UserError("no weights at /models/sam")

"""A judged run on disk: `run.json` says what was judged and how, `results/<id>.jsonl` has a line per video and metric.

Lines are only ever appended, each in one write, and the last one of a metric counts; so a process that is killed at
any time leaves at most one torn last line, which the reader drops and the next line does not stick to. One file a
video lets any rank, and any later number of ranks, go on with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from idc.errors import UserError

RUN_FILE = "run.json"
RESULTS_FOLDER = "results"


@dataclass(frozen=True)
class Result:
    """What one metric found on one video.

    Attributes:
        id: of the item; the video is `<id>.mp4`.
        metric: `VideoMetric.name`.
        value: raw, within the metric's own bounds; None where there is none.
        reason: why there is no value; "" where there is one.
        applies: False where the metric's protocol does not score such an item: it is not expected either.
        details: plain JSON (per frame, per subject, per run of a judge).
        seconds: that scoring took, without decoding.
        video: the file's name within the run's videos.
        fingerprint: of the video's bytes and all that was asked of it; another one makes the result stale.
        config: of the metric's settings; another one makes the result stale.
    """

    id: str
    metric: str
    value: float | None
    reason: str = ""
    applies: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    category: str = ""
    prompt: str = ""
    video: str = ""
    fingerprint: str = ""
    config: str = ""

    @property
    def failed(self) -> bool:
        """Whether a value was expected and is missing."""
        return self.applies and self.value is None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a run that belongs to no item, such as a video that nobody asked for."""

    file: str
    reason: str


@dataclass(frozen=True)
class RunInfo:
    """What was judged, with what. All of it is plain JSON.

    Attributes:
        system: the name of what made the videos, as tables print it.
        protocol: "paper", "opens2v-1.0", "opens2v-1.1" or "toy" (`idc.metrics.total`).
        items: id -> category of every item that was asked for, in order; their number is `expected`.
        commit: of this code; "" outside a checkout, with "+changes" for one that has local changes.
        versions: of the packages that scores depend on.
        config: the settings of the run, as the recipe has them.
        metrics: name -> {"class", "models", "bounds", "frames", "config", "settings"}.
        rewards: names of the models that served as training rewards of the system, where known.
        columns: free numbers and words that a table may show, such as a guidance scale.
        videos: the folder of the videos, as an absolute path.
        problems: what is wrong with the run beyond single scores.
    """

    system: str
    protocol: str
    items: Mapping[str, str]
    commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rewards: Sequence[str] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    videos: str = ""
    problems: Sequence[Problem] = ()

    @property
    def expected(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Mean:
    """A mean over videos: NaN where none has a score. Print it with `scored / expected`."""

    value: float
    scored: int
    expected: int

    @property
    def complete(self) -> bool:
        return self.scored == self.expected

    def __str__(self) -> str:
        value = "-" if math.isnan(self.value) else f"{self.value:.4f}"
        return f"{value} ({self.scored} / {self.expected})"


@dataclass(frozen=True)
class Run:
    """A run folder as it was read: `results` are the current ones, by (id, metric), in the order of the items."""

    path: Path
    info: RunInfo
    results: Mapping[tuple[str, str], Result]

    def of(self, metric: str) -> list[Result]:
        """The results of one metric, in the order of the items; those that do not apply are left out."""
        found = (self.results.get((id, metric)) for id in self.info.items)
        return [result for result in found if result is not None and result.applies]

    def mean(self, metric: str, categories: Iterable[str] | None = None) -> Mean:
        """Mean of the raw scores of the items (of some categories), with how many there are and should be.

        An item without a line counts as expected; one to which the metric does not apply does not.
        """
        kept = None if categories is None else set(categories)
        ids = [id for id, category in self.info.items.items() if kept is None or category in kept]
        results = [self.results.get((id, metric)) for id in ids]
        expected = sum(1 for result in results if result is None or result.applies)
        return mean_of([result for result in results if result is not None], expected)

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results.values() if result.failed]

    @property
    def unscored(self) -> int:
        """How many (item, metric) pairs have no line yet: the run was interrupted."""
        return sum(1 for id in self.info.items for name in self.info.metrics if (id, name) not in self.results)


def mean_of(results: Iterable[Result], expected: int | None = None) -> Mean:
    """The mean of the values that are there, exact in whatever order; `expected` defaults to the applicable ones."""
    results = [result for result in results if result.applies]
    values = [result.value for result in results if result.value is not None]
    mean = math.fsum(values) / len(values) if values else math.nan
    return Mean(mean, len(values), len(results) if expected is None else expected)


# Reading ------------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> Run:
    """A run folder, finished or not. Lines of former settings, of items no longer asked for and torn ones are left out.

    Raises:
        UserError: if the folder has no readable `run.json`, or a line of a results file is no result.
    """
    path = Path(path)
    info = read_info(path)
    found: dict[tuple[str, str], Result] = {}
    for id in info.items:
        for result in read_results(results_file(path, id)):
            settings = info.metrics.get(result.metric)
            if settings is not None and settings.get("config", result.config) == result.config:
                found[id, result.metric] = result
    order = {name: rank for rank, name in enumerate(info.metrics)}
    places = {id: rank for rank, id in enumerate(info.items)}
    keys = sorted(found, key=lambda key: (places[key[0]], order[key[1]]))
    return Run(path, info, {key: found[key] for key in keys})


def read_info(path: str | Path) -> RunInfo:
    """`run.json` of a run folder.

    Raises:
        UserError: if it is missing or is not what `write_info` writes.
    """
    file = Path(path) / RUN_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no {RUN_FILE} here; a run folder is the `out` of idc evaluate") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    known = {f.name for f in fields(RunInfo)}
    missing = [name for name in ("system", "protocol", "items") if not isinstance(values, dict) or name not in values]
    if missing or not isinstance(values["items"], dict):
        raise UserError(f"{file}: not a run's description: {', '.join(missing) or 'items'} missing or of another type")
    problems = tuple(Problem(problem["file"], problem["reason"]) for problem in values.get("problems", ()))
    return RunInfo(**{key: value for key, value in values.items() if key in known} | {"problems": problems})


def read_results(file: Path) -> list[Result]:
    """All lines of one results file, oldest first; [] where there is none. A line that a kill cut off is dropped.

    Raises:
        UserError: for a line that is whole and still no result.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    known = {f.name for f in fields(Result)}
    results = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # empty, or torn: no part of a JSON object is JSON
        try:
            results.append(Result(**{key: value for key, value in values.items() if key in known}))
        except (TypeError, AttributeError) as error:
            raise UserError(f"{file}, line {number}: not a result: {error}") from None
    return results


# Writing ------------------------------------------------------------------------------------------------------------


def results_file(path: str | Path, id: str) -> Path:
    """Where a run keeps the lines of one item."""
    return Path(path) / RESULTS_FOLDER / f"{id}.jsonl"


def append_result(path: str | Path, result: Result) -> None:
    """Add one line to the run folder `path`, in a single write that is on disk when this returns."""
    file = results_file(path, result.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    line = _line(result)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # the last line is torn
        while line:  # short writes happen on a full disk, and then the next call raises
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_info(path: str | Path, info: RunInfo) -> None:
    """Write `run.json`, whole or not at all."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = {**asdict(info), "expected": info.expected}
    part = folder / f".{RUN_FILE}.part"
    part.write_text(json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, folder / RUN_FILE)


def prune_results(path: str | Path, id: str, fingerprint: str) -> None:
    """Drop an item's lines of another fingerprint: its video has changed, and they say nothing about the new one."""
    file = results_file(path, id)
    lines = read_results(file)
    kept = [result for result in lines if result.fingerprint == fingerprint]
    if len(kept) < len(lines):
        part = file.with_suffix(".part")
        part.write_bytes(b"".join(map(_line, kept)))
        os.replace(part, file)


def _line(result: Result) -> bytes:
    return json.dumps(asdict(result), ensure_ascii=False, allow_nan=False).encode() + b"\n"

"""Where samples come from: folders of shards, toy shards made on demand, and a catalogue over several of them."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from idc.data import storage
from idc.data.index import INDEX_NAME, Entry, ShardIndex, build_index
from idc.data.plan import stable_hash

# Not for type checkers alone: of a module that imports so, the command line would read and parse the whole source
# again each time that it asks whether a class is a Source, some two hundred times a start.
from idc.data.toy import ToyWorld
from idc.errors import UserError

TOY_RECORD = "toy.json"  # the settings that toy shards were made with; written when they are complete
TOY_CLIPS_A_WORKER = 512  # below, starting a process takes longer than it saves


class Source(Protocol):
    """What the data module needs of a source."""

    path: str
    weight: float | None
    name: str | None

    def prepare(self) -> None:
        """Make what is missing on disk; called once a node."""

    def index(self) -> ShardIndex:
        """The index, with this source's name in the ids."""


@dataclass
class ShardSource:
    """A folder (or fsspec URL) of indexed shards.

    Attributes:
        path: folder or URL that holds `index.jsonl` (made by `idc shards index`).
        weight: this source's share of the drawn samples relative to the other sources'. Give it to all or to none;
            without, each source has the share of its samples, and each sample comes once an epoch.
        name: first part of the samples' ids; the folder's name by default.
        part: `train` and `held_out` share the folder by source video (`split_by_video`); `all` takes everything.
        held_out: the share of the samples that are held out, as near as whole videos allow.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    part: Literal["all", "train", "held_out"] = "all"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out={self.held_out}: a share between 0 and 1, both excluded; 0.1 is usual")

    def prepare(self) -> None:
        """Nothing: the shards are there or `index` says what to do."""

    def index(self) -> ShardIndex:
        """Read the index. Raises `UserError` where it is missing or stale."""
        index = self._index()
        if self.part == "all":
            return index
        train, held_out = split_by_video(index.entries, self.held_out)
        chosen = train if self.part == "train" else held_out
        if not chosen:
            raise UserError(f"{self.path}: {len(index)} samples are too few to hold some out; part='all' takes all")
        return replace(index, entries=chosen, hash=stable_hash([index.hash, self.part, self.held_out, len(chosen)]))

    def _index(self) -> ShardIndex:
        return ShardIndex.load(self.path, source=source_name(self))


@dataclass
class ToyShards:
    """Shards of the toy world, written on first use.

    They are made anew where the settings or the toy world's code differ from those on disk, or an earlier attempt was
    interrupted. Processes that ask at the same time wait for the one that writes.

    Attributes:
        path: local folder of their own.
        count: number of clips.
        seed: clip i is drawn from seed + i; keep the ranges of training and held-out data apart.
        weight, name: as in `ShardSource`.
        others: settings of `idc.data.toy.ToyWorld`, with its defaults.
    """

    path: str
    count: int
    seed: int = 0
    weight: float | None = None
    name: str | None = None
    frames: int = 9
    height: int = 64
    width: int = 64
    fps: float = 8.0
    subjects: tuple[float, ...] = (0.3, 0.4, 0.3)
    reference_size: int = 32
    curated: bool = True
    combinations: str = "all"
    named: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"count={self.count}: must be 1 or more")
        if storage.is_url(self.path):
            raise UserError(f"path={self.path!r}: toy shards are written to a local folder")

    def prepare(self) -> None:
        """Write the shards unless they are there."""
        if self._ready():
            return
        from filelock import FileLock

        folder = Path(self.path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{os.path.normpath(self.path)}.lock"):
            if not self._ready():
                self._write(folder)

    def index(self) -> ShardIndex:
        """Read the index. Raises `UserError` where `prepare` has not run."""
        return ShardIndex.load(self.path, source=source_name(self))

    def world(self) -> ToyWorld:
        """The world that the clips are drawn from. Raises `UserError` for settings it does not allow."""
        return ToyWorld(**{field.name: getattr(self, field.name) for field in fields(ToyWorld)})

    def _settings(self) -> dict[str, Any]:
        return {"count": self.count, "seed": self.seed, "world": asdict(self.world()), "code": _toy_code()}

    def _ready(self) -> bool:
        try:
            record = json.loads((Path(self.path) / TOY_RECORD).read_bytes())
        except (OSError, ValueError):
            return False
        return record.get("hash") == stable_hash(self._settings())

    def _write(self, folder: Path) -> None:
        foreign = [name for name in storage.list_tars(folder) if not name.startswith("toy-")]
        if foreign:
            raise UserError(f"{folder}: holds other shards ({foreign[0]}); give the toy shards a folder of their own")
        for name in (TOY_RECORD, INDEX_NAME, *storage.list_tars(folder)):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        settings = self._settings()
        workers = min(os.cpu_count() or 1, self.count // TOY_CLIPS_A_WORKER)
        _write_with_progress(folder, self.count, self.seed, self.world(), workers)
        build_index(folder, source_name(self)).save()
        with storage.open_atomic(str(folder / TOY_RECORD)) as stream:
            stream.write(json.dumps({"hash": stable_hash(settings), **settings}, indent=1).encode())


def _toy_code() -> str:
    """Digest of the source of the toy world, the same on all nodes (a rendered clip's need not be)."""
    files = sorted(Path(__file__).parent.glob("toy*.py"))
    return stable_hash([path.read_text() for path in files if "scor" not in path.name and "track" not in path.name])


def _write_with_progress(folder: Path, count: int, seed: int, world: ToyWorld, workers: int) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from idc.data.toy_shards import write_toy_shards

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"toy clips in {folder}", total=count)
        write_toy_shards(
            folder,
            count,
            seed,
            world,
            workers if workers > 1 else 0,
            progress=lambda done: bar.update(task, completed=done),
        )


def split_by_video(entries: Sequence[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) entries, with no video in both.

    The video is a key without its last "-part", as `idc shards build` writes them. In an order given by their names
    alone, each video is held out that brings the held-out samples nearer to `share` of all; at least one video is, and
    never all. Where all entries come from one video, its last ones are held out.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.key.rpartition("-")[0] or entry.key, []).append(entry)
    if len(groups) == 1:
        last = max(1, round(share * len(entries))) if len(entries) > 1 else 0
        ordered = sorted(entries, key=lambda entry: entry.key)
        return ordered[: len(ordered) - last], ordered[len(ordered) - last :]
    chosen = hold_out({video: len(members) for video, members in groups.items()}, share)
    held_out = [entry for video, members in groups.items() for entry in members if video in chosen]
    return [entry for video, members in groups.items() for entry in members if video not in chosen], held_out


def hold_out(sizes: Mapping[str, int], share: float) -> set[str]:
    """The videos that are held out of `sizes` (video -> number of its samples), by the rule of `split_by_video`.

    Neither none of them nor all, unless there is but one, which is not held out.
    """
    drawn = sorted(sizes, key=lambda video: (stable_hash(["held out", video]), video))
    chosen, rest = set(), share * sum(sizes.values())
    for video in drawn:
        if abs(rest - sizes[video]) < abs(rest):
            chosen.add(video)
            rest -= sizes[video]
    smallest = min(drawn, key=lambda video: sizes[video], default="")
    if not chosen and len(sizes) > 1:
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.discard(smallest)
    return chosen


def source_name(source: Source) -> str:
    """The given name, or the folder's."""
    return source.name or source.path.rstrip("/").rsplit("/", 1)[-1]


class Catalogue:
    """Entries of several sources under one count: `catalogue[ref]` is (root, entry), in the sources' order."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._roots = [index.root for index in indexes]
        self._entries = [index.entries for index in indexes]
        self._starts = [0]
        for index in indexes:
            self._starts.append(self._starts[-1] + len(index))
        self.hash = stable_hash([index.hash for index in indexes])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, ref: int) -> tuple[str, Entry]:
        source = bisect.bisect_right(self._starts, ref) - 1
        return self._roots[source], self._entries[source][ref - self._starts[source]]

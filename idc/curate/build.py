"""Building shards from a folder of videos: resumable, every drop accounted for.

`build.jsonl` beside the shards is the journal: its first line holds the settings; each further line is written when a
shard is complete and names the samples in it and the videos that are finished with it. Whatever is not in the journal
is done again, so a run can be killed at any moment without losing or doubling a sample.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from idc.curate.clips import Clip, ClipSettings, Drop, cut_video
from idc.curate.sources.listing import may_be_video, walk
from idc.data import storage
from idc.data.index import ShardIndex, build_index
from idc.data.shards import ShardWriter
from idc.errors import UserError, make_folder
from idc.models.faces import FaceDetector, yunet_path

JOURNAL = "build.jsonl"
DROPS = "drops.jsonl"
PREFIX = "clips"


@dataclass
class BuildReport:
    """What a build has done, this run and the ones before it together.

    Attributes:
        index: of all shards written, or None where there are none.
        videos: videos looked at.
        skipped: of these, how many earlier runs had finished.
        samples: samples in the shards.
        drops: every window or video that gave no sample.
        changed: names of finished videos whose file has another size now; their samples are of the old file.
    """

    index: ShardIndex | None = None
    videos: int = 0
    skipped: int = 0
    samples: int = 0
    drops: list[Drop] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """How many drops there are of each reason."""
        return Counter(drop.reason for drop in self.drops)


def build_shards(
    videos: Path,
    out: Path,
    settings: ClipSettings,
    samples_per_shard: int = 256,
    workers: int = 1,
    limit: int = 0,
    progress: bool = True,
) -> BuildReport:
    """Cut all videos under a folder into shards under `out`, with index, journal and list of drops.

    Args:
        videos: folder, searched recursively.
        out: folder of shards; a build that was begun there with the same settings is continued.
        settings: how to cut.
        samples_per_shard: samples in a shard; also what a killed run may have to do again.
        workers: processes; with more than one, each holds the samples of a whole video in memory.
        limit: at most this many videos, 0 for all.
        progress: show a progress bar.

    Raises:
        UserError: if there are no videos, or `out` was begun with other settings or holds other shards.
    """
    yunet_path()
    names = find_videos(videos, out)[: limit or None]
    journal = _Journal(out, settings)
    journal.clean()
    done = journal.finished()
    todo = [name for name in names if name not in done]
    report = BuildReport(videos=len(names), skipped=len(names) - len(todo))
    report.changed = [name for name in names if name in done and done[name] != _size(videos / name)]
    kept = journal.keys()
    with _Committer(out, journal, settings, samples_per_shard) as committer:
        for name, items in _track(_cut_all(videos, todo, settings, workers), len(todo), progress):
            drops = []
            for item in items:
                if isinstance(item, Drop):
                    drops.append(item)
                elif item.key not in kept:
                    committer.add(item, name)
            committer.finish_video(name, _size(videos / name), drops)
    report.drops = journal.drops()
    report.samples = len(journal.keys())
    with storage.open_atomic(str(out / DROPS)) as stream:
        stream.writelines(json.dumps(asdict(drop)).encode() + b"\n" for drop in report.drops)
    if storage.list_tars(out):
        report.index = _index(out)
    return report


def _index(out: Path) -> ShardIndex:
    """The index of the shards, read where it is still good and made where it is not."""
    try:
        return ShardIndex.load(out)
    except UserError:
        index = build_index(out)
        index.save()
        return index


def find_videos(folder: Path, out: Path) -> list[str]:
    """Paths relative to `folder` of all files that may be videos, sorted; hidden files and `out` are left out."""
    if not folder.is_dir():
        raise UserError(f"--videos {folder}: no such folder")
    files = (file.path for files in walk(str(folder), str(out), "--videos") for file in files)
    names = sorted(name for name in files if may_be_video(name))
    if not names:
        raise UserError(f"--videos {folder}: no video files in it")
    return names


def _size(path: Path) -> int:
    """Bytes of a file, or -1 where it cannot be read: a dangling link, or a file removed meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _cut_all(
    videos: Path, names: list[str], settings: ClipSettings, workers: int
) -> Iterator[tuple[str, Iterable[Clip | Drop]]]:
    """(name, clips and drops) of each video, in order of names whatever the number of workers."""
    if workers <= 1:
        detector = FaceDetector()
        for name in names:
            yield name, cut_video(videos / name, name, settings, detector)
        return
    # Spawned, not forked: OpenCV's and FFmpeg's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[tuple[str, Future[list[Clip | Drop]]]] = deque()
        try:
            for name in names:
                waiting.append((name, pool.submit(_cut_whole, videos / name, name, settings)))
                if len(waiting) > workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _cut_whole(path: Path, name: str, settings: ClipSettings) -> list[Clip | Drop]:
    return list(cut_video(path, name, settings, FaceDetector()))


def _track(items: Iterable[Any], total: int, progress: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(items, "cutting videos", total, console=console, disable=not progress or not console.is_terminal))


class _Journal:
    """The file `build.jsonl`. A last line that was cut short by a kill does not count."""

    def __init__(self, out: Path, settings: ClipSettings) -> None:
        self.out, self.path = out, out / JOURNAL
        make_folder(out)
        wanted = asdict(settings)
        if not self.path.exists():
            if storage.list_tars(out):
                raise UserError(f"--out {out}: holds shards that no build wrote; give an empty folder")
            with storage.open_atomic(str(self.path)) as stream:
                stream.write(json.dumps({"settings": wanted}).encode() + b"\n")
        text = self.path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:
            os.truncate(self.path, len(complete))
        header, *self.lines = (json.loads(line) for line in complete.splitlines())
        other = [name for name in wanted if header["settings"].get(name) != wanted[name]]
        if other:
            was = ", ".join(f"{name}={header['settings'].get(name)!r} (now {wanted[name]!r})" for name in other)
            raise UserError(f"--out {out}: begun with other settings: {was}; give another folder or the same settings")

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.lines.append(line)

    def clean(self) -> None:
        """Remove what a killed run left: shards that were completed but not entered, and temporary files."""
        entered = {line["shard"] for line in self.lines}
        for path in [*self.out.glob(f"{PREFIX}-*.tar"), *self.out.glob("*.tmp")]:
            if path.name not in entered:
                path.unlink()

    def finished(self) -> dict[str, int]:
        """Size of each finished video by name."""
        return {video["name"]: video["size"] for line in self.lines for video in line["videos"]}

    def keys(self) -> set[str]:
        """Keys of all samples in complete shards."""
        return {key for line in self.lines for key in line["keys"]}

    def drops(self) -> list[Drop]:
        """All drops of the finished videos."""
        return [Drop(**drop) for line in self.lines for video in line["videos"] for drop in video["drops"]]

    def next_shard(self) -> int:
        return sum(line["shard"] is not None for line in self.lines)


class _Committer:
    """Writes clips into shards, and a journal line once a shard is complete. An interrupt completes the open shard."""

    def __init__(self, out: Path, journal: _Journal, settings: ClipSettings, samples_per_shard: int) -> None:
        self._journal, self._settings = journal, settings
        self._writer = ShardWriter(out, PREFIX, samples_per_shard, journal.next_shard())
        self._keys: list[str] = []
        self._videos: list[dict[str, Any]] = []

    def add(self, clip: Clip, source: str) -> None:
        self._writer.write(
            clip.key,
            clip.video,
            clip.caption,
            clip.references,
            fps=self._settings.fps,
            frames=clip.frames,
            height=clip.height,
            width=clip.width,
            source=source,
            licence=self._settings.licence,
            meta=clip.meta,
        )
        self._keys.append(clip.key)
        self._enter()

    def finish_video(self, name: str, size: int, drops: list[Drop]) -> None:
        self._videos.append({"name": name, "size": size, "drops": [asdict(drop) for drop in drops]})
        if not self._keys:
            self._append(None)

    def _enter(self) -> None:
        """If the writer has completed a shard, enter it."""
        if self._writer.shards:
            self._append(self._writer.shards.pop())

    def _append(self, shard: str | None) -> None:
        if self._keys or self._videos:
            self._journal.append({"shard": shard, "keys": self._keys, "videos": self._videos})
        self._keys, self._videos = [], []

    def __enter__(self) -> _Committer:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._enter()
        self._append(None)

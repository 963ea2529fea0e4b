"""A store that is away for a while: nothing of it is lost, whatever was read when it went."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from _curate import files
from _shards import clip, picture, write_shards
from fsspec.implementations.memory import MemoryFileSystem

from idc.curate.candidate import Candidate, Dropped, EncodedClip, Outcome, Source, Step
from idc.curate.engine import Curation, CurationReport
from idc.curate.local import LocalExecutor
from idc.curate.reaching import UNREACHED, UnreachedError, reaching
from idc.curate.reading import inspect
from idc.curate.sources import ExistingShards, OpenS2V5M, SubjectImages, VideoFolder
from idc.curate.writing import ShardWriting
from idc.data.index import build_index
from idc.data.video import encode_video
from idc.errors import UserError

ROOT = "memory://away"


@dataclass
class Store:
    """fsspec's memory; while `away` names endings of files, these cannot be opened."""

    fs: Any
    away: tuple[str, ...] = ()
    error: Exception = field(default_factory=lambda: ConnectionError("503 SlowDown"))

    def put(self, name: str, data: bytes) -> None:
        self.fs.pipe(f"/away/{name}", data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store, opened = Store(fsspec.filesystem("memory")), MemoryFileSystem._open

    def busy(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "rb" and path.endswith(store.away or ("?",)):
            raise store.error
        return opened(self, path, mode, **more)

    def ranged(self: Any, path: str, start: int, end: int) -> bytes:
        with self.open(path, "rb") as stream:
            stream.seek(start)
            return bytes(stream.read(end - start))

    monkeypatch.setattr(MemoryFileSystem, "_open", busy)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", ranged)
    yield store
    if store.fs.exists("/away"):
        store.fs.rm("/away", recursive=True)


class Looks(Step):
    """Reads the film itself."""

    def apply(self, candidate: Candidate) -> Outcome:
        info = inspect(candidate).video
        return candidate.changed(encoded=EncodedClip(b"a clip", 1, info.height, info.width), fps=8.0)


@dataclass
class Leaving(LocalExecutor):
    """Files go once all are listed."""

    store: Any = None
    away: tuple[str, ...] = ()

    def run(self, *args: Any) -> Any:
        self.store.away = self.away
        yield from super().run(*args)


def videos(store: Store) -> Source:
    for name in "abc":
        store.put(f"raw/{name}.mp4", clip(1))
    return VideoFolder(f"{ROOT}/raw")


def sidecars(store: Store) -> Source:
    source = videos(store)
    store.put("raw/a.json", json.dumps({"subjects": [{"name": "toy", "references": ["toy.png"]}]}).encode())
    store.put("raw/toy.png", picture("red"))
    return source


def pictures(store: Store) -> Source:
    for name in ("a.png", "b.png"):
        store.put(f"raw/{name}", picture("red"))
    return SubjectImages(f"{ROOT}/raw", same_subject="folder")


def records(store: Store) -> Source:
    videos(store)
    store.put("raw/all.json", json.dumps({name: {"metadata": {"path": f"{name}.mp4"}} for name in "abc"}).encode())
    return OpenS2V5M(f"{ROOT}/raw/all.json", f"{ROOT}/raw")


def shards(store: Store, folder: Path) -> Source:
    write_shards(folder, 3)
    for path in folder.iterdir():
        store.put(f"raw/{path.name}", path.read_bytes())
    build_index(f"{ROOT}/raw").save()
    return ExistingShards(f"{ROOT}/raw", keep_clips=False)


@pytest.mark.parametrize(
    ("kind", "away", "lost"),
    [
        ("videos", ("b.mp4",), 1),
        ("sidecars", ("a.json",), 1),
        ("sidecars", ("toy.png",), 1),
        ("pictures", ("b.png",), 2),  # it is a reference beside the other
        ("records", ("all.json",), 3),
        ("shards", (".tar",), 3),
    ],
)
def test_what_could_not_be_reached_is_a_fault_and_comes_when_it_is_asked_for_again(
    kind: str, away: tuple[str, ...], lost: int, store: Store, tmp_path: Path
) -> None:
    source = shards(store, tmp_path / "given") if kind == "shards" else globals()[kind](store)

    def run(out: str, gone: tuple[str, ...] = (), again: bool = False) -> CurationReport:
        store.away = ()
        return Curation(
            [source],
            [Looks()],
            str(tmp_path / out),
            writing=ShardWriting(keep_without_subjects=True),
            executor=Leaving(store=store, away=gone),
            retry_failed=again,
            progress=False,
        ).run()

    report = run("out", away)
    assert report.written is not None
    reasons = sum((Counter(reasons) for reasons in report.written.dropped.values()), Counter())
    assert reasons == {UNREACHED: lost}
    assert sum(count.failed for count in report.counts) == lost
    assert run("out").done_before == report.units  # not unless it is asked for
    assert run("out", again=True).dropped == 0
    run("undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_a_store_that_stays_away_stops_the_run_and_what_is_not_there_does_not(store: Store, tmp_path: Path) -> None:
    for number in range(24):
        store.put(f"raw/{number:02}.mp4", clip(1))
    source = VideoFolder(f"{ROOT}/raw")

    def run(out: str, gone: tuple[str, ...]) -> CurationReport:
        how: dict[str, Any] = {"writing": ShardWriting(keep_without_subjects=True), "progress": False}
        executor = Leaving(store=store, away=gone)
        return Curation([source], [Looks()], str(tmp_path / out), executor=executor, **how).run()

    with pytest.raises(UserError, match=r"failed by a fault.*ConnectionError: 503 SlowDown.*retry_failed"):
        run("away", (".mp4",))

    class Removing(Leaving):
        def run(self, *args: Any) -> Any:
            store.fs.rm("/away/raw", recursive=True)
            yield from LocalExecutor.run(self, *args)

    store.away = ()
    report = Curation([source], [Looks()], str(tmp_path / "removed"), executor=Removing(), progress=False).run()
    assert report.written is not None
    assert report.written.dropped == {"looks": {"unreadable video": 24}}
    assert not any(count.failed for count in report.counts)


def test_a_list_that_says_less_of_a_film_than_it_did_is_no_list(store: Store, tmp_path: Path) -> None:
    store.put("raw/film.mp4", encode_video(np.zeros((200, 32, 32, 3), np.uint8), 4.0, 20))
    source = VideoFolder(f"{ROOT}/raw", segment_minutes=0.2, segment_from_mib=0)
    assert len(list(source.units())) == 4
    store.away = ("film.mp4",)
    with pytest.raises(UserError, match=r"source 'videos' cannot be listed: film\.mp4: ConnectionError: 503 SlowDown;"):
        Curation([source], [Looks()], str(tmp_path), progress=False).run()
    store.error = PermissionError("403 InvalidObjectState")  # of this film alone, perhaps: its worker will tell
    assert len(list(source.units())) == 1
    store.away = ()
    store.put("raw/film.mp4", b"what no container opens")
    assert [id for id, _ in source.units()] == ["film.mp4@23"]


def test_names_and_rights_of_a_local_disk_stay_as_they_are_and_its_faults_do_not() -> None:
    for error in (FileNotFoundError(2, "gone"), PermissionError(13, "no"), OSError(40, "loop"), ValueError("null")):
        with pytest.raises(type(error)), reaching("/films/a.mp4"):
            raise error
    for error in (OSError(5, "Input/output error"), OSError(116, "Stale file handle")):
        told = rf"^a.mp4: OSError: \[Errno {error.errno}\] "
        with pytest.raises(UnreachedError, match=told), reaching("/films/a.mp4", "a.mp4: "):
            raise error
    for error in (PermissionError("the credentials have expired"), RuntimeError("of a library's own")):
        with pytest.raises(UnreachedError), reaching("s3://films/a.mp4"):
            raise error


def test_a_damaged_sample_behind_a_url_is_a_drop_and_no_fault(store: Store, tmp_path: Path) -> None:
    source = shards(store, tmp_path)
    unit, *_ = source.units()
    path = f"/away/raw/{unit[1]['shard']}"
    with store.fs.open(path, "rb") as tar:
        data = tar.read()
    store.fs.pipe(path, bytes(tarfile.BLOCKSIZE) + data[tarfile.BLOCKSIZE :])
    (dropped,) = source.open(*unit)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "unreadable sample"

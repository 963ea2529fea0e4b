"""Films behind URLs that are taken in segments: fetched once a machine, whatever dies, within a bound."""

from __future__ import annotations

import os
import re
import tarfile
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
from _counted import CountedFolder, fetched
from _server import join, launch

from idc.curate import films as module
from idc.curate.candidate import Candidate
from idc.curate.checks import DecodeCheck
from idc.curate.engine import Curation
from idc.curate.films import Films, FilmSharing, is_taken_in_segments, remove_films, shared_film, sharing
from idc.curate.local import LocalExecutor
from idc.curate.reaching import UnreachedError
from idc.curate.reading import open_source
from idc.curate.segments import Segment
from idc.curate.shots import SceneDetect, Shots
from idc.curate.windows import Cut, Windows
from idc.curate.writing import ShardWriting
from idc.data.video import VideoError, encode_video
from idc.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _forks() -> None:
    """Workers fork from the server of all tests."""
    join(launch(print, [()]))


# The folder that is shared ------------------------------------------------------------------------------------------


class Bucket:
    """Files in fsspec's memory, and how often each was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = uuid.uuid4().hex
        self.opened: list[str] = []
        real = module.storage.open_read
        monkeypatch.setattr(module.storage, "open_read", lambda url: self.opened.append(url[-5]) or real(url))

    def put(self, letter: str, data: bytes) -> str:
        url = f"memory://{self.name}/{letter}.mp4"
        with fsspec.open(url, "wb") as file:
            file.write(data)
        return url


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    return Bucket(monkeypatch)


def taken(folder: Path) -> int:
    """Bytes on the disk below a folder."""
    status = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_size for one in status}.values())


def test_readers_share_one_copy_and_go_without_a_trace(tmp_path, bucket):
    url = bucket.put("a", b"film" * 1000)
    one, other = (Films(tmp_path / "films" / "run", 10_000, name) for name in ("one", "other"))
    paths = [one.path(url), other.path(url), one.path(url)]
    assert bucket.opened == ["a"]
    assert paths[0] == paths[2] != paths[1]
    assert all(Path(path).read_bytes() == b"film" * 1000 and path.endswith(".mp4") for path in paths)
    assert taken(tmp_path) == 4000
    one.close()
    assert not Path(paths[0]).exists()
    remove_films(str(tmp_path))
    assert Path(paths[1]).read_bytes() == b"film" * 1000  # of who is still at work
    other.close()
    remove_films(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_bound_holds_and_what_was_used_longest_ago_goes_first(tmp_path, bucket):
    urls = {letter: bucket.put(letter, letter.encode() * 1000) for letter in "abcd"}
    films = Films(tmp_path / "films" / "run", 2999, "one")
    for letter in "abacab":  # b goes for c, then c for b
        path = films.path(urls[letter])
        assert Path(path).read_bytes() == letter.encode() * 1000
        assert taken(tmp_path) <= 2999
    assert bucket.opened == ["a", "b", "c", "b"]
    with pytest.raises(VideoError, match=r"3000 bytes, more than films_gib allows \(2999 bytes\)"):
        films.path(bucket.put("e", bytes(3000)))
    assert Path(films.path(bucket.put("f", bytes(2999)))).stat().st_size == 2999
    assert taken(tmp_path) == 2999


def test_a_film_in_use_stays_and_who_wants_its_room_waits(tmp_path, bucket, monkeypatch):
    looked = threading.Event()
    monkeypatch.setattr(module.time, "sleep", lambda _: looked.set())
    urls = {letter: bucket.put(letter, letter.encode() * 1000) for letter in "abc"}
    readers = {letter: Films(tmp_path / "films" / "run", 2000, letter) for letter in "abc"}
    kept = {letter: readers[letter].path(urls[letter]) for letter in "ab"}
    open_file = open(kept["a"], "rb")  # noqa: SIM115 - closed below
    waiting = threading.Thread(target=lambda: kept.update(c=readers["c"].path(urls["c"])), daemon=True)
    waiting.start()
    assert looked.wait(30)
    assert "c" not in kept
    assert all(Path(kept[letter]).read_bytes() == letter.encode() * 1000 for letter in "ab")
    readers["a"].close()
    waiting.join(30)
    assert Path(kept["c"]).read_bytes() == b"c" * 1000
    assert Path(kept["b"]).exists()
    assert taken(tmp_path) <= 2000
    with open_file:
        assert open_file.read() == b"a" * 1000  # an open file survives its name


@pytest.mark.parametrize("length", [0, 1, 999, 1001, 5000])
def test_a_film_of_another_length_than_announced_is_told_and_not_kept(length, tmp_path, bucket, monkeypatch):
    url = bucket.put("a", b"x" * length)
    monkeypatch.setattr(module.storage, "size_and_time", lambda _: (1000, 0))
    films = Films(tmp_path / "films" / "run", 10_000, "one")
    with pytest.raises(UnreachedError, match=f"{length} bytes came, 1000 were announced"):
        films.path(url)
    assert taken(tmp_path) == 0
    monkeypatch.undo()
    assert Path(films.path(url)).read_bytes() == b"x" * length


def test_what_does_not_come_is_told(tmp_path, bucket):
    films = Films(tmp_path / "films" / "run", 10_000, "one")
    with pytest.raises(VideoError, match=r"cannot be fetched: FileNotFoundError: "):
        films.path(f"memory://{bucket.name}/none.mp4")
    with pytest.raises(UserError, match="pipe"):
        films.path("pipe:ls")
    assert Path(films.path(bucket.put("a", b"there"))).read_bytes() == b"there"


def fetch_and_die(folder: str, url: str, at: str) -> None:
    """Fetch a film from a file, and be killed at some point of that."""
    films = Films(Path(folder), 10_000)

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), 9)

    if at == "linked":
        os.replace = die
    elif at == "begun":
        module._blocks = die
    elif at == "halfway":
        module._blocks = lambda _: iter(part() for part in (lambda: b"x" * 2000, die))
    films.path(url)
    die()


@pytest.mark.parametrize("at", ["begun", "halfway", "linked", "held"])
def test_of_a_killed_fetch_nothing_is_read_as_whole_and_nothing_stays(at, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(bytes(range(250)) * 16)
    folder, url = tmp_path / "work" / "films" / "run", f"file://{film}"
    folder.parent.mkdir(parents=True)
    assert join(launch(fetch_and_die, [(str(folder), url, at)])) == [-9]
    films = Films(folder, 4000)
    assert len(list(folder.glob("reader-*"))) == 1
    assert len(list(folder.glob("[0-9a-f]*.mp4"))) == (at == "held")
    assert Path(films.path(url)).read_bytes() == film.read_bytes()  # for which there is room, with what was left gone
    other = tmp_path / "other.mp4"
    other.write_bytes(b"o" * 4000)
    assert Path(films.path(f"file://{other}")).read_bytes() == b"o" * 4000
    assert taken(folder) == 4000
    films.close()
    remove_films(str(tmp_path / "work"))
    assert not list((tmp_path / "work").iterdir())


def fetch_together(folder: str, url: str, counts: str) -> None:
    films = Films(Path(folder), 10_000)
    real = module._blocks

    def counted(url: str) -> Any:
        with open(counts, "a") as log:
            log.write("x")
        yield from real(url)

    module._blocks = counted
    for _ in range(20):
        path = films.path(url)
        assert path is not None
        assert Path(path).read_bytes() == b"film" * 1000
        films.close()


def test_of_many_processes_one_fetches_and_the_others_wait_for_it(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film" * 1000)
    work = tmp_path / "work" / "films"
    work.mkdir(parents=True)
    arguments = (str(work / "run"), f"file://{tmp_path}/film.mp4", str(tmp_path / "counts"))
    assert join(launch(fetch_together, [arguments] * 4)) == [0] * 4
    assert (tmp_path / "counts").read_text() == "x"
    assert len(list((work / "run").glob("[0-9a-f]*.mp4"))) == 1


def test_films_that_nobody_uses_go_before_the_disk_is_full(tmp_path, bucket, monkeypatch):
    """Of a disk of 4,000 bytes, 2% of which are left to what the run writes."""

    def usage(_: Path) -> Any:
        return SimpleNamespace(total=4000, free=4000 - taken(tmp_path))

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    films = Films(tmp_path / "films" / "run", 10**9, "one")
    for letter in "abcde":
        assert Path(films.path(bucket.put(letter, letter.encode() * 1500))).read_bytes() == letter.encode() * 1500
        assert taken(tmp_path) <= 0.98 * 4000
    assert films.path(bucket.put("f", bytes(3950))) is None  # whatever is removed


@pytest.mark.parametrize("call", ["link", "flock", "disk_usage"])
def test_on_a_disk_without_links_or_locks_or_room_each_fetches_its_own(call, tmp_path, bucket, monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    owner = {"link": module.os, "flock": module.fcntl, "disk_usage": module.shutil}[call]
    url = bucket.put("a", b"film")
    candidate = Candidate("a", "films", "a.mp4", url, segment=Segment(0, 2))
    with sharing(str(tmp_path), FilmSharing("run", 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, refused)
            assert shared_film(url) is None
        path = open_source(candidate)
    assert Path(path).read_bytes() == b"film"
    assert str(tmp_path) not in path
    assert bucket.opened == ["a"]


def test_another_users_folder_is_not_used(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    url = bucket.put("a", b"film")
    with sharing("s3://work", FilmSharing("run", 1000)):
        assert shared_film(url).startswith(str(tmp_path))
    monkeypatch.setattr(module.os, "getuid", lambda: 12345)
    (tmp_path / "idc-films-12345").mkdir()
    with sharing("s3://work", FilmSharing("run", 1000)):
        assert shared_film(url) is None


def test_only_what_is_taken_in_segments_is_shared(tmp_path, bucket):
    url = bucket.put("a", b"film")
    whole = Candidate("a", "films", "a.mp4", url)
    segment = whole.changed(segment=Segment(0, 2))
    shot = whole.changed(span=(0, 5), meta={"shots": {"number": 0, "segment": "1 of 2"}})
    assert [is_taken_in_segments(one) for one in (whole, segment, shot)] == [False, True, True]
    with sharing(str(tmp_path), FilmSharing("run", 1000)):
        paths = [open_source(one) for one in (whole, segment, shot)]
        assert [path.startswith(str(tmp_path)) for path in paths] == [False, True, True]
    assert not open_source(segment).startswith(str(tmp_path))  # outside of a chunk


# Whole runs ---------------------------------------------------------------------------------------------------------

STEPS = (
    DecodeCheck(min_side=16),
    Shots(SceneDetect(), min_seconds=0.2),
    Windows(frames=9, fps=25, stride=0, max_per_shot=1),
    Cut(height=48, width=64),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A film of 12 shots that is taken in 4 segments, one of 2, and one that is taken whole."""
    folder = tmp_path_factory.mktemp("films") / "videos"
    folder.mkdir()
    for name, shots in (("film", 12), ("other", 6), ("short", 1)):
        scenes = []
        for seed in range(shots):
            small = np.random.default_rng([seed, shots]).integers(0, 256, (5, 6, 3), np.uint8)
            picture = cv2.resize(small, (64, 48), interpolation=cv2.INTER_CUBIC)
            scenes += [np.roll(picture, shift // 2, axis=1) for shift in range(25)]
        (folder / f"{name}.mp4").write_bytes(encode_video(np.stack(scenes), 25, crf=12, preset="ultrafast"))
    return folder


def curated(folder: str, out: Path, workers: int) -> dict[str, bytes]:
    """Every member of the shards, and the drops. Where a sample's file lies is the one thing that may differ."""
    source = CountedFolder(folder, segment_minutes=0.05, segment_from_mib=0)
    writing = ShardWriting(keep_without_subjects=True)
    report = Curation([source], STEPS, str(out), (), writing, LocalExecutor(workers), progress=False).run()
    assert report.units == 7
    assert report.kept > 12
    assert not (out / "work" / "films").exists()
    found = {name: (out / name).read_bytes() for name in ("drops.jsonl", "counts.json")}
    for shard in out.rglob("*/curated-*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    data = re.sub(rb'"path": "[^"]*/', b'"path": "', data)
                found[f"{shard.parent.name}/{member.name}"] = data
    return found


def test_two_workers_fetch_a_film_once_and_the_shards_are_those_of_the_local_folder(videos, tmp_path):
    local = curated(str(videos), tmp_path / "local", 0)
    videos.with_suffix(".log").unlink(missing_ok=True)
    assert curated(f"counted://{videos}", tmp_path / "url", 2) == local
    assert sorted(fetched(videos)) == ["film.mp4", "other.mp4", "short.mp4"]


def test_a_worker_that_is_killed_while_it_fetches_changes_nothing(videos, tmp_path):
    local = curated(str(videos), tmp_path / "local", 0)
    videos.with_suffix(".log").unlink(missing_ok=True)
    videos.with_suffix(".kills").touch()
    assert curated(f"counted://{videos}", tmp_path / "url", 2) == local
    assert not videos.with_suffix(".kills").exists()
    assert len(fetched(videos)) == 4  # once more than there are files


def test_what_a_killed_run_has_fetched_is_not_read_by_the_next(tmp_path):
    left = tmp_path / "films" / "run-host"
    left.mkdir(parents=True)
    (left / "abc.mp4").write_bytes(b"old")
    (left / "reader-1-x").mkdir()
    (left / "reader-1-x" / "part").write_bytes(b"old")
    remove_films(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(gib, tmp_path):
    with pytest.raises(UserError, match=r"films_gib=.*must be a number of GiB"):
        Curation([CountedFolder(str(tmp_path))], STEPS, str(tmp_path), films_gib=gib)

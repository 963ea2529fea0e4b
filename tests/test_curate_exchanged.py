"""Files that are exchanged for others of equal size between two starts are noticed, and copies are not taken for it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from _curate import files
from _shards import picture

from idc.curate.checks import DecodeCheck
from idc.curate.engine import Curation
from idc.curate.sources import SubjectImages, VideoFolder, listing
from idc.curate.sources.listing import BLOCK, TOGETHER, content_mark
from idc.curate.windows import Cut, Windows
from idc.curate.writing import ShardWriting
from idc.data.video import encode_video
from idc.errors import UserError

STEPS = (DecodeCheck(min_side=16), Windows(frames=5, fps=25, max_per_shot=1), Cut(height=32, width=32))


def film(seed: int, size: int) -> bytes:
    """A small video of noise, filled up to `size` bytes by a box that players pass over."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    video = encode_video(noise, 25, preset="ultrafast")
    room = size - len(video)
    return video + room.to_bytes(4, "big") + b"free" + bytes(room - 8)


def curated(folder: Path, out: Path) -> tuple[dict[str, bytes], int]:
    """The shards, and how many units had been done before."""
    writing = ShardWriting(keep_without_subjects=True)
    report = Curation([VideoFolder(str(folder))], STEPS, str(out), (), writing, chunk=1, progress=False).run()
    assert report.kept == report.units
    return {name: data for name, data in files(out).items() if not name.startswith("work/")}, report.done_before


def test_a_video_that_was_exchanged_for_one_of_equal_size_is_done_again_and_a_copy_is_not(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for seed in range(3):
        (videos / f"{seed}.mp4").write_bytes(film(seed, 50_000))
    before, _ = curated(videos, out)
    copy = tmp_path / "copy"
    shutil.copytree(videos, copy, copy_function=shutil.copyfile)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert curated(copy, out) == (before, 3)
    changed = videos / "1.mp4"
    times = changed.stat()
    changed.write_bytes(film(9, 50_000))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    after, done_before = curated(videos, out)
    assert done_before == 2
    assert after != before
    assert after == curated(videos, tmp_path / "clean")[0]
    changed.write_bytes(film(1, 50_000))
    assert curated(videos, out) == (before, 3)  # what came of the first is still there


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 40 * BLOCK])
def test_marks_follow_the_beginning_the_middle_and_the_end(tmp_path, size):
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(size))
    mark = content_mark(str(path))
    for place in {0, size // 2, size - 1, min(size, BLOCK) - 1, max(0, size - BLOCK)}:
        changed = bytearray(size)
        changed[place] = 1
        path.write_bytes(changed)
        assert content_mark(str(path)) != mark, place
    path.write_bytes(bytes(size))
    assert content_mark(str(path)) == mark


def test_what_cannot_be_read_is_listed_as_it_was_and_nothing_waits_for_it(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    (tmp_path / "round.mp4").symlink_to("round.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")  # that nobody writes to
    ids = [id for id, _ in VideoFolder(str(tmp_path)).units()]
    assert ids[0].startswith("a.mp4@1+")
    assert ids[1:] == ["gone.mp4@-1", "pipe.mp4@0", "round.mp4@-1"]

    def fails(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(listing.os, "pread", fails)
    assert next(iter(VideoFolder(str(tmp_path)).units()))[0] == "a.mp4@1"


def test_no_more_is_read_than_a_limit_asks_for(tmp_path, monkeypatch):
    for number in range(TOGETHER + 50):
        (tmp_path / f"{number:04d}.mp4").write_bytes(b"%d" % number)
    read: list[str] = []
    monkeypatch.setattr(listing, "content_mark", lambda path: read.append(path) or os.path.basename(path))
    units = VideoFolder(str(tmp_path)).units()
    next(units)
    assert set(read) <= {str(tmp_path / f"{number:04d}.mp4") for number in range(TOGETHER)}
    assert len({id for id, _ in units}) == TOGETHER + 49
    assert len(read) == TOGETHER + 50


def test_a_picture_that_was_exchanged_counts_for_itself_and_for_those_beside_it(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture("red") + name.encode())
    source = SubjectImages(str(tmp_path), same_subject="folder", others=1)
    before = list(source.units())
    (tmp_path / "b.png").write_bytes(picture("red") + b"x")
    after = list(source.units())
    assert [old[0] == new[0] for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [old[1] == new[1] for old, new in zip(before, after, strict=True)] == [False, True, True]


def test_behind_a_url_the_time_in_the_listing_tells_where_it_has_no_mark(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"x")
    source = VideoFolder(f"file://{folder}")
    before = list(source.units())
    assert list(source.units()) == before
    os.utime(folder / "a.mp4", (1, 1))
    assert list(source.units()) != before


def test_a_run_that_was_begun_by_sizes_alone_is_refused_in_one_line(tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(film(0, 50_000))
    curated(videos, out)
    path = out / "work" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["sources"]["videos"].pop("identity") == 2
    path.write_text(json.dumps(settings))
    before = files(out)
    with pytest.raises(UserError, match=r"work: begun by another version of idc.*'videos'.*another --out$") as error:
        curated(videos, out)
    assert "\n" not in str(error.value)
    assert files(out) == before

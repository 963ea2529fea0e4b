"""Shards from outside: nothing hostile is run and nothing broken passes in silence."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from _shards import FRAMES, SIDE, clip, overwrite, picture, whole, write_shards, write_tar

from idc.data.index import INDEX_NAME, Entry, ShardIndex, build_index
from idc.data.lint import lint_shards
from idc.data.scan import Member, scan_shard
from idc.data.shards import SampleError, decode_image, read_sample
from idc.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    write_shards(tmp_path / "toy")
    build_index(tmp_path / "toy").save()
    return tmp_path / "toy"


class Payload:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        ([("a.pkl", pickle.dumps(Payload()))], {}, "may hold a pickle"),
        ([("a.latents.pyd", pickle.dumps(Payload()))], {}, "may hold a pickle"),
        ([("a.PTH", b"")], {}, "may hold a pickle"),
        ([("../a.mp4", b"")], {}, "leads outside"),
        ([("x/../../a.mp4", b"")], {}, "leads outside"),
        ([("/etc/a.txt", b"")], {}, "leads outside"),
        ([("pipe:touch unpickled.txt", b"")], {}, "leads outside"),
        ([("a.sh", b"")], {}, "not allowed; allowed: mp4, webm"),
        ([("noextension", b"")], {}, "not allowed"),
        ([("a.txt", b"")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link, folder or device"),
        ([("a.txt", b"")], {"type": tarfile.CHRTYPE}, "link, folder or device"),
        ([("a.mp4", b"1"), ("a.mp4", b"2")], {}, "comes twice"),
    ],
)
def test_hostile_members_are_refused(tmp_path, monkeypatch, members, changes, message):
    monkeypatch.chdir(tmp_path)
    write_tar(
        tmp_path / "x.tar", whole() + [(name.replace("a.mp4", "b.mp4"), data) for name, data in members], **changes
    )
    with pytest.raises(UserError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "unpickled").exists()
    assert not (tmp_path / INDEX_NAME).exists()
    assert not lint_shards(tmp_path).ok


def test_pipe_urls_are_refused(tmp_path):
    for action in (build_index, ShardIndex.load):
        with pytest.raises(UserError, match="pipe: URLs run a shell"):
            action("pipe:touch " + str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_pickled_array_is_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    write_tar(tmp_path / "x.tar", [("a.latents.npy", buffer.getvalue()), *whole()])
    (entry,) = build_index(tmp_path).entries
    with pytest.raises(SampleError, match=r"broken latents\.npy"):
        read_sample(tmp_path, entry)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_truncated_tar_is_indexed_up_to_the_damage_and_reported(root, cut):
    index = ShardIndex.load(root)
    path = root / "toy-000000.tar"
    second = index.entries[1]
    places = {
        1: second.members[1].offset + 3,
        2: second.members[1].offset - 700,
        3: index.entries[2].members[0].offset - 512,
    }
    os.truncate(path, places[cut])
    again = build_index(root)
    whole = ["sample0", "sample1"] if cut == 3 else ["sample0"]
    assert [e.key for e in again.entries] == [*whole, "sample3", "sample4", "sample5", "sample6"]
    *incomplete, problem = again.problems
    assert problem.shard == "toy-000000.tar"
    assert "truncated or damaged" in problem.reason
    assert {p.key for p in incomplete} <= {"sample1"}
    with pytest.raises(UserError, match="idc shards index"):
        ShardIndex.load(root)
    with pytest.raises(SampleError, match=r"truncated: toy-000000\.tar ends \d+ bytes too early"):
        read_sample(root, index.entries[2])
    read_sample(root, index.entries[0])


def test_garbage_in_the_middle_of_a_tar_is_reported(root):
    entry = ShardIndex.load(root).entries[1]
    start = entry.members[0].offset - 512
    overwrite(root / entry.shard, start, b"\xff" * 512)
    again = build_index(root)
    assert [e.key for e in again.entries] == ["sample0", "sample3", "sample4", "sample5", "sample6"]
    assert "truncated or damaged" in again.problems[0].reason
    with pytest.raises(SampleError, match="missing member: no tar header"):
        read_sample(root, entry)


def test_a_flipped_byte_is_noticed(root):
    entry = ShardIndex.load(root).entries[4]
    video = next(member for member in entry.members if member.ext == "mp4")
    overwrite(root / entry.shard, video.offset + video.size // 2, b"\x00\x01\x02")
    with pytest.raises(SampleError, match="sha256"):
        read_sample(root, entry)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.txt", b"words")], "missing member: 0 clips"),
        ([("a.mp4", clip(1))], "missing member: no caption"),
        (
            [*whole(), ("a.json", json.dumps({"references": [{"name": "x"}]}).encode())],
            "missing member: 0 references, 1 named",
        ),
        ([("a.mp4", b"no video"), ("a.txt", b"words")], "broken mp4: cannot be opened"),
    ],
)
def test_incomplete_samples_are_reported_and_left_out(tmp_path, members, reason):
    write_tar(tmp_path / "x.tar", [*whole("0"), *members, *whole("z")])
    index = build_index(tmp_path)
    assert [entry.key for entry in index.entries] == ["0", "z"]
    (problem,) = index.problems
    assert (problem.shard, problem.key) == ("x.tar", "a")
    assert reason in problem.reason
    index.save()
    assert ShardIndex.load(tmp_path).problems == index.problems


def lying(root: Path, **record) -> Entry:
    """A shard whose JSON says something else than its clip shows."""
    said = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": 16} | record
    write_tar(root / "x.tar", [("a.mp4", clip(1)), ("a.txt", b"words"), ("a.json", json.dumps(said).encode())])
    index = build_index(root)
    index.save()
    return index.entries[0]


@pytest.mark.parametrize("said", [{"frames": FRAMES + 4}, {"height": 48}, {"width": 16}])
def test_a_clip_of_another_size_than_the_index_says_is_refused(tmp_path, said):
    entry = lying(tmp_path, **said)
    with pytest.raises(SampleError, match=r"wrong size: the clip has 5 frames of 32x32, the index says"):
        read_sample(tmp_path, entry)
    report = lint_shards(tmp_path)
    assert [(p.key, p.reason[:10]) for p in report.problems] == [("a", "wrong size")]


def test_an_entry_that_points_elsewhere_is_noticed(root):
    first, second = ShardIndex.load(root).entries[:2]
    for layout, reason in (
        (second.layout, "missing member: sample1.json where the index has sample0.json"),
        (Entry.pack([Member("json", first.members[0].offset, first.members[0].size - 1)]), "wrong size: sample0.json"),
    ):
        entry = Entry("s", first.shard, first.key, layout, first.bucket, 16, first.sha256)
        with pytest.raises(SampleError, match=reason):
            read_sample(root, entry)
    gone = Entry("s", "gone.tar", first.key, first.layout, first.bucket, 16, first.sha256)
    with pytest.raises(SampleError, match=r"missing shard: gone\.tar"):
        read_sample(root, gone)


def test_a_broken_reference_is_a_sample_error():
    with pytest.raises(SampleError, match="broken ref0"):
        decode_image(picture("red")[:40], "ref0.png")
    with pytest.raises(SampleError, match="broken ref0"):
        decode_image(b"GIF89a", "ref0.png")


def test_a_stale_or_damaged_index_says_which_command_mends_it(root):
    path = root / "toy-000001.tar"
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match=r"toy-000001\.tar: modified since .* run: idc shards index"):
        ShardIndex.load(root)
    assert len(ShardIndex.load(root, check_stale=False)) == 7
    build_index(root).save()
    path.rename(root / "other.tar")
    with pytest.raises(UserError, match=r"other\.tar: is not indexed: .* run: idc shards index"):
        ShardIndex.load(root)
    (root / "other.tar").rename(path)
    text = (root / INDEX_NAME).read_text()
    (root / INDEX_NAME).write_text(text[:-200])
    with pytest.raises(UserError, match=r"damaged.*run: idc shards index"):
        ShardIndex.load(root)
    (root / INDEX_NAME).unlink()
    with pytest.raises(UserError, match=r"no index\.jsonl yet; run: idc shards index"):
        ShardIndex.load(root)
    with pytest.raises(UserError, match="no shards here"):
        ShardIndex.load(root.parent)


def test_lint_lists_exactly_the_bad_samples(root):
    entries = ShardIndex.load(root).entries
    broken, cut = entries[1], entries[6]
    video = next(member for member in broken.members if member.ext == "mp4")
    overwrite(root / broken.shard, video.offset + 40, bytes(video.size - 40))
    os.truncate(root / cut.shard, cut.members[-1].offset + 1)
    report = lint_shards(root)
    bad = {(problem.shard, problem.key): problem.reason for problem in report.problems}
    assert set(bad) == {(broken.shard, broken.key), (cut.shard, cut.key)}
    assert "truncated" in bad[cut.shard, cut.key]
    assert sum(report.buckets.values()) == 5


def test_lint_checks_samples_that_the_index_lacks(root):
    assert lint_shards(root).ok
    write_tar(root / "more.tar", whole())
    report = lint_shards(root)
    assert [tuple(problem) for problem in report.problems] == [("more.tar", "a", "not in the index")]


def test_scanning_an_empty_file_is_a_problem_not_a_crash(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    (problem,) = scan_shard(str(tmp_path / "x.tar"), "x.tar")
    assert "truncated or damaged" in problem.reason

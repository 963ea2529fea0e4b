"""Shards: any webdataset reader reads them, bytes repeat, and nothing hostile or broken passes in silence."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from idc.data import storage
from idc.data.index import INDEX_NAME, Entry, ShardIndex, build_index
from idc.data.lint import lint_shards
from idc.data.scan import Member, scan_shard
from idc.data.shards import SampleError, ShardWriter, decode_image, read_sample
from idc.data.video import decode_video, encode_video
from idc.errors import UserError
from idc.types import Bucket

FRAMES, SIDE = 5, 32


def picture(colour: str, size=(16, 24), kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def clip(number: int, frames: int = FRAMES, side: int = SIDE) -> bytes:
    return encode_video(np.full((frames, side, side, 3), 10 * number, np.uint8), 16, pixel_format="yuv444p")


def write_shards(root: Path, count: int = 7, per_shard: int = 3) -> list[str]:
    """Sample i has i % 3 references and a clip of grey level 10 i."""
    with ShardWriter(root, "toy", per_shard) as writer:
        for i in range(count):
            writer.write(
                f"sample{i}",
                clip(i),
                f"number {i}, café",
                [("a red man", picture("red"), "png"), ("a dog", picture("blue", kind="WEBP"), "webp")][: i % 3],
                fps=16,
                frames=FRAMES,
                height=SIDE,
                width=SIDE,
                source="made here",
                licence="CC0-1.0",
                meta={"toy": {"number": i}},
            )
    return writer.shards


@pytest.fixture
def root(tmp_path) -> Path:
    write_shards(tmp_path / "toy")
    build_index(tmp_path / "toy").save()
    return tmp_path / "toy"


def write_tar(path: Path, members: list[tuple[str, bytes]], **changes) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))


def whole(key: str = "a") -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", clip(1)), (f"{key}.txt", b"words")]


def test_plain_webdataset_reads_what_was_written(root, monkeypatch):
    import webdataset

    monkeypatch.setenv("WDS_SECURE", "1")
    shards = sorted(str(path) for path in root.glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"sample{i}" for i in range(7)]
    for i, sample in enumerate(samples):
        assert sample["txt"].decode() == f"number {i}, café"
        assert json.loads(sample["json"])["meta"] == {"toy": {"number": i}}
        assert {ext for ext in sample if ext.startswith("ref")} == set(["ref0.png", "ref1.webp"][: i % 3])
        assert decode_video(sample["mp4"]).shape == (FRAMES, SIDE, SIDE, 3)


def test_a_sample_comes_back_as_it_was_written(root):
    index = ShardIndex.load(root)
    assert [entry.id for entry in index.entries] == [f"toy/toy-{i // 3:06d}/sample{i}" for i in range(7)]
    for i, entry in enumerate(index.entries):
        assert entry.bucket == Bucket(FRAMES, SIDE, SIDE, i % 3)
        assert (entry.fps, entry.caption_words) == (16, 3)
        assert "PyAV" in entry.decoder
        sample = read_sample(root, entry)
        assert (sample.id, sample.caption, sample.fps) == (entry.id, f"number {i}, café", 16)
        assert sample.meta == {"source": "made here", "licence": "CC0-1.0", "toy": {"number": i}}
        assert sample.video_CTHW is not None
        assert sample.video_CTHW.shape == (3, FRAMES, SIDE, SIDE)
        assert sample.video_CTHW.is_contiguous()
        torch.testing.assert_close(sample.video_CTHW.mean(), torch.tensor(i / 12.75 - 1), atol=0.02, rtol=0)
        assert [subject.name for subject in sample.subjects] == ["a red man", "a dog"][: i % 3]
        if i % 3:
            red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 24, 16)
            torch.testing.assert_close(sample.subjects[0].image_CHW, red)
        assert read_sample(root, entry, decode_video=False).video_CTHW is None


def test_equal_samples_give_equal_bytes_and_an_equal_hash_wherever_they_lie(tmp_path):
    indices = []
    for place in ("a", "b/toy"):
        write_shards(tmp_path / place)
        indices.append(build_index(tmp_path / place, source=place[0]))
    a, b = ([(p.name, p.read_bytes()) for p in sorted((tmp_path / place).glob("*.tar"))] for place in ("a", "b/toy"))
    assert a == b
    assert indices[0].hash == indices[1].hash
    write_shards(tmp_path / "c", count=6)
    assert build_index(tmp_path / "c").hash != indices[0].hash


def test_an_index_survives_saving_and_takes_the_name_of_its_source(root):
    built = build_index(root)
    assert ShardIndex.load(root) == built
    assert ShardIndex.load(root, source="other").entries[0].id == "other/toy-000000/sample0"
    assert built.buckets() == {Bucket(FRAMES, SIDE, SIDE, n): 7 // 3 + (n == 0) for n in range(3)}
    stamps = [(s.shard, s.samples) for s in built.shards]
    assert stamps == [("toy-000000.tar", 3), ("toy-000001.tar", 3), ("toy-000002.tar", 1)]


def test_member_places_in_the_index_are_the_bytes_in_the_tar(root):
    entry = ShardIndex.load(root).entries[2]
    data = (root / entry.shard).read_bytes()
    with tarfile.open(root / entry.shard) as tar:
        for member in entry.members:
            expected = tar.extractfile(f"{entry.key}.{member.ext}").read()
            assert data[member.offset : member.offset + member.size] == expected
    assert Entry.pack(entry.members) == entry.layout
    assert {member.ext for member in entry.members} == {"mp4", "txt", "json", "ref0.png", "ref1.webp"}


def test_no_shard_is_left_half_written(tmp_path):
    class StopError(Exception):
        pass

    def interrupted():
        with ShardWriter(tmp_path, "toy", 2) as writer:
            for i in range(3):
                writer.write(f"k{i}", clip(i), "words", fps=16, frames=FRAMES, height=SIDE, width=SIDE)
            raise StopError

    with pytest.raises(StopError):
        interrupted()
    assert os.listdir(tmp_path) == ["toy-000000.tar"]
    assert len(build_index(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "a dot would end the key"),
        ({"key": "../up"}, "letters, digits"),
        ({"key": "twice"}, "comes twice"),
        ({"frames": 0}, "must be above 0"),
        ({"references": [("x", b"", "gif")]}, "'gif' cannot be written"),
    ],
)
def test_the_writer_refuses_what_no_reader_would_take(tmp_path, change, message):
    size = {"fps": 16, "frames": FRAMES, "height": SIDE, "width": SIDE}
    with ShardWriter(tmp_path) as writer:
        writer.write("twice", clip(0), "words", **size)
        with pytest.raises(UserError, match=message):
            writer.write(**{"key": "k", "video": clip(0), "caption": "words", **size, **change})


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


def test_arrays_of_a_sample_come_as_features(tmp_path):
    import safetensors.torch

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = io.BytesIO()
    np.save(buffer, array)
    tensors = safetensors.torch.save({"text": torch.ones(4)})
    write_tar(tmp_path / "x.tar", [("a.latents.npy", buffer.getvalue()), ("a.safetensors", tensors), *whole()])
    (entry,) = build_index(tmp_path).entries
    features = read_sample(tmp_path, entry).features
    assert features is not None
    torch.testing.assert_close(features["latents"], torch.from_numpy(array))
    torch.testing.assert_close(features["text"], torch.ones(4))


def test_shards_of_other_tools_are_counted(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [("deep/a.mp4", clip(1, 9)), ("deep/a.txt", b"two words"), ("deep/a.ref0.png", picture("red"))],
    )
    (entry,) = build_index(tmp_path, "web").entries
    assert (entry.key, entry.id, entry.bucket) == ("deep/a", "web/x/deep/a", Bucket(9, SIDE, SIDE, 1))
    assert read_sample(tmp_path, entry).caption == "two words"


def test_names_longer_than_a_tar_header_are_read(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        folder = tmp_path / str(form)
        folder.mkdir()
        with tarfile.open(folder / "x.tar", "w", format=form) as tar:
            for name, data in whole("k" * 150):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        (entry,) = build_index(folder).entries
        assert read_sample(folder, entry).caption == "words"


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


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


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


def test_transparent_parts_of_a_reference_are_white():
    image = decode_image(picture((255, 0, 0, 0), mode="RGBA"))
    torch.testing.assert_close(image, torch.ones(3, 24, 16))


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


def test_shards_behind_a_url_are_read_by_byte_ranges(root):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/bucket/toy/{path.name}", path.read_bytes())
    url = "memory://bucket/toy"
    local = ShardIndex.load(root)
    assert build_index(url).hash == local.hash
    build_index(url).save()
    remote = ShardIndex.load(url)
    assert list(remote.entries) == list(local.entries)
    torch.testing.assert_close(
        read_sample(url, remote.entries[4]).video_CTHW, read_sample(root, local.entries[4]).video_CTHW
    )
    memory.pipe("/bucket/toy/toy-000001.tar", b"short")
    with pytest.raises(SampleError, match="truncated"):
        read_sample(url, remote.entries[4])
    with ShardWriter("memory://bucket/made", "toy") as writer:
        writer.write("k", clip(1), "words", fps=16, frames=FRAMES, height=SIDE, width=SIDE)
    assert storage.list_tars("memory://bucket/made") == ["toy-000000.tar"]


def test_few_files_are_open_at_once_and_replaced_shards_are_opened_anew(tmp_path):
    files = storage.OpenFiles(limit=2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        assert os.pread(files.descriptor(str(tmp_path / name)), 9, 0) == name.encode()
    assert len(files._files) == 2
    (tmp_path / "new").write_text("new")
    os.replace(tmp_path / "new", tmp_path / "c")
    assert os.pread(files.descriptor(str(tmp_path / "c")), 9, 0) == b"new"
    files.close()


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

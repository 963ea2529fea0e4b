"""Shards: any webdataset reader reads them, bytes repeat, and a sample comes back as it was written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from _shards import FRAMES, SIDE, clip, picture, whole, write_shards, write_tar

from idc.data import storage
from idc.data.index import Entry, ShardIndex, build_index
from idc.data.shards import SampleError, ShardWriter, decode_image, read_sample
from idc.data.video import decode_video
from idc.errors import UserError
from idc.types import Bucket


@pytest.fixture
def root(tmp_path) -> Path:
    write_shards(tmp_path / "toy")
    build_index(tmp_path / "toy").save()
    return tmp_path / "toy"


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


def test_transparent_parts_of_a_reference_are_white():
    image = decode_image(picture((255, 0, 0, 0), mode="RGBA"))
    torch.testing.assert_close(image, torch.ones(3, 24, 16))


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

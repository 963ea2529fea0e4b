"""Reading, checking, windowing and cutting videos whose frames carry their number, and files of every bad kind."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_video import BITS, number_of, numbered, numbers, write

from idc.curate import reading
from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped
from idc.curate.checks import DecodeCheck
from idc.curate.geometry import View, view_of
from idc.curate.reading import clip_box, clip_frames, inspect, look, open_source, size_of, span_of, stream
from idc.curate.shots import ColourCuts, Shots
from idc.curate.windows import Cut, Windows, part_key
from idc.data import storage
from idc.data.video import VideoError, decode_video, encode_video, pick_frames, probe
from idc.errors import UserError

CHECK = DecodeCheck(min_side=16, max_aspect=8)


def candidate(path: Path | str, **changes) -> Candidate:
    return Candidate("film-1", "films", "film", str(path)).changed(**changes)


def saved(folder: Path, data: bytes, name: str = "film.mp4") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def turned(data: bytes) -> bytes:
    """An MP4 that says to be shown turned clockwise, as phones write it."""
    changed = bytearray(data)
    place = changed.index(b"tkhd") + 4 + 40
    one = 1 << 16
    changed[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    return bytes(changed)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """100 frames at 25 per second, a keyframe at least every 12."""
    return saved(tmp_path_factory.mktemp("film"), write("mp4", "libx264", numbered(100)))


# Reading


def test_frames_are_found_by_rank_through_seeks_spans_and_strides(film):
    whole = candidate(film)
    assert numbers(look(whole, [0, 3, 3, 40, 41, 99])) == [0, 3, 3, 40, 41, 99]
    assert numbers(look(whole, [99])) == [99]
    part = candidate(film, span=(30, 71))
    assert [(rank, number_of(frame)) for rank, frame in stream(part)] == [(rank, rank) for rank in range(30, 71)]
    assert [rank for rank, _ in stream(part, 7)] == list(range(30, 71, 7))
    assert all(rank == number_of(frame) for rank, frame in stream(part, 7))
    assert span_of(candidate(film, span=(90, 120))) == (90, 100)


class Counted:
    """A container that counts the frames it decodes."""

    def __init__(self, container):
        self.container, self.decoded = container, 0

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame

    def __getattr__(self, name):
        return getattr(self.container, name)


def test_a_few_frames_of_a_film_decode_a_few_groups_of_pictures(film, monkeypatch):
    from idc.data import video

    containers = []
    real = video._Reader.rewind

    def counting(self):
        real(self)
        containers.append(Counted(self.container))
        self.container = containers[-1]

    info = probe(film)
    assert len(info.keys) > 4
    monkeypatch.setattr(video._Reader, "rewind", counting)
    assert numbers(np.stack(list(pick_frames(film, [0, 50, 98], info)))) == [0, 50, 98]
    assert sum(container.decoded for container in containers) <= 1 + 2 * 12  # groups have at most 12 frames
    assert len(containers) == 1  # opened once, and not read through for timestamps


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("mpegts", "libx264"), ("avi", "mpeg4")])
def test_seeking_is_exact_in_other_containers(container, codec):
    data = write(container, codec, numbered(100))
    ranks = [1, 30, 31, 60, 99]
    assert numbers(np.stack(list(pick_frames(data, ranks)))) == ranks


def test_frames_of_a_variable_rate_go_by_rank(tmp_path):
    pts = np.cumsum(np.random.default_rng(0).integers(7, 120, size=60)).tolist()
    film = candidate(saved(tmp_path, write("mp4", "libx264", numbered(60), pts)))
    assert numbers(look(film, [2, 29, 59])) == [2, 29, 59]
    assert [number_of(frame) for _, frame in stream(film.changed(span=(20, 50)))] == list(range(20, 50))


def test_a_crop_is_of_the_upright_picture(tmp_path, film):
    whole, part = candidate(film), candidate(film, crop=Box(32.4, 8, 96, 31.6))
    assert size_of(part) == (24, 64)
    np.testing.assert_array_equal(look(part, [5, 50]), look(whole, [5, 50])[:, 8:32, 32:96])
    assert clip_box(part, Box(40, 10, 50, 20)) == Box(8, 2, 18, 12)
    lying = candidate(saved(tmp_path, turned(film.read_bytes())))
    assert size_of(lying) == (16 * BITS, 32)
    bottom = lying.changed(crop=Box(0, 64, 32, 128))  # clockwise: the right half, with the high bits, comes to lie below
    np.testing.assert_array_equal(look(bottom, [70]), np.rot90(look(whole, [70]), -1, axes=(1, 2))[:, 64:])
    with pytest.raises(VideoError, match="outside"):
        look(whole.changed(crop=Box(200, 0, 300, 20)), [0])


def test_the_clips_frames_are_chosen_as_the_metrics_do(film):
    part = candidate(film, span=(10, 91))
    frames, pictures = clip_frames(part, 5)
    assert frames.tolist() == [0, 20, 40, 60, 80]
    assert numbers(pictures) == [10, 30, 50, 70, 90]
    ranks = candidate(film, ranks=tuple(range(20, 60, 2)))
    assert numbers(clip_frames(ranks, 2)[1]) == [20, 58]
    clip = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), np.uint8)
    frames, pictures = clip_frames(part.changed(clip=clip), None)
    assert frames.tolist() == list(range(9))
    np.testing.assert_array_equal(pictures, clip)


def test_images_are_videos_of_one_frame_upright_and_in_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), np.uint8)
    grey = tmp_path / "grey.PNG"
    Image.fromarray(pixels).save(grey)
    still = candidate(grey)
    assert inspect(still).is_image
    np.testing.assert_array_equal(look(still, [0, 0])[1], np.repeat(pixels[..., None], 3, -1))
    assert [rank for rank, _ in stream(still)] == [0]
    with pytest.raises(VideoError, match="still image"):
        look(still, [1])
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(pixels).convert("RGB").save(buffer, "JPEG", exif=exif)
    assert size_of(candidate(saved(tmp_path, buffer.getvalue(), "phone"))) == (60, 40)  # known by its content


def test_bad_ranks_and_files_are_told(film, tmp_path):
    with pytest.raises(UserError, match="rising"):
        look(candidate(film), [3, 2])
    with pytest.raises(UserError, match="every=0"):
        next(stream(candidate(film), 0))
    with pytest.raises(VideoError, match="frame 100 wanted"):
        look(candidate(film), [1, 100])
    with pytest.raises(VideoError, match="holds none of its 100 frames"):
        next(stream(candidate(film, span=(100, 110))))
    with pytest.raises(VideoError, match="no such file"):
        look(candidate(tmp_path), [0])
    with pytest.raises(UserError, match="pipe"):
        look(candidate("pipe:ls"), [0])


def test_urls_are_fetched_once_into_a_bounded_folder(film, monkeypatch):
    import fsspec

    fetches: Counter[str] = Counter()
    real = storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda url: fetches.update([url]) or real(url))
    monkeypatch.setattr(reading, "_fetched", reading._Fetched())
    size = film.stat().st_size
    monkeypatch.setenv(reading.CACHE_SETTING, str(2.5 * size / 2**30))
    films = [candidate(f"memory://films/{name}.mp4") for name in "abc"]
    for one in films:
        with fsspec.open(one.path, "wb") as file:
            file.write(film.read_bytes())
    for one in (films[0], films[1], films[0]):
        assert numbers(look(one, [7, 60])) == [7, 60]
    paths = [open_source(one) for one in films]  # the third pushes out the one used longest ago
    assert [os.path.exists(path) for path in paths] == [False, True, True]
    assert set(fetches.values()) == {1}
    assert numbers(look(films[0], [99])) == [99]
    with pytest.raises(VideoError, match="cannot be fetched"):
        open_source(candidate("memory://films/absent.mp4"))
    monkeypatch.setenv(reading.CACHE_SETTING, str(0.5 * size / 2**30))
    with fsspec.open("memory://films/d.mp4", "wb") as file:
        file.write(film.read_bytes())
    with pytest.raises(VideoError, match="more than IDC_SOURCE_CACHE_GB allows"):
        open_source(candidate("memory://films/d.mp4"))


def test_what_killed_processes_fetched_is_removed_and_what_others_use_is_not(film, tmp_path, monkeypatch):
    import fcntl

    import fsspec

    monkeypatch.setattr(reading.tempfile, "tempdir", str(tmp_path))
    folders = [tmp_path / f"idc-sources-{os.getuid()}-{name}" for name in ("left", "used")]
    for folder in folders:
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "film.mp4").touch()
    with fsspec.open("memory://films/e.mp4", "wb") as file:
        file.write(film.read_bytes())
    with open(folders[1] / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mine = reading._Fetched().path("memory://films/e.mp4")
    assert [folder.exists() for folder in folders] == [False, True]
    assert Path(mine).read_bytes() == film.read_bytes()


# DecodeCheck


def reason(outcome) -> str:
    return outcome.reason if isinstance(outcome, Dropped) else "kept"


def changing_size() -> bytes:
    """Two H.264 streams of different sizes, one behind the other, as of a broadcast."""
    return b"".join(write("h264", "libx264", numbered(12, height)) for height in (32, 64))


def audio_only() -> bytes:
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return buffer.getvalue()


def no_frames(container_format: str = "mp4", codec: str = "libx264") -> bytes:
    """A file whose video stream is announced and has no frame."""
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return buffer.getvalue()


def blanked(data: bytes) -> bytes:
    """The MP4 with zeros in place of its coded frames."""
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    return data[:start] + bytes(size) + data[start + size :]


def faststart(data: bytes, folder: Path) -> bytes:
    """The same MP4 with its index in front, so that a cut-off file still opens."""
    import av

    path = folder / "faststart.mp4"
    with av.open(BytesIO(data)) as source, av.open(path, "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path.read_bytes()


def png(*size: int, alpha: bool = False) -> bytes:
    buffer = BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 4) if alpha else size, np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def good() -> bytes:
    return write("mp4", "libx264", numbered(100))


def cut_off(folder: Path) -> bytes:
    data = faststart(good(), folder)
    return data[: len(data) // 2]


BAD = {
    "empty.mp4": (lambda _: b"", "empty file"),
    "noise.mp4": (lambda _: np.random.default_rng(0).bytes(5000), "no video"),
    "text.mp4": (lambda _: b"not a video at all " * 50, "no video"),
    "sound.mp4": (lambda _: audio_only(), "no video stream"),
    "none.mp4": (lambda _: no_frames(), "no video stream"),
    "none.avi": (lambda _: no_frames("avi", "mpeg4"), "no frames"),
    "zeros.mp4": (lambda _: blanked(good()), "broken video"),
    "half.mp4": (lambda _: good()[: len(good()) // 2], "no video"),
    "cut-off.mp4": (cut_off, "truncated file"),
    "cut-off.mkv": (lambda _: write("matroska", "libx264", numbered(100))[:2800], "truncated file"),
    "sizes.h264": (lambda _: changing_size(), "frame size changes"),
    "half.png": (lambda _: png(64, 64)[:2000], "no picture"),
    "tiny.png": (lambda _: png(8, 8), "picture too small"),
    "thin.png": (lambda _: png(16, 512), "shape too long"),
    "huge.mp4": (lambda _: write("mp4", "libx264", np.zeros((1, 64, 9000, 3), np.uint8)), "picture too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_dropped_with_its_reason(name, tmp_path):
    make, wanted = BAD[name]
    (outcome,) = CHECK([candidate(saved(tmp_path, make(tmp_path), name))])[0]
    assert isinstance(outcome, Dropped)
    assert (outcome.reason, outcome.step, outcome.key) == (wanted, "decode check", "film-1"), outcome.detail
    assert outcome.detail

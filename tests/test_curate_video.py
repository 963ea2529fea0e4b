"""Reading, checking, windowing and cutting videos whose frames carry their number, and files of every bad kind."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_video import BITS, number_of, numbered, numbers, write

from idc.curate import reading
from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped, EncodedClip
from idc.curate.checks import DecodeCheck
from idc.curate.geometry import View, view_of
from idc.curate.reading import (
    clip_box,
    clip_frames,
    inspect,
    look,
    open_source,
    size_of,
    source_corners,
    span_of,
    stream,
)
from idc.curate.shots import ColourCuts, Shots
from idc.curate.windows import Cut, Windows, part_key
from idc.data import storage
from idc.data.video import VideoError, encode_video, pick_frames, probe
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
    assert source_corners(part, Box(8, 2, 18, 12)) == Box(40, 10, 50, 20)
    lying = candidate(saved(tmp_path, turned(film.read_bytes())))
    assert size_of(lying) == (16 * BITS, 32)
    bottom = lying.changed(
        crop=Box(0, 64, 32, 128)
    )  # clockwise: the right half, with the high bits, comes to lie below
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


def test_files_are_looked_at_once_as_far_as_their_frames_have_room(film, tmp_path, monkeypatch):
    counted: Counter[str] = Counter()
    real = reading.probe
    monkeypatch.setattr(reading, "probe", lambda path: counted.update([Path(path).stem]) or real(path))
    names = "abcdefghijkl"
    for name in names:
        shutil.copy(film, tmp_path / f"{name}.mp4")

    def looked(most: int, order: str) -> dict[str, int]:
        monkeypatch.setattr(reading, "_known", reading._Known(most))
        counted.clear()
        for name in order:
            assert inspect(candidate(tmp_path / f"{name}.mp4")).video.frames == 100
        return dict(counted)

    assert looked(reading.KNOWN_FRAMES, 3 * names) == dict.fromkeys(names, 1)
    assert looked(250, "abacab") == {"a": 1, "b": 2, "c": 1}  # who was asked for longest ago goes
    assert looked(99, "aabba") == {"a": 2, "b": 1}  # one is known, however long it is


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
    assert set(fetches.values()) == {1}
    first, third = open_source(films[0]), open_source(films[2])  # which pushes out the one used longest ago
    assert os.path.exists(first)
    paths = [first, open_source(films[1]), third]
    assert fetches == {films[0].path: 1, films[1].path: 2, films[2].path: 1}
    assert [os.path.exists(path) for path in paths] == [False, True, True]
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


def test_what_a_file_is_stands_in_its_note(tmp_path):
    film = saved(tmp_path, write("mp4", "libx264", numbered(50)), "film.mp4")
    irregular = np.cumsum(np.random.default_rng(0).integers(7, 120, size=60)).tolist()
    variable = saved(tmp_path, write("mp4", "libx264", numbered(60), irregular), "variable.mp4")
    dropping = saved(
        tmp_path, write("mp4", "libx264", numbered(120), [40 * n for n in range(121) if n != 60]), "one.mp4"
    )
    phone = saved(tmp_path, turned(film.read_bytes()), "phone.mp4")
    notes = {}
    for path in (film, variable, dropping, phone):
        (kept,) = CHECK([candidate(path)])[0]
        assert isinstance(kept, Candidate)
        notes[path.stem] = kept.meta["decode check"]
    size = {"frames": 50, "fps": 25.0, "seconds": 2.0, "height": 32, "width": 128}
    assert notes["film"].items() >= {**size, "vfr": False, "grey": True, "image": False}.items()
    assert [notes[name]["vfr"] for name in ("variable", "one")] == [True, False]  # a lost frame is no variable rate
    assert (notes["phone"]["height"], notes["phone"]["width"]) == (128, 32)
    assert notes["film"]["decoder"].startswith("PyAV ")
    (image,) = CHECK([candidate(saved(tmp_path, png(64, 64, alpha=True), "picture.png"))])[0]
    assert image.meta["decode check"].items() >= {"frames": 1, "image": True, "grey": False, "vfr": False}.items()


@pytest.mark.parametrize(
    ("settings", "changes", "wanted"),
    [
        ({"min_frames": 101}, {}, "too few frames"),
        ({"min_seconds": 4.1}, {}, "video too short"),
        ({"max_seconds": 3.9}, {}, "video too long"),
        ({"min_seconds": 4, "max_seconds": 4}, {}, "kept"),
        ({}, {"span": (100, 120)}, "span outside of the video"),
        ({}, {"span": (50, 50)}, "span outside of the video"),
        ({}, {"span": (90, 120)}, "kept"),
        ({}, {"crop": Box(128, 0, 140, 20)}, "crop outside of the picture"),
        ({}, {"crop": Box(0, 0, 130, 40)}, "kept"),
    ],
)
def test_limits_of_the_check(settings, changes, wanted, film):
    (outcome,) = DecodeCheck(**{"min_side": 16, "max_aspect": 8, **settings})([candidate(film, **changes)])[0]
    assert reason(outcome) == wanted


def test_a_thorough_check_finds_what_breaks_between_the_looks(film, tmp_path):
    data = bytearray(film.read_bytes())
    import av

    with av.open(str(film)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in places[60:64]:
        data[place + 4 : place + size] = bytes(size - 4)
    broken = candidate(saved(tmp_path, bytes(data)))
    (outcome,) = DecodeCheck(min_side=16, max_aspect=8, thorough=True)([broken])[0]
    assert reason(outcome) == "broken video"
    (quick,) = DecodeCheck(min_side=16, max_aspect=8, looks=2)([broken])[0]
    assert reason(quick) == "kept"


def test_a_frame_that_the_decoder_had_to_guess_is_damage(tmp_path, film):
    """Single flipped bytes: libav decodes on, and marks what it made up."""
    data = bytearray(film.read_bytes())
    import av

    with av.open(str(film)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    place, size = max(places[20:], key=lambda found: found[1])
    for offset in range(size // 3, size - 8, 5):
        data[place + offset] ^= 0x55
    damaged = candidate(saved(tmp_path, bytes(data)))
    with av.open(BytesIO(bytes(data))) as container:
        marked = [frame.is_corrupt for frame in container.decode(video=0)]  # no error of its own
    assert any(marked)
    assert not all(marked)
    (outcome,) = DecodeCheck(min_side=16, max_aspect=8, thorough=True)([damaged])[0]
    assert reason(outcome) == "damaged frames"
    with pytest.raises(VideoError, match="damaged frame at"):
        look(damaged, [marked.index(True)])
    assert look(damaged, [marked.index(False)]).shape[0] == 1


# Windows


def windows_of(path: Path, step: Windows, **changes) -> list:
    return list(step([candidate(path, **changes)])[0])


def test_windows_show_the_nearest_frames_in_time_of_any_rate(tmp_path):
    rng = np.random.default_rng(0)
    for name, pts in (("constant", [40 * n for n in range(100)]), ("variable", np.cumsum(rng.integers(7, 70, 100)))):
        times = np.array(pts) / 1000
        film = saved(tmp_path, write("mp4", "libx264", numbered(100), list(map(int, pts))), f"{name}.mp4")
        found = windows_of(film, Windows(9, 16), span=(10, 95))
        assert len(found) == (int((times[94] - times[10]) * 16 + 1e-3) + 1) // 9
        for number, window in enumerate(found):
            wanted = times[10] + (9 * number + np.arange(9)) / 16
            distance = np.abs(times[10:95, None] - wanted)
            np.testing.assert_allclose(distance[np.array(window.ranks) - 10, range(9)], distance.min(0), atol=2e-3)
            assert (window.fps, window.span) == (16, (window.ranks[0], window.ranks[-1] + 1))
            assert numbers(clip_frames(window, None)[1]) == list(window.ranks)
        assert len({window.key for window in found}) == len(found)


def test_windows_count_overlap_and_length(film, tmp_path):
    assert [w.ranks[0] for w in windows_of(film, Windows(17, 25))] == [0, 17, 34, 51, 68]
    assert [w.ranks[0] for w in windows_of(film, Windows(17, 25, stride=40))] == [0, 40, 80]
    assert [w.ranks[0] for w in windows_of(film, Windows(17, 25, max_per_shot=2))] == [0, 68]
    assert [w.ranks[0] for w in windows_of(film, Windows(17, 25, max_per_shot=1))] == [0]
    assert [len(w.ranks) for w in windows_of(film, Windows(81, 25, min_frames=9), span=(0, 30))] == [29]
    (dropped,) = windows_of(film, Windows(17, 25), span=(0, 16))
    assert (dropped.reason, dropped.detail) == ("too short", "16 frames at 25 fps, 17 wanted")
    slow = saved(tmp_path, write("mp4", "libx264", numbered(40), [150 * n for n in range(40)]), "slow.mp4")
    outcomes = windows_of(slow, Windows(9, 16))
    assert {reason(outcome) for outcome in outcomes} == {"frame rate too low"}
    assert len({outcome.key for outcome in outcomes}) == len(outcomes) == 10
    assert {reason(outcome) for outcome in windows_of(slow, Windows(9, 7))} == {"kept"}


def test_keys_of_parts_are_unique_and_never_too_long():
    keys = {part_key(part_key("x" * length, a), b) for length in (3, 64, 70, 80) for a in (0, 10**6) for b in (0, 81)}
    assert len(keys) == 16
    assert max(map(len, keys)) <= 80


def test_boxes_keep_their_frame_through_windows(film):
    box, mask = Box(0, 0, 9, 9), np.ones((32, 128), np.bool_)
    subjects = tuple(CuratedSubject(f"s{frame}", box=box, mask=mask, frame=frame) for frame in (0, 20, 37, 70))
    subjects += (CuratedSubject("nowhere"), CuratedSubject("followed", track=((3, box),)))
    first, second = windows_of(film, Windows(17, 12.5), span=(10, 80), subjects=subjects)
    # Every second frame is shown: ranks 10, 12, ... 42 and 44, ..., 76; frame 20 of the span is the source's 30.
    assert [(s.frame, s.box is not None, s.mask is not None) for s in first.subjects] == [
        (0, True, True), (10, True, True), (0, False, False), (0, False, False), (0, False, False), (0, False, False),
    ]  # fmt: skip
    assert first.meta["windows"] == {"unplaced": ["s37", "s70"]}
    assert [(s.frame, s.box is not None) for s in second.subjects[2:4]] == [(1, True), (0, False)]
    assert first.subjects[5].track == ((3, box),)


# Cut


def test_the_cut_clip_shows_the_windows_frames(film):
    (window, *_) = windows_of(film, Windows(9, 5))
    (cut,) = Cut(height=16, width=64, max_upscale=1, resize="crop")([window])[0]
    assert (cut.clip.shape, cut.clip.dtype) == ((9, 16, 64, 3), np.uint8)
    assert numbers(np.repeat(cut.clip, 2, axis=2)) == list(window.ranks) == list(range(0, 45, 5))
    view = view_of(cut)
    assert view == View(32, 128, 16, 64, 0.5)
    np.testing.assert_array_equal(cut.clip[3], view(look(window, [15])[0]))
    (again,) = Cut(height=32, width=64)([cut])[0]
    assert again is cut


def test_the_size_is_that_of_the_bucket_that_training_chooses(film):
    (window, *_) = windows_of(film, Windows(17, 25))
    for buckets, shape in (
        ([[17, 32, 32], [17, 32, 64], [17, 16, 64]], (17, 16, 64)),
        ([[17, 32, 32], [9, 32, 128]], (9, 32, 128)),
        ([[33, 16, 64], [5, 16, 64]], (5, 16, 64)),
    ):
        (cut,) = Cut(buckets, max_crop=0.8)([window])[0]
        assert cut.clip.shape[:3] == shape
        assert len(cut.ranks) == shape[0]
        assert cut.span == (0, cut.ranks[-1] + 1)
    for settings, wanted in (
        ({"buckets": [[33, 16, 64]]}, "too short"),
        ({"buckets": [[17, 64, 64]]}, "too small"),
        ({"buckets": [[17, 32, 32]]}, "shape too far from every bucket"),
        ({"height": 480, "width": 832}, "too small"),
        ({"height": 64, "width": 64, "resize": "short-side"}, "too small"),
    ):
        (dropped,) = Cut(**settings)([window])[0]
        assert (reason(dropped), dropped.step) == (wanted, "cut")
        assert dropped.detail
    (short,) = Cut(height=16, width=16, resize="short-side")([window])[0]
    assert short.clip.shape == (17, 16, 64, 3)


@pytest.mark.parametrize("seed", range(12))
def test_a_box_and_a_mask_drawn_on_the_source_lie_where_the_mapped_ones_say(seed, tmp_path):
    rng = np.random.default_rng(seed)
    height, width = (int(2 * n) for n in rng.integers(60, 160, 2))
    crop = None
    if seed % 3:
        crop = Box(*(float(side) for side in (rng.integers(0, 20), rng.integers(0, 20), width - 7, height - 9)))
    left, top = (int(crop.left), int(crop.top)) if crop else (0, 0)
    picture = np.zeros((height, width, 3), np.uint8)
    inner = (int(crop.bottom) - top, int(crop.right) - left) if crop else (height, width)
    x, y = int(rng.integers(0, inner[1] - 30)), int(rng.integers(0, inner[0] - 30))
    w, h = (int(n) for n in rng.integers(16, 30, 2))
    picture[top + y : top + y + h, left + x : left + x + w] = 255
    path = tmp_path / "drawn.png"
    Image.fromarray(picture).save(path)
    mask = np.zeros(inner, np.bool_)
    mask[y : y + h, x : x + w] = True
    subject = CuratedSubject("square", box=Box(x, y, x + w, y + h), mask=mask)
    drawn = candidate(path, crop=crop, subjects=(subject,), ranks=(0,), fps=16.0)
    sides = 16 * rng.integers(3, 9, 2)
    (cut,) = Cut(height=int(sides[0]), width=int(sides[1]), max_upscale=4, max_crop=0.8, min_visible=0.0)([drawn])[0]
    seen = cut.clip[0, ..., 0] > 127
    if not cut.subjects:
        assert cut.meta["cut"]["cropped out"] == ["square"]
        assert seen.sum() == 0
        return
    (found,) = cut.subjects
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    np.testing.assert_allclose(found.box, edges, atol=1)
    union = found.mask | seen
    assert found.mask.shape == seen.shape
    assert (found.mask ^ seen).sum() <= 0.1 * union.sum()
    view = view_of(cut)
    np.testing.assert_allclose(view.back(view.box(subject.box)), subject.box, atol=1e-6)


def test_subjects_that_the_cut_leaves_out_are_removed_with_a_note(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.zeros((64, 256, 3), np.uint8)).save(path)
    empty = np.zeros((64, 256), np.bool_)
    subjects = (
        CuratedSubject("left", box=Box(0, 0, 60, 64)),
        CuratedSubject("middle", box=Box(100, 0, 150, 64), mask=np.ones((3, 3), np.bool_)),
        CuratedSubject("masked out", mask=empty),
        CuratedSubject("half", box=Box(76, 0, 116, 64)),
        CuratedSubject("late", box=Box(0, 0, 9, 9), frame=3),
        CuratedSubject("unplaced"),
    )
    wide = candidate(path, subjects=subjects, ranks=(0,), fps=16.0)
    (cut,) = Cut(height=64, width=64, max_crop=0.8, min_visible=0.4)([wide])[0]
    assert [subject.name for subject in cut.subjects] == ["middle", "half", "late", "unplaced"]
    assert cut.meta["cut"]["cropped out"] == ["left", "masked out"]
    assert cut.subjects[0].box == Box(4, 0, 54, 64)
    assert cut.subjects[0].mask is None  # of another picture
    assert cut.subjects[1].box == Box(0, 0, 20, 64)
    assert cut.subjects[2].box is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windows(10), "nearest valid counts are 9 and 13"),
        (lambda: Windows(9, 0), "fps=0"),
        (lambda: Windows(9, min_frames=13), "min_frames=13: must be at most frames=9"),
        (lambda: Windows(9, stride=-1), "stride=-1"),
        (lambda: Cut(height=100), "nearest valid sizes are 96 and 112"),
        (lambda: Cut(resize="crops"), "did you mean 'crop'"),
        (lambda: Cut([[10, 64, 64]]), "nearest valid counts are 9 and 13"),
        (lambda: Cut(max_crop=1), "max_crop=1"),
        (lambda: Cut(min_visible=2), "min_visible=2"),
        (lambda: DecodeCheck(min_side=0), "min_side=0"),
        (lambda: DecodeCheck(max_seconds=1, min_seconds=2), "max_seconds=1: must be 2 or more"),
        (lambda: Cut()([candidate(__file__)]), "put idc.curate.windows.Windows before it"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(make, message):
    with pytest.raises(UserError, match=message):
        make()


# All of it


def through(steps, first: Candidate) -> tuple[list[Candidate], list[Dropped]]:
    """What becomes of a candidate, and of all that comes of it."""
    alive, drops = [first], []
    for step in steps:
        outcomes = list(itertools.chain.from_iterable(step(alive)))
        drops += [outcome for outcome in outcomes if isinstance(outcome, Dropped)]
        alive = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
    return alive, drops


CHAIN = (
    CHECK,
    Shots(ColourCuts(), min_seconds=0.5),
    Windows(9, 16, min_frames=5),
    Cut([[9, 16, 64], [5, 16, 64], [9, 32, 16], [9, 32, 32]], max_upscale=2, max_crop=0.8),
)


def one_frame(_: Path) -> bytes:
    return write("mp4", "libx264", numbered(1))


GOOD = {
    "film.mp4": (lambda _: good(), 6),
    "second.mp4": (lambda _: write("mp4", "libx264", numbered(25)), 1),
    "variable.mp4": (lambda _: write("mp4", "libx264", numbered(50), np.cumsum([20, 60] * 25).tolist()), 3),
    "phone.mp4": (lambda _: turned(good()), 6),
    "scan.mkv": (lambda _: write("matroska", "libx264", numbered(100)), 6),
    "grey.png": (lambda _: png(64, 128), 1),
    "alpha.png": (lambda _: png(64, 128, alpha=True), 1),
    "frame.mp4": (one_frame, 0),
    "slow.mp4": (lambda _: write("mp4", "libx264", numbered(20), [300 * n for n in range(20)]), 0),
}


@pytest.mark.parametrize("name", [*BAD, *GOOD])
def test_every_kind_of_file_ends_as_clips_or_drops_with_reasons(name, tmp_path):
    make, wanted = {**BAD, **GOOD}[name]
    kept, drops = through(CHAIN, candidate(saved(tmp_path, make(tmp_path), name)))
    assert len(kept) == (wanted if name in GOOD else 0)
    assert len(kept) + len(drops) >= 1
    assert all(drop.reason and drop.detail and drop.step for drop in drops)
    assert len({outcome.key for outcome in [*kept, *drops]}) == len(kept) + len(drops)
    for clip in kept:
        assert clip.clip.shape[0] == len(clip.ranks)
        assert clip.clip.shape[:3] in {(1, 16, 64), (1, 32, 32), (9, 16, 64), (9, 32, 16)}


def test_two_hours_are_cut_without_being_decoded(tmp_path):
    """36,000 frames at 5 per second, by repeating the packets of one group of pictures."""
    import av

    from idc.data import video

    path = tmp_path / "long.mp4"
    group = encode_video(numbered(50), 5)
    with av.open(BytesIO(group)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
        span = 50 * round(1 / 5 / packets[0].time_base)
        for repeat in range(720):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + repeat * span, packet.dts + repeat * span
                copy.time_base, copy.is_keyframe, copy.stream = packet.time_base, packet.is_keyframe, stream
                target.mux(copy)
    decoded = Counted(None)
    real = video._Reader.rewind

    def counting(self):
        real(self)
        decoded.container = self.container
        self.container = decoded

    long = candidate(path, span=(18000, 27000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video._Reader, "rewind", counting)
        patch.setattr(Counted, "close", lambda self: self.container.close(), raising=False)
        kept, drops = through([CHECK, Windows(9, 5, max_per_shot=3), Cut([[9, 32, 128]])], long)
    assert not drops
    assert kept[0].meta["decode check"].items() >= {"frames": 36000, "seconds": 7200.0}.items()
    assert [numbers(clip.clip) for clip in kept] == [[rank % 50 for rank in clip.ranks] for clip in kept]
    assert kept[-1].span[1] > 26980
    assert decoded.decoded < 1000


def test_clips_out_of_shards_pass_as_they_are(film):
    frames, height, width = 17, 32, 128
    clip = Candidate("s-1", "shards", "v", str(film), (0, frames), None, tuple(range(frames)), 16.0)
    encoded = clip.changed(encoded=EncodedClip(b"mp4", frames, height, width))
    for done in (encoded, clip.changed(clip=np.zeros((frames, height, width, 3), np.uint8))):
        kept, drops = through(CHAIN[1:], done)
        assert (kept[0] is done, drops) == (True, [])

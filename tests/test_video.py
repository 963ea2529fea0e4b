"""Frame-exact decoding: every test clip carries each frame's number as black and white bars."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import numpy as np
import pytest

from idc.data.video import (
    VideoError,
    decode_frames,
    decode_video,
    encode_video,
    iterate_video,
    probe,
    resample_ranks,
)
from idc.errors import UserError

BITS = 8


def numbered(count: int, height: int = 32) -> np.ndarray:
    """Frames whose number stands in bars of 16 pixels, the lowest bit at the left; a marker in the top left corner."""
    bits = (np.arange(count)[:, None] >> np.arange(BITS)) & 1
    return np.broadcast_to((bits * 255).astype(np.uint8).repeat(16, 1)[:, None, :, None], (count, height, 16 * BITS, 3))


def number_of(picture: np.ndarray) -> int:
    bars = picture.reshape(picture.shape[0], BITS, 16, 3).mean(axis=(0, 2, 3)) > 127
    return int((bars << np.arange(BITS)).sum())


def numbers(video: np.ndarray) -> list[int]:
    return [number_of(picture) for picture in video]


def write(container_format: str, codec: str, frames: np.ndarray, pts: list[int] | None = None, audio: bool = False):
    """Encode by hand what `encode_video` never writes: B-frames, few keyframes, odd timestamps, sound."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.gop_size = 12
        if codec == "libx264":
            stream.options = {"bf": "3", "b-adapt": "0", "crf": "20", "preset": "fast"}
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=16000) if audio else None
        for rank, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = pts[rank] if pts else rank * 40
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container_format", "codec", "audio"),
    [
        ("mp4", "libx264", False),
        ("mp4", "libx264", True),
        ("matroska", "libx264", False),
        ("mpegts", "libx264", False),
        ("avi", "mpeg4", False),
        ("webm", "libvpx-vp9", False),
    ],
)
def test_any_range_of_frames_is_decoded_exactly(container_format, codec, audio):
    data = write(container_format, codec, numbered(50), audio=audio)
    info = probe(data)
    assert (info.frames, info.height, info.width) == (50, 32, 16 * BITS)
    assert info.fps == pytest.approx(25, rel=1e-2)
    assert numbers(decode_video(data)) == list(range(50))
    for start, count in ((0, 1), (11, 3), (12, 13), (13, 1), (47, 3), (49, 1)):
        assert numbers(decode_video(data, start, count)) == list(range(start, start + count))
    assert numbers(decode_frames(data, [3, 3, 17, 40])) == [3, 3, 17, 40]


def test_frames_of_a_variable_rate_clip_are_addressed_by_order_and_resampled_by_time():
    rng = np.random.default_rng(0)
    pts = np.cumsum(rng.integers(7, 120, size=60)).tolist()
    data = write("mp4", "libx264", numbered(60), pts)
    info = probe(data)
    assert info.frames == 60
    times = np.array(pts) / 1000
    np.testing.assert_allclose(np.array(info.times) - info.times[0], times - times[0], atol=1e-3)
    assert numbers(decode_video(data, 23, 9)) == list(range(23, 32))
    ranks = resample_ranks(info.times, 16)
    wanted = times[0] + np.arange(len(ranks)) / 16
    distance = np.abs(times[:, None] - wanted)
    np.testing.assert_allclose(distance[ranks, np.arange(len(ranks))], distance.min(axis=0), atol=2e-3)
    assert wanted[-1] <= times[-1] + 1e-3 < wanted[-1] + 1 / 16 + 2e-3


@pytest.mark.parametrize(("source", "target"), [(25, 16), (30000 / 1001, 16), (24, 24), (16, 8), (12, 16), (60, 16)])
def test_resampling_a_constant_rate_keeps_the_duration_and_never_goes_back(source, target):
    times = np.arange(200) / source
    ranks = np.array(resample_ranks(times.tolist(), target))
    assert len(ranks) == int(times[-1] * target + 1e-6) + 1
    assert (np.diff(ranks) >= 0).all()
    assert np.abs(times[ranks] - np.arange(len(ranks)) / target).max() <= 0.5 / source + 1e-6
    if source == target:
        assert ranks.tolist() == list(range(200))


def test_one_frame_resamples_to_itself():
    assert resample_ranks([0.5], 16) == [0]


def test_a_clip_that_lies_on_its_side_is_turned_upright():
    frames = numbered(5)
    data = bytearray(write("mp4", "libx264", frames))
    place = data.index(b"tkhd") + 4 + 40  # version 0: the matrix lies 40 bytes behind the box's name and flags
    one = 1 << 16
    assert struct.unpack(">9i", data[place : place + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # show turned clockwise
    info = probe(bytes(data))
    assert (info.height, info.width) == (16 * BITS, 32)
    upright = decode_video(bytes(data))
    clockwise = np.rot90(frames, -1, axes=(1, 2))
    assert np.abs(upright.astype(int) - clockwise).mean() < 8


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
def test_encoding_keeps_frames_rate_and_colours_and_repeats_bit_for_bit(pixel_format):
    video = np.zeros((9, 64, 48, 3), np.uint8)
    video[:, 16:48, 8:40] = (220, 40, 30)
    video[:, :8] = (30, 60, 200)
    data = encode_video(video, 16, pixel_format=pixel_format)
    assert data == encode_video(video, 16, pixel_format=pixel_format)
    info = probe(data)
    assert (info.frames, info.height, info.width, info.fps) == (9, 64, 48, 16)
    assert np.abs(decode_video(data).astype(int) - video).mean() < 3


def test_full_chroma_keeps_a_one_pixel_pattern_that_half_chroma_smears():
    video = np.zeros((5, 32, 32, 3), np.uint8)
    video[..., ::2, 0], video[..., 1::2, 2] = 255, 255
    error = {
        form: np.abs(decode_video(encode_video(video, 16, 1, form)).astype(int) - video).mean()
        for form in ("yuv420p", "yuv444p")
    }
    assert error["yuv444p"] < 10 < error["yuv420p"]


def test_broken_and_short_files_raise_a_short_reason(tmp_path):
    data = encode_video(numbered(20), 16)
    with pytest.raises(VideoError, match="cannot be opened"):
        decode_video(b"not a video")
    with pytest.raises(VideoError, match="cannot be opened"):
        probe(tmp_path / "absent.mp4")
    with pytest.raises(VideoError, match="5 frames wanted from frame 18, 2 found"):
        decode_video(data, 18, 5)
    with pytest.raises(VideoError):
        decode_video(data[: len(data) // 3])
    with pytest.raises(VideoError, match="a frame wanted from frame 20"):
        decode_video(data, 20)


def test_a_file_is_closed_when_its_reader_stops_early(tmp_path):
    import os

    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(numbered(20), 16))
    reader = iterate_video(path)
    assert number_of(next(reader)) == 0
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert str(path) in held
    reader.close()
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert str(path) not in held


def _is_link(fd: str) -> bool:
    import os

    return os.path.islink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, "fps=0"),
        ({"pixel_format": "yuv420"}, "did you mean 'yuv420p'"),
        ({"video_THWC": np.zeros((5, 31, 32, 3), np.uint8)}, "32x31: yuv420p needs even sides"),
        ({"video_THWC": np.zeros((5, 32, 32, 3), np.float32)}, "must be uint8"),
        ({"video_THWC": np.zeros((0, 32, 32, 3), np.uint8)}, "must be uint8"),
    ],
)
def test_encoding_bad_input_names_the_value_and_the_rule(change, message):
    with pytest.raises(UserError, match=message):
        encode_video(**{"video_THWC": np.zeros((5, 32, 32, 3), np.uint8), "fps": 16, **change})


def test_bad_ranges_are_refused():
    with pytest.raises(UserError, match="start=-1"):
        decode_video(b"", -1)
    with pytest.raises(UserError, match="frames=0"):
        decode_video(b"", 0, 0)
    with pytest.raises(UserError, match="rising"):
        decode_frames(b"", [3, 2])
    with pytest.raises(UserError, match="fps=0"):
        resample_ranks([0.0, 1.0], 0)

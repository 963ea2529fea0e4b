"""Evaluation: every score is what the metric alone gives, computed once, whatever is killed, added or broken."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _evaluate_worker import (
    Brightness,
    Contrast,
    Likeness,
    NoWeights,
    Prose,
    SingleOnly,
    evaluate,
    evaluate_apart,
    make_folder,
    traces,
)
from PIL import Image

from idc.data.benchmark import read_items, write_items
from idc.data.video import decode_video, probe
from idc.data.videos import FrameCache
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, sample_frames
from idc.metrics.results import Run, read_run
from idc.stages.evaluate import lock
from idc.stages.judged import FileReference, digest, settings_of
from idc.stages.summary import complaints


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    make_folder(tmp_path / "videos")
    return tmp_path / "videos"


def values(run: Run) -> dict[tuple[str, str], float | None]:
    return {key: result.value for key, result in run.results.items()}


def lines(run: Run) -> dict[tuple[str, str], object]:
    """All but the seconds."""
    return {key: replace(result, seconds=0.0) for key, result in run.results.items()}


def test_scores_are_those_of_each_metric_alone(videos: Path, tmp_path: Path) -> None:
    """Of all frames, of some, of more than there are; also where a metric before has written into its frames."""
    metrics = [Brightness(), Likeness(frames=3), Contrast(frames=9)]
    run, status = evaluate(tmp_path / "out", metrics, videos)
    assert status == 0
    for item in read_items(videos / "items.jsonl"):
        frames = decode_video(videos / f"{item.id}.mp4")
        picture = np.array(Image.open(item.references[0]))
        for metric in metrics:
            metric.load()
            clip = Clip(item.id, frames.copy(), item.prompt, (Reference(picture),), category=item.category)
            assert run.results[item.id, metric.name].value == metric.score(clip).value
            metric.unload()
    assert run.results["v1", "likeness"].details["kinds"] == ["object"]
    assert run.results["v1", "contrast"].prompt == "clip 1"
    assert not (tmp_path / "out" / "frames").exists()


def test_each_video_is_decoded_once_and_each_network_loaded_once_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import idc.data.videos as module

    decoded: list[str] = []
    iterate = module.iterate_video
    monkeypatch.setattr(
        module, "iterate_video", lambda path, **more: (decoded.append(path.stem), iterate(path, **more))[1]
    )
    trace = tmp_path / "out" / "trace"
    evaluate(tmp_path / "out", [Contrast(str(trace)), Brightness(str(trace)), Likeness(str(trace))], videos)
    assert sorted(decoded) == ["v0", "v1", "v2", "v3"]
    steps = traces(trace)
    assert len(steps) == 12
    for step in steps:
        assert step["loaded"] == ([] if step["metric"] == "brightness" else [step["metric"]])
    order = [step["metric"] for step in steps if step["metric"] != "brightness"]
    assert order == ["contrast"] * 4 + ["likeness"] * 4


def test_the_frames_on_disk_stay_within_their_bound(videos: Path, tmp_path: Path) -> None:
    """A clip has 15 kB, of which the networks look at 4 / 5; a bound below one clip takes them one by one."""
    size, found = 5 * 32 * 32 * 3, []
    for number, bound in enumerate((1e6, 2.5 * size, 1.0)):
        out = tmp_path / f"out{number}"
        trace = out / "trace"
        run, _ = evaluate(out, [Contrast(str(trace)), Likeness(str(trace))], videos, cache_gb=bound / 1e9)
        assert max(step["held"] for step in traces(trace)) <= max(bound, size)
        found.append(lines(run))
    assert found[0] == found[1] == found[2]


def test_only_what_is_asked_for_is_kept_of_a_video(videos: Path, tmp_path: Path) -> None:
    cache, path = FrameCache(tmp_path / "cache"), videos / "v2.mp4"
    truth = decode_video(path)
    everything, some = (lambda total: sample_frames(total, None)), (lambda total: sample_frames(total, 2))
    video = cache.decode(path, probe(path), [some, everything])
    assert cache.bytes == truth.nbytes
    assert np.array_equal(video.frames(everything), truth)
    smaller = cache.shrink(video, [some])
    assert np.array_equal(smaller.frames(some), truth[[0, 4]])
    assert [file.stat().st_size for file in cache.folder.iterdir()] == [cache.bytes] == [2 * truth[0].nbytes]
    with pytest.raises(ValueError, match="not kept"):
        smaller.frames(everything)
    cache.drop(smaller)
    assert cache.bytes == 0
    cache.close()
    assert not cache.folder.exists()


# Going on -----------------------------------------------------------------------------------------------------------


def test_what_is_scored_is_not_scored_again_and_what_changed_is(videos: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace"

    def again(*metrics: Brightness | Contrast) -> set[tuple[str, str]]:
        """(id, metric) of what a further evaluation computes."""
        before = len(traces(trace))
        evaluate(out, metrics, videos)
        return {(step["id"], step["metric"]) for step in traces(trace)[before:]}

    assert len(again(Brightness(str(trace)))) == 4
    assert again(Brightness(str(trace))) == set()
    assert {metric for _, metric in again(Brightness(str(trace)), Contrast(str(trace)))} == {"contrast"}
    assert len(again(Contrast(str(trace), scale=0.5))) == 4  # other settings
    assert set(read_run(out).info.metrics) == {"brightness", "contrast"}  # both stay
    (videos / "v1.mp4").write_bytes((videos / "v0.mp4").read_bytes())
    assert again(Contrast(str(trace), scale=0.5)) == {("v1", "contrast")}
    assert ("v1", "brightness") not in read_run(out).results  # it was of the former video
    assert again(Brightness(str(trace)), Contrast(str(trace), scale=0.5)) == {("v1", "brightness")}
    items = read_items(videos / "items.jsonl")
    write_items(videos, [replace(items[0], prompt="another"), *items[1:]])
    assert again(Brightness(str(trace))) == {("v0", "brightness")}
    Image.new("RGB", (8, 8)).save(items[2].references[0])
    assert again(Brightness(str(trace))) == {("v2", "brightness")}


def test_failures_are_tried_again_unless_told_otherwise(videos: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace"
    moved = (videos / "v3.mp4").rename(tmp_path / "v3.mp4")
    run, status = evaluate(out, [Prose(str(trace)), Brightness()], videos)
    assert status == 3
    assert run.results["v3", "brightness"].reason == "no video v3.mp4"
    computed = len(traces(trace))
    _, status = evaluate(out, [Prose(str(trace)), Brightness()], videos, retry_failures=False)
    assert status == 3
    assert len(traces(trace)) == computed
    evaluate(out, [Prose(str(trace)), Brightness()], videos)
    assert [step["id"] for step in traces(trace)[computed:]] == ["v1", "v2"]
    moved.rename(videos / "v3.mp4")
    run, _ = evaluate(out, [Prose(str(trace)), Brightness()], videos, retry_failures=False)
    assert run.results["v3", "brightness"].value is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_goes_on_and_computes_nothing_twice(ranks: int, videos: Path, tmp_path: Path) -> None:
    """Killed among the scores of the second network; then gone on with by one process."""
    out, trace = tmp_path / "out", tmp_path / "trace"
    settings = {"trace": str(trace), "kill_after": 10 // ranks}
    metrics = [(Brightness, settings), (Contrast, settings), (Likeness, settings)]
    codes = evaluate_apart(out, videos, metrics, ranks, kill_rank=ranks - 1)
    assert codes == [*[1] * (ranks - 1), -9]  # who is left notices, and does not wait for ever
    assert (out / "frames").exists()
    torn = sorted((out / "results").glob("*.jsonl"))[0]
    with torn.open("ab") as file:
        file.write(b'{"id": "v')
    run, status = evaluate(out, [Brightness(str(trace)), Contrast(str(trace)), Likeness(str(trace))], videos)
    assert status == 0
    assert not (out / "frames").exists()
    steps = [(step["id"], step["metric"]) for step in traces(trace)]
    assert len(set(steps)) == 12
    assert len(steps) <= 12 + 1  # the one that the kill fell into
    whole, _ = evaluate(tmp_path / "whole", [Brightness(), Contrast(), Likeness()], videos)
    assert values(run) == values(whole)


def test_a_termination_signal_ends_the_run_after_the_score_it_falls_into(videos: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"kill_after": 2, "kill_signal": int(signal.SIGTERM)}
    assert evaluate_apart(out, videos, [(Brightness, settings)], kill_rank=0) == [128 + signal.SIGTERM]
    assert read_run(out).mean("brightness").scored == 3
    assert not (out / "frames").exists()
    run, status = evaluate(out, [Brightness()], videos)
    assert (status, run.mean("brightness").scored) == (0, 4)


def test_two_ranks_give_what_one_gives(videos: Path, tmp_path: Path) -> None:
    metrics = [(Brightness, {}), (SingleOnly, {}), (Likeness, {})]
    assert evaluate_apart(tmp_path / "two", videos, metrics, ranks=2) == [0, 0]
    two = read_run(tmp_path / "two")
    one, _ = evaluate(tmp_path / "one", [Brightness(), SingleOnly(), Likeness()], videos)
    assert lines(two) == lines(one)
    assert two.info.metrics == one.info.metrics
    assert [str(two.mean(name)) for name in two.info.metrics] == [str(one.mean(name)) for name in one.info.metrics]
    assert not (tmp_path / "two" / "frames").exists()


def test_more_ranks_than_videos_and_failures_on_the_second_rank(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", 1)
    assert evaluate_apart(tmp_path / "a", tmp_path / "one", [(Contrast, {})], ranks=2) == [0, 0]
    assert read_run(tmp_path / "a").mean("contrast").scored == 1
    make_folder(tmp_path / "two", 2)
    (tmp_path / "two" / "v1.mp4").write_bytes(b"x")
    # Rank 0 alone tells of it: a launcher would take another rank's status for a crash.
    assert evaluate_apart(tmp_path / "b", tmp_path / "two", [(Contrast, {})], ranks=2) == [3, 0]


def test_scores_do_not_depend_on_the_order_of_items_or_metrics(videos: Path, tmp_path: Path) -> None:
    one, _ = evaluate(tmp_path / "one", [Brightness(), Likeness(), Contrast()], videos)
    write_items(videos, read_items(videos / "items.jsonl")[::-1])
    other, _ = evaluate(tmp_path / "other", [Contrast(), Brightness(), Likeness()], videos)
    assert lines(one) == lines(other)
    assert [one.mean(name) for name in one.info.metrics] == [other.mean(name) for name in one.info.metrics]
    assert list(other.info.items) == ["v3", "v2", "v1", "v0"]


# What is wrong ------------------------------------------------------------------------------------------------------


def test_whatever_is_broken_is_named_and_the_rest_is_scored(videos: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "more", 9, frames=12)
    videos = tmp_path / "more"
    content = (videos / "v4.mp4").read_bytes()
    (videos / "v4.mp4").write_bytes(content[: len(content) // 2])
    (videos / "v5.mp4").write_bytes(b"")
    (videos / "v6.mp4").unlink()
    (videos / "v7.mp4").rename(videos / "v7.MOV")
    (videos / "v9.mp4").write_bytes(content)
    (videos / "notes.txt").write_text("not a video, and nobody's business")
    (videos / "references" / "v8.png").write_bytes(b"no picture")
    (videos / "references" / "v0.png").unlink()
    metrics = [Brightness(), Prose(), Likeness(), NoWeights(), SingleOnly()]
    run, status = evaluate(tmp_path / "out", metrics, videos)
    assert status == 3
    reasons = {key: result.reason for key, result in run.results.items() if result.failed}
    assert "v4.mp4: " in reasons["v4", "brightness"]
    assert "v5.mp4: cannot be opened as a video" in reasons["v5", "likeness"]
    assert reasons["v6", "brightness"] == reasons["v7", "likeness"].replace("7", "6") == "no video v6.mp4"
    assert reasons["v0", "likeness"] == "reference v0.png: no such file"
    assert "reference v8.png: cannot be read" in reasons["v8", "likeness"]
    assert reasons["v1", "prose"] == "the judge said 'a lovely video' in place of a score"
    assert run.results["v1", "prose"].details["answers"] == ["a lovely video"]
    assert reasons["v2", "prose"] == "RuntimeError: out of memory"
    assert reasons["v3", "prose"] == "the score 7 is outside of its bounds 0 to 1"
    assert reasons["v1", "no_weights"] == "not loaded: weights/: lacks model.safetensors"
    assert {id for id, name in reasons if name == "brightness"} == {"v4", "v5", "v6", "v7"}
    means = {name: str(run.mean(name)).split("(")[1] for name in run.info.metrics}
    assert means == {
        "brightness": "5 / 9)",
        "prose": "2 / 9)",
        "likeness": "3 / 9)",
        "no_weights": "0 / 9)",
        "single_only": "3 / 5)",
    }
    assert not run.results["v1", "single_only"].applies
    problems = {problem.file: problem.reason for problem in run.info.problems}
    assert problems.keys() == {"v7.MOV", "v9.mp4"}
    assert "no item has the id 'v9'" in problems["v9.mp4"]
    text = "\n".join(complaints(run))
    assert "no_weights: not loaded: weights/: lacks model.safetensors (5: v0, v1, v2, ...)" in text
    assert "v7.MOV: a video is named <id>.mp4" in text


def test_a_video_that_ends_before_its_last_frame_is_not_scored_in_part(tmp_path: Path) -> None:
    """Its index promises 12 frames; the data of the last ones is overwritten with zeros."""
    make_folder(tmp_path / "videos", 2, frames=12)
    path = tmp_path / "videos" / "v1.mp4"
    content = bytearray(path.read_bytes())
    start, end = content.find(b"mdat"), content.find(b"moov")
    if end < start:
        end = len(content)
    middle = (start + end) // 2
    content[middle:end] = bytes(end - middle)
    path.write_bytes(content)
    run, status = evaluate(tmp_path / "out", [Brightness()], tmp_path / "videos")
    assert status == 3
    assert run.results["v0", "brightness"].value is not None
    assert "v1.mp4: " in run.results["v1", "brightness"].reason


def test_settings_that_cannot_work_are_named(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for expected, metrics, settings in (
        ("nothing to score with", [], {}),
        ("two are named 'brightness'", [Brightness(), Brightness()], {}),
        ("cache_gb=0", [Brightness()], {"cache_gb": 0.0}),
        ("name a folder", [Brightness()], {"videos": None}),
        ("no such folder", [Brightness()], {"videos": str(tmp_path / "nowhere")}),
        ("has no video and no items.jsonl", [Brightness()], {"videos": str(tmp_path)}),
        ("no such file", [Brightness()], {"benchmark": str(tmp_path / "x.json")}),
    ):
        with pytest.raises(UserError, match=expected):
            evaluate(out, metrics, **{"videos": str(videos), **settings})
    for path in videos.glob("*.mp4"):
        path.rename(path.with_name("x" + path.name))
    with pytest.raises(UserError, match=r"none of the 4 items .* but 4 other videos, such as xv0.mp4"):
        evaluate(out, [Brightness()], videos)


def test_a_run_folder_belongs_to_one_process_and_one_set_of_videos(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with lock(out), pytest.raises(UserError, match="another evaluation is writing here"):
        evaluate(out, [Brightness()], videos)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"model.init_args.out .*file is a file"):
        evaluate(tmp_path / "file", [Brightness()], videos)
    evaluate(out, [Brightness()], videos)
    make_folder(tmp_path / "others")
    with pytest.raises(UserError, match=r"holds the scores of .*videos"):
        evaluate(out, [Brightness()], tmp_path / "others")
    with pytest.raises(UserError, match="under protocol 'toy'"):
        evaluate(out, [Brightness()], videos, protocol="paper")


# What stands beside the scores --------------------------------------------------------------------------------------


def test_the_run_says_what_was_judged_by_what(videos: Path, tmp_path: Path) -> None:
    run, _ = evaluate(
        tmp_path / "out",
        [Contrast(frames=3)],
        videos,
        system="ours",
        rewards=["a network"],
        columns={"guidance": 2.5},
    )
    info = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (info["system"], info["protocol"], info["expected"]) == ("ours", "toy", 4)
    assert info["items"]["v1"] == "two"
    assert info["rewards"] == ["a network"]
    assert info["columns"] == {"guidance": 2.5}
    contrast = info["metrics"]["contrast"]
    assert (contrast["models"], contrast["bounds"], contrast["frames"]) == (["a network"], [0, 1], 3)
    assert contrast["settings"]["scale"] == 1.0
    assert {"idc", "torch", "numpy"} <= info["versions"].keys()
    assert run.info.expected == 4


class _Judge:
    def __init__(self, url: str, api_key: str) -> None:
        self.url, self.api_key, self.max_tokens, self._session = url, api_key, 5, object()


def test_settings_tell_metrics_apart_and_keep_secrets() -> None:
    def config(**more: object) -> str:
        metric = Contrast()
        for name, value in {"judge": _Judge("http://x", "hunter2"), "weights": np.arange(3.0), **more}.items():
            setattr(metric, name, value)
        assert "hunter2" not in json.dumps(settings_of(metric))
        return digest(settings_of(metric))

    assert config() == config() == config(judge=_Judge("http://x", "another"))
    others = [
        config(judge=_Judge("http://y", "k")),
        config(weights=np.arange(1.0, 4)),
        config(frames=7),
        config(scale=2),
    ]
    assert len({config(), *others}) == 5


def test_a_cut_out_reference_is_shown_on_white_with_its_mask(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    reference = FileReference(tmp_path / "cut.png", "thing", "object")
    assert np.array_equal(reference.image_HWC[0, [0, 5]], [[200, 0, 0], [255, 255, 255]])
    assert reference.mask_HW is not None
    assert reference.mask_HW.sum() == 12
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    lying = FileReference(tmp_path / "turned.jpg", "", "object")
    assert lying.image_HWC.shape == (6, 4, 3)
    assert lying.mask_HW is None

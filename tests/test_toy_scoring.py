"""The toy scorers: ground truth scores 1, and each fault is punished in its own score and in no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from idc.data.toy import ToySpec, ToySubject, ToyWorld, render_clip
from idc.data.toy_scoring import ToyScore, score_video
from idc.models.toy_codec import CosineCodec

WORLD = ToyWorld()
SPECS = [WORLD.spec(seed) for seed in range(40)]


def pair(**changes: object) -> ToySpec:
    """A striped red circle above that moves right, a dotted blue square below that moves left."""
    base = next(spec for spec in SPECS if len(spec.subjects) == 2)
    subjects = (
        ToySubject("circle", "striped", "red", 0.18, (0.3, 0.28), (0.6, 0.28)),
        ToySubject("square", "dotted", "blue", 0.18, (0.7, 0.74), (0.4, 0.74)),
    )
    floor = {"background_colour": "pale green", "background_pattern": "checked"}
    return replace(base, **{"subjects": subjects, **floor, **changes})


ASKED = pair()


def shown(*changes: dict[str, object] | None) -> np.ndarray:
    """The pair's clip with changes to each subject; None leaves the subject out."""
    subjects = [replace(s, **c) for s, c in zip(ASKED.subjects, changes, strict=False) if c is not None]
    return render_clip(replace(ASKED, subjects=tuple(subjects)))


def assert_only(score: ToyScore, *faults: str) -> None:
    """The named scores are low, and all others stay near 1."""
    values = score.as_dict()
    for name, value in values.items():
        if name != "total":
            assert value is not None
            assert (value < 0.8) == (name in faults), f"{name}={value}"
    assert values["total"] < 0.95 if faults else values["total"] > 0.98


def test_renders_score_one():
    for spec in SPECS:
        values = score_video(render_clip(spec), spec).as_dict()
        assert all(value is None or value > 0.95 for value in values.values()), (spec.caption, values)
    mean = np.mean([score_video(render_clip(spec), spec).total for spec in SPECS])
    assert mean > 0.99


def test_a_correct_clip_has_no_faults():
    score = score_video(shown({}, {}), ASKED)
    assert_only(score)
    assert (score.missing, score.extra, score.doubled, score.swapped, dict(score.reasons)) == (0, 0, 0, 0, {})


def test_the_place_of_a_subject_does_not_matter():
    moved = shown({"start": (0.35, 0.72), "end": (0.65, 0.72)}, {"start": (0.6, 0.25), "end": (0.3, 0.25)})
    assert_only(score_video(moved, ASKED))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ([{"colour": "green"}, {}], "colour"),
        ([{"shape": "triangle"}, {}], "shape"),
        ([{"texture": "plain"}, {}], "texture"),
        ([{"start": (0.6, 0.28), "end": (0.3, 0.28)}, {}], "motion"),
        ([{"end": (0.3, 0.28)}, {"end": (0.7, 0.74)}], "motion"),
    ],
    ids=["colour", "shape", "texture", "reversed", "static"],
)
def test_a_fault_lowers_its_own_score_alone(changes, fault):
    assert_only(score_video(shown(*changes), ASKED), fault)


def test_a_wrong_background_is_its_own_fault():
    for colour, pattern in (("white", "checked"), ("pale green", "striped"), ("grey", "plain")):
        video = render_clip(pair(background_colour=colour, background_pattern=pattern))
        assert_only(score_video(video, ASKED), "background")


def test_a_missing_subject_lowers_count_and_presence():
    score = score_video(shown({}, None), ASKED)
    assert_only(score, "count", "presence")
    assert (score.missing, score.extra) == (1, 0)
    assert score.subjects[1].track is None


def test_a_doubled_subject_lowers_the_count_and_is_named():
    twice = (*ASKED.subjects, replace(ASKED.subjects[0], start=(0.2, 0.74), end=(0.2, 0.5)))
    crowd = (twice[0], replace(twice[1], start=(0.75, 0.74), end=(0.55, 0.74)), replace(twice[2], end=(0.2, 0.74)))
    score = score_video(render_clip(pair(subjects=crowd)), ASKED)
    assert_only(score, "count")
    assert (score.extra, score.doubled, score.missing) == (1, 1, 0)


def test_one_subject_twice_in_place_of_two_is_doubled():
    red = ASKED.subjects[0]
    look = {"shape": red.shape, "texture": red.texture, "colour": red.colour}
    score = score_video(shown({}, look), ASKED)
    assert (score.doubled, score.count, score.separation) == (1, 1.0, 0.5)
    assert score.subjects[1].leaks == ("colour", "shape", "texture")


def test_swapped_colours_are_leaks_and_one_swap():
    score = score_video(shown({"colour": "blue"}, {"colour": "red"}), ASKED)
    assert_only(score, "colour", "separation")
    assert (score.colour, score.swapped) == (0.0, 1)
    assert score.separation == pytest.approx(1 - 2 / 6)


def test_a_leaked_texture_names_the_attribute():
    score = score_video(shown({"texture": "dotted"}, {}), ASKED)
    assert score.subjects[0].leaks == ("texture",)
    assert score.separation == pytest.approx(1 - 1 / 6)


def test_a_subject_seen_half_of_the_time_has_half_its_presence():
    video = shown({}, {})
    video[5:] = shown({}, None)[5:]
    score = score_video(video, ASKED)
    assert score.subjects[1].presence == pytest.approx(5 / 9)
    assert score.presence == pytest.approx((1 + 5 / 9) / 2)
    assert score.colour == score.count == 1


def test_subjects_that_stay_or_orbit_are_judged_by_what_they_should_do():
    spec = next(s for s in map(WORLD.spec, range(500)) if any(x.action == "orbits" for x in s.subjects))
    assert score_video(render_clip(spec), spec).motion > 0.95
    frozen = render_clip(replace(spec, subjects=tuple(replace(s, sweep=0.0) for s in spec.subjects)))
    assert score_video(frozen, spec).motion == pytest.approx(0.5, abs=0.1)  # the one that stays is right
    still = pair(subjects=tuple(replace(s, action="stays", end=s.start) for s in ASKED.subjects))
    assert score_video(shown({}, {}), still).motion < 0.3


def test_scores_survive_the_codec_noise_and_blur():
    codec, generator = CosineCodec(), torch.Generator().manual_seed(0)
    totals = {"codec": [], "noise": []}
    for spec in SPECS[:20]:
        clip = torch.from_numpy(render_clip(spec)).permute(3, 0, 1, 2) / 127.5 - 1
        videos = {
            "codec": codec.decode(codec.encode(clip[None]))[0],
            "noise": clip + 0.1 * torch.randn(clip.shape, generator=generator),
        }
        for name, video in videos.items():
            score = score_video(video, spec)
            assert score.count == score.colour == 1
            assert score.background > 0.9
            totals[name].append(score.total)
    assert np.mean(totals["codec"]) > 0.94
    assert np.mean(totals["noise"]) > 0.98


def test_a_blank_video_fails_with_reasons_and_no_number():
    blank = np.full((9, 64, 64, 3), 200, np.uint8)
    score = score_video(blank, ASKED)
    assert (score.colour, score.shape, score.texture, score.motion, score.separation) == (None,) * 5
    assert score.reasons["colour"] == "no subject was found"
    assert (score.count, score.presence, score.missing) == (0.0, 0.0, 2)
    assert score.total < 0.25


def test_noise_scores_low():
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    assert score_video(noise, ASKED).total < 0.3


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (torch.full((3, 9, 64, 64), float("nan")), "finite"),
        (np.zeros((5, 64, 64, 3), np.uint8), "asks for"),
        (torch.zeros(9, 3, 64, 64), "must be uint8 THWC or float CTHW"),
    ],
)
def test_a_video_that_cannot_be_judged_has_a_reason_and_no_score(video, reason):
    score = score_video(video, ASKED)
    assert set(score.as_dict().values()) == {None}
    assert reason in score.reasons["video"]

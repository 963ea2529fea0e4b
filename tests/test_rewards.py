"""Rewards and composites in closed form, and the runner: the same numbers everywhere, none where none was earned."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _metric_examples import Shouting
from _rewards import Fixed, Flaky, Texture, Troubled, Unloadable, composite, grey
from _server import launch

import idc.rewards
from idc.data.toy import ToySpec, ToyWorld, render_clip
from idc.data.toy_scoring import score_video
from idc.errors import UserError
from idc.metrics import Aesthetics, CopyPaste, NaturalScore, NexusScore
from idc.metrics.base import Clip, Reference, Score, VideoMetric
from idc.rewards import (
    AestheticReward,
    Breakdown,
    Brightness,
    Composite,
    FaceReward,
    MetricReward,
    NaturalReward,
    PaperReward,
    RewardRunner,
    SubjectReward,
    Term,
    ToyAesthetics,
    ToyAntiLeak,
    ToyFace,
    ToyNatural,
    ToySubject,
    combine,
)
from idc.rewards.base import Reward, call
from idc.rewards.leaks import AntiLeak, leak_margins

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _forkserver() -> None:
    launch(print, [])  # the pool's processes come from the tests' own server, which has imported what they need


def test_importing_the_package_imports_nothing_heavy_and_every_name_is_there() -> None:
    code = "import sys, idc.rewards, idc.rewards.cli; print([m for m in ('torch', 'numpy', 'cv2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in idc.rewards.__all__:
        assert getattr(idc.rewards, name).__doc__
    with pytest.raises(AttributeError, match="FaceRewrd"):
        _ = idc.rewards.FaceRewrd


@pytest.mark.parametrize("module", ["base", "measures", "toy"])
def test_the_examples_in_the_documentation_hold(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"idc.rewards.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


# The toy world's rewards


def spec_of(subjects: int = 2) -> ToySpec:
    return next(spec for spec in map(ToyWorld().spec, range(100)) if len(spec.subjects) == subjects and moves(spec))


def moves(spec: ToySpec) -> bool:
    return all(subject.action == "moves" for subject in spec.subjects)


def shown(spec: ToySpec, as_spec: ToySpec | None = None) -> Clip:
    """A clip that shows `spec` where `as_spec` was asked for."""
    return Clip("toy", render_clip(spec), meta={"toy": (as_spec or spec).to_json()})


def changed(spec: ToySpec, *subjects: Any, **values: Any) -> ToySpec:
    return replace(spec, subjects=subjects or spec.subjects, **values)


def other_texture(spec: ToySpec) -> ToySpec:
    first, *rest = spec.subjects
    return changed(spec, replace(first, texture="striped" if first.texture != "striped" else "plain"), *rest)


def other_background(spec: ToySpec) -> ToySpec:
    colours = {other.background_colour for other in map(ToyWorld().spec, range(50))} - {spec.background_colour}
    return changed(spec, background_colour=min(colours))


def still(spec: ToySpec) -> ToySpec:
    middle = [tuple((a + b) / 2 for a, b in zip(subject.start, subject.end, strict=True)) for subject in spec.subjects]
    return changed(spec, *(replace(s, start=m, end=m) for s, m in zip(spec.subjects, middle, strict=True)))


TOYS: dict[str, Reward] = {r.name: r for r in (ToyFace(), ToySubject(), ToyAesthetics(), ToyNatural(), ToyAntiLeak())}


@pytest.mark.parametrize(
    ("fault", "fallen"),
    [
        (other_texture, {"toy_face", "toy_anti_leak"}),
        (other_background, {"toy_aesthetics"}),
        (still, {"toy_natural"}),
        (lambda spec: changed(spec, spec.subjects[0]), {"toy_face", "toy_subject", "toy_natural", "toy_anti_leak"}),
    ],
    ids=["texture", "background", "still", "missing"],
)
def test_each_toy_reward_falls_by_its_own_fault_and_by_no_other(
    fault: Callable[[ToySpec], ToySpec], fallen: set[str]
) -> None:
    spec = spec_of()
    right, wrong = shown(spec), shown(fault(spec), spec)
    before = {name: call(reward, right).value for name, reward in TOYS.items()}
    after = {name: call(reward, wrong).value for name, reward in TOYS.items()}
    assert {name for name in TOYS if after[name] < before[name] - 0.1} == fallen
    assert all(after[name] == pytest.approx(before[name], abs=0.05) for name in TOYS if name not in fallen)


def test_a_perfect_toy_clip_has_the_composites_best_value_and_a_wrong_one_less() -> None:
    reward = PaperReward(ToyFace(), ToySubject(), ToyAesthetics(), ToyNatural())
    for subjects in (1, 2, 3):
        spec, other = spec_of(subjects) if subjects < 3 else ToyWorld().spec(3), ToyWorld().spec(77)
        right, wrong = reward.score(shown(spec)).value, reward.score(shown(other, spec)).value
        assert right is not None
        assert wrong is not None
        assert 0.95 < right <= 1
        assert wrong < right - 0.3


@pytest.mark.parametrize("min_weight", [0, 0.25, 0.5, 0.75, 1])
def test_lambda_goes_from_the_mean_to_the_minimum_over_subjects(min_weight: float) -> None:
    spec = spec_of()
    clip = shown(other_texture(spec), spec)
    found = score_video(clip.frames_THWC, spec).subjects
    each = [s.presence * (s.colour + s.shape + s.texture) / 3 for s in found]
    assert max(each) - min(each) > 0.1
    expected = (1 - min_weight) * sum(each) / 2 + min_weight * min(each)
    assert ToyFace(min_weight).score(clip).value == pytest.approx(expected, abs=1e-12)


def test_a_subject_counts_for_the_frames_that_show_it() -> None:
    spec = spec_of()
    clip, alone = shown(spec), render_clip(changed(spec, spec.subjects[1]))
    cut = 2 * spec.frames // 3  # what is seen in fewer than half of the frames is no subject
    half = replace(clip, frames_THWC=np.concatenate([clip.frames_THWC[:cut], alone[cut:]]))
    first, second = score_video(half.frames_THWC, spec).subjects
    assert (first.presence, second.presence) == pytest.approx((cut / spec.frames, 1), abs=0.1)
    assert first.motion is not None
    assert second.motion is not None
    natural = (first.presence * first.motion + second.presence * second.motion) / 2
    assert ToyNatural().score(half).value == pytest.approx(natural)
    whole = ToyAntiLeak().score(clip).details["subjects"]
    assert ToyAntiLeak().score(half).details["subjects"] == pytest.approx(
        [first.presence * whole[0], whole[1]], abs=0.05
    )


@pytest.mark.parametrize("reward", TOYS.values(), ids=TOYS)
def test_a_clip_that_the_exact_scorers_cannot_judge_is_a_failure(reward: Reward) -> None:
    assert "no toy spec" in reward.score(grey("plain")).reason
    short = Clip("short", render_clip(spec_of())[:-4], meta={"toy": spec_of().to_json()})
    assert call(reward, short).value is None
    assert call(reward, short).reason


def test_a_clip_without_any_subject_or_clear_pixel_is_poor_and_still_judged() -> None:
    spec = spec_of()
    empty = Clip("empty", np.zeros((spec.frames, spec.height, spec.width, 3), np.uint8), meta={"toy": spec.to_json()})
    values = {name: call(reward, empty).value for name, reward in TOYS.items()}
    assert values["toy_face"] == values["toy_natural"] == values["toy_anti_leak"] == 0
    assert all(value is not None and value <= 0.5 for value in values.values())


# Leaks


def test_leak_margins_by_hand() -> None:
    likeness = np.array([[0.8, 0.1, -0.2], [0.3, 0.4, 0.6], [np.nan, np.nan, np.nan]])
    assert leak_margins(likeness, 0.46) == pytest.approx([0.46 - 0.1, 0.4 - 0.6, 0])
    assert leak_margins(np.array([[0.9]]), 0.46) == pytest.approx([0.46])  # nobody else to be like
    assert leak_margins(np.array([[np.nan]]), 0.46) == pytest.approx([0])
    order = [2, 0, 1]
    assert leak_margins(likeness[np.ix_(order, order)], 0.46) == pytest.approx(leak_margins(likeness, 0.46)[order])


def test_a_leak_costs_more_in_the_toy_world_than_a_mere_mistake() -> None:
    spec = next(s for s in map(ToyWorld().spec, range(200)) if len(s.subjects) == 2 and moves(s) and distinct(s))
    first, second = spec.subjects
    taken = {first.texture, second.texture}
    third = next(texture for texture in ("plain", "striped", "dotted", "checked", "spotted") if texture not in taken)
    right, wrong, leaked = (
        ToyAntiLeak().score(shown(changed(spec, replace(first, texture=texture), second), spec)).value
        for texture in (first.texture, third, second.texture)
    )
    assert right > wrong > leaked


def distinct(spec: ToySpec) -> bool:
    first, second = spec.subjects
    return first.texture != second.texture and first.shape != second.shape


# Real faces


def people_clip(*names: str, asked: tuple[str, ...] = ("ann", "bea")) -> Clip:
    from _people import head, photos, retaken, scene

    heads = [head(retaken(photos()[name], 2)) for name in names]
    actors = [lambda t, picture=picture, left=20 + 230 * k: (picture, left, 40) for k, picture in enumerate(heads)]
    references = tuple(Reference(np.ascontiguousarray(photos()[name]), name, "face") for name in asked)
    return Clip("people", scene(1, actors, (240, 40 + 230 * len(names))), references=references)


def test_anti_leak_is_the_formula_over_the_best_assignment_of_faces() -> None:
    from idc.metrics.facesim import face_embedding
    from idc.models.faces import YuNetSFace

    faces, ceiling = YuNetSFace(), 0.5
    values = {}
    for names in (("ann", "bea"), ("ann", "ann"), ("ann",), ("cem", "dan", "ann")):
        clip = people_clip(*names)
        known = [face_embedding(reference.image_HWC, faces) for reference in clip.references]
        picture = clip.frames_THWC[0]
        seen = [faces.embed(picture, face) for face in faces.detect(picture)]
        assert len(seen) == len(names)
        rows = [[float(g @ r) for r in known] for g in seen] + [None] * (2 - len(seen))
        best = max(
            itertools.permutations(rows, 2),
            key=lambda pair: sum(0 if row is None else 3 + row[k] for k, row in enumerate(pair)),
        )
        margins = [0 if row is None else min(row[k], ceiling) - row[1 - k] for k, row in enumerate(best)]
        values[names] = AntiLeak(faces, ceiling).score(clip).value
        assert values[names] == pytest.approx(sum(margins) / 2, abs=1e-6)
    assert values["ann", "bea"] > 0.2 > 0 > values["ann", "ann"]


def test_the_face_reward_blends_what_tracking_finds_for_each_person() -> None:
    clip = people_clip("ann", "cem")  # bea is missing
    mean, half, least = (FaceReward(min_weight=weight).score(clip) for weight in (0, 0.5, 1))
    each = [subject["identity"] for subject in half.details["subjects"]]
    assert each[0] > 0.5 > each[1] == 0
    assert [mean.value, half.value, least.value] == pytest.approx([each[0] / 2, each[0] / 4, 0])
    assert FaceReward().models == AntiLeak().models == ("yunet-2023mar", "sface-2021dec")


def test_faces_say_nothing_about_items_without_people_and_fail_on_references_without_faces() -> None:
    blank = np.zeros((40, 40, 3), np.uint8)
    dog = Clip("dog", blank[None], references=(Reference(blank, "dog"),))
    man = Clip("man", blank[None], references=(Reference(blank, "man", "human"),))
    for reward in (FaceReward(), AntiLeak()):
        assert not reward.applies(dog)
        assert reward.applies(man)
        assert reward.score(man).reason == "no face is found in the reference picture of man"
        assert reward.score(dog).value is None


# Metrics as rewards


class Given(VideoMetric):
    """A metric with the value that the prompt names."""

    name = "given"
    bounds = (-2.0, 6.0)

    def score(self, clip: Clip) -> Score:
        return (
            Score.failed("asked to") if clip.prompt == "fail" else Score(float(clip.prompt), details={"a": np.ones(1)})
        )


def prompted(text: Any) -> Clip:
    return replace(grey("given"), prompt=str(text))


def test_a_metric_becomes_a_reward_on_a_linear_scale_that_is_not_cut() -> None:
    whole, scaled = MetricReward(Given()), MetricReward(Given(), "mine", (4, 2))
    assert [whole.score(prompted(raw)).value for raw in (-2, 0, 6)] == [0, 0.25, 1]
    assert [scaled.score(prompted(raw)).value for raw in (4, 2, 1, 6)] == [0, 1, 1.5, -1]
    assert (whole.name, whole.bounds, scaled.name, scaled.bounds) == ("given", (0, 1), "mine", (-1, 3))
    assert whole.score(prompted(0)).details == {"a": [1.0], "raw": 0.0}
    assert whole.score(prompted("fail")).reason == "asked to"
    assert "outside of its bounds -2 to 6" in whole.score(prompted(7)).reason
    copies = MetricReward(CopyPaste())
    assert copies.scale == (1, 0)  # lower is better
    given = Given()
    given.bounds = (0.0, math.inf)  # type: ignore[misc]
    with pytest.raises(UserError, match="scale=None of given"):
        MetricReward(given)
    assert MetricReward(given, scale=(0, 2)).score(prompted(3)).value == 1.5


class Rater:
    """Stands in for LAION's predictor: every frame is rated the same."""

    class clip:  # noqa: N801
        name = "a tower"

    def __init__(self, rating: float) -> None:
        self.rating = rating

    def predict(self, pictures: list[np.ndarray]) -> torch.Tensor:
        return torch.full((len(pictures),), self.rating)


class Colours:
    """Embeds a picture as the direction of its mean colour."""

    name, device = "colours", torch.device("cpu")

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def unload(self) -> None: ...

    def embed_images(self, pictures: Any) -> torch.Tensor:
        rows = torch.stack([torch.as_tensor(np.asarray(p).mean((0, 1))) for p in pictures])
        return rows / rows.norm(dim=1, keepdim=True)


def test_the_other_rewards_of_the_paper_on_the_scales_of_its_tables() -> None:
    aesthetic = AestheticReward(Aesthetics(Rater(5.5)))  # type: ignore[arg-type]
    assert aesthetic.score(grey("a")).value == pytest.approx((5.5 - 4) / 3)
    assert AestheticReward(Aesthetics(Rater(3.0))).score(grey("a")).value == pytest.approx(-1 / 3)  # type: ignore[arg-type]
    natural = NaturalReward(NaturalScore(Shouting()))  # type: ignore[arg-type]
    assert natural.score(grey("a", 130)).value == pytest.approx((3 - 1) / 4)
    assert "not an integer from 1 to 5" in natural.score(grey("a")).reason
    frames = np.zeros((32, 8, 8, 3), np.uint8)
    frames[:16, ..., 0] = frames[16:, ..., 1] = 200  # red, then green
    masks = np.ones((32, 1, 8, 8), bool)
    clip = Clip("c", frames, references=(Reference(frames[0], "red"),), masks_TNHW=masks)
    subject = SubjectReward(NexusScore("paper", Colours(), grounding=False))  # type: ignore[arg-type]
    assert subject.score(clip).value == pytest.approx(0.5)
    assert (aesthetic.name, natural.name, subject.name) == ("aesthetics", "natural", "subject")
    assert aesthetic.models == ("LAION aesthetic head", "a tower")
    with pytest.raises(UserError, match=r"protocol='opens2v-1.0'.*must be 'paper'"):
        SubjectReward(NexusScore("opens2v-1.0", Colours(), detector=Colours()))  # type: ignore[arg-type]


def test_brightness_is_the_mean_pixel() -> None:
    frames = RNG.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    assert Brightness().score(Clip("a", frames)).value == pytest.approx(frames.astype(float).mean() / 255)


# Composites


def paper(values: Mapping[str, Any], **settings: Any) -> PaperReward:
    names = ("face", "subject", "aesthetics", "natural")
    return PaperReward(*(Fixed({"*": values[name]}, name) for name in names), **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"fidelity": 0.0}, {"fidelity": 1.0}, {"gamma": 0.0}, {"gamma": 1.0}, {"eta": 0.25, "gamma": 0.7}],
    ids=["paper", "w/o fidelity", "w/o quality", "w/o natural", "natural alone", "others"],
)
def test_the_papers_composite_in_closed_form(settings: dict[str, float]) -> None:
    f, s, a, n = RNG.normal(size=4)
    weights = {"fidelity": 0.6, "eta": 0.5, "gamma": 0.4, **settings}
    fidelity = (1 - weights["eta"]) * f + weights["eta"] * s
    quality = (1 - weights["gamma"]) * a + weights["gamma"] * n
    expected = weights["fidelity"] * fidelity + (1 - weights["fidelity"]) * quality
    found = paper({"face": f, "subject": s, "aesthetics": a, "natural": n}, **settings).breakdown(grey("x"))
    assert found.total == pytest.approx(expected, abs=1e-12)
    if 0 < weights["fidelity"] < 1:
        assert found.parts == pytest.approx({"fidelity": fidelity, "quality": quality})
    assert Breakdown(**found.as_dict()) == found


def test_what_has_no_weight_is_not_computed_unless_it_is_monitored() -> None:
    values = {"face": RuntimeError("called"), "subject": "fails", "aesthetics": 0.5, "natural": 0.25}
    plain = paper(values, fidelity=0.0).breakdown(grey("x"))
    assert (plain.total, set(plain.values)) == (pytest.approx(0.6 * 0.5 + 0.4 * 0.25), {"aesthetics", "natural"})
    watched = paper(values | {"face": 0.9}, fidelity=0.0, monitor=True)
    found = watched.breakdown(grey("x"))
    assert found.total == plain.total  # a watched failure costs nothing
    assert (found.values["face"], found.weights["face"], found.reasons["subject"]) == (0.9, 0, "fails")
    assert found.reason == ""
    both = Composite([Term(Fixed({"*": 1}, "a", ("m1",))), Term(Fixed({"*": 1}, "b", ("m2",)), 0, monitor=True)])
    assert both.models == ("m1",)  # what is only watched is not optimised


def test_a_failed_term_leaves_no_total_and_says_why() -> None:
    found = paper({"face": 0.5, "subject": "no mask", "aesthetics": 0.5, "natural": "mute judge"}).breakdown(grey("x"))
    assert found.total is None
    assert found.reason == "subject: no mask; natural: mute judge"
    assert found.values == {"face": 0.5, "subject": None, "aesthetics": 0.5, "natural": None}
    assert found.parts == {"fidelity": None, "quality": None}
    score = paper({"face": "a", "subject": 1, "aesthetics": 1, "natural": 1}).score(grey("x"))
    assert (score.value, score.reason) == (None, "face: a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9])
def test_a_value_that_is_no_number_or_out_of_bounds_is_no_reward(value: float) -> None:
    class Broken(Fixed):
        def score(self, clip: Clip) -> Score:
            score = Score(0.0)
            object.__setattr__(score, "value", value)  # as a reward that does not keep to its own contract
            return score

    found = composite(Broken({"*": 0})).breakdown(grey("x"))
    assert found.total is None
    assert str(value) in found.reason or "outside of its bounds" in found.reason


def test_terms_that_do_not_apply_leave_their_weight_to_their_own_part() -> None:
    values = {"face": None, "subject": 0.8, "aesthetics": 0.5, "natural": 0.25}
    found = paper(values).breakdown(grey("x"))
    assert found.total == pytest.approx(0.6 * 0.8 + 0.4 * (0.6 * 0.5 + 0.4 * 0.25))
    assert (found.reasons["face"], found.parts["fidelity"]) == ("does not apply", pytest.approx(0.8))
    found = paper(values | {"subject": None}).breakdown(grey("x"))  # nobody was asked for
    assert found.total == pytest.approx(0.6 * 0.5 + 0.4 * 0.25)
    assert found.parts["fidelity"] is None
    none = paper(dict.fromkeys(values)).breakdown(grey("x"))
    assert (none.total, none.reason) == (None, "no reward says anything about such a clip")
    taxed = Composite([Term(Fixed({"*": None}, "a"), 3), Term(Fixed({"*": 2}, "b"), 1), Term(Fixed({"*": 5}, "c"), -1)])
    assert taxed.breakdown(grey("x")).total == pytest.approx(2.5 * 2 - 2.5 * 5)


def test_a_composite_is_a_reward_and_may_be_a_term() -> None:
    inner = composite(Fixed({"*": 2}, "a"), Fixed({"*": 3}, "b"))
    assert Composite([Term(inner, 0.5), Term(Fixed({"*": 1}, "c"))]).score(grey("x")).value == 3.5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Composite([]), "none of 0 has a weight"),
        (lambda: Composite([Term(Brightness(), 0, monitor=True)]), "none of 1 has a weight"),
        (lambda: composite(Brightness(), Brightness()), "two are named 'brightness'"),
        (lambda: composite(Brightness(), normalise="grupo"), "'grupo'.*did you mean 'group'"),
        (lambda: Term(Brightness(), math.nan), "weight=nan of reward 'brightness'"),
        (lambda: paper(dict.fromkeys(("face", "subject", "aesthetics", "natural"), 1), eta=1.5), "eta=1.5"),
        (lambda: ToyFace(-0.1), "min_weight=-0.1"),
        (lambda: FaceReward(min_weight=math.nan), "min_weight=nan"),
        (lambda: AntiLeak(ceiling=0), "ceiling=0"),
        (lambda: ToyAntiLeak(1.5), "ceiling=1.5"),
        (lambda: AntiLeak(frames=0), "frames=0"),
        (lambda: combine([], [], "std"), "normalise='std'"),
        (lambda: RewardRunner(composite(Brightness()), where="thread"), "where='thread'.*did you mean 'threads'"),
        (lambda: RewardRunner(composite(Brightness()), on_failure="zero"), "on_failure='zero'"),
        (lambda: RewardRunner(composite(Brightness()), workers=0), "workers=0"),
        (lambda: RewardRunner(composite(Brightness()), timeout=0), "timeout=0"),
        (lambda: RewardRunner(composite(Brightness()), max_failure_rate=2), "max_failure_rate=2"),
    ],
)
def test_settings_that_cannot_work_are_named(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()


# Normalisation in groups


def batch(rows: list[tuple[float, float] | None], weights: tuple[float, float] = (0.75, 0.25)) -> list[Breakdown]:
    reward = [Fixed({}, "a"), Fixed({}, "b")]
    terms = Composite([Term(r, w) for r, w in zip(reward, weights, strict=True)])
    found = []
    for row in rows:
        for k in (0, 1):
            reward[k].values["*"] = "lost" if row is None else row[k]
        found.append(terms.breakdown(grey("x")))
    return found


def test_group_normalisation_in_closed_form_and_without_the_lost() -> None:
    rows: list[Any] = [tuple(row) for row in RNG.normal(size=(9, 2))]
    rows[2] = rows[6] = None
    groups = ["p", "q", "p", "p", "q", "q", "q", "p", "p"]
    found = combine(batch(rows), groups, "group")
    for group in "pq":
        indices = [i for i, g in enumerate(groups) if g == group and rows[i] is not None]
        values = np.array([rows[i] for i in indices])
        expected = ((values - values.mean(0)) / (values.std(0) + 1e-8)) @ (0.75, 0.25)
        assert [found[i] for i in indices] == pytest.approx(expected, abs=1e-12)
    assert found[2] is found[6] is None
    plain = combine(batch(rows), groups, "none")
    assert plain == [None if row is None else pytest.approx(0.75 * row[0] + 0.25 * row[1]) for row in rows]


def test_group_normalisation_does_not_see_a_rewards_scale_and_a_plain_sum_does() -> None:
    rows = [(1.0, 0.0), (0.9, 0.3), (0.2, 0.5)]
    louder = [(a, 1000 * b + 7) for a, b in rows]
    assert combine(batch(louder), [0] * 3, "group") == pytest.approx(combine(batch(rows), [0] * 3, "group"), abs=1e-4)
    best = [max(range(3), key=lambda i, r=r: combine(batch(r), [0] * 3)[i]) for r in (rows, louder)]
    assert best == [0, 2]


def test_a_reward_that_is_constant_over_a_group_adds_nothing() -> None:
    found = combine(batch([(0.1, 1.0), (0.1, 3.0)]), "pp", "group")
    assert found == pytest.approx([-0.25, 0.25])
    assert combine(batch([(0.1, 0.7)] * 3), "ppp", "group") == pytest.approx([0] * 3, abs=1e-7)
    assert combine(batch([(0.1, 0.7)]), "p", "group") == [0]
    assert combine([], [], "group") == []
    assert combine(batch([None, None]), "pp", "group") == [None, None]
    with pytest.raises(ValueError, match="2 breakdowns of 1 groups"):
        combine(batch([None, None]), "p", "group")
    assert composite(Brightness(), normalise="group").combine(batch([(1, 2)]), "p") == [0]


# The runner


def toy_clips() -> dict[str, Clip]:
    specs = [ToyWorld().spec(seed) for seed in range(3)]
    pairs = itertools.product(range(3), range(2))
    return {f"{i}{j}": replace(shown(specs[i], specs[j]), id=f"{i}{j}") for i, j in pairs}


def test_where_rewards_run_by_how_many_and_in_which_order_does_not_matter() -> None:
    clips = toy_clips()
    terms = [
        Term(PaperReward(ToyFace(), ToySubject(), ToyAesthetics(), ToyNatural())),
        Term(Texture(), 0.001),
        Term(FaceReward()),
        Term(ToyAntiLeak(), 0, monitor=True),
    ]
    reward = Composite(terms, normalise="group")
    expected = {key: reward.breakdown(clip) for key, clip in clips.items()}
    assert len({breakdown.total for breakdown in expected.values()}) > 3
    for where, workers in (("process", 1), ("threads", 1), ("threads", 3), ("pool", 2)):
        with RewardRunner(reward, where, workers) as runner, torch.autocast("cpu", torch.bfloat16):
            for key in sorted(clips, reverse=workers > 1):
                runner.submit(key, clips[key])
            found = runner.collect()
        assert list(found) == sorted(clips, reverse=workers > 1)
        assert found == expected, where


def test_rewards_run_while_the_caller_goes_on() -> None:
    go = threading.Event()

    class Waits(Fixed):
        def score(self, clip: Clip) -> Score:
            return super().score(clip) if go.wait(30) else Score.failed("the caller did not go on")

    with RewardRunner(composite(Waits({"*": 1})), "threads", 1) as runner:
        runner.submit("a", grey("a"))
        go.set()
        assert runner.collect()["a"].total == 1


@pytest.mark.parametrize("safe", [True, False])
def test_only_rewards_that_may_be_shared_by_threads_are(safe: bool) -> None:
    both = threading.Barrier(2)  # passes only if two threads are in `score`

    class Shared(Reward):
        name = "shared"
        thread_safe = safe

        def score(self, clip: Clip) -> Score:
            try:
                both.wait(30 if safe else 0.2)
            except threading.BrokenBarrierError:
                return Score(0.0)
            return Score(1.0)

    with RewardRunner(composite(Shared()), "threads", 2) as runner:
        for name in "ab":
            runner.submit(name, grey(name))
        assert [breakdown.total for breakdown in runner.collect().values()] == [float(safe)] * 2


@pytest.mark.parametrize("where", ["process", "threads"])
def test_a_call_that_raises_is_made_again_after_a_pause_and_no_other_is(where: str) -> None:
    pauses: list[float] = []
    flaky, steady = Flaky({"*": 2}, "flaky"), Fixed({"*": 1}, "steady")
    flaky.faults = 2
    with RewardRunner(composite(flaky, steady), where, 1, retries=2, pause=0.5) as runner:
        runner.sleep = pauses.append
        runner.submit("a", grey("a"))
        found = runner.collect()["a"]
        assert (found.total, found.retried, runner.retried, runner.failed) == (3, 2, 2, 0)
        assert pauses == [0.5, 1.0]
        assert (flaky.calls["a"], steady.calls["a"]) == (3, 1)
        flaky.faults = 99
        runner.submit("b", grey("b"))
        found = runner.collect(check=False)["b"]
        assert (found.total, found.values) == (None, {"flaky": None, "steady": 1})
        assert found.reason == "flaky: RuntimeError: call 3 got lost (in 3 calls)"
        assert (runner.submitted, runner.failed, runner.retried) == (2, 1, 4)


def test_a_verdict_is_final() -> None:
    verdicts = Fixed({"a": "no face", "b": UserError("reference b.png: no such file")})
    with RewardRunner(composite(verdicts), "process", max_failure_rate=1) as runner:
        for name in "ab":
            runner.submit(name, grey(name))
        found = runner.collect()
    assert [found[name].reason for name in "ab"] == ["fixed: no face", "fixed: reference b.png: no such file"]
    assert verdicts.calls == {"a": 1, "b": 1}


def test_the_lost_leave_their_group_and_are_counted() -> None:
    reward = composite(Fixed({"p0": 1, "p1": "lost", "p2": 3, "q0": 4, "q1": 4, "q2": "lost"}), normalise="group")
    with RewardRunner(reward, "threads", 2) as runner:
        for name in reward.terms[0].reward.values:  # type: ignore[attr-defined]
            runner.submit((name[0], int(name[1])), grey(name))
        found = runner.collect()
    rewards = reward.combine(list(found.values()), [key[0] for key in found])
    assert rewards == pytest.approx([-1, None, 1, 0, 0, None], abs=1e-6)
    assert (runner.submitted, runner.failed) == (6, 2)


def test_too_many_failures_or_any_end_the_run_as_the_recipe_says() -> None:
    reward = composite(Fixed({"bad": "no mask", "*": 1}))

    def collect(failed: int, total: int, **settings: Any) -> dict[Any, Breakdown]:
        with RewardRunner(reward, "process", **settings) as runner:
            for number in range(total):
                runner.submit(number, grey("bad" if number < failed else "good"))
            return runner.collect()

    assert len(collect(2, 4, max_failure_rate=0.5)) == 4
    with pytest.raises(UserError, match=r"2 of 3 samples have no reward, more than max_failure_rate=0\.5 .*: no mask"):
        collect(2, 3, max_failure_rate=0.5)
    with pytest.raises(UserError, match=r"1 of 9 samples has no reward: fixed: no mask \(on_failure='stop'"):
        collect(1, 9, on_failure="stop")
    assert len(collect(0, 2, on_failure="stop", max_failure_rate=0)) == 2
    runner = RewardRunner(reward, max_failure_rate=0.5)
    runner.check(0, 0)
    runner.check(3, 6)  # of all ranks together
    with pytest.raises(UserError, match="4 of 6 samples"):
        runner.check(4, 6)


def test_collecting_nothing_a_key_twice_and_going_on_after_the_end() -> None:
    runner = RewardRunner(composite(Brightness()))
    assert runner.collect() == {}
    runner.submit("a", grey("a", 255))
    with pytest.raises(UserError, match="sample 'a': is submitted twice"):
        runner.submit("a", grey("a"))
    runner.close()  # interrupted: what was under way is dropped
    assert runner.collect() == {}
    runner.submit("a", grey("a"))
    assert runner.collect()["a"].total == 0
    runner.submit("a", grey("a", 255))
    assert runner.collect()["a"].total == 1
    runner.close()


@pytest.mark.parametrize(("where", "workers"), [("threads", 2), ("threads", 1), ("pool", 2)])
def test_a_call_that_hangs_costs_its_own_sample_alone(where: str, workers: int) -> None:
    with RewardRunner(composite(Troubled()), where, workers, retries=0, timeout=1.0) as runner:
        runner.load()
        for name in ("a", "stuck", "b", "c"):
            runner.submit(name, grey(name, 7))
        found = runner.collect()
        assert [found[name].total for name in ("a", "b", "c")] == [7] * 3
        assert found["stuck"].reason.startswith("no score within 1 s")
        runner.submit("a", grey("a", 9))
        assert runner.collect()["a"].total == 9


def test_a_hanging_reward_that_keeps_the_turn_is_named_to_those_that_wait_for_it() -> None:
    go = threading.Event()

    class Hangs(Fixed):
        thread_safe = False

        def score(self, clip: Clip) -> Score:
            go.wait(60)
            return super().score(clip)

    reward = Composite([Term(Hangs({"a": 1}, "hangs")), Term(Texture())])
    try:
        with RewardRunner(reward, "threads", 2, retries=0, timeout=0.3, max_failure_rate=1) as runner:
            for name in "ab":  # nothing but the texture applies to b
                runner.submit(name, grey(name))
            found = runner.collect()
            said = "no score within 0.3 s; 'hangs' does not return, and it is not thread-safe"
            assert [found[name].reason.startswith(said) for name in "ab"] == [True, True]
    finally:
        go.set()


def test_a_worker_process_that_dies_costs_the_sample_that_killed_it_alone() -> None:
    with RewardRunner(composite(Troubled()), "pool", 2, retries=1) as runner:
        for name in ("a", "poison", "b"):
            runner.submit(name, grey(name, 7))
        found = runner.collect()
        assert [found[name].total for name in ("a", "b")] == [7] * 2
        assert found["poison"].reason == "the worker process died (in 2 calls)"
        assert runner.failed == 1
        runner.submit("a", grey("a", 9))
        assert runner.collect()["a"].total == 9


@pytest.mark.parametrize("where", ["process", "threads", "pool"])
def test_what_cannot_be_loaded_ends_the_run_with_its_message(where: str) -> None:
    with (
        RewardRunner(composite(Unloadable()), where, 1) as runner,
        pytest.raises(UserError, match=r"reward.safetensors: no such file"),
    ):
        runner.load()

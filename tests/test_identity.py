"""Several people in one video: who is who, on scenes of real heads where the truth is known; copies; toy subjects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from _people import FACES, Actor, cyclist, driver, head, largest, photos, retaken, scene, turned

from idc.data import toy_render as render
from idc.data.toy import ToyWorld, render_clip, render_references
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score
from idc.metrics.copy_paste import CopyPaste, compare, face_view
from idc.metrics.identity import IdentityTracking, masked_crop
from idc.metrics.toy import ToyIdentity, ToyScores
from idc.models.faces import unit

T = 6
LEFT, MIDDLE, RIGHT = 10, 170, 330


@cache
def shot(name: str) -> np.ndarray:
    """How a person looks in the scenes; the references show them otherwise."""
    return head(driver(0)[:140, 28:148]) if name == "driver" else head(retaken(photos()[name], 3))


@cache
def reference(name: str) -> Reference:
    return Reference(driver(35) if name == "driver" else photos()[name], name, "human")


def at(name: str, left: int, step: int = 2) -> Actor:
    """A person who drifts a little, sideways by `step` pixels a frame."""
    return lambda t: (shot(name), left + step * t, 40 + t)


def judge(actors: Sequence[Actor], *names: str, frames: int = T, clip: np.ndarray | None = None) -> Score:
    frames_THWC = scene(frames, actors) if clip is None else clip
    result = IdentityTracking(FACES, frames=None).score(Clip("a", frames_THWC, references=tuple(map(reference, names))))
    assert result.value is not None, result.reason
    assert json.loads(json.dumps(result.details, allow_nan=False)) == result.details
    return result


def rates(result: Score, subject: int) -> tuple[float, float, float, float]:
    row = result.details["subjects"][subject]
    return row["missing"], row["swapped"], row["unsure"], row["doubled"]


@cache
def two_people() -> Score:
    return judge([at("dan", LEFT), at("driver", RIGHT, -2)], "dan", "driver")


def test_two_people_are_each_themselves():
    result = two_people()
    assert [rates(result, n) for n in range(2)] == [(0, 0, 0, 0)] * 2
    assert result.details["confusion"] == [[1, 0, 0], [0, 1, 0]]
    assert result.value > 0.6
    assert result.value == result.details["average"] == np.mean([s["identity"] for s in result.details["subjects"]])
    assert result.details["minimum"] == min(s["identity"] for s in result.details["subjects"])
    likeness = result.details["likeness"]
    assert min(likeness[0][0], likeness[1][1]) > 0.6 > 0.3 > max(likeness[0][1], likeness[1][0])
    assert np.shape(result.details["similarity"]) == (2, T)
    assert result.details["strangers"] == 0


def test_the_order_of_references_only_orders_the_answers():
    one, other = two_people(), judge([at("dan", LEFT), at("driver", RIGHT, -2)], "driver", "dan")
    assert one.value == pytest.approx(other.value)
    assert one.details["similarity"] == other.details["similarity"][::-1]


def test_a_swap_in_the_middle_is_seen():
    swap = 4

    def trade(mine: str, other: str, left: int) -> Actor:
        return lambda t: (shot(mine if t < swap else other), left + 2 * t, 40 + t)

    result = judge([trade("dan", "cem", LEFT), trade("cem", "dan", RIGHT)], "dan", "cem")
    share = 1 - swap / T
    for subject in range(2):
        assert rates(result, subject) == (0, pytest.approx(share), 0, 0)
    assert result.details["states"] == [["seen"] * swap + ["swapped"] * (T - swap)] * 2
    np.testing.assert_allclose(result.details["confusion"], [[1 - share, share, 0], [share, 1 - share, 0]])
    steady = judge([at("dan", LEFT), at("cem", RIGHT)], "dan", "cem")
    assert result.value == pytest.approx((1 - share) * steady.value, abs=0.05)


def test_people_who_change_places_at_a_cut_or_on_foot_are_not_swapped():
    before = scene(T // 2, [at("dan", LEFT), at("cem", RIGHT)])
    after = scene(T // 2, [at("dan", RIGHT), at("cem", LEFT)], floor=(250, 20))
    cut = judge([], "dan", "cem", clip=np.concatenate([before, after]))
    assert cut.details["confusion"] == [[1, 0, 0], [0, 1, 0]]
    assert (cut.details["swapped"], cut.details["missing"]) == (0, 0)
    passing = [lambda t: (shot("dan"), LEFT + 32 * t, 0), lambda t: (shot("cem"), RIGHT - 32 * t, 70)]
    on_foot = judge(passing, "dan", "cem", frames=11)
    assert (on_foot.details["swapped"], on_foot.details["doubled"]) == (0, 0)
    assert on_foot.details["missing"] <= 0.25  # while one head hides the other
    assert [states[-1] for states in on_foot.details["states"]] == ["seen", "seen"]


def test_somebody_who_never_comes_is_missing():
    result = judge([at("dan", MIDDLE)], "dan", "driver")
    assert rates(result, 0) == (0, 0, 0, 0)
    assert rates(result, 1) == (1, 0, 0, 0)
    assert result.details["subjects"][1]["similarity"] is None
    assert result.details["similarity"][1] == [None] * T
    assert result.details["confusion"][1] == [0, 0, 0]
    assert result.details["likeness"][1] == [None, None]
    assert result.value == pytest.approx(result.details["subjects"][0]["identity"] / 2)


def test_a_doubled_face_is_one_and_another_one_too_many():
    result = judge([at("dan", LEFT), at("dan", RIGHT)], "dan", "cem")
    assert rates(result, 0) == (0, 0, 0, 1)
    assert rates(result, 1) == (1, 0, 0, 0)
    assert result.details["doubled_frames"] == [list(range(T)), []]
    assert result.details["confusion"] == [[1, 0, 0], [0, 0, 0]]
    beside = judge([at("dan", LEFT, 0), at("dan", RIGHT, 0), at("cem", MIDDLE, 0)], "dan", "cem")
    assert [rates(beside, n) for n in range(2)] == [(0, 0, 0, 1), (0, 0, 0, 0)]


def test_a_stranger_is_nobody():
    result = judge([at("dan", LEFT), at("fay", RIGHT)], "dan")
    assert rates(result, 0) == (0, 0, 0, 0)
    assert result.details["strangers"] == 1
    alone = judge([at("fay", LEFT), at("bea", RIGHT)], "dan")
    assert (alone.value, alone.details["missing"], alone.details["strangers"]) == (0, 1, 2)


def test_somebody_who_turns_away_is_still_there():
    heads = [turned(shot("eva"), angle) for angle in (0, -40, -57, -57, -40, 0)]
    known = FACES.embed(reference("eva").image_HWC, largest(reference("eva").image_HWC))
    (alone,) = scene(1, [lambda t: (heads[2], LEFT, 40)])
    assert float(FACES.embed(alone, largest(alone)) @ known) < FACES.threshold  # on its own it would be nobody
    result = judge([lambda t: (heads[t], LEFT, 40), at("driver", RIGHT, 0)], "eva", "driver")
    assert result.details["states"][0] == ["seen", "seen", "unsure", "unsure", "seen", "seen"]
    assert result.details["states"][1] == ["seen"] * T
    series = result.details["similarity"][0]
    assert max(series[2:4]) < FACES.threshold < min(series[:2] + series[4:])
    # Where the face before is another than the one after, the one between may be either's, so it is nobody's.
    changing = [lambda t: (heads[t] if t < 4 else shot("dan"), LEFT - 30 * (t > 3), 40)]
    assert judge(changing, "eva", "dan").details["unsure"] == 0


def test_a_man_who_rides_out_of_the_picture_is_missing_from_then_on():
    ride = cyclist()[4:]
    beside = np.stack([np.pad(driver(t), ((64, 64), (0, 0), (0, 0))) for t in range(len(ride))])
    clip = np.concatenate([beside, ride], 2)
    references = (reference("driver"), Reference(cyclist()[6], "cyclist", "human"))
    result = IdentityTracking(FACES, threshold=0.6, frames=None).score(Clip("a", clip, references=references))
    assert rates(result, 0) == (0, 0, 0, 0)
    states = result.details["states"][1]
    assert states[:9] == ["seen"] * 9
    assert states[9] == "unsure"  # at the edge, turned away: cosine 0.58
    assert states[10:] == ["missing"] * (len(ride) - 10)


def test_references_without_a_face_or_a_person_fail_with_the_name():
    floor = np.full((64, 64, 3), 99, np.uint8)
    clip = Clip("a", scene(1, [at("dan", LEFT)]), references=(reference("dan"), Reference(floor, "queen", "face")))
    result = IdentityTracking(FACES).score(clip)
    assert (result.value, result.reason) == (None, "no face is found in the reference picture of queen")
    result = IdentityTracking(FACES).score(replace(clip, references=(Reference(floor, "beach", "background"),)))
    assert "no subject can be judged" in result.reason


@pytest.mark.parametrize(("settings", "message"), [({"frames": 0}, "frames=0"), ({"threshold": 1}, "threshold=1")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        IdentityTracking(FACES, **settings)


# Masked subjects of any kind, in the toy world, where the masks are exact.


class MeanColour:
    """A stand-in for CLIP that knows colours alone: the mean of what is not grey."""

    models = ("mean-colour",)

    def embed_images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        rows = []
        for picture in pictures:
            pixels = picture.reshape(-1, 3).astype(float) - 128
            vivid = np.ptp(pixels, axis=1) > 90
            rows.append(unit((pixels - pixels.mean(1, keepdims=True))[vivid].mean(0) if vivid.any() else np.ones(3)))
        return np.stack(rows)

    def load(self, device: object = "cpu") -> None: ...

    def unload(self) -> None: ...


def toy_clip(frames: np.ndarray | None = None) -> tuple[Clip, np.ndarray]:
    spec = next(s for s in map(ToyWorld().spec, range(99)) if {x.colour for x in s.subjects} == {"red", "blue"})
    video = render_clip(spec)
    floor = render.background(spec.background_colour, spec.background_pattern, spec.height, spec.width)
    empty = (255 * floor + 0.5).astype(int)
    whole = np.abs(video.astype(int) - empty).max(-1) > 40
    alone = [
        np.abs(render_clip(replace(spec, subjects=(replace(s, target=None),))).astype(int) - empty).max(-1) > 40
        for s in spec.subjects
    ]
    masks = np.stack(alone, 1) & whole[:, None]
    pictures = zip(render_references(spec), spec.subjects, strict=True)
    references = tuple(Reference(picture, subject.name) for picture, subject in pictures)
    return Clip("toy", video, references=references, masks_TNHW=masks, meta={"toy": spec.to_json()}), masks


def test_masked_subjects_are_told_apart_by_any_embedder():
    clip, masks = toy_clip()
    metric = IdentityTracking(FACES, MeanColour(), frames=None)
    right = metric.score(clip)
    assert right.details["confusion"] == [[1, 0, 0], [0, 1, 0]]
    assert right.value > 0.8
    swapped = metric.score(replace(clip, references=clip.references[::-1]))
    assert swapped.details["confusion"] == [[0, 1, 0], [1, 0, 0]]
    assert (swapped.value, swapped.details["swapped"], swapped.details["missing"]) == (0, 1, 0)
    gone = masks.copy()
    gone[4:, 1] = False
    half = metric.score(replace(clip, masks_TNHW=gone))
    assert [s["missing"] for s in half.details["subjects"]] == [0, 5 / 9]
    leaked = clip.frames_THWC.copy()
    leaked[masks[:, 1]] = leaked[masks[:, 0]].mean(0)
    doubled = metric.score(replace(clip, frames_THWC=leaked))
    assert doubled.details["confusion"][1] == [1, 0, 0]
    assert [s["doubled"] for s in doubled.details["subjects"]] == [1, 0]
    assert doubled.details["subjects"][1]["missing"] == 1


def test_a_region_that_is_a_sliver_is_no_sighting_and_such_a_reference_fails_with_the_reason():
    video, masks = np.full((2, 4, 900, 3), 90, np.uint8), np.zeros((2, 1, 4, 900), bool)
    masks[0, 0, :, :40] = masks[1, 0, 1] = True
    clip = Clip("a", video, references=(Reference(video[0, :, :40], "rope"),), masks_TNHW=masks)
    metric = IdentityTracking(FACES, MeanColour(), frames=2)
    assert metric.score(clip).details["subjects"][0]["missing"] == 0.5
    thin = replace(clip, references=(Reference(video[0, :1], "rope"),))
    assert metric.score(thin).reason == "reference 1: picture of 900 x 1 pixels: its aspect ratio is more than 200"


def test_people_and_things_are_judged_together_each_in_its_own_way():
    clip, masks = toy_clip()
    things = np.repeat(np.repeat(clip.frames_THWC, 3, 1), 3, 2)
    people = scene(len(things), [at("dan", LEFT, 0)], size=things.shape[1:3])
    video = np.concatenate([people, things], 2)
    wide = np.concatenate([np.zeros((*masks.shape[:2], *people.shape[1:3]), bool), masks.repeat(3, 2).repeat(3, 3)], 3)
    beach = Reference(np.zeros((9, 9, 3), np.uint8), "beach", "background")
    none = np.zeros_like(wide[:, :1])
    mixed = Clip(
        "a",
        video,
        references=(clip.references[0], reference("dan"), clip.references[1], beach),
        masks_TNHW=np.concatenate([wide[:, :1], none, wide[:, 1:], none], 1),
    )
    result = IdentityTracking(FACES, MeanColour(), frames=4).score(mixed)
    assert [s["reference"] for s in result.details["subjects"]] == [0, 1, 2]
    assert result.details["confusion"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert result.details["likeness"][1][0] is None
    assert result.details["not_judged"] == ["beach"]
    faces_only = IdentityTracking(FACES, frames=4).score(mixed)
    assert faces_only.details["not_judged"] == [clip.references[0].name, clip.references[1].name, "beach"]


def test_masked_crops_are_grey_outside_the_mask():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    mask = np.zeros((4, 4), bool)
    mask[1, 1:3] = mask[2, 2] = True
    crop = masked_crop(picture, mask)
    assert crop.shape == (2, 2, 3)
    assert crop[1, 0].tolist() == [128] * 3
    np.testing.assert_array_equal(crop[0], picture[1, 1:3])
    assert masked_crop(picture, None) is picture


# Copies of the reference picture.


def test_a_pasted_reference_is_a_copy_and_the_same_person_elsewhere_is_not():
    metric = CopyPaste(FACES, frames=3)

    def value(shown: np.ndarray, asked: np.ndarray) -> float:
        result = metric.score(Clip("a", shown[None], references=(Reference(asked, "who", "human"),)))
        assert result.value is not None, result.reason
        return result.value

    group = photos()

    def pasted_in(name: str) -> np.ndarray:
        return scene(1, [lambda t: (head(group[name], 190), 60, 20)])[0]

    pasted = [value(pasted_in(name), group[name]) for name in ("dan", "eva", "cem")]
    ride = cyclist()
    elsewhere = [value(driver(60), driver(0)), value(driver(114), driver(0)), value(ride[11], ride[1])]
    others = [value(driver(0), group["dan"]), value(ride[1], driver(0)), value(group["eva"], group["cem"])]
    assert min(pasted) > 0.85, pasted
    assert max(elsewhere) < 0.65, elsewhere
    assert max(others) < 0.45, others


@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_a_copy_stays_one_when_scaled_turned_or_compressed(scale):
    import cv2

    photo = photos()["astronaut"]
    small = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    centre = (small.shape[1] / 2, small.shape[0] / 2)
    tilted = cv2.warpAffine(small, cv2.getRotationMatrix2D(centre, 9, 1.0), small.shape[1::-1])
    coded = cv2.imdecode(cv2.imencode(".jpg", tilted, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1)
    found = compare(face_view(photo, largest(photo).landmarks), face_view(coded, largest(coded).landmarks))
    assert found.value > 0.85
    itself = compare(face_view(photo, largest(photo).landmarks), face_view(photo, largest(photo).landmarks))
    assert itself.value == pytest.approx(1, abs=1e-3)


def test_masked_things_are_compared_by_their_masks():
    clip, masks = toy_clip()
    box = masks[0, 0]
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    cut = slice(max(rows[0] - 3, 0), rows[-1] + 4), slice(max(columns[0] - 3, 0), columns[-1] + 4)
    pasted = Reference(clip.frames_THWC[0][cut], "thing", mask_HW=box[cut])
    one = replace(clip, references=(pasted,), masks_TNHW=masks[:, :1])
    metric = CopyPaste(FACES, frames=3)
    other = replace(one, references=(replace(pasted, image_HWC=np.ascontiguousarray(pasted.image_HWC[::-1, ::-1])),))
    copied, flipped = metric.score(one).details["subjects"][0], metric.score(other).details["subjects"][0]
    assert copied["highest"] > 0.9
    assert copied["subject"] > flipped["subject"]
    nowhere = metric.score(replace(one, masks_TNHW=np.zeros_like(one.masks_TNHW)))
    assert (nowhere.value, nowhere.reason) == (None, "no subject is seen that could be compared: thing")


# The toy world's scorers behind the same interface.


def test_toy_clips_score_by_what_they_show():
    clip, _ = toy_clip()
    identity, total = ToyIdentity().score(clip), ToyScores().score(clip)
    assert identity.value > 0.97
    assert total.value > 0.97
    assert identity.details["confusion"] == [[1, 0, 0], [0, 1, 0]]
    assert (identity.details["exact"], identity.details["missing"]) == (1, 0)
    assert total.details["count"] == 1
    assert set(IDENTITY_KEYS) <= set(identity.details)


IDENTITY_KEYS = ("subjects", "average", "minimum", "missing", "swapped", "doubled", "similarity", "states", "confusion")


def test_a_toy_subject_that_is_missing_or_wrong_costs_its_own_identity():
    world = ToyWorld()
    spec = next(s for s in map(world.spec, range(99)) if len(s.subjects) == 2 and s.subjects[1].target is None)
    spec = replace(spec, subjects=tuple(replace(s, target=None, action="moves") for s in spec.subjects))
    meta = {"toy": json.loads(json.dumps(spec.to_json()))}
    gone = ToyIdentity().score(Clip("a", render_clip(replace(spec, subjects=spec.subjects[:1])), meta=meta))
    assert [s["missing"] for s in gone.details["subjects"]] == [0, 1]
    assert gone.value == pytest.approx(0.5, abs=0.05)
    assert gone.details["similarity"][1] == [None] * spec.frames
    colours = [s.colour for s in spec.subjects]
    painted = tuple(replace(s, colour=c) for s, c in zip(spec.subjects, colours[::-1], strict=True))
    leak = ToyIdentity().score(Clip("a", render_clip(replace(spec, subjects=painted)), meta=meta))
    assert 0.3 < leak.value < 0.75
    assert leak.details["exact"] == 0


@pytest.mark.parametrize("metric", [ToyIdentity(), ToyScores()], ids=lambda m: m.name)
def test_toy_metrics_say_why_they_have_no_score(metric):
    clip, _ = toy_clip()
    assert metric.score(replace(clip, meta={})).reason == 'the clip has no toy spec in its meta["toy"]'
    assert not metric.applies(replace(clip, meta={}))
    assert metric.score(replace(clip, meta={"toy": {"seed": 3}})).reason.startswith('meta["toy"] is no toy spec')
    short = metric.score(Clip("a", clip.frames_THWC[:5], meta=clip.meta))
    assert short.value is None
    assert "the spec asks for" in short.reason


def test_items_without_people_are_not_expected_unless_an_embedder_can_judge_objects() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)

    def clip(*kinds: str) -> Clip:
        return Clip("a", picture[None], references=tuple(Reference(picture, kind=kind) for kind in kinds))

    faces, both = IdentityTracking(), IdentityTracking(embedder=MeanColour())
    assert [faces.applies(clip(*kinds)) for kinds in (["face"], ["object", "human"], ["object"], [])] == [1, 1, 0, 0]
    assert [both.applies(clip(*kinds)) for kinds in (["object"], ["background"])] == [1, 0]

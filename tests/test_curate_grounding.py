"""Boxes and masks of subjects: exact coordinates by pixels, merging by hand, the real classes in any company."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from _coloured import COLOURS, ByColour, Coloured, candidate, followed, frame, one
from _tiny_grounding import noise, save_grounding_dino, save_sam

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped, Reference, encode_png
from idc.curate.crops import FoundAgain, SubjectCrops
from idc.curate.geometry import View, plain_view
from idc.curate.grounding import Ground, MergeLabels, SubjectLimits, face_on, mask_within, share_inside
from idc.errors import UserError
from idc.models.grounding import Detection, GroundingDino, Query, Sam


def ground(**settings: Any) -> Ground:
    return Ground(ByColour(), Coloured(), **settings)


# Ground

BALL, CAR, CAT = (20, 30, 60, 70), (80, 40, 150, 90), (5, 5, 15, 25)


def test_boxes_and_masks_are_where_the_pixels_are() -> None:
    clip = [frame(("red ball", BALL), ("green car", CAR))] * 3
    outcome = one(ground()([candidate(clip, "red ball", "green car", "blue cat")]))
    assert [(s.name, tuple(s.box), s.frame) for s in outcome.subjects] == [
        ("red ball", BALL, 0),
        ("green car", CAR, 0),
    ]
    for subject in outcome.subjects:
        drawn = (clip[0] == COLOURS[subject.name]).all(-1)
        assert np.array_equal(subject.mask, drawn)
    assert outcome.meta["ground"] == {"frame": 0, "not found": ["blue cat"]}


def test_the_frame_that_shows_most_is_taken_and_the_first_of_equal_ones() -> None:
    clip = [
        frame(("red ball", BALL)),
        frame(("red ball", BALL), ("green car", CAR)),
        frame(),
        frame(("red ball", BALL), ("green car", CAR)),
        frame(("red ball", BALL), ("green car", (80, 40, 90, 50))),
    ]
    some = candidate(clip, "red ball", "green car")
    assert [s.frame for s in one(ground(frames=1)([some])).subjects] == [0]
    outcome = one(ground(frames=5)([some]))
    assert [s.frame for s in outcome.subjects] == [1, 1]
    assert one(ground(frames=5)([candidate(clip[::-1], "red ball", "green car")])).subjects[0].frame == 1


def test_boxes_of_a_wrong_size_do_not_count_and_nothing_found_drops() -> None:
    clip = [frame(("red ball", (0, 0, 160, 96)), ("green car", (0, 0, 4, 4)))]
    some = candidate(clip, "red ball", "green car")
    dropped = one(ground(min_area=0.01, max_area=0.9)([some]))
    assert isinstance(dropped, Dropped)
    assert (dropped.step, dropped.reason) == ("ground", "no subject found")
    assert "'red ball', 'green car'" in dropped.detail
    assert [s.name for s in one(ground(max_area=1)([some])).subjects] == ["red ball", "green car"]
    assert one(ground()([candidate(clip)])).reason == "no subject found"
    assert one(ground(min_subjects=0)([candidate(clip)])).subjects == ()


def test_what_came_with_a_box_keeps_it_gets_a_mask_and_says_on_which_frame_to_search() -> None:
    clip = [frame(), frame(("red ball", BALL), ("green car", CAR))]
    given = CuratedSubject("red ball", box=Box(10.5, 20.0, 50.5, 60.0), frame=1, score=0.7)
    outcome = one(ground()([candidate(clip, given, "green car")]))
    ball, car = outcome.subjects
    assert (ball.box, ball.frame, ball.score) == (given.box, 1, 0.7)
    wanted = np.zeros((96, 160), np.bool_)
    wanted[30:60, 20:51] = True  # the box cuts the ball off
    assert np.array_equal(ball.mask, wanted)
    assert (tuple(car.box), car.frame) == (CAR, 1)
    masked = replace(given, mask=np.ones((96, 160), np.bool_))
    assert one(ground()([candidate(clip, masked)])).subjects[0].mask.all()


def test_the_surest_of_several_boxes_is_taken() -> None:
    class Several(ByColour):
        def detect_each(self, queries: Sequence[Query]) -> list[list[Detection]]:
            return [[Detection(*BALL, 0.4), Detection(*CAR, 0.8), Detection(*CAT, 0.6)]] * len(queries)

    some = candidate([frame(("red ball", BALL), ("green car", CAR))], "thing")
    (thing,) = one(Ground(Several(), Coloured())([some])).subjects
    assert (tuple(thing.box), thing.score) == (CAR, 0.8)


def test_places_need_no_box() -> None:
    place = CuratedSubject("red ball", "place")
    outcome = one(ground()([candidate([frame(("green car", CAR))], place, "green car")]))
    assert outcome.subjects[0] == place
    assert one(ground()([candidate([frame(("red ball", BALL))], place)])).reason == "no subject found"


def test_a_followed_person_gets_the_body_around_the_face_or_stays_as_the_face() -> None:
    clip = [frame(("person", (60, 10, 110, 90)))] * 2
    inside, outside = Box(75, 12, 95, 32), Box(10, 12, 30, 32)
    seen = one(ground()([candidate(clip, followed("someone", inside), caption="A dance.", ranks=(0, 1))]))
    assert tuple(seen.subjects[0].box) == (60, 10, 110, 90)
    assert seen.subjects[0].mask.sum() == 50 * 80
    unseen = followed("someone", outside)
    outcome = one(ground()([candidate(clip, unseen, caption="A dance.", ranks=(0, 1))]))
    assert outcome.subjects == (unseen,)
    named = ground()
    one(named([candidate(clip, followed("red ball", inside), ranks=(0, 1))]))
    assert named.detector.asked == [["red ball"]]  # type: ignore[attr-defined]


def test_a_track_is_found_in_the_clips_pixels_before_and_after_the_cut() -> None:
    person = followed("person", Box(120, 60, 140, 80), rank=7)
    before = Candidate("k", "s", "v", "", crop=Box(100, 50, 180, 90), ranks=(5, 7, 9), subjects=(person,))
    assert face_on(before, person, 1) == (20, 10, 40, 30)
    assert face_on(before, person, 0) == (20, 10, 40, 30)  # two looks away
    assert face_on(before.changed(ranks=(4, 7)), person, 0) is None
    assert face_on(before, person, 3) is None
    view = View.fill(40, 80, 80, 80)  # twice as large, 40 columns off at each side
    after = before.changed(clip=np.zeros((3, 80, 80, 3), np.uint8), meta={"cut": {"view": plain_view(view)}})
    assert face_on(after, person, 1) == (0, 20, 40, 60)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    root = tmp_path_factory.mktemp("grounding")
    detector = GroundingDino(save_grounding_dino(root / "dino"), threshold=0.05)
    return Ground(detector, Sam(save_sam(root / "sam")), frames=2, max_area=1.0)


def told(outcomes: list[Any], digits: int | None = None) -> list[Any]:
    """What was found, comparable; boxes and scores are rounded to so many digits, where that is said."""

    def plain(outcome: Any) -> Any:
        if isinstance(outcome, Dropped):
            return outcome
        rows = [(s.name, s.frame, s.mask.tobytes(), [*s.box, s.score]) for s in outcome.subjects]
        if digits is not None:
            rows = [(*row, np.round(numbers, digits).tolist()) for *row, numbers in rows]
        return rows, dict(outcome.meta)

    return [[plain(outcome) for outcome in few] for few in outcomes]


def test_the_real_classes_find_the_same_in_any_company_after_unloading_and_travel_light(real: Ground) -> None:
    """In the same company to the bit, in another but for what rounding does."""
    names = ("red cube", "blue", "the green floor")
    some = [candidate(list(noise(3, 48, 64, 3, seed=k)), *names[: k + 1]) for k in range(3)]
    real.load()
    outcomes = real(some)
    whole, rounded = told(outcomes), told(outcomes, 3)
    found = [row for (outcome,) in whole if not isinstance(outcome, Dropped) for row in outcome[0]]
    assert len(found) > 1
    assert rounded == [told(real([c]), 3)[0] for c in some] == told(real(some[::-1]), 3)[::-1]
    light = pickle.dumps(real)
    assert len(light) < 20_000
    real.unload()
    assert real.detector._model is None
    assert real.segmenter._model is None
    assert told(pickle.loads(light)(some)) == whole
    assert [len(name.split("(")) for name in real.models] == [2, 2]


def test_a_label_without_a_word_is_not_found_and_the_others_are(real: Ground) -> None:
    """As a side-car or a record of OpenS2V may hold it: data stops no run."""
    odd = ("...", ".", "!?", "\N{PARTY POPPER}")
    picture = list(noise(1, 48, 64, 3, seed=5))
    kept, lost = (outcome for (outcome,) in real([candidate(picture, *odd, "red cube"), candidate(picture, *odd)]))
    assert [subject.name for subject in kept.subjects] == ["red cube"]
    assert kept.meta["ground"]["not found"] == list(odd)
    assert (lost.reason, lost.detail.count("not found")) == ("no subject found", 1)


def test_boxes_of_the_real_detector_are_its_best_ones_and_masks_lie_within(real: Ground) -> None:
    pictures = list(noise(2, 48, 64, 3, seed=5))
    outcome = one(real([candidate(pictures, "red cube")]))
    (subject,) = outcome.subjects
    each = [real.detector.detect([p], subject.name, p)[0] for p in pictures]
    tops = [max(boxes, key=lambda b: b.score, default=None) for boxes in each]
    best = max((t for t in tops if t is not None), key=lambda t: t.score)
    assert tuple(subject.box) == tuple(best[:4])
    left, top, right, bottom = subject.box
    rows, columns = np.nonzero(subject.mask)
    assert columns.min() >= np.floor(left)
    assert columns.max() < np.ceil(right)
    assert rows.min() >= np.floor(top)
    assert rows.max() < np.ceil(bottom)


@pytest.mark.parametrize("settings", [{"frames": 0}, {"min_area": 0.5, "max_area": 0.5}, {"batch": 0}])
def test_ground_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ground(**settings)


# Merging


def boxed(name: str, box: tuple[float, ...], kind: str = "person", score: float = 0.5, **more: Any) -> CuratedSubject:
    mask = mask_within(np.ones((96, 160), np.bool_), Box(*box))
    return CuratedSubject(name, kind, Box(*box), mask, score=score, **more)


def merge(*subjects: CuratedSubject, caption: str | None = None, **settings: Any) -> Any:
    more = {} if caption is None else {"caption": caption}
    return one(MergeLabels(**settings)([candidate([frame()] * 2, *subjects, ranks=(0, 1), **more)]))


def test_one_person_under_several_labels_is_one_by_the_overlap() -> None:
    man, dancer = boxed("man", (0, 0, 100, 10), score=0.4), boxed("dancer", (0, 0, 80, 10), score=0.6)
    below = boxed("dancer", (0, 0, 79, 10), score=0.6)
    merged = merge(man, dancer)  # 80 of 100
    assert [(s.name, s.score, s.meta["also"]) for s in merged.subjects] == [("dancer", 0.6, ["man"])]
    assert [s.name for s in merge(man, below).subjects] == ["man", "dancer"]
    assert [s.name for s in merge(man, below, iou=0.79).subjects] == ["dancer"]
    elsewhere = replace(dancer, frame=1)
    assert [s.name for s in merge(man, elsewhere).subjects] == ["man", "dancer"]


def test_which_name_stays() -> None:
    box = (0, 0, 100, 90)
    coat, thing = boxed("coat", box, "clothing", 0.9), boxed("thing", box, "object", 0.8)
    man, woman = boxed("man", box, score=0.3), boxed("woman", box, score=0.4)
    for order in ([coat, thing, man, woman], [woman, man, thing, coat], [man, coat, woman, thing]):
        (kept,) = merge(*order).subjects
        assert (kept.name, kept.kind) == ("woman", "person")
        assert sorted(kept.meta["also"]) == ["coat", "man", "thing"]
    (kept,) = merge(man, woman, coat, caption="A coat.").subjects  # the caption has no other word
    assert (kept.name, kept.kind) == ("coat", "person")
    (kept,) = merge(replace(man, score=0.4), woman).subjects
    assert kept.name == "man"  # the earlier one


def test_likeness_does_not_go_through_a_third() -> None:
    a = boxed("a", (0, 0, 100, 10), score=0.9)
    b = boxed("b", (0, 0, 85, 10), score=0.5)
    c = boxed("c", (0, 0, 70, 10), score=0.4)  # like b, not like a
    assert [s.name for s in merge(a, b, c).subjects] == ["a", "c"]
    assert [s.name for s in merge(c, b, a).subjects] == ["c", "a"]
    assert [s.name for s in merge(a, replace(b, score=0.95), c).subjects] == ["b"]


def test_a_face_joins_the_smallest_person_around_it_with_all_that_is_known_of_it() -> None:
    picture = Reference(encode_png(noise(4, 4, 3)))
    face = replace(followed("person", Box(20, 10, 40, 30)), references=(picture,))
    near, far = boxed("man", (10, 0, 60, 90)), boxed("woman", (0, 0, 150, 96))
    merged = merge(far, near, face, caption="A man and a woman.")
    assert [s.name for s in merged.subjects] == ["woman", "man"]
    man = merged.subjects[1]
    assert (man.track, man.embedder, man.references) == (face.track, "sface", (picture,))
    assert man.box == near.box
    assert np.array_equal(man.mask, near.mask)
    assert man.meta["looks"] == {"every": 1}
    assert man.meta["also"] == ["person"]
    assert man.embedding is not None


def test_a_person_has_one_face_and_two_faces_stay_two() -> None:
    body = boxed("man", (10, 0, 80, 90))
    upper, lower = followed("one", Box(20, 5, 30, 15)), followed("two", Box(40, 30, 50, 40))
    for order in ((body, upper, lower), (lower, body, upper)):
        merged = merge(*order, caption="A man.")
        assert sorted((s.name, s.meta.get("also")) for s in merged.subjects) == [("man", ["one"]), ("two", None)]
    same = replace(upper, name="two")
    assert len(merge(upper, same, caption="").subjects) == 2
    assert [s.name for s in merge(body, upper, lower, caption="A man.", unnamed="remove").subjects] == ["man"]
    outside = followed("one", Box(75, 5, 95, 15))  # a quarter of it is in the body
    assert len(merge(body, outside, caption="A man.").subjects) == 2
    assert merge(outside, caption="A man.", unnamed="remove").reason == "no subject that the caption names"


def test_merging_nobody_and_one_changes_nothing() -> None:
    assert merge().subjects == ()
    man = boxed("man", (0, 0, 9, 9))
    place = CuratedSubject("park", "place")
    assert merge(man, place).subjects == (man, place)


def test_share_inside_by_hand() -> None:
    assert share_inside(Box(0, 0, 10, 10), Box(5, 0, 20, 5)) == 0.25
    assert share_inside(Box(0, 0, 10, 10), Box(10, 0, 20, 5)) == 0
    assert share_inside(Box(3, 3, 3, 9), Box(0, 0, 20, 20)) == 0


# Limits


def test_opens2vs_limits_keep_one_to_four_subjects_of_more_than_eight_percent() -> None:
    least = 96 * 160 * 0.08  # pixels
    large = [boxed(f"thing {n}", (n, 0, n + 40, least / 40 + n), "object") for n in range(5)]
    small = boxed("speck", (0, 0, 40, least / 40 - 0.1), "object")
    limits = SubjectLimits()
    outcome = one(limits([candidate([frame()], *large[:4], small)]))
    assert [s.name for s in outcome.subjects] == [s.name for s in large[:4]]
    assert outcome.meta["subject limits"] == {"removed": ["speck"]}
    many, few = one(limits([candidate([frame()], *large)])), one(limits([candidate([frame()], small)]))
    assert (many.reason, many.detail) == ("too many subjects", "5, at most 4")
    assert few.reason == "too few subjects"
    assert "'speck' 0.080" in few.detail or "'speck' 0.079" in few.detail
    largest = one(SubjectLimits(max_subjects=2, too_many="largest")([candidate([frame()], *large)]))
    assert [s.name for s in largest.subjects] == ["thing 3", "thing 4"]
    assert one(SubjectLimits(min_subjects=0)([candidate([frame()])])).subjects == ()


def test_faces_without_a_body_and_places_have_no_size() -> None:
    face, place = followed("person", Box(0, 0, 5, 5)), CuratedSubject("park", "place")
    outcome = one(SubjectLimits()([candidate([frame()], face, place)]))
    assert outcome.subjects == (face, place)
    with pytest.raises(UserError, match=r"min_area=0\.9"):
        SubjectLimits(min_area=0.9, max_area=0.1)
    with pytest.raises(UserError, match="did you mean 'largest'"):
        SubjectLimits(too_many="large")


def test_steps_are_light_and_plain_to_describe() -> None:
    steps = [ground(), MergeLabels(), SubjectLimits(), SubjectCrops(), FoundAgain(ByColour(), Coloured())]
    for step in steps:
        assert json.dumps(step.describe())
        assert type(pickle.loads(pickle.dumps(step))) is type(step)
    assert Ground().describe() == Ground(GroundingDino(), Sam()).describe()
    assert Ground().describe() != Ground(GroundingDino(threshold=0.3), Sam()).describe()

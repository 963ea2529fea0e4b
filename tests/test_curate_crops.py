"""Reference pictures of subjects: crops compared by pixels, rules by hand, other moments of a real video file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _coloured import COLOURS, ByColour, Coloured, candidate, followed, frame, one
from _tiny_grounding import noise

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped, Reference, encode_png
from idc.curate.crops import CropRules, FoundAgain, SubjectCrops, clean_mask
from idc.curate.geometry import View, plain_view
from idc.curate.grounding import mask_within
from idc.data.video import encode_video
from idc.errors import UserError


def rules(**settings: Any) -> CropRules:
    return CropRules(**{"min_side": 4, "min_pixels": 16, "margin": 0.0, **settings})


def test_crops_show_the_subject_on_white_where_it_was() -> None:
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 200, (96, 160, 3), dtype=np.uint8)
    mask = np.zeros((96, 160), np.bool_)
    mask[30:70, 20:60] = True
    mask[30:40, 20:30] = False
    subject = CuratedSubject("thing", box=Box(0, 0, 99, 99), mask=mask, frame=1)
    some = candidate([frame(), picture], subject, ranks=(4, 9))
    outcome = one(SubjectCrops(rules(margin=0.1))([some]))
    (reference,) = outcome.subjects[0].references
    shown = np.full((96, 160, 3), 255, np.uint8)
    shown[mask] = picture[mask]
    assert np.array_equal(reference.pixels(), shown[26:74, 16:64])
    assert (reference.origin, reference.ext, reference.video, reference.seconds) == ("same_frame", "png", "film", None)
    assert reference.meta == {"pixels": 1500, "edges": 0, "frame": 1, "rank": 9, "box": [16, 26, 64, 74]}
    kept = one(SubjectCrops(rules(background="keep"))([some])).subjects[0].references[0]
    assert np.array_equal(kept.pixels(), picture[30:70, 20:60])
    assert one(SubjectCrops(rules(margin=0.1))([some])).subjects[0].references[0].image == reference.image


def test_crops_say_where_they_were_in_the_source() -> None:
    view = View.fill(40, 80, 80, 80)  # twice as large, 40 columns off at each side
    mask = np.zeros((80, 80), np.bool_)
    mask[20:60, 10:40] = True
    subject = CuratedSubject("thing", mask=mask)
    cut = Candidate("k", "s", "v", "", crop=Box(100, 50, 180, 90), clip=noise(1, 80, 80, 3), subjects=(subject,),
                    meta={"cut": {"view": plain_view(view)}})  # fmt: skip
    (reference,) = one(SubjectCrops(rules())([cut])).subjects[0].references
    assert reference.meta["box"] == [125, 60, 140, 80]
    assert reference.pixels().shape == (40, 30, 3)


def square(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((96, 160), np.bool_)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "settings", "reason"),
    [
        (square(0, 0, 0, 0), {}, "empty mask"),
        (square(5, 5, 15, 8), {"min_side": 4}, "too few pixels"),
        (square(5, 5, 15, 15), {"min_pixels": 101}, "too few pixels"),
        (square(0, 5, 15, 15), {"most_edges": 0}, "cut off by the picture's edge"),
        (square(0, 5, 160, 96), {"most_edges": 2}, "cut off by the picture's edge"),
        (square(0, 5, 160, 95), {"most_edges": 2}, ""),
        (square(5, 5, 15, 15), {"min_pixels": 100, "min_side": 10, "most_edges": 0}, ""),
        (square(0, 0, 160, 96), {"most_edges": 4}, ""),
    ],
)
def test_rules_of_size_and_edge(mask: np.ndarray, settings: dict[str, Any], reason: str) -> None:
    some = candidate([frame()], CuratedSubject("thing", mask=mask))
    outcome = one(SubjectCrops(rules(**settings))([some]))
    if reason:
        assert isinstance(outcome, Dropped)
        assert (outcome.reason, outcome.detail) == ("no subject with a clean crop", f"'thing': {reason}")
    else:
        assert len(outcome.subjects[0].references) == 1


def test_who_gives_no_crop_goes_unless_there_is_something_else_of_him() -> None:
    other = Reference(encode_png(noise(4, 4, 3)))
    bare, known = CuratedSubject("bare"), CuratedSubject("known", references=(other,))
    face, whole = followed("face", Box(0, 0, 9, 9)), CuratedSubject("whole", mask=square(5, 5, 50, 50))
    some = candidate([frame()], bare, known, face, replace(whole, references=(other,)))
    outcome = one(SubjectCrops(rules())([some]))
    assert [(s.name, s.meta.get("no_crop"), len(s.references)) for s in outcome.subjects] == [
        ("known", "no mask", 1), ("face", "no mask", 0), ("whole", None, 2),
    ]  # fmt: skip
    assert outcome.subjects[2].references[0] == other
    assert outcome.meta["subject crops"] == {"removed": {"bare": "no mask"}}
    assert len(one(SubjectCrops(rules(), refused="keep")([some])).subjects) == 4
    wrong = candidate([frame()], CuratedSubject("thing", mask=np.ones((5, 5), np.bool_)))
    assert "mask of another size" in one(SubjectCrops(rules())([wrong])).detail
    assert one(SubjectCrops(rules())([candidate([frame()])])).subjects == ()
    lost = candidate([frame()], CuratedSubject("thing", mask=square(5, 5, 50, 50), frame=3))
    assert one(SubjectCrops(rules())([lost])).reason == "unreadable video"


def test_a_place_is_shown_without_those_who_are_in_it() -> None:
    picture = noise(96, 160, 3) // 2
    place, thing = CuratedSubject("park", "place"), CuratedSubject("thing", mask=square(5, 5, 50, 50), frame=1)
    outcome = one(SubjectCrops(rules())([candidate([frame(), picture], place, thing)]))
    wanted = picture.copy()
    wanted[5:50, 5:50] = 255
    assert np.array_equal(outcome.subjects[0].references[0].pixels(), wanted)
    assert outcome.subjects[0].references[0].meta["frame"] == 1


def flood(mask: np.ndarray, diagonal: bool) -> list[np.ndarray]:
    """The connected parts of a mask, by walking."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if diagonal else [])
    left, parts = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, []
    while left:
        part, todo = np.zeros_like(mask), [left.pop()]
        while todo:
            y, x = todo.pop()
            part[y, x] = True
            near = {(y + dy, x + dx) for dy, dx in steps} & left
            left -= near
            todo += near
        parts.append(part)
    return parts


@pytest.mark.parametrize("seed", range(6))
def test_cleaning_is_that_of_an_independent_walk(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask = draw.random((14, 18)) < draw.uniform(0.3, 0.8)
    speck, hole = draw.uniform(0, 0.5), draw.uniform(0, 0.1)
    parts = flood(mask, True)
    largest = max(part.sum() for part in parts)
    wanted = np.any([part for part in parts if part.sum() >= max(1, speck * largest)], axis=0)
    area = wanted.sum()
    for gap in flood(~wanted, False):
        edge = gap[0].any() or gap[-1].any() or gap[:, 0].any() or gap[:, -1].any()
        if not edge and gap.sum() <= hole * area:
            wanted = wanted | gap
    assert np.array_equal(clean_mask(mask, speck, hole), wanted)


def test_cleaning_nothing_and_everything() -> None:
    assert not clean_mask(np.zeros((4, 5), np.bool_), 0.1, 0.1).any()
    assert clean_mask(np.ones((4, 5), np.bool_), 0.1, 0.1).all()


@pytest.mark.parametrize(
    "settings", [{"background": "grey"}, {"margin": -1}, {"min_side": 0}, {"most_edges": 5}, {"speck": 2}, {"hole": -1}]
)
def test_crop_rules_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        CropRules(**settings)


# Found again


def video(tmp_path: Path, picture_at: Callable[[int], np.ndarray], frames: int = 40) -> str:
    path = tmp_path / "film.mp4"
    path.write_bytes(
        encode_video(np.stack([picture_at(t) for t in range(frames)]), 10.0, crf=4, pixel_format="yuv444p")
    )
    return str(path)


def moving(t: int) -> np.ndarray:
    """A ball that moves by 2 pixels a frame and hides from frame 30 on."""
    return frame(*([("red ball", (2 * t, 30, 2 * t + 40, 70))] if t < 30 else []))


def at(path: str, first: int, end: int, **more: Any) -> Candidate:
    """A window of ranks first to end, its subject boxed on its first frame."""
    box = Box(2.0 * first, 30, 2.0 * first + 40, 70)
    subject = CuratedSubject("red ball", "object", box, mask_within(np.ones((96, 160), np.bool_), box))
    return Candidate(
        "clip", "films", "film", path, span=(first, end), ranks=tuple(range(first, end)), fps=10.0,
        subjects=(subject,), caption="A red ball.", meta={"shots": {"span": [0, 40]}}, **more,
    )  # fmt: skip


def again(**settings: Any) -> FoundAgain:
    return FoundAgain(ByColour(), Coloured(), **{"rules": rules(), "gap": 0.5, **settings})


def test_a_subject_is_found_at_another_moment_of_the_shot(tmp_path: Path) -> None:
    path = video(tmp_path, moving)
    outcome = one(again(looks=100)([at(path, 0, 9)]))
    (reference,) = outcome.subjects[0].references
    assert reference.origin == "other_moment"
    rank = reference.meta["rank"]
    assert 13 <= rank < 30  # half a second behind the window's last frame
    assert reference.seconds == pytest.approx(rank / 10)
    left, top, right, bottom = reference.meta["box"]
    assert abs(left - 2 * rank) <= 1
    assert abs(right - 2 * rank - 40) <= 1
    assert (top, bottom) == (30, 70)
    red = (np.abs(reference.pixels().astype(int) - COLOURS["red ball"]) < 60).all(-1)
    assert red.mean() > 0.9
    behind = replace(outcome.subjects[0], references=(Reference(encode_png(frame()), origin="same_frame"),))
    first, second = one(again(looks=100)([outcome.changed(subjects=(behind,))])).subjects[0].references
    assert (first.origin, second.origin) == ("other_moment", "same_frame")
    assert first == reference


def test_who_is_not_found_again_says_why(tmp_path: Path) -> None:
    path = video(tmp_path, moving)
    hidden = one(again()([at(path, 0, 26)])).subjects[0]  # the rest of the shot is without the ball
    assert (hidden.references, hidden.meta["no_reference"]) == ((), "not found again")
    whole = at(path, 0, 40)
    assert one(again()([whole])).subjects[0].meta["no_reference"] == "no other moment"
    reference = one(again(in_clip=True, gap=1.0)([whole])).subjects[0].references[0]
    assert reference.meta["in_clip"] is True
    assert reference.meta["rank"] >= 10
    small = at(path, 0, 9)
    small = small.changed(subjects=(replace(small.subjects[0], box=Box(0, 0, 10, 10)),))
    assert one(again()([small])).subjects[0].meta["no_reference"] == "not found again"
    assert one(again(min_likeness=0.0)([small])).subjects[0].references
    nowhere = at(str(tmp_path / "gone.mp4"), 0, 9)
    assert one(again()([nowhere])).subjects[0].meta["no_reference"] == "no other moment"


def test_places_followed_people_and_those_with_another_moment_are_not_searched(tmp_path: Path) -> None:
    path = video(tmp_path, moving, 20)
    ball = at(path, 0, 9).subjects[0]
    others = (
        replace(ball, kind="place"), replace(ball, track=((0, Box(0, 0, 5, 5)),)), replace(ball, box=None),
        replace(ball, references=(Reference(b"", origin="other_moment"),)),
    )  # fmt: skip
    step = again()
    some = at(path, 0, 9).changed(subjects=others)
    assert one(step([some])) == some
    assert step.detector.asked == []  # type: ignore[attr-defined]


def test_a_reference_in_a_cropped_source_is_told_in_the_sources_pixels(tmp_path: Path) -> None:
    path = video(tmp_path, moving)
    cropped = at(path, 0, 9, crop=Box(10, 20, 160, 96))
    reference = one(again(looks=1)([cropped])).subjects[0].references[0]
    left, top, _right, bottom = reference.meta["box"]
    assert abs(left - 2 * reference.meta["rank"]) <= 1
    assert (top, bottom) == (30, 70)


@pytest.mark.parametrize("settings", [{"looks": 0}, {"gap": -1}, {"min_likeness": 2}])
def test_settings_of_found_again_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        again(**settings)

"""A batch of candidates is asked about at once: each becomes what it becomes alone, with its own boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _coloured import ByColour, Coloured, candidate, followed, frame
from _tiny_grounding import save_grounding_dino
from test_curate_crops import at, moving, rules, video

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped
from idc.curate.crops import FoundAgain
from idc.curate.finding import FindingStep
from idc.curate.grounding import Ground
from idc.errors import UserError
from idc.models.grounding import GroundingDino, Query

BALL, CAR, FACE = (20, 30, 60, 70), (80, 40, 150, 90), Box(75, 12, 95, 32)


def told(outcomes: Sequence[Sequence[Any]]) -> list[Any]:
    """Comparable, to the bit."""

    def plain(subject: CuratedSubject) -> Any:
        mask = None if subject.mask is None else subject.mask.tobytes()
        return subject.name, subject.box, subject.frame, subject.score, mask, subject.references, dict(subject.meta)

    return [
        (outcome.key, [plain(s) for s in outcome.subjects], dict(outcome.meta))
        if isinstance(outcome, Candidate)
        else outcome
        for (outcome,) in outcomes
    ]


def mixed() -> list[Candidate]:
    both = frame(("red ball", BALL), ("green car", CAR))
    body = frame(("person", (60, 10, 110, 90)), size=(120, 200))
    masked = CuratedSubject("red ball", box=Box(*map(float, BALL)), mask=np.ones((96, 160), np.bool_), frame=0)
    given = CuratedSubject("red ball", box=Box(10.5, 20.0, 50.5, 60.0), frame=1, score=0.7)
    unreadable = CuratedSubject("red ball", box=Box(0, 0, 9, 9), frame=7)
    some = [
        candidate([both], "red ball", "green car", "blue cat"),
        candidate([both]),  # nobody is looked for
        candidate([both] * 2, given, "green car"),
        candidate([both], unreadable),  # on a frame that the clip does not have
        candidate([both], "blue cat"),  # not there
        candidate([both, frame(("blue cat", (5, 5, 55, 25)))], "blue cat", "red ball"),
        candidate([body] * 2, followed("someone", FACE), caption="A dance.", ranks=(0, 1)),
        candidate([both], CuratedSubject("park", "place"), masked),
    ]
    return [c.changed(key=f"clip-{n}") for n, c in enumerate(some)]


def test_each_candidate_of_a_batch_becomes_what_it_becomes_alone() -> None:
    step = Ground(ByColour(), Coloured(), frames=2, min_subjects=1)
    some = mixed()
    whole = told(step(some))
    assert whole == [told(step([c]))[0] for c in some] == told(step(some[::-1]))[::-1]
    drops = {o.key: (o.step, o.reason) for o in whole if isinstance(o, Dropped)}
    assert drops == {
        "clip-1": ("ground", "no subject found"),
        "clip-3": ("ground", "unreadable video"),
        "clip-4": ("ground", "no subject found"),
    }
    assert [row[0] for row in whole[0][1]] == ["red ball", "green car"]
    assert step([]) == []


def test_all_boxes_of_a_batch_are_asked_for_at_once_and_then_all_masks() -> None:
    step = Ground(ByColour(), Coloured())
    step(mixed())
    assert step.detector.asked == [  # type: ignore[attr-defined]
        ["red ball", "green car", "blue cat", "green car", "blue cat", "blue cat", "red ball", "person"]
    ]
    assert step.segmenter.asked == [2 + 2 + 1 + 1]  # type: ignore[attr-defined]
    nobody = Ground(ByColour(), Coloured(), min_subjects=0)
    nobody([mixed()[1]] * 3)
    assert nobody.detector.asked == nobody.segmenter.asked == []  # type: ignore[attr-defined]


def approaching(t: int) -> np.ndarray:
    """A ball that moves to the right by 4 pixels a frame and grows, so that the last one is the surest."""
    return frame(("red ball", (4 * t, 30, 4 * t + 40, 70 + t // 4)))


def test_subjects_are_found_again_as_alone_and_each_tries_its_next_best_picture(tmp_path: Path) -> None:
    """The picture's edge cuts the ball off from frame 31 on: its surest looks are not fit."""
    near, far = tmp_path / "near", tmp_path / "far"
    near.mkdir(), far.mkdir()
    growing, other = video(near, approaching), video(far, moving)
    step = FoundAgain(ByColour(), Coloured(), rules=rules(most_edges=0), gap=0.5, looks=7, min_likeness=0.1)
    nobody = at(other, 0, 9).changed(subjects=())
    gone = at(str(tmp_path / "gone.mp4"), 0, 9)
    some = [at(growing, 0, 9), nobody, at(other, 0, 9), gone, at(growing, 4, 12), at(other, 0, 26)]
    some = [c.changed(key=f"clip-{n}") for n, c in enumerate(some)]
    whole = told(step(some))
    first = list(step.detector.asked), list(step.segmenter.asked)  # type: ignore[attr-defined]
    assert whole == [told(step([c]))[0] for c in some] == told(step(some[::-1]))[::-1]
    (_, ((*_, references, _),), _) = whole[0]
    assert 20 < references[0].meta["rank"] < 31
    assert whole[1][1] == []
    assert [row[1][0][-1].get("no_reference") for row in whole[2:]] == [
        None,
        "no other moment",
        None,
        "not found again",
    ]
    (queries,), rounds = first
    assert queries == ["red ball"] * 4 * 7
    assert rounds[0] == 3  # each one's surest look
    assert len(rounds) > 1  # those that were not fit try on
    assert sorted(rounds, reverse=True) == rounds


def test_what_has_a_label_without_a_word_is_not_found_again(tmp_path: Path) -> None:
    """And stays, with the reason: its box came with it."""
    detector = GroundingDino(save_grounding_dino(tmp_path / "dino"), threshold=0.05)
    step = FoundAgain(detector, Coloured(), rules=rules(), gap=0.5, looks=2)
    (subject,) = at(video(tmp_path, moving), 0, 9).subjects
    odd = [replace(subject, name=name) for name in ("...", ".", "!?", "\N{PARTY POPPER}")]
    ((outcome,),) = step([at(str(tmp_path / "film.mp4"), 0, 9).changed(subjects=tuple(odd))])
    assert [s.name for s in outcome.subjects] == [s.name for s in odd]
    assert {s.meta["no_reference"] for s in outcome.subjects} == {"not found again"}


def test_a_fault_of_one_is_left_to_the_worker_which_tries_each_alone() -> None:
    class Odd(ByColour):
        def detect_each(self, queries: Sequence[Query]) -> list[Any]:
            if any(query.label == "blue cat" for query in queries):
                raise RuntimeError("odd")
            return super().detect_each(queries)

    step = Ground(Odd(), Coloured())
    with pytest.raises(RuntimeError, match="odd"):
        step(mixed())
    assert len(told(step([mixed()[2]]))[0][1]) == 2


@pytest.mark.parametrize("step", [Ground, FoundAgain])
def test_the_batch_is_checked_and_described(step: type[FindingStep]) -> None:
    with pytest.raises(UserError, match="batch=0"):
        step(ByColour(), Coloured(), batch=0)
    made = step(ByColour(), Coloured(), batch=3)
    assert made.batch == made.describe()["batch"] == 3
    assert made.networks == (made.detector, made.segmenter)
    assert made.heavy

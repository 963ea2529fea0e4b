"""Who is asked what: balanced over comparisons and sides, repeats and catches where they belong, nothing lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from _study import plan
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.study.questions import Comparison, Load, questionnaire
from idc.study.store import DAY_SECONDS, STALE_SECONDS, BadRequestError, FullError, Store, UnknownRaterError


def token(number: int) -> str:
    return f"{number:032x}"


def asked(store: Store) -> Counter[Comparison]:
    """How often each comparison is answered."""
    found: Counter[Comparison] = Counter()
    for answer in store.answers():
        if answer.kind == "compare" and answer.criterion == "motion":
            found[Comparison(answer.item, *sorted((answer.left, answer.right)))] += 1
    return found


def answer_all(store: Store, rater: str, choice: str = "left") -> None:
    for question in store.session(rater)["questions"]:
        store.record(rater, question["id"], {c["key"]: choice for c in question["criteria"]})


@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(1, 6),
    systems=st.integers(2, 5),
    pairs=st.integers(1, 14),
    repeats=st.integers(0, 4),
    catches=st.integers(0, 4),
    rater=st.integers(0, 50),
)
def test_every_questionnaire_is_whole(items, systems, pairs, repeats, catches, rater) -> None:
    study = plan(items, systems, pairs, min(repeats, pairs // 2), catches)
    questions = questionnaire(study, Load(Counter(), Counter()), rater)
    assert questions == questionnaire(study, Load(Counter(), Counter()), rater)
    kinds = Counter(question.kind for question in questions)
    count = min(pairs, items * systems * (systems - 1) // 2)
    assert kinds["compare"] == count
    assert kinds["catch"] == min(catches, items)
    assert kinds["repeat"] <= study.repeats
    compared = [(q.item, *sorted((q.left, q.right))) for q in questions if q.kind == "compare"]
    assert len(set(compared)) == count
    for place, question in enumerate(questions):
        if question.kind == "repeat":
            first = questions[question.repeats]
            assert question.repeats < place
            assert first.kind == "compare"
            assert (question.left, question.right) == (first.right, first.left)
            assert (question.left_file, question.right_file) == (first.right_file, first.left_file)
        if question.kind == "catch":
            assert "" in (question.left, question.right)
        else:
            own = study.videos[question.item]
            assert (question.left_file, question.right_file) == (own[question.left], own[question.right])


def test_repeats_come_late_and_of_the_first_half() -> None:
    study = plan(items=10, pairs=12, repeats=3, catches=2)
    for rater in range(20):
        questions = questionnaire(study, Load(Counter(), Counter()), rater)
        repeats = [(n, q.repeats) for n, q in enumerate(questions) if q.kind == "repeat"]
        assert len(repeats) == 3
        assert all(first < len(questions) / 2 and place - first >= 3 for place, first in repeats)


def test_comparisons_and_sides_are_balanced_over_raters(tmp_path: Path) -> None:
    study = plan(items=5, systems=4, pairs=7)  # 30 comparisons
    store = Store(tmp_path / "answers.sqlite", study)
    lefts: Counter[tuple] = Counter()
    for rater in range(30):
        store.join(token(rater))
        answer_all(store, token(rater))
    counts = asked(store)
    assert sum(counts.values()) == 210
    assert len(counts) == 30
    assert max(counts.values()) - min(counts.values()) <= 1
    for answer in store.answers():
        if answer.kind == "compare" and answer.criterion == "motion":
            pair = tuple(sorted((answer.left, answer.right)))
            lefts[answer.item, pair] += 1 if answer.left == pair[0] else -1
    assert all(abs(balance) <= 1 for balance in lefts.values())


def test_systems_are_balanced_long_before_each_comparison_is_asked(tmp_path: Path) -> None:
    study = plan(items=40, systems=5, pairs=10, repeats=0, catches=0)  # 400 comparisons, 60 of them asked
    store = Store(tmp_path / "answers.sqlite", study)
    for rater in range(6):
        store.join(token(rater))
        answer_all(store, token(rater))
    pairs = Counter((c.a, c.b) for c in asked(store).elements())
    items = Counter(c.item for c in asked(store).elements())
    assert set(pairs.values()) == {6}
    assert max(items.values()) - min(items.values()) <= 1


def test_what_a_rater_left_open_is_asked_again_once_they_have_gone(tmp_path: Path) -> None:
    now = [1_000_000.0]
    study = plan(items=2, systems=3, pairs=3, repeats=0, catches=0)  # 6 comparisons
    store = Store(tmp_path / "answers.sqlite", study, clock=lambda: now[0])
    store.join(token(0))
    store.join(token(1))
    answer_all(store, token(1))
    now[0] += STALE_SECONDS + 1
    store.join(token(2))
    answer_all(store, token(2))
    assert sorted(asked(store).values()) == [1] * 6


def test_joining_twice_is_joining_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", plan(), max_raters=1)
    store.join(token(7))
    before = store.session(token(7))
    store.join(token(7))
    assert store.session(token(7)) == before
    assert store.counts() == (1, 0)
    with pytest.raises(FullError):
        store.join(token(8))


def test_a_later_revision_replaces_and_a_late_or_repeated_one_does_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", plan())
    store.join(token(0))
    question = store.session(token(0))["questions"][0]

    def record(choice: str, revision: int, seconds: float) -> None:
        choices = {criterion["key"]: choice for criterion in question["criteria"]}
        store.record(token(0), question["id"], choices, revision, seconds)

    record("left", 1, 5)
    record("right", 3, 7)
    record("right", 3, 9)
    record("tie", 2, 11)
    assert {(answer.choice, answer.seconds) for answer in store.answers()} == {("right", 7.0)}
    assert store.session(token(0))["answers"][question["id"]]["revision"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": token(1)}, "nobody joined"),
        ({"token": 5}, "must be a string"),
        ({"question": "0" * 16}, "not one of this rater's"),
        ({"question": "\ud800"}, "plain letters"),
        ({"question": None}, "must be a string"),
        ({"choices": {}}, "choices"),
        ({"choices": []}, "choices"),
        ({"choices": {"motion": "left"}}, "aesthetics, identity"),
        ({"choice": "middle"}, "left, right, tie, skip"),
        ({"choice": None}, "left, right, tie, skip"),
        ({"choice": ["left"]}, "left, right, tie, skip"),
        ({"revision": 0}, "revision"),
        ({"revision": True}, "revision"),
        ({"revision": 1.5}, "revision"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": DAY_SECONDS + 1}, "seconds"),
        ({"seconds": "5"}, "seconds"),
    ],
)
def test_what_breaks_a_rule_is_refused_and_nothing_is_stored(change: dict, message: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", plan())
    store.join(token(0))
    question = store.session(token(0))["questions"][0]
    choices = {criterion["key"]: "left" for criterion in question["criteria"]}
    if "choice" in change:
        choices["motion"] = change["choice"]
    post = {"token": token(0), "question": question["id"], "choices": choices, "revision": 1, "seconds": 1.0}
    with pytest.raises((BadRequestError, UnknownRaterError), match=message):
        store.record(**{**post, **{key: value for key, value in change.items() if key != "choice"}})
    assert store.answers() == []


def test_a_question_of_another_rater_cannot_be_answered(tmp_path: Path) -> None:
    store = Store(tmp_path / "answers.sqlite", plan())
    store.join(token(0))
    store.join(token(1))
    question = store.session(token(1))["questions"][0]
    with pytest.raises(BadRequestError, match="not one of this rater's"):
        store.record(token(0), question["id"], {c["key"]: "left" for c in question["criteria"]})


@pytest.mark.parametrize("bad", ["", "A" * 32, "0" * 31, "0" * 33, "../../etc/passwd", None, 3])
def test_a_key_that_no_page_draws_is_refused(bad, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="32 hexadecimal"):
        Store(tmp_path / "answers.sqlite", plan()).join(bad)

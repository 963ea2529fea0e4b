"""Strengths, agreement and shares against closed forms, published examples and an independent optimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from idc.study.agreement import caught, krippendorff_alpha, left_share, self_consistency, wilson
from idc.study.ranking import PRIOR, best_shares, bradley_terry, components, has_finite_maximum, resample
from idc.study.store import Answer

# American League 1987: Milwaukee, Detroit, Toronto, New York, Boston, Cleveland, Baltimore (Agresti, Categorical Data
# Analysis, table 10.10 in the second edition), and its fitted strengths against Baltimore.
BASEBALL = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
BASEBALL_STRENGTHS = [1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0]


def answer(rater: int = 0, position: int = 0, kind: str = "compare", choice: str = "left", **more) -> Answer:
    given = {"left": "a", "right": "b", "repeats": -1, "item": "x", "criterion": "motion", **more}
    question = f"{rater}/{position}"
    return Answer(rater=rater, question=question, position=position, kind=kind, choice=choice, seconds=1.0, **given)


def test_two_systems_have_the_log_odds_of_their_wins() -> None:
    strengths = bradley_terry(np.array([[0, 30.5], [9.5, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(30.5 / 9.5), abs=1e-9)
    assert strengths.sum() == pytest.approx(0, abs=1e-12)
    assert best_shares(strengths) == pytest.approx([30.5 / 40, 9.5 / 40])


def test_the_published_baseball_table_gives_its_published_strengths() -> None:
    strengths = bradley_terry(np.array(BASEBALL))
    assert strengths - strengths[-1] == pytest.approx(BASEBALL_STRENGTHS, abs=6e-4)


def reference(wins: np.ndarray) -> np.ndarray:
    def loss(s: np.ndarray) -> float:
        return float((wins * np.logaddexp(0, s[None, :] - s[:, None])).sum() + 0.5 * s.mean() ** 2)

    return minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-9}).x


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000))
def test_strengths_are_those_of_an_independent_optimiser(count: int, seed: int) -> None:
    random_ = np.random.default_rng(seed)
    wins = random_.integers(0, 12, (count, count)) / 2 * (1 - np.eye(count))
    wins = wins + 0.5 * (1 - np.eye(count))  # a finite maximum for certain
    assert bradley_terry(wins) == pytest.approx(reference(wins), abs=2e-5)


def test_a_sparse_and_lopsided_table_converges() -> None:
    wins = np.zeros((5, 5))
    for n in range(4):  # a chain, each link 1000 to 1
        wins[n, n + 1], wins[n + 1, n] = 1000, 1
    strengths = bradley_terry(wins)
    assert np.diff(strengths) == pytest.approx([-math.log(1000)] * 4, abs=1e-6)


def test_a_batch_of_tables_is_the_same_as_one_at_a_time() -> None:
    random_ = np.random.default_rng(3)
    tables = random_.poisson(2.0, (40, 4, 4)) * (1 - np.eye(4)) + 0.0
    assert not has_finite_maximum(tables).all()
    prior = PRIOR * (1 - np.eye(4))
    together = bradley_terry(tables, prior)
    assert together == pytest.approx(np.stack([bradley_terry(table, prior) for table in tables]), abs=1e-7)


def test_a_system_that_wins_everything_gets_half_a_win_against_it() -> None:
    strengths = bradley_terry(np.array([[0, 8], [0, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(8.5 / 0.5))


def test_systems_that_were_never_compared_have_no_common_scale() -> None:
    wins = np.array([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 3, 0]])
    assert components(wins + wins.T > 0) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="never compared"):
        bradley_terry(wins)


def test_bootstrap_intervals_cover_the_truth() -> None:
    """20 raters of 12 answers each, 150 studies: the 95% interval of a strength's difference holds the true one about
    as often as it says."""
    random_, truth, hits = np.random.default_rng(0), 0.8, 0
    weights = resample(20, 400, seed=1)
    for _ in range(150):
        won = random_.binomial(12, 1 / (1 + math.exp(-truth)), 20)
        tables = np.zeros((20, 2, 2))
        tables[:, 0, 1], tables[:, 1, 0] = won, 12 - won
        drawn = bradley_terry(np.tensordot(weights, tables, 1))
        low, high = np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
        hits += low <= truth <= high
    assert 0.88 <= hits / 150 <= 0.99


def units(*rows: str) -> list[list[str]]:
    return [[value for value in column if value != "."] for column in zip(*(row.split() for row in rows), strict=True)]


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", examples A, B and C.
@pytest.mark.parametrize(
    ("rows", "alpha"),
    [
        (("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"), 0.095),
        (("a a b b d c c c e d d a", "b a b b b c c c e d d d"), 0.692),
        (
            (
                "1 2 3 3 2 1 4 1 2 . . .",
                "1 2 3 3 2 2 4 1 2 5 . 3",
                ". 3 3 3 2 3 4 2 2 5 1 .",
                "1 2 3 3 2 4 4 1 2 5 1 .",
            ),
            0.743,
        ),
    ],
)
def test_alpha_is_that_of_the_published_examples(rows: tuple[str, ...], alpha: float) -> None:
    found = krippendorff_alpha(units(*rows))
    assert found.alpha == pytest.approx(alpha, abs=5e-4)
    assert found.interval is not None
    assert found.interval[0] < alpha < found.interval[1]


def test_alpha_of_full_agreement_is_one_and_of_random_answers_nought() -> None:
    assert krippendorff_alpha([["a"] * 3, ["b"] * 3, ["a"] * 2]).alpha == 1
    random_ = np.random.default_rng(0)
    found = krippendorff_alpha(random_.integers(0, 3, (3000, 4)).tolist(), draws=0)
    assert found.alpha == pytest.approx(0, abs=0.02)


def test_alpha_is_not_defined_without_two_raters_or_two_values() -> None:
    assert krippendorff_alpha([["a"], ["b"]]).alpha is None
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]).alpha is None
    assert krippendorff_alpha([]).units == 0


def test_wilsons_interval_is_that_of_his_formula_and_stays_within_bounds() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(5, 5)[1] == pytest.approx(1)
    assert wilson(0, 0) is None


def test_a_repeat_is_the_same_answer_when_the_same_system_is_preferred_on_the_other_side() -> None:
    first = [answer(position=n, choice=choice) for n, choice in enumerate(("left", "left", "tie", "skip", "left"))]
    swapped = {"kind": "repeat", "left": "b", "right": "a"}
    again = [
        answer(position=10 + n, choice=choice, repeats=n, **swapped)
        for n, choice in enumerate(("right", "left", "right", "left", "tie"))
    ]
    found = self_consistency([*first, *again])
    assert (found.same.hits, found.reversed.hits, found.same.count) == (1, 1, 4)


def test_no_difference_is_a_wrong_answer_to_a_catch_question() -> None:
    answers = [
        answer(1, 0, "catch", "left", right=""),
        answer(1, 1, "catch", "left", left=""),
        answer(2, 0, "catch", "tie", right=""),
        answer(3, 0, "catch", "skip", right=""),
        answer(4, 0, "compare", "left"),
    ]
    found = {rater: (share.hits, share.count) for rater, share in caught(answers).items()}
    assert found == {1: (1, 2), 2: (0, 1)}


def test_a_preference_for_the_left_is_seen() -> None:
    share = left_share([answer(0, n, choice=c) for n, c in enumerate(["left"] * 9 + ["right"] + ["tie"] * 5)])
    assert (share.hits, share.count) == (9, 10)

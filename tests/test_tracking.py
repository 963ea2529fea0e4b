"""Who is who in a video, on made-up likeness: matches against brute force, bodies by place, counts that add up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.metrics.tracking import NOBODY, STATES, Seen, Sighting, follow, look, match, track
from idc.models.faces import Face, unit

likenesses = st.integers(0, 4).flatmap(
    lambda faces: st.integers(1, 3).flatmap(
        lambda references: st.lists(
            st.lists(st.floats(-1, 1), min_size=references, max_size=references), min_size=faces, max_size=faces
        ).map(lambda rows: np.array(rows).reshape(faces, references))
    )
)


@settings(max_examples=150, deadline=None)
@given(likenesses, st.floats(-0.5, 0.9), st.floats(0, 0.5))
def test_matches_are_the_best_of_all_allowed_ones(likeness, threshold, margin):
    shows = match(likeness, threshold, margin)
    faces, references = likeness.shape

    def allowed(face: int, n: int) -> bool:
        return likeness[face, n] >= threshold and likeness[face, n] >= likeness[face].max() - margin

    def worth(choice: Sequence[int]) -> tuple[int, float]:
        pairs = [(face, n) for face, n in enumerate(choice) if n != NOBODY]
        return len(pairs), sum(likeness[pair] for pair in pairs)

    options = [
        choice
        for choice in itertools.product(range(-1, references), repeat=faces)
        if len({n for n in choice if n >= 0}) == sum(n >= 0 for n in choice)
        and all(n == NOBODY or allowed(face, n) for face, n in enumerate(choice))
    ]
    best = max(map(worth, options))
    assert tuple(shows) in options
    assert worth(shows) == (best[0], pytest.approx(best[1]))
    assert all((look(likeness, threshold) == NOBODY) == (likeness.max(1) < threshold)) if faces else True


def seen(left: float, direction: int = 0, top: float = 0) -> Seen:
    return Seen(Face(left, top, 20, 20, 0.9), unit(np.eye(3)[direction]))


def test_bodies_are_followed_by_place_and_looks_settle_what_place_leaves_open():
    walk = [[seen(3 * t), seen(200, 1)] for t in range(5)]
    assert follow(walk) == [[0, 1]] * 5
    assert follow([row if t != 2 else [] for t, row in enumerate(walk)]) == [[0, 1], [0, 1], [], [0, 1], [0, 1]]
    assert follow(walk, cuts={2}) == [[0, 1]] * 2 + [[2, 3]] * 3
    away = [[seen(0)], *[[] for _ in range(4)], [seen(0)]]
    assert follow(away) == [[0], [], [], [], [], [1]]
    assert follow([[seen(0)], [seen(0, 1)]]) == [[0], [0]]  # another face in the same place
    meeting = [[seen(0, 0), seen(8, 1)], [seen(5, 1), seen(3, 0)]]
    assert follow(meeting) == [[0, 1], [1, 0]]
    assert follow([]) == []


def sighting(frame: int, body: int, *likeness: float) -> Sighting:
    return Sighting(frame, body, np.array(likeness))


def test_an_unsure_face_is_not_given_to_a_subject_that_is_seen_elsewhere():
    rows = [sighting(0, 0, 0.9), sighting(1, 0, 0.1), sighting(2, 0, 0.9)]
    alone = track(rows, 1, 3, 0.4, 0.1)
    assert [STATES[s] for s in alone.states_NT[0]] == ["seen", "unsure", "seen"]
    assert alone.identity_N == pytest.approx([(0.9 + 0.1 + 0.9) / 3])
    both = track([*rows, sighting(1, 1, 0.8)], 1, 3, 0.4, 0.1)
    assert both.similarity_NT[0].tolist() == [0.9, 0.8, 0.9]
    assert not both.doubled_NT.any()


def test_nothing_seen_is_everything_missing():
    nothing = track([], 2, 3, 0.4, 0.1)
    assert nothing.rate("missing").tolist() == [1, 1]
    assert nothing.identity_N.tolist() == [0, 0]
    assert np.isnan(nothing.seen_similarity_N).all()
    assert nothing.confusion_NM.tolist() == [[0, 0, 0]] * 2


PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_scores_do_not_depend_on_the_order_of_sightings_or_references(data):
    count, frames = data.draw(st.integers(0, 8)), 3
    # Roots of primes: no two sums are equal, so that no two assignments are equally good.
    values = data.draw(st.permutations([prime**0.5 / 16 for prime in PRIMES]))
    places = data.draw(st.permutations(list(itertools.product(range(frames), range(3)))))
    rows = [sighting(*places[k], *values[2 * k : 2 * k + 2]) for k in range(count)]
    one = track(rows, 2, frames, 0.2, 0.1)
    mixed = track(data.draw(st.permutations(rows)), 2, frames, 0.2, 0.1)
    np.testing.assert_allclose(one.similarity_NT, mixed.similarity_NT)
    flipped = track([sighting(s.frame, s.body, *s.likeness_N[::-1]) for s in rows], 2, frames, 0.2, 0.1)
    np.testing.assert_allclose(np.sort(one.identity_N), np.sort(flipped.identity_N))
    for result in (one, flipped):
        assert ((result.identity_N >= 0) & (result.identity_N <= 1)).all()
        total = sum(result.rate(state) for state in STATES)
        np.testing.assert_allclose(total, 1)

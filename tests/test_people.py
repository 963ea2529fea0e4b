"""Following people through a video, and choosing their references."""

from __future__ import annotations

import numpy as np

from idc.curate.people import Tracker, choose_reference, head_and_shoulders
from idc.models.faces import Face


def face(x: float, y: float = 50, size: float = 20, score: float = 0.95) -> Face:
    return Face(x, y, size, size, score)


def test_people_who_pass_each_other_keep_their_tracks():
    tracker = Tracker(patience=2, size=(100, 400))
    for tick in range(21):
        tracker.look(tick, [face(10 + 8 * tick, 20), face(170 - 8 * tick, 60)])
    first, second = sorted(tracker.finish(), key=lambda track: track.sightings[0].face.top)
    assert [s.face.left for s in first.sightings] == [10 + 8 * t for t in range(21)]
    assert {s.face.top for s in second.sightings} == {60}


def test_a_track_ends_at_a_cut_a_long_gap_a_jump_and_a_change_of_size():
    changes = {
        "cut": lambda tracker: tracker.cut(),
        "gap": lambda tracker: None,
        "jump": lambda tracker: None,
        "size": lambda tracker: None,
    }
    after = {"cut": (5, face(50)), "gap": (9, face(50)), "jump": (5, face(90)), "size": (5, face(40, 40, 40))}
    for name, change in changes.items():
        tracker = Tracker(patience=2, size=(100, 400))
        for tick in range(5):
            tracker.look(tick, [face(50)])
        change(tracker)
        tick, shown = after[name]
        for k in range(4):
            tracker.look(tick + k, [shown])
        assert [len(track.sightings) for track in tracker.finish()] == [5, 4], name


def test_short_and_doubtful_tracks_are_nobody():
    tracker = Tracker(patience=2, size=(100, 400))
    tracker.look(0, [face(50), face(200, score=0.8)])
    tracker.look(1, [face(50), face(200, score=0.95)])
    tracker.look(2, [face(200, score=0.8)])
    assert tracker.finish() == []


def test_a_reference_keeps_its_distance_and_prefers_the_person_alone():
    tracker = Tracker(patience=2, size=(100, 400))
    for tick in range(40):
        tracker.look(tick, [face(50), *([face(80)] if tick < 20 else [])])
    track = max(tracker.finish(), key=lambda track: len(track.sightings))
    for seed in map(str, range(20)):
        chosen = choose_reference(track, 5, 13, 4, seed)
        assert chosen is not None
        assert chosen.tick >= 20
        chosen = choose_reference(track, 22, 30, 4, seed)
        assert chosen is not None
        assert chosen.tick >= 34
        assert choose_reference(track, 3, 37, 4, seed) is None
    assert len({choose_reference(track, 0, 8, 4, str(seed)) for seed in range(20)}) > 3


def test_crops_are_squares_around_the_face_within_the_picture():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(40, 400, 2).tolist()
        size = float(rng.uniform(5, height))
        shown = Face(float(rng.uniform(0, width - 5)), float(rng.uniform(0, height - 5)), size * 0.8, size, 0.9)
        left, top, right, bottom = head_and_shoulders(shown, height, width)
        assert right - left == bottom - top > 0
        assert left >= 0
        assert top >= 0
        assert right <= width
        assert bottom <= height
        assert right - left <= 2.2 * size + 1

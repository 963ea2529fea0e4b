"""Cross-video pairs: somebody is paired with himself in another video and never with anybody else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from _collection import Held, survivor, unit
from _people import FACES, largest, photos, retaken
from _tiny_embedders import save_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.curate.candidate import Candidate, CuratedSubject, Reference
from idc.curate.collection import Adopt
from idc.curate.decisions import decide
from idc.curate.faces import embedder_name
from idc.curate.names import NameVectors, words_of_name
from idc.curate.pairs import CrossVideoPairs, face_thresholds
from idc.errors import UserError
from idc.models.embedders import CLIPEmbedder

DIM = 512
PICTURE = (Reference(b"picture"),)


def of_angle(*degrees: float) -> np.ndarray:
    """Vectors in a plane: their cosine is that of the difference of their angles."""
    return np.array([[np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))] for d in degrees], np.float32)


def thing(vector: np.ndarray, name: str = "cup", **more: object) -> CuratedSubject:
    return CuratedSubject(name, **{"embedding": vector, "embedder": "clip", "references": PICTURE, **more})


def clip(number: int, *subjects: CuratedSubject, video: str | None = None, **more: object) -> Candidate:
    made = survivor(number, video=f"v{number}" if video is None else video, clip=b"x", subjects=subjects, **more)
    return made.changed(key=f"k{number}")


def pairs(clips: Iterable[Candidate], **settings: object) -> list[Adopt]:
    return list(CrossVideoPairs(**settings).decide(Held(list(clips))))


def who(adopts: Iterable[Adopt]) -> dict[str, str]:
    return {adopt.key: adopt.other for adopt in adopts}


def crowd(people: int, clips: int, seed: int) -> tuple[list[Candidate], dict[tuple[str, int], int]]:
    """Clips of one to three of some people, two a video, and who is who. Looks of one person have cosine 0.8."""
    draw = np.random.default_rng(seed)
    faces = [unit(draw.normal(size=DIM)) for _ in range(people)]
    made, names = [], {}
    for number in range(clips):
        shown = draw.choice(people, size=draw.integers(1, 4), replace=False)
        subjects = []
        for place, person in enumerate(shown):
            look = unit(faces[person] + 0.5 * unit(draw.normal(size=DIM)))
            pictures = PICTURE if draw.random() < 0.7 else ()
            subjects.append(thing(look, f"person {place}", kind="person", embedder="sface (y, s)", references=pictures))
            names[f"k{number}", place] = int(person)
        split = {"split": "held_out" if number // 2 % 4 == 0 else "train"}
        made.append(clip(number, *subjects, video=f"v{number // 2}", meta=split))
    return made, names


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_everybody_is_paired_with_himself_alone_in_another_video_of_his_side(seed: int, mutual: bool) -> None:
    clips, names = crowd(12, 30, seed)
    known = {candidate.key: candidate for candidate in clips}
    found = pairs(clips, mutual=mutual, block=7)
    for adopt in found:
        taker, giver = known[adopt.key], known[adopt.other]
        assert names[adopt.key, adopt.subject] == names[adopt.other, adopt.other_subject]
        assert taker.video != giver.video
        assert taker.meta["split"] == giver.meta["split"]
        cosine = float(taker.subjects[adopt.subject].embedding @ giver.subjects[adopt.other_subject].embedding)
        assert adopt.similarity == pytest.approx(cosine, abs=1e-5)
        assert giver.subjects[adopt.other_subject].references
    assert len({(adopt.key, adopt.subject) for adopt in found}) == len(found)
    paired = {(adopt.key, adopt.subject) for adopt in found}
    for (key, place), person in names.items():  # nobody who is seen elsewhere is forgotten
        own = known[key]
        elsewhere = any(
            names[other.key, n] == person and other.video != own.video and other.meta == own.meta and s.references
            for other in clips
            for n, s in enumerate(other.subjects)
        )
        assert mutual or elsewhere == ((key, place) in paired)


def test_blocks_and_order_change_nothing() -> None:
    clips, _ = crowd(9, 40, 1)
    found = pairs(clips)
    assert found == pairs(clips, block=3) == pairs(clips, block=41)
    assert sorted(map(str, found)) == sorted(map(str, pairs(clips[::-1])))
    assert len(found) > 20


@pytest.mark.parametrize("mutual", [False, True])
def test_of_equally_similar_ones_the_first_is_taken_whatever_the_blocks(mutual: bool) -> None:
    """One picture in many videos, and others that differ from it by less than float32 can tell."""
    draw = np.random.default_rng(2)
    taker, noise = unit(draw.normal(size=DIM)), unit(draw.normal(size=DIM))
    partner = unit(taker + 0.7 * noise)
    nearly = [unit(partner + 1e-7 * draw.normal(size=DIM)) for _ in range(12)]
    vectors = [taker, *nearly, *[partner] * 12, *nearly[::-1]]
    clips = [clip(n, thing(vector)) for n, vector in enumerate(vectors)]
    exact = [float(np.asarray(v, np.float64) @ np.asarray(taker, np.float64)) for v in vectors[1:]]
    best = max(exact)
    expected = f"k{1 + exact.index(best)}"
    found = [pairs(clips, block=block, mutual=mutual) for block in (1, 2, 3, 5, 7, 64, 4096)]
    assert all(some == found[0] for some in found)
    assert who(found[0]).get("k0", expected) == expected
    assert mutual or "k0" in who(found[0])
    copies = [clip(n, thing(vector)) for n, vector in enumerate([taker, *[partner] * 12])]
    assert {who(pairs(copies, block=block))["k0"] for block in (1, 2, 3, 5, 7, 64)} == {"k1"}


def test_real_faces_find_their_own_in_other_videos() -> None:
    """Every photo once more, mirrored, relit and compressed: by SFace's own threshold nobody is taken for another."""
    looks = []
    for number, (_name, photo) in enumerate(photos().items()):
        for way, picture in enumerate((photo, retaken(photo, 2))):
            face = thing(FACES.embed(picture, largest(picture)), kind="person", embedder=embedder_name(FACES))
            looks.append(clip(2 * number + way, face))
    found = who(pairs(looks))
    assert found == {f"k{n}": f"k{n ^ 1}" for n in range(len(looks))}
    assert face_thresholds()["sface"] == FACES.threshold


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ((0, 5), {}),  # 0.9962: a near-duplicate teaches to copy
        ((0, 12), {"k0": "k1", "k1": "k0"}),  # 0.978
        ((0, 11.47), {}),  # 0.98003
        ((0, 11.49), {"k0": "k1", "k1": "k0"}),  # 0.97996
        ((0, 53), {"k0": "k1", "k1": "k0"}),  # 0.602
        ((0, 54), {}),  # 0.588: another
        ((0, 5, 30), {"k0": "k2", "k1": "k2", "k2": "k1"}),  # the duplicate is passed over for the next one
        ((0, 40, 60), {"k0": "k1", "k1": "k2", "k2": "k1"}),
    ],
)
def test_the_cosine_has_to_lie_within_its_bounds(degrees, expected) -> None:
    assert who(pairs(clip(n, thing(vector)) for n, vector in enumerate(of_angle(*degrees)))) == expected


def test_only_each_others_best_where_that_is_asked_for() -> None:
    clips = [clip(n, thing(vector)) for n, vector in enumerate(of_angle(0, 40, 60))]
    assert who(pairs(clips, mutual=True)) == {"k1": "k2", "k2": "k1"}
    clips[2] = clip(2, thing(of_angle(60)[0], references=()))  # the best one has no picture: none, not the second
    assert who(pairs(clips, mutual=True)) == {"k2": "k1"}


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "clothing"},
        {"embedder": "another clip"},
        {"embedder": ""},
        {"name": "blue bottle"},
        {"references": ()},
        {"references": (Reference(b"x", origin="generated:flux"), Reference(b"x", origin="augmented"))},
    ],
)
def test_what_must_agree(other) -> None:
    first, second = of_angle(0, 30)
    assert "k0" not in who(pairs([clip(0, thing(first)), clip(1, thing(second, **other))]))
    assert "k0" in who(pairs([clip(0, thing(first)), clip(1, thing(second))]))


def test_a_picture_of_the_subject_itself_is_taken_not_a_made_one() -> None:
    first, second = of_angle(0, 30)
    made = (Reference(b"x", origin="generated:flux"), Reference(b"y", origin="other_video"), Reference(b"z"))
    (found,) = pairs([clip(0, thing(first, references=())), clip(1, thing(second, references=made))])[:1]
    assert (found.key, found.other, found.reference) == ("k0", "k1", 2)


def test_people_need_no_names_in_common_and_things_do() -> None:
    first, second = of_angle(0, 30)
    for kind, expected in (("person", 2), ("object", 0)):
        clips = [clip(0, thing(first, "a chef", kind=kind)), clip(1, thing(second, "the waiter", kind=kind))]
        assert len(pairs(clips)) == expected


def test_two_people_of_one_clip_are_not_the_same_third() -> None:
    clips = [clip(0, thing(of_angle(0)[0]), thing(of_angle(20)[0])), clip(1, thing(of_angle(32)[0]))]
    assert [(a.key, a.subject) for a in pairs(clips)] == [("k0", 1), ("k1", 0)]


def test_never_within_one_video_nor_across_the_split() -> None:
    vectors = of_angle(0, 20, 40)
    same = [clip(n, thing(vector), video="one") for n, vector in enumerate(vectors)]
    assert pairs(same) == []
    clips = Held([clip(n, thing(vector)) for n, vector in enumerate(of_angle(*range(0, 60, 15)))])
    decisions = decide(clips, [CrossVideoPairs()], 0.5)
    sides = {candidate.key: candidate.video in decisions.held_out for candidate in clips}
    adopts = [adopt for some in decisions.adopted.values() for adopt in some]
    assert len(adopts) == 4
    assert decisions.crossed == 0
    assert all(sides[adopt.key] == sides[adopt.other] for adopt in adopts)


@pytest.mark.parametrize("clips", [[], [clip(0)], [clip(0, thing(of_angle(0)[0]))], [clip(0, CuratedSubject("cup"))]])
def test_too_few_to_pair(clips) -> None:
    assert pairs(clips) == []


def test_broken_embeddings_are_like_nothing() -> None:
    bad = np.array([np.nan, 1], np.float32), np.zeros(2, np.float32)
    clips = [clip(n, thing(vector)) for n, vector in enumerate([*bad, *of_angle(0, 30)])]
    assert who(pairs(clips)) == {"k2": "k3", "k3": "k2"}


def test_two_networks_of_one_name_are_found_out() -> None:
    with pytest.raises(UserError, match="two networks have one name"):
        pairs([clip(0, thing(of_angle(0)[0])), clip(1, thing(np.ones(3, np.float32)))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 0.99}, "must be below near_duplicate"),
        ({"low": -2}, "low=-2"),
        ({"block": 0}, "block=0"),
        ({"text_similarity": 6}, "text_similarity=6"),
        ({"named": ["objct"]}, "named: 'objct'.*did you mean 'object'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message) -> None:
    with pytest.raises(UserError, match=message):
        CrossVideoPairs(**wrong)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_alike_by_the_words_that_say_something() -> None:
    assert words_of_name("The red cup on the left") == {"red", "cup"}
    assert words_of_name("the left") == {"the", "left"}
    names = ["a red cup", "Red Cup", "cup", "dog", ""]
    alike = NameVectors(names, np.arange(5)).between(np.arange(5), np.arange(5))
    expected = np.eye(5)
    expected[0, 1] = expected[1, 0] = 1
    expected[:2, 2] = expected[2, :2] = 0.5**0.5
    expected[4, 4] = 0
    assert np.allclose(alike, expected, atol=1e-6)


def test_a_text_embedder_takes_the_place_of_words(tmp_path: Path) -> None:
    first, second = of_angle(0, 30)
    clips = [clip(0, thing(first, "a chef")), clip(1, thing(second, "the waiter"))]
    embedder = CLIPEmbedder(str(save_clip(tmp_path)))
    a, b = embedder.embed_texts(["a chef", "the waiter"])
    cosine = float(a @ b)
    assert len(pairs(clips, text=embedder, text_similarity=cosine - 0.01)) == 2
    assert len(pairs(clips, text=embedder, text_similarity=cosine + 0.01)) == 0


# --- pairs that come with the data ------------------------------------------------------------------------------------


def record(number: int, *others: tuple[str, float], names: tuple[str, ...] = ("man",), **more: object) -> Candidate:
    """A candidate of a record that knows pairs of its first subject."""
    known = [
        {
            "own": {"class_name": names[0], "class_id": 1},
            "other": {"id": other, "class_name": names[0], "class_id": 1},
            "image_similarity": similarity,
            "text_similarity": 1.0,
        }
        for other, similarity in others
    ]
    subjects = tuple(
        CuratedSubject(name, references=PICTURE, meta={"opens2v": {"class_name": name, "number": n}})
        for n, name in enumerate(names, 1)
    )
    more = {"meta": {"opens2v": {"id": f"r{number}", "pairs": known}, **more.pop("meta", {})}, **more}
    return clip(number, *subjects, **more)


def test_pairs_of_the_data_are_taken_with_the_cap_on_near_duplicates() -> None:
    clips = [
        record(0, ("r1", 0.998), ("r2", 0.7), ("r3", 0.8)),
        record(1),
        record(2),
        record(3),
        record(4, ("r9", 0.7)),
    ]
    (found,) = pairs(clips)
    assert (found.key, found.other, found.similarity) == ("k0", "k3", 0.8)
    assert pairs(clips, given=False) == []
    assert who(pairs([record(0, ("r1", 0.7)), record(1, video="v0")])) == {"k0": "k1"}  # parts of one source video
    assert who(pairs([record(0, ("r0", 0.7)), record(1)])) == {}
    crossing = [record(0, ("r1", 0.7), meta={"split": "train"}), record(1, meta={"split": "held_out"})]
    assert pairs(crossing) == []


def test_a_pair_names_its_subjects_by_class_and_number() -> None:
    clips = [record(0, ("r1", 0.7), names=("dog", "man")), record(1, names=("man", "dog", "dog"))]
    (found,) = pairs(clips)
    assert (found.subject, found.other_subject) == (0, 1)
    assert pairs([record(0, ("r1", 0.7), names=("dog",)), record(1, names=("man",))]) == []


def test_a_given_pair_comes_before_one_that_is_found() -> None:
    first, second = of_angle(0, 20)
    clips = [record(0, ("r1", 0.7)), record(1), clip(2, thing(second, "man"))]
    own = clips[0].subjects[0]
    clips[0] = clips[0].changed(subjects=(thing(first, "man", meta=own.meta),))
    assert who(pairs(clips))["k0"] == "k1"
    assert who(pairs(clips, given=False))["k0"] == "k2"


@pytest.mark.parametrize(
    "known",
    [
        {"id": "r0", "pairs": "none"},
        {"id": "r0", "pairs": [None, 3, {}, {"image_similarity": "0.7"}, {"image_similarity": float("nan")}]},
        {"id": "r0", "pairs": [{"image_similarity": 0.7, "own": {}, "other": {}}]},
        {"pairs": [{"image_similarity": 0.7, "own": {"class_name": "man"}, "other": {"id": "r1"}}]},
    ],
)
def test_malformed_pairs_are_left_out(known) -> None:
    clips = [record(0), record(1)]
    assert pairs([clips[0].changed(meta={"opens2v": known}), clips[1]]) == []

"""FaceSim with real weights: the same person is above any other, and the benchmark's rules hold one by one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from _people import FACES, crop, cyclist, driver, largest, photos, retaken
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.errors import UserError
from idc.metrics.base import Clip, Reference
from idc.metrics.facesim import (
    CATEGORIES,
    FaceSim,
    face_embedding,
    find_faces,
    first_person,
    largest_face,
    mean_similarity,
)
from idc.models.faces import DetectedFace, Embedding, Face, FaceBackend, Picture, unit
from idc.report.layout import metric_title
from idc.stages.scoring import Scorer

BLANK = np.full((48, 64, 3), 90, np.uint8)


def clip(frames: np.ndarray, *references: Reference, category: str = "") -> Clip:
    return Clip("a", frames, references=references, category=category)


@pytest.fixture(scope="module")
def people() -> dict[str, list[np.ndarray]]:
    """The named set: pictures of ten people, of two of them at different moments of a clip."""
    named = {name: [photo, *(retaken(photo, way) for way in (1, 2, 3))] for name, photo in photos().items()}
    ride = cyclist()
    return {**named, "driver": [driver(t) for t in (0, 35, 60, 90, 114)], "cyclist": [ride[t] for t in (1, 5, 9, 12)]}


def test_the_same_person_is_above_any_other_without_overlap(people):
    embeddings = {name: [face_embedding(picture, FACES) for picture in group] for name, group in people.items()}
    assert len(embeddings) == 10
    same = [float(a @ b) for group in embeddings.values() for a, b in itertools.combinations(group, 2)]
    other = [
        float(a @ b)
        for first, second in itertools.combinations(embeddings.values(), 2)
        for a, b in itertools.product(first, second)
    ]
    assert (len(same), len(other)) == (64, 756)
    assert min(same) > max(other) + 0.05, (min(same), max(other))
    assert np.mean(same) > 0.7
    assert np.mean(other) < 0.15


def test_clips_score_by_who_is_in_them(people):
    metric = FaceSim(FACES)
    names = ("driver", "cyclist", "dan")
    scores = {}
    for shown, asked in itertools.product(names, names):
        reference = Reference(people[asked][0], asked, "human")
        scores[shown, asked] = metric.score(clip(np.stack(people[shown][2:]), reference)).value
    same = [scores[name, name] for name in names]
    other = [value for (shown, asked), value in scores.items() if shown != asked]
    assert min(same) > 0.6
    assert max(other) < 0.3


def test_a_second_figure_has_a_name_of_its_own_and_stands_in_the_same_run(tmp_path):
    both = FaceSim(FACES), FaceSim(FACES, variant="arc")
    assert [metric.name for metric in both] == ["facesim", "facesim_arc"]
    assert [metric.clone().name for metric in both] == ["facesim", "facesim_arc"]
    assert set(Scorer(both, tmp_path).configs) == {"facesim", "facesim_arc"}
    assert metric_title("facesim_arc") == "FaceSim (arc)"
    assert metric_title("facesim") == "FaceSim"
    with pytest.raises(UserError, match=r"variant='Arc 2': must be lower-case letters"):
        FaceSim(FACES, variant="Arc 2")


class Scripted(FaceBackend):
    """A backend in a world of flat pictures: the first pixel's red value names the person, green the size of the face,
    and 255 in blue that it is seen only with padding around the picture."""

    models = ("scripted",)
    threshold = 0.5
    people: Mapping[int, Embedding] = {}

    def __init__(self, name: str, crops_padding: bool = True) -> None:
        self.name, self.crops_padding = name, crops_padding  # type: ignore[misc]
        self.embedded: list[tuple[tuple[int, ...], float]] = []

    def detect(self, picture_HWC: Picture) -> list[DetectedFace]:
        pixels = picture_HWC.reshape(-1, 3)
        padded = tuple(pixels[0]) == (128, 128, 128)
        row, column = (side // 6 if padded else 0 for side in picture_HWC.shape[:2])
        person, size, hidden = picture_HWC[row, column].tolist()
        if person == 0 or (hidden == 255 and not padded):
            return []
        return [DetectedFace(Face(column, row, size, size, 0.9), np.full((5, 2), float(column)))]

    def embed(self, picture_HWC: Picture, face: DetectedFace) -> Embedding:
        self.embedded.append((picture_HWC.shape, float(face.landmarks[0, 0])))
        column, row = int(face.box.left), int(face.box.top)
        return self.people[int(picture_HWC[row, column, 0])]

    def load(self, device: torch.device | str = "cpu") -> None:
        pass

    def unload(self) -> None:
        pass


def scripted(name: str = "cur", **kwargs: bool) -> Scripted:
    backend = Scripted(name, **kwargs)
    backend.people = {cosine: unit(np.array([c, np.sqrt(1 - c * c)])) for cosine, c in ((1, 1.0), (2, 0.6), (3, -0.4))}
    return backend


def flat(person: int, size: int = 10, hidden: bool = False) -> np.ndarray:
    return np.full((40, 40, 3), (person, size, 255 if hidden else 0), np.uint8)


def score(persons: list[int], name: str = "cur") -> float | None:
    frames = np.stack([flat(person) for person in persons])
    return FaceSim(scripted(name)).score(clip(frames, Reference(flat(1), "man", "face"))).value


def test_frames_without_a_face_are_skipped_and_a_video_without_any_scores_zero():
    assert score([1] * 16 + [0] * 16) == pytest.approx(1)
    assert score([1] * 16 + [2] * 16) == pytest.approx(0.8)
    assert score([0] * 32) == 0


def test_frames_unlike_the_reference_count_zero_except_under_cur_which_skips_them():
    assert score([1] * 16 + [3] * 16, "arc") == pytest.approx(0.5)
    assert score([1] * 16 + [3] * 16, "cur") == pytest.approx(1)
    assert score([3] * 32, "arc") == score([3] * 32, "cur") == 0


def test_thirty_two_frames_are_looked_at_by_the_benchmarks_rule():
    persons = [2] * 100
    for index in np.linspace(0, 99, 32, dtype=int):
        persons[index] = 1
    assert score(persons) == pytest.approx(1)
    # Three frames stand for 32: 16, 15 and the last one once.
    assert score([1, 2, 1], "arc") == pytest.approx((16 + 15 * 0.6 + 1) / 32)


@pytest.mark.parametrize("crops_padding", [True, False])
def test_a_face_that_fills_its_picture_is_found_with_padding(crops_padding):
    backend = scripted(crops_padding=crops_padding)
    picture, faces = find_faces(flat(2, hidden=True), backend) or pytest.fail("no face")
    assert picture.shape == ((60, 60, 3) if crops_padding else (40, 40, 3))  # a quarter of 40 on each side
    assert faces[0].box.left == faces[0].landmarks[0, 0] == (10 if crops_padding else 0)
    assert find_faces(flat(0), backend) is None


def test_padding_finds_a_real_face_that_is_cut_tight():
    for name in ("astronaut", "bea", "cem"):
        photo = photos()[name]
        tight = crop(photo, largest(photo), margin=-0.1)
        assert FACES.detect(tight) == []
        picture, face = largest_face(tight, FACES) or pytest.fail("no face")
        assert float(FACES.embed(picture, face) @ FACES.embed(photo, largest(photo))) > 0.6


def test_the_largest_face_counts():
    ann, bea = photos()["ann"], photos()["bea"]
    canvas = np.full((400, 800, 3), 120, np.uint8)
    canvas[: ann.shape[0], : ann.shape[1]] = ann
    small = bea[::2, ::2]
    canvas[: small.shape[0], 500 : 500 + small.shape[1]] = small
    assert len(FACES.detect(canvas)) == 2
    metric = FaceSim(FACES)
    values = [metric.score(clip(canvas[None], Reference(who, "who", "face"))).value for who in (ann, bea)]
    assert values[0] > 0.5 > 0.3 > values[1]


def test_the_reference_is_the_first_that_shows_a_person():
    kinds = [("object", "dog"), ("human", "man"), ("face", "boy")]
    references = [Reference(BLANK, name, kind) for kind, name in kinds]
    assert first_person(references) == 1
    assert first_person(references[:1]) is None
    result = FaceSim(FACES).score(clip(BLANK[None], *references))
    assert (result.value, result.reason) == (None, "no face is found in the reference picture of man")
    result = FaceSim(FACES).score(clip(BLANK[None], *references[:1]))
    assert (result.value, result.reason) == (None, "no reference is of the kind face or human")


def test_only_items_with_one_person_are_scored():
    metric = FaceSim(FACES)
    scored = ["singlehuman", "singleface", "faceobj", "humanobj"]
    assert sorted(CATEGORIES) == sorted(scored)
    for category in scored:
        assert metric.applies(clip(BLANK[None], category=category))
    # Without a category, what the references are of decides, as in identity tracking.
    assert metric.applies(clip(BLANK[None], Reference(BLANK, "dog", "object"), Reference(BLANK, "man", "human")))
    assert not metric.applies(clip(BLANK[None], Reference(BLANK, "dog", "object")))
    for category in ("multiface", "multihuman", "singleobj", "multiobject"):
        assert not metric.applies(clip(BLANK[None], category=category))


def test_details_keep_the_cosine_of_each_frame():
    frames = np.stack([driver(0), np.zeros_like(driver(0)), driver(60)])
    result = FaceSim(FACES).score(clip(frames, Reference(driver(0), "driver", "human")))
    cosines = result.details["similarity"]
    assert len(cosines) == 32
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines[20] is None
    assert 0.5 < cosines[-1] < 0.9
    assert (result.details["embedding"], result.details["reference"]) == ("sface", 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-1, 1.0000002))))
def test_means_stay_within_their_bounds_and_ignore_the_order(cosines):
    value = mean_similarity(cosines)
    assert 0 <= value <= 1
    assert mean_similarity(cosines[::-1]) == value
    assert value <= mean_similarity(cosines, skip_unlike=True) <= 1

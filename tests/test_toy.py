"""The toy world: everything follows from a seed, references differ from the clip, and shards keep all of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from idc.data import toy_render
from idc.data.index import build_index
from idc.data.shards import read_sample
from idc.data.toy import ToySpec, ToyWorld, render_clip, render_references
from idc.data.toy_shards import write_toy_shards
from idc.errors import UserError

WORLD = ToyWorld()


def test_a_clip_follows_from_its_seed_alone():
    first, again = WORLD.spec(7), ToyWorld().spec(7)
    assert first == again
    np.testing.assert_array_equal(render_clip(first), render_clip(again))
    assert len({WORLD.spec(seed).caption for seed in range(30)}) > 25


def test_a_spec_survives_json():
    for seed in range(40):
        spec = WORLD.spec(seed)
        again = ToySpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        np.testing.assert_array_equal(render_clip(again), render_clip(spec))


def test_subjects_of_a_clip_differ_in_colour_and_stay_inside_and_apart():
    for seed in range(200):
        spec = WORLD.spec(seed)
        assert len({subject.colour for subject in spec.subjects}) == len(spec.subjects)
        centres = spec.centres()
        for index in range(len(spec.subjects)):
            margin = 0.9 * spec.radius_px(index)
            assert (centres[index] >= margin).all()
            assert (centres[index] <= 64 - margin).all()
            for other in range(index):
                gaps = np.hypot(*(centres[index] - centres[other]).T)
                assert gaps.min() >= 1.9 * spec.radius_px(index)


def test_subjects_that_meet_touch_at_the_end_and_not_before():
    met = 0
    for seed in range(100):
        spec = WORLD.spec(seed)
        for index, subject in enumerate(spec.subjects):
            if subject.action == "meets":
                gaps = np.hypot(*(spec.centres()[index] - spec.centres()[subject.target]).T)
                assert gaps[-1] == pytest.approx(2.04 * spec.radius_px(index), rel=0.01)
                assert gaps[0] > gaps[-1] + 5
                met += 1
    assert met > 20


def test_an_orbit_turns_clockwise_at_constant_distance():
    spec = next(s for s in map(WORLD.spec, range(500)) if any(x.action == "orbits" for x in s.subjects))
    index = next(i for i, subject in enumerate(spec.subjects) if subject.action == "orbits")
    offset = spec.centres()[index] - spec.centres()[spec.subjects[index].target]
    np.testing.assert_allclose(np.hypot(*offset.T), np.hypot(*offset[0]), rtol=1e-4)
    assert np.diff(np.unwrap(np.arctan2(offset[:, 1], offset[:, 0]))).sum() == pytest.approx(np.pi / 2, rel=1e-3)


def test_the_odds_of_one_two_and_three_subjects_hold():
    counts = np.bincount([len(WORLD.spec(seed).subjects) for seed in range(1000)], minlength=4)[1:]
    np.testing.assert_allclose(counts / 1000, WORLD.subjects, atol=0.05)
    assert {len(ToyWorld(subjects=(0, 1)).spec(seed).subjects) for seed in range(20)} == {2}


@pytest.mark.parametrize("named", [1.0, 0.5, 0.0])
def test_a_caption_names_every_subject_the_action_and_the_background(named):
    world = ToyWorld(named=named)
    for seed in range(50):
        spec = world.spec(seed)
        looks = [subject.name for subject in spec.subjects]
        assert [spec.name(k) for k in range(len(looks))] == (looks if spec.named else ["object"] * len(looks))
        assert all(spec.name(k) in spec.caption for k in range(len(looks)))
        assert spec.background_colour in spec.caption
        moving = [subject for subject in spec.subjects if subject.action in ("moves", "meets", "bounces")]
        assert all(subject.direction in spec.caption for subject in moving)


def test_a_caption_that_does_not_name_its_subjects_tells_nothing_of_their_looks():
    looks = {*toy_render.COLOURS, *toy_render.SHAPES, *toy_render.TEXTURES}
    for seed in range(200):
        subjects = ToyWorld(named=0.0).spec(seed).caption.split(", on a ")[0]
        assert not looks & set(subjects.replace(",", "").split())


def test_naming_changes_no_pixel_and_half_of_the_captions():
    named, unnamed = ToyWorld(named=1.0), ToyWorld(named=0.0)
    for seed in range(10):
        np.testing.assert_array_equal(render_clip(named.spec(seed)), render_clip(unnamed.spec(seed)))
    assert abs(np.mean([WORLD.spec(seed).named for seed in range(1000)]) - 0.5) < 0.05
    with pytest.raises(UserError, match=r"named=1\.5.*between 0"):
        ToyWorld(named=1.5)


def test_references_show_another_angle_and_background_than_the_clip():
    for seed in range(50):
        spec = WORLD.spec(seed)
        for look, picture in zip(spec.references, render_references(spec), strict=True):
            assert picture.shape == (32, 32, 3)
            assert abs(look.angle) >= 0.25  # in the clip a subject stands upright
            assert look.colour != spec.background_colour
            corner = np.array(toy_render.BACKGROUND_COLOURS[look.colour])
            np.testing.assert_allclose(picture[0, 0], corner, atol=1)


def test_uncurated_references_are_crops_of_the_clip():
    spec = replace(WORLD.spec(3), curated=False)
    frame = render_clip(spec)[spec.frames // 2]
    for index, picture in enumerate(render_references(spec)):
        x, y = spec.centres()[index, spec.frames // 2].astype(int)
        np.testing.assert_allclose(
            picture[15:17, 15:17].mean((0, 1)), frame[y - 1 : y + 1, x - 1 : x + 1].mean((0, 1)), atol=40
        )
        wide = ToyWorld(curated=False).spec(3)
        assert wide == spec


def test_held_out_combinations_never_appear_among_the_seen():
    def looks(world: ToyWorld) -> set[tuple[str, str, str]]:
        return {(s.shape, s.texture, s.colour) for seed in range(300) for s in world.spec(seed).subjects}

    seen, held_out = looks(ToyWorld(combinations="seen")), looks(ToyWorld(combinations="held_out"))
    assert not seen & held_out
    assert len(seen) == 60
    assert len(held_out) == 12
    # every shape, texture and colour by itself is seen
    assert all({look[part] for look in seen} == {look[part] for look in seen | held_out} for part in range(3))


def test_edges_are_anti_aliased_and_areas_are_those_of_the_shapes():
    offset = np.full((1, 2), 32, np.float32)
    for shape, area in {"circle": np.pi * 0.96**2, "square": 1.68**2, "triangle": 3 * 3**0.5 * 0.62**2}.items():
        cover, _ = toy_render.sprite(shape, "plain", 64, offset, radius=20.0)
        assert cover.sum() == pytest.approx(area * 400, rel=0.02)
        assert ((cover > 0.05) & (cover < 0.95)).any()


def test_larger_frames_show_the_same_layout():
    small, large = WORLD.spec(5), ToyWorld(height=128, width=128).spec(5)
    np.testing.assert_allclose(large.centres(), 2 * small.centres(), rtol=1e-5)
    assert render_clip(ToyWorld(frames=5, height=48, width=80).spec(5)).shape == (5, 48, 80, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 8}, ["frames=8", "4n + 1", "5 and 9"]),
        ({"width": 60}, ["width=60", "multiple of 16", "64"]),
        ({"reference_size": 20}, ["reference_size=20", "16"]),
        ({"combinations": "heldout"}, ["heldout", "held_out"]),
        ({"subjects": (0.0, 0.0)}, ["subjects=(0.0, 0.0)", "probabilities"]),
        ({"subjects": (0.2, 0.2, 0.2, 0.4)}, ["1 to 3"]),
    ],
)
def test_bad_settings_are_refused_with_the_nearest_valid_choice(settings, words):
    with pytest.raises(UserError) as error:
        ToyWorld(**settings)
    assert all(word in str(error.value) for word in words)


def test_shards_keep_pixels_references_and_ground_truth(tmp_path):
    counted = []
    names = write_toy_shards(tmp_path, 5, seed=40, samples_per_shard=3, progress=counted.append)
    assert len(names) == 2
    assert counted == [1, 2, 3, 4, 5]
    index = build_index(tmp_path, source="toy")
    samples = [read_sample(tmp_path, entry) for entry in index.entries]
    assert sorted(sample.meta["toy"]["seed"] for sample in samples) == [40, 41, 42, 43, 44]
    for sample in samples:
        truth = WORLD.sample(sample.meta["toy"]["seed"])
        assert ToySpec.from_json(sample.meta["toy"]) == WORLD.spec(truth.meta["toy"]["seed"])
        assert (sample.caption, sample.fps) == (truth.caption, truth.fps)
        assert [s.name for s in sample.subjects] == [s.name for s in truth.subjects]
        for mine, theirs in zip(sample.subjects, truth.subjects, strict=True):
            np.testing.assert_array_equal(mine.image_CHW, theirs.image_CHW)
        error = (sample.video_CTHW - truth.video_CTHW).square().mean()
        assert 10 * np.log10(4 / error) > 38  # dB


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path):
    runs = []
    for workers in (0, 2):
        root = tmp_path / str(workers)
        write_toy_shards(root, 4, world=ToyWorld(frames=5, height=32, width=32), workers=workers)
        runs.append([read_sample(root, entry) for entry in build_index(root, source="toy").entries])
    for one, two in zip(*runs, strict=True):
        assert (one.id, one.caption, one.meta) == (two.id, two.caption, two.meta)
        assert one.video_CTHW.equal(two.video_CTHW)


def test_no_clips_and_negative_seeds_are_refused(tmp_path):
    with pytest.raises(UserError, match="count=0"):
        write_toy_shards(tmp_path, 0)
    with pytest.raises(UserError, match="seed=-1"):
        write_toy_shards(tmp_path, 1, seed=-1)

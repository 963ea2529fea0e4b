"""Shards of a collection: what is read back is what was found out, whatever interrupts the writing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _collection import Held, many, mp4, subject, survivor, tree, unit, write, write_and_die
from _server import join, launch
from _shards import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.curate.candidate import Dropped, Reference
from idc.curate.collection import Adopt, CollectionStep
from idc.curate.decisions import Decisions, decide
from idc.curate.parts import Outcomes, write_part
from idc.curate.provenance import category_of, public
from idc.curate.sources import rle
from idc.curate.split import held_out_videos
from idc.curate.survivors import Parts
from idc.curate.writing import ShardWriting, write_collection
from idc.data import storage
from idc.data.index import ShardIndex
from idc.data.reader import ReadSettings, read_for_bucket
from idc.data.shards import read_members
from idc.data.sources import ShardSource
from idc.data.video import decode_video
from idc.errors import UserError

HUGE = ReadSettings(random_window=False)


def samples(out: Path, part: str = "train") -> dict[str, tuple[object, object]]:
    """Key -> (entry, sample) as training reads them."""
    index = ShardSource(str(out / part)).index()
    return {e.key: (e, read_for_bucket(index.root, e, e.bucket, 0, HUGE)) for e in index.entries}


def pictures(out: Path, key: str, part: str = "train") -> list[bytes]:
    """The bytes of a sample's references in order."""
    index = ShardIndex.load(out / part)
    files = read_members(index.root, next(e for e in index.entries if e.key == key))
    return [files[name] for name in sorted(files) if name.startswith("ref")]


def test_training_reads_back_captions_frames_and_references_in_order(tmp_path: Path) -> None:
    collected = many()
    written = write(tmp_path, collected)
    held_out = samples(tmp_path, "held_out")
    found = samples(tmp_path) | held_out
    assert set(found) == {candidate.key for candidate in collected.whole}
    assert written.samples == {"train": 9, "held_out": 3}
    for number, candidate in enumerate(collected.whole):
        entry, sample = found[candidate.key]
        assert sample.caption == f"number {number}, café"
        assert (entry.bucket.frames, entry.fps, sample.fps) == (5, 8.0, 8.0)
        assert np.array_equal(sample.video_CTHW.permute(0, 2, 3, 1).numpy(), decode_video(mp4(number)))
        assert [s.name for s in sample.subjects] == ["woman", "red hat"][: 1 + number % 2]
        for read, (red, green, _) in zip(sample.subjects, [(-1, 0, -1), (1, -1, -1)], strict=False):
            assert torch.allclose(
                read.image_CHW[:2].mean((1, 2)), torch.tensor([red, green], dtype=torch.float), atol=0.01
            )
        part = "held_out" if candidate.key in held_out else "train"
        assert pictures(tmp_path, candidate.key, part) == [s.references[0].image for s in candidate.subjects]


def test_a_sample_says_where_it_comes_from_and_what_was_found_out_about_it(tmp_path: Path) -> None:
    collected = many()
    write(tmp_path, collected, held_out=0)
    candidate = collected.whole[5]
    meta = samples(tmp_path)[candidate.key][1].meta
    assert (meta["source"], meta["licence"], meta["video"]) == ("films", "CC0-1.0", "films/1.mp4")
    assert (meta["span"], meta["crop"], meta["ranks"], meta["fps"]) == ([45, 54], [0, 2, 60, 40], [0, 2, 4, 6, 8], 8.0)
    assert (meta["scores"], meta["safety"]) == ({"aesthetic": 5 / 3}, {"nsfw": False})
    assert meta["models"] == {"caption": "Qwen2.5-VL", "faces": "sface"}
    assert meta["windows"] == {"seconds": [5, 6]}
    assert (meta["category"], meta["kinds"]) == ("humanobj", {"woman": "human", "red hat": "object"})
    woman, hat = meta["subjects"]
    assert (woman["kind"], woman["box"], woman["frame"], woman["reference"]) == ("person", [1, 2, 9, 12], 2, 0)
    assert np.array_equal(rle.decode(woman["mask"]), candidate.subjects[0].mask)
    assert (hat["mask"], hat["score"], hat["reference"], hat["meta"]) == (None, 0.5, 1, {"phrase": 3})
    assert woman["references"] == [
        {
            "origin": "other_moment",
            "video": "film",
            "seconds": 1.5,
            "similarity": None,
            "model": "",
            "ext": "png",
            "meta": {},
        }
    ]
    assert meta["path"] == "films/1.mp4"
    assert not any(b"/home" in content or b"somebody" in content for content in tree(tmp_path).values())


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/data/me/a b/c.mp4", "c.mp4"),
        ("s3://key:secret@bucket/a/c.mp4?X-Signature=1#t", "s3://bucket/a/c.mp4"),
        ("films/c.mp4", "films/c.mp4"),
        ("a caption / of two halves", "a caption / of two halves"),
        (["C:\\films\\c.mp4"], ["C:\\films\\c.mp4"]),
    ],
)
def test_what_is_published_names_no_folder_and_no_secret(path: object, told: object) -> None:
    assert public(path) == told


@pytest.mark.parametrize(
    ("kinds", "category"),
    [
        ([], ""),
        (["object"], "singleobj"),
        (["object", "background"], "multiobject"),
        (["human"], "singlehuman"),
        (["face", "background"], "faceobj"),
        (["human", "face"], "multihuman"),
        (["human", "human", "object"], "multihuman"),
    ],
)
def test_the_category_is_the_benchmarks_item_type(kinds: list[str], category: str) -> None:
    assert category_of(kinds) == category


def test_two_runs_are_equal_to_the_byte_wherever_and_whenever(tmp_path: Path) -> None:
    write(tmp_path / "a", many(), recipe={"sources": [{"path": "/first/films"}]})
    write(tmp_path / "b" / "c", many(), recipe={"sources": [{"path": "/second/films"}]})
    for path in (tmp_path / "b").rglob("*.tar"):
        os.utime(path, (1, 1))
    again = tree(tmp_path / "b" / "c")
    assert tree(tmp_path / "a") == again
    assert {"train/index.jsonl", "held_out/index.jsonl", "manifest.json", "drops.jsonl", "counts.json"} <= set(again)
    assert len(ShardIndex.load(tmp_path / "b" / "c" / "train")) == 9  # copies with other times are no stale index


def test_the_manifest_names_every_shard_with_its_hash(tmp_path: Path) -> None:
    write(tmp_path, many(), recipe={"steps": [{"class": "Cut"}]})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == {"train": 9, "held_out": 3}
    assert manifest["models"] == {"caption": ["Qwen2.5-VL"], "faces": ["sface"]}
    assert manifest["recipe"] == {"steps": [{"class": "Cut"}]}
    assert sum(shard["samples"] for shard in manifest["shards"]) == 12
    shards = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.tar")}
    assert {shard["shard"] for shard in manifest["shards"]} == shards
    for shard in manifest["shards"]:
        data = (tmp_path / shard["shard"]).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    for part in ("train", "held_out"):
        assert manifest["indexes"][part] == ShardIndex.load(tmp_path / part).hash


def test_killed_again_and_again_it_writes_what_an_undisturbed_run_writes(tmp_path: Path) -> None:
    write(tmp_path / "undisturbed", many())
    draw = random.Random(0)
    broken = tmp_path / "broken"
    write(broken, many(7), samples_per_shard=3)  # another plan was there before
    calls = [(str(broken), draw.randint(1, 14), draw.random() < 0.5) for _ in range(10)]
    kills = 0
    for call in calls:
        (code,) = join(launch(write_and_die, [call]))
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        for path in broken.rglob("*.tar"):  # never a half shard under a shard's name
            assert path.stat().st_size % 10240 == 0
        manifest = broken / "manifest.json"
        for shard in json.loads(manifest.read_text())["shards"] if manifest.exists() else ():  # nor a false manifest
            assert hashlib.sha256((broken / shard["shard"]).read_bytes()).hexdigest() == shard["sha256"]
    assert kills >= 5
    written = write(broken, many())
    assert written.kept > 0
    assert tree(broken) == tree(tmp_path / "undisturbed")


def test_whole_shards_are_kept_and_a_changed_plan_writes_anew(tmp_path: Path) -> None:
    first = write(tmp_path, many())
    assert (first.shards, first.kept) == (7, 0)
    inodes = {path: path.stat().st_ino for path in tmp_path.rglob("*.tar")}
    assert write(tmp_path, many()).kept == 7
    assert inodes == {path: path.stat().st_ino for path in tmp_path.rglob("*.tar")}
    assert write(tmp_path, many(), recipe={"steps": ["another"]}).kept == 0
    fewer = write(tmp_path, many(), recipe={"steps": ["another"]}, samples_per_shard=100)
    assert (fewer.shards, len(list(tmp_path.rglob("*.tar")))) == (2, 2)
    write(tmp_path / "new", many(), recipe={"steps": ["another"]}, samples_per_shard=100)
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("new/")} == tree(tmp_path / "new")


@pytest.mark.parametrize("damage", ["cut short", "gone", "note broken", "note gone"])
def test_a_shard_that_is_not_as_noted_is_written_again(tmp_path: Path, damage: str) -> None:
    write(tmp_path, many())
    before = tree(tmp_path)
    shard = sorted((tmp_path / "train").glob("*.tar"))[1]
    note = tmp_path / "work" / "written" / f"train-{shard.name}.json"
    {
        "cut short": lambda: os.truncate(shard, 700),
        "gone": shard.unlink,
        "note broken": lambda: note.write_text('{"plan"'),
        "note gone": note.unlink,
    }[damage]()
    assert write(tmp_path, many()).kept == 6
    assert tree(tmp_path) == before


def test_shards_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine-000000.tar").write_bytes(b"dear to somebody")
    with pytest.raises(UserError, match=r"holds other shards \(mine-000000.tar\)"):
        write(tmp_path, many())


def test_nothing_to_write_gives_an_empty_collection(tmp_path: Path) -> None:
    written = write(tmp_path, Held([]))
    assert (written.read, written.shards, written.samples) == (0, 0, {"train": 0, "held_out": 0})
    assert json.loads((tmp_path / "counts.json").read_text())["read"] == 0
    assert not list(tmp_path.rglob("*.tar"))


def test_the_parts_of_the_steps_are_what_is_written(tmp_path: Path) -> None:
    """Through the files of the engine; a URL does as well as a folder."""
    whole = many().whole
    for number, some in enumerate((whole[:5], whole[5:])):
        with storage.open_atomic(str(tmp_path / f"part-{number}.tar")) as stream:
            write_part(stream, Outcomes([("films", str(number))], candidates=some))
    parts = Parts(str(tmp_path), ["part-0.tar", "part-1.tar"])
    write(tmp_path / "direct", many())
    write(tmp_path / "parts", parts)
    assert tree(tmp_path / "parts") == tree(tmp_path / "direct")
    url = "memory://collection"
    wanted = ShardWriting(samples_per_shard=2, held_out=0.25)
    for kept in (0, 7):
        decisions = decide(parts, [], 0.25)
        written = write_collection(parts, decisions, url, f"{url}/work", wanted, {"steps": []})
        assert written.kept == kept
    for name, content in tree(tmp_path / "direct").items():
        with storage.open_read(f"{url}/{name}") as stream:
            assert stream.read() == content, name


# --- who goes where ---------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abcdef/.", min_size=1, max_size=6), st.integers(1, 30), min_size=2, max_size=30),
    st.floats(0.01, 0.9),
    st.randoms(use_true_random=False),
)
def test_no_video_is_on_both_sides_and_the_share_is_met_as_whole_videos_allow(sizes, share, draw) -> None:
    clips = [survivor(0, video=video, clip=b"x") for video, size in sizes.items() for _ in range(size)]
    chosen = held_out_videos(clips, share)
    held_out = [clip for clip in clips if clip.video in chosen]
    assert 0 < len(held_out) < len(clips)
    assert abs(len(held_out) - share * len(clips)) <= max(sizes.values())
    draw.shuffle(clips)
    assert held_out_videos(clips, share) == chosen


def test_one_video_alone_and_a_share_of_zero_hold_nothing_out() -> None:
    one = [survivor(n, video="only", clip=b"x") for n in range(9)]
    assert held_out_videos(one, 0.9) == held_out_videos([], 0.5) == frozenset()
    assert held_out_videos([survivor(0, clip=b"x"), survivor(7, clip=b"x")], 0) == frozenset()


def test_windows_of_a_video_that_two_sources_have_stay_together(tmp_path: Path) -> None:
    clips = Held([survivor(n, video=f"v{n % 4}", source=("films", "others")[n // 4]) for n in range(8)])
    write(tmp_path, clips, held_out=0.3)
    parts = {part: {s.meta["video"] for _, s in samples(tmp_path, part).values()} for part in ("train", "held_out")}
    assert not parts["train"] & parts["held_out"]


# --- references -------------------------------------------------------------------------------------------------------


def adopted(key: int, other: int, collected: Held, **more: object) -> Adopt:
    return Adopt(
        **{
            "key": collected.whole[key].key,
            "subject": 0,
            "other": collected.whole[other].key,
            "other_subject": 0,
            "reference": 0,
            "similarity": 0.8,
            "model": "sface",
            **more,
        }
    )


class Say(CollectionStep):
    """Decides what it is told."""

    def __init__(self, *decisions: object) -> None:
        self.decisions = decisions

    def decide(self, survivors):
        return list(self.decisions)


def colours(count: int = 4) -> Held:
    """One clip a video, each with a reference of its own colour."""
    names = ("red", "green", "blue", "white", "black", "yellow")
    return Held([survivor(n, video=f"v{n}", subjects=(subject("man", names[n]),)) for n in range(count)])


@pytest.mark.parametrize("first", [True, False])
def test_an_adopted_reference_is_the_others_picture_and_says_so(tmp_path: Path, first: bool) -> None:
    collected = colours()
    write(tmp_path, collected, decide(collected, [Say(adopted(0, 2, collected, first=first))]), held_out=0)
    key = collected.whole[0].key
    assert pictures(tmp_path, key) == [picture("blue" if first else "red")]
    meta = samples(tmp_path)[key][1].meta
    if first:
        told, own = meta["subjects"][0]["references"]
        assert (told["origin"], told["video"], told["similarity"], told["model"]) == (
            "other_video",
            "film",
            0.8,
            "sface",
        )
        assert told["meta"]["taken_from"] == {
            "key": collected.whole[2].key,
            "source": "films",
            "origin": "other_moment",
        }
        assert own["origin"] == "other_moment"


@pytest.mark.parametrize(
    ("origin", "colour"), [("generated:diffusers", "red"), ("augmented", "red"), ("given", "blue")]
)
def test_a_made_reference_that_was_put_first_stays_it(tmp_path: Path, origin: str, colour: str) -> None:
    collected = colours()
    man = collected.whole[0].subjects[0]
    made = replace(man, references=tuple(replace(reference, origin=origin) for reference in man.references))
    collected.whole[0] = collected.whole[0].changed(subjects=(made,))
    write(tmp_path, collected, decide(collected, [Say(adopted(0, 2, collected, first=True))]), held_out=0)
    assert pictures(tmp_path, collected.whole[0].key) == [picture(colour)]


def test_a_subject_without_a_picture_takes_one_over(tmp_path: Path) -> None:
    collected = colours()
    collected.whole[1] = survivor(1, video="v1", subjects=(subject("man", None),))
    decisions = decide(collected, [Say(adopted(1, 3, collected, first=False))])
    assert write(tmp_path, collected, decisions, held_out=0).samples["train"] == 4
    assert pictures(tmp_path, collected.whole[1].key) == [picture("white")]


def test_no_reference_comes_from_the_other_side_or_from_what_was_dropped(tmp_path: Path) -> None:
    collected = colours(6)
    pairs = [adopted(a, b, collected) for a in range(6) for b in range(6) if a != b]
    gone = collected.whole[3].dropped("exclude", "excluded caption")
    decisions = decide(collected, [Say(*pairs), Say(gone)], 0.4)
    videos = {candidate.key: candidate.video for candidate in collected.whole}
    sides = {key: video in decisions.held_out for key, video in videos.items()}
    kept = [adopt for some in decisions.adopted.values() for adopt in some]
    assert kept
    assert decisions.crossed > 0
    assert all(sides[adopt.key] == sides[adopt.other] for adopt in kept)
    assert gone.key not in {name for adopt in kept for name in (adopt.key, adopt.other)}


def test_a_picture_that_a_source_took_from_the_other_side_is_not_used(tmp_path: Path) -> None:
    """As shards of an earlier collection, with another split, may have them."""

    def clip(number: int, other: int):
        images = (f"v{other}", "red"), ("elsewhere", "blue"), (f"v{number}", "white")
        references = tuple(Reference(picture(colour), origin="other_video", video=video) for video, colour in images)
        return survivor(number, video=f"v{number}", subjects=(subject("man", None, references=references),))

    collected = Held([clip(n, (n + 1) % 6) for n in range(6)])
    decisions = decide(collected, [], 0.3)
    write(tmp_path, collected, decisions)
    used = []
    for n, candidate in enumerate(collected.whole):
        sides = [f"v{k}" in decisions.held_out for k in (n, (n + 1) % 6)]
        expected = "red" if sides[0] == sides[1] else "blue"
        part = "held_out" if sides[0] else "train"
        assert pictures(tmp_path, candidate.key, part) == [picture(expected)]
        used.append(expected)
    assert set(used) == {"red", "blue"}


def test_a_drop_of_what_was_not_shown_is_refused() -> None:
    collected = colours()
    gone = collected.whole[0].dropped("one", "a reason")
    with pytest.raises(UserError, match=r"say: drops 1 candidate that it was not shown"):
        decide(collected, [Say(gone), Say(gone)])


@pytest.mark.parametrize(
    ("rule", "references", "reason"),
    [
        ({}, [2, 1, 0, 0], {"no subject with a reference": 1, "no subjects": 1}),
        ({"without_reference": "drop"}, [2, 0, 0, 0], {"subject without a reference": 2, "no subjects": 1}),
        ({"keep_without_subjects": True}, [2, 1, 0, 0], {}),
        ({"max_subjects": 1}, [1, 1, 0, 0], {"no subject with a reference": 1, "no subjects": 1}),
    ],
)
def test_subjects_without_a_picture_go_by_the_rule(tmp_path: Path, rule, references, reason) -> None:
    def clip(number: int, *subjects):
        return survivor(number, video=f"v{number}", subjects=subjects)

    collected = Held(
        [
            clip(0, subject("man"), subject("dog", "blue", kind="object")),
            clip(1, subject("man", None), subject("dog", "blue", kind="object")),
            clip(2, subject("man", None)),
            clip(3),
        ]
    )
    written = write(tmp_path, collected, held_out=0, **rule)
    assert written.dropped == ({"write": reason} if reason else {})
    found = samples(tmp_path)
    for candidate, count in zip(collected.whole, references, strict=True):
        if candidate.key in found:
            entry, sample = found[candidate.key]
            assert (entry.bucket.subjects, len(sample.subjects)) == (count, count)
            assert [s["name"] for s in sample.meta["subjects"]] == [s.name for s in candidate.subjects]
    assert written.read == 4 == sum(written.samples.values()) + sum(reason.values())


def test_read_is_kept_and_dropped_by_step_and_reason(tmp_path: Path) -> None:
    collected = many()
    before = [Dropped("films", f"bad{n}", "", "source", "unreadable video", "é") for n in range(3)]
    drop = collected.whole[4].dropped("duplicates", "near duplicate", "of another")
    decisions = decide(collected, [Say(drop)], 0.25)
    wanted = ShardWriting(samples_per_shard=5)
    written = write_collection(collected, decisions, str(tmp_path), str(tmp_path / "work"), wanted, {}, iter(before))
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {
        "read": 15,
        "kept": 11,
        "train": written.samples["train"],
        "held_out": written.samples["held_out"],
        "dropped": {"source": {"unreadable video": 3}, "duplicates": {"near duplicate": 1}},
    }
    lines = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == ["bad0", "bad1", "bad2", "films/1.mp4"]
    assert lines[-1] == vars(drop)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"max_subjects": 0}, "max_subjects=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"without_reference": "leave"}, "did you mean 'leave_out'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message) -> None:
    with pytest.raises(UserError, match=message):
        ShardWriting(**wrong)


def test_embeddings_stay_out_of_the_shards(tmp_path: Path) -> None:
    known = subject("man", embedding=unit(np.arange(1, 129)), embedder="sface")
    write(tmp_path, Held([survivor(0, subjects=(known,))]), Decisions())
    told = next(iter(samples(tmp_path).values()))[1].meta["subjects"][0]
    assert told["embedder"] == "sface"
    assert "embedding" not in told

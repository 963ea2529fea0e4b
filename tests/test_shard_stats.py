"""What `idc shards stats` counts and draws: known answers on a collection written by hand."""

from __future__ import annotations

import json
import random
import statistics as python_statistics
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from _collection import many, write
from _curated import EVIL, write_collection, write_samples
from _shards import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.cli import main
from idc.curate.drawing import bins
from idc.curate.figures import figure_counts, figure_s9, figure_s10, write_figures
from idc.curate.looking import Collection, SeenDrop, describe
from idc.curate.scenarios import content_words, head_noun, scenario
from idc.curate.sources import rle
from idc.curate.statistics import Statistics, count, manifest_roles
from idc.curate.tallies import Spread, Tally
from idc.curate.wordcloud import ASCENT, place_words
from idc.data.buckets import BucketRule
from idc.data.index import ShardIndex, build_index
from idc.errors import UserError


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collection")
    write_collection(folder)
    return folder


@pytest.fixture(scope="module")
def counted(out) -> Statistics:
    return count(Collection([str(out)]), BucketRule([[9, 48, 64], [17, 48, 64]]), batch_size=2)


def test_table_s8_counts_clips_subjects_and_pictures_by_source(counted):
    rows = [(row["source"], row["content"], row["quantity"], row["published"]) for row in counted.table_s8()]
    assert rows == [
        ("OpenS2V-5M", "General Videos", 2, 218_230),
        ("OpenS2V-5M", "Masked Subjects", 3, 535_259),
        ("OpenS2V-5M", "Generated Subjects", 1, 3_098),
        ("films", "High-Fidelity Videos", 2, 9_374),  # the manifest names a folder of videos
        ("films", "Augmented Subjects", 1, None),
        ("pictures", "Total Static Images", 1, 14_976),
        ("pictures", "- Human-centric Images", 1, 2_877),
    ]


def test_every_count_of_a_collection_written_by_hand(counted):
    told = json.loads(json.dumps(counted.to_json()))
    assert (told["read"], told["kept"], told["dropped"]) == (8, 5, 3)
    assert told["splits"]["train"] == {"samples": 4, "hours": pytest.approx(4.375 / 3600), "videos": 4}
    assert told["splits"]["held_out"]["samples"] == 1
    assert told["shared_videos"] == {"held_out and train": 0}
    assert told["subjects"] == {"0": 1, "1": 3, "2": 1}  # that have a picture
    assert told["origins"] == dict.fromkeys(("augmented", "generated:flux", "given", "other_moment", "other_video"), 1)
    assert told["kinds"] == {"person": 3, "clothing": 1, "object": 1, "place": 1}
    assert told["scenarios"]["Nature"] == {"beach": 1, "dog": 1}
    assert told["scenarios"]["Objects"] == {"coat": 1}
    assert told["categories"] == {"not said": 3, "singlehuman": 2}
    assert told["licences"] == {"CC-BY-4.0": 2, "CC0-1.0": 2, "not said": 1}
    assert told["models"] == {"caption": {"Qwen2.5-VL-7B": 1}}
    motion = told["scores"]["motion"]
    assert (motion["count"], motion["min"], motion["p50"], motion["max"]) == (3, 0.25, 0.5, 1.0)
    assert motion["mean"] == pytest.approx(1.75 / 3)
    assert told["seconds"]["all"]["count"] == 4  # the still has none
    assert told["seconds"]["source films"]["mean"] == 2.125
    assert told["caption_words"]["max"] == 9
    assert told["words"]["dog"] == 2
    assert told["drops"][0] == {"step": "motion filter", "reason": "too still", "count": 2, "sources": {"films": 2}}


def test_buckets_say_what_training_would_keep_and_why_it_drops_the_rest(counted, out):
    rows = counted.to_json()["buckets"]
    train = [row for row in rows if row["folder"].endswith("train")]
    assert {tuple(row["bucket"]): row["samples"] for row in train if "bucket" in row} == {
        (9, 48, 64, 1): 1,
        (9, 48, 64, 2): 1,
        (17, 48, 64, 1): 1,
    }
    (dropped,) = [row for row in train if "dropped" in row]
    assert dropped["samples"] == 1
    assert "fewer than the shortest bucket's 9" in dropped["dropped"]
    indexed = sum(len(ShardIndex.load(out / part)) for part in ("train", "held_out"))
    assert sum(row["samples"] for row in rows) == indexed


def test_a_collection_is_found_from_its_folder_or_its_parts_and_counts_once(out):
    train, held_out = str(out / "train"), str(out / "held_out")
    for roots in ([str(out)], [train, held_out], [held_out, str(out), train], [str(out), str(out) + "/"]):
        found = count(Collection(roots))
        assert (found.samples, found.dropped) == (5, 3)
    part = Collection([train])
    assert (len(part), [seen.split for seen in part]) == (4, ["train"] * 4)


def test_a_collection_behind_a_url_counts_as_one_on_the_disk(out, counted):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(out), "/looked-at", recursive=True)
    found = count(Collection(["memory://looked-at"])).to_json()
    wanted = counted.to_json()
    for name in ("table_s8", "scores", "words", "drops", "splits", "origins", "counts"):
        assert found[name] == wanted[name]


def test_what_curation_writes_is_read_as_it_was_found_out(tmp_path):
    collected = many()
    write(tmp_path, collected)
    by_key = {candidate.key: candidate for candidate in collected.whole}
    collection = Collection([str(tmp_path)])
    seen = {sample.entry.key: sample for sample in collection}
    assert seen.keys() == by_key.keys()
    for key, candidate in by_key.items():
        sample = seen[key]
        assert (sample.source, sample.video, sample.licence) == (candidate.source, candidate.video, candidate.licence)
        assert (sample.scores, sample.models) == (candidate.scores, candidate.models)
        for told, subject in zip(sample.subjects, candidate.subjects, strict=True):
            assert (told.name, told.kind, told.frame) == (subject.name, subject.kind, subject.frame)
            assert told.box == (None if subject.box is None else tuple(subject.box))
            assert (told.mask is None) == (subject.mask is None)
            assert told.mask is None or np.array_equal(rle.decode(told.mask), subject.mask)
            assert [(r.origin, r.seconds, r.ext[:3]) for r in told.references] == [("other_moment", 1.5, "ref")]
    found = count(collection)
    assert found.shared_videos() == {("held_out", "train"): 0}
    assert found.to_json()["splits"]["train"]["samples"] == 9
    assert found.told[0]["kept"] == 12


def test_shards_without_provenance_count_by_their_folder(tmp_path):
    write_shards(tmp_path / "toys", 7)
    build_index(tmp_path / "toys").save()
    (tmp_path / "toys" / "drops.jsonl").write_text('{"video": "x.mp4", "seconds": 2.5, "reason": "too short"}\n{"cut')
    collection = Collection([str(tmp_path / "toys")])
    found = count(collection)
    assert [(row["source"], row["content"], row["quantity"]) for row in found.table_s8()] == [
        ("toys", "Videos", 7),
        ("toys", "Subjects of unsaid origin", 6),
    ]
    (drop,) = collection.drops()
    assert (drop.source, drop.reason, drop.detail) == ("toys", "too short", "from 2.5 s on")
    assert found.to_json()["buckets"] is None


def test_a_sample_whose_json_is_strange_is_counted_all_the_same(tmp_path):
    strange = {
        "subjects": [7, {"name": 3, "box": [1, 2, "x", 4], "mask": "?", "reference": "0", "references": {"a": 1}}],
        "scores": {"a": "high", "b": True, "c": None, "d": 2},
        "models": ["x"],
        "category": 5,
    }
    write_samples(tmp_path, [{"key": "a", "caption": "x", "subjects": []}])
    collection = Collection([str(tmp_path)])
    (seen,) = collection
    described = describe(collection.folders[0], seen.entry, "x", {"fps": "fast", "references": 3, "meta": strange})
    statistics = Statistics()
    statistics.add(described)
    assert described.scores == {"d": 2.0}
    assert [(subject.name, subject.box, subject.mask) for subject in described.subjects] == [("", None, None)]
    assert statistics.to_json()["categories"] == {"not said": 1}


def test_videos_that_two_splits_share_are_told(tmp_path, capsys):
    for part in ("train", "held_out"):
        write_samples(tmp_path / part, [{"key": part, "caption": "x", "subjects": [], "video": "the same"}])
    assert main(["shards", "stats", str(tmp_path)]) == 0
    assert "LEAK  held_out and train have 1 source video in common" in capsys.readouterr().out


def test_the_command_prints_tables_writes_figures_and_gives_json(out, tmp_path, capsys):
    assert main(["shards", "stats", str(out), "--out", str(tmp_path / "figures"), "--role", "pictures=other"]) == 0
    printed = capsys.readouterr().out
    assert "218,230" in printed
    assert "read 8 = kept 5 + dropped 3" in printed
    assert "counts.json says" not in printed
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "stats.json",
        "figure_s9.svg",
        "figure_s10.svg",
        "figure_counts.svg",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {init_args: {buckets: [[9, 48, 64]], batch_size: 2}}")
    assert main(["shards", "stats", str(out), "--json", "--buckets", str(recipe)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(row["samples"] for row in told["buckets"] if "bucket" in row) == 4
    bare = "steps: [{class_path: idc.curate.checks.DecodeCheck}, {class_path: idc.curate.windows.Cut, init_args: %s}]"
    for text in (
        "common: {buckets: [[9, 48, 64]]}",
        "common: {buckets: [[9, 48, 64]]}\n" + bare % "{buckets: '${common.buckets}'}",
        "common: {buckets: [[5, 16, 16]]}\n" + bare % "{buckets: [[9, 48, 64]]}",
    ):
        recipe.write_text(text)
        assert main(["shards", "stats", str(out), "--json", "--buckets", str(recipe)]) == 0
        assert json.loads(capsys.readouterr().out)["buckets"] == told["buckets"]
    assert main(["shards", "stats", str(out / "train")]) == 0
    assert "counts.json says: read 8 = kept 5 + dropped 3; not all of it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{out}/nowhere"], "no shards here"),
        (["{out}", "--role", "films=best"], "SOURCE=ROLE"),
        (["{out}", "--role", "flims=general"], "did you mean 'films'"),
        (["{out}", "--buckets", "{out}/manifest.json"], "data.init_args.buckets"),
        (["{out}", "--buckets", "{out}/no.yaml"], "no such file"),
        (["{out}/train/curated-000000.tar"], "a single shard"),
    ],
)
def test_bad_input_is_answered_in_one_line(out, capsys, arguments, says):
    assert main(["shards", "stats", *(argument.format(out=out) for argument in arguments)]) == 2
    assert says in capsys.readouterr().err


def test_a_damaged_or_stale_index_stops_the_count(tmp_path):
    write_samples(tmp_path, [{"key": key, "caption": "x", "subjects": []} for key in "abc"])
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"damaged.*idc shards index"):
        count(Collection([str(tmp_path)]))
    index.write_text("".join(lines[:-1]) + "{\n")
    with pytest.raises(UserError, match="damaged"):
        list(Collection([str(tmp_path)]))
    index.write_text("".join(lines))
    (tmp_path / "curated-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="out of date"):
        Collection([str(tmp_path)])


def test_streaming_an_index_gives_what_loading_it_does(out):
    index, samples, entries = ShardIndex.stream(out / "train")
    loaded = ShardIndex.load(out / "train")
    assert list(entries) == loaded.entries
    assert (samples, index.hash, index.shards) == (len(loaded), loaded.hash, loaded.shards)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 9])
def test_some_samples_come_evenly_from_all_folders(out, limit):
    keys = [seen.entry.key for seen in Collection([str(out)]).some(limit)]
    assert keys == {
        0: list("abcde"), 1: ["a"], 2: ["a", "c"], 3: ["a", "b", "d"], 4: ["a", "b", "c", "d"],
    }.get(limit, list("abcde"))  # fmt: skip


# Counting -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-999, 9999), min_size=1, max_size=60))
def test_quantiles_of_numbers_of_four_digits_are_exact(numbers):
    spread = Spread()
    for number in numbers:
        spread.add(number)
    ordered = sorted(numbers)
    for share in (0.05, 0.25, 0.5, 0.95, 1.0):
        place = min(n for n in range(1, len(ordered) + 1) if n >= share * len(ordered) - 1e-9)
        assert spread.quantile(share) == ordered[place - 1]
    assert spread.total / spread.count == pytest.approx(python_statistics.fmean(numbers), abs=1e-9)


def test_memory_stays_flat_however_many_numbers_and_names_come():
    draw = random.Random(0)
    spread, tally = Spread(), Tally(most=100)
    for number in range(60_000):
        spread.add(draw.random())
        tally.add("often" if number % 10 == 0 else f"rare {number}")
    assert len(spread.values) <= 9_000 * 5  # decades from 0.00001 to 1
    assert spread.quantile(0.5) == pytest.approx(0.5, abs=0.01)
    assert len(tally.counts) <= 100
    assert tally.counts["often"] == 6_000  # never forgotten
    assert tally.total == tally.forgotten + sum(tally.counts.values()) == 60_000


def test_scenarios_go_by_kind_and_then_by_the_noun():
    assert scenario("a man in a boat", "") == "Human"
    assert scenario("a toy man", "object") == "Objects"
    assert scenario("the dog", "object") == "Nature"
    assert scenario("a kitchen") == "Environment"
    assert scenario("a mountain lake", "place") == "Nature"
    assert scenario("a rose dress", "clothing") == "Objects"
    assert scenario("", "") == "Objects"
    assert head_noun("a man in a red coat") == "man"
    assert head_noun("in") == "in"
    assert head_noun("…") == ""
    assert content_words("The dog and THE cat's 3 toys") == ["dog", "cat's", "toys"]


def test_roles_of_sources_come_from_wherever_the_manifest_describes_them():
    sources = [
        {"class": "idc.curate.sources.opens2v.OpenS2V", "name": "five million"},
        {"class": "idc.curate.sources.images.SubjectImages", "name": "pictures"},
        {"class": "idc.curate.captions.Caption", "name": "no source"},
    ]
    assert manifest_roles({"recipe": {"a": [1, {"sources": sources}]}}) == [
        ("five million", "general"),
        ("pictures", "other"),
    ]


# Figures ------------------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("}text")]


def test_figures_name_what_they_show_and_are_equal_for_equal_counts(counted, out, tmp_path):
    s9, s10, more = (texts(figure(counted)) for figure in (figure_s9, figure_s10, figure_counts))
    assert {"Human", "Nature", "Objects"} <= set(s9)
    assert "beach" in s9
    assert "dog" in s10
    assert {"(b) Durations, OpenS2V-5M", "(c) Durations, films"} <= set(s10)
    assert {"Buckets of training", "generated:flux", "motion filter: too still", "9 x 48 x 64"} <= set(more)
    assert "read 8 = kept 5 + dropped 3" in more
    again = count(Collection([str(out)]), BucketRule([[9, 48, 64], [17, 48, 64]]), batch_size=2)
    for folder, statistics in (("a", counted), ("b", again)):
        (tmp_path / folder).mkdir()
        write_figures(statistics, tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_figures_of_nothing_and_of_hostile_texts_are_well_formed():
    for figure in (figure_s9, figure_s10, figure_counts):
        assert texts(figure(Statistics()))
    statistics = Statistics()
    statistics.add_drop(SeenDrop(EVIL, "v", "k", "</svg>\x00\x1b", 'a "quoted" & reason'))
    assert '</svg>: a "quoted" & reason' in texts(figure_counts(statistics))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.floats(0.01, 1e4), st.integers(1, 50), min_size=1, max_size=40), st.booleans())
def test_bins_hold_every_value_once(values, whole):
    counts, start, width, beyond = bins(values, whole=whole)
    assert sum(counts) + beyond == sum(values.values())
    assert len(counts) <= 32
    assert start <= min(values) + 1e-6
    assert counts[0] > 0
    assert not whole or width >= 1


def test_no_word_of_the_cloud_covers_another():
    draw = random.Random(1)
    counts = sorted(((f"word{n}" * draw.randint(1, 3), draw.randint(1, 500)) for n in range(120)), key=lambda w: -w[1])
    placed = place_words(counts, 900, 330)
    assert len(placed) > 60
    boxes = [(p.x, p.y - ASCENT * p.size, p.x + p.width, p.y + 0.24 * p.size) for p in placed]
    for one, two in combinations(boxes, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] + 1e-6 or two[3] <= one[1] + 1e-6
    assert all(box[0] >= 0 and box[2] <= 900 and box[1] >= -1e-6 and box[3] <= 330 + 1e-6 for box in boxes)
    sizes = {p.word: p.size for p in placed}
    assert sizes[counts[0][0]] == max(sizes.values())

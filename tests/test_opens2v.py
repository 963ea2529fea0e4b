"""OpenS2V-5M's records: read from files of any size, in the right coordinates, and given back as they were."""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.curate.candidate import Box, Candidate, Dropped
from idc.curate.reaching import UnreachedError
from idc.curate.reading import look
from idc.curate.records import settle
from idc.curate.sources import OpenS2V5M, PairSettings, rle, streaming, to_record
from idc.curate.sources.opens2v_record import kind_of
from idc.curate.sources.streaming import stream_records
from idc.data.video import encode_video
from idc.errors import UserError

FIRST = ("metadata", "word_tags", "annotation")
HEIGHT, WIDTH = 64, 96
CROP = [8, 88, 4, 60]  # x0, x1, y0, y1: 80 x 56 pixels
WOMAN, TOP = [10.25, 6.0, 42.5, 50.0], [12.0, 20.0, 30.0, 40.0]  # left, top, right, bottom, behind the crop


def rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    mask = np.zeros((CROP[3] - CROP[2], CROP[1] - CROP[0]), bool)
    mask[round(top) : round(bottom), round(left) : round(right)] = True
    return mask


def record() -> dict:
    """A record with every field that the dataset's documentation and its sample have."""
    masks = {
        "1": {**rle.encode(rectangle(*WOMAN)), "score": [0.9921875]},
        "2": {**rle.encode(rectangle(*TOP), compressed=False), "score": [0.75]},
        "3": {**rle.encode(rectangle(*WOMAN)), "score": [0.5]},
        "4": {**rle.encode(np.ones((56, 80), bool)), "score": [1.0]},
    }
    names = ["woman", "blue top", "person", "park"]
    annotations = [
        {"class_name": name, "bbox": box, "gme_score": gme, "aes_score": 4.0 + gme}
        for name, box, gme in zip(
            names, [WOMAN, TOP, [10.5, 6.25, 42.0, 49.5], [0.5, 1.0, 79.0, 55.5]], [0.43, 0.41, 0.29, 0.3], strict=True
        )
    ]
    return {
        "metadata": {
            "path": "set1/gm12_part2.mp4",
            "cut": [0, 12],
            "crop": CROP,
            "fps": 29.97,
            "num_frames": 12,
            "resolution": {"height": HEIGHT, "width": WIDTH},
            "tech": 2.082,
            "motion": 0.0122,
            "aesthetic": 5.07,
            "cap": ["Two women.", "A café."],
            "face_cut": [3, 11],
            "face_cap_qwen": "A woman in a blue top talks.\n\nShe smiles.",
            "face_cap_glm": "A woman.",
            "face_cap_Aria": "",
        },
        "word_tags": {
            "background": ["park or garden setting"],
            "subject": ["woman", "individual"],
            "object": ["blue top"],
            "pre_define": ["person", "human head"],
        },
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 3,
                "annotations": annotations,
                "box_format": "xyxy",
                "img_width": 80,
                "img_height": 56,
                "foreground_ase_score": 4.98,
                "background_ase_score": 4.65,
            },
            "mask_map": {str(number): {"class_name": name} for number, name in enumerate(names, 1)},
            "mask_annotation": {"3": masks},
        },
    }


def write(path, content, indent=None) -> str:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
    return str(path)


def outcomes(source: OpenS2V5M) -> list:
    return [outcome for unit in source.units() for outcome in source.open(*unit)]


def one(tmp_path, content: dict, **settings) -> Candidate | Dropped:
    (outcome,) = outcomes(
        OpenS2V5M(write(tmp_path / "r.json", {"gm12_part2_step1": content}), str(tmp_path), **settings)
    )
    return outcome


# A record -----------------------------------------------------------------------------------------------------------


def test_every_field_comes_back(tmp_path):
    whole = record()
    assert to_record(one(tmp_path, copy.deepcopy(whole))) == whole
    for spans, captions in ((("cut",), ("cap",)), (("face_cut",), ("face_cap_Aria", "face_cap_glm")), ((), ())):
        candidate = one(tmp_path, copy.deepcopy(whole), spans=spans, captions=captions)
        assert to_record(candidate) == whole, (spans, captions)
    more = {**whole, "synthetic": {"by": "somebody", "list": [1, None]}}
    more["annotation"]["ann_frame_data"]["note"] = "new field"
    more["metadata"]["nsfw"] = 0.1
    assert to_record(one(tmp_path, copy.deepcopy(more))) == more


@pytest.mark.parametrize(
    "missing",
    [
        "word_tags",
        "annotation",
        "metadata.crop",
        "metadata.face_cut",
        "metadata.cut",
        "metadata.face_cap_qwen",
        "metadata.tech",
        "annotation.mask_annotation",
    ],
)
def test_a_record_without_a_field_is_given_back_without_it(tmp_path, missing):
    whole = record()
    *folders, name = missing.split(".")
    place = whole
    for folder in folders:
        place = place[folder]
    del place[name]
    if missing == "metadata.crop":  # annotations are then of the whole picture
        for item in whole["annotation"]["mask_annotation"]["3"].values():
            item |= rle.encode(np.eye(HEIGHT, WIDTH, dtype=bool), isinstance(item["counts"], str))
    assert to_record(one(tmp_path, copy.deepcopy(whole))) == whole


def test_what_a_record_says_is_in_the_candidate(tmp_path):
    candidate = one(tmp_path, record())
    assert (candidate.span, candidate.crop) == ((3, 11), Box(8, 4, 88, 60))
    assert candidate.path == str(tmp_path / "set1/gm12_part2.mp4")
    assert candidate.video == "set1/gm12"  # all parts of one video are on one side of a split
    assert candidate.caption == "A woman in a blue top talks.\n\nShe smiles."
    assert candidate.licence == "CC-BY-4.0"
    assert candidate.scores["opens2v_tech"] == 2.082
    assert candidate.scores["opens2v_foreground_ase_score"] == 4.98
    found = [(s.name, s.kind, s.frame, s.score, tuple(s.box)) for s in candidate.subjects]
    assert found[0] == ("woman", "person", 0, 0.43, tuple(WOMAN))
    assert [item[1] for item in found] == ["person", "object", "person", "place"]
    for subject, box in zip(candidate.subjects, (WOMAN, TOP), strict=False):
        assert np.array_equal(subject.mask, rectangle(*box))


def test_names_are_told_apart_and_scores_say_which_fits_best(tmp_path):
    whole = record()
    whole["annotation"]["ann_frame_data"]["annotations"][2]["class_name"] = "woman"
    names = [subject.name for subject in one(tmp_path, whole).subjects]
    assert names == ["woman", "blue top", "woman 2", "park"]


def test_boxes_and_masks_lie_on_what_was_drawn(tmp_path):
    """A red rectangle at a known place behind the crop, on frame 3 alone, in a video with a green border around."""
    frames = np.zeros((12, HEIGHT, WIDTH, 3), np.uint8)
    frames[:] = (0, 160, 0)
    inside = frames[:, CROP[2] : CROP[3], CROP[0] : CROP[1]]
    inside[:] = (40, 40, 40)
    left, top, right, bottom = 12, 20, 30, 40
    inside[3, top:bottom, left:right] = (220, 20, 20)
    (tmp_path / "set1").mkdir()
    (tmp_path / "set1/gm12_part2.mp4").write_bytes(encode_video(frames, 25, crf=4, pixel_format="yuv444p"))
    candidate = one(tmp_path, record())
    shirt = candidate.subjects[1]
    (picture,) = look(candidate, [candidate.span[0] + shirt.frame])
    red = (picture[..., 0] > 128) & (picture[..., 1] < 90)
    assert picture.shape == (56, 80, 3)
    assert np.array_equal(red, shirt.mask)
    rows, columns = np.nonzero(red)
    assert Box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == shirt.box
    assert not ((picture[..., 1] > 128) & (picture[..., 0] < 90)).any()  # nothing of the border


def test_a_frame_in_the_middle_of_the_span_has_its_number_and_one_outside_of_it_none(tmp_path):
    whole = record()
    assert {s.frame for s in one(tmp_path, whole, spans=["cut"]).subjects} == {3}
    whole["metadata"]["face_cut"] = [5, 11]
    candidate = one(tmp_path, copy.deepcopy(whole))
    assert all(s.box is None and s.mask is None for s in candidate.subjects)
    assert len(candidate.subjects) == 4
    assert to_record(candidate) == whole


def test_kinds_follow_the_tags():
    tags = record()["word_tags"]
    kinds = {name: kind_of(name, tags) for name in ("woman", "Park", "top", "human head", "person", "kite", "")}
    assert kinds == {"woman": "person", "Park": "place", "top": "object", "human head": "face", "person": "person",
                     "kite": "object", "": "object"}  # fmt: skip


def broken(path: str, value) -> dict:
    whole = record()
    *folders, name = path.split(".")
    place = whole
    for folder in folders:
        place = place[int(folder) if isinstance(place, list) else folder]
    place[int(name) if isinstance(place, list) else name] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("metadata", None, "malformed record"),
        ("metadata", 5, "malformed record"),
        ("metadata.path", None, "malformed record"),
        ("metadata.path", "../../etc/passwd", "path leads out of the videos' folder"),
        ("metadata.path", "/etc/passwd", "path leads out of the videos' folder"),
        ("metadata.path", "pipe:rm", None),
        ("metadata.path", "s3://bucket/key", "path leads out of the videos' folder"),
        ("metadata.face_cut", [9, 9], "no usable span"),
        ("metadata.face_cut", [-1, 9], "no usable span"),
        ("metadata.face_cut", ["0", 9], "no usable span"),
        ("metadata.face_cut", [0.5, 9], "no usable span"),
        ("metadata.crop", [8, 4, 88, 60], "no usable crop"),  # x0, y0, x1, y1 by mistake
        ("metadata.crop", [8, 97, 4, 60], "no usable crop"),
        ("metadata.crop", [8, 88, 4], "no usable crop"),
        ("annotation", [], "malformed record"),
        ("annotation.ann_frame_data.annotations", {}, "malformed record"),
        ("word_tags", "woman", "malformed record"),
    ],
)
def test_a_bad_record_is_dropped_with_a_reason(tmp_path, path, value, reason):
    outcome = one(tmp_path, broken(path, value))
    assert (outcome.reason if isinstance(outcome, Dropped) else None) == reason
    if reason:
        assert outcome.step == "source"
        assert not any(letter.isdigit() for letter in outcome.reason.replace("2", ""))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("annotation.ann_frame_data.annotations.1", "top"),
        ("annotation.ann_frame_data.annotations.1.bbox", [1, 2, 3]),
        ("annotation.ann_frame_data.annotations.1.bbox", [30, 20, 12, 40]),
        ("annotation.ann_frame_data.annotations.1.bbox", [100, 20, 120, 40]),
        ("annotation.mask_annotation.3.2", {"size": [56, 81], "counts": [56 * 81]}),
        ("annotation.mask_annotation.3.2", {"size": [56, 80], "counts": [5]}),
        ("annotation.mask_annotation.3.2", {"size": [56, 80], "counts": "~~~"}),
        ("annotation.mask_annotation.3.2", 7),
    ],
)
def test_a_bad_annotation_costs_its_subject_alone_and_is_noted(tmp_path, path, value):
    candidate = one(tmp_path, broken(path, value))
    assert [subject.name for subject in candidate.subjects] == ["woman", "person", "park"]
    (fault,) = candidate.meta["opens2v"]["faults"]
    assert fault.startswith("annotation 2: ")


def test_numbers_that_are_none_are_as_good_as_missing(tmp_path):
    whole = record()
    whole["metadata"]["tech"] = float("nan")
    whole["annotation"]["ann_frame_data"]["annotations"][0]["gme_score"] = float("inf")
    candidate = one(tmp_path, whole)
    assert "opens2v_tech" not in candidate.scores
    assert candidate.subjects[0].score == 0
    json.dumps(dict(candidate.meta), allow_nan=False)
    assert one(tmp_path, whole, min_tech=1.0).reason == "no technical score"


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_numbers_that_no_float_holds_cost_what_they_stand_for(tmp_path, number, ending):
    whole = copy.deepcopy(record())  # whose lists are shared
    first, second, *_ = whole["annotation"]["ann_frame_data"]["annotations"]
    whole["metadata"]["tech"] = first["gme_score"] = second["bbox"][2] = whole["metadata"]["num_frames"] = 55555
    (tmp_path / f"r{ending}").write_text(json.dumps([whole] if ending == ".json" else whole).replace("55555", number))
    (candidate,) = outcomes(OpenS2V5M(str(tmp_path / f"r{ending}"), str(tmp_path)))
    assert "opens2v_tech" not in candidate.scores
    assert [subject.name for subject in candidate.subjects] == ["woman", "person", "park"]
    assert settle(candidate).subjects[0].score == 0
    whole["metadata"]["face_cut"] = [3, 55555]
    (tmp_path / f"r{ending}").write_text(json.dumps([whole] if ending == ".json" else whole).replace("55555", number))
    (dropped,) = outcomes(OpenS2V5M(str(tmp_path / f"r{ending}"), str(tmp_path)))
    assert dropped.reason == "no usable span"


@pytest.mark.parametrize(
    ("setting", "passes", "fails", "reason"),
    [
        ("min_tech", 2.0, 2.1, "low technical score"),
        ("min_motion", 0.01, 0.02, "low motion score"),
        ("max_motion", 0.02, 0.01, "high motion score"),
        ("min_aesthetic", 5.07, 5.08, "low aesthetic score"),
        ("min_side", 56, 57, "picture too small"),
        ("min_frames", 8, 9, "too short"),
    ],
)
def test_bounds_drop_before_any_video_is_touched(tmp_path, setting, passes, fails, reason):
    """There is no video at all here."""
    assert isinstance(one(tmp_path, record(), **{setting: passes}), Candidate)
    dropped = one(tmp_path, record(), **{setting: fails})
    assert dropped.reason == reason
    assert str(fails) in dropped.detail
    assert dropped.video == "set1/gm12"


def test_records_without_subjects_are_dropped_where_these_are_required(tmp_path):
    whole = record()
    del whole["annotation"]
    assert one(tmp_path, whole, subjects_required=True).reason == "no subject"
    assert one(tmp_path, whole).subjects == ()


def test_licence_and_safety_of_a_record_are_carried_along(tmp_path):
    whole = record()
    whole["metadata"] |= {"license": "CC0-1.0", "safety": {"nsfw": 0.02}}
    candidate = one(tmp_path, copy.deepcopy(whole))
    assert (candidate.licence, candidate.safety) == ("CC0-1.0", {"nsfw": 0.02})
    assert to_record(candidate) == whole


def test_a_candidate_of_another_source_becomes_a_record(tmp_path):
    made = Candidate("k", "videos", "a.mp4", "a.mp4", span=(2, 9), crop=Box(0, 0, 8, 8), caption="A cat.")
    again = to_record(made)
    assert again["metadata"] == {
        "path": "a.mp4",
        "fps": 0.0,
        "cut": [2, 9],
        "crop": [0, 8, 0, 8],
        "face_cap_qwen": "A cat.",
    }
    back = one(tmp_path, again)
    assert (back.span, back.crop, back.caption) == (made.span, made.crop, made.caption)


# Files --------------------------------------------------------------------------------------------------------------


def three() -> dict[str, dict]:
    records = {}
    for number in range(3):
        records[f"é{number}"] = copy.deepcopy(record())
        records[f"é{number}"]["metadata"] |= {
            "path": f"v{number}.mp4",
            "face_cap_qwen": f'a "quoted\\" \t {{ 词 {number}',
        }
    return records


@pytest.mark.parametrize("ending", [".json", ".list.json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_all_kinds_of_files_give_the_same_records(tmp_path, ending):
    records = three()
    if "jsonl" in ending:
        text = "\n\n".join(json.dumps(item, ensure_ascii=False) for item in records.values())
    else:
        text = json.dumps(list(records.values()) if "list" in ending else records, indent=1)
    data = text.encode()
    (tmp_path / f"x{ending}").write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    found = outcomes(OpenS2V5M(str(tmp_path / f"x{ending}"), str(tmp_path)))
    assert [to_record(candidate) for candidate in found] == list(records.values())
    assert len({candidate.key for candidate in found}) == 3


def test_units_are_small_and_do_not_tell_where_the_files_lie(tmp_path):
    records = three()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.json", records)
    sources = [OpenS2V5M(str(tmp_path / folder / "a.json"), str(tmp_path / folder)) for folder in ("here", "there")]
    here, there = (list(source.units()) for source in sources)
    assert here == there
    assert sources[0].describe() == sources[1].describe()
    assert all(len(json.dumps(unit)) < 300 for unit in here)
    assert here == list(sources[0].units())
    keys = [[outcome.key for unit in here for outcome in source.open(*unit)] for source in sources]
    assert keys[0] == keys[1]


def test_a_changed_record_is_a_new_unit_and_keeps_its_key(tmp_path):
    records = three()
    source = OpenS2V5M(write(tmp_path / "a.json", records), str(tmp_path))
    before, keys = list(source.units()), [outcome.key for outcome in outcomes(source)]
    records["é1"]["metadata"]["tech"] = 1.082
    write(tmp_path / "a.json", records)
    after = list(source.units())
    assert [old[0] == new[0] for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert [outcome.key for outcome in outcomes(source)] == keys


def test_several_files_each_with_its_videos(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "total.json", three())
    paths, roots = ([str(tmp_path / name / end) for name in ("one", "two")] for end in ("total.json", "v"))
    found = outcomes(OpenS2V5M(paths, roots))
    assert [candidate.path for candidate in found] == [f"{root}/v{n}.mp4" for root in roots for n in range(3)]
    assert len({candidate.key for candidate in found}) == 6
    assert len({id for id, _ in OpenS2V5M(paths, "memory://v").units()}) == 6
    twice = ([paths[0]] * 2, ["a.json", "./a.json"], ["memory://v/a.json", "memory://v//a.json"])
    for bad in ((paths, [*roots, "x"]), *((same, roots) for same in twice), ([], "x")):
        with pytest.raises(UserError, match=r"file|folders"):
            OpenS2V5M(*bad)


def test_files_behind_urls(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/opens2v/a.json", json.dumps(three()).encode())
    found = outcomes(OpenS2V5M("memory://opens2v/a.json", "memory://opens2v/videos"))
    assert [candidate.path for candidate in found] == [f"memory://opens2v/videos/v{n}.mp4" for n in range(3)]
    fs.rm("/opens2v", recursive=True)


def test_nothing_to_read_is_said_before_anything_else(tmp_path):
    for path, reason in (("none.json", "no such file"), ("empty.json", None), ("empty_list.json", "no record")):
        (tmp_path / "empty.json").touch()
        (tmp_path / "empty_list.json").write_text("[]")
        source = OpenS2V5M(str(tmp_path / path), ".")
        if reason is None:
            assert [drop.reason for drop in outcomes(source)] == ["empty file"]
        else:
            with pytest.raises(UserError, match=reason):
                list(source.units())


# Streaming ----------------------------------------------------------------------------------------------------------


def streamed(tmp_path, data: bytes, name: str = "s.json", **options) -> list[streaming.Record]:
    (tmp_path / name).write_bytes(data)
    return list(stream_records(str(tmp_path / name), FIRST, **options))


def small(count: int) -> dict[str, dict]:
    return {
        f"k{n}": {"metadata": {"path": f"é{n}", "n": n}, "word_tags": {"a": [1, 2.5, '\\"{', True]}}
        for n in range(count)
    }


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 4096])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_do_not_depend_on_where_blocks_end(tmp_path, block, indent):
    records = small(5)
    for content in (records, list(records.values())):
        data = json.dumps(content, indent=indent, ensure_ascii=False).encode()
        found = streamed(tmp_path, data, block=block)
        assert [item.value for item in found] == list(records.values())
        assert [item.key for item in found] == (list(records) if content is records else [""] * 5)
        assert all(json.loads(data[item.at : item.at + item.size]) == item.value for item in found)


def test_a_truncated_file_gives_what_is_whole_and_says_so_once(tmp_path):
    records = small(4)
    data = json.dumps(records, ensure_ascii=False).encode()
    for cut in range(len(data)):
        found = streamed(tmp_path, data[:cut], block=32)
        whole = [item.value for item in found if not item.problem]
        assert whole == list(records.values())[: len(whole)]
        assert [item.problem for item in found if item.problem] == ["truncated file" if data[:cut] else "empty file"], (
            cut
        )
    lines = b"\n".join(json.dumps(item).encode() for item in records.values())
    assert [item.problem for item in streamed(tmp_path, lines[:-3], "s.jsonl")] == ["", "", "", "truncated file"]


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damage_costs_the_records_that_it_hits(tmp_path_factory, data):
    """Whatever byte is overwritten within record 2: records 0, 1 and 4 come through, and the loss is told."""
    folder = tmp_path_factory.getbasetemp()
    records = small(5)
    text = bytearray(json.dumps(records, ensure_ascii=False).encode())
    first, last = text.index(b'"k2"') + 4, text.index(b'"k3"') - 2
    place = data.draw(st.integers(first, last))
    text[place] = data.draw(st.sampled_from(list(b'"{}[]:,\\x0 \n\xff')))
    found = streamed(folder, bytes(text), "damage.json", block=data.draw(st.sampled_from([8, 50, 1000])))
    values = [item.value for item in found if not item.problem]
    for number in (0, 1, 4):
        assert records[f"k{number}"] in values
    lost = [key for key, value in records.items() if value not in values]
    changed = [value for value in values if value not in records.values()]
    assert set(lost) <= {"k2", "k3"}
    assert len(lost) <= len(changed) + sum(bool(item.problem) for item in found)


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        (b"", ["empty file"]),
        (b" \n ", ["empty file"]),
        (b"5", ["no list or dict of records"]),
        (b'"text"', ["no list or dict of records"]),
        (b"\x00\x01", ["no list or dict of records"]),
        (b"[]", []),
        (b"{}", []),
        (b"\xef\xbb\xbf{}", []),
        (b"{} {}", ["more behind the end"]),
        (b"[" * 100_000, ["malformed record"]),
        (b"[" + b"9" * 5000 + b"]", ["malformed record"]),
        (b'{"a": {"metadata": {}} "b": {"metadata": {}}, }', ["", ""]),
    ],
)
def test_files_of_all_kinds(tmp_path, data, problems):
    assert [item.problem for item in streamed(tmp_path, data)] == problems


def test_a_missing_bracket_swallows_no_record(tmp_path):
    text = json.dumps(small(5)).replace('"n": 2}', '"n": 2')
    assert [(item.key, item.problem) for item in streamed(tmp_path, text.encode())] == [
        ("k0", ""), ("k1", ""), ("k2", "malformed record"), ("k3", ""), ("k4", ""),
    ]  # fmt: skip


def test_a_record_that_never_ends_is_given_up(tmp_path):
    text = json.dumps(small(2))[:-1] + ', "k2": {"metadata": {"path": "' + "x" * 5000
    found = streamed(tmp_path, text.encode(), block=100, largest=1000)
    assert [item.problem for item in found] == ["", "", "record without an end"]
    lines = b'{"metadata": 1}\n' + b"x" * 5000 + b'\n{"metadata": 2}\n'
    found = streamed(tmp_path, lines, "s.jsonl", block=100, largest=1000)
    assert [item.problem for item in found] == ["", "record without an end", ""]


def test_text_that_is_no_unicode_is_malformed(tmp_path):
    data = json.dumps(small(3)).encode().replace(b"\\u00e91", b"\xff")
    assert [item.problem for item in streamed(tmp_path, data)] == ["", "malformed record", ""]
    half = json.dumps({"a\ud800": record()}).encode()  # half of a surrogate pair, well-formed JSON all the same
    (tmp_path / "half.json").write_bytes(half)
    (candidate,) = outcomes(OpenS2V5M(str(tmp_path / "half.json"), "."))
    candidate.key.encode(), json.dumps(candidate.meta, ensure_ascii=False).encode()
    whole = record()
    whole["metadata"]["face_cap_qwen"] = "\udfff"
    (tmp_path / "half.json").write_text(json.dumps({"a": whole}))
    assert [drop.reason for drop in outcomes(OpenS2V5M(str(tmp_path / "half.json"), "."))] == ["malformed record"]


def test_a_damaged_archive_gives_what_comes_before_the_damage(tmp_path):
    packed = bytearray(gzip.compress(json.dumps(list(small(400).values())).encode()))
    cut = streamed(tmp_path, bytes(packed[:-40]), "s.json.gz", block=1024)
    assert len(cut) > 100
    assert cut[-1].problem == "damaged file"
    assert not any(item.problem for item in cut[:-1])
    packed[len(packed) // 2] ^= 0xFF
    hit = streamed(tmp_path, bytes(packed), "s.json.gz", block=1024)
    assert any(item.problem for item in hit)
    assert not hit[0].problem
    assert streamed(tmp_path, b"no gzip", "s.json.gz")[0].problem == "damaged file"


def test_malformed_places_are_dropped_with_their_place_and_the_rest_goes_on(tmp_path):
    records = three()
    text = json.dumps(records).replace('"num_frames": 12', '"num_frames": twelve', 1)
    (tmp_path / "a.json").write_text(text)
    first, *rest = outcomes(OpenS2V5M(str(tmp_path / "a.json"), "."))
    assert (first.reason, first.video) == ("malformed record", "é0")
    assert "byte 1" in first.detail
    assert [to_record(candidate) for candidate in rest] == list(records.values())[1:]


def test_memory_stays_flat_over_a_hundred_megabytes(tmp_path):
    """100 MB of records: the peak is that of a few blocks, whether the file is 10 or 100 MB long."""
    whole = record()
    whole["annotation"]["mask_annotation"]["3"]["1"]["note"] = "0" * 100_000
    line = json.dumps(whole).encode()

    def peak(records: int) -> int:
        path = tmp_path / "large.json"
        with path.open("wb") as stream:
            stream.write(b"{")
            for number in range(records):
                stream.write(b'%s"k%d": %s' % (b", " if number else b"", number, line))
            stream.write(b"}")
        source = OpenS2V5M(str(path), ".")
        tracemalloc.start()
        try:
            assert sum("at" in payload for _, payload in source.units()) == records
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            path.unlink()

    small_file, large_file = peak(100), peak(1000)
    assert 1000 * len(line) > 100e6
    assert large_file < 20e6
    assert large_file < 1.2 * small_file


# Pairs --------------------------------------------------------------------------------------------------------------


def pair(cur: str, aft: str, image: float, text: float = 0.9, **more) -> dict:
    return {
        "cur_id": cur, "aft_id": aft, "cur_class_id": 1, "aft_class_id": 2, "cur_class_name": "woman",
        "aft_class_name": "person", "text_similarity": text, "image_similarity": image, "cur_frame_idx": 3,
        "aft_frame_idx": 40, **more,
    }  # fmt: skip


def with_pairs(tmp_path, content, name="pairs.json", **options) -> list[dict]:
    write(tmp_path / name, content)
    source = OpenS2V5M(
        write(tmp_path / "a.json", three()), ".", pairs=str(tmp_path / name), pair_settings=PairSettings(**options)
    )
    return [outcome if isinstance(outcome, Dropped) else outcome.meta["opens2v"] for outcome in outcomes(source)]


@pytest.mark.parametrize("form", ["clusters", "list"])
def test_pairs_come_to_both_records_each_as_its_own_side(tmp_path, form):
    pairs = [pair("part1/é0", "part2/é1", 0.8), pair("é0", "é2", 0.9), pair("é0", "é2", 0.998), pair("é1", "é2", 0.5)]
    pairs.append(pair("é1", "é2", 0.9, text=0.3))
    known = with_pairs(tmp_path, {"c": pairs[:2], "d": pairs[2:]} if form == "clusters" else pairs)
    seen = [[(item["other"]["id"], item["image_similarity"]) for item in meta["pairs"]] for meta in known]
    assert seen == [[("é2", 0.9), ("é1", 0.8)], [("é0", 0.8)], [("é0", 0.9)]]
    assert [meta["near_duplicates"] for meta in known] == [1, 0, 1]
    own, other = known[1]["pairs"][0]["own"], known[1]["pairs"][0]["other"]
    assert own == {"class_id": 2, "class_name": "person", "frame_idx": 40}
    assert other == {"id": "é0", "class_id": 1, "class_name": "woman", "frame_idx": 3}


def test_the_cap_and_the_number_of_pairs_are_settings(tmp_path):
    pairs = [pair("é0", "é1", 0.6 + number / 1000) for number in range(1, 400)]
    known = with_pairs(tmp_path, pairs, max_image=0.7, most=5)[0]
    assert [round(item["image_similarity"], 3) for item in known["pairs"]] == [0.7, 0.699, 0.698, 0.697, 0.696]
    assert known["near_duplicates"] == 299


def test_pairs_of_a_folder_and_malformed_ones(tmp_path):
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs/c1.json", [pair("é0", "é1", 0.8), {"cur_id": "é0"}, pair("é0", "é2", float("nan"))])
    write(tmp_path / "pairs/c2.json", {"c": [pair("é1", "é2", 0.8)]})
    (tmp_path / "pairs/c3.json").write_text('[{"cur_id": "é0", "aft')
    source = OpenS2V5M(write(tmp_path / "a.json", three()), ".", pairs=str(tmp_path / "pairs"))
    found = outcomes(source)
    assert [drop.reason for drop in found if isinstance(drop, Dropped)] == ["malformed pair"] * 2 + ["truncated file"]
    assert [len(item.meta["opens2v"]["pairs"]) for item in found if isinstance(item, Candidate)] == [1, 2, 1]


def test_other_pairs_are_new_units(tmp_path):
    records = write(tmp_path / "a.json", three())
    ids = []
    for image in (0.8, 0.9):
        source = OpenS2V5M(records, ".", pairs=write(tmp_path / "pairs.json", [pair("é0", "é1", image)]))
        ids.append([id for id, _ in source.units()])
    assert [old == new for old, new in zip(*ids, strict=True)] == [False, False, True]


# Masks --------------------------------------------------------------------------------------------------------------


def slow_decode(counts: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed runs, written down from the description of the format, a pixel at a time."""
    runs: list[int] = []
    characters = iter(counts)
    for character in characters:
        bits = [ord(character) - 48]
        while bits[-1] >= 32:
            bits.append(ord(next(characters)) - 48)
        value = sum((group % 32) * 32**place for place, group in enumerate(bits))
        if bits[-1] % 32 >= 16:
            value -= 32 ** len(bits)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    mask = np.zeros((height, width), bool)
    place = 0
    for number, run in enumerate(runs):
        for _ in range(run):
            mask[place % height, place // height] = number % 2 == 1
            place += 1
    assert place == height * width
    return mask


def masks(count: int):
    rng = np.random.default_rng(0)
    yield from (np.zeros((3, 5), bool), np.ones((3, 5), bool), np.ones((1, 1), bool), np.eye(7, dtype=bool))
    for _ in range(count):
        height, width = rng.integers(1, 40, 2)
        noise = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        yield noise
    yield np.arange(60_000).reshape(200, 300) % 20_000 > 17_000  # runs of several characters, both signs


def test_masks_come_back_and_a_slow_decoder_agrees():
    for mask in masks(40):
        packed, plain = rle.encode(mask), rle.encode(mask, compressed=False)
        assert np.array_equal(rle.decode(packed, mask.shape), mask)
        assert np.array_equal(rle.decode(plain), mask)
        assert np.array_equal(slow_decode(packed["counts"], *mask.shape), mask)
        assert sum(plain["counts"]) == mask.size
        assert json.loads(json.dumps(packed)) == packed


def test_codes_are_those_of_pycocotools():
    from pycocotools import mask as coco

    for mask in masks(40):
        theirs = coco.encode(np.asfortranarray(mask, np.uint8))
        ours = rle.encode(mask)
        assert ours["counts"].encode() == theirs["counts"]
        assert ours["size"] == list(theirs["size"])
        assert np.array_equal(coco.decode({**ours, "counts": ours["counts"].encode()}).astype(bool), mask)
        assert np.array_equal(rle.decode(theirs), mask)


def test_known_codes():
    """What pycocotools 2.0.11 gives for these."""
    assert rle.encode(np.eye(4, dtype=bool))["counts"] == "01400000"
    assert rle.encode(np.ones((2, 3), bool)) == {"size": [2, 3], "counts": "06"}


@pytest.mark.parametrize(
    "code",
    [
        {}, None, {"size": [2, 2]}, {"size": [2], "counts": [4]}, {"size": [0, 2], "counts": []},
        {"size": [2, 2], "counts": [3]}, {"size": [2, 2], "counts": [-1, 5]}, {"size": [2, 2], "counts": [1.0, 3.0]},
        {"size": [2, 2], "counts": "P"}, {"size": [2, 2], "counts": "é"}, {"size": [2, 2], "counts": "o" * 20 + "0"},
        {"size": [10**9, 10**9], "counts": [10**18]}, {"size": [True, 2], "counts": 5},
    ],
)  # fmt: skip
def test_what_is_no_code_is_refused(code):
    with pytest.raises(rle.RLEError):
        rle.decode(code)


def test_random_text_is_refused_or_a_mask():
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(chr(rng.randrange(40, 118)) for _ in range(rng.randrange(8)))
        try:
            mask = rle.decode({"size": [3, 4], "counts": text})
        except rle.RLEError:
            continue
        assert mask.shape == (3, 4)


def test_a_stream_that_fails_while_it_is_read_is_told(monkeypatch, tmp_path):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 200:
                raise OSError("the network is gone")
            return super().read(100)

    data = json.dumps(small(9)).encode()
    monkeypatch.setattr(streaming.storage, "open_read", lambda path: Failing(data))
    with pytest.raises(UnreachedError, match=r"s3://x/y\.json: OSError: the network is gone"):
        list(stream_records("s3://x/y.json", FIRST, block=64))

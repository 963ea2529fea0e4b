"""What the report's page writes: its files, its names and its refusals; no browser is needed."""

from __future__ import annotations

import json
import os

import pytest
from _report_page import EVIL, make_page
from _runs import even_results, write_run
from PIL import Image

from idc.errors import UserError
from idc.metrics.results import Result, read_run
from idc.report.layout import LAYOUTS, TABLE_1, TABLE_2
from idc.report.measure import Measured
from idc.report.media import Media, find_items
from idc.report.page import name_systems, write_page
from idc.report.tables import fill
from idc.webpage import file_name, script_json


def test_the_page_is_written_again_without_copying_again(tmp_path):
    page = make_page(tmp_path)
    copied = sorted(page.parent.glob("media/*/good_1.mp4"))
    assert len(copied) == 2
    assert not list(page.parent.glob("media/**/*.part"))
    stamps = [file.stat().st_ctime_ns for file in copied]
    source = page.parent.parent / "a" / "videos" / "good_1.mp4"
    runs = [Measured(read_run(page.parent.parent / name / "run"), resamples=20) for name in "ab"]
    write_page(
        page.parent, runs, [fill(layout, runs, with_published=True) for layout in (TABLE_1, TABLE_2)], title=EVIL
    )
    assert [file.stat().st_ctime_ns for file in copied] == stamps
    later = source.stat().st_mtime_ns + 10**9
    os.utime(source, ns=(later, later))
    write_page(page.parent, runs, [fill(TABLE_1, runs)], title=EVIL)
    assert sum(file.stat().st_ctime_ns != stamp for file, stamp in zip(copied, stamps, strict=True)) == 1


def test_runs_of_one_system_get_names_of_their_own(tmp_path):
    runs = [
        Measured(read_run(write_run(tmp_path / name, "sft", even_results({"gmescore": 0.5})))) for name in ("a", "b")
    ]
    runs.append(Measured(read_run(write_run(tmp_path / "c" / "a", "sft", even_results({"gmescore": 0.5})))))
    assert [system.name for system in name_systems(runs)] == ["sft (a)", "sft (b)", "sft (a) 2"]


def test_no_runs_make_a_page_of_the_papers_tables(tmp_path):
    index = write_page(tmp_path, [], [fill(TABLE_1, [], with_published=True)])
    text = index.read_text(encoding="utf-8")
    assert "47.59%" in text
    assert "No run was given" in text
    assert "http:" not in text
    assert "https:" not in text


def test_tables_without_a_figure_are_folded_up_below_the_videos(tmp_path):
    results = [Result("a", "facesim", 0.5, category="singleface"), Result("b", "facesim", 0.7, category="singleface")]
    run = Measured(read_run(write_run(tmp_path / "run", "no_vlm_encoder", results)), resamples=20)
    layouts = LAYOUTS.values()
    text = write_page(tmp_path / "out", [run], [fill(layout, [run]) for layout in layouts]).read_text(encoding="utf-8")
    places = {layout.number: text.index(f'id="{layout.slug}"') for layout in layouts}
    videos = text.index('id="videos"')
    assert sorted(places, key=places.__getitem__) == ["2", "1", "3", "S.5", "S.7"]
    assert [number for number, place in places.items() if place < videos] == ["2"]
    assert text.count("<details><summary>Table ") == 4
    no_figure = Measured(read_run(write_run(tmp_path / "x", "no_vlm_encoder", [Result("a", "toy", 0.5)])), resamples=20)
    text = write_page(tmp_path / "none", [no_figure], [fill(TABLE_2, [no_figure])]).read_text(encoding="utf-8")
    assert "No table of the paper has figures of these runs" in text
    assert text.index("<details>") > text.index('id="videos"')
    text = write_page(tmp_path / "full", [run], [fill(TABLE_2, [run])]).read_text(encoding="utf-8")
    assert "<details>" not in text


def test_a_video_outside_of_the_runs_folder_is_not_copied(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    run = write_run(
        tmp_path / "run", "sft", [Result("a", "gmescore", 0.5, video="../secret.txt")], videos=str(tmp_path / "videos")
    )
    write_page(tmp_path / "out", [Measured(read_run(run), resamples=20)], [])
    assert not list((tmp_path / "out").rglob("*secret*"))
    assert "is not there" in (tmp_path / "out" / "data.js").read_text()


def test_what_does_not_decode_is_told_and_not_played(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "broken.mp4").write_bytes(b"no video")
    run = read_run(write_run(tmp_path / "run", "sft", even_results({"aesthetics": 0.5}), videos=str(videos)))
    found = Media(tmp_path / "out").video("sft", run, "broken.mp4")
    assert found == {"missing": "it cannot be opened as a video"}
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_references_come_from_the_benchmark_where_the_videos_carry_none(tmp_path):
    (tmp_path / "videos").mkdir()
    Image.new("RGBA", (400, 100), (200, 0, 0, 0)).save(tmp_path / "cup.png")
    record = {"img_paths": ["cup.png"], "prompt": "a cup", "class_label": ["cup"], "synthesis_flag": "false"}
    (tmp_path / "bench.json").write_text(json.dumps({"singleobj_1": record}))
    config = {"model": {"init_args": {"benchmark": str(tmp_path / "bench.json"), "benchmark_root": None}}}
    results = [Result("singleobj_1", "gmescore", 0.5)]
    run = read_run(write_run(tmp_path / "run", "vidu", results, videos=str(tmp_path / "videos"), config=config))
    item = find_items([run])["singleobj_1"]
    (found,) = Media(tmp_path / "out").references(item)
    assert (found["name"], found["kind"]) == ("cup", "object")
    with Image.open(tmp_path / "out" / found["src"]) as picture:
        assert picture.size == (240, 60)
        assert picture.getpixel((5, 5)) == (255, 255, 255)  # transparent is white
    (tmp_path / "bench.json").write_text("[")
    assert find_items([run]) == {}
    with pytest.raises(UserError, match="not valid JSON"):
        find_items([run], tmp_path / "bench.json")


def test_names_of_files_are_safe_and_never_shared():
    names = ["a", "A b", "a/b", "a_b", "..", "<b>", "é", "x" * 200, "x" * 201, ""]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in made)
    assert not any(set(name) <= {"."} for name in made)


def test_json_in_a_script_has_nothing_to_end_it():
    text = script_json({"<": "</script>\u2028&"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"<": "</script>\u2028&"}


def test_only_links_that_lead_somewhere_harmless(tmp_path):
    with pytest.raises(UserError, match="begins with http"):
        write_page(tmp_path, [], [], links={"x": "JavaScript:alert(1)"})

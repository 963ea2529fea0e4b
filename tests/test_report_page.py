"""The report's page in a browser: what it shows, that it sorts, filters and plays, and needs no network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from _browser import open_browser
from _runs import even_results, tracking, write_run
from PIL import Image

from idc.data.benchmark import Item, write_items
from idc.data.video import encode_video
from idc.errors import UserError
from idc.metrics.results import Problem, Result, read_run
from idc.report.layout import LAYOUTS, TABLE_1, TABLE_2
from idc.report.measure import Measured
from idc.report.media import Media, file_name, find_items
from idc.report.page import name_systems, script_json, write_page
from idc.report.tables import fill

EVIL = '<img src="https://example.com/x.png" onerror="window.hacked=1"></script><script>window.hacked=2</script>'
ODD_ID = """<b>it's "odd" & 'quoted'"""


def clip(frames: int, side: int = 32) -> bytes:
    video = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        video[t, :, : 1 + t % side] = (200, 80, 40)
    return encode_video(video, 16.0)


def make_run(folder: Path, system: str, mean: float, frames: int) -> Path:
    videos = folder / "videos"
    videos.mkdir(parents=True)
    (videos / "good_1.mp4").write_bytes(clip(frames))
    (videos / "broken_2.mp4").write_bytes(b"no video")
    (videos / f"{ODD_ID}.mp4").write_bytes(clip(frames))
    Image.new("RGB", (300, 200), (10, 120, 200)).save(videos / "ada.png")
    references = (videos / "ada.png", videos / "gone.png")
    items = [Item("good_1", "Ada meets Bob.", references, ("Ada", EVIL), ("human", "human"), "multihuman")]
    write_items(videos, items)
    details = tracking([[0.7, 0.6, None, -0.1], [0.2, None, None, 0.3]], ["Ada", EVIL])
    told = {"category": "multihuman", "prompt": EVIL}
    results = [
        Result(
            "good_1", "identity", 0.4, details=details, video="good_1.mp4", category="multihuman", prompt="Ada meets"
        ),
        Result("good_1", "gmescore", mean, video="good_1.mp4", category="multihuman", prompt="Ada meets Bob."),
        Result("broken_2", "gmescore", None, "does not decode", video="broken_2.mp4", category="singleobj"),
        Result(ODD_ID, "gmescore", 1 - mean, video=f"{ODD_ID}.mp4", **told),
        Result("none_3", "gmescore", None, EVIL, category="singleobj"),
    ]
    problem = Problem("extra.mp4", "no item of this name")
    return write_run(folder / "run", system, results, videos=str(videos), problems=[problem])


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    paths = [make_run(folder / "a", "sft", 0.8, 9), make_run(folder / "b", EVIL, 0.3, 17)]
    runs = [Measured(read_run(path), resamples=50) for path in paths]
    tables = [fill(layout, runs, with_published=True) for layout in (TABLE_1, TABLE_2)]
    return write_page(folder / "out", runs, tables, title=EVIL, links={"Human study": "study/index.html"})


@pytest.fixture(scope="module")
def browser(page):
    with open_browser(1280, 900) as driver:
        yield driver


@pytest.fixture
def opened(browser, page):
    """The page, freshly loaded, with empty logs."""
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "file://", "storageTypes": "local_storage"})
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    return browser


def wait(driver, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20, 0.05).until(lambda d: d.execute_script(f"return {script}"))


def scroll_to(driver, selector: str) -> None:
    driver.execute_script("document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})", selector)


def requested(driver) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_the_page_needs_no_network_and_what_runs_say_cannot_act_in_it(opened):
    for n in range(4):
        scroll_to(opened, f"#item-{n}")
        wait(opened, f"document.querySelector('#item-{n} > header')")
    assert opened.execute_script("return window.hacked") is None
    assert opened.execute_script("return document.title") == EVIL
    urls = requested(opened)
    assert any(url.endswith("page.js") for url in urls)
    assert {url.split(":")[0] for url in urls} <= {"file", "data", "blob"}
    assert opened.get_log("browser") == []
    prompt = "return [...document.querySelectorAll('.prompt')].map(p => p.textContent)"
    assert EVIL in opened.execute_script(prompt)
    assert (
        opened.execute_script("return [...document.querySelectorAll('.item h3')].map(h => h.textContent)")[2] == ODD_ID
    )


def test_a_click_on_a_heading_sorts_and_the_third_restores_the_order(opened):
    read = "return [...document.querySelectorAll('#table_1 tbody tr:not(.group) th')].map(cell => cell.textContent)"
    heading = opened.find_elements("css selector", "#table_1 thead button")[8]  # printed total
    before = opened.execute_script(read)
    heading.click()
    assert opened.execute_script(read)[:2] == ["Ours-14B (Large-scale Model)", "Ours-1.3B (Base Model + online RL)"]
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    heading.click()
    assert opened.execute_script(read)[:2] == ["VACE-1.3B", "Vidu 2.0"]
    assert opened.execute_script(read)[-1] == EVIL  # not printed: blanks come last either way
    heading.send_keys("\n")  # by the keyboard
    assert opened.execute_script(read) == before
    assert opened.execute_script("return getComputedStyle(document.querySelector('#table_1 .group')).display") != "none"


def test_scores_by_video_sort_and_lead_to_their_video(opened):
    cell = "return [...document.querySelectorAll('#scores tbody th')].map(cell => cell.textContent)"
    opened.execute_script(
        "const m = document.querySelector('#measure'); m.value = 'gmescore'; m.dispatchEvent(new Event('input'))"
    )
    assert opened.execute_script(cell) == ["good_1", "broken_2", ODD_ID, "none_3"]
    buttons = opened.find_elements("css selector", "#scores thead button")
    opened.execute_script("arguments[0].click()", buttons[3])
    assert opened.execute_script(cell)[:2] == [ODD_ID, "good_1"]
    assert opened.execute_script("return document.querySelector('#scores a').getAttribute('href')") == "#item-2"


def test_filters_leave_what_is_asked_for(opened):
    shown = (
        "return [...document.querySelectorAll('.item')].filter(i => !i.hidden).map(i => i.getAttribute('aria-label'))"
    )

    def choose(name: str, value: str) -> list[str]:
        opened.execute_script(
            "const e = document.getElementById(arguments[0]); e.type === 'checkbox' ? e.checked = !!arguments[1] :"
            "e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
            name,
            value,
        )
        return opened.execute_script(shown)

    assert choose("category", "multihuman") == ["good_1", ODD_ID]
    assert opened.find_element("id", "count").text == "2 of 4 items"
    assert choose("query", "MEETS") == ["good_1"]
    assert choose("query", "nothing of the kind") == []
    choose("query", "")
    assert choose("category", "") == ["good_1", "broken_2", ODD_ID, "none_3"]
    # The least of each over the systems: sft has 0.8 and 0.2, the other 0.3 and 0.7.
    assert choose("order", "low gmescore") == [ODD_ID, "good_1", "broken_2", "none_3"]
    assert choose("order", "high gmescore")[0] == "good_1"
    choose("order", "")
    assert choose("failing", "yes") == ["broken_2", ODD_ID, "none_3"]  # the odd one's identity is not scored yet
    opened.execute_script("document.querySelector('#systems input').click()")
    assert opened.execute_script("return document.querySelectorAll('#scores thead th').length") == 3
    visible = "return [...document.querySelectorAll('#item-1 .clips figure')].map(f => f.hidden)"
    scroll_to(opened, "#item-1")
    wait(opened, "document.querySelectorAll('#item-1 .clips figure').length === 2")
    assert opened.execute_script(visible) == [True, False]


def test_videos_play_together_and_the_plots_follow(opened):
    scroll_to(opened, "#item-0")
    wait(opened, "document.querySelectorAll('#item-0 video').length === 2")
    assert opened.execute_script(
        "return [...document.querySelectorAll('#item-0 video')].every(v => v.poster.startsWith('file:'))"
    )
    opened.execute_script(
        "const s = document.querySelector('#item-0 .player input'); s.value = 500; s.dispatchEvent(new Event('input'))"
    )
    # Half of the longer one, 17 frames at 16 a second, is the end of the shorter one.
    times = "[...document.querySelectorAll('#item-0 video')].map(v => v.currentTime)"
    wait(opened, f"{times}.every(t => t > 0.5)")
    wait(opened, "+document.querySelectorAll('#item-0 .plot .head')[1].getAttribute('x1') > 160")
    assert opened.execute_script(f"return {times}") == pytest.approx([0.53, 0.53], abs=0.06)
    opened.execute_script("document.querySelector('#item-0 .player button').click()")
    wait(opened, "[...document.querySelectorAll('#item-0 video')].every(v => !v.paused || v.ended)")
    wait(opened, f"{times}[1] < 0.5")  # started again
    opened.execute_script("document.querySelector('#item-0 .player button').click()")
    wait(opened, "[...document.querySelectorAll('#item-0 video')].every(v => v.paused)")


def test_identity_is_drawn_with_its_gaps_and_the_confusion_in_words(opened):
    scroll_to(opened, "#item-0")
    wait(opened, "document.querySelector('#item-0 .plot')")
    plot = opened.find_element("css selector", "#item-0 .plot")
    label = plot.get_attribute("aria-label")
    assert label.startswith("Similarity over time, sft. Ada: identity 0.30, seen in 3 of 4 frames")
    path = opened.execute_script("return document.querySelector('#item-0 .plot path').getAttribute('d')")
    assert (path.count("M"), path.count("L")) == (2, 1)  # a gap where the subject is missing
    cells = "return [...document.querySelectorAll('#item-0 .confusion')][0].innerText"
    opened.execute_script("document.querySelector('#item-0 details').open = true")
    assert "100%" in opened.execute_script(cells)
    lost = opened.execute_script(
        "return [...document.querySelectorAll('#item-0 .references figure')].map(f => f.innerText)"
    )
    assert lost == ["Ada", f"picture not there\n{EVIL}"]


def test_failures_are_listed_with_their_reasons(opened):
    rows = opened.execute_script("return [...document.querySelectorAll('#failed tbody tr')].map(r => r.innerText)")
    assert any("sft" in row and "does not decode" in row and "broken_2" in row for row in rows)
    assert any("no item of this name" in row and "extra.mp4" in row for row in rows)
    assert sum(EVIL in row for row in rows) >= 2
    assert sum("not scored yet" in row for row in rows) == 2  # identity of three videos, per system


def test_colours_follow_the_system_and_the_button_remembers(opened):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = opened.execute_script(background)
    opened.find_element("id", "theme").click()
    dark = opened.execute_script(background)
    assert dark != light
    opened.refresh()
    assert opened.execute_script(background) == dark


def test_a_phone_never_scrolls_sideways(page):
    with open_browser(360, 740, touch=True) as driver:
        driver.get(page.as_uri())
        scroll_to(driver, "#item-0")
        wait(driver, "document.querySelector('.item .clips')")
        assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert driver.get_log("browser") == []


def test_every_control_has_a_name(opened):
    unnamed = """return [...document.querySelectorAll('button, input, select, video, svg, img, [tabindex]')].filter(e =>
      !(e.getAttribute('aria-label') || e.textContent.trim() || e.alt || e.closest('label')?.textContent.trim()))
      .map(e => e.outerHTML)"""
    assert opened.execute_script(unnamed) == []
    assert opened.execute_script("return document.documentElement.lang") == "en"


def test_a_benchmark_of_180_items_and_5_systems_is_filled_as_it_comes_into_view(browser, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "clip.mp4").write_bytes(clip(9))
    details = tracking([[0.5] * 8] * 2, ["Ada", "Bob"])
    runs = []
    for n in range(5):
        results = [
            Result(f"item_{i}", "identity", 0.5, details=details, video="clip.mp4", category=f"c{i % 8}")
            for i in range(180)
        ]
        path = write_run(tmp_path / str(n), f"system {n}", results, videos=str(tmp_path / "videos"))
        runs.append(Measured(read_run(path), resamples=20))
    index = write_page(tmp_path / "out", runs, [], copy_videos=False)
    assert not list((tmp_path / "out").rglob("*.mp4"))
    browser.get(index.as_uri())
    scroll_to(browser, ".item")
    wait(browser, "document.querySelectorAll('.item').length === 180 && document.querySelector('.item video')")
    built = browser.execute_script("return document.querySelectorAll('.item video').length")
    assert 5 <= built <= 60
    scroll_to(browser, "#item-179")
    wait(browser, "document.querySelectorAll('#item-179 video').length === 5")
    assert browser.execute_script("return document.querySelectorAll('.item video').length") < 200
    wait(browser, "document.querySelector('#item-179 video').poster && document.querySelector('#item-179 .plot path')")


@pytest.fixture
def without_observer(browser):
    """A browser in which no card is ever reported as seen, as where a picture is taken at once; 1400 x 6500 pixels."""
    size = {"width": 1400, "height": 6500, "deviceScaleFactor": 1, "mobile": False}
    source = "window.IntersectionObserver = class { observe() {} unobserve() {} disconnect() {} }"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 1280, "height": 900})


def test_a_tall_screenshot_shows_the_videos_and_a_print_all_of_them(without_observer, page, tmp_path):
    driver = without_observer
    posters = "return [...document.querySelectorAll('.item video')].filter(v => v.poster).length"
    driver.get(page.as_uri())
    assert driver.execute_script(posters) == 4  # two systems, two items that decode
    results = [Result(f"item_{n}", "gmescore", 0.5) for n in range(60)]
    run = Measured(read_run(write_run(tmp_path / "run", "sft", results)), resamples=20)
    driver.get(write_page(tmp_path / "out", [run], []).as_uri())
    filled = "return document.querySelectorAll('.item > header').length"
    assert 5 < driver.execute_script(filled) < 60
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(filled) == 60


# Without a browser --------------------------------------------------------------------------------------------------


def test_the_page_is_written_again_without_copying_again(page):
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

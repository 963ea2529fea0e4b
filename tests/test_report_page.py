"""The report's page in a browser: what it shows, that it sorts, filters and plays, and needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _browser import open_browser, reload
from _report_page import EVIL, ODD_ID, clip, make_page
from _runs import tracking, write_run

from idc.metrics.results import Result, read_run
from idc.report.measure import Measured
from idc.report.page import write_page


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return make_page(tmp_path_factory.mktemp("report"))


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
    # In one script: drawing anew in between would leave a button that belongs to nothing.
    click = "document.querySelectorAll('#scores thead button')[3].click(); "
    assert opened.execute_script(click + cell)[:2] == [ODD_ID, "good_1"]
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
    # The page that comes again must be dark before anything of it is there: it must not flash.
    first = """new MutationObserver((_, watch) => {
      if (!document.body) return;
      window.first = document.documentElement.dataset.theme || "none";
      watch.disconnect();
    }).observe(document, {childList: true, subtree: true})"""
    early = opened.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": first})
    reload(opened)
    opened.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", early)
    assert opened.execute_script("return window.first") == "dark"
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
    posters = "[...document.querySelectorAll('.item video')].filter(v => v.poster).length"
    driver.get(page.as_uri())
    wait(driver, f"{posters} === 4")  # two systems, two items that decode
    results = [Result(f"item_{n}", "gmescore", 0.5) for n in range(60)]
    run = Measured(read_run(write_run(tmp_path / "run", "sft", results)), resamples=20)
    driver.get(write_page(tmp_path / "out", [run], []).as_uri())
    filled = "return document.querySelectorAll('.item > header').length"
    wait(driver, f"{filled.removeprefix('return ')} > 5")
    assert driver.execute_script(filled) < 60
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(filled) == 60

"""The page of shards in a browser: what it shows, that it filters, plays, is leafed through, and needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from _browser import open_browser
from _curated import EVIL, SIDE, moving_clip, write_collection, write_samples
from _shards import corrupt, restamp, write_shards

from idc.cli import main
from idc.curate.looking import Collection
from idc.curate.page import PART_SIZE, write_page
from idc.curate.statistics import count as count_all
from idc.data.index import build_index
from idc.data.shards import ShardWriter
from idc.data.video import decode_video, probe
from idc.webpage import playable, plays_everywhere


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_collection(folder / "collection")
    return write_page(folder / "out", Collection([str(folder / "collection")]), with_drops=True, title=EVIL)


@pytest.fixture(scope="module")
def browser():
    with open_browser(1280, 900) as driver:
        yield driver


@pytest.fixture
def opened(browser, page):
    """All samples of the page, freshly loaded, with empty logs."""
    open_at(browser, page)
    return browser


def open_at(driver, page: Path, anchor: str = "") -> None:
    driver.get("about:blank")  # else an address that differs by its anchor alone does not load anew
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page.as_uri() + (f"#{anchor}" if anchor else ""))
    wait(driver, "document.readyState === 'complete' && document.querySelector('#count')?.textContent")


def wait(driver, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 20, 0.05).until(lambda d: d.execute_script(f"return {script}"))


def shown(driver) -> list[str]:
    """Last parts of the ids of the cards, or the reasons of what was dropped without one."""
    script = "return [...document.querySelectorAll('.card')].map(c => c.getAttribute('aria-label').split('/').pop())"
    return driver.execute_script(script)


def choose(driver, **values: str) -> list[str]:
    """Set filters, and return what is then shown."""
    for name, value in values.items():
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        driver.execute_script(script + "e.dispatchEvent(new Event('input', { bubbles: true }))", name, value)
        assert driver.execute_script("return document.getElementById(arguments[0]).value", name) == value
    return shown(driver)


def count(driver) -> str:
    return driver.execute_script("return document.getElementById('count').textContent")


def press(driver, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(key).perform()


def title(driver) -> str:
    return driver.execute_script("return document.querySelector('#one h2')?.textContent.split('/').pop() ?? ''")


def test_the_page_needs_no_network_and_what_shards_say_cannot_act_in_it(opened, page):
    cards = "return [...document.querySelectorAll('.card .caption')].map(c => c.textContent)"
    assert f"A woman says {EVIL}" in opened.execute_script(cards)
    opened.execute_script("location.hash = 'b'")
    wait(opened, "document.querySelector('#one .caption.whole')")
    assert opened.execute_script("return document.querySelector('.caption.whole').textContent").endswith(EVIL)
    wait(opened, "[...document.querySelectorAll('#one img')].every(i => i.complete && i.naturalWidth)")
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.endswith("parts/00000.js") for url in urls)
    assert {url.split(":")[0] for url in urls} <= {"file", "data", "blob", "about"}
    assert opened.execute_script("return [window.hacked, document.title]") == [None, EVIL]
    assert opened.get_log("browser") == []


def test_filters_leave_what_is_asked_for(opened):
    drops = ["film-1-000", "film-3-000", "v9"]
    assert shown(opened) == [*"abcde", *drops]
    assert choose(opened, query="dog BARKS") == ["a"]
    assert choose(opened, query="", status="dropped") == drops
    assert choose(opened, reason="motion filter: too still") == drops[:2]
    assert choose(opened, reason="", status="kept") == list("abcde")
    assert choose(opened, source="films") == ["c", "e"]
    assert choose(opened, split="held_out") == ["e"]
    assert choose(opened, split="", source="", category="singlehuman") == ["a", "b"]
    assert choose(opened, category="", number="2") == ["a"]
    assert choose(opened, number="1") == ["b", "c", "d"]  # c names two subjects and has a picture of one
    assert "1 of 2 subjects pictured" in opened.execute_script("return document.getElementById('cards').innerText")
    assert count(opened) == "3 of 5 samples, 0 of 3 drops"
    assert choose(opened, number="0") == ["e"]
    assert choose(opened, number="", origin="generated:flux") == ["a"]
    assert choose(opened, origin="", kind="person") == ["a", "b", "d"]
    assert choose(opened, kind="", licence="\0none") == ["d"]
    assert choose(opened, licence="", score="motion") == ["a", "c", "e"]
    assert choose(opened, least="0.3") == ["a", "e"]
    assert choose(opened, most="0.6") == ["a"]
    assert choose(opened, least="7") == []
    assert opened.find_element("id", "nothing").is_displayed()
    opened.find_element("id", "clear").click()
    wait(opened, "document.querySelectorAll('.card').length === 8")
    assert count(opened) == "5 samples, 3 drops"
    assert choose(opened, reason="motion filter: too still") == drops[:2]
    assert count(opened) == "0 of 5 samples, 2 of 3 drops"


def test_pictured_subjects_are_counted_as_the_statistics_count_them(opened, page):
    """On the page and in the tables."""
    statistics = count_all(Collection([str(page.parent.parent / "collection")]))
    counts = {str(number): samples for number, samples in statistics.subjects.items()}
    offered = "return [...document.querySelectorAll('#number option')].map(o => o.value).filter(Boolean)"
    assert {number: len(choose(opened, number=number)) for number in opened.execute_script(offered)} == counts


def test_a_page_of_some_says_of_how_many_samples_they_are_chosen(browser, page, tmp_path):
    some = Collection([str(page.parent.parent / "collection")])
    open_at(browser, write_page(tmp_path / "some", some, limit=2, with_drops=True))
    assert count(browser) == "2 samples (chosen from 5), 3 drops"
    assert not browser.find_element("id", "pager").is_displayed()  # all on one page
    assert len(choose(browser, status="dropped")) == 3
    assert count(browser) == "0 of 2 samples (chosen from 5), 3 drops"


def test_a_reference_says_what_it_is_compared_with(opened):
    """An augmented one is a copy of the subject's picture, and its likeness to that is no likeness to the clip."""
    opened.execute_script("location.hash = 'c'")
    wait(opened, "document.querySelector('.reference figcaption')")
    captions = "return [...document.querySelectorAll('.reference figcaption')].map(c => c.textContent)"
    (words,) = opened.execute_script(captions)
    assert words.startswith("augmented: a copy, moved and tinted · similarity 0.750 to what it was made of")


def test_orders_put_what_has_no_such_score_last(opened):
    choose(opened, status="kept")
    assert choose(opened, order="low aesthetic") == list("cabde")
    assert choose(opened, order="high motion")[:3] == list("eac")
    assert choose(opened, order="long") == list("ceabd")
    assert choose(opened, order="many")[0] in "ac"
    assert choose(opened, order="key") == [*"e", *"abcd"]  # of held_out, then of train


def test_the_table_of_reasons_leads_to_what_was_dropped_for_it(opened):
    opened.execute_script("document.getElementById('reasons').open = true")
    rows = "return [...document.querySelectorAll('#reasons tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    assert opened.execute_script(rows) == [["motion filter", "too still", "2"], ["source", "unreadable video", "1"]]
    assert opened.execute_script("return document.querySelector('#reasons summary').textContent") == "3 dropped: why"
    opened.find_elements("css selector", "#reasons tbody button")[1].click()
    wait(opened, "document.querySelectorAll('.card').length === 1")
    opened.find_element("css selector", ".card").click()
    wait(opened, "document.querySelector('#one dl')")
    assert opened.execute_script("return document.querySelector('#one dl').innerText").split("\n")[:6] == [
        *("step", "source", "reason", "unreadable video", "detail", "0 bytes")
    ]


@pytest.mark.parametrize("key", ["a", "b"])  # b is 4:4:4, which not every browser plays
def test_a_clip_plays_and_masks_belong_to_their_frame(browser, page, key):
    open_at(browser, page, key)
    wait(browser, "document.querySelector('#one video')?.readyState >= 2")
    over = "getComputedStyle(document.querySelector('.stage .mask')).display"
    assert browser.execute_script(f"return {over}") != "none"
    press(browser, " ")
    wait(browser, "document.querySelector('#one video').currentTime > 0.4")
    wait(browser, f"{over} === 'none'")
    press(browser, " ")
    wait(browser, "document.querySelector('#one video').paused")
    assert browser.execute_script("return document.querySelector('#one video').error") is None
    browser.execute_script("document.querySelector('#one video').currentTime = 0")
    wait(browser, f"{over} !== 'none'")


def test_masks_and_boxes_lie_where_the_subject_is(browser, page):
    open_at(browser, page, "a")
    wait(browser, "document.querySelector('.stage canvas')")
    pixels = """const c = document.querySelector('.stage canvas');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      return [c.width, c.height, Array.from({ length: c.width * c.height }, (_, n) => d[4 * n + 3])]"""
    width, height, alpha = browser.execute_script(pixels)
    drawn = np.array(alpha).reshape(height, width) > 0
    wanted = np.zeros((48, 64), bool)
    wanted[12:36, 4:20] = True  # rows and columns of the square in the clip's first frame
    assert np.array_equal(drawn, wanted)
    sides = "['x', 'y', 'width', 'height'].map(n => +document.querySelector('.stage rect').getAttribute(n))"
    assert browser.execute_script(f"return {sides}") == [4, 12, 16, 24]
    press(browser, "m")
    wait(browser, "getComputedStyle(document.querySelector('.stage canvas')).display === 'none'")


def test_the_caption_marks_each_subject_in_its_colour_as_a_whole_word(browser, page):
    open_at(browser, page, "a")
    wait(browser, "document.querySelector('.caption mark')")
    marks = browser.execute_script("return [...document.querySelectorAll('.caption mark')].map(m => m.textContent)")
    assert marks == ["A man", "the dog"]  # "his dog" is not what the subject is called
    colours = "return [...document.querySelectorAll('.caption mark')].map(m => m.style.getPropertyValue('--c'))"
    subjects = "return [...document.querySelectorAll('.subjects > li')].map(m => m.style.getPropertyValue('--c'))"
    assert browser.execute_script(colours) == browser.execute_script(subjects)
    words = browser.execute_script("return document.querySelector('.subjects').innerText")
    assert "other moment · similarity 0.750 · at 1.5 s · of film" in words


def test_keys_leaf_through_what_the_filters_leave(opened):
    from selenium.webdriver.common.keys import Keys

    choose(opened, source="OpenS2V-5M", status="kept")
    opened.execute_script("location.hash = 'a'")
    wait(opened, "document.querySelector('#one video')")
    press(opened, Keys.ARROW_RIGHT)
    wait(opened, "location.hash === '#b' && document.querySelector('#one h2').textContent.endsWith('/b')")
    press(opened, Keys.ARROW_RIGHT)  # the last one
    assert title(opened) == "b"
    press(opened, Keys.ARROW_LEFT)
    wait(opened, "document.querySelector('#one h2').textContent.endsWith('/a')")
    press(opened, Keys.ESCAPE)
    wait(opened, "document.getElementById('one').hidden")
    assert shown(opened) == ["a", "b"]
    assert opened.execute_script("return document.activeElement.getAttribute('href')") == "#a"
    press(opened, "/")
    press(opened, "walks")
    press(opened, Keys.ARROW_LEFT)  # moves in the text
    assert shown(opened) == ["a"]
    assert opened.execute_script("return document.getElementById('one').hidden")
    opened.execute_script("history.back()")
    wait(opened, "document.querySelector('#one h2')")


def test_an_address_leads_to_its_sample_and_a_strange_one_to_all(browser, page):
    open_at(browser, page, "c")
    wait(browser, "document.querySelector('#one h2')?.textContent === 'train/curated-000000/c'")
    assert browser.execute_script("return document.querySelector('#one .steps span').textContent") == "3 of 8"
    for strange in ("no-such-key", "%E0%A4%A", "%00"):
        open_at(browser, page, strange)
        assert browser.execute_script("return document.getElementById('one').hidden")
        assert len(shown(browser)) == 8
    assert browser.get_log("browser") == []


def test_a_phone_never_scrolls_sideways_and_dark_is_dark(page):
    with open_browser(360, 740, touch=True, dark=True) as driver:
        for anchor in ("", "b", "film-3-000"):
            open_at(driver, page, anchor)
            wait(driver, "document.querySelector('.card, #one h2')")
            assert driver.execute_script("return document.documentElement.scrollWidth") == 360
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
        assert driver.get_log("browser") == []


def test_every_control_and_picture_has_a_name(browser, page):
    unnamed = """return [...document.querySelectorAll('button, input, select, video, svg, canvas, img, a, [tabindex]')]
      .filter(e => e.id !== 'one' && !(e.getAttribute('aria-label') || e.textContent.trim() || e.alt ||
      e.closest('label')?.textContent.trim())).map(e => e.outerHTML)"""
    for anchor in ("", "a", "d"):
        open_at(browser, page, anchor)
        wait(browser, "document.querySelector('.card, #one .panel')")
        assert browser.execute_script(unnamed) == []


def test_five_thousand_samples_stay_fast_as_only_a_page_of_them_is_there(browser, page, tmp_path):
    """Their media are those of five samples; the details come in files of fifty, one of which is read."""
    text = (page.parent / "data.js").read_text()
    data = json.loads(text[text.index("{") : text.rindex(";")])
    rows = [data["samples"][n % 5] | {"key": f"k{n:04d}", "id": f"x/y/k{n:04d}", "words": n} for n in range(5000)]
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    for name in ("index.html", "page.css", "page.js"):
        (out / name).write_bytes((page.parent / name).read_bytes())
    (out / "media").symlink_to(page.parent / "media")
    (out / "data.js").write_text(f"window.IDC_DATA = {json.dumps(data | {'samples': rows, 'drops': []})}")
    details = (page.parent / "parts" / "00000.js").read_text()
    details = details[details.index("[") : details.rindex(")")]
    for n in range(5000 // PART_SIZE):
        (out / "parts" / f"{n:05d}.js").write_text(f"window.IDC_PART({n}, {json.dumps(json.loads(details) * 10)})")
    open_at(browser, out / "index.html")
    assert browser.execute_script("return document.querySelectorAll('.card').length") == 48
    assert browser.execute_script("return document.querySelectorAll('video').length") == 0
    assert choose(browser, order="words")[0] == "k4999"
    browser.find_element("id", "last").click()
    assert shown(browser)[-1] == "k0000"
    assert browser.execute_script("return document.getElementById('place').textContent") == "4993–5000 of 5,000"
    assert choose(browser, query="k2502") == ["k2502"]
    browser.find_element("css selector", ".card").click()
    wait(browser, "document.querySelector('#one .caption')")
    files = "return [...document.querySelectorAll('script[src^=parts]')].map(s => s.getAttribute('src'))"
    assert browser.execute_script(files) == ["parts/00050.js"]
    assert browser.execute_script("return document.querySelector('.caption').textContent") == "A red coat on a beach."


# What the page is made of -------------------------------------------------------------------------------------------


def test_a_page_of_one_sample_of_drops_alone_and_of_nothing(browser, tmp_path, capsys):
    one, drops = tmp_path / "one", tmp_path / "drops"
    write_samples(one, [{"key": "only", "caption": "x", "subjects": []}])
    assert main(["shards", "page", str(one), "--out", str(tmp_path / "p1")]) == 0
    assert "1 of 1 samples" in capsys.readouterr().out
    open_at(browser, tmp_path / "p1" / "index.html")
    assert shown(browser) == ["only"]
    drops.mkdir()
    (drops / "drops.jsonl").write_text('{"reason": "too short", "video": "v"}\nno json\n')
    assert main(["shards", "page", str(drops), "--out", str(tmp_path / "p2"), "--with-drops"]) == 0
    open_at(browser, tmp_path / "p2" / "index.html")
    assert shown(browser) == ["v"]
    assert main(["shards", "page", str(drops), "--out", str(tmp_path / "p3")]) == 0
    open_at(browser, tmp_path / "p3" / "index.html")
    assert browser.execute_script("return document.getElementById('nothing').textContent").startswith("There are no")
    assert browser.get_log("browser") == []
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert main(["shards", "page", str(tmp_path / "empty"), "--out", str(tmp_path / "p4")]) == 2
    assert "no shards here" in capsys.readouterr().err
    assert main(["shards", "page", str(one), "--out", str(tmp_path / "p5"), "--limit", "-1"]) == 2


def test_samples_that_cannot_be_read_are_shown_with_their_reason(browser, tmp_path):
    root = tmp_path / "toy"
    write_shards(root, 38, 36)
    build_index(root).save()
    reasons = {id.split("/")[-1]: reason for id, reason in corrupt(root).items()}
    restamp(root)
    open_at(browser, write_page(tmp_path / "out", Collection([str(root)])))
    assert len(shown(browser)) == 38
    bad = """return [...document.querySelectorAll('.card')].filter(c => c.querySelector('.tag.bad'))
      .map(c => [c.getAttribute('aria-label').split('/').pop(), c.querySelector('.picture').textContent])"""
    told = dict(browser.execute_script(bad))
    assert told.keys() == reasons.keys()
    assert all(reasons[key] in text for key, text in told.items())


def test_a_preference_pair_shows_its_worse_clip_too(browser, tmp_path):
    with ShardWriter(tmp_path / "pairs") as writer:
        size = {"frames": 9, "height": SIDE[0], "width": SIDE[1]}
        writer.write("pair", moving_clip(9), "x", fps=8, loser=moving_clip(9, 90, "yuv444p"), **size)
    build_index(tmp_path / "pairs").save()
    open_at(browser, write_page(tmp_path / "out", Collection([str(tmp_path / "pairs")])), "pair")
    wait(browser, "document.querySelectorAll('#one video').length === 2")
    wait(browser, "[...document.querySelectorAll('#one video')].every(v => v.readyState >= 1 && !v.error)")


def test_a_page_written_again_keeps_its_files_and_drops_those_of_others(tmp_path):
    write_collection(tmp_path / "collection")
    collection = Collection([str(tmp_path / "collection")])
    write_page(tmp_path / "out", collection)
    media = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "media").iterdir()}
    texts = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}
    (tmp_path / "out" / "media" / "mine.txt").write_text("not the page's")
    write_page(tmp_path / "out", collection)
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "media").iterdir()}
    assert {name: time for name, time in again.items() if name != "mine.txt"} == media
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.*")} == texts
    write_page(tmp_path / "out", collection, limit=1)
    left = {path.name for path in (tmp_path / "out" / "media").iterdir()}
    assert "mine.txt" in left
    assert len(left) == 5  # clip, frame and two references of the one sample
    assert not list((tmp_path / "out").rglob("*.part"))


def test_clips_that_not_every_browser_plays_are_encoded_anew():
    clip = moving_clip(9)
    assert plays_everywhere(clip)
    assert playable(clip, 8) is clip
    full = moving_clip(9, pixel_format="yuv444p")
    assert not plays_everywhere(full)
    made = playable(full, 8)
    assert plays_everywhere(made)
    info = probe(made)
    assert (info.frames, info.fps, info.height, info.width) == (9, 8, 48 * 6, 64 * 6)  # enlarged, as it is tiny
    small = decode_video(made)[:, 3::6, 3::6].astype(int)
    assert np.abs(small - decode_video(full).astype(int)).mean() < 4
    assert not plays_everywhere(b"no clip")

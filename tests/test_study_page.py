"""The questionnaire in a real browser: a whole one at a phone's width, by keyboard on a desktop, and offline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import find_browser, open_browser, reload
from _study import make_study

from idc.study.serve import StudyServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyServer]:
    find_browser()
    root = tmp_path_factory.mktemp("page")
    make_study(root, pairs=3)
    with StudyServer(root / "study", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server: StudyServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"


def until(driver: Any, script: str) -> Any:
    """What a JavaScript expression gives once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda d: d.execute_script(f"return {script}"))


def begin(driver: Any, server: StudyServer) -> None:
    driver.get(address(server))
    until(driver, "!document.getElementById('intro').hidden")
    driver.find_element("id", "consent").click()
    driver.find_element("id", "start").click()
    until(driver, "!document.getElementById('question').hidden")


def shown(driver: Any, number: int) -> None:
    until(driver, f"document.getElementById('where').textContent.startsWith('Pair {number} of 5')")


PLAYING = "[...document.querySelectorAll('video')].every(v => v.currentTime > 0 && !v.paused && v.muted && v.loop)"
SIZES = """[...document.querySelectorAll('button, .choices label')].filter(e => e.offsetParent)
    .map(e => e.getBoundingClientRect()).every(r => r.height >= 44 && r.width >= 44)"""


def test_a_whole_questionnaire_on_a_phone(server: StudyServer) -> None:
    before = len(server.store.answers())
    with open_browser(390, 844, touch=True) as driver:
        begin(driver, server)
        for number in range(1, 6):
            shown(driver, number)
            until(driver, PLAYING)
            assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            assert driver.execute_script(f"return {SIZES}")
            following = driver.find_element("id", "next")
            fieldsets = driver.find_elements("css selector", "fieldset")
            for place, fieldset in enumerate(fieldsets):
                assert not following.is_enabled()
                driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", fieldset)
                fieldset.find_elements("css selector", "label")[(number + place) % 3].click()
                if number == 2 and place == 1:
                    # Reloaded in the middle: the question and what is filled in stay.
                    reload(driver)
                    shown(driver, 2)
                    assert len(driver.find_elements("css selector", "#criteria input:checked")) == 2
                    break
            if number == 2:
                following = driver.find_element("id", "next")
                for fieldset in driver.find_elements("css selector", "fieldset")[2:]:
                    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", fieldset)
                    fieldset.find_elements("css selector", "label")[1].click()
            following.click()
        until(driver, "document.getElementById('done-text').textContent.startsWith('All your answers are saved')")
        rater = driver.current_url.partition("#")[2]
        session = server.store.session(rater)
        assert set(session["answers"]) == {question["id"] for question in session["questions"]}
        first = session["questions"][0]
        order = ("left", "tie", "right")
        given = [session["answers"][first["id"]]["choices"][c["key"]] for c in first["criteria"]]
        assert given == [order[(1 + place) % 3] for place in range(len(given))]
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        # Finished stays finished.
        reload(driver)
        until(driver, "!document.getElementById('done').hidden")
    assert len(server.store.answers()) == before + sum(len(q["criteria"]) for q in session["questions"])


def test_by_keyboard_with_a_way_back_and_while_the_network_is_gone(server: StudyServer) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        for key in keys:
            ActionChains(driver).send_keys(key).perform()

    with open_browser(1280, 900, dark=True) as driver:
        begin(driver, server)
        rater = driver.current_url.partition("#")[2]
        session = server.store.session(rater)
        first, second = session["questions"][:2]
        shown(driver, 1)
        press("1", "2", "3", *("1" * (len(first["criteria"]) - 3)), Keys.ENTER)
        shown(driver, 2)
        press(Keys.BACKSPACE)
        shown(driver, 1)
        assert len(driver.find_elements("css selector", "#criteria input:checked")) == len(first["criteria"])
        fieldset = driver.find_element("css selector", "fieldset")
        fieldset.find_elements("css selector", "label")[2].click()
        driver.find_element("id", "next").click()
        shown(driver, 2)
        until(driver, "document.getElementById('saved').textContent == 'Saved'")
        answers = server.store.session(rater)["answers"][first["id"]]
        assert list(answers["choices"].values()).count("right") == 2  # the changed one and the third
        assert answers["revision"] == 2

        driver.set_network_conditions(offline=True, latency=0, throughput=0)
        press(*("2" * len(second["criteria"])), Keys.ENTER)
        shown(driver, 3)
        until(driver, "document.getElementById('saved').textContent.startsWith('Not saved yet')")
        assert second["id"] not in server.store.session(rater)["answers"]
        driver.set_network_conditions(offline=False, latency=0, throughput=10_000_000)
        until(driver, "document.getElementById('saved').textContent == 'Saved'")
        assert set(server.store.session(rater)["answers"][second["id"]]["choices"].values()) == {"tie"}

        # The address alone brings a rater back, on any device.
        driver.execute_script("localStorage.clear()")
        driver.get("about:blank")
        driver.get(f"{address(server)}#{rater}")
        shown(driver, 3)


def test_a_video_that_does_not_play_can_be_skipped(tmp_path: Path) -> None:
    find_browser()
    study = make_study(tmp_path, pairs=1, repeats=0, catches=0)
    for name in study.sizes:
        (tmp_path / "study/public/media" / name).write_bytes(b"not a video")
    with StudyServer(tmp_path / "study", port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            with open_browser(390, 844, touch=True) as driver:
                begin(driver, server)
                until(driver, "!document.getElementById('unplayable').hidden")
                driver.execute_script("document.getElementById('unplayable').scrollIntoView({block: 'center'})")
                driver.find_element("id", "unplayable").click()
                until(driver, "document.getElementById('done-text').textContent.startsWith('All your answers')")
            assert {answer.choice for answer in server.store.answers()} == {"skip"}
        finally:
            server.shutdown()
            thread.join()

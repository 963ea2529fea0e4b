"""Captions: what is taken for one, what becomes of given ones, and servers that fail."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _judge_server import Server, chat, chat_server
from _scripted import GOOD, Scripted, candidate, one
from _tiny_judges import save_qwen_judge
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.curate import prose
from idc.curate.candidate import Candidate, Dropped
from idc.curate.captions import Caption
from idc.curate.chunks import FAULTS, Encoding, Work
from idc.curate.parts import Count, Outcomes
from idc.curate.prose import (
    CaptionError,
    check_caption,
    cut_at_sentence,
    plain_text,
    repeated_share,
    without_emphasis,
    words_of,
)
from idc.curate.reaching import UNREACHED
from idc.curate.words import SubjectWords
from idc.errors import UserError
from idc.models.judges import ImageTextJudge, JudgeError


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as running:
        yield running


# What is a caption


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        (GOOD, GOOD),
        ("```text\n" + GOOD + "\n```", GOOD),
        ("Sure! Here is the caption for the video:\n\n" + GOOD, GOOD),
        ("**Caption:** " + GOOD, GOOD),
        ("“" + GOOD + "”", GOOD),
        ("# Scene\n- A *cat* sleeps.\n- It [wakes](http://x.y).", "Scene A cat sleeps. It wakes."),
        ("Sure-footed goats climb a cliff.", "Sure-footed goats climb a cliff."),
        ("Okay signs hang here: two of them.", "Okay signs hang here: two of them."),
        ("a\x00b\u200bc\ufeff \n\t d", "ab\u200bc\ufeff d"),
        ("Cafe\u0301 on a street", "Café on a street"),
        ('He says "no" and "yes"', 'He says "no" and "yes"'),
        ("5 * 3 * 2 snake_case_name", "5 * 3 * 2 snake_case_name"),
        (" \n ", ""),
    ],
)
def test_answers_become_plain_text_and_plain_text_stays(answer: str, plain: str) -> None:
    assert plain_text(answer) == plain
    assert plain_text(plain) == plain


EMPHASIS = re.compile(r"(\*{1,3}|_{2,3}|`+|~~)(?=\S)(.+?)(?<=\S)\1", re.DOTALL)


@settings(max_examples=500, deadline=None)
@given(st.text("**__``~~ab \n\u2003", max_size=16))
def test_emphasis_goes_as_an_expression_would_take_it_away(text: str) -> None:
    assert without_emphasis(text) == EMPHASIS.sub(r"\2", text)


@pytest.mark.parametrize("unit", ["*a ", "`a `", "__a ", "~~a ~", " *", "a** ", "***a **b *c "])
def test_marks_without_a_partner_are_looked_for_once(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of many asked each of them to search the rest of the answer."""
    searches: list[int] = []

    def counted(text: str, mark: str, start: int) -> int:
        end = partner(text, mark, start)
        searches.append((end if end >= 0 else len(text)) - start)
        return end

    partner = prose._partner
    monkeypatch.setattr(prose, "_partner", counted)
    text = (unit * 5000)[:5000]
    assert prose.without_emphasis(text) == EMPHASIS.sub(r"\2", text)
    assert sum(searches) <= 4 * len(text)  # characters looked at


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no caption"),
        ("... !!! ---", "no caption"),
        ("I'm sorry, but I can't help with that video.", "caption refused"),
        ("As an AI language model, I cannot see videos.", "caption refused"),
        ("I cannot identify people in this video, sorry about that.", "caption refused"),
        ("A man walks down the street. " * 9, "caption repeats itself"),
        ("A man walks down the the the the the the street with a dog", "caption repeats itself"),
        ("Ein Mann mit rotem Mantel geht durch einen Park, daneben eine Frau.", "caption in another language"),
        ("一个穿红衣的男人牵着一只棕色的狗穿过公园。", "caption in another language"),
        ("Человек в красном пальто идёт по парку с собакой.", "caption in another language"),
        ("A man walks.", "caption too short"),
    ],
)  # fmt: skip
def test_what_is_no_caption_is_told_by_its_reason(text: str, reason: str) -> None:
    with pytest.raises(CaptionError) as error:
        check_caption(text, 8, "en")
    assert error.value.reason == reason


def test_good_captions_pass_in_any_language_that_is_allowed() -> None:
    check_caption(GOOD, 8, "en")
    check_caption("A café owner, naïve but kind, pours the crème into a cup on the table.", 8, "en")
    check_caption("一个穿红衣的男人牵着一只棕色的狗穿过公园。", 8, "any")
    assert repeated_share(words_of(GOOD)) == 0


def test_repeated_share_counts_runs_by_hand() -> None:
    for period in (1, 2, 5):
        words = [f"w{i % period}" for i in range(40)]
        assert repeated_share(words) == pytest.approx(1 - period / 37)


def test_a_cut_is_the_longest_beginning_of_whole_sentences() -> None:
    text = "One two three. Four costs 3.50 now! Five? " + "six " * 50
    assert cut_at_sentence(text, 100, 1000) == "One two three. Four costs 3.50 now! Five?"
    assert cut_at_sentence(text, 8, 1000) == "One two three. Four costs 3.50 now!"
    assert cut_at_sentence(text, 100, 20) == "One two three."
    assert cut_at_sentence(text, 2, 1000) == ""
    assert cut_at_sentence("猫が走る。犬も走る。", 4, 99) == "猫が走る。"


# The step


def long_caption() -> str:
    """5,000 characters of sentences, none said before."""
    draw, text = np.random.default_rng(0), ""
    while len(text) < 5000:
        a, b, c, d = ("".join(map(chr, draw.integers(97, 123, 6))) for _ in range(4))
        text += f"The {a} {b} is near a {c} in the {d}. "
    return text[:5000]


def test_a_caption_of_5000_characters_is_cut_behind_a_sentence_or_dropped() -> None:
    text = long_caption()
    cut = one(Caption(Scripted(text), max_words=100)([candidate()])).caption
    assert text.startswith(cut)
    assert cut.endswith(".")
    assert 80 < len(words_of(cut)) <= 100
    dropped = one(Caption(Scripted(text), long="drop")([candidate()]))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "caption too long"
    assert "5" in dropped.detail
    run_on = one(Caption(Scripted("the " + " ".join(f"word{i} of" for i in range(600))))([candidate()]))
    assert run_on.reason == "caption too long"  # no sentence ends within the limit
    kept = one(Caption(Scripted(JudgeError("down")))([candidate(caption=text)]))
    assert len(kept.caption) <= 2000
    assert kept.meta["caption"]["by"] == "given"


@pytest.mark.parametrize(
    ("given", "answer", "caption", "by"),
    [
        ("keep", GOOD, "Mia waves.", "given"),
        ("combine", GOOD, "Mia waves. " + GOOD, "both"),
        ("replace", GOOD, GOOD, "judge"),
        ("combine", "I'm sorry.", "Mia waves.", "given"),
        ("replace", JudgeError("down"), "Mia waves.", "given"),
    ],
)
def test_given_captions_are_kept_combined_or_replaced(given: str, answer: Any, caption: str, by: str) -> None:
    judge = Scripted(answer)
    outcome = one(Caption(judge, given=given)([candidate(caption=" Mia\nwaves. ")]))
    assert outcome.caption == caption
    assert outcome.meta["caption"]["by"] == by
    assert len(judge.asked) == (given != "keep")
    if by != "given":
        assert outcome.meta["caption"] == {"by": by, "model": "scripted", "given": " Mia\nwaves. "}
    elif given != "keep":
        assert outcome.meta["caption"]["failure"]


def test_who_wrote_a_caption_of_earlier_shards_stays_named_as_long_as_it_stays() -> None:
    was = candidate(caption="Mia waves.").changed(models={"caption": "a writer"})
    for rule, writer in (("keep", "a writer"), ("replace", "scripted")):
        outcomes = Outcomes([("films", "a")], [Count("source")], [], [was])
        work = Work((), (), Encoding(), "")
        (outcome,) = work.through([Caption(Scripted(GOOD), given=rule)], outcomes).candidates
        assert outcome.models == {"caption": writer}


def test_a_given_caption_that_is_none_is_written_anew_or_both_faults_are_told() -> None:
    looped = "yes " * 300
    outcome = one(Caption(Scripted(GOOD))([candidate(caption=looped)]))
    assert outcome.caption == GOOD
    assert "repeats" in outcome.meta["caption"]["fault"]
    dropped = one(Caption(Scripted(""))([candidate(caption=looped)]))
    assert (dropped.reason, dropped.step) == ("no caption", "caption")
    assert "repeats itself" in dropped.detail


def test_the_judge_sees_frames_over_the_clip_and_another_question_for_a_still() -> None:
    class Looking(Scripted):
        def answers(self, images: Any, prompt: str, seeds: Any) -> list[str]:
            self.seen = [(image.shape, int(image[0, 0, 0])) for image in images]
            return super().answers(images, prompt, seeds)

    clip = np.zeros((9, 40, 100, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
    judge = Looking(GOOD)
    step = Caption(judge, frames=3, prompt="video?", picture_prompt="picture?", side=50)
    one(step([replace(candidate(), clip=clip)]))
    assert judge.seen == [((20, 50, 3), 0), ((20, 50, 3), 4), ((20, 50, 3), 8)]
    one(step([replace(candidate(), clip=clip[:1])]))
    assert [prompt for _, prompt in judge.asked] == ["video?", "picture?"]
    assert judge.asked[1][0] == 1


def test_a_real_model_writes_the_same_captions_in_any_company_and_travels_light(tmp_path: Path) -> None:
    judge = ImageTextJudge(save_qwen_judge(tmp_path, talkative=True), dtype="float32", max_tokens=20)
    # Its words are random: whatever has words and is no loop is a caption here.
    step = Caption(judge, frames=2, prompt="Describe", min_words=1, max_words=20, language="any", side=48)
    clips = np.random.default_rng(0).integers(0, 256, (6, 5, 32, 48, 3), dtype=np.uint8)
    some = [replace(candidate(number), clip=clip) for number, clip in enumerate(clips)]

    def told(outcomes: Any) -> list[Any]:
        return [(o.caption, o.meta) if isinstance(o, Candidate) else o for (o,) in outcomes]

    step.load()
    whole = told(step(some))
    assert whole == [told(step([c]))[0] for c in some] == told(step(some[::-1]))[::-1]
    assert len({o[0] for o in whole if isinstance(o, tuple)}) > 1
    assert {o.reason for o in whole if isinstance(o, Dropped)} <= {"no caption", "caption repeats itself"}
    (model,) = step.models
    assert judge.name in model
    assert judge.fingerprint in model
    light = pickle.dumps(step)
    assert len(light) < 20_000
    step.unload()
    assert judge._model is None
    assert told(pickle.loads(light)(some)) == whole


def answer_by_picture(barrier: threading.Barrier | None = None) -> Any:
    """A script that writes the brightness of the first picture into the caption."""

    def script(index: int, body: dict[str, Any]) -> Any:
        from PIL import Image

        if barrier is not None:
            barrier.wait(10)
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        value = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))[0, 0, 0]
        return chat(f"In the dim light of the room a lamp of strength {value} is on the table.")

    return script


def test_requests_go_side_by_side_and_answers_stay_with_their_clips(server: Server) -> None:
    server.script = answer_by_picture(threading.Barrier(3))  # nobody is answered before three have asked
    step = Caption(server.judge(concurrency=3, max_tokens=512), frames=2)
    some = [candidate(number) for number in (10, 20, 30, 40, 50, 60)]
    captions = [outcome.caption for (outcome,) in step(some)]
    assert [int(words_of(c)[11]) for c in captions] == [10, 20, 30, 40, 50, 60]
    assert server.most_under_way == 3
    server.script = answer_by_picture()
    assert [one(step([c])).caption for c in some] == captions


def faulty(kind: str) -> Any:
    return {
        "429": lambda i, body: (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        "500": lambda i, body: (500, {}, b"oops"),
        "garbage": lambda i, body: b"<html>\xff\xfe not json",
        "another JSON": lambda i, body: {"choices": []},
        "half": lambda i, body: (200, {"Content-Length": "5000"}, b'{"choices": ['),
        "empty": lambda i, body: chat(""),
        "null": lambda i, body: chat(None),
        "cut": lambda i, body: chat("A man walks and", finish="length"),
        "filter": lambda i, body: chat("", finish="content_filter"),
        "refusal": lambda i, body: chat(None, refusal="no"),
    }[kind]


KINDS = ("429", "500", "garbage", "another JSON", "half", "empty", "null", "cut", "filter", "refusal")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_fails_for_ever_drops_the_clip_with_a_reason(server: Server, kind: str) -> None:
    server.script = faulty(kind)
    step = Caption(server.judge(tries=2, timeout=5.0, max_tokens=512), frames=1)
    dropped = one(step([candidate()]))
    assert isinstance(dropped, Dropped)
    passing = kind in ("429", "500", "garbage", "half")
    assert dropped.reason == (UNREACHED if passing else "no caption")
    assert (dropped.reason in FAULTS) == passing  # what is done again, and stops a run
    assert dropped.detail
    assert len(server.requests) == (2 if passing else 1)


@pytest.mark.parametrize("given", ["replace", "combine"])
@pytest.mark.parametrize("words", [False, True])
def test_a_server_that_is_down_is_no_reason_to_take_something_else(server: Server, given: str, words: bool) -> None:
    server.script = faulty("500")
    judge = server.judge(tries=1, max_tokens=512)
    step = SubjectWords(judge) if words else Caption(judge, frames=1, given=given)
    dropped = one(step([replace(candidate(), caption=GOOD)]))
    assert isinstance(dropped, Dropped)
    assert dropped.reason in FAULTS


@pytest.mark.parametrize("kind", ["429", "500", "garbage", "half"])
def test_a_server_that_recovers_is_asked_again(server: Server, kind: str) -> None:
    fault = faulty(kind)
    server.script = lambda i, body: fault(i, body) if i < 2 else chat(GOOD)
    step = Caption(server.judge(tries=3, timeout=5.0, max_tokens=512), frames=1)
    assert one(step([candidate()])).caption == GOOD
    assert len(server.requests) == 3


def test_a_silent_server_is_given_up_and_the_others_are_answered(server: Server) -> None:
    def script(i: int, body: dict[str, Any]) -> Any:
        reply = answer_by_picture()(i, body)
        if "strength 7 " in reply["choices"][0]["message"]["content"]:
            server.release.wait(20)
        return reply

    server.script = script
    step = Caption(server.judge(tries=1, timeout=0.5, concurrency=2, max_tokens=512), frames=1)
    outcomes = [outcome for (outcome,) in step([candidate(7), candidate(9)])]
    server.release.set()
    assert isinstance(outcomes[0], Dropped)
    assert "no answer within 0.5 s" in outcomes[0].detail
    assert "strength 9 " in outcomes[1].caption


def test_a_key_that_is_refused_ends_the_run_and_is_never_shown(server: Server, monkeypatch: Any) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    server.script = lambda i, body: (401, {}, {"error": {"message": "bad key sk-secret"}})
    step = Caption(server.judge(max_tokens=512), frames=1)
    with pytest.raises(UserError, match="TEST_KEY") as error:
        step([candidate()])
    assert "sk-secret" not in str(error.value)
    assert b"sk-secret" not in pickle.dumps(step)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret"


def test_a_server_that_moves_does_not_change_what_the_settings_say() -> None:
    from idc.models.judge_server import ServerJudge

    one, other, third = (
        Caption(ServerJudge(url, model, timeout=timeout, max_tokens=512)).describe()
        for url, model, timeout in (("http://a/v1", "m", 5), ("http://b/v1", "m", 9), ("http://a/v1", "n", 5))
    )
    assert one == other != third
    assert json.dumps(one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"max_words": 3}, "max_words=3"),
        ({"given": "keeps"}, "did you mean 'keep'"),
        ({"long": "off"}, "long='off'"),
        ({"language": "fr"}, "language='fr'"),
        ({"judge": ImageTextJudge("x/y")}, "max_tokens=64"),
    ],
)
def test_caption_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Caption(**{"judge": Scripted(GOOD), **settings})

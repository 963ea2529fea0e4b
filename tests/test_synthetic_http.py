"""Hosted image models over real sockets: what servers do wrong, what is paid and when, and that the key stays put."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _judge_server import Server, chat_server
from _people import driver
from _server import join, launch
from _synthetic_worker import SIZE, ask_all, given
from PIL import Image

from idc.curate.candidate import Candidate, CuratedSubject, Reference, encode_png
from idc.curate.reaching import UNREACHED, UnreachedError
from idc.curate.synthetic.editors import EditError
from idc.curate.synthetic.hosted import HostedEditor
from idc.curate.synthetic.protocols import Asked, OpenAIEdits
from idc.curate.synthetic.spending import Ledger
from idc.curate.synthetic.step import Synthesise
from idc.errors import UserError
from idc.models.http_client import HttpClient

KEY = "sk-7f3a9c1e5b2d8046aa51c7e9d3b6f082"


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as running:
        running.script = lambda i, body: drawn(body)
        yield running


@pytest.fixture
def editor(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HostedEditor]:
    monkeypatch.setenv("TEST_KEY", KEY)

    def make(**settings: Any) -> HostedEditor:
        settings = {"pause": 0.0, "timeout": 10.0, "api_key_env": "TEST_KEY", **settings}
        return HostedEditor(server.url, "a-model", **{"store": str(tmp_path / "store"), **settings})

    return make


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def gemini(
    picture: bytes, mime: str = "image/png", tokens: tuple[int, int] = (0, 0), **candidate: Any
) -> dict[str, Any]:
    part = {"inlineData": {"mimeType": mime, "data": base64.b64encode(picture).decode()}}
    usage = {"promptTokenCount": tokens[0], "candidatesTokenCount": tokens[1]}
    answer = {"content": {"parts": [{"text": "Here it is."}, part]}, "finishReason": "STOP", **candidate}
    return {"candidates": [answer], "usageMetadata": usage, "modelVersion": "a-model-001"}


def drawn(body: dict[str, Any]) -> dict[str, Any]:
    """An answer whose pixels depend on the request's seed, and on nothing else."""
    return gemini(png(body["generationConfig"]["seed"]))


def png(seed: int, size: tuple[int, int] = (80, 70), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def ask(editor: HostedEditor, seed: int = 0, prompt: str = "a cat") -> np.ndarray:
    return editor.edit([given(0)], prompt, seed, SIZE)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_gemini_gets_prompt_pictures_and_seed_and_its_picture_comes_back(server, editor):
    made = editor().edit([given(1), given(2)], "both in a boat", 2**40 + 5, (90, 160))
    np.testing.assert_array_equal(made, pixels(png((2**40 + 5) % 2**31)))
    path, headers, body = server.requests[0]
    assert path == "/v1/models/a-model:generateContent"
    assert lower(headers)["x-goog-api-key"] == KEY
    assert "authorization" not in lower(headers)
    text, *pictures = body["contents"][0]["parts"]
    assert text == {"text": "both in a boat"}
    sent = [pixels(base64.b64decode(part["inline_data"]["data"])) for part in pictures]
    np.testing.assert_array_equal(sent[0], given(1))
    np.testing.assert_array_equal(sent[1], given(2))
    assert {part["inline_data"]["mime_type"] for part in pictures} == {"image/png"}
    assert body["generationConfig"]["imageConfig"] == {"aspectRatio": "16:9"}


def test_openai_gets_a_multipart_form_that_a_parser_reads_back(server, editor):
    server.script = lambda i, body: {"data": [{"b64_json": base64.b64encode(png(3)).decode()}]}
    extra = {"quality": "high", "n": None, "seed": 7}
    made = editor(protocol="openai", extra=extra).edit([given(1), given(2)], 'a "quoted"\r\n--x name', 3, (1500, 1000))
    np.testing.assert_array_equal(made, pixels(png(3)))
    path, headers, body = server.requests[0]
    assert path == "/v1/images/edits"
    assert headers["Authorization"] == f"Bearer {KEY}"
    parts = form(headers["Content-Type"], body["raw"])
    fields = {name: data.decode() for name, kind, data in parts if kind == "text/plain"}
    expected = {
        "model": "a-model",
        "prompt": 'a "quoted"\r\n--x name',
        "size": "1024x1536",
        "quality": "high",
        "seed": "7",
    }
    assert fields == expected
    files = [(name, kind, pixels(data)) for name, kind, data in parts if kind != "text/plain"]
    assert [(name, kind) for name, kind, _ in files] == [("image[]", "image/png")] * 2
    np.testing.assert_array_equal(files[1][2], given(2))


def form(kind: str, body: bytes) -> list[tuple[str, str, bytes]]:
    """(name, type, content) of each part, by the standard library's own parser."""
    from email.parser import BytesParser
    from email.policy import HTTP

    whole = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    return [
        (part.get_param("name", header="content-disposition"), part.get_content_type(), part.get_payload(decode=True))
        for part in whole.iter_parts()
    ]


def test_429_is_waited_out_as_the_server_asks(server, editor):
    server.script = lambda i, body: (429, {"Retry-After": "7"}, {"error": "slow down"}) if i < 2 else drawn(body)
    client, waits = editor(), []
    client.ask = partial(client.ask, sleep=waits.append)
    np.testing.assert_array_equal(ask(client, 4), pixels(png(4)))
    assert waits == [7.0, 7.0]
    assert (client.spending.requests, client.spending.pictures, client.spending.unsettled) == (3, 1, 0)


def test_500_for_ever_fails_after_all_tries_and_is_asked_again_by_the_next_run(server, editor):
    server.script = lambda i, body: (500, {}, b"oops")
    with pytest.raises(UnreachedError, match=r" 3 tries.*500"):
        ask(editor(tries=3))
    assert len(server.requests) == 3
    server.script = lambda i, body: drawn(body)
    np.testing.assert_array_equal(ask(editor()), pixels(png(0)))


def test_a_server_that_is_down_stops_the_run(server, editor):
    server.script = lambda i, body: (503, {}, b"down")
    client = editor(tries=1, give_up_after=3)
    for seed in range(2):
        with pytest.raises(UnreachedError):
            ask(client, seed)
    with pytest.raises(UserError, match=r"3 requests in a row had no answer.*503"):
        ask(client, 2)
    server.script = lambda i, body: (503, {}, b"down") if i % 2 else drawn(body)
    client = editor(tries=1, give_up_after=2)
    for seed in range(3):  # every other one is answered: it goes on
        with pytest.raises(UnreachedError):
            ask(client, 10 * seed)
        ask(client, 10 * seed + 1)


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b"<html>not here</html>", "2 tries; .*not a whole JSON answer"),
    "half of it": (json.dumps(gemini(b"x"))[:-9].encode(), "2 tries; .*not a whole JSON answer"),
    "null": (None, "no picture: the reply is not of protocol"),
    "nothing": ({}, "no picture: the reply is not of protocol"),
    "no candidates": ({"candidates": []}, "no picture: the reply is not of protocol"),
    "words alone": ({"candidates": [{"content": {"parts": [{"text": "I cannot"}]}}]}, "no picture: 'STOP: I cannot'"),
    "wrong type": (gemini(b"%PDF", "application/pdf"), "no picture: .*application/pdf"),
    "not base64": ({"candidates": [{"content": {"parts": [{"inlineData": {"mimeType": "image/png", "data": "%%"}}]}}]},
                   "no picture: the picture is no base64"),
    "type belies content": (gemini(b"%PDF"), "unusable picture: no picture"),
    "GIF": (gemini(png(0, kind="GIF")), "unusable picture: is GIF"),
    "cut short": (gemini(png(0)[:3000]), "unusable picture"),
    "too small": (gemini(png(0, (63, 200))), "unusable picture: 200 x 63 pixels"),
    "bomb": (gemini(png(0, (1, 1)).replace(b"\0\0\0\1\0\0\0\1", b"\0\0\xff\xff\0\0\xff\xff")), "unusable picture"),
    "safety": (gemini(b"", content={"parts": []}, finishReason="IMAGE_SAFETY"), "refused: 'IMAGE_SAFETY"),
    "blocked prompt": ({"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}, "refused: .*PROHIBITED_CONTENT"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails_its_request_alone_with_a_reason(server, editor, name):
    answer, message = WRONG[name]
    server.script = lambda i, body: answer if body["generationConfig"]["seed"] == 1 else drawn(body)
    client = editor(tries=2)
    away = message.startswith("2 tries")
    kind = UnreachedError if away else EditError
    with pytest.raises(kind, match=message) as caught:
        ask(client, 1)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    np.testing.assert_array_equal(ask(client, 2), pixels(png(2)))
    asked = len(server.requests)
    with pytest.raises(kind, match=message):  # what was answered is not asked again, a fault is
        ask(editor(tries=2), 1)
    assert len(server.requests) - asked == (2 if away else 0)


def test_sketches_on_the_way_to_a_picture_are_not_the_picture(server, editor):
    reply = gemini(png(5))
    sketch = {"thought": True, **gemini(png(6))["candidates"][0]["content"]["parts"][1]}
    reply["candidates"][0]["content"]["parts"] += [sketch]
    server.script = lambda i, body: reply
    np.testing.assert_array_equal(ask(editor()), pixels(png(5)))


@pytest.mark.parametrize(
    ("protocol", "status", "error", "raised", "message"),
    [
        ("openai", 400, {"code": "moderation_blocked", "message": "not this"}, EditError, "refused: status 400"),
        ("openai", 400, {"code": "unknown_parameter", "message": "no size"}, EditError, "no answer: status 400"),
        ("openai", 429, {"code": "insufficient_quota", "message": "pay"}, UserError, "no request will be answered"),
        ("openai", 401, {"code": "x", "message": "no"}, UserError, "the key in TEST_KEY.*another API key"),
        (
            "gemini",
            400,
            {"status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]},
            UserError,
            "TEST_KEY",
        ),
        ("gemini", 404, {"message": "no such model"}, UserError, "model='a-model'"),
    ],
)
def test_statuses_mean_what_their_codes_say(server, editor, protocol, status, error, raised, message):
    server.script = lambda i, body: (status, {}, {"error": error})
    with pytest.raises(raised, match=message):
        ask(editor(protocol=protocol))
    assert len(server.requests) == 1
    if message.startswith("refused"):
        with pytest.raises(EditError, match=message):
            ask(editor(protocol=protocol))
        assert len(server.requests) == 1


def test_a_silent_server_times_out_and_may_have_billed(server, editor):
    def silent(i: int, body: dict[str, Any]) -> Any:
        server.release.wait()
        return drawn(body)

    server.script = silent
    client = editor(timeout=0.2, tries=2, price_per_picture=0.5)
    with pytest.raises(UnreachedError, match=r"within 0\.2 s"):
        ask(client)
    assert (client.spending.unsettled, client.spending.cost) == (2, 1.0)


def test_a_server_that_is_not_there_bills_nothing(tmp_path, editor, server):
    server.http.shutdown()
    server.http.server_close()
    client = editor(tries=2, price_per_picture=0.5)
    with pytest.raises(UnreachedError, match="connection lost"):
        ask(client)
    assert (client.spending.requests, client.spending.cost) == (2, 0.0)


def test_cost_is_pictures_and_tokens_at_their_prices(server, editor, tmp_path):
    refused = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 1000}}
    server.script = lambda i, body: refused if i == 2 else gemini(png(i), tokens=(1000, 2000))
    prices = {"price_per_picture": 0.25, "price_per_million_input_tokens": 2, "price_per_million_output_tokens": 30}
    client = editor(**prices)
    ask(client, 0)
    ask(client, 1)
    with pytest.raises(EditError, match="refused"):
        ask(client, 2)
    spent = client.spending
    assert (spent.requests, spent.pictures, spent.input_tokens, spent.output_tokens) == (3, 2, 3000, 4000)
    assert spent.cost == pytest.approx(2 * 0.25 + 3000 * 2e-6 + 4000 * 30e-6)
    report = json.loads((tmp_path / "store" / "spending.json").read_text())
    assert report["cost"] == pytest.approx(spent.cost)
    assert "3 requests, 2 pictures, cost 0.63" in str(spent)


def test_the_limit_holds_over_processes_and_what_was_paid_for_is_still_there(server, editor, tmp_path, monkeypatch):
    settings = {"price_per_picture": 1.0, "max_cost": 3.5}
    outs = [tmp_path / "a", tmp_path / "b"]
    calls = []
    for out in outs:
        out.mkdir()
        calls.append((server.url, str(tmp_path / "store"), str(out), 6, settings))
    assert join(launch(ask_all, calls)) == [0, 0]
    assert len(server.requests) == 3  # both ask for the same six: each is paid once
    stops = [(out / "stopped.txt").read_text() for out in outs]
    assert all(re.search(r"max_cost=3\.5: .*cost 3\.00; another request at up to 1 might exceed it", s) for s in stops)
    client = editor(**settings)
    for seed in range(3):
        client.edit([given(seed)], f"picture {seed}", seed, SIZE)
    with pytest.raises(UserError, match="max_cost"):
        client.edit([given(3)], "picture 3", 3, SIZE)
    assert len(server.requests) == 3


def test_who_asks_the_same_meanwhile_waits_for_the_one_answer(server, editor):
    second = threading.Event()

    def answer(i: int, body: dict[str, Any]) -> Any:
        if i:
            second.set()
        else:
            second.wait(0.5)  # time enough for one who does not wait
        return drawn(body)

    server.script = answer
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda client: ask(client), [editor(), editor()])
    np.testing.assert_array_equal(one, other)
    assert len(server.requests) == 1


def test_a_killed_run_pays_once_for_what_was_answered_and_ends_in_the_same_bytes(server, tmp_path):
    reached, count = threading.Event(), 6

    def hold_the_fourth(i: int, body: dict[str, Any]) -> Any:
        if i == 3:
            reached.set()
            server.release.wait()
        return drawn(body)

    server.script = hold_the_fourth
    folders = {name: tmp_path / name for name in ("killed", "again", "undisturbed", "offline")}
    for folder in folders.values():
        folder.mkdir()
    store, settings = str(tmp_path / "store"), {"price_per_picture": 1.0}
    (process,) = launch(ask_all, [(server.url, store, str(folders["killed"]), count, settings)])
    assert reached.wait(60)
    process.kill()
    process.join()
    server.release.set()

    def run(name: str, store: str) -> None:
        assert join(launch(ask_all, [(server.url, store, str(folders[name]), count, settings)])) == [0]

    run("again", store)
    asked = [body["contents"][0]["parts"][0]["text"] for _, _, body in server.requests]
    assert asked == [f"picture {n}" for n in (0, 1, 2, 3, 3, 4, 5)]
    spent = Ledger(Path(store)).read()
    assert (spent.requests, spent.pictures, spent.unsettled, spent.cost) == (7, 6, 1, 7.0)

    run("undisturbed", str(tmp_path / "other"))
    paid = len(server.requests)
    run("offline", store)
    assert len(server.requests) == paid
    files = {name: {file.name: file.read_bytes() for file in folders[name].iterdir()} for name in folders}
    assert len(files["again"]) == count
    assert files["again"] == files["undisturbed"] == files["offline"]
    assert files["killed"].items() < files["again"].items()


def test_a_damaged_answer_is_asked_for_again(server, editor, tmp_path):
    client = editor()
    first = ask(client)
    (file,) = (tmp_path / "store").glob("*.answer")
    data = file.read_bytes()
    for damaged in (b"", data[:-1], data[:20], data[:-9] + b"X" + data[-8:]):
        file.write_bytes(damaged)
        np.testing.assert_array_equal(ask(client), first)
        assert file.read_bytes() == data
    assert len(server.requests) == 5


def test_another_model_prompt_picture_seed_size_or_setting_is_another_request(server, editor):
    ask(editor(), 1)
    variants = [
        lambda: ask(editor(), 2),
        lambda: ask(editor(), 1, "a dog"),
        lambda: editor().edit([given(1)], "a cat", 1, SIZE),
        lambda: editor().edit([given(0), given(0)], "a cat", 1, SIZE),
        lambda: editor().edit([given(0)], "a cat", 1, (64, 128)),
        lambda: ask(editor(extra={"temperature": 0.5}), 1),
    ]
    for n, variant in enumerate(variants):
        variant()
        assert len(server.requests) == n + 2
    ask(editor(timeout=9.0, tries=1, concurrency=1, price_per_picture=3.0), 1)  # patience and prices are not
    assert len(server.requests) == 7


def test_the_step_asks_side_by_side_and_a_second_run_needs_no_server(server, editor):
    """Two frames of one clip as what a model might answer: the same man, or the very picture."""
    gate = threading.Barrier(4)

    def answer(i: int, body: dict[str, Any]) -> Any:
        if i < 4:
            gate.wait(30)  # four are under way at once, or this breaks
        return gemini(encode_png(driver(90 if body["generationConfig"]["seed"] % 2 else 0)))

    server.script = answer
    man = CuratedSubject("a driver", "person", references=(Reference(encode_png(driver(0))),))
    clips = [Candidate(f"clip-{n}", "films", f"film-{n}", "", subjects=(man,)) for n in range(6)]

    def run(**settings: Any) -> tuple[list[Any], Synthesise]:
        step = Synthesise(editor(price_per_picture=0.5, **settings), share=1.0, attempts=2)
        return [outcome for (outcome,) in step(clips)], step

    first, step = run(concurrency=4)
    asked = sum(outcome.meta["synthetic"]["asked"] for outcome in first)
    assert len(server.requests) == asked
    assert step.remark() == f"a-model: {asked} requests, {asked} pictures, cost {asked / 2:.2f}"
    made = [outcome.subjects[0].references[0] for outcome in first if outcome.meta["synthetic"]["made"]]
    assert 1 < len(made) <= 6
    assert all(reference.origin == "generated:hosted" and reference.meta["seed"] % 2 for reference in made)
    server.http.shutdown()
    server.http.server_close()
    again, step = run(concurrency=1)
    assert again == first
    assert step.editor.spending.requests == asked
    for rule in ("keep", "drop"):  # what nobody answers is a fault, whatever is done about pictures that are not liked
        new = Synthesise(editor(tries=1), share=1.0, on_failure=rule, seed=1)
        assert [outcome.reason for (outcome,) in new(clips[:2])] == [UNREACHED, UNREACHED]


def leaks(text: str | bytes) -> list[str]:
    """Pieces of the key of twelve characters that stand in `text`."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    return [KEY[n : n + 12] for n in range(len(KEY) - 11) if KEY[n : n + 12] in text]


@pytest.mark.parametrize("before", [0, 20, 45, 61, 100, 120, 155, 400])
@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_no_piece_of_the_key_is_in_messages_logs_objects_or_files(
    server, editor, tmp_path, caplog, capfd, before, status
):
    said = "x" * before + " " + KEY + " " + "y" * 200
    if status == 200:  # in words where a picture should be, and as no JSON
        words = {"candidates": [{"content": {"parts": [{"text": said}]}, "finishMessage": said}], "modelVersion": said}
        server.script = lambda i, body: said.encode() if i else words
    else:
        server.script = lambda i, body: (status, {}, {"error": {"message": said, "code": "moderation_blocked"}})
    caplog.set_level(logging.DEBUG)
    client = editor(tries=2)
    found = [repr(client), pickle.dumps(client), json.dumps(client.describe()), str(vars(client))]
    for seed in range(2):
        with pytest.raises((EditError, UnreachedError, UserError)) as caught:
            ask(client, seed)
        found += [str(caught.value), repr(caught.value), repr(caught.value.__context__)]
    found += [caplog.text, *capfd.readouterr(), *(file.read_bytes() for file in files_in(tmp_path))]
    assert lower(server.requests[0][1])["x-goog-api-key"] == KEY  # it was there to be leaked
    assert not [piece for text in found for piece in leaks(text)]


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_a_pickled_editor_reads_the_key_of_its_own_process(server, editor, monkeypatch):
    copy = pickle.loads(pickle.dumps(editor()))
    monkeypatch.setenv("TEST_KEY", "another")
    ask(copy)
    assert lower(server.requests[0][1])["x-goog-api-key"] == "another"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "gemeni"}, "did you mean 'gemini'"),
        ({"max_cost": 5.0}, "with a price that can reach it"),
        ({"price_per_picture": -1.0}, "prices"),
        ({"store": "s3://bucket/answers"}, "store='s3://bucket/answers': must be a folder"),
        ({"store": ""}, "must be a folder"),
        ({"give_up_after": 0}, "give_up_after=0"),
        ({"max_pictures": 0}, "max_pictures=0"),
        ({"tries": 0}, "tries=0"),
    ],
)
def test_settings_that_cannot_be_are_told(editor, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        editor(**settings)


def test_a_store_that_cannot_be_written_is_told(editor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"store=.*cannot be written"):
        ask(editor(store=str(tmp_path / "file")))


def test_a_ledger_outlives_half_a_line_and_counts_the_same_read_in_pieces(tmp_path):
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    a = first.reserve(2.0, None)
    b = second.reserve(2.0, None)
    second.settle(b, 1.0, (3, 4), 1)
    with (tmp_path / "spent.jsonl").open("ab") as stream:
        stream.write(b'{"id": "c", "reser')  # the machine fell over
    first.settle(a, 0.5, (5, 6), 0)
    whole = Ledger(tmp_path).read()
    assert first.read() == second.read() == whole
    assert (whole.requests, whole.pictures, whole.unsettled, whole.cost) == (2, 1, 0, 1.5)
    assert (whole.input_tokens, whole.output_tokens) == (8, 10)


def test_a_limit_expects_the_dearest_answer_so_far(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.settle(ledger.reserve(0.1, 3.0), 2.0)
    with pytest.raises(UserError, match="another request at up to 2 might"):
        ledger.reserve(0.1, 3.0)
    ledger.reserve(0.1, 4.0)


def test_the_boundary_of_a_form_is_in_none_of_its_parts():
    asked = Asked("m", "a prompt", [encode_png(given(n)) for n in range(3)], 0, SIZE, {})
    message = OpenAIEdits().message(asked)
    boundary = message.kind.partition("boundary=")[2].encode()
    assert message.body.count(b"--" + boundary) == 3 + 4 + 1
    assert OpenAIEdits().message(asked) == message


def test_half_a_key_never_stands_in_a_message_of_any_client(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    client = HttpClient(server.url, "TEST_KEY", 5.0, 1, 0.0, 1)
    for cut in range(40, 80, 7):
        server.script = lambda i, body, cut=cut: (500, {}, ("x" * cut + KEY + "y" * 200).encode())
        with pytest.raises(RuntimeError) as caught:
            client.ask(lambda reply: reply, b"{}")
        assert not leaks(str(caught.value))

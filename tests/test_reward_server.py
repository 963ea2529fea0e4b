"""Rewards over HTTP on real sockets: the same numbers as in process, and a reason in place of a score that failed."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _rewards import Fixed, Flaky, People, client, composite, grey, serve, served
from _server import context, join, launch

from idc.cli import main
from idc.data.toy import ToyWorld, render_clip
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score
from idc.rewards import (
    Breakdown,
    Composite,
    HttpReward,
    PaperReward,
    RewardRunner,
    RewardServer,
    Term,
    ToyAesthetics,
    ToyFace,
    ToyNatural,
    ToySubject,
)
from idc.rewards.payload import CLIP_TYPE, MAGIC, digest, pack_clip, read_score, unpack_clip
from idc.stages.judged import FileReference

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def rich_clip() -> Clip:
    references = (
        Reference(noise(5, 4, 3), "Ann ✓", "face"),
        Reference(noise(6, 7, 3), "dog", mask_HW=noise(6, 7) > 99),
    )
    return Clip(
        "a b/c", noise(3, 8, 6, 3), 'she says "ж"', references, 12.5, "faceobj", noise(3, 2, 8, 6) > 99, {"k": [1, {}]}
    )


def toy_clip(shown: int = 0, asked: int = 0) -> Clip:
    world = ToyWorld()
    return Clip(f"{shown}{asked}", render_clip(world.spec(shown)), meta={"toy": world.spec(asked).to_json()})


# A clip as bytes


def test_a_clip_comes_back_as_it_was_sent() -> None:
    sent = rich_clip()
    found = unpack_clip(pack_clip(sent))
    for name in ("id", "prompt", "fps", "category", "meta"):
        assert getattr(found, name) == getattr(sent, name)
    assert np.array_equal(found.frames_THWC, sent.frames_THWC)
    assert np.array_equal(found.masks_TNHW, sent.masks_TNHW)
    for mine, theirs in zip(found.references, sent.references, strict=True):
        assert (mine.name, mine.kind) == (theirs.name, theirs.kind)
        assert np.array_equal(mine.image_HWC, theirs.image_HWC)
        assert (mine.mask_HW is None) == (theirs.mask_HW is None)
        assert mine.mask_HW is None or np.array_equal(mine.mask_HW, theirs.mask_HW)
    assert found.frames_THWC.flags.writeable
    assert unpack_clip(pack_clip(grey("plain"))).masks_TNHW is None
    with pytest.raises(UserError, match="its meta is no plain JSON"):
        pack_clip(replace(sent, meta={"path": Path("x")}))
    missing = Clip("a", noise(1, 4, 4, 3), references=(FileReference(Path("no.png"), "Ann", "face"),))
    assert HttpReward("http://127.0.0.1:9").score(missing).reason == "reference no.png: no such file"


def packed(head: Any, pixels: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return MAGIC + len(text).to_bytes(8, "big") + text + pixels


def head(**changes: Any) -> dict[str, Any]:
    plain = {"id": "a", "prompt": "", "fps": 16, "category": "", "meta": {}, "masks": False, "references": []}
    return plain | {"arrays": [{"dtype": "uint8", "shape": [1, 1, 1, 3]}]} | changes


def frames(*shape: Any, dtype: str = "uint8") -> dict[str, Any]:
    return head(arrays=[{"dtype": dtype, "shape": list(shape)}])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", MAGIC, MAGIC + b"\xff" * 8, MAGIC + b"\xff" * 8 + b"{}",
        pickle.dumps(grey("a")),
        packed(b"\xff\xfe"), packed(b"[" * 10_000), packed([]), packed({}), packed(None),
        packed(head()), packed(head(), b"1234"), packed(head(arrays=[])), packed(head(arrays=3)),
        packed(frames(1, 1, 1, -3)), packed(frames(1, 1, 1, True)), packed(frames(1, 1, "1", 3), b"abc"),
        packed(frames(10**12, 10**12, 1, 3), b"abc"), packed(frames(0, 1, 1, 3)),
        packed(frames(1, 3), b"abc"), packed(frames(1, 1, 1, 3, dtype="object"), b"abc"),
        packed(frames(1, 1, 1, 3, dtype="bool"), b"abc"),
        packed(head(masks=True), b"abc"),
        packed(head(references=[{"name": "a", "kind": "face", "mask": False}]), b"abc"),
        packed(head(fps="fast"), b"abc"), packed(head(meta=3), b"abc"), packed(head(references=[3]), b"abc"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_clip_are_refused(data: bytes) -> None:
    with pytest.raises(UserError):
        unpack_clip(data)


def test_a_clip_that_is_cut_anywhere_is_refused() -> None:
    data = pack_clip(rich_clip())
    for size in range(0, len(data), 13):
        with pytest.raises(UserError):
            unpack_clip(data[:size])
    with pytest.raises(UserError, match="bytes of pixels"):
        unpack_clip(data + b"\0")


# What a server says


def answer(value: Any, **changes: Any) -> dict[str, Any]:
    return {"clip": "asked", "reward": "r", "value": value, "reason": "", "details": {"a": 1}} | changes


def test_an_answer_with_a_number_is_a_score() -> None:
    assert read_score(answer(0.25), "asked", (0, 1)) == Score(0.25, details={"a": 1})
    assert read_score(answer(1), "asked", (0, 1)).value == 1
    assert read_score(answer(None, reason="no face"), "asked", (0, 1)) == Score(None, "no face", {"a": 1})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer(float("nan")), "the server's value is nan"),
        (answer(float("-inf")), "the server's value is -inf"),
        (answer(10**400), "the server's value is inf"),
        (answer("0.5"), "the server's value is no number: '\"0.5\"'"),
        (answer("quite natural"), "no number"),
        (answer(True), "no number: 'true'"),
        (answer([0.5]), "no number"),
        (answer(2.0), "outside of its bounds 0 to 1"),
        (answer(0.5, clip="another"), "about another clip"),
        (answer(0.5, reason=3), "is no score"),
        (answer(0.5, details="much"), "is no score"),
        ({"clip": "asked", "value": 1}, "lacks reason"),
        ({"score": 1}, "lacks clip, value, reason"),
        (answer(None), "the server gave no score and no reason"),
        ([0.5], "is no score"), (0.5, "is no score"), ("fine", "is no score"), (None, "is no score"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_score_is_a_failure_that_says_so(said: Any, reason: str) -> None:
    found = read_score(said, "asked", (0, 1))
    assert found.value is None
    assert reason in found.reason


# The server and its client


def toy_reward() -> PaperReward:
    return PaperReward(ToyFace(), ToySubject(), ToyAesthetics(), ToyNatural())


def test_over_http_a_reward_is_what_it_is_here() -> None:
    reward, clips = toy_reward(), [toy_clip(0, 0), toy_clip(1, 0), toy_clip(2, 1), grey("no spec")]
    expected = [reward.score(clip) for clip in clips]
    with served(reward) as server:
        remote = client(server)
        remote.load()
        assert [remote.score(clip) for clip in clips] == expected
        with RewardRunner(composite(pickle.loads(pickle.dumps(remote))), "threads", 3) as runner:
            for number, clip in enumerate(clips):
                runner.submit(number, clip)
            found = runner.collect()
        assert [breakdown.total for breakdown in found.values()] == [score.value for score in expected]
        assert "no toy spec" in found[3].reason
        assert (server.scored, server.failed) == (6, 2)


def asked_of(level: int, category: str) -> Clip:
    return replace(grey(f"{category}{level}", level), category=category)


def test_what_does_not_apply_weighs_nothing_wherever_it_is_computed() -> None:
    """Clips with people, clips without, and clips about which no reward says anything."""
    launch(print, [])  # the pool's processes come from the tests' own server
    people, every = People(), Fixed({"*": 2}, "every", models=("clip",))
    clips = {c.id: c for c in (asked_of(level, of) for of in ("human", "object") for level in (5, 9))}

    def found(terms: list[Term], where: str) -> tuple[dict[str, Breakdown], tuple[str, ...]]:
        with RewardRunner(Composite(terms), where, 2, max_failure_rate=1.0) as runner:
            runner.load()
            for name, clip in clips.items():
                runner.submit(name, clip)
            return runner.collect(), runner.composite.models

    with served(people) as p, served(every) as e, served(Composite([Term(people)])) as nested:
        remote = [client(p, name="people"), client(e, name="every")]
        whole, here = client(nested, name="composite"), Composite([Term(people)])
        for local, far in (([people, every], remote), ([people], remote[:1]), ([here], [whole])):
            parts = [[Term(reward, 1 + i, "same") for i, reward in enumerate(some)] for some in (local, far)]
            expected = found(parts[0], "process")
            assert [b.total is None for b in expected[0].values()] == [False, False, len(local) == 1, len(local) == 1]
            for terms in parts:
                for where in ("threads", "pool", "process"):
                    assert found(pickle.loads(pickle.dumps(terms)), where) == expected, (terms, where)


def test_whether_it_applies_is_asked_once_for_each_condition_and_never_guessed() -> None:
    people = People()
    with served(people) as server:
        remote = client(server, name="people", retries=0)
        assert [remote.applies(asked_of(i, of)) for of in ("human", "object") for i in range(3)] == [True] * 3 + [
            False
        ] * 3
        assert people.asked == {"human": 1, "object": 1}
    clip = asked_of(1, "animal")
    found = composite(remote).breakdown(clip)
    assert found.total is None
    assert "in 1 tries; the last: connection lost" in found.reason
    with Script(lambda i, asked: b'{"applies": "perhaps"}') as script:
        found = composite(client(script, retries=1)).breakdown(clip)
        assert found.total is None
        assert "its answer to /applies is no true or false" in found.reason
        assert script.requests == 2  # `score` knows by then


def test_what_a_server_serves_is_asked_before_it_is_used() -> None:
    with served(Fixed({"*": 1}, "face", ("sface",), (0.0, 0.5))) as server:
        remote = client(server, name="face")
        remote.load()
        assert (remote.name, remote.models, remote.bounds) == ("face", ("sface",), (0, 0.5))
        assert "outside of its bounds" in remote.score(grey("a")).reason
        with pytest.raises(UserError, match="serves 'face', not 'natural'"):
            client(server, name="natural").load()
        health = server.health()
    assert (health["class"], health["failed"]) == ("_rewards.Fixed", 1)
    with pytest.raises(UserError, match=r"connection lost.*is `idc rewards serve` running there"):
        client(server, retries=0).load()


def test_a_reward_that_raises_is_asked_again_and_the_server_lives_on(capsys: pytest.CaptureFixture[str]) -> None:
    flaky = Flaky({"*": 0.5, "bad": RuntimeError("out of memory\nsecond line")})
    with served(flaky) as server:
        assert client(server, retries=1).score(grey("a")).value == 0.5
        found = client(server, retries=2).score(grey("bad"))
        assert found.value is None
        assert (
            "did not answer in 3 tries; the last: status 500: 'RuntimeError: out of memory second line'" in found.reason
        )
        assert client(server).score(grey("a")).value == 0.5
        assert (flaky.calls["a"], flaky.calls["bad"], server.scored, server.failed) == (3, 3, 2, 4)
    assert "Traceback" not in capsys.readouterr().err


def request(server: RewardServer, method: str, path: str, data: bytes = b"", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.putrequest(method, path)
    for name, value in {"Content-Length": str(len(data)), "Content-Type": CLIP_TYPE, **headers}.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders(data)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_requests_that_are_none_are_turned_down_with_their_status() -> None:
    data = pack_clip(grey("a"))
    with served(Fixed({"*": 1}), max_megabytes=0.001) as server:
        assert request(server, "POST", "/score", data) == (
            200,
            answer(1.0, clip=digest(data), reward="fixed", details={}),
        )
        for status, arguments, headers in [
            (404, ("GET", "/"), {}),
            (404, ("POST", "/health", data), {}),
            (501, ("DELETE", "/score"), {}),
            (501, ("PUT", "/score", data), {}),
            (501, ("NONSENSE", "/score"), {}),
            (400, ("POST", "/score", b"much"), {}),
            (411, ("POST", "/score", data), {"Content-Length": ""}),
            (411, ("POST", "/score", data), {"Content-Length": "-1"}),
            (413, ("POST", "/score", data), {"Content-Length": "1001"}),
            (413, ("POST", "/score", data), {"Content-Length": "9" * 99}),
            (415, ("POST", "/score", data), {"Content-Type": "application/json"}),
        ]:
            found, said = request(server, *arguments, **headers)
            assert (found, bool(said["error"])) == (status, True), arguments
        large = Clip("large", np.zeros((9, 20, 20, 3), np.uint8))
        assert "status 413: 'a clip has at most 0.001 MB; --max-mb raises that'" in client(server).score(large).reason
        with socket.create_connection(server.server_address) as half:  # hangs up in the middle of its clip
            half.sendall(
                b"POST /score HTTP/1.1\r\nContent-Length: 900\r\nContent-Type: " + CLIP_TYPE.encode() + b"\r\n\r\nIDC"
            )
        assert client(server).score(grey("a")).value == 1


def test_a_token_keeps_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", "open sesame")
    with served(Fixed({"*": 1}), token_env="TEST_TOKEN") as server:
        assert client(server, token_env="TEST_TOKEN").score(grey("a")).value == 1
        found = client(server, token_env="NO_TOKEN").score(grey("a"))
        assert found.value is None
        assert "401" in found.reason
        with pytest.raises(UserError, match="NO_TOKEN is not set"):
            client(server, token_env="NO_TOKEN").load()
        monkeypatch.setenv("TEST_TOKEN", "guess")
        wrong = client(server, token_env="TEST_TOKEN").score(grey("a"))
        assert wrong.value is None
        assert "guess" not in wrong.reason


class Script:
    """A server that answers request i with `script(i, digest of what came)`: bytes of a body, or with their status."""

    def __init__(self, script: Callable[[int, str], Any]) -> None:
        self.requests, self.release = 0, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests += 1
                reply = script(outer.requests - 1, digest(data))
                status, body = reply if isinstance(reply, tuple) else (200, reply)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) + (status == 200 and body.endswith(b"..."))))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.server_address = self.http.server_address
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


def body(asked: str, value: str) -> bytes:
    return f'{{"clip": "{asked}", "reward": "r", "value": {value}, "reason": ""}}'.encode()


@pytest.mark.parametrize(
    ("reply", "tries", "reason"),
    [
        (lambda asked: body(asked, "NaN"), 1, "the server's value is nan"),
        (lambda asked: body(asked, "1e999"), 1, "the server's value is inf"),
        (lambda asked: body("", "0.5"), 1, "about another clip"),
        (lambda asked: b'{"score": 0.5}', 1, "lacks clip, value, reason"),
        (lambda asked: b"I would say 0.5", 3, "not a whole JSON answer: 'I would say 0.5'"),
        (lambda asked: b"\xff\x00\xfe", 3, "not a whole JSON answer"),
        (lambda asked: b"[" * 100_000, 3, "not a whole JSON answer"),
        (lambda asked: b"", 3, "not a whole JSON answer"),
        (lambda asked: body(asked, "0.5")[:-9] + b"...", 3, "not a whole JSON answer"),
        (lambda asked: (500, b"<html>oops"), 3, "status 500"),
        (lambda asked: (503, b""), 3, "status 503"),
        (lambda asked: (400, b'{"error": "no clip"}'), 1, "status 400: 'no clip'"),
        (lambda asked: (302, b""), 1, "status 302"),
        (lambda asked: (404, b""), 1, "no such model or address"),
    ],
)  # fmt: skip
def test_no_score_is_invented_for_garbage(reply: Callable[[str], Any], tries: int, reason: str) -> None:
    with Script(lambda i, asked: reply(asked)) as script:
        found = client(script).score(grey("a"))
        assert found.value is None
        assert reason in found.reason
        assert script.requests == tries


def test_a_slow_server_is_given_up_and_one_that_recovers_is_not() -> None:
    def slow(index: int, asked: str) -> Any:
        if index < 2:
            script.release.wait(30)
        return body(asked, "0.5")

    with Script(slow) as script:
        found = client(script, timeout=0.1, retries=0).score(grey("a"))
        assert found.value is None
        assert "no answer within 0.1 s" in found.reason
        assert client(script, timeout=0.3, retries=1).score(grey("a")).value == 0.5


def test_a_server_that_dies_in_mid_run_leaves_samples_without_reward_or_ends_the_run() -> None:
    with served(Fixed({"*": 0.5})) as server:
        runners = [RewardRunner(composite(client(server)), "threads", 2, **s) for s in ({}, {"on_failure": "stop"})]
        for runner in runners:
            runner.submit("a", grey("a"))
            assert runner.collect()["a"].total == 0.5
    tolerant, strict = runners
    tolerant.max_failure_rate = 1.0
    for name in "bc":
        tolerant.submit(name, grey(name))
    found = tolerant.collect()
    assert [breakdown.total for breakdown in found.values()] == [None, None]
    assert "did not answer in 3 tries; the last: connection lost" in found["b"].reason
    assert (tolerant.submitted, tolerant.failed) == (3, 2)
    strict.submit("b", grey("b"))
    with pytest.raises(UserError, match=r"1 of 1 sample has no reward: http: the reward server at .* connection lost"):
        strict.collect()
    for runner in runners:
        runner.close()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HttpReward("judge:8900"), "url='judge:8900'"),
        (lambda: HttpReward("http://a", retries=-1), "retries=-1"),
        (lambda: HttpReward("http://a", timeout=0, pause=1), "^timeout=0: must be a positive number of seconds$"),
        (lambda: HttpReward("http://a", timeout=1, pause=-1), "^pause=-1: must be 0 or more seconds$"),
        (lambda: RewardRunner(composite(Fixed({})), pause=-1), "^pause=-1: must be 0 or more seconds$"),
        (lambda: RewardRunner(composite(Fixed({})), timeout=0), "^timeout=0: must be positive seconds, or null"),
        (lambda: RewardServer(Fixed({}), port=0, concurrency=0), "^concurrency=0"),
        (lambda: RewardServer(Fixed({}), port=0, max_megabytes=float("inf")), "^max_megabytes=inf: must be a positive"),
        (lambda: RewardServer(Fixed({}), host="no.such.host.invalid"), "--host no.such.host.invalid"),
        (lambda: RewardServer(Fixed({}), port=99999), "--port 99999"),
    ],
)
def test_settings_that_cannot_work_are_named(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "rewrd.yaml"], "--config rewrd.yaml: no such file; did you mean 'reward.yaml'?"),
        (["--config", "."], "--config .: is a folder"),
        (["--config", "reward.yaml", "--max-mb", "inf"], "max_megabytes=inf: must be a positive number (--max-mb)"),
        (["--config", "reward.yaml", "--max-mb", "nan"], "max_megabytes=nan: must be a positive number (--max-mb)"),
        (["--config", "reward.yaml", "--device", "cuda:99"], "--device cuda:99: not on this machine"),
        (["--config", "reward.yaml", "--device", "gpu"], "--device gpu: not on this machine"),
    ],
)
def test_what_the_command_cannot_use_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reward.yaml").write_text("reward: {class_path: idc.rewards.Brightness}\n")
    assert main(["rewards", "serve", "--port", "0", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"idc rewards serve: {message}")
    assert "Errno" not in said


def test_the_command_serves_what_its_file_says_until_it_is_ended(tmp_path: Path) -> None:
    config = tmp_path / "reward.yaml"
    config.write_text("reward: {class_path: idc.rewards.ToyFace, init_args: {min_weight: 1.0}}\n")
    mine, theirs = context.Pipe()
    (process,) = launch(serve, [(theirs, "--config", str(config), "--port", "0")])
    assert mine.poll(60)
    line = mine.recv()
    assert line.startswith("http://127.0.0.1:")
    assert "serves 'toy_face'" in line
    reward = HttpReward(line.split()[0], pause=0, name="toy_face")
    reward.load()
    assert reward.score(toy_clip(1, 0)) == ToyFace(1.0).score(toy_clip(1, 0))
    os.kill(process.pid or 0, signal.SIGTERM)
    assert join([process]) == [0]
    said = ""
    while mine.poll():
        said += mine.recv()
    assert "1 clip scored, 0 failed" in said


FILE = "reward: {{class_path: idc.rewards.{}, init_args: {{{}}}}}"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (FILE.format("ToyFaces", "min_weight: 1"), "'idc.rewards.ToyFaces'; did you mean 'idc.rewards.toy.ToyFace'"),
        (FILE.format("ToyFace", "min_wight: 1"), "did you mean 'reward.init_args.min_weight'"),
        (FILE.format("ToyFace", "min_weight: 3"), "min_weight=3.0: must lie between 0 and 1"),
        ("rewards: 1", "must hold one key, 'reward', with a class_path; it has 'rewards'"),
        ("[", "cannot be read"),
        (None, "no such file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_answered_in_one_line(
    text: str | None, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "reward.yaml"
    if text is not None:
        config.write_text(text)
    assert main(["rewards", "serve", "--config", str(config), "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1


def test_a_whole_composite_can_be_served_from_a_file(tmp_path: Path) -> None:
    from idc.rewards.cli import read_reward

    config = tmp_path / "reward.yaml"
    config.write_text(
        """
reward:
  class_path: idc.rewards.Composite
  init_args:
    normalise: group
    terms:
    - {reward: {class_path: idc.rewards.ToyFace}, weight: 0.75, group: fidelity}
    - {reward: {class_path: idc.rewards.MetricReward, init_args: {metric: {class_path: idc.metrics.MotionAmplitude}}},
       monitor: true, weight: 0, name: motion}
"""
    )
    reward: Any = read_reward(config)
    assert [(term.key, term.weight, term.group) for term in reward.terms] == [
        ("toy_face", 0.75, "fidelity"), ("motion", 0, ""),
    ]  # fmt: skip
    found = reward.breakdown(toy_clip())
    assert found.total == pytest.approx(0.75)
    assert found.values["motion"] > 0

"""Judges in process against direct transformers computations, judges behind a real local server, and what asks them."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny_judges import LEVELS, QWEN_TEMPLATE, save_llava_judge, save_qwen_judge

from idc.errors import UserError
from idc.metrics.base import Clip
from idc.metrics.natural import QUESTIONS, NaturalScore, long_side, parse_score
from idc.metrics.qalign import CLIP_MEAN, QAlign, QAlignRater, expectation, pad_square, softmax
from idc.models.http_client import retry_after
from idc.models.judge_server import ServerJudge
from idc.models.judges import ImageTextJudge, Judge, JudgeError, deciding_tokens

RNG = np.random.default_rng(0)
QUESTION, ANSWER = "How would you rate the quality of this video?", "The quality of the video is"


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ImageTextJudge:
    return ImageTextJudge(save_qwen_judge(tmp_path_factory.mktemp("qwen")), dtype="float32", max_tokens=4)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> ImageTextJudge:
    return ImageTextJudge(save_llava_judge(tmp_path_factory.mktemp("llava")), dtype="float32", max_tokens=4)


def direct_qwen(path: str, images: Sequence[np.ndarray], text: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Tokenizer, model and inputs by hand: each picture's placeholder written out as its grid says."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(path)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(path)(images=list(images), return_tensors="pt")
    parts = text.split("<|image_pad|>")
    for k, grid in enumerate(pixels["image_grid_thw"]):
        parts[k] += "<|image_pad|>" * (int(grid.prod()) // 4)
    ids = tokenizer("".join(parts), return_tensors="pt").input_ids
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return tokenizer, model, {"input_ids": ids, "mm_token_type_ids": (ids == image_id).int(), **pixels}


def qwen_turn(images: int, question: str) -> str:
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * images
    return f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"


# In process


def test_level_logits_are_qwens_own_next_word_logits(qwen: ImageTextJudge) -> None:
    images = [noise(56, 84, 3), noise(28, 56, 3)]
    tokenizer, model, inputs = direct_qwen(qwen.path, images, qwen_turn(2, QUESTION) + ANSWER)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    expected = logits[tokenizer.convert_tokens_to_ids(LEVELS)].tolist()
    found = qwen.level_logits(images, QUESTION, ANSWER, LEVELS)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(qwen.level_logits(images[::-1], QUESTION, ANSWER, LEVELS), abs=1e-6)  # order counts


def test_level_logits_of_another_model_class_with_a_beginning_token_of_its_own(llava: ImageTextJudge) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = noise(28, 28, 3)
    tokenizer = AutoTokenizer.from_pretrained(llava.path)
    text = f"USER: {'<image>' * 4}\n{QUESTION} ASSISTANT: {ANSWER}"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, :2].tolist() == tokenizer.convert_tokens_to_ids(["<s>", "USER"])
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model = LlavaForConditionalGeneration.from_pretrained(llava.path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, **pixels(images=[image], return_tensors="pt")).logits[0, -1]
    expected = logits[tokenizer.convert_tokens_to_ids(LEVELS)].tolist()
    assert llava.level_logits([image], QUESTION, ANSWER, LEVELS) == pytest.approx(expected, abs=1e-6)


def test_the_answer_is_the_greedy_one(qwen: ImageTextJudge) -> None:
    image = noise(56, 56, 3)
    tokenizer, model, inputs = direct_qwen(qwen.path, [image], qwen_turn(1, QUESTION))
    new: list[int] = []
    with torch.no_grad():
        for _ in range(4):
            new.append(int(model(**inputs).logits[0, -1].argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([new[-1:]])], 1)
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    words = tokenizer.decode(new, skip_special_tokens=True).strip()
    with pytest.raises(JudgeError, match=f"cut at max_tokens=4: '{words}'"):
        qwen.generate([image], QUESTION)
    qwen._model.generation_config.eos_token_id = new[-1]  # now that token ends the answer
    try:
        state = torch.random.get_rng_state()
        assert qwen.answers([image], QUESTION, [3, 4]) == [tokenizer.decode(new, skip_special_tokens=True).strip()] * 2
        assert torch.equal(state, torch.random.get_rng_state())
    finally:
        qwen._model.generation_config.eos_token_id = None
    assert qwen.answers([image], QUESTION, []) == []


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([[7, 8, 1], [7, 8, 2], [7, 8, 3]], (2, [1, 2, 3])),
        ([[7, 8, 1, 9], [7, 8, 2], [7, 8, 3, 4, 5]], (2, [1, 2, 3])),  # "ex" "cellent"
        ([[7, 8, 0, 1], [7, 8, 0, 2], [7, 8, 0, 3]], (3, [1, 2, 3])),  # a blank that is a token of its own
        ([[7, 91], [7, 92], [7, 8, 3]], (1, [91, 92, 8])),  # the word before melts into the level
    ],
)
def test_levels_are_told_apart_at_the_first_token_that_differs(sequences: Any, expected: Any) -> None:
    assert deciding_tokens(sequences, ["a", "b", "c"]) == expected


def test_levels_that_begin_alike_are_an_error_that_names_both(qwen: ImageTextJudge) -> None:
    with pytest.raises(UserError, match="'b' and 'c' begin with the same token"):
        deciding_tokens([[7, 1], [7, 2, 5], [7, 2, 6]], ["a", "b", "c"])
    with pytest.raises(UserError, match="'b' is the beginning"):
        deciding_tokens([[7, 1], [7], [7, 2]], ["a", "b", "c"])
    with pytest.raises(UserError, match="'splendid' and 'dismal' begin with the same token"):
        qwen.level_logits([noise(28, 28, 3)], QUESTION, ANSWER, ["good", "splendid", "dismal"])


def test_logits_that_are_not_finite_are_a_failure(qwen: ImageTextJudge) -> None:
    broken = pickle.loads(pickle.dumps(qwen))
    broken.load()._model.lm_head.weight.data.fill_(math.nan)
    clip = Clip("a", noise(2, 8, 8, 3))
    assert QAlign(broken).score(clip).reason.startswith("the model's logits are not finite in torch.float32")
    assert QAlign(qwen).score(clip).value is not None


def test_a_folder_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        ImageTextJudge(str(tmp_path)).load()
    save_qwen_judge(tmp_path)
    for name, match in [("model.safetensors", "model"), ("preprocessor_config.json", "preprocessor_config"),
                        ("tokenizer_config.json", "tokenizer_config")]:  # fmt: skip
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=match) as raised:
            ImageTextJudge(str(tmp_path)).load()
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)
        (tmp_path / name).write_bytes(kept)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"model\*\.safetensors"):
        ImageTextJudge(str(tmp_path)).load()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        ImageTextJudge(str(tmp_path)).load()


# The five-level rule


def test_five_levels_against_hand_computed_logits() -> None:
    assert expectation(softmax([0, 0, 0, 0, 0])) == 0.5
    assert expectation(softmax([math.log(2), 0, -1e4, -1e4, -1e4])) == pytest.approx((2 * 1 + 1 * 0.75) / 3, abs=1e-12)
    probabilities = softmax([math.log(n) + 1000 for n in (1, 2, 3, 4, 5)])  # a shift does nothing, nor overflows
    assert probabilities == pytest.approx([n / 15 for n in (1, 2, 3, 4, 5)], abs=1e-12)
    assert expectation(probabilities) == pytest.approx((1 + 2 * 0.75 + 3 * 0.5 + 4 * 0.25) / 15, abs=1e-12)
    for bad in ([0.0] * 4, [math.nan, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="5 finite logits"):
            softmax(bad)


def test_pictures_are_centred_on_a_square_of_clips_mean_colour() -> None:
    wide = np.full((2, 6, 3), 200, np.uint8)
    square = pad_square(wide, side=6)
    assert square.shape == (6, 6, 3)
    assert (square[2:4] == 200).all()
    assert (square[[0, 1, 4, 5]] == CLIP_MEAN).all()
    tall = pad_square(wide.transpose(1, 0, 2), side=6)
    assert (tall == square.transpose(1, 0, 2)).all()
    assert pad_square(noise(448, 448, 3)).shape == (448, 448, 3)


def test_a_video_is_one_input_at_a_frame_a_second_and_an_image_score_is_a_mean(qwen: ImageTextJudge) -> None:
    frames = noise(10, 8, 12, 3)
    clip = Clip("a", frames, fps=3.6)  # rounds to every 4th frame
    score = QAlign(qwen).score(clip)
    assert score.details["frames"] == [0, 4, 8]
    logits = qwen.level_logits([pad_square(frames[i]) for i in (0, 4, 8)], QUESTION, ANSWER, LEVELS)
    assert score.value == pytest.approx(float(torch.tensor(logits).softmax(0) @ torch.tensor([1, 0.75, 0.5, 0.25, 0])))

    images = QAlign(qwen, task="aesthetics", kind="image")
    assert images.name == "qalign_aesthetics"
    score = images.score(clip)
    singles = [QAlignRater(qwen, "aesthetics", "image").rate(frames[i : i + 1]) for i in (0, 4, 8)]
    assert score.value == pytest.approx(sum(singles) / 3, abs=1e-12)
    assert QAlign.name == "qalign"

    assert len(QAlign(qwen).score(Clip("slow", frames[:2], fps=0.2)).details["frames"]) == 2
    assert "fps=0" in QAlign(qwen).score(Clip("still", frames, fps=0)).reason
    assert QAlignRater(pickle.loads(pickle.dumps(qwen))).rate(frames[:3]) == QAlignRater(qwen).rate(frames[:3])
    with pytest.raises(UserError, match="did you mean 'quality'"):
        QAlign(qwen, task="qualty")  # type: ignore[arg-type]


# Parsing


@pytest.mark.parametrize(
    "answer",
    ["4", " 4\n", "4.", "Score: 4", "score=4", "**4**", "**Score:** 4", '{"score": 4}', '{"score": "4"}',
     '```json\n{"score": 4}\n```', '{"reason": "5 hands", "score": 4}', "Answer: 4"],
)  # fmt: skip
def test_what_is_a_score(answer: str) -> None:
    assert parse_score(answer) == 4


@pytest.mark.parametrize(
    "answer",
    ["4/10", "4 / 5", "3.7", "4.0", "6", "0", "-4", "14", "4 or 5", "4-5", "four", "The video deserves a 4.", "٤",
     "4,5", '{"score": 6}', '{"score": 3.5}', '{"score": true}', '{"score": null}', '{"score": 4, "score": 2}',
     '{"score": 4', '{"value": 4}', '{"score": [4]}', "[4]", "4\n5", "I'm sorry, but I can't assist with that."],
)  # fmt: skip
def test_what_is_not_a_score_is_refused_and_quoted(answer: str) -> None:
    with pytest.raises(ValueError, match="not an integer from 1 to 5: '") as raised:
        parse_score(answer)
    assert " ".join(answer.split()) in str(raised.value)


def test_an_empty_answer_and_an_endless_one_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        parse_score(" \n")
    with pytest.raises(ValueError, match="not an integer") as raised:
        parse_score("blah " * 10_000)
    assert len(str(raised.value)) < 200
    with pytest.raises(ValueError, match="not an integer"):
        parse_score("{" * 100_000)


@pytest.mark.parametrize(("size", "expected"), [((720, 1280), (288, 512)), ((64, 48), (512, 384)), ((512, 5), (512, 5)),
                                                ((3000, 1), (512, 1))])  # fmt: skip
def test_the_long_side_is_512_both_ways(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert long_side(np.zeros((*size, 3), np.uint8)).shape == (*expected, 3)


# Behind a server


class Server:
    """A chat server on the loopback: `script` answers request i; what came in is kept."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: Callable[[int, dict[str, Any]], Any] = lambda i, body: chat("4")
        self.release = threading.Event()
        self.under_way = self.most_under_way = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    index = len(outer.requests)
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                reply = outer.script(index, body)
                with lock:
                    outer.under_way -= 1
                status, headers, data = reply if isinstance(reply, tuple) else (200, {}, reply)
                payload = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(payload)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(payload)
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def judge(self, **settings: Any) -> ServerJudge:
        return ServerJudge(
            self.url, "a-judge", **{"pause": 0.0, "timeout": 10.0, "api_key_env": "TEST_KEY", **settings}
        )


def chat(text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **message}
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
    }


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.release.set()
    server.http.shutdown()
    server.http.server_close()


def test_a_request_is_the_protocols(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("TEST_KEY", "sk-secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy that is not there is not asked for the loopback
    image = np.zeros((24, 16, 3), np.uint8)
    image[:12] = (200, 30, 60)
    judge = server.judge(max_tokens=7)
    assert judge.answers([image, image[::-1]], "How natural?", [5, 6]) == ["4", "4"]
    path, headers, body = min(server.requests, key=lambda request: request[2]["seed"])
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert headers["Content-Type"] == "application/json"
    assert {key: body[key] for key in ("model", "temperature", "seed", "max_tokens", "stream")} == {
        "model": "a-judge", "temperature": 0, "seed": 5, "max_tokens": 7, "stream": False,
    }  # fmt: skip
    (message,) = body["messages"]
    first, second, text = message["content"]
    assert text == {"type": "text", "text": "How natural?"}
    for part, sent in ((first, image), (second, image[::-1])):
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        assert np.abs(found - sent).max() < 8
    extra = {"max_tokens": None, "max_completion_tokens": 9}
    server.judge(extra=extra).generate([], "How natural?")
    assert "max_tokens" not in server.requests[-1][2]
    assert server.requests[-1][2]["max_completion_tokens"] == 9
    assert "secret" not in repr(vars(judge)) + repr(pickle.dumps(judge))
    assert pickle.loads(pickle.dumps(judge)).generate([image], "How natural?") == "4"
    monkeypatch.delenv("TEST_KEY")
    judge.generate([], "How natural?")
    assert "Authorization" not in server.requests[-1][1]


@pytest.mark.parametrize(
    "fault",
    [(500, {}, b"oops"), (503, {"Retry-After": "0"}, b""), (429, {"Retry-After": "never"}, {"error": "slow down"}),
     (200, {}, b'{"choices": [{"mess'), (200, {"Content-Length": "4000"}, b'{"choices": ['), (200, {}, b"")],
    ids=["500", "503", "429", "half JSON", "cut connection", "nothing"],
)  # fmt: skip
def test_a_passing_fault_is_tried_again_and_a_lasting_one_named(server: Server, fault: Any) -> None:
    server.script = lambda i, body: fault if i < 2 else chat("3")
    assert server.judge(tries=3).generate([], "?", seed=1) == "3"
    assert [body["seed"] for _, _, body in server.requests] == [1, 1, 1]
    server.script = lambda i, body: fault
    with pytest.raises(JudgeError, match="a-judge did not answer in 2 tries; the last: "):
        server.judge(tries=2).generate([], "?")
    assert len(server.requests) == 5


def test_a_server_that_does_not_answer_in_time_or_at_all(server: Server) -> None:
    def script(index: int, body: dict[str, Any]) -> Any:
        if index == 0:
            server.release.wait(60)
        return chat("2")

    server.script = script
    assert server.judge(timeout=0.2).generate([], "?") == "2"
    server.script = lambda i, body: server.release.wait(60)
    with pytest.raises(JudgeError, match=r"in 1 tries; the last: no answer within 0\.05 s"):
        server.judge(timeout=0.05, tries=1).generate([], "?")
    with pytest.raises(JudgeError, match="connection lost"):
        ServerJudge("http://127.0.0.1:9/v1", "nobody", tries=2, pause=0).generate([], "?")


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        (chat(None, refusal="I cannot judge people."), "refused: 'I cannot judge people.'"),
        (chat("", finish="content_filter"), "content filter"),
        (chat("The video shows", finish="length"), "cut at max_tokens=64: 'The video shows'"),
        ({"error": {"message": "no slots"}}, "not a chat completion"),
        ({"choices": []}, "not a chat completion"),
        ([1], "not a chat completion"),
        ((400, {}, {"error": {"message": "too many pictures"}}), "status 400: 'too many pictures'"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, b""), "status 302"),
    ],
)
def test_a_refusal_is_not_tried_again(server: Server, reply: Any, match: str) -> None:
    server.script = lambda i, body: reply
    with pytest.raises(JudgeError, match=match):
        server.judge().generate([], "?")
    assert len(server.requests) == 1


def test_a_wrong_key_stops_the_run_and_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    server.script = lambda i, body: (401, {}, {"error": {"message": "Incorrect API key provided: sk-secret"}})
    with pytest.raises(UserError, match=r"TEST_KEY.*another API key") as raised:
        server.judge().generate([], "?")
    assert "sk-secret" not in str(raised.value)
    server.script = lambda i, body: (500, {}, b"sk-secret crashed")
    with pytest.raises(JudgeError, match="API key") as failed:
        server.judge(tries=1).generate([], "?")
    assert "sk-secret" not in str(failed.value)
    monkeypatch.setenv("TEST_KEY", "line\nbreak")
    with pytest.raises(UserError, match="TEST_KEY: the API key holds"):
        server.judge().generate([], "?")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0), (None, 0), ("", 0),
     ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)  # fmt: skip
def test_how_long_a_server_asks_to_wait(header: str | None, seconds: float) -> None:
    assert retry_after(header) == seconds


def test_a_wait_until_a_date_is_counted_from_now() -> None:
    assert 3500 < retry_after(email.utils.formatdate(time.time() + 3600, usegmt=True)) <= 3600


def test_no_more_requests_are_under_way_than_allowed(server: Server) -> None:
    full = threading.Barrier(2)  # passes only if two are under way at once
    server.script = lambda i, body: (full.wait(30), chat(str(body["seed"])))[1]
    judge = server.judge(concurrency=2)
    results: dict[int, list[str]] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: judge.answers([], "?", [k, k + 10])})) for k in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {0: ["0", "10"], 1: ["1", "11"]}
    assert server.most_under_way == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"url": "ftp://host/v1"}, "url="), ({"url": "localhost:8000"}, "url="),
     ({"url": "http://me:pass@host"}, "password"),
     ({"extra": {"top_p": 1, "temperature": 1}}, "extra: must leave 'temperature' alone"),
     ({"tries": 0}, "tries=0"), ({"concurrency": 0}, "concurrency=0"), ({"timeout": 0.0}, "timeout=0")],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        ServerJudge(**{"url": "http://host/v1", "model": "m", **settings})
    assert "me:pass" not in str(raised.value)
    assert ServerJudge("http://host/v1/chat/completions/", "m").url == ServerJudge("http://host/v1", "m").url


# NaturalScore


class Scripted(Judge):
    """Answers from a list by seed, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, answers: Sequence[str]) -> None:
        self.script, self.shown = answers, []  # type: ignore[var-annotated]

    def load(self, device: Any = "cpu") -> None: ...

    def unload(self) -> None: ...

    def answers(self, images: Sequence[np.ndarray], prompt: str, seeds: Sequence[int]) -> list[str]:
        self.shown.append((list(images), prompt))
        return [self.script[seed % len(self.script)] for seed in seeds]


def test_natural_score_is_the_mean_of_three_runs_over_sixteen_frames() -> None:
    frames = np.arange(33, dtype=np.uint8)[:, None, None, None] * np.ones((1, 256, 512, 3), np.uint8)
    judge = Scripted(["4", "Score: 5", '{"score": 4}'])
    score = NaturalScore(judge).score(Clip("a", frames))
    assert score.value == pytest.approx(13 / 3)
    assert score.details["runs"] == [4, 5, 4]
    assert score.details["seeds"] == [0, 1, 2]
    ((pictures, question),) = judge.shown
    assert [int(picture[0, 0, 0]) for picture in pictures] == [i * 32 // 15 for i in range(16)]
    assert question == QUESTIONS["v1"]
    assert NaturalScore(judge, runs=1, seed=1).score(Clip("a", frames)).value == 5
    for settings in ({"runs": 0}, {"question": "v0"}):
        with pytest.raises(UserError):
            NaturalScore(judge, **settings)  # type: ignore[arg-type]


def test_one_answer_that_is_no_score_fails_the_clip_with_the_answer(server: Server) -> None:
    clip = Clip("a", np.zeros((3, 32, 32, 3), np.uint8))
    prose = "I would say this is rather good, about a 4."
    score = NaturalScore(Scripted(["4", prose, "4"])).score(clip)
    assert (score.value, score.details["answers"]) == (None, ["4", prose, "4"])
    assert score.reason == f"the judge's answer: not an integer from 1 to 5: '{prose}'"

    server.script = lambda i, body: chat("5") if body["seed"] != 1 else chat(None, refusal="No.")
    metric = NaturalScore(server.judge())
    metric.update([clip, clip])
    assert (metric.scored, int(metric.expected)) == (0, 2)
    assert metric.score(clip).reason == "the judge refused: 'No.'"
    server.script = lambda i, body: (500, {}, b"") if i % 2 else chat(str(3 + body["seed"] % 2))
    assert metric.score(clip).value == pytest.approx(10 / 3)  # whatever the order in which the requests arrive


def test_natural_score_with_a_model_in_this_process_is_reproducible(qwen: ImageTextJudge) -> None:
    clip = Clip("a", noise(2, 16, 16, 3))
    first, second = (NaturalScore(qwen).score(clip) for _ in range(2))
    assert first == second
    assert first.value is None  # a random model's words are no score
    assert "max_tokens" in first.reason or "not an integer" in first.reason


def test_the_template_of_the_tiny_judge_is_qwens_turn(qwen: ImageTextJudge) -> None:
    assert qwen.chat(2, "How?") == qwen_turn(2, "How?")
    assert "image_pad" in QWEN_TEMPLATE

"""Judges in process against direct transformers computations, and judges behind a real local server."""

from __future__ import annotations

import base64
import email.utils
import io
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _judge_server import Server, chat, chat_server
from _tiny_judges import ANSWER, LEVELS, QUESTION, QWEN_TEMPLATE, noise, save_llava_judge, save_qwen_judge

from idc.errors import UserError
from idc.models.http_client import retry_after
from idc.models.judge_server import ServerJudge
from idc.models.judges import ImageTextJudge, JudgeError, deciding_tokens


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
    qwen._model.generation_config.eos_token_id = new[-1]  # now that token ends the answer, where it first comes
    answer = tokenizer.decode(new[: new.index(new[-1]) + 1], skip_special_tokens=True).strip()
    try:
        state = torch.random.get_rng_state()
        assert qwen.answers([image], QUESTION, [3, 4]) == [answer] * 2
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


def test_the_template_of_the_tiny_judge_is_qwens_turn(qwen: ImageTextJudge) -> None:
    assert qwen.chat(2, "How?") == qwen_turn(2, "How?")
    assert "image_pad" in QWEN_TEMPLATE


# Behind a server


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


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

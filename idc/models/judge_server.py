"""A judge behind a server that speaks the OpenAI chat protocol: vLLM, SGLang, or a provider."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

import torch

from idc.errors import UserError
from idc.models.http_client import HttpClient, ServerError, UnansweredError
from idc.models.judges import Judge, JudgeError, JudgeUnavailableError, Picture, Question, quote

T = TypeVar("T")
R = TypeVar("R")

_OURS = ("model", "messages", "temperature", "seed", "stream")  # what a recipe's `extra` may not change


class ServerJudge(HttpClient, Judge):
    """A model behind `POST <url>/chat/completions`, asked with temperature 0 and a seed.

    Args:
        url: base address, "http://127.0.0.1:8000/v1" (with or without "/chat/completions").
        model: its name on the server.
        api_key_env: environment variable with the API key; unset or empty sends none.
        timeout: seconds that one try may take without hearing from the server.
        tries: how often a request is made that meets a timeout, a lost connection, half an answer, or status 408, 409,
            425, 429 or 5xx.
        pause: seconds before the second try, doubled each time up to 60 and drawn between half and all of that; a
            longer Retry-After of the server (up to 60) wins.
        concurrency: requests under way at once, over all threads of this process.
        max_tokens: longest answer, in tokens.
        extra: more of the request's JSON, such as {"chat_template_kwargs": {"enable_thinking": false}}; a null takes a
            key away, as {"max_tokens": null, "max_completion_tokens": 64} for servers that know only the latter.

    Raises:
        UserError: for settings out of range, an address that is not HTTP, or an `extra` that would change the model,
            the question, temperature 0 or the seed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        tries: int = 5,
        pause: float = 1.0,
        concurrency: int = 4,
        max_tokens: int = 64,
        extra: dict[str, Any] | None = None,
    ) -> None:
        base = url.rstrip("/").removesuffix("/chat/completions")
        super().__init__(f"{base}/chat/completions", api_key_env, timeout, tries, pause, concurrency)
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: must be at least 1")
        if taken := [key for key in extra or {} if key in _OURS]:
            raise UserError(f"extra: must leave {', '.join(map(repr, taken))} alone; scores would not be reproducible")
        self.model, self.max_tokens, self.extra = model, max_tokens, dict(extra or {})

    @property
    def name(self) -> str:
        return self.model

    def describe(self) -> dict[str, Any]:
        """What decides the answers, plain JSON: neither where the server is nor how patiently it is asked."""
        return {"class": type(self).__qualname__, "model": self.model, "max_tokens": self.max_tokens, **self.extra}

    def load(self, device: torch.device | str = "cpu") -> Self:
        """Nothing to load; return self."""
        return self

    def unload(self) -> None:
        """Nothing to free."""

    @property
    def server(self) -> str:
        return self.model

    def _named(self) -> str:
        return f"url={self.url!r}, model={self.model!r}"

    def answers(self, images: Sequence[Picture], prompt: str, seeds: Sequence[int]) -> list[str]:
        """As `idc.models.judges.Judge.answers`, one request per seed, side by side.

        Raises:
            JudgeError: for a refusal, an answer cut short, or a fault that outlived all tries.
            UserError: for status 401, 403 or 404, which every request would meet.
        """
        content = [picture_part(image) for image in images] + [{"type": "text", "text": prompt}]
        return self._side_by_side(lambda seed: self._ask(content, seed), seeds)

    def answer_each(self, questions: Sequence[Question]) -> list[str | JudgeError]:
        """As `idc.models.judges.Judge.answer_each`, one request per question, side by side.

        Raises:
            UserError: for status 401, 403 or 404, which every request would meet.
        """
        return self._side_by_side(self._answer, questions)

    def _side_by_side(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`ask` of each, in their order; as many at once as the server takes."""
        threads = min(self.concurrency, len(items))
        if threads <= 1:
            return [ask(item) for item in items]
        with ThreadPoolExecutor(threads, thread_name_prefix="judge") as pool:
            return list(pool.map(ask, items))

    def generate(self, images: Sequence[Picture], prompt: str, seed: int = 0) -> str:
        """The answer to one request."""
        return self.answers(images, prompt, [seed])[0]

    def _ask(self, content: list[dict[str, Any]], seed: int) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": seed,
            "max_tokens": self.max_tokens,
            "stream": False,
            **self.extra,
        }
        data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
        try:
            return self.ask(partial(answer_text, max_tokens=self.max_tokens), data)
        except UnansweredError as error:
            raise JudgeUnavailableError(str(error)) from None
        except ServerError as error:
            raise JudgeError(str(error)) from None


def picture_part(image: Picture) -> dict[str, Any]:
    """A picture (RGB uint8 `[H, W, 3]`) as a part of a message: JPEG at quality 95 without chroma subsampling."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def answer_text(reply: Any, max_tokens: int) -> str:
    """The words of a chat completion.

    Raises:
        JudgeError: for a refusal, an answer that the token limit or a filter cut, or none at all.
    """
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        refusal, text = message.get("refusal"), message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise JudgeError(f"the answer is not a chat completion: {quote(json.dumps(reply))}") from None
    if refusal:
        raise JudgeError(f"the judge refused: {quote(str(refusal))}")
    if finish == "content_filter":
        raise JudgeError("the server's content filter stopped the answer")
    if isinstance(text, list):
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    # A server that cuts its tokens within an emoji gives half of it, which no file of text can hold.
    text = text.encode("utf-8", "replace").decode().strip() if isinstance(text, str) else ""
    if finish == "length":
        raise JudgeError(f"the answer was cut at max_tokens={max_tokens}: {quote(text)}")
    return text

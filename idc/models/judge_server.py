"""A judge behind a server that speaks the OpenAI chat protocol (vLLM, SGLang, or a provider), by the standard library.

The API key is read from the environment for each request: it is in no object, no recipe, no result and no message.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch

from idc.errors import UserError
from idc.models.judges import Judge, JudgeError, Picture, quote

_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOPELESS = {
    401: "the server wants another API key",
    403: "the server forbids this to the API key",
    404: "there is no such model or address on the server",
}
_PASSING = (408, 409, 425, 429)  # and all from 500
_OURS = ("model", "messages", "temperature", "seed", "stream")  # what a recipe's `extra` may not change
_MOST_BYTES = 4 << 20  # an answer is a few hundred bytes
_LONGEST_PAUSE = 60.0


class _PassingError(Exception):
    """A fault that another try may not meet, with how long the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would take the API key along to wherever a redirect points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ServerJudge(Judge):
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
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url={url!r}: must be an HTTP address such as 'http://127.0.0.1:8000/v1'")
        if parts.username or parts.password or parts.query:
            raise UserError("url: must hold no password or query; the API key goes into the variable of api_key_env")
        for key, value in {"tries": tries, "concurrency": concurrency, "max_tokens": max_tokens}.items():
            if value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if not (timeout > 0 and pause >= 0):
            raise UserError(f"timeout={timeout}, pause={pause}: must be positive numbers of seconds")
        if taken := [key for key in extra or {} if key in _OURS]:
            raise UserError(f"extra: must leave {', '.join(map(repr, taken))} alone; scores would not be reproducible")
        base = url.rstrip("/").removesuffix("/chat/completions")
        self.url, self.model, self.api_key_env = f"{base}/chat/completions", model, api_key_env
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.concurrency, self.max_tokens, self.extra = concurrency, max_tokens, dict(extra or {})
        self._slots = threading.BoundedSemaphore(concurrency)

    @property
    def name(self) -> str:
        return self.model

    def load(self, device: torch.device | str = "cpu") -> Self:
        """Nothing to load; return self."""
        return self

    def unload(self) -> None:
        """Nothing to free."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._slots = threading.BoundedSemaphore(self.concurrency)

    def answers(self, images: Sequence[Picture], prompt: str, seeds: Sequence[int]) -> list[str]:
        """As `idc.models.judges.Judge.answers`, one request per seed, side by side.

        Raises:
            JudgeError: for a refusal, an answer cut short, or a fault that outlived all tries.
            UserError: for status 401, 403 or 404, which every request would meet.
        """
        if not seeds:
            return []
        content = [picture_part(image) for image in images] + [{"type": "text", "text": prompt}]
        with ThreadPoolExecutor(min(self.concurrency, len(seeds)), thread_name_prefix="judge") as pool:
            return list(pool.map(lambda seed: self._ask(content, seed), seeds))

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
        reason, wait = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                time.sleep(wait)
            try:
                with self._slots:
                    return answer_text(self._post(data), self.max_tokens)
            except _PassingError as fault:
                reason = self._redact(str(fault))
                backoff = min(_LONGEST_PAUSE, self.pause * 2**attempt)
                wait = max(min(_LONGEST_PAUSE, fault.wait), backoff * random.uniform(0.5, 1))
        raise JudgeError(f"{self.model} did not answer in {self.tries} tries; the last: {reason}")

    def _post(self, data: bytes) -> Any:
        """The parsed answer of one try."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "idc"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        handlers: list[Any] = [_NoRedirects()]
        if urllib.parse.urlsplit(self.url).hostname in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy of the environment cannot reach this machine
        request = urllib.request.Request(self.url, data, headers, method="POST")
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as response:
                text = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                self._judge_status(error)
        except TimeoutError:
            raise _PassingError(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(
                f"connection lost: {getattr(error, 'reason', None) or error or type(error).__name__}"
            ) from None
        try:
            return json.loads(text)
        except ValueError:
            raise _PassingError(f"not a whole JSON answer: {quote(text.decode(errors='replace'))}") from None

    def _judge_status(self, error: urllib.error.HTTPError) -> None:
        try:
            said = error.read(_MOST_BYTES).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        reason = self._redact(f"status {error.code}: {quote(_message(said))}")
        if error.code in _PASSING or error.code >= 500:
            raise _PassingError(reason, _retry_after(error.headers.get("Retry-After")))
        if error.code in _HOPELESS:
            key = f"the key in {self.api_key_env}" if self._key() else f"no key, as {self.api_key_env} is not set"
            raise UserError(
                f"url={self.url!r}, model={self.model!r} ({key}): {_HOPELESS[error.code]}; {reason}"
            ) from None
        raise JudgeError(reason) from None

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.api_key_env}: the API key holds characters that no HTTP header may hold")
        return key

    def _redact(self, text: str) -> str:
        """Servers like to quote the key that they turn down."""
        key = self._key()
        return text.replace(key, "[API key]") if key else text


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
    text = text.strip() if isinstance(text, str) else ""
    if finish == "length":
        raise JudgeError(f"the answer was cut at max_tokens={max_tokens}: {quote(text)}")
    return text


def _message(said: str) -> str:
    """What an error's body says, without the JSON around it where there is some."""
    try:
        error = json.loads(said)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return said


def _retry_after(header: str | None) -> float:
    """Seconds from now, of either form of the header; 0 where it is missing or makes no sense."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            seconds = 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0

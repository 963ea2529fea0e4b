"""How hosted image models are spoken to: OpenAI's images/edits and Gemini's generateContent.

A protocol makes the request and reads the answer; it knows neither keys nor retries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from idc.curate.synthetic.answers import Answer

REFUSED, NO_PICTURE = "refused", "no picture"


class Asked(NamedTuple):
    """A request: `pictures` are PNG, `size` is (height, width), `extra` more fields, as the provider names them."""

    model: str
    prompt: str
    pictures: Sequence[bytes]
    seed: int
    size: tuple[int, int]
    extra: Mapping[str, Any]


class Message(NamedTuple):
    """A request's address below the base, body and type of the body."""

    path: str
    body: bytes
    kind: str


class Usage(NamedTuple):
    """Tokens that an answer says were used; 0 where it does not."""

    input_tokens: int = 0
    output_tokens: int = 0


class Protocol(ABC):
    """One way to ask.

    Attributes:
        max_pictures: of one request to the protocol's own models.
        key_env: the usual environment variable with the API key.
        final: codes of errors that no later request is spared.
        refusals: codes of errors by which a safety filter turns the request down.
    """

    max_pictures: int
    key_env: str
    final: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()

    @abstractmethod
    def message(self, asked: Asked) -> Message:
        """The request as it is sent."""

    @abstractmethod
    def answer(self, reply: Any) -> Answer:
        """The picture in a parsed reply, or why there is none, as long and unchecked as the server says it.

        Raises:
            LookupError, TypeError, ValueError: for what is no reply of this protocol.
        """

    @abstractmethod
    def usage(self, reply: Any) -> Usage:
        """Tokens, of any reply."""

    @abstractmethod
    def credentials(self, key: str) -> dict[str, str]:
        """The headers that carry the API key."""


class OpenAIEdits(Protocol):
    """`POST <url>/images/edits`, multipart, as OpenAI's gpt-image models and servers like it take it.

    It has no seed: attempts differ all the same, and answers are the same again by being kept.
    """

    max_pictures = 16
    key_env = "OPENAI_API_KEY"
    final = ("insufficient_quota", "billing_hard_limit_reached", "invalid_api_key", "model_not_found")
    refusals = ("moderation_blocked", "content_policy_violation")
    sizes = ((1024, 1024), (1024, 1536), (1536, 1024))  # (height, width) that gpt-image models make

    def message(self, asked: Asked) -> Message:
        height, width = min(
            self.sizes, key=lambda made: abs(math.log(made[0] / made[1] * asked.size[1] / asked.size[0]))
        )
        fields = {"model": asked.model, "prompt": asked.prompt, "n": 1, "size": f"{width}x{height}", **asked.extra}
        parts = [
            (f'name="{name}"', "", (value if isinstance(value, str) else json.dumps(value)).encode())
            for name, value in fields.items()
            if value is not None
        ]
        for n, picture in enumerate(asked.pictures, 1):
            parts.append((f'name="image[]"; filename="{n}.png"', "Content-Type: image/png\r\n", picture))
        digest = hashlib.sha256(b"".join(data for _, _, data in parts)).hexdigest()
        boundary = f"idc-{digest[:32]}"  # of a hash over all parts: in none of them
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n{kind}\r\n".encode() + data + b"\r\n"
            for head, kind, data in parts
        )
        return Message(
            "/images/edits", body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
        )

    def answer(self, reply: Any) -> Answer:
        found = reply["data"][0]
        version = str(reply.get("model") or "")
        if not found.get("b64_json"):
            said = "an address instead of a picture" if found.get("url") else json.dumps(found)
            return Answer(reason=NO_PICTURE, detail=f"the answer holds {said}", version=version)
        return Answer(_decoded(found["b64_json"]), version=version)

    def usage(self, reply: Any) -> Usage:
        return _usage(reply, "usage", "input_tokens", "output_tokens")

    def credentials(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}


class GeminiContent(Protocol):
    """`POST <url>/models/<model>:generateContent` with pictures inline, as Gemini's image models ("Nano Banana") take
    it: what the paper used."""

    max_pictures = 3
    key_env = "GEMINI_API_KEY"
    final = ("API_KEY_INVALID", "API_KEY_SERVICE_BLOCKED", "CONSUMER_SUSPENDED", "BILLING_DISABLED")
    ratios = ("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9")  # width:height
    blocked = (
        *("SAFETY", "IMAGE_SAFETY", "PROHIBITED_CONTENT", "IMAGE_PROHIBITED_CONTENT"),
        *("BLOCKLIST", "SPII", "RECITATION", "IMAGE_RECITATION"),
    )

    def message(self, asked: Asked) -> Message:
        parts: list[dict[str, Any]] = [{"text": asked.prompt}]
        for picture in asked.pictures:
            data = base64.b64encode(picture).decode()
            parts.append({"inline_data": {"mime_type": "image/png", "data": data}})
        config = {
            "responseModalities": ["IMAGE"],
            "seed": asked.seed % 2**31,
            "imageConfig": {"aspectRatio": min(self.ratios, key=lambda ratio: _distance(ratio, asked.size))},
            **asked.extra,
        }
        body = {
            "contents": [{"role": "user", "parts": parts}],
            "generationConfig": {key: value for key, value in config.items() if value is not None},
        }
        return Message(f"/models/{asked.model}:generateContent", json.dumps(body).encode(), "application/json")

    def answer(self, reply: Any) -> Answer:
        version = str(reply.get("modelVersion") or "")
        if blocked := (reply.get("promptFeedback") or {}).get("blockReason"):
            return Answer(reason=REFUSED, detail=f"the prompt was blocked: {blocked}", version=version)
        candidate = reply["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        finish = str(candidate.get("finishReason") or "STOP")
        pictures, words = [], []
        for part in parts:
            inline = part.get("inlineData") or part.get("inline_data")
            if part.get("thought"):  # sketches on the way
                continue
            if inline:
                pictures.append((inline.get("mimeType") or inline.get("mime_type") or "", inline["data"]))
            elif part.get("text"):
                words.append(part["text"])
        if not pictures:
            reason = REFUSED if finish in self.blocked else NO_PICTURE
            said = str(candidate.get("finishMessage") or " ".join(words))
            return Answer(reason=reason, detail=f"{finish}: {said}", version=version)
        kind, data = pictures[-1]
        if not str(kind).startswith("image/"):
            return Answer(reason=NO_PICTURE, detail=f"the answer is of type {kind}", version=version)
        return Answer(_decoded(data), version=version)

    def usage(self, reply: Any) -> Usage:
        return _usage(reply, "usageMetadata", "promptTokenCount", "candidatesTokenCount")

    def credentials(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}


PROTOCOLS: dict[str, type[Protocol]] = {"openai": OpenAIEdits, "gemini": GeminiContent}


def error_codes(said: str) -> set[str]:
    """Codes, types and reasons that the JSON body of an error names."""
    try:
        error = json.loads(said)["error"]
        details = [detail for detail in error.get("details") or [] if isinstance(detail, dict)]
        named = [error.get("code"), error.get("type"), error.get("status"), *(d.get("reason") for d in details)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in named if isinstance(name, str)}


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("the picture is no base64") from None


def _distance(ratio: str, size: tuple[int, int]) -> float:
    width, height = map(int, ratio.split(":"))
    return abs(math.log(width / height * size[0] / size[1]))


def _usage(reply: Any, key: str, input_key: str, output_key: str) -> Usage:
    found = reply.get(key) if isinstance(reply, dict) else None
    if not isinstance(found, dict):
        return Usage()
    return Usage(*(n if isinstance(n := found.get(name), int) and n > 0 else 0 for name in (input_key, output_key)))

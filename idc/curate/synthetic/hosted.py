"""A hosted image model over HTTP: paid for once, counted, limited, and never with its key in anything that is kept."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from idc.curate.candidate import Pixels, decode_image, encode_png
from idc.curate.reaching import UnreachedError
from idc.curate.synthetic.answers import Answer, Answers, request_key
from idc.curate.synthetic.editors import EditError, ImageEditor, check_request
from idc.curate.synthetic.protocols import NO_PICTURE, PROTOCOLS, REFUSED, Asked, Usage, error_codes
from idc.curate.synthetic.spending import Ledger, Spending
from idc.data.video import VideoError
from idc.errors import UserError, nearest
from idc.models.http_client import HttpClient, PassingError, ServerError, UnansweredError
from idc.models.judges import quote

NO_ANSWER, UNUSABLE = "no answer", "unusable picture"
_MOST_PIXELS = 64 << 20
_KINDS = ("PNG", "JPEG", "WEBP")
_EXPECTED = Usage(3000, 3000)  # tokens of a request before the first was seen: a few pictures in, one out
_TOKENS = 1e6  # that prices of tokens are for


class HostedEditor(HttpClient, ImageEditor):
    """An image model behind OpenAI's images/edits or Gemini's generateContent protocol.

    Answers are kept in `store` by a hash of model, prompt, pictures and seed: a request that was answered, by a
    picture or by a refusal, is never sent again, so that an interrupted run pays for what was under way at most, and a
    second run gives the same bytes with no server at all. Faults of the server are not kept.

    Args:
        url: base address, such as "https://api.openai.com/v1" or
            "https://generativelanguage.googleapis.com/v1beta".
        model: its name there, such as "gpt-image-1" or "gemini-2.5-flash-image".
        store: folder for answers and for the ledger of costs, shared by all workers.
        protocol: "openai" or "gemini".
        api_key_env: environment variable with the API key; None for the protocol's usual one (OPENAI_API_KEY,
            GEMINI_API_KEY). The key goes into the request's header and nowhere else.
        timeout, tries, pause, concurrency: as `idc.models.http_client.HttpClient`.
        price_per_picture: of a picture that comes back.
        price_per_million_input_tokens, price_per_million_output_tokens: of tokens that the answer reports. All prices
            in one currency.
        max_cost: no request is sent with which more than this might have been spent, over all workers and runs that
            share the store; None for no limit.
        give_up_after: so many requests in a row without an answer stop the run: the server is down.
        max_pictures: of one request; None for what the protocol's own models take (3 Gemini, 16 OpenAI).
        min_side: a smaller picture is no answer, in pixels.
        extra: more fields of the request, as {"quality": "high", "input_fidelity": "high"}.

    Raises:
        UserError: for settings out of range, or a limit that no price could ever reach.
    """

    backend: ClassVar[str] = "hosted"
    most_bytes = 96 << 20  # base64 of a picture of 64 megapixels

    def __init__(
        self,
        url: str,
        model: str,
        store: str,
        protocol: Literal["openai", "gemini"] = "gemini",
        api_key_env: str | None = None,
        timeout: float = 180.0,
        tries: int = 5,
        pause: float = 2.0,
        concurrency: int = 4,
        price_per_picture: float = 0.0,
        price_per_million_input_tokens: float = 0.0,
        price_per_million_output_tokens: float = 0.0,
        max_cost: float | None = None,
        give_up_after: int = 10,
        max_pictures: int | None = None,
        min_side: int = 64,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol={protocol!r}: no such protocol{nearest(protocol, PROTOCOLS)}")
        self._protocol = PROTOCOLS[protocol]()
        super().__init__(url.rstrip("/"), api_key_env or self._protocol.key_env, timeout, tries, pause, concurrency)
        if not model.strip():
            raise UserError("model: must be the model's name on the server, such as 'gemini-2.5-flash-image'")
        prices = price_per_picture, price_per_million_input_tokens, price_per_million_output_tokens
        if not all(0 <= price < math.inf for price in prices):
            raise UserError(f"prices {prices}: must be 0 or more")
        if max_cost is not None and not (max_cost > 0 and any(prices)):
            raise UserError(f"max_cost={max_cost}: must be above 0, with a price that can reach it, or None")
        for name, value in {"give_up_after": give_up_after, "min_side": min_side, "max_pictures": max_pictures}.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        self.model, self.protocol, self.prices, self.max_cost = model, protocol, prices, max_cost
        self.max_pictures, self.min_side = max_pictures or self._protocol.max_pictures, min_side
        self.give_up_after, self.extra = give_up_after, dict(extra or {})
        self._answers = Answers(store)
        self._ledger = Ledger(self._answers.folder)
        self._silent = 0  # requests in a row without an answer

    @property
    def name(self) -> str:
        return self.model

    @property
    def version(self) -> str:
        """Of the protocol's models none is known but the name; what each answer says of it is kept with the answer."""
        return ""

    @property
    def server(self) -> str:
        return self.model

    @property
    def spending(self) -> Spending:
        """What the store's ledger adds up to, over all workers and runs."""
        return self._ledger.read()

    def remark(self) -> str:
        return f"{self.model}: {self.spending}"

    def describe(self) -> Mapping[str, Any]:
        """What answers depend on: neither address nor prices nor patience."""
        rules = {"max_pictures": self.max_pictures, "min_side": self.min_side}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **self._settings(), **rules}

    def _settings(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "model": self.model, "extra": self.extra}

    def edit(self, pictures: Sequence[Pixels], prompt: str, seed: int, size: tuple[int, int]) -> Pixels:
        """As `ImageEditor.edit`: of the size nearest to `size` in shape that the model makes.

        Raises:
            EditError: "refused" by a safety filter, "no picture", "unusable picture", or "no answer" to this request.
            UnreachedError: where the server does not answer now.
            UserError: for a key that is turned down, `max_cost`, or a server that is down.
        """
        check_request(self, pictures, prompt, size)
        encoded = [encode_png(picture) for picture in pictures]
        key = request_key({**self._settings(), "size": list(size)}, prompt, encoded, seed)
        with self._answers.alone(key):
            answer = self._answers.get(key)
            if answer is None:
                answer = self._asked(prompt, encoded, seed, size, key)
                self._answers.put(key, answer)
        if answer.reason:
            raise EditError(answer.reason, answer.detail)
        return self._pixels(answer)

    def _asked(self, prompt: str, encoded: Sequence[bytes], seed: int, size: tuple[int, int], key: str) -> Answer:
        message = self._protocol.message(Asked(self.model, prompt, encoded, seed, size, self.extra))
        headers = {"Idempotency-Key": f"idc-{key}"}  # servers that know it do not bill a repeated request again
        try:
            answer = self.ask(self._read, message.body, message.kind, self.url + message.path, headers=headers)
        except _RefusedError as refusal:
            answer = Answer(reason=REFUSED, detail=str(refusal))
        except ServerError as error:
            self._silent += 1
            if self._silent >= self.give_up_after:
                raise UserError(
                    f"{self._named()}: {self._silent} requests in a row had no answer; the last: {error}. "
                    "Start again when the server answers: what was answered is kept"
                ) from None
            if isinstance(error, UnansweredError):
                raise UnreachedError(str(error)) from None
            raise EditError(NO_ANSWER, str(error)) from None
        self._silent = 0
        return answer

    def _read(self, reply: Any) -> Answer:
        try:
            answer = self._protocol.answer(reply)
        except ValueError as error:
            return Answer(reason=NO_PICTURE, detail=str(error))
        except (LookupError, TypeError, AttributeError):
            said = quote(self._redact(json.dumps(reply)))
            return Answer(reason=NO_PICTURE, detail=f"the reply is not of protocol {self.protocol!r}: {said}")
        detail = quote(self._redact(answer.detail), 300) if answer.detail else ""  # once cut, half a key would remain
        return replace(answer, detail=detail, version=self._redact(answer.version)[:80])

    def _request(self, url: str, data: bytes | None, kind: str, more: Mapping[str, str]) -> Any:
        """One try, in the ledger before it is sent."""
        entry = self._ledger.reserve(self._price(_EXPECTED, 1), self.max_cost)
        try:
            reply = super()._request(url, data, kind, more)
        except PassingError as fault:
            if not fault.maybe_done:
                self._ledger.settle(entry, 0.0)
            raise
        except (ServerError, UserError):
            self._ledger.settle(entry, 0.0)
            raise
        pictures = 1 if self._read(reply).picture else 0
        tokens = self._protocol.usage(reply)
        self._ledger.settle(entry, self._price(tokens, pictures), tokens, pictures)
        return reply

    def _price(self, tokens: Usage, pictures: int) -> float:
        picture, given, made = self.prices
        return pictures * picture + (tokens.input_tokens * given + tokens.output_tokens * made) / _TOKENS

    def _judge_refusal(self, status: int, said: str, reason: str) -> None:
        codes = error_codes(said)
        if codes & set(self._protocol.final):
            raise UserError(f"{self._named()} (the key in {self.api_key_env}): no request will be answered; {reason}")
        if codes & set(self._protocol.refusals):
            raise _RefusedError(reason)

    def _credentials(self, key: str) -> dict[str, str]:
        return self._protocol.credentials(key)

    def _named(self) -> str:
        return f"url={self.url!r}, model={self.model!r}"

    def _pixels(self, answer: Answer) -> Pixels:
        try:
            check_picture(answer.picture, self.min_side)
            return decode_image(answer.picture)
        except VideoError as error:
            raise EditError(UNUSABLE, str(error)) from None


def check_picture(data: bytes, min_side: int) -> None:
    """Look at a picture's head before its pixels are decoded.

    Raises:
        EditError: for another format than PNG, JPEG or WebP, a side below `min_side`, or more than 64 megapixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data)) as image:
                kind, (width, height) = image.format, image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise EditError(UNUSABLE, f"no picture: {type(error).__name__}") from None
    if kind not in _KINDS:
        raise EditError(UNUSABLE, f"is {kind}; must be one of {', '.join(_KINDS)}")
    if min(height, width) < min_side or height * width > _MOST_PIXELS:
        raise EditError(UNUSABLE, f"{width} x {height} pixels; must be at least {min_side} each, 64 megapixels in all")


class _RefusedError(ServerError):
    """A safety filter turned the request down by a status of its own."""

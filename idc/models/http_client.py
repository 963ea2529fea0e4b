"""Requests to a server that may be slow, down or wrong, by the standard library: tries, pauses, limits, reasons.

The API key is read from the environment for each request: it is in no object, no recipe, no result and no message.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from idc.errors import UserError
from idc.models.judges import quote

T = TypeVar("T")

_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOPELESS = {
    401: "the server wants another API key",
    403: "the server forbids this to the API key",
    404: "there is no such model or address on the server",
}
_PASSING = (408, 409, 425, 429)  # and all from 500
_LONGEST_PAUSE = 60.0


class ServerError(RuntimeError):
    """No answer for this input: it was refused, is no answer, or could not be had. Other inputs may do."""


class UnansweredError(ServerError):
    """A fault that outlived all tries: the server is down, or out of its depth. Another time it may answer."""


class PassingError(Exception):
    """A fault that another try may not meet.

    Attributes:
        wait: how long the server asks to wait, in seconds.
        maybe_done: the server may have done the work (and bill it): the request went out and no whole answer came.
    """

    def __init__(self, reason: str, wait: float = 0.0, maybe_done: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.maybe_done = wait, maybe_done


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would take the API key along to wherever a redirect points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HttpClient:
    """What talks to one server. It may be used by many threads at once, and pickled.

    Args:
        url: address of the server, with any path.
        api_key_env: environment variable with the API key; unset or empty sends none.
        timeout: seconds that one try may take without hearing from the server.
        tries: how often a request is made that meets a timeout, a lost connection, half an answer, or status 408, 409,
            425, 429 or 5xx.
        pause: seconds before the second try, doubled each time up to 60 and drawn between half and all of that; a
            longer Retry-After of the server (up to 60) wins.
        concurrency: requests under way at once, over all threads of this process.

    Raises:
        UserError: for settings out of range or an address that is not HTTP.
    """

    most_bytes = 4 << 20  # of an answer

    def __init__(self, url: str, api_key_env: str, timeout: float, tries: int, pause: float, concurrency: int) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url={url!r}: must be an HTTP address such as 'http://127.0.0.1:8000/v1'")
        if parts.username or parts.password or parts.query:
            raise UserError("url: must hold no password or query; the API key goes into the variable of api_key_env")
        for key, value in {"tries": tries, "concurrency": concurrency}.items():
            if value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout={timeout}: must be a positive number of seconds")
        if not 0 <= pause < math.inf:
            raise UserError(f"pause={pause}: must be 0 or more seconds")
        self.url, self.api_key_env = url, api_key_env
        self.timeout, self.tries, self.pause, self.concurrency = timeout, tries, pause, concurrency
        self._slots = threading.BoundedSemaphore(concurrency)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._slots = threading.BoundedSemaphore(self.concurrency)

    @property
    def server(self) -> str:
        """What messages call the server."""
        return self.url

    def ask(
        self,
        read: Callable[[Any], T],
        data: bytes | None = None,
        kind: str = "application/json",
        url: str = "",
        sleep: Callable[[float], None] = time.sleep,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """What `read` makes of the parsed JSON answer to a POST of `data`, or to a GET without data.

        Args:
            read: may raise `PassingError` for an answer that another try may mend.
            kind: type of `data`.
            url: another address on the server.
            sleep: waits between tries.
            headers: more of them, the same for each try.

        Raises:
            ServerError: for a refusal; `UnansweredError` for a fault that outlived all tries.
            UserError: for status 401, 403 or 404, which every request would meet.
        """
        reason, wait = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                sleep(wait)
            try:
                with self._slots:
                    return read(self._request(url or self.url, data, kind, headers or {}))
            except PassingError as fault:
                reason = self._redact(str(fault))
                backoff = min(_LONGEST_PAUSE, self.pause * 2**attempt)
                wait = max(min(_LONGEST_PAUSE, fault.wait), backoff * random.uniform(0.5, 1))
        raise UnansweredError(f"{self.server} did not answer in {self.tries} tries; the last: {reason}")

    def _request(self, url: str, data: bytes | None, kind: str, more: Mapping[str, str]) -> Any:
        """The parsed answer of one try."""
        headers = {"Accept": "application/json", "User-Agent": "idc", **more}
        if data is not None:
            headers["Content-Type"] = kind
        if key := self._key():
            headers |= self._credentials(key)
        handlers: list[Any] = [_NoRedirects()]
        if urllib.parse.urlsplit(url).hostname in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy of the environment cannot reach this machine
        request = urllib.request.Request(url, data, headers, method="GET" if data is None else "POST")
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout) as response:
                text = response.read(self.most_bytes)
        except urllib.error.HTTPError as error:
            with error:
                self._judge_status(error)
        except TimeoutError:
            raise PassingError(f"no answer within {self.timeout:g} s", maybe_done=True) from None
        except (OSError, http.client.HTTPException) as error:
            fault = getattr(error, "reason", None) or error
            never_sent = isinstance(fault, ConnectionRefusedError | socket.gaierror)
            said = str(fault) or type(fault).__name__
            raise PassingError(f"connection lost: {said}", maybe_done=not never_sent) from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            said = self._redact(text.decode(errors="replace"))  # before it is cut: half a key is a leak too
            raise PassingError(f"not a whole JSON answer: {quote(said)}", maybe_done=True) from None

    def _judge_status(self, error: urllib.error.HTTPError) -> None:
        try:
            said = error.read(self.most_bytes).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"status {error.code}: {quote(self._redact(_message(said)))}"
        self._judge_refusal(error.code, said, reason)
        if error.code in _PASSING or error.code >= 500:
            raise PassingError(reason, retry_after(error.headers.get("Retry-After")))
        if error.code in _HOPELESS:
            key = f"the key in {self.api_key_env}" if self._key() else f"no key, as {self.api_key_env} is not set"
            raise UserError(f"{self._named()} ({key}): {_HOPELESS[error.code]}; {reason}") from None
        raise ServerError(reason) from None

    def _judge_refusal(self, status: int, said: str, reason: str) -> None:
        """Raise what an answer with an error means where the server's own codes say more than the status; `said` is
        its body, `reason` what a message may say of it."""

    def _credentials(self, key: str) -> dict[str, str]:
        """The headers that carry the API key."""
        return {"Authorization": f"Bearer {key}"}

    def _named(self) -> str:
        """The settings that say who was asked."""
        return f"url={self.url!r}"

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.api_key_env}: the API key holds characters that no HTTP header may hold")
        return key

    def _redact(self, text: str) -> str:
        """Servers like to quote the key that they turn down."""
        key = self._key()
        return text.replace(key, "[API key]") if key else text


def _message(said: str) -> str:
    """What an error's body says, without the JSON around it where there is some."""
    try:
        error = json.loads(said)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return said


def retry_after(header: str | None) -> float:
    """Seconds from now, of either form of the header; 0 where it is missing or makes no sense."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            seconds = 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0

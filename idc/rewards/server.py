"""Serves any reward over HTTP, for judges that are too heavy for the machine that trains: standard library only.

It speaks plain HTTP: within a cluster, or behind a proxy with TLS.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from idc import __version__
from idc.errors import UserError
from idc.metrics.base import Clip, Score, reason_of
from idc.rewards.base import Reward, call
from idc.rewards.payload import CLIP_TYPE, digest, unpack_clip

MEGABYTE = 1_000_000
_ADDRESSES = "there are GET /health, POST /score and POST /applies"


class RequestError(Exception):
    """Answered with its status and a JSON object `{"error": message}`."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """One reward at `POST /score`, whether it applies to such a clip at `POST /applies`, and what it is at
    `GET /health`; `server_address` has the port where 0 was given.

    Args:
        reward: loaded by the caller.
        host, port: to listen on.
        max_megabytes: the largest clip that is taken; 81 frames of 480 x 832 have 97.
        concurrency: clips in memory at once; further requests wait.
        token_env: environment variable with a token that requests must carry; unset or empty asks for none.

    Attributes:
        scored, failed: how many clips got a score, and how many none, since the start.

    Raises:
        UserError: if the address cannot be had, or for a number out of its range.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 8900,
        max_megabytes: float = 512.0,
        concurrency: int = 8,
        token_env: str = "IDC_REWARD_TOKEN",
    ) -> None:
        if not 0 < max_megabytes < math.inf:
            raise UserError(f"max_megabytes={max_megabytes:g}: must be a positive number (--max-mb); 512 is usual")
        if concurrency < 1:
            raise UserError(f"concurrency={concurrency}: must be above 0")
        self.reward, self.max_bytes = reward, int(max_megabytes * MEGABYTE)
        self.token = os.environ.get(token_env, "").strip()
        self.scored = self.failed = 0
        self.slots, self._lock = threading.BoundedSemaphore(concurrency), threading.Lock()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({error}); --port 0 picks one"
            ) from error

    def count(self, score: Score | None) -> None:
        """Keep count of an answer; None is a call that raised."""
        with self._lock:
            if score is None or score.value is None:
                self.failed += 1
            else:
                self.scored += 1

    def health(self) -> dict[str, Any]:
        """Which reward this is, and which models it stands on; an infinite bound is null."""
        return {
            "reward": self.reward.name,
            "class": f"{type(self.reward).__module__}.{type(self.reward).__qualname__}",
            "models": list(self.reward.models),
            "bounds": [bound if math.isfinite(bound) else None for bound in self.reward.bounds],
            "scored": self.scored,
            "failed": self.failed,
            "version": __version__,
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET /health, POST /score and /applies; any other address is 404, any other method 501."""

    server: RewardServer
    protocol_version = "HTTP/1.1"
    server_version = "idc-rewards"
    sys_version = ""
    timeout: ClassVar[float] = 60  # seconds that a connection may stay silent

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Another method, or what is no request at all: the base class would answer with a page."""
        self.close_connection = True
        status = HTTPStatus(code)
        self._json({"error": f"{message or status.phrase}; {_ADDRESSES}"}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line for each request; `/health` counts them, faults reach stderr."""

    def _answer(self, handle: Callable[[], dict[str, Any]]) -> None:
        # A body that is turned down is not read, and what follows on the connection is no request then.
        self.close_connection = True
        try:
            self._check_token()
            self._json(handle())
        except RequestError as error:
            self._json({"error": str(error)}, error.status)

    def _get(self) -> dict[str, Any]:
        if self.path != "/health":
            raise RequestError(HTTPStatus.NOT_FOUND, f"no such address; {_ADDRESSES}")
        return self.server.health()

    def _post(self) -> dict[str, Any]:
        if self.path not in ("/score", "/applies"):
            raise RequestError(HTTPStatus.NOT_FOUND, f"no such address; {_ADDRESSES}")
        length = self._length()
        with self.server.slots:
            data = self.rfile.read(length)
            if len(data) < length:
                raise ConnectionError("the client hung up")
            try:
                clip = unpack_clip(data)
            except UserError as error:
                raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from None
            if self.path == "/applies":
                with self._told(clip):
                    return {"applies": bool(self.server.reward.applies(clip))}
            return self._score(data, clip)

    @contextmanager
    def _told(self, clip: Clip) -> Iterator[None]:
        """Of any reward, also one that is not ours: another try may do (memory, a network of its own), and the client
        has its own number of tries."""
        try:
            yield
        except Exception as error:
            self.server.count(None)
            print(f"idc rewards serve: clip {clip.id!r}: {reason_of(error)}", file=sys.stderr)
            raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, reason_of(error)) from None

    def _score(self, data: bytes, clip: Clip) -> dict[str, Any]:
        with self._told(clip):
            score = call(self.server.reward, clip)
        self.server.count(score)
        return {
            "clip": digest(data),
            "reward": self.server.reward.name,
            "value": score.value,
            "reason": score.reason,
            "details": dict(score.details),
        }

    def _length(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if len(length) > 15 or int(length) > self.server.max_bytes:
            limit = f"{self.server.max_bytes / MEGABYTE:g} MB"
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a clip has at most {limit}; --max-mb raises that")
        if self.headers.get_content_type() != CLIP_TYPE:
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type must be {CLIP_TYPE}")
        return int(length)

    def _check_token(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise RequestError(HTTPStatus.UNAUTHORIZED, "this needs the server's token")

    def _json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        self.send_response(status)
        headers = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(data))}
        for name, text in {**headers, "Connection": "close", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

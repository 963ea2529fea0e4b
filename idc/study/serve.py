"""The server that shows the page and collects answers: standard library only, a whitelist of files, nothing else.

It speaks plain HTTP. On the open internet a proxy with TLS belongs before it; all addresses in the page are relative,
so it may stand under any path.
"""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

from idc.errors import UserError
from idc.study.questions import ANSWERS, MEDIA, PUBLIC, read_study
from idc.study.store import BadRequestError, FullError, Store, UnknownRaterError

MAX_BODY = 16 * 1024
CHUNK = 64 * 1024
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mp4": "video/mp4",
    ".jpg": "image/jpeg",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src 'self' data:",
        *(f"{kind}-src 'self'" for kind in ("media", "style", "script", "connect")),
        *(f"{kind} 'none'" for kind in ("base-uri", "form-action", "frame-ancestors")),
    )
)
ONE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class RequestError(Exception):
    """Answered with its status and a JSON object `{"error": message}`."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


class StudyServer(ThreadingHTTPServer):
    """Serves one study; `server_address` tells the port where 0 was asked for.

    Raises:
        UserError: if the folder holds no study, a file of it is missing, or the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 8000, max_raters: int = 10_000) -> None:
        study = read_study(folder)
        public = folder / PUBLIC
        self.files = {"/": public / "index.html", "/style.css": public / "style.css", "/app.js": public / "app.js"}
        self.files |= {f"/{MEDIA}/{name}": public / MEDIA / name for name in study.media()}
        missing = [path for path in self.files.values() if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}: missing ({len(missing)} of {len(self.files)} files); build the study anew")
        self.store = Store(folder / ANSWERS, study, max_raters)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({error}); --port 0 picks one"
            ) from error

    def server_close(self) -> None:
        super().server_close()
        self.store.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up in the middle of a video is no error."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / /style.css /app.js /media/* /api/session, POST /api/join /api/answer; anything else is 404."""

    server: StudyServer
    protocol_version = "HTTP/1.1"
    server_version = "idc-study"
    sys_version = ""
    timeout: ClassVar[float] = 60  # seconds that a connection may stay silent

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged about raters; failures of the server itself still reach stderr."""

    def _answer(self, handle: Any) -> None:
        try:
            handle()
        except RequestError as error:
            self._json({"error": str(error)}, error.status, error.headers)
        except BadRequestError as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except UnknownRaterError as error:
            self._json({"error": str(error.args[0])}, HTTPStatus.NOT_FOUND)
        except FullError as error:
            self._json({"error": str(error)}, HTTPStatus.FORBIDDEN)
        except sqlite3.Error as error:
            # A full disk, say. The page keeps what it could not send and tries again.
            print(f"{self.server.store.path}: {error}", file=sys.stderr)
            self._json({"error": "answers cannot be stored at the moment"}, HTTPStatus.SERVICE_UNAVAILABLE)

    def _get(self) -> None:
        address, _, query = self.path.partition("?")
        if address == "/api/session":
            self._json(self.server.store.session(parse_qs(query).get("rater", [""])[0]))
            return
        # The whole address is looked up: no part of it is ever joined to a path.
        path = self.server.files.get(address)
        if path is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "no such page")
        self._file(path)

    def _post(self) -> None:
        body = self._body()
        store = self.server.store
        if self.path == "/api/join":
            store.join(body.get("rater", ""))
        elif self.path == "/api/answer":
            store.record(
                body.get("rater", ""),
                body.get("question", ""),
                body.get("choices", {}),
                body.get("revision", 1),
                body.get("seconds", 0),
            )
        else:
            raise RequestError(HTTPStatus.NOT_FOUND, "no such page")
        self._json({"ok": True})

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        # Where the body is not read, what follows on the connection is not a request: it has to be closed.
        self.close_connection = True
        if not length.isdecimal():
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY} bytes")
        data = self.rfile.read(int(length))
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        # Another site's form cannot send this type.
        if self.headers.get_content_type() != "application/json":
            raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequestError("the body is not JSON") from error
        if not isinstance(body, dict):
            raise BadRequestError("the body must be a JSON object")
        return body

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value, ensure_ascii=False).encode()
        kind = {"Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store"}
        self._headers(status, len(data), {**kind, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, path: Path) -> None:
        """The file or the one range of it that is asked for: iOS plays no video from a server without ranges."""
        size = path.stat().st_size
        is_media = path.parent.name == MEDIA
        headers = {
            "Content-Type": TYPES[path.suffix],
            # A medium's name changes with what is in it.
            "Cache-Control": "public, max-age=31536000, immutable" if is_media else "no-cache",
        }
        start, stop, status = 0, size, HTTPStatus.OK
        if is_media:
            headers |= {"Accept-Ranges": "bytes", "ETag": f'"{path.stem}"'}
            wanted = self.headers.get("Range")
            if wanted and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
                span = byte_range(wanted, size)
                if span:
                    (start, stop), status = span, HTTPStatus.PARTIAL_CONTENT
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._headers(status, stop - start, headers)
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
                self.wfile.write(chunk)
                start += len(chunk)

    def _headers(self, status: HTTPStatus, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        common = {
            "Content-Length": str(length),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            **({"Connection": "close"} if self.close_connection else {}),
        }
        for name, value in {**common, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """[start, stop) of a `Range` header over `size` bytes (RFC 9110, 14.1.2).

    Returns:
        None where the header is not one single range of bytes; the whole file is the right answer then.

    Raises:
        RequestError: 416 where the range lies outside of the file.
    """
    match = ONE_RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if max(len(first), len(last)) > 18:
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size:
        raise RequestError(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "outside of the file", {"Content-Range": f"bytes */{size}"}
        )
    return start, stop

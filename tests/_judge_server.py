"""A chat server on the loopback for tests of what asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from idc.models.judge_server import ServerJudge


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
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw) if "json" in self.headers["Content-Type"] else {"raw": raw}
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


@contextmanager
def chat_server() -> Iterator[Server]:
    """A `Server` that answers "4" until it gets another script."""
    server = Server()
    try:
        yield server
    finally:
        server.release.set()
        server.http.shutdown()
        server.http.server_close()

"""The server over loopback: only its own files, ranges, bad requests, concurrent raters, and a kill -9."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _study import SYSTEMS, make_study

from idc.cli import main
from idc.errors import UserError
from idc.study.serve import MAX_BODY, StudyServer

RATER = "ab" * 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_study(root)
    return root / "study"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[StudyServer]:
    with StudyServer(folder, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(port: int, path: str, body: object = None, method: str = "", **headers: str) -> tuple[int, dict, bytes]:
    """(status, headers, body) of one request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, data, {**kind, **names})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def take_part(port: int, rater: str, choice: str = "left") -> list[str]:
    """Join, answer everything, each post twice; the questions' ids."""
    assert ask(port, "/api/join", {"rater": rater})[0] == 200
    questions = json.loads(ask(port, f"/api/session?rater={rater}")[2])["questions"]
    for question in questions:
        choices = {criterion["key"]: choice for criterion in question["criteria"]}
        post = {"rater": rater, "question": question["id"], "choices": choices, "revision": 1, "seconds": 3.5}
        for _ in range(2):
            status, _, body = ask(port, "/api/answer", post)
            assert (status, json.loads(body)) == (200, {"ok": True})
    return [question["id"] for question in questions]


def test_nothing_that_is_served_names_a_system(server: StudyServer) -> None:
    port = server.server_address[1]
    assert ask(port, "/api/join", {"rater": RATER})[0] == 200
    answers = [ask(port, path) for path in (*server.files, f"/api/session?rater={RATER}", "/nothing")]
    assert [status for status, _, _ in answers] == [200] * (len(answers) - 1) + [404]
    for _, headers, body in answers:
        for system in SYSTEMS:
            assert system.encode() not in body
            assert system not in str(headers)
        assert "Last-Modified" not in headers  # tells which were made together


def test_the_page_asks_nothing_of_other_machines_and_allows_no_foreign_code(server: StudyServer) -> None:
    status, headers, page = ask(server.server_address[1], "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["Referrer-Policy"] == "no-referrer"
    loaded = re.findall(rb'(?:src|href)="([^"]+)"', page)
    assert set(loaded) == {b"style.css", b"app.js", b"data:,"}
    assert b"<style" not in page
    assert not re.search(rb"<script(?! src)", page)


@pytest.mark.parametrize(
    "path",
    [
        "/study.json",
        "/../study.json",
        "/media/../../study.json",
        "/media/%2e%2e/%2e%2e/study.json",
        "/media/..%2f..%2fstudy.json",
        "//etc/passwd",
        "//[",
        "/media//etc/passwd",
        "/answers.sqlite",
        "/media/",
        "/index.html%00",
        "/api/join",
        "/api/answer",
    ],
)
def test_no_other_file_can_be_reached(server: StudyServer, path: str) -> None:
    status, _, body = ask(server.server_address[1], path)
    assert status == 404
    assert json.loads(body) == {"error": "no such page"}


@pytest.mark.parametrize(
    ("header", "status", "span"),
    [
        ("", 200, (0, None)),
        ("bytes=0-1", 206, (0, 2)),
        ("bytes=10-", 206, (10, None)),
        ("bytes=-7", 206, (-7, None)),
        ("bytes=5-99999999", 206, (5, None)),
        ("bytes=-99999999", 206, (0, None)),
        ("bytes=0-0", 206, (0, 1)),
        ("bytes=99999999-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=5-4", 200, (0, None)),
        ("bytes=0-1,5-6", 200, (0, None)),
        ("bytes=-", 200, (0, None)),
        ("lines=0-1", 200, (0, None)),
        ("bytes=" + "9" * 400 + "-", 200, (0, None)),
    ],
)
def test_ranges_of_a_video(server: StudyServer, header: str, status: int, span) -> None:
    path = next(path for path in server.files if path.endswith(".mp4"))
    whole = server.files[path].read_bytes()
    found, headers, body = ask(server.server_address[1], path, **({"Range": header} if header else {}))
    assert found == status
    if span is None:
        assert headers["Content-Range"] == f"bytes */{len(whole)}"
        return
    assert body == whole[slice(*span)]
    assert headers["Content-Type"] == "video/mp4"
    assert headers["Accept-Ranges"] == "bytes"
    assert int(headers["Content-Length"]) == len(body)
    if status == 206:
        start = slice(*span).indices(len(whole))[0]
        assert headers["Content-Range"] == f"bytes {start}-{start + len(body) - 1}/{len(whole)}"


def test_a_range_of_another_version_is_the_whole_and_head_has_no_body(server: StudyServer) -> None:
    port = server.server_address[1]
    path = next(path for path in server.files if path.endswith(".mp4"))
    size = server.files[path].stat().st_size
    status, headers, body = ask(port, path, Range="bytes=0-1", If_Range='"other"')
    assert (status, len(body)) == (200, size)
    assert ask(port, path, Range="bytes=0-1", If_Range=headers["ETag"])[0] == 206
    status, headers, body = ask(port, path, method="HEAD")
    assert (status, int(headers["Content-Length"]), body) == (200, size, b"")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b"null", 400, "JSON object"),
        (b"[" * 8000, 400, "not JSON"),
        (b'{"rater": "xyz"}', 400, "32 hexadecimal"),
        (b'{"rater": {"$ne": 1}}', 400, "32 hexadecimal"),
        (b" " * (MAX_BODY + 1), 413, "bytes"),
    ],
)
def test_bad_posts_are_answered_and_the_server_goes_on(server: StudyServer, body: bytes, status: int, message) -> None:
    port = server.server_address[1]
    found, _, answer = ask(port, "/api/join", body)
    assert (found, message in json.loads(answer)["error"]) == (status, True)
    assert ask(port, "/")[0] == 200


def test_a_form_of_another_site_cannot_post(server: StudyServer) -> None:
    port = server.server_address[1]
    assert ask(port, "/api/join", b'{"rater": ""}', Content_Type="text/plain")[0] == 415
    assert ask(port, "/api/join", method="POST", Transfer_Encoding="chunked")[0] == 411
    assert ask(port, "/api/nothing", {})[0] == 404
    assert ask(port, "/", method="PUT")[0] == 501
    assert ask(port, "/api/session?rater=" + "0" * 32)[0] == 404
    assert ask(port, "/api/session")[0] == 404


def test_raters_at_the_same_time_lose_and_double_nothing(server: StudyServer) -> None:
    port = server.server_address[1]
    raters = [f"{number:032x}" for number in range(1, 13)]
    with ThreadPoolExecutor(12) as pool:
        ids = list(pool.map(lambda rater: take_part(port, rater), raters))
    flat = [question for own in ids for question in own]
    assert len(flat) == len(set(flat))
    stored = [answer for answer in server.store.answers() if answer.question in set(flat)]
    assert {answer.question for answer in stored} == set(flat)
    assert len({(answer.question, answer.criterion) for answer in stored}) == len(stored)
    sessions = [json.loads(ask(port, f"/api/session?rater={rater}")[2]) for rater in raters]
    assert all(set(session["answers"]) == {q["id"] for q in session["questions"]} for session in sessions)
    # 12 comparisons, 4 a rater, 12 raters, and one who joined for another test: each was asked 4 times, or 5.
    compared = [a for a in stored if a.kind == "compare" and a.criterion == "motion"]
    counts = {}
    for answer in compared:
        key = (answer.item, *sorted((answer.left, answer.right)))
        counts[key] = counts.get(key, 0) + 1
    assert len(compared) == 48
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 2


def start(folder: Path) -> tuple[subprocess.Popen, int]:
    """The command in a process of its own, and the port that it prints."""
    command = [sys.executable, "-m", "idc", "study", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    match = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
    return process, int(match[1])


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    make_study(tmp_path)
    folder = tmp_path / "study"
    first, port = start(folder)
    with first:
        done = take_part(port, RATER)
        first.kill()
    assert first.returncode == -9
    second, port = start(folder)
    with second:
        session = json.loads(ask(port, f"/api/session?rater={RATER}")[2])
        assert [question["id"] for question in session["questions"]] == done
        assert set(session["answers"]) == set(done)
        take_part(port, "cd" * 16)
        second.terminate()
        assert "2 raters have joined, 2 finished" in second.stdout.read()
    assert second.returncode == 0


def test_a_folder_that_cannot_be_served_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["study", "serve", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    (tmp_path / "study.json").write_text('{"systems": []}')
    with pytest.raises(UserError, match="is not a plan"):
        StudyServer(tmp_path, port=0)
    plan = json.loads((folder / "study.json").read_text())
    plan["sizes"]["../../etc/passwd"] = [1, 1]
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="not a name that idc study build gives"):
        StudyServer(tmp_path, port=0)
    (tmp_path / "study.json").write_bytes((folder / "study.json").read_bytes())
    with pytest.raises(UserError, match="missing"):
        StudyServer(tmp_path, port=0)
    shutil.copytree(folder / "public", tmp_path / "public")
    (tmp_path / "answers.sqlite").write_bytes(b"not a database, but long enough to look like one" * 100)
    for command in ("serve", "report"):
        assert main(["study", command, str(tmp_path)]) == 2
        assert "cannot be used as the database of answers" in capsys.readouterr().err


def test_when_answers_cannot_be_stored_the_page_is_told_to_try_again(folder: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("answers*"))
    with StudyServer(tmp_path / "study", port=0, max_raters=1) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            port = server.server_address[1]
            assert ask(port, "/api/join", {"rater": RATER})[0] == 200
            status, _, body = ask(port, "/api/join", {"rater": "cd" * 16})
            assert (status, json.loads(body)["error"]) == (403, "the study has its 1 raters")
            with server.store._connect() as db:
                db.execute("ALTER TABLE raters RENAME TO elsewhere")
            assert ask(port, "/api/join", {"rater": RATER})[0] == 503
            assert "no such table: raters" in capsys.readouterr().err
        finally:
            server.shutdown()
            thread.join()


def test_a_port_that_is_taken_is_named(server: StudyServer, folder: Path, capsys) -> None:
    port = server.server_address[1]
    assert main(["study", "serve", str(folder), "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err
    assert main(["study", "serve", str(folder), "--port", "99999"]) == 2

"""Weights of the hub where there is none: told at once; where there is one, it is asked as ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from idc.metrics.gme import GmeScore
from idc.metrics.motion import MotionAmplitude
from idc.models.embedders import GMEEmbedder
from idc.stages.hub import names_hub, offline_without_a_network, reachable
from idc.stages.judged import settings_of

NOBODY = "http://127.0.0.1:9"  # the port of the discard protocol, which nobody serves


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reachable.cache_clear()
    yield
    reachable.cache_clear()


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has nothing, and what was asked of it."""
    asked: list[str] = []

    class Nothing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_without_a_hub_its_client_is_offline_while_weights_are_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    metric = GmeScore(embedder=GMEEmbedder())
    with offline_without_a_network(settings_of(metric)["settings"]):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ZeroDivisionError), offline_without_a_network("owner/name"):
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked_once_and_downloads_go_on(
    hub: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    endpoint, asked = hub
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for _ in range(3):
        with offline_without_a_network({"path": "owner/name"}):
            assert not constants.HF_HUB_OFFLINE
    assert len(asked) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # who asked for it keeps it
    with offline_without_a_network({"path": "owner/name"}):
        assert constants.HF_HUB_OFFLINE


def test_nothing_is_asked_for_what_does_not_come_from_the_hub(
    hub: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    endpoint, asked = hub
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "gme").mkdir(parents=True)
    for settings in (settings_of(MotionAmplitude())["settings"], {"a": [{"path": "weights/gme"}]}, {"n": 1, "x": None}):
        with offline_without_a_network(settings):
            pass
    assert asked == []
    assert names_hub({"a": [{"path": "weights/other"}]})
    assert not names_hub(["a word / another", "/an/absolute/path", "https://x.y/z"])

"""Weights of the hub where there is none: told at once; where there is one, it is asked as ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from idc.errors import UserError
from idc.metrics.gme import GmeScore
from idc.metrics.motion import MotionAmplitude
from idc.models.codecs import WanVAECodec
from idc.models.conditioners import UMT5Conditioner
from idc.models.embedders import GMEEmbedder
from idc.models.grounding import GroundingDino
from idc.models.hub import names_hub, offline_without_a_network, reachable
from idc.models.spec import TransformerSpec
from idc.models.vlm import QwenVLConditioner
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


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (lambda: TransformerSpec(pretrained="owner/name").build(8, 6), "transformer.pretrained='owner/name'"),
        (lambda: TransformerSpec(pretrained="owner/name").build(8, 6, "meta"), "transformer.pretrained='owner/name'"),
        (lambda: WanVAECodec("owner/name").load(), "path='owner/name': cannot load a Wan VAE"),
        (lambda: UMT5Conditioner("owner/name").load(), "path='owner/name': cannot load a UMT5 encoder"),
        (lambda: QwenVLConditioner("owner/name").load(), "path='owner/name': cannot load Qwen2.5-VL"),
        (lambda: GroundingDino("owner/name").load(), "path='owner/name': cannot load GroundingDINO"),
    ],
)
def test_without_a_hub_missing_weights_are_told_at_once_and_in_whole_sentences(
    load: Callable[[], object], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def retried(seconds: float) -> None:
        raise AssertionError(f"a retry in {seconds} s")

    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr("time.sleep", retried)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert message.startswith(what)
    assert message.endswith("; the model hub is out of reach: give a local folder")
    assert len(message.splitlines()) == 1
    assert "make sure" not in message
    assert len(message) < 300


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

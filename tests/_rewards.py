"""Rewards that behave as told, in a module that worker processes can import, and clips for them."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from idc.errors import UserError
from idc.metrics.base import Clip, Score
from idc.rewards.base import Reward
from idc.rewards.client import HttpReward
from idc.rewards.composite import Composite, Term
from idc.rewards.server import RewardServer


def grey(name: str, level: int = 0) -> Clip:
    return Clip(name, np.full((2, 4, 4, 3), level, np.uint8))


@dataclass
class Fixed(Reward):
    """The value of the clip's id, or of "*": a number, a reason, or an exception to raise; None does not apply."""

    values: dict[str, Any]
    name: str = "fixed"
    models: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-1e6, 1e6)
    calls: Counter[str] = field(default_factory=Counter)
    thread_safe = True

    def of(self, clip: Clip) -> Any:
        return self.values.get(clip.id, self.values.get("*"))

    def applies(self, clip: Clip) -> bool:
        return self.of(clip) is not None

    def score(self, clip: Clip) -> Score:
        self.calls[clip.id] += 1
        value = self.of(clip)
        if isinstance(value, Exception):
            raise value
        return Score.failed(value) if isinstance(value, str) else Score(float(value))


@dataclass
class People(Reward):
    """Mean pixel, of clips whose category names people."""

    name: str = "people"
    models: tuple[str, ...] = ("sface",)
    bounds: tuple[float, float] = (0.0, 255.0)
    asked: Counter[str] = field(default_factory=Counter)
    thread_safe = True

    def applies(self, clip: Clip) -> bool:
        self.asked[clip.category] += 1
        return "human" in clip.category

    def score(self, clip: Clip) -> Score:
        assert "human" in clip.category
        return Score(float(clip.frames_THWC.mean()))


class Flaky(Fixed):
    """Raises on the first `faults` calls for each clip."""

    faults = 1

    def score(self, clip: Clip) -> Score:
        if self.calls[clip.id] < self.faults:
            self.calls[clip.id] += 1
            raise RuntimeError(f"call {self.calls[clip.id]} got lost")
        return super().score(clip)


class Texture(Reward):
    """Standard deviation of a matrix product of the pixels: float32 arithmetic whose rounding an autocast changes."""

    name = "texture"
    bounds = (0.0, 1e9)

    def score(self, clip: Clip) -> Score:
        pixels = torch.from_numpy(clip.frames_THWC).float().flatten(1) / 3
        assert not torch.is_grad_enabled()
        return Score((pixels @ pixels.T).std().item())


class Troubled(Reward):
    """Mean pixel, but for the clips "stuck" (hangs) and "poison" (ends the process)."""

    name = "troubled"
    bounds = (0.0, 255.0)
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        if clip.id == "stuck":
            threading.Event().wait(60)
        if clip.id == "poison":
            os._exit(3)
        return Score(float(clip.frames_THWC.mean()))


class Unloadable(Troubled):
    def load(self, device: torch.device | str = "cpu") -> None:
        raise UserError("reward.safetensors: no such file")


def composite(*rewards: Reward, **settings: Any) -> Composite:
    """All with weight 1."""
    return Composite([Term(reward) for reward in rewards], **settings)


@contextmanager
def served(reward: Reward, **settings: Any) -> Iterator[RewardServer]:
    with RewardServer(reward, port=0, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def client(server: Any, **settings: Any) -> HttpReward:
    port = server.server_address[1]
    return HttpReward(f"http://127.0.0.1:{port}/", **{"pause": 0.0, "timeout": 30.0, **settings})


class _Lines(io.TextIOBase):
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def write(self, text: str) -> int:
        self.connection.send(text)
        return len(text)


def serve(connection: Any, *arguments: str) -> None:
    """`idc rewards serve` in this process; what it prints goes to `connection`."""
    from idc.cli import main

    torch.set_num_threads(1)
    sys.stdout = _Lines(connection)  # type: ignore[assignment]
    raise SystemExit(main(["rewards", "serve", *arguments]))

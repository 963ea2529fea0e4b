"""A reward that another machine computes (`idc rewards serve`)."""

from __future__ import annotations

import math
from typing import Any

import torch

from idc.errors import UserError
from idc.metrics.base import Clip, Score
from idc.models.http_client import HttpClient, PassingError, ServerError
from idc.rewards.base import Reward
from idc.rewards.payload import CLIP_TYPE, digest, pack_clip, read_score


class HttpReward(HttpClient, Reward):
    """Whatever reward the server at `url` serves. What goes wrong is a failed score with its reason, never a number.

    Its models and bounds are the server's; they are known after `load`.

    Args:
        url: of the server, "http://judge-1:8900".
        timeout: seconds that one try may take without hearing from the server, which includes its waiting line.
        retries: how often a request is made again that meets a timeout, a lost connection, half an answer, or status
            408, 409, 425, 429 or 5xx.
        pause: seconds before the first of these, doubled each time up to 60.
        name: the reward that the server must serve; whatever it serves where empty.
        concurrency: requests under way at once, over all threads of this process.
        token_env: environment variable with the token that the server asks for.

    Raises:
        UserError: for settings out of range or an address that is not HTTP.
    """

    name = "http"
    bounds = (-math.inf, math.inf)
    thread_safe = True

    def __init__(
        self,
        url: str,
        timeout: float = 120.0,
        retries: int = 2,
        pause: float = 1.0,
        name: str = "",
        concurrency: int = 4,
        token_env: str = "IDC_REWARD_TOKEN",
    ) -> None:
        if retries < 0:
            raise UserError(f"retries={retries}: must be 0 or more")
        super().__init__(url.rstrip("/"), token_env, timeout, retries + 1, pause, concurrency)
        self.expected = name
        self.name = name or type(self).name

    @property
    def server(self) -> str:
        return f"the reward server at {self.url}"

    def load(self, device: torch.device | str = "cpu") -> None:
        """Ask the server what it serves; `device` is the server's business.

        Raises:
            UserError: for a server that does not answer, or serves another reward.
        """
        try:
            health = self.ask(_read_health, url=f"{self.url}/health")
        except ServerError as error:
            raise UserError(f"{error}; is `idc rewards serve` running there?") from None
        if self.expected and health["reward"] != self.expected:
            raise UserError(f"{self.server} serves {health['reward']!r}, not {self.expected!r}")
        self.models, self.bounds = tuple(health["models"]), health["bounds"]

    def score(self, clip: Clip) -> Score:
        try:
            data = pack_clip(clip)
            asked = digest(data)
            return self.ask(lambda answer: read_score(answer, asked, self.bounds), data, CLIP_TYPE, f"{self.url}/score")
        except (ServerError, UserError) as error:
            return Score.failed(str(error))


def _read_health(answer: Any) -> dict[str, Any]:
    try:
        low, high = answer["bounds"]
        return {
            "reward": str(answer["reward"]),
            "models": [str(model) for model in answer["models"]],
            "bounds": (-math.inf if low is None else float(low), math.inf if high is None else float(high)),
        }
    except (KeyError, TypeError, ValueError):
        raise PassingError("its answer to /health says nothing of a reward") from None

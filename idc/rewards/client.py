"""A reward that another machine computes (`idc rewards serve`)."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from idc.errors import UserError
from idc.metrics.base import Clip, Score
from idc.models.http_client import HttpClient, PassingError, ServerError
from idc.rewards.base import Reward
from idc.rewards.payload import CLIP_TYPE, digest, pack_clip, read_score

_CONDITIONS = 10_000  # whose answers are kept, in each process
_BLANK = np.zeros((1, 1, 1, 3), np.uint8)


class HttpReward(HttpClient, Reward):
    """Whatever reward the server at `url` serves. What goes wrong is a failed score with its reason, never a number.

    Its models and bounds are the server's; they are known after `load`. Whether it applies is asked once for each
    condition, by the first clip's first frame.

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
        # Not by their own names: those are settings, and equal before and after `load`.
        self._facts: dict[str, Any] = {"models": (), "bounds": (-math.inf, math.inf)}
        self._applies: dict[str, bool] = {}
        self._lost = threading.local()  # the clip that this thread could not ask about, and why

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
        self.learn({"models": tuple(health["models"]), "bounds": health["bounds"]})

    @property
    def models(self) -> tuple[str, ...]:  # type: ignore[override]  # others have a value
        return self._facts["models"]

    @property
    def bounds(self) -> tuple[float, float]:  # type: ignore[override]
        return self._facts["bounds"]

    def learn(self, facts: Any) -> None:
        self._facts = dict(facts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_lost"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lost = threading.local()

    def applies(self, clip: Clip) -> bool:
        """As the server says; True where it cannot be asked, and `score` of that clip fails for that reason then."""
        try:
            condition = digest(pack_clip(replace(clip, id="", frames_THWC=_BLANK, masks_TNHW=None)))
            known = self._applies.get(condition)
            if known is None:
                data = pack_clip(replace(clip, id="", frames_THWC=clip.frames_THWC[:1], masks_TNHW=None))
                known = self.ask(_read_applies, data, CLIP_TYPE, f"{self.url}/applies")
                if len(self._applies) >= _CONDITIONS:
                    self._applies.clear()
                self._applies[condition] = known
            return known
        except (ServerError, UserError) as error:
            self._lost.clip, self._lost.score = clip, Score.failed(str(error))
            return True

    def score(self, clip: Clip) -> Score:
        if vars(self._lost).pop("clip", None) is clip:
            return self._lost.score
        try:
            data = pack_clip(clip)
            asked = digest(data)
            return self.ask(lambda answer: read_score(answer, asked, self.bounds), data, CLIP_TYPE, f"{self.url}/score")
        except (ServerError, UserError) as error:
            return Score.failed(str(error))


def _read_applies(answer: Any) -> bool:
    if isinstance(answer, dict) and isinstance(answer.get("applies"), bool):
        return answer["applies"]
    raise PassingError("its answer to /applies is no true or false")


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

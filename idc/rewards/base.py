"""What every reward is: one clip in, one score or a named failure out. Mostly a metric, per sample."""

from __future__ import annotations

import contextlib
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from idc.errors import UserError
from idc.metrics.base import Clip, Score, VideoMetric, checked

# OpenCV's networks and many models keep state between calls, and two rewards may share one.
_ONE_AT_A_TIME = threading.RLock()
_in_turn: list[str] = []  # names of the rewards in it, changed by who holds the lock alone


def in_turn() -> str:
    """The reward that the others which are not thread-safe wait for at this moment; "" for none."""
    names = _in_turn[:1]
    return names[0] if names else ""


@contextlib.contextmanager
def _turn(reward: Reward) -> Iterator[None]:
    if reward.thread_safe:
        yield
        return
    with _ONE_AT_A_TIME:
        _in_turn.append(reward.name)
        try:
            yield
        finally:
            _in_turn.pop()


class Reward(ABC):
    """A number for one generated clip; higher is better. Making one is light, `load` is what is heavy.

    Attributes:
        name: key in breakdowns, logs and recipes.
        bounds: lowest and highest value that `score` can return; what lies outside is a failure.
        models: names of the networks that the value stands on; a report flags metrics that stand on the same.
        thread_safe: whether threads may be in `score` at once. Others take turns, over all rewards of the process.
    """

    name: str
    bounds: tuple[float, float] = (0.0, 1.0)
    models: tuple[str, ...] = ()
    thread_safe: ClassVar[bool] = False

    def load(self, device: torch.device | str = "cpu") -> None:  # noqa: B027  # many load nothing
        """Load the networks; idempotent.

        Raises:
            UserError: for weights that are missing, or a server that is not there.
        """

    def unload(self) -> None:  # noqa: B027  # as `load`
        """Free what `load` loaded."""

    def applies(self, clip: Clip) -> bool:
        """Whether the reward says anything about such a clip: faces say nothing about an item without people.

        It must depend on what was asked for alone (references, prompt, category, meta), so that it is the same for
        all rollouts of a group.
        """
        return True

    def facts(self) -> Any:
        """What is known of it once it is loaded, for `learn` of another copy: plain values."""
        return {"models": tuple(self.models), "bounds": tuple(self.bounds)}

    def learn(self, facts: Any) -> None:
        """Take over what a loaded copy in another process knows."""
        for name, value in facts.items():
            if value != getattr(self, name):
                setattr(self, name, value)

    @abstractmethod
    def score(self, clip: Clip) -> Score:
        """The reward of one clip, the same for the same clip whatever was scored before.

        Returns:
            a failed score, never a number, where the clip cannot be judged: that is final.

        Raises:
            Exception: for a fault that another call may not meet (memory, a network, a lost connection): the runner
                tries again. A `UserError` is not tried again.
        """


def call(reward: Reward, clip: Clip) -> Score:
    """`reward.score(clip)` as it is wherever it runs: without gradients, outside any autocast of the training step,
    one thread at a time unless the reward is thread-safe, with plain details; a failure if outside of its bounds."""
    with _turn(reward), torch.no_grad(), torch.autocast("cpu", enabled=False), contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        return checked(reward.score(clip), reward.bounds)


class MetricReward(Reward):
    """Any metric of `idc.metrics` as a reward: its raw score on a linear scale on which 0 is worst and 1 is best.

    The scale is not cut at its ends: of two poor rollouts the better one must still be told apart.

    Args:
        metric: computes the raw score.
        name: of the reward; the metric's where empty.
        scale: raw scores that count as 0 and as 1; the metric's bounds where None. The first is the larger one where
            lower is better, as it is with None for such metrics.

    Raises:
        UserError: for a scale without extent, or none for a metric whose bounds are infinite.

    >>> from idc.metrics import CopyPaste
    >>> reward = MetricReward(CopyPaste())
    >>> reward.name, reward.scale
    ('copy_paste', (1.0, 0.0))
    """

    def __init__(self, metric: VideoMetric, name: str = "", scale: tuple[float, float] | None = None) -> None:
        low, high = metric.bounds if metric.higher_is_better else metric.bounds[::-1]
        worst, best = map(float, (low, high) if scale is None else scale)
        if not (math.isfinite(worst) and math.isfinite(best) and worst != best):
            raise UserError(f"scale={scale} of {metric.name}: must be two different numbers, what counts as 0 and as 1")
        self.metric, self.name, self.scale = metric, name or metric.name, (worst, best)
        self.models = tuple(metric.models)
        ends = sorted((bound - worst) / (best - worst) for bound in metric.bounds)
        self.bounds = (ends[0], ends[1])

    def load(self, device: torch.device | str = "cpu") -> None:
        self.metric.load(device)

    def unload(self) -> None:
        self.metric.unload()

    def applies(self, clip: Clip) -> bool:
        return self.metric.applies(clip)

    def score(self, clip: Clip) -> Score:
        found = checked(self.metric.score(clip), self.metric.bounds)
        raw = None if found.value is None else self.raw(found)
        if raw is None:
            return found
        worst, best = self.scale
        return Score((raw - worst) / (best - worst), found.reason, {**found.details, "raw": raw})

    def raw(self, found: Score) -> float | None:
        """The raw value of a metric's score that has one."""
        return found.value

"""Rewards: one number per sample, mostly a metric's, and their weighted sums with a breakdown by name.

A reward is a class here and a line in a recipe. `composite` adds them up, `runner` runs them while rollouts go on, in
this process, in threads or in a pool of processes, and `server` and `client` put any of them on another machine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Classes by module; a module is imported when one of its classes is asked for.
_CLASSES = {
    "base": ("MetricReward", "Reward"),
    "client": ("HttpReward",),
    "composite": ("Breakdown", "Composite", "PaperReward", "Term", "combine"),
    "leaks": ("AntiLeak", "ToyAntiLeak"),
    "measures": ("AestheticReward", "Brightness", "FaceReward", "NaturalReward", "SubjectReward"),
    "runner": ("RewardRunner",),
    "server": ("RewardServer",),
    "toy": ("ToyAesthetics", "ToyFace", "ToyNatural", "ToySubject"),
    "watch": ("Motion", "Saturation", "Sharpness"),
}
_HOMES = {name: module for module, names in _CLASSES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

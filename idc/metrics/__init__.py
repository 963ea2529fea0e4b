"""Metrics: a pure functional core and thin torchmetrics classes. Every class exported here keeps the same contract.

`tests/test_metrics_contract.py` holds all of them to it; a new one is a line here and a line there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Classes by module; a module is imported when one of its classes is asked for.
_CLASSES = {
    "aesthetics": ("Aesthetics",),
    "copy_paste": ("CopyPaste",),
    "facesim": ("FaceSim",),
    "gme": ("GmeScore",),
    "identity": ("IdentityTracking",),
    "motion": ("MotionAmplitude",),
    "natural": ("NaturalScore",),
    "nexus": ("NexusScore",),
    "qalign": ("QAlign",),
    "smoothness": ("MotionSmoothness",),
    "toy": ("ToyIdentity", "ToyScores"),
}
_HOMES = {name: module for module, names in _CLASSES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""What decides the outcome of a source, a step or a network, as plain JSON, and how provenance and tables name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def words_of(kind: type) -> str:
    """A class's name in words: "motion filter" of `MotionFilter`."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()


def plain_settings(thing: Any) -> dict[str, Any]:
    """Class and public attributes of an object as plain JSON, nested objects by their own `describe` or the same."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
        if hasattr(value, "describe"):
            return dict(value.describe())
        if hasattr(value, "fingerprint"):  # a network: where its weights lie and where it runs decide nothing
            return {"class": type(value).__qualname__, "model": model_version(value)}
        return plain_settings(value) if hasattr(value, "__dict__") else str(value)

    own = {key: plain(value) for key, value in vars(thing).items() if not key.startswith("_")}
    return {"class": f"{type(thing).__module__}.{type(thing).__qualname__}", **own}


def model_version(model: Any) -> str:
    """How provenance names a network: its name, and the fingerprint of its weights and settings where there is one
    (a model behind a server has none)."""
    fingerprint = getattr(model, "fingerprint", "")
    return f"{model.name} ({fingerprint})" if fingerprint else str(model.name)

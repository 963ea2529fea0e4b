"""One network for all steps of a recipe that name the same: it is loaded once a worker, and lies in memory once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from idc.curate.describing import plain_settings
from idc.models.faces import FaceBackend
from idc.models.frozen import Frozen

_NETWORKS = (Frozen, FaceBackend)


def share_networks(things: Iterable[Any]) -> None:
    """Put one object in the place of equal networks that `things`, or objects of theirs, hold as attributes.

    Equal are networks of one class with the same public settings, whose own networks are equal.
    """
    known: dict[str, Any] = {}
    seen: set[int] = set()
    for thing in things:
        _share(thing, known, seen)


def _share(owner: Any, known: dict[str, Any], seen: set[int]) -> None:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in list(vars(owner).items()):
        if not hasattr(value, "__dict__") or isinstance(value, type):
            continue
        _share(value, known, seen)
        if isinstance(value, _NETWORKS):
            first = known.setdefault(json.dumps(plain_settings(value), sort_keys=True, default=str), value)
            if first is not value:
                setattr(owner, name, first)

"""Values as a checkpoint may hold them: primitives, tensors, and lists and dictionaries of them.

Lightning drops `weights_only` for sharded strategies, and torch then refuses to load any other class: a `Path` among
the hyperparameters is saved without complaint and cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch

from idc.errors import UserError


def plain(value: Any, where: str) -> Any:
    """Turn paths into strings, enums into their values and containers into dict, list, tuple.

    Raises `UserError` naming the entry (`where`, extended by keys) for anything else.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value, where)
    for base in (bool, int, float, str):  # subclasses, NumPy's among them
        if isinstance(value, base):
            return base(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "ListConfig":
        items = [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        return plain(vars(value), where)
    raise UserError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds only numbers, strings, "
        "tensors and containers of them; leave it out with save_hyperparameters(ignore=[...])"
    )

"""What metrics are given, and what they are known by: clips with references read late, and settings as plain JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from enum import Enum
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idc.data.benchmark import Item
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, VideoMetric

# Seen in run.json, these would be given away with the results.
_SECRET = re.compile(r"(^|_)(api_?key|secret|password|(auth|access|hf)_?token)$", re.IGNORECASE)
_SHARED = frozenset(vars(type("Bare", (VideoMetric,), {"name": "bare", "score": lambda self, clip: None})()))


class FileReference(Reference):
    """A reference that is read when a metric first looks at it, so that only those that look can fail over it."""

    def __init__(self, path: Path, name: str, kind: str) -> None:
        # Not the dataclass's own, which looks at the pixels at once.
        self.__dict__.update(path=path, name=name, kind=kind)

    @cached_property
    def _picture(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        from PIL import Image, ImageOps

        path: Path = self.__dict__["path"]
        try:
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
                if not picture.has_transparency_data:
                    return np.array(picture.convert("RGB")), None
                # Cut-outs are shown on white, as the benchmark's are, and what is opaque is the subject.
                cut_out = picture.convert("RGBA")
                white = Image.new("RGBA", cut_out.size, "white")
                white.alpha_composite(cut_out)
                return np.array(white.convert("RGB")), np.array(cut_out.getchannel("A")) >= 128
        except FileNotFoundError:
            raise UserError(f"reference {path.name}: no such file") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"reference {path.name}: cannot be read: {error}") from None

    @cached_property
    def image_HWC(self) -> NDArray[np.uint8]:
        return self._picture[0]

    @cached_property
    def mask_HW(self) -> NDArray[np.bool_] | None:
        return self._picture[1]


def clip_of(item: Item, frames_THWC: NDArray[np.uint8] | None = None, fps: float = 0.0) -> Clip:
    """An item with its frames as metrics want it; without frames for `VideoMetric.applies`."""
    count = len(item.references)
    labels, kinds = item.labels or ("",) * count, item.kinds or ("object",) * count
    return Clip(
        id=item.id,
        frames_THWC=np.zeros((1, 1, 1, 3), np.uint8) if frames_THWC is None else frames_THWC,
        prompt=item.prompt,
        references=tuple(map(FileReference, item.references, labels, kinds)),
        fps=fps or Clip.fps,
        category=item.category,
        meta=item.meta,
    )


def settings_of(metric: VideoMetric) -> dict[str, Any]:
    """What a metric is, before anything is loaded: its class, frames, bounds, models and public attributes.

    Two metrics with equal settings give equal scores; weights behind an equal name are taken to be equal.
    """
    own = {name: value for name, value in vars(metric).items() if name not in _SHARED}
    return {
        "class": f"{type(metric).__module__}.{type(metric).__qualname__}",
        "models": list(metric.models),
        "bounds": [float(bound) if math.isfinite(bound) else str(bound) for bound in metric.bounds],
        "frames": metric.frames,
        "settings": _public(own, 4),
    }


def digest(settings: Mapping[str, Any]) -> str:
    """A short name of settings: equal for equal ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _public(values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {
        str(name): "(not written down)" if _SECRET.search(str(name)) and value else describe(value, depth - 1)
        for name, value in sorted(values.items(), key=lambda entry: str(entry[0]))
        if not str(name).startswith("_") and name != "device"  # where something runs is not what it is
    }


def describe(value: Any, depth: int = 4) -> Any:
    """`value` as plain JSON without secrets: objects by their class and public attributes, arrays by their content."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Enum | PurePath | torch.device | torch.dtype):
        return str(value)
    if isinstance(value, np.generic):
        return describe(value.item())
    if isinstance(value, np.ndarray | torch.Tensor):
        content = np.ascontiguousarray(torch.as_tensor(value).detach().cpu().float().numpy()).tobytes()
        return f"array {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    if isinstance(value, list | tuple | set | frozenset):
        entries = [describe(entry, depth - 1) for entry in value] if depth > 0 else [str(type(value))]
        return sorted(entries, key=str) if isinstance(value, set | frozenset) else entries
    if isinstance(value, Mapping):
        return _public(value, depth) if depth > 0 else {}
    if hasattr(value, "__qualname__") or not hasattr(value, "__dict__"):  # functions, classes; plain objects
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    if isinstance(value, os.PathLike):  # jsonargparse has its own
        return os.fspath(value)
    inner = _public(vars(value), depth) if depth > 0 else {}
    return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **inner}

"""COCO's run-length code of masks, compressed (a string) and plain (a list of runs).

Runs go down the columns, one column after the other, and begin with a run of background (which may be 0 long). The
compressed form writes each run less the one before the last, from the fourth run on, in groups of 5 bits, lowest first,
as characters from "0" on; the bit above them says that another group follows, and the last group's top bit is the sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from idc.curate.candidate import Mask

MAX_PIXELS = 1 << 28  # a mask is refused beyond: a record of a few bytes may claim any size
_GROUP, _MORE, _SIGN, _FIRST = 5, 0x20, 0x10, ord("0")
_MAX_GROUPS = 7  # of one number: 35 bits hold every run of a mask that is not refused


class RLEError(ValueError):
    """No run-length code of a mask. The message is a short reason."""


def encode(mask: Mask, compressed: bool = True) -> dict[str, Any]:
    """A mask `[H, W]` as {"size": [H, W], "counts": a string, or where not compressed a list of runs}."""
    runs = _runs(mask)
    return {"size": [int(side) for side in mask.shape], "counts": _compress(runs) if compressed else runs}


def decode(code: Mapping[str, Any], size: tuple[int, int] | None = None) -> Mask:
    """The mask `[H, W]` of a code with `size` and `counts` (a string, bytes, or a list of runs).

    Args:
        code: the code.
        size: (height, width) that it must have, where known.

    Raises:
        RLEError: for anything else, another size, or runs that do not fill it exactly.
    """
    height, width = size_of(code)
    if size is not None and (height, width) != size:
        raise RLEError(f"a mask of {width}x{height} pixels for a picture of {size[1]}x{size[0]}")
    if height * width > MAX_PIXELS:
        raise RLEError(f"a mask of {width}x{height} pixels is refused")
    counts = code.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    if isinstance(counts, str):
        runs = _expand(counts)
    elif isinstance(counts, list) and all(isinstance(run, int) and not isinstance(run, bool) for run in counts):
        runs = counts
    else:
        raise RLEError("counts are neither a string nor a list of whole numbers")
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise RLEError(f"runs of {sum(runs)} pixels for a mask of {width}x{height}")
    values = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(width, height).T)


def size_of(code: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) that a code states. Raises RLEError where it states none."""
    size = code.get("size") if isinstance(code, Mapping) else None
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise RLEError(f"no size [height, width]: {size!r}")
    height, width = size
    if height < 1 or width < 1:
        raise RLEError(f"a mask of {width}x{height} pixels")
    return height, width


def _runs(mask: Mask) -> list[int]:
    flat = np.asarray(mask, bool).flatten(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(bounds).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def _compress(runs: list[int]) -> str:
    text = []
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        while True:
            group = value & 0x1F
            value >>= _GROUP
            done = value == (-1 if group & _SIGN else 0)
            text.append(chr(group + _FIRST + (0 if done else _MORE)))
            if done:
                break
    return "".join(text)


def _expand(text: str) -> list[int]:
    runs: list[int] = []
    value = groups = 0
    for character in text:
        group = ord(character) - _FIRST
        if not 0 <= group < 2 * _MORE or groups == _MAX_GROUPS:
            raise RLEError(f"{character!r} at this place is no compressed run")
        value |= (group & 0x1F) << (_GROUP * groups)
        groups += 1
        if group & _MORE:
            continue
        if group & _SIGN:
            value -= 1 << (_GROUP * groups)
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = groups = 0
    if groups:
        raise RLEError("the compressed runs end within a number")
    return runs

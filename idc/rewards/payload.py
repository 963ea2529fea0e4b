"""A clip as bytes for another machine, and a score as JSON. Nothing is unpickled, and sizes are known before any array
is made.

    b"IDCCLIP1", length of the head (8 bytes, big endian), the head (JSON), then the pixels of its arrays one by one
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score, checked
from idc.models.judges import quote

MAGIC = b"IDCCLIP1"
CLIP_TYPE = "application/x-idc-clip"
_DTYPES = {"uint8": np.uint8, "bool": np.bool_}


def pack_clip(clip: Clip) -> bytes:
    """The clip with its references, masks and `meta`.

    Raises:
        UserError: for `meta` that is no plain JSON, or a reference that cannot be read.
    """
    arrays: list[NDArray[Any]] = [clip.frames_THWC]
    if clip.masks_TNHW is not None:
        arrays.append(clip.masks_TNHW)
    references = []
    for reference in clip.references:
        arrays.append(reference.image_HWC)
        if reference.mask_HW is not None:
            arrays.append(reference.mask_HW)
        references.append({"name": reference.name, "kind": reference.kind, "mask": reference.mask_HW is not None})
    head = {
        "id": clip.id,
        "prompt": clip.prompt,
        "fps": clip.fps,
        "category": clip.category,
        "meta": dict(clip.meta),
        "masks": clip.masks_TNHW is not None,
        "references": references,
        "arrays": [{"dtype": array.dtype.name, "shape": list(array.shape)} for array in arrays],
    }
    try:
        text = json.dumps(head).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"clip {clip.id!r}: its meta is no plain JSON: {error}") from None
    pixels = [np.ascontiguousarray(array).tobytes() for array in arrays]
    return b"".join([MAGIC, len(text).to_bytes(8, "big"), text, *pixels])


def unpack_clip(data: bytes) -> Clip:
    """What `pack_clip` packed.

    Raises:
        UserError: for anything else.
    """
    start = len(MAGIC) + 8
    if len(data) < start or not data.startswith(MAGIC):
        raise UserError("the body is no packed clip")
    size = int.from_bytes(data[len(MAGIC) : start], "big")
    if size > len(data) - start:
        raise UserError("the packed clip is cut short")
    try:
        head = json.loads(data[start : start + size])
        arrays = iter(_arrays(head["arrays"], memoryview(data)[start + size :]))
        frames = next(arrays)
        masks = next(arrays) if head["masks"] else None
        references = []
        for entry in head["references"]:
            image = next(arrays)
            mask = next(arrays) if entry["mask"] else None
            references.append(Reference(image, str(entry["name"]), str(entry["kind"]), mask))
        words = {name: str(head[name]) for name in ("id", "prompt", "category")}
        return Clip(
            frames_THWC=frames, references=tuple(references), masks_TNHW=masks, fps=float(head["fps"]),
            meta=dict(head["meta"]), **words,
        )  # fmt: skip
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError, RecursionError) as error:
        raise UserError(f"the packed clip has a broken head: {type(error).__name__}: {quote(str(error))}") from None


def _arrays(described: Any, pixels: memoryview) -> list[NDArray[Any]]:
    """The arrays, as long as they take up `pixels` to the byte."""
    shapes = []
    for entry in described:
        shape = entry["shape"]
        if entry["dtype"] not in _DTYPES or not all(type(side) is int and side >= 0 for side in shape):
            raise UserError(f"the packed clip has an array of {quote(json.dumps(entry))}: must be uint8 or bool")
        shapes.append((_DTYPES[entry["dtype"]], tuple(shape), math.prod(shape)))
    total = sum(count for _, _, count in shapes)
    if total != len(pixels):
        raise UserError(f"the packed clip has {len(pixels)} bytes of pixels where its head says {total}")
    arrays, start = [], 0
    for dtype, shape, count in shapes:
        # A copy, as networks want memory that they may write to.
        flat = np.frombuffer(pixels[start : start + count], np.uint8)
        arrays.append((flat != 0 if dtype is np.bool_ else flat.copy()).reshape(shape))
        start += count
    return arrays


def digest(data: bytes) -> str:
    """What an answer must repeat to be the answer to these bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_score(answer: Any, asked: str, bounds: tuple[float, float]) -> Score:
    """The score in a server's answer, or a failed one that says what is wrong with it.

    Args:
        answer: parsed JSON.
        asked: `digest` of the clip that was sent.
        bounds: of the reward; a value outside is no score.
    """
    if not isinstance(answer, dict):
        return Score.failed(f"the server's answer is no score: {_shown(answer)}")
    missing = [key for key in ("clip", "value", "reason") if key not in answer]
    if missing:
        return Score.failed(f"the server's answer lacks {', '.join(missing)}: {_shown(answer)}")
    if answer["clip"] != asked:
        return Score.failed("the server's answer is about another clip")
    value, reason, details = answer["value"], answer["reason"], answer.get("details") or {}
    if not isinstance(reason, str) or not isinstance(details, dict):
        return Score.failed(f"the server's answer is no score: {_shown(answer)}")
    if value is None:
        return checked(Score(None, reason or "the server gave no score and no reason", details), bounds)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Score.failed(f"the server's value is no number: {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Score.failed(f"the server's value is {number}")
    return checked(Score(number, reason, details), bounds)


def _shown(value: Any) -> str:
    return quote(json.dumps(value))

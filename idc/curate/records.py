"""Candidates as plain JSON beside plain bytes: what is written to disk, and what goes from worker to worker.

A candidate is taken apart into a record (JSON) and its blobs (clip, masks, pictures) by name. `settle` sends one
through its record and back after every step, so that the next step sees the same whether it runs in the same process,
in another or from a file: a tuple in `meta` is a list everywhere, a NumPy number a number, and what is no plain data
is found out where it was made.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from idc.curate.candidate import KEY, Box, Candidate, CuratedSubject, Dropped, EncodedClip, Mask, Reference
from idc.curate.segments import Segment

CLIP, MP4 = "clip.npy", "mp4"
Blobs = Mapping[str, Any]

_COPIED = ("key", "source", "video", "path", "fps", "caption", "licence", "scores", "models", "safety", "meta")
_SUBJECT = ("name", "kind", "frame", "score", "embedder", "meta")
_REFERENCE = ("ext", "origin", "video", "seconds", "similarity", "model", "meta")


def dumps(value: Any) -> str:
    """Plain JSON on one line, keys sorted; NumPy's numbers and arrays as Python's.

    Raises:
        ValueError: for a number that is not finite, and for text that no file can hold: half of a character, as an
            answer that ends within an emoji may have.
        TypeError: for anything that is no plain data.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 40) : error.end]
        raise ValueError(f"text that is no Unicode: half of a character ends {around!a}") from None
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no plain data")


def take_apart(candidate: Candidate) -> tuple[dict[str, Any], dict[str, Any]]:
    """The candidate's record and its blobs: "clip.npy" (pixels), "mp4", "s0.mask.png" (bools), "s0.ref0.png", ...

    The blobs are the very objects, not copies; `encode_blob` makes bytes of them.

    Raises:
        ValueError: for a key, an array or a number that cannot be written, with what is wrong.
    """
    if not KEY.fullmatch(candidate.key):
        raise ValueError(f"key={candidate.key!r}: 1 to 80 letters, digits, - and _ only")
    record: dict[str, Any] = {name: getattr(candidate, name) for name in _COPIED}
    record["span"] = candidate.span
    if candidate.segment is not None:
        record["segment"] = candidate.segment
    record["crop"] = candidate.crop
    record["ranks"] = [int(rank) for rank in candidate.ranks]
    blobs: dict[str, Any] = {}
    if candidate.clip is not None:
        blobs[CLIP] = _checked("clip", candidate.clip, np.uint8, (None, None, None, 3))
    if candidate.encoded is not None:
        record["encoded"] = candidate.encoded[1:]
        blobs[MP4] = candidate.encoded.mp4
    record["subjects"] = [_subject(subject, f"s{number}", blobs) for number, subject in enumerate(candidate.subjects)]
    return record, blobs


def _subject(subject: CuratedSubject, name: str, blobs: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {key: getattr(subject, key) for key in _SUBJECT}
    record["box"] = subject.box
    record["track"] = [[rank, *box] for rank, box in subject.track]
    if subject.mask is not None:
        blobs[f"{name}.mask.png"] = _checked(f"{name}: mask", subject.mask, np.bool_, (None, None))
    if subject.embedding is not None:
        vector = _checked(f"{name}: embedding", subject.embedding, np.float32, (None,))
        record["embedding"] = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    record["references"] = []
    for number, reference in enumerate(subject.references):
        record["references"].append({key: getattr(reference, key) for key in _REFERENCE})
        blobs[f"{name}.ref{number}.{reference.ext}"] = reference.image
    return record


def put_together(record: Mapping[str, Any], blobs: Blobs) -> Candidate:
    """The candidate of `take_apart`. Where blobs are missing, pixels and masks are None and files are empty bytes."""
    encoded = record.get("encoded")
    return Candidate(
        **{name: record[name] for name in _COPIED},
        span=None if record["span"] is None else (record["span"][0], record["span"][1]),
        segment=Segment(*record["segment"]) if "segment" in record else None,
        crop=None if record["crop"] is None else Box(*record["crop"]),
        ranks=tuple(record["ranks"]),
        clip=blobs.get(CLIP),
        encoded=None if encoded is None else EncodedClip(blobs.get(MP4, b""), *encoded),
        subjects=tuple(_whole_subject(item, f"s{number}", blobs) for number, item in enumerate(record["subjects"])),
    )


def _whole_subject(record: Mapping[str, Any], name: str, blobs: Blobs) -> CuratedSubject:
    embedding = record.get("embedding")
    references = tuple(
        Reference(image=blobs.get(f"{name}.ref{number}.{item['ext']}", b""), **item)
        for number, item in enumerate(record["references"])
    )
    return CuratedSubject(
        **{key: record[key] for key in _SUBJECT},
        box=None if record["box"] is None else Box(*record["box"]),
        mask=blobs.get(f"{name}.mask.png"),
        # A copy, since NumPy does not write into bytes and torch warns of it.
        embedding=None if embedding is None else np.frombuffer(base64.b64decode(embedding), "<f4").astype(np.float32),
        references=references,
        track=tuple((rank, Box(*box)) for rank, *box in record["track"]),
    )


def settle(candidate: Candidate) -> Candidate:
    """The candidate as it would be read back from a file.

    Raises:
        ValueError, TypeError: where it cannot be written, with what is wrong.
    """
    record, blobs = take_apart(candidate)
    return put_together(json.loads(dumps(record)), blobs)


def encode_blob(name: str, value: Any) -> bytes:
    """A blob's bytes: masks as PNG of one bit, pixels as .npy without pickle, files as they are."""
    if name == CLIP:
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=False)
        return buffer.getvalue()
    return _mask_png(value) if name.endswith(".mask.png") else value


def decode_blob(name: str, data: bytes) -> Any:
    """What `encode_blob` was given."""
    from PIL import Image

    if name == CLIP:
        return np.load(io.BytesIO(data), allow_pickle=False)
    if name.endswith(".mask.png"):
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            return np.asarray(image, dtype=np.bool_)
    return data


def _mask_png(mask: Mask) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def drop_record(drop: Dropped) -> dict[str, str]:
    """A drop as plain JSON; what is no Unicode in it, such as in the words of a server, is spelt out."""
    return {name: str(value).encode("utf-8", "backslashreplace").decode() for name, value in vars(drop).items()}


def _checked(what: str, array: Any, dtype: type, shape: tuple[int | None, ...]) -> Any:
    """`array` with bytes in order, if it is one of that type and shape (None: any length above 0)."""
    found = getattr(array, "dtype", None), getattr(array, "shape", ())
    fits = len(found[1]) == len(shape) and all(
        size == wanted or (wanted is None and size > 0) for size, wanted in zip(found[1], shape, strict=True)
    )
    if found[0] != np.dtype(dtype) or not fits:
        raise ValueError(f"{what} is {found[0]} {list(found[1])}, not {np.dtype(dtype)} of {len(shape)} dimensions")
    return np.ascontiguousarray(array)

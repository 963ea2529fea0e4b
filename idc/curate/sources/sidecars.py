"""What lies beside a video or picture: a caption, a licence, what a safety filter said, its subjects.

Beside `a/film.mp4` there may be `a/film.txt`, its caption, and `a/film.json`, plain JSON with any of:

    caption     as above, and before it
    licence     of this file (or `license`)
    safety      verdicts of safety filters by name, carried along
    subjects    list of {"name", "kind": "person", "face", "clothing", "object" (which it is where none is told) or
                "place", "box": [left, top, right, bottom] in pixels of the frame "frame",
                "references": pictures, by paths relative to the file's folder}
    video       what is one video for splits and pairs, where several files are parts of it

Whatever else it holds goes into `meta["folder"]`. A side-car that cannot be read drops its file, since a licence or a
verdict may be in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from idc.curate.candidate import KINDS, Box, Candidate, CuratedSubject, Reference, decode_image, encode_png
from idc.curate.reaching import UnreachedError, reaching
from idc.curate.sources.listing import File, content_mark, is_image, is_text
from idc.data import storage
from idc.data.video import VideoError
from idc.errors import UserError, nearest

SUFFIXES = (".json", ".txt")
META = "folder"
LARGEST = 1 << 24  # bytes of a side-car
LARGEST_SIDE = 1 << 24  # pixels; no picture is larger

ReadFile = Callable[[str], bytes]  # by path relative to the source's folder


class SidecarError(ValueError):
    """What lies beside a file cannot be read. The message is a short reason."""


def identity_of(root: str) -> int:
    """Of `unit_of` (`Source.identity`): the first one of local files went by their sizes alone."""
    return 1 if storage.is_url(root) else 2


def unit_of(file: File, listed: Mapping[str, File], root: str) -> tuple[str, dict[str, Any]]:
    """(id, payload) of a file's unit. The id is path@size of a file alone, and path@size+digest where there is more to
    tell it by; what has another id is read again. The digest is of

        local files           a mark of the content (`idc.curate.sources.listing.content_mark`), as far as they can be
                              read; of the references that a .json side-car names the same, with their names and sizes
        local side-cars       their bytes
        those behind a URL    their sizes and, with the file's own, the marks of their content that the listing has
                              (`File.mark`), since reading each one would be dear

    What is exchanged for something of equal size is thus not noticed where it differs in none of the places that are
    read of a local video, picture or reference, nor of references behind a URL, nor of anything behind one whose
    listing has no marks. Times of modification do not count: a copy of a local folder gives the same ids.

    Args:
        file: the video or picture, with its mark.
        listed: all files of its folder, by path.
        root: the source's folder.
    """
    if not is_text(file.path):
        shown = file.path.encode("utf-8", "backslashreplace").decode()
        return f"{shown}@{file.size}", {"path": shown, "problem": "name is no Unicode"}
    base = PurePosixPath(file.path)
    beside = {suffix: listed[name] for suffix in SUFFIXES if (name := str(base.with_suffix(suffix))) in listed}
    remote = storage.is_url(root)
    told = [[other.size, other.mark] if remote else _content(other, root) for other in beside.values()]
    id = f"{file.path}@{file.size}"
    if told or file.mark:
        facts = json.dumps([file.mark, list(beside), told])
        id += f"+{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    return id, {"path": file.path, "beside": list(beside)}


def _content(file: File, root: str) -> list[Any]:
    """What tells a local side-car from another: a digest of its bytes (its size where it cannot be read, which drops
    its file) and [path, size, mark] of the references that it names."""
    try:
        data = read_beside(root, file.path)
    except SidecarError:
        return [file.size]
    digest = hashlib.sha256(data).hexdigest()
    try:
        record = read_sidecar(file.path, data) if file.path.endswith(".json") else {}
        subjects = record.get("subjects")
        items = [item for item in subjects if isinstance(item, Mapping)] if isinstance(subjects, list) else []
        named = [item["references"] for item in items if isinstance(item.get("references"), list)]
        folder = str(PurePosixPath(file.path).parent)
        paths = [_reference_path(name, folder) for names in named for name in names]
    except SidecarError:  # which drops its file
        return [digest]
    return [digest, *([path, *_told(os.path.join(root, path))] for path in paths)]


def _told(path: str) -> tuple[int, str]:
    try:
        return os.stat(path).st_size, content_mark(path)
    except (OSError, ValueError):
        return -1, ""


class Licences:
    """Licences by pattern of the relative path; the first that fits counts.

    Args:
        licences: the patterns, or the name of a JSON file that holds them: in the source's folder, or a path or URL of
            its own. It is read when it is first asked for.
        root: the source's folder.
    """

    def __init__(self, licences: Mapping[str, str] | str, root: str) -> None:
        self._licences, self._root = licences, root
        self._read: dict[str, str] | None = None

    def describe(self) -> dict[str, str]:
        """The licences by pattern.

        Raises:
            UserError: where there is no such file, or it holds something else.
        """
        if self._read is None:
            self._read = read_licences(self._licences, self._root)
        return self._read

    def of(self, path: str, otherwise: str) -> str:
        """The licence of a file."""
        return next((text for pattern, text in self.describe().items() if fnmatchcase(path, pattern)), otherwise)


def with_sidecars(candidate: Candidate, root: str, path: str, beside: Sequence[str]) -> Candidate:
    """The candidate with what lies beside its file.

    Args:
        root: the source's folder.
        path: of the file, relative to it.
        beside: suffixes of the side-cars that there are.

    Raises:
        SidecarError: where one cannot be read.
    """
    base = PurePosixPath(path)
    if ".txt" in beside:
        text = read_beside(root, str(base.with_suffix(".txt"))).decode("utf-8-sig", "replace")
        candidate = candidate.changed(caption=" ".join(text.split()))
    if ".json" not in beside:
        return candidate
    name = str(base.with_suffix(".json"))
    record = read_sidecar(name, read_beside(root, name))
    return from_sidecar(candidate, record, str(base.parent), lambda other: read_beside(root, other))


def read_licences(licences: Mapping[str, str] | str, root: str) -> dict[str, str]:
    """Licence by pattern, from a mapping or from a JSON file (a name in `root`, or a path or URL of its own).

    Raises:
        UserError: where there is no such file, or it holds something else.
    """
    if not licences:
        return {}
    found: Any = licences
    if isinstance(licences, str):
        path = licences if storage.is_url(licences) or licences.startswith("/") else storage.join(root, licences)
        try:
            with storage.open_read(path) as stream:
                found = json.loads(stream.read())
        except (OSError, ValueError) as error:
            raise UserError(f"licences={licences}: cannot be read ({error})") from None
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"licences={licences!r}: wanted is a licence by pattern, such as {{'studio/*': 'CC-BY-4.0'}}")
    return dict(found)


def read_beside(root: str, name: str) -> bytes:
    """The bytes of a small file below `root`.

    Raises:
        SidecarError: where it is not there, or too large.
        UnreachedError: where it cannot be read now.
    """
    path = storage.join(root, name)
    try:
        with reaching(path, f"{name}: "), storage.open_read(path) as stream:
            data = stream.read(LARGEST + 1)
    except UnreachedError:
        raise
    except Exception as error:  # every file system behind fsspec has its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise SidecarError(f"{name}: {reason}") from None
    if len(data) > LARGEST:
        raise SidecarError(f"{name}: larger than {LARGEST >> 20} MiB")
    return data


def read_sidecar(name: str, data: bytes) -> dict[str, Any]:
    """The record of a side-car .json.

    Raises:
        SidecarError: where it holds something else.
    """
    try:
        text = data.decode("utf-8-sig")
        record = json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_finite_int)
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise SidecarError(f"{name}: no JSON ({error})") from None
    if not isinstance(record, dict):
        raise SidecarError(f"{name}: a {type(record).__name__} where a record was expected")
    return record


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is larger than any float")
    return number


def _finite_int(text: str) -> int:
    _finite(text)
    return int(text)


def from_sidecar(candidate: Candidate, record: dict[str, Any], folder: str, read: ReadFile) -> Candidate:
    """The candidate with what its side-car says.

    Args:
        record: of the side-car.
        folder: of the video, relative to the source's.
        read: bytes of a file by its path relative to the source's folder.

    Raises:
        SidecarError: for a field of another kind.
    """
    rest = dict(record)
    texts = {}
    for name in ("caption", "licence", "license", "video"):
        value = rest.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise SidecarError(f"{name} is no text: {value!r}")
        texts[name] = value or ""
    safety = rest.pop("safety", None)
    if safety is not None and not isinstance(safety, Mapping):
        raise SidecarError(f"safety is no record: {safety!r}")
    items = rest.pop("subjects", None)
    if items is not None and not isinstance(items, list):
        raise SidecarError(f"subjects is no list: {items!r}")
    subjects = tuple(_subject(item, folder, read) for item in items or ())
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise SidecarError(f"two subjects have one name: {names}")
    return candidate.changed(
        caption=" ".join(texts["caption"].split()) or candidate.caption,
        licence=texts["licence"] or texts["license"] or candidate.licence,
        video=texts["video"] or candidate.video,
        safety=safety or {},
        subjects=subjects,
        meta={META: rest} if rest else {},
    )


def _subject(item: Any, folder: str, read: ReadFile) -> CuratedSubject:
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str) or not item["name"].strip():
        raise SidecarError(f"a subject without a name: {item!r}")
    rest = {key: value for key, value in item.items() if key not in ("name", "kind", "box", "frame", "references")}
    box, frame, kind, names = item.get("box"), item.get("frame", 0), item.get("kind"), item.get("references") or []
    if box is not None:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
        if not numbers or Box(*box).area <= 0 or max(map(abs, box)) > LARGEST_SIDE:
            raise SidecarError(f"box {box!r} of {item['name']!r}: [left, top, right, bottom] in pixels")
    if not isinstance(frame, int) or frame < 0 or not isinstance(kind, str | None) or not isinstance(names, list):
        raise SidecarError(f"subject {item['name']!r}: frame, kind or references of another kind")
    if kind and kind not in KINDS:
        raise SidecarError(f"subject {item['name']!r}: kind {kind[:80]!r} is none{nearest(kind, KINDS)}")
    return CuratedSubject(
        name=" ".join(item["name"].split()),
        kind=kind or "object",
        box=None if box is None else Box(*box),
        frame=frame,
        references=tuple(_reference(name, folder, read) for name in names),
        meta={META: rest} if rest else {},
    )


def _reference(name: Any, folder: str, read: ReadFile) -> Reference:
    path = _reference_path(name, folder)
    try:
        # Encoded anew: what the file may be (rotated, of any kind) is not for whoever reads shards to know.
        image = encode_png(decode_image(read(path)))
    except VideoError as error:
        raise SidecarError(f"reference {name!r}: {error}") from None
    return Reference(image, "png", "given", path)


def _reference_path(name: Any, folder: str) -> str:
    path = PurePosixPath(folder, name) if isinstance(name, str) else PurePosixPath()
    if not is_image(path.name) or path.is_absolute() or ".." in path.parts:
        raise SidecarError(f"reference {name!r}: a picture in the video's folder or below it is wanted")
    return str(path)

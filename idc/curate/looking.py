"""Shards and what curation writes beside them, read to be counted and looked at: one streamed pass, no pixels.

Everything is optional. Shards of curation say where a sample comes from and how it was come by; those of `idc shards
build`, of the toy world and of other tools say less, and what they do not say is empty here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from idc.curate.split import PARTS
from idc.data import storage
from idc.data.index import Entry, ShardIndex
from idc.data.scan import Problem, reference_number

DROPS, COUNTS, MANIFEST = "drops.jsonl", "counts.json", "manifest.json"  # as curation writes them beside the shards
TEXTS = ("json", "txt")
READERS = 16  # requests at a time for shards behind a URL, where one by one would wait for the network
# Of a sample's meta, what has a place of its own in `Seen`; all else is shown as it is.
KNOWN = ("subjects", "kinds", "scores", "models", "safety", "category", "video", "source", "licence")
_HALVES = re.compile("[\ud800-\udfff]")  # of characters, alone
_MAY_HALVE = re.compile(rb"\\u[dD]|\xed[\xa0-\xbf]")  # in JSON, which mostly has none


@dataclass(frozen=True)
class Folder:
    """A folder of shards, and its part of a collection ("train", "held_out", or "" where it is no part of one)."""

    root: str
    split: str
    samples: int
    shards: int
    bytes: int
    hash: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class SeenReference:
    """A subject's picture: `ext` names its member of the tar, "" where it is only told of."""

    origin: str = ""
    video: str = ""
    seconds: float | None = None
    similarity: float | None = None
    ext: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeenSubject:
    """A subject of a sample. `box` is left, top, right, bottom in pixels of the clip's frame `frame`; `mask` a COCO
    run-length encoding of it, as it was written."""

    name: str
    kind: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Mapping[str, Any] | None = None
    frame: int = 0
    score: float | None = None
    references: tuple[SeenReference, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A sample without its pixels.

    Attributes:
        seconds: frames / rate; 0 for a still picture.
        source: as the sample says, or the folder's; `licence` and `category` as it says, or "".
        video: id of the source video, or "".
        scores: those that are numbers; `meta`: all that has no place here; `problem`: why its JSON cannot be read.
    """

    root: str
    split: str
    entry: Entry
    source: str
    video: str
    licence: str
    category: str
    caption: str
    subjects: tuple[SeenSubject, ...]
    scores: Mapping[str, float]
    models: Mapping[str, Any]
    safety: Mapping[str, Any]
    meta: Mapping[str, Any]
    problem: str = ""

    @property
    def seconds(self) -> float:
        return self.entry.bucket.frames / self.entry.fps if not self.still and self.entry.fps > 0 else 0.0

    @property
    def still(self) -> bool:
        return self.entry.bucket.frames == 1


@dataclass(frozen=True)
class SeenDrop:
    """What was dropped, as a line of drops.jsonl says; where `idc shards build` tells the second, it is in `detail`."""

    source: str = ""
    video: str = ""
    key: str = ""
    step: str = ""
    reason: str = ""
    detail: str = ""


class Collection:
    """Folders of shards, with what lies beside them.

    A folder without shards of its own stands for those of its folders `train` and `held_out`.

    Args:
        roots: folders or fsspec URLs; one that is named twice counts once.

    Raises:
        UserError: for a folder with neither shards nor drops, or whose index is missing, damaged or out of date.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self.folders: list[Folder] = []
        self._beside: list[str] = []  # folders whose drops and counts belong to the collection
        for root in dict.fromkeys(str(root).rstrip("/") or "/" for root in roots):
            found = [(root, _split_of(root))] if storage.list_tars(root) else []
            found += [(part, name) for name in PARTS if storage.list_tars(part := storage.join(root, name))]
            beside = [root, storage.join(root, "..")] if _split_of(root) and not storage.is_url(root) else [root]
            told = [folder for folder in beside if any(_read(folder, name) for name in (DROPS, COUNTS, MANIFEST))]
            if not found and not told:
                ShardIndex.load(root)  # says what is wrong
                continue  # an index without shards: an empty collection
            known = {folder.root for folder in self.folders}
            self.folders += [_folder(path, split) for path, split in found if path not in known]
            self._beside += [_real(folder) for folder in told if _real(folder) not in self._beside]

    def __len__(self) -> int:
        return sum(folder.samples for folder in self.folders)

    def __iter__(self) -> Iterator[Seen]:
        """All samples in the order of the folders and their indexes, streamed."""
        for folder in self.folders:
            yield from _seen(folder, ShardIndex.stream(folder.root)[2])

    def some(self, limit: int) -> Iterator[Seen]:
        """At most `limit` samples (0: all), evenly from the first to the last."""
        total = len(self)
        step = total / limit if 0 < limit < total else 1.0
        place = 0.0
        first = 0
        for folder in self.folders:
            _, count, entries = ShardIndex.stream(folder.root)
            wanted = []
            while math.floor(place) < first + count and place < total:
                wanted.append(math.floor(place) - first)
                place += step
            first += count
            yield from _seen(folder, _pick(entries, wanted))

    def drops(self) -> Iterator[SeenDrop]:
        """What was dropped, streamed, in the order that it was written in; a line that is no record is left out."""
        for folder in self._beside:
            path = storage.join(folder, DROPS)
            try:
                with storage.open_read(path) as stream:
                    for line in stream:
                        if isinstance(record := _json(line), dict):
                            yield _drop(record, folder.rstrip("/").rsplit("/", 1)[-1])
            except FileNotFoundError:
                continue

    def beside(self, name: str) -> list[dict[str, Any]]:
        """The JSON files of that name that lie beside the shards, as far as they can be read."""
        found = [_json(_read(folder, name)) for folder in self._beside]
        return [content for content in found if isinstance(content, dict)]


def _split_of(root: str) -> str:
    name = root.rsplit("/", 1)[-1]
    return name if name in PARTS else ""


def _real(root: str) -> str:
    return root if storage.is_url(root) else os.path.realpath(root)


def _folder(root: str, split: str) -> Folder:
    index, samples, _ = ShardIndex.stream(root)
    size = sum(stamp.size for stamp in index.shards)
    return Folder(root, split, samples, len(index.shards), size, index.hash, index.problems)


def _read(root: str, name: str) -> bytes:
    """A small file beside the shards, or b"" where there is none."""
    try:
        with storage.open_read(storage.join(root, name)) as stream:
            return stream.read(1) if name == DROPS else stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _json(data: bytes) -> Any:
    """NaN and the infinities, which are no JSON, are None, and so is a number that a float cannot hold; halves of
    characters, which no file of text can hold again, are U+FFFD."""
    try:
        value = json.loads(data, parse_constant=lambda _: None, parse_float=_finite)
        if _MAY_HALVE.search(data) and _HALVES.search(text := json.dumps(value, ensure_ascii=False)):
            value = json.loads(_HALVES.sub("\ufffd", text))
        return value
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _pick(entries: Iterator[Entry], wanted: Sequence[int]) -> Iterator[Entry]:
    """The entries at these rising places; the rest is passed over, so that the index is checked to its end."""
    places = iter(wanted)
    place = next(places, None)
    for number, entry in enumerate(entries):
        if number == place:
            yield entry
            place = next(places, None)


def _seen(folder: Folder, entries: Iterator[Entry]) -> Iterator[Seen]:
    """The samples of entries; behind a URL several are asked for at a time, in order all the same."""
    if not storage.is_url(folder.root):
        for entry in entries:
            yield describe(folder, entry, *read_texts(folder.root, entry))
        return
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(entries, 16 * READERS)):
            for entry, texts in zip(some, pool.map(lambda entry: read_texts(folder.root, entry), some), strict=True):
                yield describe(folder, entry, *texts)


def read_texts(root: str, entry: Entry) -> tuple[str, dict[str, Any], str]:
    """(caption, JSON record, "" or what is wrong with it) of a sample; reads these two members alone."""
    texts = {}
    for member in entry.members:
        if member.ext in TEXTS:
            try:
                texts[member.ext] = storage.read_range(storage.join(root, entry.shard), member.offset, member.size)
            except OSError as error:
                return "", {}, f"unreadable shard: {error.strerror or error}"
    return texts_of(texts)


def texts_of(texts: Mapping[str, bytes]) -> tuple[str, dict[str, Any], str]:
    """As `read_texts`, of members that are read."""
    caption = texts.get("txt", b"").decode("utf-8", "replace").strip()
    if "json" not in texts:
        return caption, {}, ""
    record = _json(texts["json"])
    return (caption, record, "") if isinstance(record, dict) else (caption, {}, "its JSON is no record")


def describe(folder: Folder, entry: Entry, caption: str, record: Mapping[str, Any], problem: str = "") -> Seen:
    """What is known of a sample, from its JSON; what is not of the expected kind is as good as missing."""
    meta = _mapping(record.get("meta"))
    told = {**_mapping(meta.get("provenance")), **{k: v for k, v in meta.items() if k != "provenance"}}
    curated = isinstance(told.get("subjects"), list) or isinstance(told.get("scores"), Mapping)
    # `idc shards build` names the video as the source: there, the folder is what one counts by.
    source = _text(told.get("source")) or (_text(record.get("source")) if curated else "") or entry.source
    return Seen(
        root=folder.root,
        split=folder.split,
        entry=entry,
        source=source,
        video=_text(told.get("video")) or ("" if curated else _text(record.get("source"))),
        licence=_text(record.get("licence")) or _text(told.get("licence")),
        category=_text(told.get("category")),
        caption=caption,
        subjects=_subjects(entry, record, told),
        scores={
            str(name): number
            for name, value in _mapping(told.get("scores")).items()
            if (number := _number(value)) is not None
        },
        models=_mapping(told.get("models")),
        safety=_mapping(told.get("safety")),
        meta={name: value for name, value in told.items() if name not in KNOWN},
        problem=problem,
    )


def _subjects(entry: Entry, record: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[SeenSubject, ...]:
    """Subjects that the sample tells of, and those of which it has a picture only, by their place."""
    named = [_text(_mapping(item).get("name")) for item in _list(record.get("references"))]
    kinds = _mapping(told.get("kinds"))
    pictures = {reference_number(member.ext): member.ext for member in entry.members}
    pictures.pop(-1, None)  # of the members that are no pictures
    subjects = []
    for item in _list(told.get("subjects")):
        if isinstance(item, Mapping):
            name = _text(item.get("name"))
            number = item["reference"] if "reference" in item else _place(name, named)
            ext = pictures.pop(number, "") if isinstance(number, int) else ""
            subjects.append(_subject(item, name, _text(kinds.get(name)), ext))
    for number, ext in sorted(pictures.items()):
        name = named[number] if number < len(named) else ""
        subjects.append(SeenSubject(name, _text(kinds.get(name)), references=(SeenReference(ext=ext),)))
    return tuple(subjects)


def _place(name: str, names: Sequence[str]) -> int | None:
    return names.index(name) if name and name in names else None


def _subject(item: Mapping[str, Any], name: str, kind: str, ext: str) -> SeenSubject:
    told = [_mapping(reference) for reference in _list(item.get("references"))]
    references = []
    for number, reference in enumerate(told):
        own = ("origin", "video", "seconds", "similarity", "ext")
        references.append(
            SeenReference(
                _text(reference.get("origin")),
                _text(reference.get("video")),
                _number(reference.get("seconds")),
                _number(reference.get("similarity")),
                ext if number == 0 else "",  # the sample gets the first
                {key: value for key, value in reference.items() if key not in own},
            )
        )
    if not references and ext:
        references.append(SeenReference(ext=ext))
    mask = item.get("mask")
    return SeenSubject(
        name,
        _text(item.get("kind")) or kind,
        _box(item.get("box")),
        mask if isinstance(mask, Mapping) else None,
        int(_number(item.get("frame")) or 0),
        _number(item.get("score")),
        tuple(references),
        _mapping(item.get("meta")),
    )


def _drop(record: Mapping[str, Any], folder: str) -> SeenDrop:
    texts = {name: _text(record.get(name)) for name in ("source", "video", "key", "step", "reason", "detail")}
    seconds = _number(record.get("seconds"))
    if seconds is not None:  # of `idc shards build`
        texts["detail"] = "; ".join(part for part in (texts["detail"], f"from {seconds:g} s on") if part)
    return SeenDrop(**{**texts, "source": texts["source"] or folder})


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _box(value: Any) -> tuple[float, float, float, float] | None:
    if isinstance(value, Mapping):
        value = [value.get(side) for side in ("left", "top", "right", "bottom")]
    if not isinstance(value, list) or len(value) != 4:
        return None
    sides = [_number(side) for side in value]
    if any(side is None for side in sides):
        return None
    left, top, right, bottom = (float(side or 0) for side in sides)
    return (left, top, right, bottom) if right > left and bottom > top else None

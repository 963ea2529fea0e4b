"""What is to be generated or edited: items with a prompt, reference pictures and, for editing, a source clip.

Items come from OpenS2V-Eval's JSON (`read_benchmark`) or from a file of JSON lines (`read_items`), which is also what
a folder of generated videos carries as `items.jsonl`, so that whoever judges the videos finds what was asked for.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from idc.data import storage
from idc.errors import UserError, nearest

ITEMS = "items.jsonl"
KINDS = ("face", "human", "object", "background")  # of references
RECORD = ("img_paths", "prompt", "class_label", "synthesis_flag")  # keys of an OpenS2V-Eval record
# Parts of a reference's path that tell what it shows: the benchmark's own rule for people, and names for places.
PATH_KINDS = {
    "crop_man": "face",
    "crop_woman": "face",
    "man": "human",
    "woman": "human",
    **dict.fromkeys(("background", "env", "environment", "place", "scene"), "background"),
}
_FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,119}", re.ASCII)


@dataclass(frozen=True)
class Item:
    """One video to make.

    Attributes:
        id: names the video's file, `<id>.mp4`: letters, digits, `_`, `-` and `.`.
        prompt: what it shall show.
        references: picture files, in the prompt's order. They are read when the video's turn comes.
        labels: what each reference shows in a word or two, or none at all.
        kinds: "face", "human", "object" or "background", one a reference, or none at all.
        category: the benchmark's item type such as "singlehuman"; "" where there is none.
        meta: plain JSON (the toy world keeps its ground truth under "toy").
        source: for editing, the clip that is edited.
        mask: for editing, a picture or clip of the source's size that is white where the source may change.
    """

    id: str
    prompt: str
    references: tuple[Path, ...] = ()
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    category: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None
    mask: Path | None = None

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.id):
            raise UserError(
                f"id={self.id!r}: it names a file, so it has 1 to 120 letters, digits, '_', '-' and '.', "
                f"a letter or digit first; {file_name(self.id)!r} would do"
            )
        for name in ("labels", "kinds"):
            values = getattr(self, name)
            if values and len(values) != len(self.references):
                raise UserError(f"{self.id}: {len(values)} {name} for {len(self.references)} references; give one each")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"{self.id}: kind {kind!r} of a reference{nearest(kind, KINDS)}")


def file_name(text: str) -> str:
    """`text` with everything that an id may not hold replaced by `_`."""
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII).lstrip("_.-")[:120] or "video"


def read_benchmark(path: str | Path, root: str | Path | None = None) -> list[Item]:
    """The items of an OpenS2V-Eval JSON file, in its order: {id: {img_paths, prompt, class_label, synthesis_flag}}.

    The category is the id without its number (`singlehuman_3`); a reference's kind follows from its path's folders.

    Args:
        path: the JSON file.
        root: what `img_paths` are relative to; the file's folder by default. Pictures are not opened here.

    Raises:
        UserError: for a file that is missing, no JSON or not of this form, naming the record and the key.
    """
    path = Path(path)
    base = Path(root) if root is not None else path.parent
    records = _load_json(path)
    if not isinstance(records, dict) or not records:
        found = "no records" if records == {} else f"a {type(records).__name__}"
        raise UserError(f"{path}: must be a JSON object of records by id (OpenS2V-Eval), found {found}")
    return [_from_record(path, base, item_id, record) for item_id, record in records.items()]


def _from_record(path: Path, base: Path, item_id: str, record: Any) -> Item:
    if not isinstance(record, dict):
        raise UserError(f"{path}: record {item_id!r} is a {type(record).__name__}, must be an object")
    for key in ("img_paths", "prompt"):
        if key not in record:
            close = nearest(key, record)
            raise UserError(f"{path}: record {item_id!r} has no {key!r}{close}")
    pictures, labels = record["img_paths"], record.get("class_label") or []
    if not _strings(pictures) or not isinstance(record["prompt"], str) or not _strings(labels):
        raise UserError(
            f"{path}: record {item_id!r}: img_paths and class_label are lists of strings, prompt is a string"
        )
    try:
        return Item(
            id=item_id,
            prompt=record["prompt"],
            references=tuple(base / picture for picture in pictures),
            labels=tuple(labels),
            kinds=tuple(map(kind_of, pictures)),
            category=re.sub(r"[_-]?\d+$", "", item_id),
            meta={"synthesis_flag": record["synthesis_flag"]} if "synthesis_flag" in record else {},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def kind_of(picture: str) -> str:
    """What a benchmark's reference shows, from the folders of its path; "object" where they do not tell."""
    for part in PurePosixPath(picture).parts[:-1]:
        if part.lower() in PATH_KINDS:
            return PATH_KINDS[part.lower()]
    return "object"


def read_items(path: str | Path) -> list[Item]:
    """The items of a JSON Lines file: one {"id", "prompt", "references", ...} a line, keys as in `Item`.

    Relative paths are relative to the file's folder. Only `id` and `prompt` are needed.

    Raises:
        UserError: naming the line, for a file that is missing or a line that is no item; for an id that comes twice.
    """
    path = Path(path)
    items = [_from_line(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not items:
        raise UserError(f"{path}: no items; write one JSON object a line, with at least an id and a prompt")
    check_unique(items, str(path))
    return items


def _from_line(path: Path, number: int, line: str) -> Item:
    where = f"{path}, line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or not {"id", "prompt"} <= set(values):
        raise UserError(f"{where}: must be a JSON object with at least an id and a prompt")
    known = Item.__dataclass_fields__
    for key in values:
        if key not in known:
            raise UserError(f"{where}: there is no key {key!r}{nearest(key, known)}")
    for key in ("references", "labels", "kinds"):
        if not _strings(values.get(key, [])):
            raise UserError(f"{where}: {key} must be a list of strings")
    for key in ("source", "mask"):
        if values.get(key) is not None:
            values[key] = path.parent / str(values[key])
    try:
        return Item(
            **{
                **values,
                "id": str(values["id"]),
                "prompt": str(values["prompt"]),
                "references": tuple(path.parent / name for name in values.get("references", [])),
                "labels": tuple(values.get("labels", ())),
                "kinds": tuple(values.get("kinds", ())),
            }
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_items(folder: str | Path, items: Iterable[Item]) -> Path:
    """Write `<folder>/items.jsonl` at once; files inside the folder are named relative to it. `read_items` inverts it.

    A line: {"id", "prompt", "references": [paths], "labels", "kinds", "category", "meta"}, and "source" and "mask" for
    an edit.
    """
    folder = Path(folder)
    lines = []
    for item in items:
        values: dict[str, Any] = {
            "id": item.id,
            "prompt": item.prompt,
            "references": [_relative(picture, folder) for picture in item.references],
            "labels": list(item.labels),
            "kinds": list(item.kinds),
            "category": item.category,
            "meta": dict(item.meta),
        }
        for key in ("source", "mask"):
            if (file := getattr(item, key)) is not None:
                values[key] = _relative(file, folder)
        lines.append(json.dumps(values, ensure_ascii=False, sort_keys=True) + "\n")
    with storage.open_atomic(str(folder / ITEMS)) as stream:
        stream.write("".join(lines).encode())
    return folder / ITEMS


def check_unique(items: Sequence[Item], where: str) -> None:
    """Raise `UserError` where two items would write the same file."""
    seen: set[str] = set()
    for item in items:
        if item.id.lower() in seen:  # some file systems do not tell cases apart
            raise UserError(f"{where}: the id {item.id!r} comes twice; it names the video's file")
        seen.add(item.id.lower())


def _relative(file: Path, folder: Path) -> str:
    file, folder = file.absolute(), folder.absolute()
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.75)  # a stranger's file is no help
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(path: Path) -> list[str]:
    return _text(path).split("\n")  # not splitlines(): JSON strings may hold other line separators


def _load_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{path}: the key {twice!r} comes twice")
        return dict(pairs)

    try:
        return json.loads(_text(path), object_pairs_hook=unique)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid JSON: {error}") from None

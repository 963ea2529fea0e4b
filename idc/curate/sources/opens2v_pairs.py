"""OpenS2V-5M's cross-video pairs: which subject of which record shows the same as one of another record.

The files are as large as the records', and a record's pairs are anywhere in them: they go through a temporary database
on the disk, which the records are then looked up in.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from idc.curate.sources.listing import walk
from idc.curate.sources.streaming import Record, plain_json, stream_records
from idc.data import storage
from idc.errors import UserError

FIRST_FIELDS = ("cur_id", "aft_id")
_OWN, _OTHER = "cur_", "aft_"
_BATCH = 10_000  # rows of one insertion


class PairSettings:
    """Which pairs are carried along.

    Args:
        min_text, min_image: least cosine of the two class names and of the two pictures.
        max_image: largest cosine of the two pictures: above, they are nearly the same picture, and a reference would
            teach to copy.
        most: pairs of one record, those of the most similar pictures first.

    Raises:
        UserError: for a number out of its range.
    """

    def __init__(self, min_text: float = 0.6, min_image: float = 0.6, max_image: float = 0.95, most: int = 32) -> None:
        for name, value in (("min_text", min_text), ("min_image", min_image), ("max_image", max_image)):
            if not -1 <= value <= 1:
                raise UserError(f"{name}={value}: a cosine, in [-1, 1]")
        if min_image > max_image:
            told = f"min_image={min_image}, max_image={max_image}: the least is above the most"
            raise UserError(f"{told}; did you mean min_image={max_image}, max_image={min_image}?")
        if most < 1:
            raise UserError(f"most={most}: must be 1 or more; 32 is usual")
        self.min_text, self.min_image, self.max_image, self.most = min_text, min_image, max_image, most


def pair_files(path: str) -> list[str]:
    """The .json files of pairs: `path` itself, or those in the folder that it is, sorted."""
    if path.removesuffix(".gz").endswith((".json", ".jsonl")):
        return [path]
    files = [file.path for files in walk(path, setting="pairs") for file in files]
    return [storage.join(path, name) for name in files if name.removesuffix(".gz").endswith((".json", ".jsonl"))]


class Pairs:
    """All pairs of some files, by record. Both records of a pair find it, each as its own side.

    What is malformed is in `broken`: (file, record of it); at most one for each cluster of a file.
    """

    def __init__(self, files: Sequence[str], settings: PairSettings) -> None:
        self._settings = settings
        # SQLite's own temporary database: on the disk where it grows, gone with the connection.
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.execute("PRAGMA journal_mode=OFF")
        self._base.execute("PRAGMA synchronous=OFF")
        self._base.execute("CREATE TABLE pairs (id TEXT, image REAL, near INTEGER, pair TEXT)")
        self.broken: list[tuple[str, Record]] = []
        rows: list[tuple[str, float, int, str]] = []
        for file in files:
            for record in stream_records(file, FIRST_FIELDS):
                good = list(self._rows(record))
                rows += [row for row in good if row]
                if record.problem or None in good:
                    self.broken.append((file, record._replace(value=None, problem=record.problem or "malformed pair")))
                if len(rows) >= _BATCH:
                    self._insert(rows)
        self._insert(rows)
        self._base.execute("CREATE INDEX by_id ON pairs (id)")

    def of(self, id: str) -> dict[str, Any]:
        """{"pairs": its pairs, most similar first, "near_duplicates": how many were left out as such}.

        A pair is {"own": what it says of this record's side (class_name, frame_idx, ...), "other": the same of the
        other record's, with its "id", and "text_similarity" and "image_similarity"}.
        """
        found = self._base.execute(
            "SELECT pair FROM pairs WHERE id = ? AND NOT near ORDER BY image DESC, pair LIMIT ?",
            (id, self._settings.most),
        )
        near = self._base.execute("SELECT count(*) FROM pairs WHERE id = ? AND near", (id,)).fetchone()[0]
        return {"pairs": [json.loads(pair) for (pair,) in found], "near_duplicates": near}

    def close(self) -> None:
        """Remove the database."""
        self._base.close()

    def _insert(self, rows: list[tuple[str, float, int, str]]) -> None:
        self._base.execute("BEGIN")
        self._base.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?)", rows)
        self._base.execute("COMMIT")
        rows.clear()

    def _rows(self, record: Record) -> Iterator[tuple[str, float, int, str] | None]:
        """Both rows of each pair of a record of the file (one pair, or a cluster's list); None for a malformed one."""
        items = record.value if isinstance(record.value, list) else [record.value]
        for item in items if not record.problem else ():
            sides = _sides(item)
            if sides is None:
                yield None
                continue
            own, other, similar = sides
            text, image = similar["text_similarity"], similar["image_similarity"]
            wanted = self._settings
            if text >= wanted.min_text and image >= wanted.min_image:
                near = int(image > wanted.max_image)
                for one, two in ((own, other), (other, own)):
                    rest = {key: value for key, value in one.items() if key != "id"}
                    pair = json.dumps({"own": rest, "other": two, **similar}, sort_keys=True)
                    yield one["id"], image, near, pair


def _sides(item: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """What a pair says of its first record, of its second, and of both; None where it is malformed."""
    try:
        item = plain_json(item)
    except ValueError:
        return None
    if not isinstance(item, Mapping):
        return None
    own = {key.removeprefix(_OWN): value for key, value in item.items() if key.startswith(_OWN)}
    other = {key.removeprefix(_OTHER): value for key, value in item.items() if key.startswith(_OTHER)}
    similar = {key: value for key, value in item.items() if not key.startswith((_OWN, _OTHER))}
    numbers = [similar.get(name) for name in ("text_similarity", "image_similarity")]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return None
    for side in (own, other):
        if not isinstance(side.get("id"), str) or not side["id"]:
            return None
        side["id"] = side["id"].rsplit("/", 1)[-1]  # the merged files say "part/id"
    return own, other, similar

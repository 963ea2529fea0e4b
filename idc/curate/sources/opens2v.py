"""OpenS2V-5M as a source: JSON files of 32 to 66 GB, read record by record, with the videos beside them.

A unit is a record's place in its file, so that what goes to a worker stays small; the worker reads the record itself.
Filters on what the record says come before any video is touched.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from idc.curate.candidate import Candidate, Dropped, Outcome, Source, key_of, plain_settings
from idc.curate.reaching import reaching
from idc.curate.sources.opens2v_pairs import Pairs, PairSettings, pair_files
from idc.curate.sources.opens2v_record import CAPTIONS, META, SPANS, RecordError, from_record, picture_size
from idc.curate.sources.streaming import Record, is_packed, plain_json, stream_records
from idc.data import storage
from idc.errors import UserError

FIRST_FIELDS = ("metadata", "word_tags", "annotation")  # of a record


class OpenS2V5M(Source):
    """Records of OpenS2V-5M (or of one's own collection in its format) and the videos that they speak of.

    A candidate's `video` is the source video that the dataset cut into parts: its own name without what `parts`
    matches, so that no video is on both sides of a split.

    Args:
        path: the JSON file, or several: a dict or list of records, or a record a line (.jsonl); each may be packed with
            gzip (.gz): its records then go into the plan of the run themselves, so large ones are better unpacked.
            Files or fsspec URLs.
        videos_root: folder or URL that the records' paths begin at; one for all files, or one each.
        name, licence: as provenance shows them.
        spans: which of the record's spans is used: the first of these that it has.
        captions: likewise.
        parts: regular expression of what follows a source video's name in that of a part of it.
        min_tech, min_motion, max_motion, min_aesthetic: bounds of the record's own scores, on its scales (technical
            about 0 to 3, motion about 0 to 1, aesthetic 1 to 10).
        min_side: of the cropped picture, in pixels.
        min_frames: of the span.
        subjects_required: drop records in which no subject is marked.
        pairs: file or folder of cross-video pairs; a candidate finds its own in `meta["opens2v"]["pairs"]`. Both
            records of a pair are mostly parts of one source video, other moments of it.
        pair_settings: which of them, and the cap on near-duplicates.

    Raises:
        UserError: for another number of roots than of files, a file given twice, an expression that is none, or a
            bound that is out of its range.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        videos_root: str | Sequence[str],
        name: str = "opens2v-5m",
        licence: str = "CC-BY-4.0",
        spans: Sequence[str] = SPANS,
        captions: Sequence[str] = CAPTIONS,
        parts: str = r"_(?:segment|part)\d*.*$",
        min_tech: float | None = None,
        min_motion: float | None = None,
        max_motion: float | None = None,
        min_aesthetic: float | None = None,
        min_side: int = 0,
        min_frames: int = 0,
        subjects_required: bool = False,
        pairs: str = "",
        pair_settings: PairSettings | None = None,
    ) -> None:
        self._paths = [path] if isinstance(path, str) else list(path)
        roots = [videos_root] if isinstance(videos_root, str) else list(videos_root)
        if len(roots) not in (1, len(self._paths)):
            raise UserError(f"videos_root: {len(roots)} folders for {len(self._paths)} files; give one, or one a file")
        places = {PurePosixPath(path) if storage.is_url(path) else os.path.realpath(path) for path in self._paths}
        if len(places) < len(self._paths) or not self._paths:
            raise UserError(f"path={self._paths}: {'a file is given twice' if self._paths else 'no file'}")
        try:
            re.compile(parts)
        except re.error as error:
            raise UserError(f"parts={parts!r}: no regular expression ({error})") from None
        bounds = {"min_tech": min_tech, "min_motion": min_motion, "max_motion": max_motion}
        for setting, bound in {**bounds, "min_aesthetic": min_aesthetic}.items():
            if bound is not None and not math.isfinite(bound):
                raise UserError(f"{setting}={bound}: must be a number; null is no bound")
        if min_motion is not None and max_motion is not None and min_motion > max_motion:
            told = f"min_motion={min_motion}, max_motion={max_motion}: the least is above the most"
            raise UserError(f"{told}; did you mean min_motion={max_motion}, max_motion={min_motion}?")
        for setting, least in (("min_side", min_side), ("min_frames", min_frames)):
            if least < 0:
                raise UserError(f"{setting}={least}: must be 0 or more; 0 is no bound")
        self._roots = roots * len(self._paths) if len(roots) == 1 else roots
        self._pairs = pairs
        self._files = _short_names(self._paths)
        self.name, self.licence = name, licence
        self.spans, self.captions, self.parts = tuple(spans), tuple(captions), parts
        self.min_tech, self.min_motion, self.max_motion = min_tech, min_motion, max_motion
        self.min_aesthetic, self.min_side, self.min_frames = min_aesthetic, min_side, min_frames
        self.subjects_required = subjects_required
        self.pair_settings = pair_settings or PairSettings()

    def describe(self) -> Mapping[str, Any]:
        """Settings without the folders that files and videos lie in: these may be moved while a collection is made."""
        return {**plain_settings(self), "pairs": bool(self._pairs)}

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A unit for each record, and one for each place where a record cannot be read.

        The id says which record of which file, and by a checksum with what in it and in its pairs: a changed one is a
        new unit.
        """
        pairs = Pairs(pair_files(self._pairs), self.pair_settings) if self._pairs else None
        found = False
        try:
            for file, record in pairs.broken if pairs else ():
                place = f"{PurePosixPath(file).name}#{record.number}"
                yield f"pairs:{place}", {"problem": record.problem, "detail": f"pairs at {place}, byte {record.at}"}
            for number, path in enumerate(self._paths):
                for record in stream_records(path, FIRST_FIELDS):
                    found = True
                    yield self._unit(number, path, record, pairs)
        finally:
            if pairs:
                pairs.close()
        if not found:
            raise UserError(f"path={', '.join(self._paths)}: no record in it")

    def _unit(self, number: int, path: str, record: Record, pairs: Pairs | None) -> tuple[str, Mapping[str, Any]]:
        key = (record.key or _own_id(record.value)).encode("utf-8", "replace").decode()
        known = pairs.of(key) if pairs and not record.problem else {}
        crc = zlib.crc32(json.dumps(known).encode(), record.crc) if known else record.crc
        id = f"{self._files[number]}#{record.number}:{key}@{crc:08x}"
        if record.problem:
            detail = f"record {record.number}, {record.size} bytes from byte {record.at}"
            return id, {"problem": record.problem, "detail": detail, "id": key}
        payload: dict[str, Any] = {"file": self._files[number], "id": key}
        if is_packed(path):  # its bytes cannot be addressed
            try:
                payload["record"] = plain_json(record.value)
            except ValueError as error:
                return id, {"problem": "malformed record", "detail": str(error), "id": key}
        else:
            payload |= {"at": record.at, "size": record.size}
        return id, {**payload, "pairs": known}

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        """One candidate, or why the record gives none."""
        if "problem" in payload:
            where = payload.get("id") or id
            yield Dropped(self.name, where, "", "source", payload["problem"], payload["detail"])
            return
        key = key_of(payload["id"] or PurePosixPath(payload["file"]).stem, f"{self.name}/{id.rsplit('@', 1)[0]}")
        video = payload["id"]
        try:
            record = self._read(payload)
            video, path = self._video(record, self._roots[self._files.index(payload["file"])])
            known = {"id": payload["id"], **payload["pairs"]}
            base = Candidate(key, self.name, video, path, licence=self.licence, meta={META: known})
            candidate = from_record(record, base, self.spans, self.captions)
            self._check(candidate)
        except RecordError as error:
            yield Dropped(self.name, video, key, "source", error.reason, error.detail)
        else:
            yield candidate

    def _read(self, payload: Mapping[str, Any]) -> Any:
        if "record" in payload:
            return payload["record"]
        path = self._paths[self._files.index(payload["file"])]
        try:
            with reaching(path, f"{payload['file']}: "):
                data = storage.read_range(path, payload["at"], payload["size"])
            return plain_json(json.loads(data))
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError("malformed record", f"{payload['file']}: {error}") from None

    def _video(self, record: Any, root: str) -> tuple[str, str]:
        """(id of the source video, path of the file) of a record."""
        metadata = record.get("metadata") if isinstance(record, Mapping) else None
        name = metadata.get("path") if isinstance(metadata, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RecordError("malformed record", "no metadata with a path")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "://" in name or "\\" in name or "\0" in name:
            raise RecordError("path leads out of the videos' folder", repr(name))
        stem = re.sub(self.parts, "", relative.stem) or relative.stem
        return str(relative.with_name(stem)), storage.join(root, str(relative))

    def _check(self, candidate: Candidate) -> None:
        """Raise RecordError where what the record says rules it out."""
        bounds = (
            ("tech", self.min_tech, None, "technical score"),
            ("motion", self.min_motion, self.max_motion, "motion score"),
            ("aesthetic", self.min_aesthetic, None, "aesthetic score"),
        )
        for name, least, most, words in bounds:
            if least is None and most is None:
                continue
            score = candidate.scores.get(f"{META}_{name}")
            if score is None:
                raise RecordError(f"no {words}", f"metadata.{name} is missing, and bounds are set")
            if least is not None and score < least:
                raise RecordError(f"low {words}", f"{score:g}, {least:g} wanted")
            if most is not None and score > most:
                raise RecordError(f"high {words}", f"{score:g}, at most {most:g} wanted")
        size = picture_size(candidate.meta[META]["metadata"], candidate.crop)
        if self.min_side and size is None:
            raise RecordError("no crop or resolution", f"min_side={self.min_side} cannot be checked")
        if size and min(size) < self.min_side:
            raise RecordError("picture too small", f"{size[1]}x{size[0]}, {self.min_side} wanted")
        frames = candidate.span[1] - candidate.span[0] if candidate.span else None
        if frames is not None and frames < self.min_frames:
            raise RecordError("too short", f"{frames} frames, {self.min_frames} wanted")
        if self.subjects_required and not candidate.subjects:
            faults = candidate.meta[META]["faults"]
            raise RecordError("no subject", "; ".join(faults)[:200] or "nothing is annotated")


def _own_id(value: Any) -> str:
    """What a record in a list calls itself."""
    for name in ("id", "key", "video_id"):
        if isinstance(value, Mapping) and isinstance(value.get(name), str | int):
            return str(value[name])
    metadata = value.get("metadata") if isinstance(value, Mapping) else None
    path = metadata.get("path") if isinstance(metadata, Mapping) else None
    return PurePosixPath(path).stem if isinstance(path, str) else ""


def _short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The files' names, with as many of their folders as tell them apart."""
    parts = [PurePosixPath(path).parts for path in paths]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return tuple("/".join(path[-depth:]) for path in parts)

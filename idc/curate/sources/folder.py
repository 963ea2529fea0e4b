"""A folder or bucket of videos as a source, such as one's own collection of professionally shot ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from idc.curate.candidate import Candidate, Dropped, Outcome, Source, key_of
from idc.curate.plan import SEGMENT
from idc.curate.segments import Segment
from idc.curate.sources.listing import may_be_video, walk
from idc.curate.sources.sidecars import Licences, SidecarError, unit_of, with_sidecars
from idc.data import storage
from idc.errors import UserError


class VideoFolder(Source):
    """All videos below a folder, local or behind an fsspec URL (s3://, gs://, hf://, memory://, ...), with what lies
    beside them (`idc.curate.sources.sidecars`).

    Names of hidden files, pictures, texts and archives are no videos; any other file is a unit, and the decode check
    drops what is none.

    Args:
        path: the folder.
        name, licence: as provenance shows them; `licence` is that of videos for which nothing else says one.
        licences: licence by pattern of the relative path ("studio/*": "CC-BY-4.0"), or the name of a JSON file with
            these in the folder (or anywhere: a path or URL); the first pattern that fits counts.
        patterns: relative paths that are taken ("*.mp4", "2024/*"); all by default.
        leave_out: a local folder below `path` that is not looked into, such as that of the shards.
        segment_mib: a file of more than so many MiB is taken in segments of at most that, each a unit
            (`idc.curate.segments`): what a killed run does again, and what workers share, of a long video. 0 takes
            every file whole.

    Raises:
        UserError: for patterns of another form, or less than 0 MiB.
    """

    def __init__(
        self,
        path: str,
        name: str = "videos",
        licence: str = "",
        licences: Mapping[str, str] | str = "",
        patterns: Sequence[str] = (),
        leave_out: str = "",
        segment_mib: float = 128.0,
    ) -> None:
        if segment_mib < 0:
            raise UserError(f"segment_mib={segment_mib:g}: must be 0 (every file whole) or more")
        if isinstance(patterns, str):
            raise UserError(f"patterns={patterns!r}: a list of patterns is wanted, such as [{patterns!r}]")
        # What begins with _ is not in `describe`: the folder may be moved while a collection is made of it.
        self._path, self._leave_out = str(path), str(leave_out)
        self.name, self.licence, self.patterns = name, licence, tuple(patterns)
        self.licences, self.segment_mib = Licences(licences, self._path), segment_mib

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A unit for each file that may be a video, several for a large one."""
        found = False
        for files in walk(self._path, self._leave_out):
            sizes = {file.path: file.size for file in files}
            for file in files:
                if may_be_video(PurePosixPath(file.path).name) and self._wanted(file.path):
                    found = True
                    yield from self._segments(file.size, *unit_of(file, sizes))
        if not found:
            wanted = f" that fit {', '.join(self.patterns)}" if self.patterns else ""
            raise UserError(f"path={self._path}: no video files{wanted} in it")

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        """One candidate; its file is looked at by the steps, the decode check first."""
        path = payload["path"]
        if "problem" in payload:
            yield Dropped(self.name, path, "", "source", payload["problem"])
            return
        key = key_of(PurePosixPath(path).stem, f"{self.name}/{path}")
        licence = self.licences.of(path, self.licence)
        segment = Segment(*payload[SEGMENT]) if SEGMENT in payload else None
        candidate = Candidate(key, self.name, path, storage.join(self._path, path), segment=segment, licence=licence)
        try:
            yield with_sidecars(candidate, self._path, path, payload["beside"])
        except SidecarError as error:
            yield candidate.dropped("source", "side-car cannot be read", str(error))

    def _segments(self, size: int, id: str, payload: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        count = math.ceil(size / (self.segment_mib * 2**20)) if self.segment_mib else 1
        if count <= 1 or "problem" in payload:
            yield id, payload
            return
        for number in range(count):
            yield f"{id}#{number + 1}-{count}", {**payload, SEGMENT: [number, count]}

    def _wanted(self, path: str) -> bool:
        return not self.patterns or any(fnmatchcase(path, pattern) for pattern in self.patterns)

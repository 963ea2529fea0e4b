"""A folder or bucket of videos as a source, such as one's own collection of professionally shot ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from idc.curate.candidate import Candidate, Dropped, Outcome, Source, key_of
from idc.curate.plan import SEGMENT
from idc.curate.reaching import UnreachedError, reaching
from idc.curate.segments import Segment
from idc.curate.sources.listing import File, may_be_video, walk, with_marks
from idc.curate.sources.sidecars import Licences, SidecarError, identity_of, unit_of, with_sidecars
from idc.data import storage
from idc.data.video import stated_seconds
from idc.errors import UserError

SHORTEST = 0.01  # minutes of a segment


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
        segment_minutes: a video that its header says is at least twice as long is taken in segments of at least that,
            each a unit (`idc.curate.segments`): what a killed run does again, and what workers share, of a long video.
            0 takes every file whole.
        segment_from_mib: files of fewer MiB are taken whole, and not opened while the folder is listed.

    A run that goes on, or into the same folder again, reads anew what `idc.curate.sources.sidecars.unit_of` gives
    another id: a video of another content, or whose side-cars say something else. Of a local video the size counts
    and what is read at its beginning, middle and end; of one behind a URL the size and what the file system's listing
    has for free, an ETag or the like or else the time when it was written.

    A video behind a URL that is taken in segments is fetched whole, once a machine (`idc.curate.films`). A damaged
    frame costs the shots of its segment.

    Raises:
        UserError: for patterns of another form, or sizes that are none.
    """

    def __init__(
        self,
        path: str,
        name: str = "videos",
        licence: str = "",
        licences: Mapping[str, str] | str = "",
        patterns: Sequence[str] = (),
        leave_out: str = "",
        segment_minutes: float = 5.0,
        segment_from_mib: float = 64.0,
    ) -> None:
        if segment_minutes and not SHORTEST <= segment_minutes < math.inf:
            raise UserError(
                f"segment_minutes={segment_minutes:g}: must be 0 (every file whole) or at least {SHORTEST:g}"
            )
        if not segment_from_mib >= 0:
            raise UserError(f"segment_from_mib={segment_from_mib:g}: must be 0 or more")
        if isinstance(patterns, str):
            raise UserError(f"patterns={patterns!r}: a list of patterns is wanted, such as [{patterns!r}]")
        # What begins with _ is not in `describe`: the folder may be moved while a collection is made of it.
        self._path, self._leave_out = str(path), str(leave_out)
        self.name, self.licence, self.patterns = name, licence, tuple(patterns)
        self.licences = Licences(licences, self._path)
        self.segment_minutes, self.segment_from_mib = segment_minutes, segment_from_mib

    @property
    def identity(self) -> int:
        return identity_of(self._path)

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A unit for each file that may be a video, several for a long one. Of local ones a little is read for the ids,
        and their side-cars; of large ones the header.

        Raises:
            UnreachedError: where one of these cannot be read now: the film would get other units than before.
        """
        found = False
        for files in walk(self._path, self._leave_out):
            listed = {file.path: file for file in files}
            videos = [f for f in files if may_be_video(PurePosixPath(f.path).name) and self._wanted(f.path)]
            for file in with_marks(videos, self._path):
                found = True
                yield from self._segments(file, *unit_of(file, listed, self._path))
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

    def _segments(self, file: File, id: str, payload: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        count = 1
        if self.segment_minutes and file.size >= max(1.0, self.segment_from_mib * 2**20) and "problem" not in payload:
            count = int(self._stated_seconds(file) // (60 * self.segment_minutes))
        if count <= 1:
            yield id, payload
            return
        for number in range(count):
            yield f"{id}#{number + 1}-{count}", {**payload, SEGMENT: [number, count]}

    def _stated_seconds(self, file: File) -> float:
        place = storage.join(self._path, file.path)
        if not storage.is_url(place):
            return stated_seconds(place)
        try:
            with reaching(place, f"{file.path}: "), storage.open_read(place) as stream:
                return stated_seconds(stream)
        except FileNotFoundError:  # removed since it was listed: the worker that fetches it tells
            return 0.0
        except UnreachedError as error:
            if isinstance(error.__cause__, PermissionError):  # that one film may be forbidden: as above
                return 0.0
            raise

    def _wanted(self, path: str) -> bool:
        return not self.patterns or any(fnmatchcase(path, pattern) for pattern in self.patterns)

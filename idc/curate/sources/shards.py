"""Existing shards as a source, so that collections can be merged, filtered anew and written again.

What the shards' JSON says of a sample is taken as it is. Its clip goes on as the file that it is: no step cuts it, and
nothing is encoded twice, unless the recipe has a `Cut`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from idc.curate.candidate import (
    KINDS,
    Box,
    Candidate,
    CuratedSubject,
    Dropped,
    EncodedClip,
    Mask,
    Outcome,
    Reference,
    Source,
    key_of,
)
from idc.curate.reaching import UnreachedError, is_passing
from idc.curate.sources import rle
from idc.data import storage
from idc.data.index import Entry, ShardIndex
from idc.data.shards import LOSER, SampleError, clip_ext, read_members
from idc.errors import UserError
from idc.types import Bucket

if TYPE_CHECKING:
    from idc.curate.looking import SeenReference, SeenSubject

META = "shards"
OF_REFERENCE = {"human": "person", "background": "place"}  # what one is to the metrics -> what its subject is
# Of what curation writes into a sample's meta, that which is about the file that its clip was cut from, in that file's
# frames and pixels: attributes of the candidate that it was, and the notes of steps before the clip and of its cut. The
# candidate that is read is of another file, the clip itself.
ATTRIBUTES = ("path", "span", "crop", "ranks", "fps")
NOTES = ("decode check", "shots", "technical filter", "windows", "cut")


class ExistingShards(Source):
    """The samples of a folder of shards that has an index (`idc shards index` makes one), in its order.

    Captions, references, boxes, masks, scores, models, licence, safety and the source video come back as they were
    written. A reference whose origin the sample does not tell is "given"; a subject of a kind that curation has not is
    an "object", and its meta["shards"] says which. The shard and the source that a sample was once of are in
    meta["shards"], with the span, crop and frames that it had there and what the steps noted of that source's file;
    `path` is that of the clip's bytes within its tar (`idc.data.storage.part_path`).

    Args:
        path: folder or fsspec URL.
        part: "train", "held_out" or another folder below it; "" for the folder itself.
        name: as provenance shows it; that of the first source stays in meta["shards"].
        licence: of samples that tell none.
        keep_clips: the clips' files go into the new shards as they are. Steps may look at them all the same.

    Raises:
        UserError: for a part that leads out of the folder.
    """

    def __init__(
        self, path: str, part: str = "", name: str = "shards", licence: str = "", keep_clips: bool = True
    ) -> None:
        if ".." in part.split("/") or part.startswith("/"):
            raise UserError(f"part={part!r}: the name of a folder below path, such as 'train'")
        # What begins with _ is not in `describe`: the folder may be moved while a collection is made of it.
        self._root = storage.join(path, part) if part else str(path)
        self.part, self.name, self.licence, self.keep_clips = part, name, licence, keep_clips

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A unit for each sample of the index, with its hash in the id, and one for each problem that the index has.

        Raises:
            UserError: if there are no shards, or their index is missing, damaged or out of date.
        """
        index, samples, entries = ShardIndex.stream(self._root)
        for number, problem in enumerate(index.problems):
            place = f"{problem.shard}/{problem.key}".rstrip("/")
            yield f"{place}#{number}", {"problem": "damaged shard", "place": place, "detail": problem.reason}
        if not samples and not index.problems:
            raise UserError(f"path={self._root}: no sample in these shards")
        for entry in entries:
            payload = {
                "shard": entry.shard,
                "key": entry.key,
                "layout": entry.layout,
                "bucket": list(entry.bucket),
                "fps": entry.fps,
                "sha256": entry.sha256,
            }
            yield f"{entry.shard}/{entry.key}@{entry.sha256[:16]}", payload

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        """One candidate, or why the sample cannot be read."""
        if "problem" in payload:
            yield Dropped(self.name, payload["place"], "", "source", payload["problem"], payload["detail"])
            return
        entry = _entry(self.name, payload)
        key = key_of(entry.key.rsplit("/", 1)[-1], f"{self.name}/{entry.shard}/{entry.key}")
        try:
            members = read_members(self._root, entry)
            yield self._candidate(key, entry, members)
        except SampleError as error:
            # An OSError is of the disk or store; all else is damage, which stays.
            if isinstance(error.__cause__, OSError) and is_passing(self._root, error.__cause__):
                raise UnreachedError(error.reason) from error
            yield Dropped(self.name, f"{entry.shard}/{entry.key}", key, "source", "unreadable sample", error.reason)

    def _candidate(self, key: str, entry: Entry, members: Mapping[str, bytes]) -> Candidate:
        # Not above: what looks at collections knows their writer, which knows this package's masks.
        from idc.curate.looking import Folder, describe, texts_of

        caption, record, problem = texts_of(members)
        seen = describe(Folder(self._root, "", 0, 0, 0, "", ()), entry, caption, record, problem)
        ext = clip_ext(members)
        if problem or ext is None:
            raise SampleError(problem or "no clip")
        if clip_ext(members, LOSER):
            raise SampleError("a preference pair, whose worse clip no step knows of")
        frames, height, width, _ = entry.bucket
        place = next(member for member in entry.members if member.ext == ext)
        earlier = (*ATTRIBUTES, *NOTES)
        own = {name: value for name, value in seen.meta.items() if name not in earlier}
        was = {"shard": entry.shard, "key": entry.key, "sha256": entry.sha256, "source": seen.source}
        was |= {name: seen.meta[name] for name in earlier if name in seen.meta}
        if META in own:  # it was read from shards before
            was["before"] = own[META]
        return Candidate(
            key=key,
            source=self.name,
            video=seen.video or f"{entry.shard}/{entry.key}",
            path=storage.part_path(storage.join(self._root, entry.shard), place.offset, place.size),
            span=(0, frames),
            ranks=tuple(range(frames)),
            fps=entry.fps,
            encoded=EncodedClip(members[ext], frames, height, width) if self.keep_clips and ext == "mp4" else None,
            caption=seen.caption,
            subjects=_unique(tuple(_subject(subject, entry, members) for subject in seen.subjects)),
            scores=dict(seen.scores),
            models={name: str(model) for name, model in seen.models.items()},
            licence=seen.licence or self.licence,
            safety=dict(seen.safety),
            meta={**own, META: was},
        )


def _entry(source: str, payload: Mapping[str, Any]) -> Entry:
    return Entry(
        source,
        payload["shard"],
        payload["key"],
        payload["layout"],
        Bucket(*payload["bucket"]),
        payload["fps"],
        payload["sha256"],
    )


def _subject(seen: SeenSubject, entry: Entry, members: Mapping[str, bytes]) -> CuratedSubject:
    kind = OF_REFERENCE.get(seen.kind, seen.kind or "object")
    odd = {} if kind in KINDS else {META: {"kind": kind}}  # other tools have others, and prompts repeat what it is
    return CuratedSubject(
        name=seen.name or "subject",
        kind="object" if odd else kind,
        box=None if seen.box is None else Box(*seen.box),
        mask=_mask(seen, entry),
        frame=seen.frame,
        score=seen.score or 0.0,
        references=tuple(_reference(reference, members) for reference in seen.references if reference.ext in members),
        meta={**seen.details, **odd},
    )


def _mask(seen: SeenSubject, entry: Entry) -> Mask | None:
    if seen.mask is None:
        return None
    try:
        return rle.decode(seen.mask, (entry.bucket.height, entry.bucket.width))
    except rle.RLEError as error:
        raise SampleError(f"mask of {seen.name!r}: {error}") from None


def _reference(seen: SeenReference, members: Mapping[str, bytes]) -> Reference:
    told = seen.details.get("meta")
    return Reference(
        image=members[seen.ext],
        ext=seen.ext.rsplit(".", 1)[-1],
        origin=seen.origin or "given",
        video=seen.video,
        seconds=seen.seconds,
        similarity=seen.similarity,
        model=str(seen.details.get("model", "")),
        meta=dict(told) if isinstance(told, Mapping) else {},
    )


def _unique(subjects: tuple[CuratedSubject, ...]) -> tuple[CuratedSubject, ...]:
    """The subjects under names of their own: shards of other tools may name several alike, or none."""
    used: set[str] = set()
    named = []
    for subject in subjects:
        name, number = subject.name, 1
        while name in used:
            number += 1
            name = f"{subject.name} {number}"
        used.add(name)
        named.append(subject if name == subject.name else replace(subject, name=name))
    return tuple(named)

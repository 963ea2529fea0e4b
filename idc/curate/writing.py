"""Writing the collection: survivors and decisions -> shards of training and held-out data with all that is known.

    out/train/{prefix}-000000.tar ...   out/train/index.jsonl        the same under out/held_out
    out/drops.jsonl                     whatever gave no sample, and why
    out/counts.json                     read = kept + dropped by step and reason
    out/manifest.json                   hashes and sizes of the shards, the recipe, the models

Which samples a shard has is planned from what is known of the survivors alone. A shard is written under another name
until it is whole; then a note of its plan and hash is left among the work files. A shard whose note says the same plan
is kept, so a killed run goes on where it was, and a changed one begins anew. Nothing that is written tells the time or
the machine: two runs are equal to the byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from idc.curate.candidate import Candidate, Dropped, Reference
from idc.curate.collection import Collected
from idc.curate.decisions import Decisions
from idc.curate.provenance import Choice, adopted_reference, choose_references, provenance, public
from idc.curate.records import drop_record, dumps, take_apart
from idc.curate.split import PARTS, check_share, part_of
from idc.data import storage
from idc.data.index import INDEX_NAME, ShardIndex, build_index
from idc.data.shards import ShardWriter, check_prefix
from idc.data.video import decoder_version
from idc.errors import UserError, make_folder, nearest

VERSION = 1
MANIFEST, DROPS, COUNTS = "manifest.json", "drops.jsonl", "counts.json"
STEP = "write"  # in the table, what is dropped here
WITHOUT_REFERENCE = ("leave_out", "drop")
NO_SUBJECTS, NO_REFERENCE, TOO_FEW = "no subjects", "subject without a reference", "no subject with a reference"
NOTES = "written"  # folder of the shards' notes, among the work files
NOTED = ("shard", "sha256", "bytes", "samples")  # of a shard's note, what the manifest says
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardWriting:
    """How shards are written.

    Attributes:
        samples_per_shard: at most, in a shard; also what a killed run may have to write again.
        held_out: share of the samples that are held out, by source video (`idc.curate.split`); 0 for none.
        prefix: of the shards' names.
        max_subjects: references of a sample at most; subjects behind it stay in its caption.
        without_reference: what becomes of a subject that has no picture: "leave_out" keeps it in the caption alone,
            "drop" drops the sample.
        keep_without_subjects: keep samples that have no reference at all, for text-to-video data.
    """

    samples_per_shard: int = 256
    held_out: float = 0.1
    prefix: str = "curated"
    max_subjects: int = 4
    without_reference: Literal["leave_out", "drop"] = "leave_out"
    keep_without_subjects: bool = False

    def __post_init__(self) -> None:
        check_share(self.held_out)
        check_prefix(self.prefix)
        for name in ("samples_per_shard", "max_subjects"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.without_reference not in WITHOUT_REFERENCE:
            known = nearest(self.without_reference, WITHOUT_REFERENCE)
            raise UserError(f"without_reference={self.without_reference!r} is not known{known}")

    def references(self, candidate: Candidate, decisions: Decisions) -> list[Choice] | Dropped:
        """The references that the candidate's sample has, or why there is no sample. Needs no pixels."""
        choices = choose_references(candidate, decisions)
        having = {choice.subject for choice in choices}
        without = [subject.name for number, subject in enumerate(candidate.subjects) if number not in having]
        if without and self.without_reference == "drop":
            return candidate.dropped(STEP, NO_REFERENCE, ", ".join(without))
        if not choices and not self.keep_without_subjects:
            return candidate.dropped(STEP, TOO_FEW if candidate.subjects else NO_SUBJECTS, ", ".join(without))
        return choices[: self.max_subjects]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        samples: number of samples of each part.
        shards, kept: number of shards, and how many of these an earlier run had written.
        read: what came to an end: samples and drops.
        dropped: step -> reason -> number.
    """

    samples: Mapping[str, int]
    shards: int
    kept: int
    read: int
    dropped: Mapping[str, Mapping[str, int]]


@dataclass
class _Shard:
    """A shard as planned: its part, its number there, its survivors by number, and a digest of what goes into it."""

    part: str
    number: int
    members: array[int] = field(default_factory=lambda: array("q"))
    digest: Any = field(default_factory=hashlib.sha256)

    def name(self, prefix: str) -> str:
        """Of its file, relative to the collection's folder."""
        return f"{self.part}/{prefix}-{self.number:06d}.tar"


@dataclass
class _Plan:
    """All shards in order; what is dropped, in the order of the survivors; the models by step of what is kept; the
    numbers of those whose references others take over."""

    shards: list[_Shard] = field(default_factory=list)
    drops: list[Dropped] = field(default_factory=list)
    models: dict[str, set[str]] = field(default_factory=dict)
    givers: dict[str, int] = field(default_factory=dict)


def write_collection(
    collected: Collected,
    decisions: Decisions,
    out: str,
    work: str,
    settings: ShardWriting,
    recipe: Mapping[str, Any],
    dropped: Iterable[Dropped] = (),
    fingerprint: str = "",
    material: str = "",
    on_shard: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the shards of a collection, their indexes, drops, counts and manifest.

    Args:
        collected: the survivors of the steps.
        decisions: of the collection steps over them.
        out: folder or URL.
        work: folder or URL for the notes.
        settings: how to write.
        recipe: all settings that decide what is in the shards, plain JSON; goes into the manifest.
        dropped: what the steps dropped, in order.
        fingerprint: of what the survivors' bytes depend on besides the recipe, such as the names of the parts.
        material: digest of what the recipe was applied to (`idc.curate.plan.Plan`); goes into the manifest.
        on_shard: called with the number of shards done and of all, as they are done.

    Raises:
        UserError: where `out` holds other shards, or the survivors cannot be read.
    """
    check_foreign(out, settings.prefix)
    recipe = public(recipe)
    about = [VERSION, recipe, fingerprint, decoder_version()]
    plan = _plan(collected, decisions, settings, hashlib.sha256(dumps(about).encode()))
    ledger = _Ledger(out, work, settings.prefix)
    notes = [ledger.read(shard) for shard in plan.shards]
    kept = sum(note is not None for note in notes)
    ledger.clear(plan.shards, whole=kept == len(notes))
    for done, shard in enumerate(plan.shards):
        if notes[done] is None:
            _write_shard(shard, plan, collected, decisions, out, settings)
            notes[done] = ledger.enter(shard)
        if on_shard:
            on_shard(done + 1, len(plan.shards))
    samples = {part: sum(len(shard.members) for shard in plan.shards if shard.part == part) for part in PARTS}
    table = _write_drops(out, chain(dropped, plan.drops))
    total = sum(samples.values())
    read = total + sum(sum(reasons.values()) for reasons in table.values())
    _write_json(out, COUNTS, {"read": read, "kept": total, **samples, "dropped": table})
    manifest = {
        "version": VERSION,
        "samples": samples,
        "indexes": {part: _index(out, part).hash for part in PARTS if samples[part]},
        "shards": [{name: note[name] for name in NOTED} for note in notes if note],
        "models": {step: sorted(used) for step, used in sorted(plan.models.items())},
        "decoder": decoder_version(),
        "material": material,
        "recipe": recipe,
    }
    _write_json(out, MANIFEST, manifest)
    return Written(samples, len(plan.shards), kept, read, table)


def _plan(collected: Collected, decisions: Decisions, settings: ShardWriting, digest: Any) -> _Plan:
    plan = _Plan()
    shards: dict[str, list[_Shard]] = {part: [] for part in PARTS}
    givers = {adopt.other for some in decisions.adopted.values() for adopt in some}
    for number, candidate in enumerate(collected):
        if candidate.key in givers:
            plan.givers[candidate.key] = number
        choices: Any = decisions.drops.get(number) or settings.references(candidate, decisions)
        if isinstance(choices, Dropped):
            plan.drops.append(choices)
            continue
        own = shards[part := part_of(candidate, decisions.held_out)]
        if not own or len(own[-1].members) == settings.samples_per_shard:
            own.append(_Shard(part, len(own), digest=digest.copy()))
        own[-1].members.append(number)
        taken = [asdict(choice) for choice in choices]
        own[-1].digest.update(dumps([take_apart(candidate)[0], taken]).encode() + b"\n")
        for step, used in candidate.models.items():
            plan.models.setdefault(step, set()).add(used)
    plan.shards = [shard for part in PARTS for shard in shards[part]]
    return plan


def _write_shard(
    shard: _Shard, plan: _Plan, collected: Collected, decisions: Decisions, out: str, settings: ShardWriting
) -> None:
    """Write one shard from its survivors, loaded one at a time."""
    with ShardWriter(storage.join(out, shard.part), settings.prefix, len(shard.members), shard.number) as writer:
        for number in shard.members:
            candidate = collected.load(number)
            choices = settings.references(candidate, decisions)
            if isinstance(choices, Dropped) or candidate.encoded is None or not candidate.encoded.mp4:
                raise UserError(f"{candidate.key}: what is known of it has changed meanwhile; start the same run again")
            chosen = [_picture(candidate, choice, plan, collected) for choice in choices]
            clip = candidate.encoded
            writer.write(
                candidate.key,
                clip.mp4,
                candidate.caption,
                [
                    (candidate.subjects[choice.subject].name, reference.image, reference.ext)
                    for choice, reference in zip(choices, chosen, strict=True)
                ],
                fps=candidate.fps,
                frames=clip.frames,
                height=clip.height,
                width=clip.width,
                source=candidate.source,
                licence=candidate.licence,
                meta=json.loads(dumps(provenance(candidate, choices, chosen))),
            )


def _picture(candidate: Candidate, choice: Choice, plan: _Plan, collected: Collected) -> Reference:
    if choice.adopt is None:
        return candidate.subjects[choice.subject].references[choice.reference]
    return adopted_reference(choice.adopt, collected.load(plan.givers[choice.adopt.other], clip=False))


class _Ledger:
    """Which shards are written: a note a shard among the work files, made when the shard is whole."""

    _own = (MANIFEST, COUNTS, DROPS, INDEX_NAME)

    def __init__(self, out: str, work: str, prefix: str) -> None:
        self._out, self._prefix = out, prefix
        self._work, self._notes = work, storage.join(work, NOTES)
        _make_folders(out, self._notes, *(storage.join(out, part) for part in PARTS))

    def read(self, shard: _Shard) -> dict[str, Any] | None:
        """What is told of a shard that is there as planned, or None."""
        name = shard.name(self._prefix)
        note = read_note(self._path(shard))
        try:
            size = storage.size_and_time(storage.join(self._out, name))[0]
        except OSError:
            return None
        return note if note.get("plan") == shard.digest.hexdigest() and note.get("bytes") == size else None

    def enter(self, shard: _Shard) -> dict[str, Any]:
        """Take note of a shard that has just been written."""
        name = shard.name(self._prefix)
        size, digest = 0, hashlib.sha256()
        with storage.open_read(storage.join(self._out, name)) as stream:
            while data := stream.read(READ_BYTES):
                digest.update(data)
                size += len(data)
        note = dict(zip(NOTED, (name, digest.hexdigest(), size, len(shard.members)), strict=True))
        note["plan"] = shard.digest.hexdigest()
        with storage.open_atomic(self._path(shard)) as stream:
            stream.write(dumps(note).encode())
        return note

    def clear(self, shards: Sequence[_Shard], whole: bool) -> None:
        """Remove what a killed run and another plan have left; the indexes and the manifest first, as long as they do
        not tell of what is there."""
        planned = {shard.name(self._prefix) for shard in shards}
        strange, unfinished = [], []
        for folder in (self._out, self._notes, *(storage.join(self._out, part) for part in PARTS)):
            for name in storage.list_names(folder):
                path = storage.join(folder, name)
                if name.endswith(".tmp") and name.startswith((*self._own, f"{self._prefix}-", *PARTS)):
                    unfinished.append(path)
                elif name.endswith(".tar") and f"{folder.rsplit('/', 1)[-1]}/{name}" not in planned:
                    strange.append(path)
        if strange or not whole:
            for name in (MANIFEST, COUNTS, DROPS, *(f"{part}/{INDEX_NAME}" for part in PARTS)):
                storage.remove(storage.join(self._out, name))
        for path in (*strange, *unfinished):
            storage.remove(path)

    def _path(self, shard: _Shard) -> str:
        return note_path(self._work, shard.name(self._prefix))


def note_path(work: str, shard: str) -> str:
    """Where what is known of a shard that this work has written is noted; `shard` is its name below `out`."""
    return storage.join(storage.join(work, NOTES), shard.replace("/", "-") + ".json")


def read_note(path: str) -> dict[str, Any]:
    """A shard's note; {} where there is none, or one that was cut short by a disk that lost its power."""
    try:
        with storage.open_read(path) as stream:
            note = json.loads(stream.read())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _make_folders(*folders: str) -> None:
    for folder in folders:
        if not storage.is_url(folder):
            make_folder(Path(folder))


def check_foreign(out: str, prefix: str) -> None:
    """Raise `UserError` where a folder that shards go to holds others, by their names."""
    own = re.compile(re.escape(prefix) + r"-\d{6}\.tar")
    for folder in (out, *(storage.join(out, part) for part in PARTS)):
        for name in storage.list_tars(folder):
            if folder == out or not own.fullmatch(name):
                raise UserError(f"{folder}: holds other shards ({name}); give an empty folder")


def _index(out: str, part: str) -> ShardIndex:
    """Write the part's index. Times are left out: they would differ from run to run, and change with every copy."""
    root = storage.join(out, part)
    index = build_index(root, part)
    if index.problems:
        problem = index.problems[0]
        raise UserError(f"{root}/{problem.shard}: damaged ({problem.reason}); remove it and start the same run again")
    index = replace(index, shards=tuple(replace(stamp, mtime_ns=0) for stamp in index.shards))
    index.save()
    return index


def _write_drops(out: str, drops: Iterable[Dropped]) -> dict[str, dict[str, int]]:
    """Write the drops one a line; step -> reason -> number, the steps in the order of their first drop."""
    table: dict[str, Counter[str]] = {}
    with storage.open_atomic(storage.join(out, DROPS)) as stream:
        for drop in drops:
            stream.write(dumps(drop_record(drop)).encode() + b"\n")
            table.setdefault(drop.step, Counter())[drop.reason] += 1
    return {step: dict(sorted(reasons.items())) for step, reasons in table.items()}


def _write_json(out: str, name: str, content: Mapping[str, Any]) -> None:
    with storage.open_atomic(storage.join(out, name)) as stream:
        stream.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")

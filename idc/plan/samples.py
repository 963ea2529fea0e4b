"""The samples of a recipe: how many each bucket takes, what is dropped, and their size in the features cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil, sqrt
from typing import NamedTuple

from idc.data import storage
from idc.data.buckets import Assignment, assign
from idc.data.index import Entry
from idc.data.module import VideoDataModule
from idc.data.plan import MixSource, Plan
from idc.data.scan import reference_number
from idc.data.sources import Source, ToyShards, source_name
from idc.errors import UserError
from idc.types import SPATIAL_MULTIPLE, Bucket

_LOOKED_AT = 8  # samples of a source whose references are looked at


@dataclass(frozen=True)
class Samples:
    """What is known of the samples.

    Attributes:
        shares: of each bucket in the training batches; they sum to 1.
        assignment: of the training samples, None where some of their indexes are not there.
        held_out: samples by bucket, None where not known.
        words: of a caption, a mean; None where not known.
        reference_side: of the largest reference that was looked at, in tokens, were it a square; None where none was.
        lacking: why something is not known.
    """

    shares: dict[Bucket, float]
    assignment: Assignment | None
    held_out: Counter[Bucket] | None
    words: float | None
    reference_side: int | None
    lacking: tuple[str, ...] = ()

    @property
    def kept(self) -> Counter[Bucket]:
        """Training samples by bucket."""
        return sum(self.assignment.kept.values(), Counter()) if self.assignment else Counter()

    @property
    def dropped(self) -> int:
        return sum(counts.total() for counts in self.assignment.dropped.values()) if self.assignment else 0


def samples_of(data: VideoDataModule) -> Samples:
    """Read the indexes of a recipe's sources where they are there; nothing is written."""
    lacking: list[str] = []
    read = _Read([], [])
    train = _assign(data, data.sources, lacking, read)
    held_out = _assign(data, data.val_sources, lacking, read) if data.val_sources else None
    kept = sum(held_out.kept.values(), Counter()) if held_out else None
    mean = sum(read.words) / len(read.words) if read.words else None
    return Samples(_shares(data, train), train, kept, mean, max(read.sides, default=None), tuple(lacking))


class _Read(NamedTuple):
    """Of the sources that are there: words of each caption, and sides of some references, in tokens."""

    words: list[int]
    sides: list[int]


def _sides(source: Source, entries: Sequence[Entry]) -> Iterator[int]:
    """Of references of a few samples, from the heads of their pictures; a square's with as many tokens."""
    from PIL import Image

    for entry in entries[:: max(1, len(entries) // _LOOKED_AT)][:_LOOKED_AT]:
        path = storage.join(source.path, entry.shard)
        for member in entry.members:
            if reference_number(member.ext) >= 0:
                with Image.open(BytesIO(storage.read_range(path, member.offset, member.size))) as picture:
                    yield ceil(sqrt(ceil(picture.width / SPATIAL_MULTIPLE) * ceil(picture.height / SPATIAL_MULTIPLE)))


def _assign(data: VideoDataModule, sources: Iterable[Source], lacking: list[str], read: _Read) -> Assignment | None:
    sizes: list[tuple[str, list[Bucket]]] = []
    for source in sources:
        if isinstance(source, ToyShards) and not source._ready():
            sizes.append((source_name(source), _toy(source)))
            read.sides.append(ceil(source.reference_size / SPATIAL_MULTIPLE))
            continue
        try:
            entries = source.index().entries
            read.sides.extend(_sides(source, entries))
        except (UserError, OSError) as error:
            lacking.append(str(error))
            continue
        read.words.extend(entry.caption_words for entry in entries)
        sizes.append((source_name(source), [entry.bucket for entry in entries]))
    if not sizes or lacking:
        return None
    return assign(sizes, data.rule)


def _toy(source: ToyShards) -> list[Bucket]:
    """Of toy shards that are still to be made: as many of each number of subjects as are to be expected."""
    found: list[Bucket] = []
    for number, share in enumerate(source.subjects, start=1):
        bucket = Bucket(source.frames, source.height, source.width, number)
        found += [bucket] * round(share * source.count)
    return found


def _shares(data: VideoDataModule, assignment: Assignment | None) -> dict[Bucket, float]:
    """Of the training batches; without an index the shapes equally often, with as many subjects as may come."""
    if assignment is None or not assignment.buckets:
        shapes = [shape._replace(subjects=data.rule.max_subjects) for shape in data.rule.parsed]
        return dict.fromkeys(shapes, 1 / len(shapes))
    sources = [
        MixSource(source_name(source), index, source.weight)
        for source, index in zip(data.sources, assignment.indices, strict=True)
    ]
    groups = data.group_size
    plan = Plan(sources, assignment.buckets, data.batch_size, data.seed, data.epoch_size, groups)
    return {bucket: float(share) for bucket, share in zip(plan.buckets, plan._bucket_share, strict=True) if share}

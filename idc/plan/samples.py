"""The samples of a recipe: how many each bucket takes, what is dropped, and their size in the features cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from idc.data.buckets import Assignment, assign
from idc.data.module import VideoDataModule
from idc.data.plan import MixSource, Plan
from idc.data.sources import Source, ToyShards, source_name
from idc.errors import UserError
from idc.types import Bucket


@dataclass(frozen=True)
class Samples:
    """What is known of the samples.

    Attributes:
        shares: of each bucket in the training batches; they sum to 1.
        assignment: of the training samples, None where some of their indexes are not there.
        held_out: samples by bucket, None where not known.
        words: of a caption, a mean; None where not known.
        reference_side: of references, in tokens, where the source says it.
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
    words: list[int] = []
    train = _assign(data, data.sources, lacking, words)
    held_out = _assign(data, data.val_sources, lacking, words) if data.val_sources else None
    sides = {source.reference_size for source in data.sources if isinstance(source, ToyShards)}
    side = max(sides) // 16 if sides and len(data.sources) == len([*filter(_is_toy, data.sources)]) else None
    kept = sum(held_out.kept.values(), Counter()) if held_out else None
    mean = sum(words) / len(words) if words else None
    return Samples(_shares(data, train), train, kept, mean, side, tuple(lacking))


def _is_toy(source: Source) -> bool:
    return isinstance(source, ToyShards)


def _assign(
    data: VideoDataModule, sources: Iterable[Source], lacking: list[str], words: list[int]
) -> Assignment | None:
    sizes: list[tuple[str, list[Bucket]]] = []
    for source in sources:
        if isinstance(source, ToyShards) and not source._ready():
            sizes.append((source_name(source), _toy(source)))
            continue
        try:
            entries = source.index().entries
        except (UserError, OSError) as error:
            lacking.append(str(error))
            continue
        words.extend(entry.caption_words for entry in entries)
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

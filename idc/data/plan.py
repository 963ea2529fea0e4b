"""The plan: (seed, epoch) -> the list of global batches, a pure function that knows neither ranks nor workers.

Every (source, bucket) group is walked by cyclic permutations: no sample of a group comes again before all of the
group came once, also across the ends of virtual epochs. An epoch takes from each bucket a whole number of batches;
what does not fill a batch is carried: it comes first in the bucket's next epoch. Cumulative shares stay within about
one batch of the exact ones, and every epoch has the same length.

Random orders are argsorts of raw 64-bit draws, because numpy keeps raw streams, but not `permutation`, stable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from idc.errors import UserError
from idc.types import Bucket

_PASS, _SHUFFLE, _ORDER = 1, 2, 3  # first word of a random stream: what it is for


def seed_for(seed: int, epoch: int, sample_id: str, repeat: int = 0) -> int:
    """The seed in [0, 2^63) of a sample in an epoch: BLAKE2b of (seed, epoch, sample id).

    `repeat` counts the sample's earlier appearances in the same epoch (virtual epochs may be longer than a source).
    """
    text = f"{seed}/{epoch}/{sample_id}" + (f"\0{repeat}" if repeat else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def draw(seed: int, purpose: str, n: int) -> int:
    """An integer in [0, n) that depends on the sample's seed and the purpose alone (bias below n / 2^63)."""
    return seed_for(seed, 0, purpose) % n if n > 1 else 0


def stable_hash(value: Any) -> str:
    """16 hex digits of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class MixSource:
    """One source as the plan sees it.

    Attributes:
        buckets: for each entry the index of its bucket, or -1 for a dropped entry.
        weight: the source's share of the drawn samples, relative to the other weights; None for all sources means
            in proportion to their kept entries (each sample once an epoch).
    """

    name: str
    buckets: np.ndarray
    weight: float | None = None


class GlobalBatch(NamedTuple):
    """One step of all ranks: `refs` (int64) count entries through all sources in order; all are of one bucket.

    `repeats` are earlier appearances in the same epoch. The last `padding` refs repeat others (held-out data only).
    """

    bucket: int
    refs: np.ndarray
    repeats: np.ndarray
    padding: int = 0

    def part(self, rank: int, world: int) -> GlobalBatch:
        """The contiguous slice of one rank; the size must be a multiple of `world`."""
        size = len(self.refs) // world
        here = slice(rank * size, (rank + 1) * size)
        after = len(self.refs) - (rank + 1) * size
        padding = min(size, max(0, self.padding - after))
        return GlobalBatch(self.bucket, self.refs[here], self.repeats[here], padding)


class EpochPlan(Sequence[GlobalBatch]):
    """The global batches of one epoch, as two arrays [batches, size]."""

    def __init__(self, bucket_of: np.ndarray, refs: np.ndarray, repeats: np.ndarray) -> None:
        self._bucket_of, self._refs, self._repeats = bucket_of, refs, repeats

    def __len__(self) -> int:
        return len(self._bucket_of)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return EpochPlan(self._bucket_of[index], self._refs[index], self._repeats[index])
        return GlobalBatch(int(self._bucket_of[index]), self._refs[index], self._repeats[index])

    def __iter__(self) -> Iterator[GlobalBatch]:
        return (self[i] for i in range(len(self)))


class Plan:
    """`batches(epoch)` for training: shuffled, weighted, endless.

    Args:
        sources: the mix; offsets of `refs` follow this order.
        buckets: what the sources' bucket indices refer to.
        global_batch: samples a step over all ranks.
        epoch_size: samples of a virtual epoch, rounded down to whole batches; None is the number of kept entries.
        group_size: every drawn sample fills that many consecutive places of its batch, each with a seed of its own (as
            a repeat); `global_batch` and `epoch_size` still count places and entries. For group-relative rewards.

    Raises:
        UserError: nothing to draw, bad weights, a batch of no whole groups, or an epoch shorter than one batch.
    """

    def __init__(
        self,
        sources: Sequence[MixSource],
        buckets: Sequence[Bucket],
        global_batch: int,
        seed: int,
        epoch_size: int | None = None,
        group_size: int = 1,
    ) -> None:
        self.buckets, self.global_batch, self.seed = tuple(buckets), global_batch, seed
        self.group_size, self._draws = group_size, groups_of(global_batch, group_size)
        kept = np.array([int(np.count_nonzero(source.buckets >= 0)) for source in sources])
        size = int(kept.sum()) if epoch_size is None else epoch_size
        if size < self._draws:
            raise UserError(
                f"an epoch of {size} samples does not fill one global batch of {self._draws}: lower batch_size to "
                f"{max(size, 1) * group_size}, add data, or set epoch_size={self._draws} to let samples come again"
            )
        weights = _weights(sources, kept)
        self._groups, group_share = _groups(sources, len(buckets), weights, kept)  # [S][B] refs, [S, B]
        self._bucket_share = group_share.sum(0)
        self._within_bucket = group_share / np.where(self._bucket_share > 0, self._bucket_share, 1)
        self.pools = [np.concatenate([group[b] for group in self._groups]) for b in range(len(buckets))]
        self._batches = size // self._draws
        self.shares = {source.name: float(weight) for source, weight in zip(sources, weights, strict=True)}
        self.mix = {
            "sources": {name: round(share, 12) for name, share in self.shares.items()},
            "buckets": [list(bucket) for bucket in self.buckets],
            "batch_size": global_batch,
            "epoch_size": self._batches * self._draws,
            **({"group_size": group_size} if group_size > 1 else {}),
        }
        self.mix_hash = stable_hash(self.mix)
        self._rewind()

    def __len__(self) -> int:
        """Global batches of every epoch."""
        return self._batches

    def batches(self, epoch: int) -> EpochPlan:
        """The global batches of an epoch (from 0). About half a second for a million samples."""
        batches_B, draws_SB, start_SB = self._allocation(epoch)
        parts = []
        for bucket, count in enumerate(batches_B):
            if count:
                members = [
                    self._walk(source, bucket, start_SB[source, bucket], draws_SB[source, bucket])
                    for source in np.flatnonzero(draws_SB[:, bucket]).tolist()
                ]
                refs = np.concatenate(members)
                parts.append(refs[self._order(len(refs), _SHUFFLE, epoch, bucket)].reshape(count, self._draws))
        order = self._order(self._batches, _ORDER, epoch)
        refs = np.concatenate(parts)[order].repeat(self.group_size, axis=1)
        bucket_of = np.repeat(np.arange(len(batches_B)), batches_B)[order]
        return EpochPlan(bucket_of, refs, _appearances(refs.ravel()).reshape(refs.shape))

    def seeds_epoch(self, epoch: int) -> int:
        """The epoch that enters the samples' seeds."""
        return epoch

    def _order(self, n: int, *stream: int) -> np.ndarray:
        raw = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, *map(int, stream)])).random_raw(n)
        return np.argsort(raw, kind="stable")

    def _walk(self, source: int, bucket: int, start: int, count: int) -> np.ndarray:
        """`count` refs of a group from position `start` of its endless chain of permutations."""
        group = self._groups[source][bucket]
        first, last = start // len(group), (start + count - 1) // len(group)
        chain = np.concatenate(
            [group[self._order(len(group), _PASS, source, bucket, turn)] for turn in range(first, last + 1)]
        )
        offset = start - first * len(group)
        return chain[offset : offset + count]

    def _rewind(self) -> None:
        self._epoch = 0
        self._batches_done_B = np.zeros(len(self.buckets), np.int64)
        self._draws_done_SB = np.zeros((len(self._groups), len(self.buckets)), np.int64)

    def _allocation(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Batches a bucket, draws a group, and draws a group before the epoch.

        Each epoch settles what earlier roundings owe, so it depends on all epochs before: cheap, as only counts do.
        """
        if epoch < self._epoch:
            self._rewind()
        while True:
            due = self._bucket_share * self._batches * (self._epoch + 1) - self._batches_done_B
            batches_B = _apportion(self._batches, due)
            draws_SB = np.zeros_like(self._draws_done_SB)
            for bucket in np.flatnonzero(batches_B):
                total = int(batches_B[bucket]) * self._draws
                done = self._draws_done_SB[:, bucket]
                due = self._within_bucket[:, bucket] * (done.sum() + total) - done
                draws_SB[:, bucket] = _apportion(total, due)
            if self._epoch == epoch:
                return batches_B, draws_SB, self._draws_done_SB
            self._batches_done_B = self._batches_done_B + batches_B
            self._draws_done_SB = self._draws_done_SB + draws_SB
            self._epoch += 1


class HeldOutPlan:
    """Every kept entry once, in the index's order, by bucket; the same batches and seeds at every epoch.

    Args:
        world: ranks; the last batch of a bucket is padded with repeats to a multiple of it, so that every rank runs
            the same number of batches of the same size.
    """

    def __init__(
        self, sources: Sequence[MixSource], buckets: Sequence[Bucket], global_batch: int, seed: int, world: int = 1
    ) -> None:
        self.buckets, self.global_batch, self.seed = tuple(buckets), global_batch, seed
        bucket_of = np.concatenate([source.buckets for source in sources]) if sources else np.zeros(0, np.int64)
        self.pools = [np.flatnonzero(bucket_of == bucket) for bucket in range(len(buckets))]
        self._list = []
        for bucket, pool in enumerate(self.pools):
            for start in range(0, len(pool), global_batch):
                refs = pool[start : start + global_batch]
                padding = -len(refs) % world
                padded = np.concatenate([refs, np.resize(refs, padding)])
                self._list.append(GlobalBatch(bucket, padded, np.zeros(len(padded), np.int64), padding))
        self.mix = {"held_out": [list(bucket) for bucket in self.buckets], "batch_size": global_batch}
        self.mix_hash = stable_hash(self.mix)

    def __len__(self) -> int:
        return len(self._list)

    def batches(self, epoch: int) -> Sequence[GlobalBatch]:
        """The same list for every epoch."""
        return self._list

    def seeds_epoch(self, epoch: int) -> int:
        """0: noise and times of held-out samples never change."""
        return 0


def groups_of(batch: int, group: int) -> int:
    """How many samples are drawn for a batch."""
    if batch < 1:
        raise UserError(f"batch_size={batch}: must be 1 or more")
    if group < 1:
        raise UserError(f"group_size={group}: must be 1 or more")
    if batch % group:
        near = max(1, round(batch / group)) * group
        raise UserError(f"batch_size={batch}: must be a multiple of group_size={group}; the nearest is {near}")
    return batch // group


def _weights(sources: Sequence[MixSource], kept: np.ndarray) -> np.ndarray:
    """Shares that sum to 1."""
    given = [source.weight for source in sources]
    empty = [source.name for source, count in zip(sources, kept, strict=True) if not count]
    if not sources or empty:
        raise UserError(f"no usable samples in {', '.join(empty) or 'an empty list of sources'}: see the bucket table")
    if all(weight is None for weight in given):
        return kept / kept.sum()
    bad = [source.name for source in sources if source.weight is None or not 0 < source.weight < float("inf")]
    if bad:
        raise UserError(f"weights {given}: give every source a positive weight or none of them; mend {', '.join(bad)}")
    weights = np.array(given, dtype=np.float64)
    return weights / weights.sum()


def _groups(
    sources: Sequence[MixSource], buckets: int, weights: np.ndarray, kept: np.ndarray
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """The refs of every (source, bucket) and its share of all draws."""
    groups: list[list[np.ndarray]] = []
    share_SB = np.zeros((len(sources), buckets))
    offset = 0
    for s, source in enumerate(sources):
        groups.append([np.flatnonzero(source.buckets == b) + offset for b in range(buckets)])
        share_SB[s] = [weights[s] * len(group) / kept[s] for group in groups[-1]]
        offset += len(source.buckets)
    return groups, share_SB


def _apportion(total: int, due: np.ndarray) -> np.ndarray:
    """Non-negative integers that sum to `total` and are nearest to `due` (largest remainders; ties to the first)."""
    counts = np.maximum(np.floor(due + 1e-9), 0).astype(np.int64)
    while (rest := total - int(counts.sum())) != 0:
        if rest > 0:
            counts[np.argmax(due - counts)] += 1
        else:
            counts[np.argmin(np.where(counts > 0, due - counts, np.inf))] -= 1
    return counts


def _appearances(refs: np.ndarray) -> np.ndarray:
    """For each position, how often its value came before."""
    order = np.argsort(refs, kind="stable")
    position = np.arange(len(refs))
    starts = np.ones(len(refs), bool)
    starts[1:] = refs[order][1:] != refs[order][:-1]
    counts = np.empty_like(position)
    counts[order] = position - np.maximum.accumulate(np.where(starts, position, 0))
    return counts

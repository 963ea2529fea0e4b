"""The plan: order, shares, carrying, weights, size."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from idc.data.buckets import BucketRule, assign
from idc.data.plan import HeldOutPlan, MixSource, Plan, draw, seed_for
from idc.errors import UserError
from idc.types import Bucket

A, B = Bucket(5, 32, 32, 1), Bucket(9, 32, 32, 2)


def source(name: str, *counts: int, weight: float | None = None) -> MixSource:
    """`counts[b]` entries of bucket b, mixed up."""
    buckets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return MixSource(name, np.random.default_rng(0).permutation(buckets), weight)


def drawn(plan: Plan, epochs: range) -> list[int]:
    return [ref for epoch in epochs for batch in plan.batches(epoch) for ref in batch.refs.tolist()]


def as_lists(plan: Plan, epoch: int) -> list[tuple]:
    return [(b.bucket, b.refs.tolist(), b.repeats.tolist()) for b in plan.batches(epoch)]


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    def make(seed: int = 3) -> Plan:
        return Plan([source("a", 37, 11), source("b", 20, 5)], [A, B], 4, seed)

    straight, late = make(), make()
    first, later = as_lists(straight, 0), as_lists(straight, 5)
    assert as_lists(late, 5) == later  # jumping to an epoch, then back, changes nothing
    assert as_lists(late, 0) == first
    assert as_lists(late, 5) == later
    assert first != later
    assert as_lists(make(seed=4), 0) != first


def test_batches_have_one_bucket_and_epochs_one_length():
    mix = [source("a", 37, 11), source("b", 20, 5)]
    plan = Plan(mix, [A, B], 4, 0)
    bucket_of = np.concatenate([s.buckets for s in mix])
    for epoch in range(12):
        batches = plan.batches(epoch)
        assert len(batches) == len(plan) == (37 + 11 + 20 + 5) // 4
        for batch in batches:
            assert set(bucket_of[batch.refs]) == {batch.bucket}
            assert len(batch.refs) == 4


def test_leftovers_are_carried_to_the_next_epoch_and_none_is_lost():
    """One bucket, 10 samples, batches of 4: over 5 epochs of 2 batches each sample comes exactly 4 times."""
    plan = Plan([source("a", 10)], [A], 4, 1)
    assert Counter(drawn(plan, range(5))) == dict.fromkeys(range(10), 4)
    left_out = [set(range(10)) - set(drawn(plan, range(e, e + 1))) for e in range(2)]
    assert left_out[0] != left_out[1]
    assert left_out[0] <= set(drawn(plan, range(1, 2)))


@pytest.mark.parametrize("epoch_size", [8, 40, 130])
def test_no_sample_comes_again_before_all_came_once(epoch_size: int):
    """Also where the virtual epoch is smaller or larger than the source: any prefix has counts within one."""
    plan = Plan([source("a", 25)], [A], 4, 2, epoch_size=epoch_size)
    counts = np.zeros(25, int)
    for epoch in range(6):
        np.add.at(counts, drawn(plan, range(epoch, epoch + 1)), 1)
        assert counts.max() - counts.min() <= 1


def test_weights_are_shares_of_the_draws():
    plan = Plan([source("a", 30, 10, weight=1), source("b", 300, weight=3)], [A, B], 8, 0, epoch_size=400)
    refs = np.array(drawn(plan, range(10)))
    assert abs((refs < 40).mean() - 0.25) < 0.005
    within = refs[refs < 40]
    counts = np.bincount(within, minlength=40)
    assert counts.max() - counts.min() <= 3  # both buckets of the source go round at the same rate


def test_without_weights_each_sample_comes_once_an_epoch():
    plan = Plan([source("a", 24, 8), source("b", 160, 32)], [A, B], 8, 0)
    assert Counter(drawn(plan, range(1))) == dict.fromkeys(range(224), 1)
    assert all(not batch.repeats.any() for batch in plan.batches(0))


def test_repeats_count_earlier_appearances_in_the_epoch():
    plan = Plan([source("a", 3)], [A], 4, 0, epoch_size=16)
    seen: Counter[int] = Counter()
    for batch in plan.batches(0):
        for ref, repeat in zip(batch.refs.tolist(), batch.repeats.tolist(), strict=True):
            assert repeat == seen[ref]
            seen[ref] += 1
    assert max(seen.values()) == 6


def test_a_million_entries_in_a_few_arrays():
    plan = Plan([source("a", 600_000, 400_000)], [A, B], 64, 0)
    epoch = plan.batches(3)
    assert len(epoch) == 15_625
    refs = np.concatenate([batch.refs for batch in epoch])
    assert len(np.unique(refs)) == 1_000_000
    assert refs.dtype == np.int64


def test_parts_of_ranks_join_to_the_global_batch():
    batch = Plan([source("a", 24)], [A], 12, 0).batches(0)[1]
    for world in (1, 2, 3, 4, 6):
        parts = [batch.part(rank, world).refs for rank in range(world)]
        assert np.concatenate(parts).tolist() == batch.refs.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_samples_come_once_with_padding_for_equal_ranks(world: int):
    plan = HeldOutPlan([source("a", 7, 4)], [A, B], 4, 0, world)
    kept = []
    for batch in plan.batches(0):
        parts = [batch.part(rank, world) for rank in range(world)]
        assert len({len(part.refs) for part in parts}) == 1
        kept += [ref for part in parts for ref in part.refs[: len(part.refs) - part.padding].tolist()]
    assert sorted(kept) == list(range(11))


def test_mix_hash_tells_weights_buckets_and_batch_size_apart():
    def mix(weight: float = 2, batch: int = 4, size: int | None = None) -> str:
        sources = [source("a", 8, weight=1), source("b", 8, weight=weight)]
        return Plan(sources, [A], batch, 0, size).mix_hash

    assert len({mix(), mix(weight=3), mix(batch=2), mix(size=32)}) == 4
    assert mix() == mix()


def test_seeds_depend_on_each_part_and_stay_in_range():
    seeds = {seed_for(*key) for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", 1)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, 0, "x/1") != seed_for(0, 0, "x", 1)
    digest = hashlib.blake2b(b"7/2/toy/1", digest_size=8).digest()  # frozen: checkpoints rely on it
    assert seed_for(7, 2, "toy/1") == int.from_bytes(digest, "little") // 2
    assert np.bincount([draw(seed, "window", 4) for seed in range(2000)], minlength=4).min() > 430


@pytest.mark.parametrize(
    ("sources", "batch", "message"),
    [
        ([source("a", 3)], 4, "lower batch_size to 3"),
        ([source("a", 8), MixSource("none", np.full(3, -1))], 4, "no usable samples in none"),
        ([source("a", 8, weight=1), source("b", 8)], 4, "every source a positive weight or none"),
        ([source("a", 8, weight=-1)], 4, "positive weight"),
        ([source("a", 8)], 0, "batch_size=0"),
    ],
)
def test_plans_that_cannot_be_are_refused(sources: list[MixSource], batch: int, message: str):
    with pytest.raises(UserError, match=message):
        Plan(sources, [A], batch, 0)


RULE = BucketRule([(5, 64, 64), (17, 64, 64), (17, 64, 128), (17, 128, 256)], max_subjects=2)


@pytest.mark.parametrize(
    ("entry", "bucket"),
    [
        ((17, 64, 64, 1), (17, 64, 64, 1)),
        ((16, 64, 64, 3), (5, 64, 64, 2)),  # 16 frames fill 5 only; the third reference is left out
        ((40, 480, 960, 0), (17, 128, 256, 0)),  # the nearest aspect ratio's largest
        ((17, 60, 64, 1), (17, 64, 64, 1)),  # enlarged by 1.07
        ((40, 480, 480, 1), (17, 64, 64, 1)),  # aspect ratio before size
    ],
)
def test_entries_take_the_largest_bucket_of_the_nearest_aspect_ratio(entry: tuple, bucket: tuple):
    assert RULE.choose(Bucket(*entry)) == Bucket(*bucket)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [((4, 64, 64, 1), "4 frames"), ((17, 48, 64, 1), "48x64.*max_upscale"), ((17, 600, 64, 1), "600x64.*max_crop")],
)
def test_entries_that_fit_none_are_dropped_with_the_reason(entry: tuple, reason: str):
    kept = Bucket(17, 64, 64, 1)
    result = assign([("clips", [Bucket(*entry), kept, kept])], RULE)
    assert result.indices[0].tolist() == [-1, 0, 0]
    assert result.kept["clips"] == {kept: 2}
    (why,) = result.dropped["clips"]
    assert re.search(reason, why)
    assert why in result.text()
    assert result.table(global_batch=4).row_count == 2
    assert "repeat" in result.text(global_batch=4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(16, 64, 64)], "13 and 17"),
        ([(17, 60, 64)], "48 and 64"),
        ([(17, 64)], r"must be \[frames, height, width\]"),
        ([], "at least one"),
    ],
)
def test_bucket_shapes_that_break_the_rule_are_refused(shapes: list, message: str):
    with pytest.raises(UserError, match=message):
        BucketRule(shapes)

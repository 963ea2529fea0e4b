"""Batches of whole groups: every sample `group_size` times in a row, whatever the ranks, resumes and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_loader import BUCKETS, write_shards

from idc.data.loader import PlanLoader
from idc.data.plan import MixSource, Plan
from idc.data.quarantine import Quarantine
from idc.data.reader import ReadSettings
from idc.data.sources import Catalogue
from idc.errors import UserError


def plan_of(count: int, batch: int, group: int, seed: int = 3) -> Plan:
    buckets = np.array([0 if i % 3 else 1 for i in range(count)])
    return Plan([MixSource("toy", buckets)], BUCKETS, batch, seed, group_size=group)


def test_a_batch_is_whole_groups_and_an_epoch_draws_every_sample_once() -> None:
    plan = plan_of(60, batch=8, group=4)
    assert len(plan) == 30  # two samples a batch
    seen = []
    for batch in plan.batches(0):
        groups, repeats = batch.refs.reshape(2, 4), batch.repeats.reshape(2, 4)
        assert (groups == groups[:, :1]).all()
        assert repeats.tolist() == [[0, 1, 2, 3]] * 2
        seen.extend(groups[:, 0].tolist())
    assert sorted(seen) == list(range(60))


def test_the_samples_drawn_are_those_of_a_plan_without_groups() -> None:
    grouped, single = plan_of(60, batch=8, group=4), plan_of(60, batch=2, group=1)
    for epoch in (0, 1):
        for a, b in zip(grouped.batches(epoch), single.batches(epoch), strict=True):
            assert a.refs[::4].tolist() == b.refs.tolist()
    assert single.mix_hash == plan_of(60, batch=2, group=1).mix_hash != grouped.mix_hash


@pytest.mark.parametrize(("batch", "group", "says"), [(10, 4, "nearest is 8"), (2, 4, "nearest is 4"), (4, 0, "1 or")])
def test_a_batch_of_broken_groups_is_refused(batch: int, group: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan_of(60, batch, group)


def test_every_member_has_its_own_seed_and_ranks_share_the_groups(tmp_path: Path) -> None:
    index = write_shards(tmp_path, 12)
    buckets = np.array([BUCKETS.index(entry.bucket) for entry in index.entries])

    def batches(world: int) -> list[tuple[list[str], list[int]]]:
        plan = Plan([MixSource("toy", buckets)], BUCKETS, 8, 0, group_size=4)
        settings = ReadSettings(decode_video=False)
        ranks = [iter(PlanLoader(plan, Catalogue([index]), settings, rank=r, world=world)) for r in range(world)]
        joined = []
        for parts in zip(*ranks, strict=True):
            assert all(sample.video_CTHW is None for part in parts for sample in part.samples)
            joined.append(([i for p in parts for i in p.ids], [s for p in parts for s in p.seeds_B.tolist()]))
        return joined

    alone = batches(1)
    assert all(len(set(seeds)) == 8 for _, seeds in alone)
    assert batches(2) == alone == batches(4)


def test_a_damaged_sample_is_replaced_by_one_and_the_same_for_its_whole_group(tmp_path: Path) -> None:
    index = write_shards(tmp_path, 12)
    buckets = np.array([BUCKETS.index(entry.bucket) for entry in index.entries])
    plan = Plan([MixSource("toy", buckets)], BUCKETS, 4, 0, group_size=4)
    damaged = {entry.id: "truncated" for entry in index.entries[:2]}
    quarantine = Quarantine()
    quarantine.know(damaged)
    batches = list(PlanLoader(plan, Catalogue([index]), max_corrupt_rate=0.9, quarantine=quarantine))
    assert len(batches) == 12
    for batch in batches:
        assert len(set(batch.ids)) == 1
        assert not set(damaged) & set(batch.ids)
        assert len(set(batch.seeds_B.tolist())) == 4

"""The loader: resume, ranks, workers, windows, corrupt samples."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shards import corrupt
from PIL import Image

from idc.data.index import ShardIndex, build_index
from idc.data.loader import PlanLoader
from idc.data.plan import HeldOutPlan, MixSource, Plan, seed_for
from idc.data.quarantine import CorruptRate, Quarantine, Record, TooManyCorruptError
from idc.data.reader import ReadSettings
from idc.data.shards import ShardWriter
from idc.data.sources import Catalogue
from idc.data.video import encode_video
from idc.errors import UserError
from idc.types import Batch, Bucket

BUCKETS = (Bucket(5, 32, 32, 1), Bucket(5, 32, 32, 2))


def png(level: int, side: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(stream, "png")
    return stream.getvalue()


def clip(level: int, frames: int = 5, size: tuple[int, int] = (32, 32)) -> bytes:
    """Frame t is grey of level + 8 t."""
    ramp = np.minimum(level + 8 * np.arange(frames), 255).astype(np.uint8)
    return encode_video(np.broadcast_to(ramp[:, None, None, None], (frames, *size, 3)).copy(), 8, 0, preset="ultrafast")


def write_shards(root: Path, count: int, per_shard: int = 50, **clip_settings: Any) -> ShardIndex:
    """Every third sample has two references, the others one."""
    frames, (height, width) = clip_settings.get("frames", 5), clip_settings.get("size", (32, 32))
    with ShardWriter(root, samples_per_shard=per_shard) as writer:
        for i in range(count):
            references = [("thing", png(40 * k), "png") for k in range(1 + (i % 3 == 0))]
            video = clip(i % 200, **clip_settings)
            writer.write(f"{i:04d}", video, f"clip {i}", references, fps=8, frames=frames, height=height, width=width)
    index = build_index(root, "toy")
    index.save()
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), 60)


def buckets_of(index: ShardIndex) -> np.ndarray:
    return np.array([entry.bucket.subjects - 1 for entry in index.entries])


def loader_of(
    index: ShardIndex, batch: int = 8, seed: int = 0, epoch_size: int | None = None, **kwargs: Any
) -> PlanLoader:
    plan = Plan([MixSource("toy", buckets_of(index))], BUCKETS, batch, seed, epoch_size)
    return PlanLoader(plan, Catalogue([index]), kwargs.pop("settings", None), **kwargs)


def steps(batches: Iterator[Batch] | PlanLoader) -> list[tuple]:
    return [(b.epoch, b.index, b.bucket, b.ids, b.seeds_B.tolist()) for b in batches]


def test_a_batch_holds_what_was_written(index: ShardIndex):
    batch = next(iter(loader_of(index)))
    number = int(batch.captions[0].split()[1])
    assert batch.ids[0] == f"toy/shard-{number // 50:06d}/{number:04d}"
    assert batch.video_BCTHW.shape == (8, 3, 5, 32, 32)
    assert batch.video_BCTHW.dtype == torch.float32
    expected = (number + 8 * torch.arange(5)) / 127.5 - 1
    assert (batch.video_BCTHW[0].mean((0, 2, 3)) - expected).abs().max() < 0.02
    assert len(batch.samples[0].subjects) == batch.bucket.subjects == 1 + (number % 3 == 0)
    assert batch.samples[0].subjects[0].image_CHW.shape == (3, 16, 16)
    assert batch.seeds_B.tolist() == [seed_for(0, 0, sample_id) for sample_id in batch.ids]


@pytest.mark.parametrize("stop", [0, 1, 4, 7, 10])
def test_resume_is_exact_at_any_step_and_across_the_epoch(index: ShardIndex, stop: int):
    """7 batches an epoch; a state after `stop` batches gives what the undisturbed run gives from there."""
    straight = loader_of(index)
    expected = steps(straight) + steps(straight)
    assert len(expected) == 14
    first = loader_of(index)
    done = 0
    while done < stop:
        for _ in first:
            done += 1
            if done == stop:
                break
    state = json.loads(json.dumps(first.state_dict()))
    second = loader_of(index)
    second.load_state_dict(state)
    rest = steps(second)
    while len(rest) < 14 - stop:
        rest += steps(second)
    assert rest == expected[stop:]


def test_resume_reads_nothing_of_what_was_skipped(index: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    from idc.data import reader

    loader = loader_of(index)
    loader.load_state_dict({**loader.state_dict(), "global_batch": 5})
    read: list[str] = []
    original = reader.read_members
    monkeypatch.setattr(
        reader, "read_members", lambda root, entry, verify: read.append(entry.id) or original(root, entry, verify)
    )
    batches = list(loader)
    assert read == [sample_id for batch in batches for sample_id in batch.ids]
    assert len(batches) == 2


def test_workers_change_nothing_and_read_ahead_does_not_count(index: ShardIndex):
    expected = loader_of(index)
    with_workers = loader_of(index, num_workers=2, prefetch=3)
    ours, theirs = iter(expected), iter(with_workers)
    for _ in range(3):
        a, b = next(ours), next(theirs)
        assert steps(iter([a])) == steps(iter([b]))
        torch.testing.assert_close(a.video_BCTHW, b.video_BCTHW, rtol=0, atol=0)
        assert torch.equal(a.samples[0].subjects[0].image_CHW, b.samples[0].subjects[0].image_CHW)
    assert with_workers.state_dict() == expected.state_dict()
    assert with_workers.state_dict()["global_batch"] == 3
    rest = steps(theirs)
    assert rest == steps(ours)
    assert steps(with_workers) == steps(expected)  # the next epoch, with the same workers


def test_iterating_leaves_the_global_random_state_alone(index: ShardIndex):
    before = torch.random.get_rng_state()
    list(loader_of(index))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_ranks_then_one_then_two_give_the_same_global_batches(index: ShardIndex):
    expected = steps(loader_of(index))
    got = []
    state = None
    for world, count in ((2, 2), (1, 3), (2, 2)):
        loaders = [loader_of(index, rank=rank, world=world) for rank in range(world)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        iterators = [iter(loader) for loader in loaders]
        for _ in range(count):
            parts = [next(iterator) for iterator in iterators]
            ids = tuple(sample_id for part in parts for sample_id in part.ids)
            seeds = [seed for part in parts for seed in part.seeds_B.tolist()]
            got.append((parts[0].epoch, parts[0].index, parts[0].bucket, ids, seeds))
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert got == expected


def test_a_limited_epoch_resumes_at_its_own_end(index: ShardIndex):
    loader = loader_of(index, limit=3)
    assert [step[:2] for step in steps(loader)] == [(0, 0), (0, 1), (0, 2)]
    resumed = loader_of(index, limit=3)
    resumed.load_state_dict(loader.state_dict())
    assert steps(resumed) == steps(loader)
    assert resumed.epoch == 2


def test_overfitting_repeats_epoch_0(index: ShardIndex):
    loader = loader_of(index, limit=2, overfit=True)
    assert [step[3:] for step in steps(loader)] == [step[3:] for step in steps(loader)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed is 1, was 0"),
        ({"batch": 4}, "batch_size is 4, was 8"),
        ({"epoch_size": 16}, "epoch_size is 16"),
    ],
)
def test_a_state_of_another_plan_is_refused_unless_allowed(index: ShardIndex, changed: dict, message: str):
    state = loader_of(index).state_dict() | {"epoch": 2, "global_batch": 1}
    with pytest.raises(UserError, match=message) as error:
        loader_of(index, **changed).load_state_dict(state)
    assert "allow_mix_change" in str(error.value)
    loader = loader_of(index, **changed, allow_mix_change=True)
    loader.load_state_dict(state)
    first = next(iter(loader))
    assert (first.epoch, first.index) == (2, 1)


def test_a_state_of_other_shards_is_refused(index: ShardIndex, tmp_path: Path):
    other = write_shards(tmp_path, 58)
    with pytest.raises(UserError, match="index_hash"):
        loader_of(other).load_state_dict(loader_of(index, epoch_size=56).state_dict())


def test_a_batch_that_ranks_cannot_share_names_the_nearest_sizes(index: ShardIndex):
    with pytest.raises(UserError, match=r"batch_size=8.*3 ranks.*6 and 9"):
        loader_of(index, world=3)


def test_windows_are_drawn_from_the_seed_and_cover_the_clip(tmp_path: Path):
    index = write_shards(tmp_path, 24, frames=8, size=(32, 48))
    starts = []
    for loader in (loader_of(index), loader_of(index)):
        found = {}
        for batch in loader:
            assert batch.video_BCTHW.shape[1:] == (3, 5, 32, 32)
            for sample in batch.samples:
                level = (sample.video_CTHW[:, 0].mean().item() + 1) * 127.5
                found[sample.id] = round((level - int(sample.caption.split()[1])) / 8)
        starts.append(found)
    assert starts[0] == starts[1]
    assert set(starts[0].values()) == {0, 1, 2, 3}
    fixed = ReadSettings(random_window=False)
    for sample in next(iter(loader_of(index, settings=fixed))).samples:
        level = (sample.video_CTHW[:, 0].mean().item() + 1) * 127.5
        assert abs(level - int(sample.caption.split()[1])) < 3


def held_out(index: ShardIndex, world: int = 1, rank: int = 0, **kwargs: Any) -> PlanLoader:
    plan = HeldOutPlan([MixSource("toy", buckets_of(index))], BUCKETS, 8, 0, world)
    return PlanLoader(plan, Catalogue([index]), ReadSettings(random_window=False), rank=rank, world=world, **kwargs)


def test_held_out_data_is_the_same_at_every_epoch_and_complete_over_ranks(index: ShardIndex):
    alone = held_out(index)
    first = steps(alone)
    assert steps(alone) == first
    assert sorted(sample_id for step in first for sample_id in step[3]) == sorted(e.id for e in index.entries)
    seen = []
    loaders = [held_out(index, 3, rank) for rank in range(3)]
    for parts in zip(*loaders, strict=True):
        assert len({len(part) for part in parts}) == 1
        seen += [sample_id for part in parts for sample_id in part.ids[: len(part) - part.padding]]
    assert sorted(seen) == sorted(e.id for e in index.entries)


# Corrupt samples ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, dict[str, str]]:
    root = tmp_path_factory.mktemp("damaged")
    index = write_shards(root, 400, per_shard=396)
    return index, corrupt(root)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_percent_of_four_kinds_is_quarantined_and_replaced(damaged: tuple, num_workers: int, tmp_path: Path):
    index, kinds = damaged
    path = tmp_path / "quarantine.jsonl"
    loader = loader_of(index, batch=2, num_workers=num_workers, quarantine=Quarantine(path))
    batches = list(loader)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["id"] for record in records) == sorted(kinds)
    for record in records:
        assert kinds[record["id"]] in record["reason"]
        assert record["id"].endswith(record["key"])
    used = {sample_id for batch in batches for sample_id in batch.ids}
    assert len(batches) == 200
    assert not used & set(kinds)
    for batch in batches:
        for failure in batch.failures:
            assert failure.id in kinds
            assert failure.replacement in batch.ids
        assert all(len(sample.subjects) == batch.bucket.subjects for sample in batch.samples)

    # Known-bad samples are passed over and the order stays, from a state in the middle with the file gone.
    state = loader_of(index, batch=2, quarantine=Quarantine(path)).state_dict() | {"global_batch": 150}
    assert set(state["skip_list"]) == set(kinds)
    again = loader_of(index, batch=2)
    again.load_state_dict(state)
    assert steps(again) == steps(iter(batches[150:]))


def test_known_bad_samples_are_not_read_again(damaged: tuple, monkeypatch: pytest.MonkeyPatch):
    from idc.data import reader

    index, kinds = damaged
    known = Quarantine()
    known.know(kinds)
    loader = loader_of(index, quarantine=known)
    read = set()
    original = reader.read_members
    monkeypatch.setattr(
        reader, "read_members", lambda root, entry, verify: read.add(entry.id) or original(root, entry, verify)
    )
    assert sum(len(batch.failures) for batch in loader) >= 4
    assert not read & set(kinds)


def test_a_corrupt_held_out_sample_becomes_padding(damaged: tuple):
    index, kinds = damaged
    kept, padding = [], 0
    for batch in held_out(index):
        kept += batch.ids[: len(batch) - batch.padding]
        padding += batch.padding
    assert sorted(kept) == sorted(entry.id for entry in index.entries if entry.id not in kinds)
    assert padding == len(kinds)


def test_above_the_rate_the_run_stops_with_counts_and_the_file(tmp_path: Path):
    index = write_shards(tmp_path / "shards", 60)
    (shard, _) = sorted({entry.shard for entry in index.entries})
    path = tmp_path / "shards" / shard
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    loader = loader_of(index, max_corrupt_rate=0.1, quarantine=Quarantine(tmp_path / "bad.jsonl"))
    with pytest.raises(TooManyCorruptError, match=r"(\d+) of \d+ samples.*bad\.jsonl.*truncated") as error:
        list(loader)
    listed = len((tmp_path / "bad.jsonl").read_text().splitlines())
    assert str(listed) == str(error.value).split()[0]


def test_early_failures_in_good_data_do_not_stop_a_run_and_the_rate_holds_at_the_end():
    quarantine = Quarantine()
    rate = CorruptRate(1000, 0.02)
    rate.count(range(150), dict.fromkeys(range(5), "broken"))
    rate.check(quarantine, epoch_ends=False)  # 5 of 150 may be chance
    with pytest.raises(TooManyCorruptError, match="5 of 150"):
        rate.check(quarantine, epoch_ends=True)
    rate.count(range(1000), {7: "broken"})
    rate.check(quarantine, epoch_ends=True)  # 6 of 1000, each counted once
    with pytest.raises(UserError, match=r"max_corrupt_rate=1.5"):
        CorruptRate(10, 1.5)


def test_a_bucket_without_a_readable_sample_is_an_error(tmp_path: Path):
    index = write_shards(tmp_path / "shards", 9)
    for shard in {entry.shard for entry in index.entries}:
        (tmp_path / "shards" / shard).unlink()
    with pytest.raises(UserError, match="no readable sample"):
        next(iter(loader_of(index, batch=2, max_corrupt_rate=1.0)))


def test_quarantine_files_are_shared_deduplicated_and_survive_a_cut_line(tmp_path: Path):
    path = tmp_path / "deep" / "q.jsonl"
    one, two = Quarantine(path), Quarantine(path)
    one.add([Record("a", "s", "a", "broken", 0)])
    with open(path, "a") as stream:
        stream.write('{"id": "cut')
    two.add([Record("a", "s", "a", "broken", 1), Record("b", "s", "b", "truncated", 1)])
    one.add([Record("b", "s", "b", "truncated", 2)])
    assert Quarantine(path).load().reasons == {"a": "broken", "b": "truncated"}
    assert one.reasons == {"a": "broken", "b": "truncated"}
    assert sum('"b"' in line for line in path.read_text().splitlines()) == 1

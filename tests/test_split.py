"""Holding out samples of one folder: by source video, stable, never the same video on both sides."""

from __future__ import annotations

import random

import pytest

from idc.data.index import Entry
from idc.data.sources import ShardSource, split_by_video
from idc.errors import UserError
from idc.types import Bucket


def entries(videos: int, windows: int) -> list[Entry]:
    return [
        Entry("clips", "s-0.tar", f"video{v}-{9 * w:06d}", "mp4:0:1", Bucket(9, 64, 64, 1), 8.0, "0" * 64)
        for v in range(videos)
        for w in range(windows)
    ]


def of_sizes(*sizes: int) -> list[Entry]:
    return [entry for v, size in enumerate(sizes) for entry in entries(len(sizes), size) if video(entry) == f"video{v}"]


def video(entry: Entry) -> str:
    return entry.key.split("-")[0]


@pytest.mark.parametrize(("videos", "share", "expected"), [(2, 0.1, 1), (10, 0.1, 1), (40, 0.25, 10)])
def test_whole_videos_are_held_out(videos: int, share: float, expected: int) -> None:
    everything = entries(videos, 3)
    train, held_out = split_by_video(everything, share)
    assert not {video(e) for e in train} & {video(e) for e in held_out}
    assert len({video(e) for e in held_out}) == expected
    assert sorted(e.id for e in [*train, *held_out]) == sorted(e.id for e in everything)
    assert split_by_video(everything[::-1], share)[1][0].key.split("-")[0] in {video(e) for e in held_out}


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        ((90, 5, 5), 0.1, 10),  # by the count of videos the long one might be drawn
        ((5, 90, 5), 0.1, 10),
        ((5, 5, 90), 0.1, 10),
        ((50, 50, 40), 0.1, 40),  # all are too long: the shortest
        ((3, 1), 0.95, 3),  # never all
        ((1, 1), 0.99, 1),
    ],
)
def test_few_videos_of_different_lengths_come_near_the_share(
    sizes: tuple[int, ...], share: float, expected: int
) -> None:
    train, held_out = split_by_video(of_sizes(*sizes), share)
    assert (len(train), len(held_out)) == (sum(sizes) - expected, expected)


def test_the_share_of_samples_is_met_whatever_the_order_of_entries() -> None:
    draw = random.Random(0)
    for trial in range(50):
        sizes = [draw.randint(1, 30) for _ in range(draw.randint(2, 40))]
        share, everything = draw.uniform(0.02, 0.98), of_sizes(*sizes)
        train, held_out = split_by_video(everything, share)
        assert train, trial
        assert held_out, trial
        assert not {video(e) for e in train} & {video(e) for e in held_out}
        assert abs(len(held_out) - share * len(everything)) <= max(sizes)
        shuffled = draw.sample(everything, len(everything))
        assert {e.id for e in split_by_video(shuffled, share)[1]} == {e.id for e in held_out}


def test_the_last_windows_of_a_single_video_are_held_out() -> None:
    train, held_out = split_by_video(entries(1, 10), 0.2)
    assert [e.key for e in held_out] == ["video0-000072", "video0-000081"]
    assert len(train) == 8


def test_one_sample_cannot_be_shared() -> None:
    assert split_by_video(entries(1, 1), 0.5) == (entries(1, 1), [])


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="held_out="):
        ShardSource("x", held_out=share)

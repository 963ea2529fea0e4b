"""Holding out samples of one folder: by source video, stable, never the same video on both sides."""

from __future__ import annotations

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

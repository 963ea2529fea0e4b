"""Shards of a collection that are curated once more: the notes of the first time are on record, and no rule of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _coloured import COLOURS, GREY, ByColour, Coloured, frame, one
from test_curate_crops import rules

from idc.curate.candidate import Box, Candidate, CuratedSubject, EncodedClip
from idc.curate.checks import DecodeCheck
from idc.curate.crops import FoundAgain
from idc.curate.films import is_taken_in_segments
from idc.curate.filters import TechnicalFilter
from idc.curate.grounding import face_on
from idc.curate.provenance import provenance
from idc.curate.records import settle
from idc.curate.shots import Shots, Transition
from idc.curate.sources import ExistingShards
from idc.curate.sources.shards import NOTES
from idc.curate.windows import Cut, Windows
from idc.data.index import build_index
from idc.data.shards import ShardWriter
from idc.data.video import encode_video

FRAMES, SEEN = 29, 20  # of the clip; the frame that its subject's box is of
STALE: dict[str, Any] = {  # of a film four times as large, of which the clip was cut out
    "decode check": {"frames": 400, "rate": 25.0},
    "shots": {"number": 3, "count": 9, "soft": [False, False], "segment": "2 of 5", "span": [100, 333]},
    "technical filter": {"bars": 0.2},
    "windows": {"unplaced": ["cat"]},
    "cut": {"view": {"source_height": 384, "source_width": 640, "height": 96, "width": 160, "scale": 0.25}},
}


def ball(t: int) -> Box:
    return Box(2.0 * t, 30.0, 2.0 * t + 40, 70.0)


def again(root: Path, **options: Any) -> Candidate:
    """A clip of a ball that moves by 2 pixels a frame, curated from a film, and read again from its shard."""
    pictures = np.stack([frame(("red ball", tuple(map(int, ball(t))))) for t in range(FRAMES)])
    mp4 = encode_video(pictures, 10.0, crf=4, pixel_format="yuv444p")
    was = Candidate(
        "film-120", "films", "film.mp4", "films/film.mp4", (120, 149), Box(10, 10, 650, 394),
        tuple(range(120, 149)), 10.0, encoded=EncodedClip(mp4, FRAMES, 96, 160), caption="A red ball.",
        subjects=(CuratedSubject("red ball", "object", ball(SEEN), frame=SEEN),),
        meta={**STALE, "opens2v": {"id": "k"}},
    )  # fmt: skip
    with ShardWriter(root) as writer:
        writer.write(
            was.key, mp4, was.caption, fps=10, frames=FRAMES, height=96, width=160, meta=provenance(was, [], [])
        )
    build_index(root).save()
    source = ExistingShards(str(root), **options)
    (candidate,) = (outcome for unit in source.units() for outcome in source.open(*unit))
    assert isinstance(candidate, Candidate)
    return settle(candidate)


def finder(**settings: Any) -> FoundAgain:
    return FoundAgain(ByColour(), Coloured(), **{"rules": rules(), "gap": 0.5, "looks": 100, **settings})


def test_what_was_noted_of_another_file_is_on_record_and_holds_no_more(tmp_path: Path) -> None:
    assert set(NOTES) == {step.name for step in (DecodeCheck, Shots, TechnicalFilter, Windows, Cut)} == set(STALE)
    candidate = again(tmp_path)
    assert not set(candidate.meta) & set(STALE)
    assert {name: candidate.meta["shards"][name] for name in STALE} == STALE
    assert candidate.meta["shards"]["span"] == [120, 149]
    assert candidate.meta["opens2v"] == {"id": "k"}  # of what the clip shows
    assert not is_taken_in_segments(candidate)
    followed = replace(candidate.subjects[0], track=((SEEN, ball(SEEN)),))
    assert face_on(candidate, followed, SEEN) == ball(SEEN)


def test_other_moments_of_a_clip_are_looked_for_within_it(tmp_path: Path) -> None:
    candidate = again(tmp_path)
    through = Windows(9, 10.0).apply(candidate), Cut(height=48, width=80).apply(candidate)
    assert through == (candidate, candidate)  # its frames and size were chosen when it was made
    (subject,) = one(finder(in_clip=True)([candidate])).subjects
    (reference,) = subject.references
    rank = reference.meta["rank"]
    assert abs(rank - SEEN) >= 5  # half a second
    assert np.abs(np.array(reference.meta["box"]) - ball(rank)).max() <= 1
    assert one(finder()([candidate])).subjects[0].meta["no_reference"] == "no other moment"  # it is all of its shot


class OneCut:
    """A detector of shots that knows of a cut."""

    heavy, models = False, ("known",)

    def __init__(self, at: int) -> None:
        self.at = at

    def transitions(self, frames: Any) -> Any:
        for _ in frames:
            pass
        yield Transition(self.at, self.at)


@pytest.mark.parametrize("cut", [0, 8])
def test_a_clip_is_cut_anew_by_its_own_frames_and_pixels(tmp_path: Path, cut: int) -> None:
    """Its window and other moments are of the shot of the clip, and its box lies where the new clip shows the ball."""
    candidate = again(tmp_path, keep_clips=False)
    found = Shots(OneCut(cut), min_seconds=0, search_given=cut > 0).apply(candidate)
    shots = [found] if isinstance(found, Candidate) else list(found)
    assert [shot.meta["shots"]["span"] for shot in shots] == ([[0, cut], [cut, FRAMES]] if cut else [[0, FRAMES]])
    windows = [settle(window) for window in Windows(5, 10.0, min_frames=5).apply(settle(shots[-1]))]
    (window,) = (window for window in windows if window.subjects[0].box is not None)
    assert window.ranks[window.subjects[0].frame] == SEEN
    found = settle(one(finder()([window])))
    (reference,) = found.subjects[0].references
    rank = reference.meta["rank"]
    assert cut <= rank < FRAMES
    assert rank <= window.ranks[0] - 5 or rank >= window.ranks[-1] + 5
    clip = Cut(height=48, width=80, max_crop=0.5).apply(found)
    (subject,) = clip.subjects
    assert clip.clip.shape == (5, 48, 80, 3)
    assert tuple(subject.box) == tuple(side / 2 for side in ball(SEEN))
    left, top, right, bottom = map(int, subject.box)
    red = np.abs(clip.clip[subject.frame].astype(int) - COLOURS["red ball"]).max(-1) < 60
    assert red[top + 1 : bottom - 1, left + 1 : right - 1].all()
    assert red.sum() <= subject.box.area * 1.1
    assert np.abs(clip.clip[subject.frame, :10].astype(int) - GREY).max() < 30
    assert "cut" in clip.meta
    assert clip.meta["shards"]["cut"] == STALE["cut"]

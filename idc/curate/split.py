"""Training and held-out data: by source video, never by clip, so that nothing seen in training is judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from idc.curate.candidate import Candidate
from idc.data.sources import hold_out
from idc.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"  # names of the parts, as in `idc.data.sources.ShardSource.part`
PARTS = (TRAIN, HELD_OUT)
SPLIT = "split"  # key in a candidate's `meta`: its part, once that is decided


def check_share(share: float) -> None:
    """Raise unless a held-out share lies in [0, 1)."""
    if not 0 <= share < 1:
        raise UserError(f"held_out={share}: a share of the samples, 0 or more and below 1; 0.1 is usual, 0 is none")


def held_out_videos(candidates: Iterable[Candidate], share: float) -> frozenset[str]:
    """Ids of the videos that are held out, so that their samples are as near to `share` of all as whole videos allow.

    A video that two sources have under one id is one video. Which ones are drawn depends on the ids alone: neither on
    the order of the candidates nor on chance. At least one video is held out and one is not, unless there is but one,
    or `share` is 0: then none is.
    """
    check_share(share)
    sizes = Counter(candidate.video for candidate in candidates)
    return frozenset(hold_out(sizes, share)) if share else frozenset()


def part_of(candidate: Candidate, held_out: frozenset[str]) -> str:
    """The part that a candidate goes to."""
    return HELD_OUT if candidate.video in held_out else TRAIN

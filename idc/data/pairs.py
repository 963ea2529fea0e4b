"""Preference pairs as data: ordinary shards whose samples have a worse clip beside their own.

A pair is one sample: `{key}.mp4` is the winner and `{key}.loser.mp4` the loser, both for the same caption and
references and of the same size, and `meta["pair"]` of its .json says where they come from. So order, resume, buckets,
quarantine and the features cache are those of any sample, and a pair with a broken clip is left out as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from idc.data import storage
from idc.data.index import Entry
from idc.data.shards import LOSER, clip_ext
from idc.errors import UserError, counted

PAIR = "pair"  # key in `Sample.meta`
RECORD = "pairs.json"  # beside finished shards: what chose the pairs, and the networks that it stands on


@dataclass(frozen=True)
class Side:
    """One clip of a pair: where it comes from, and its score, None where nothing was scored."""

    clip: str
    score: float | None = None


@dataclass(frozen=True)
class Pair:
    """What a preference shard says of a pair.

    Attributes:
        winner, loser: its clips.
        by: what prefers the winner: the name of a reward, or of what was done to the loser.
        candidates: how many clips of the condition the two were chosen from.
        details: plain JSON.
    """

    winner: Side
    loser: Side
    by: str
    candidates: int = 2
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def margin(self) -> float | None:
        """How much better the winner is; None where nothing was scored."""
        won, lost = self.winner.score, self.loser.score
        return None if won is None or lost is None else won - lost

    def to_json(self) -> dict[str, Any]:
        """What goes under `meta["pair"]`."""
        return {**asdict(self), "margin": self.margin}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Pair:
        """The way back."""
        known = {name: values[name] for name in ("by", "candidates", "details") if name in values}
        return cls(Side(**values["winner"]), Side(**values["loser"]), **known)


def is_pair(entry: Entry) -> bool:
    """Whether a sample of an index has a loser."""
    return clip_ext([member.ext for member in entry.members], LOSER) is not None


def check_pairs(entries: Iterable[Entry], where: str) -> None:
    """Raise `UserError` where samples have no loser, before hours go into encoding them.

    Args:
        where: the setting that names them, such as "sources".
    """
    lone = [entry.id for entry in entries if not is_pair(entry)]
    if lone:
        raise UserError(
            f"data.init_args.{where}: {counted(len(lone), 'sample')} without a second clip, such as {lone[0]}; "
            "preference shards are made by idc pairs mine, or from real clips by idc pairs corrupt"
        )


def rewards_of_pairs(root: str) -> list[str]:
    """The networks that chose between the clips of the pairs in a folder or at a URL; none where nothing tells."""
    try:
        with storage.open_read(storage.join(root, RECORD)) as stream:
            record = json.loads(stream.read())
        return [str(model) for model in record["models"]]
    except (OSError, ValueError, KeyError, TypeError):  # shards that something else made
        return []

"""From sampled pixels to rewards: a sample as the clip that is judged, and what is logged of a batch's breakdowns."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from idc.errors import counted
from idc.flow.objectives import Advantages, group_advantages
from idc.metrics.base import Clip, Reference
from idc.models.sampling import to_uint8
from idc.rewards.composite import Breakdown, Composite
from idc.types import Sample

DROPS = "reward_drops.jsonl"
_WARNINGS = 20  # different reasons that are warned of; those that quote a clip would fill the screen


def clip_of_sample(sample: Sample, video_CTHW: Tensor, id: str) -> Clip:
    """What a reward judges: a video in [-1, 1] that was sampled for `sample`, under an id of its own."""
    kinds = sample.meta.get("kinds", {})
    return Clip(
        id=id,
        frames_THWC=to_uint8(video_CTHW),
        prompt=sample.caption,
        references=tuple(
            Reference(to_uint8(subject.image_CHW), subject.name, kinds.get(subject.name, "object"))
            for subject in sample.subjects
        ),
        fps=sample.fps,
        category=str(sample.meta.get("category", "")),
        meta=sample.meta,
    )


def advantages_of(
    breakdowns: Sequence[Breakdown], groups: Sequence[int], composite: Composite, clip: float | None
) -> tuple[Advantages, Tensor]:
    """Advantages of all samples of a batch, and which of them have a reward, bool `(B,)`."""
    rewards = composite.combine(breakdowns, groups)
    valid_B = torch.tensor([reward is not None for reward in rewards])
    values_B = torch.tensor([0.0 if reward is None else reward for reward in rewards])
    return group_advantages(values_B, torch.tensor(list(groups)), valid_B, clip), valid_B


def means(breakdowns: Sequence[Breakdown]) -> dict[str, float]:
    """The mean total ("") and the mean of each reward and part by name, over the samples that have one."""
    columns: dict[str, list[float]] = {}
    for breakdown in breakdowns:
        for name, value in (("", breakdown.total), *breakdown.parts.items(), *breakdown.values.items()):
            if value is not None:
                columns.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}


class Drops:
    """Tells why samples have no reward: a warning for each new reason, and a line for each sample in the run's
    `reward_drops.jsonl`. A resumed run appends, also the iteration that it takes again.

    Attributes:
        reasons: how many samples each has cost since the start or the resume.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def tell(self, trainer: Any, breakdowns: Mapping[int, Breakdown], ids: Mapping[int, str]) -> None:
        """Tell of those without a total; all ranks call it together.

        Args:
            breakdowns: of all samples of an iteration over all ranks, by place.
            ids: of the samples that they were made for.
        """
        lost = {place: breakdowns[place].reason for place in sorted(breakdowns) if breakdowns[place].total is None}
        if not lost:
            return
        folder = trainer.log_dir if trainer.logger is not None else None  # a collective
        if not trainer.is_global_zero:
            return
        path = Path(folder) / DROPS if folder else None
        known = set(self.reasons)
        self.reasons.update(lost.values())
        for reason in dict.fromkeys(lost.values()):
            if reason not in known and len(known) < _WARNINGS:
                known.add(reason)
                found = f"{counted(self.reasons[reason], 'sample')} without a reward so far: {reason}"
                rank_zero_warn(found + (f" (each is in {path})" if path else ""))
        if path:
            lines = [
                json.dumps({"step": trainer.global_step, "sample": ids[place], "place": place, "reason": reason})
                for place, reason in lost.items()
            ]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write("".join(f"{line}\n" for line in lines))
            except OSError as error:  # one rank alone must not end here, while the others train
                rank_zero_warn(f"{path}: cannot be written ({error})")

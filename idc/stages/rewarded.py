"""From sampled pixels to rewards: a sample as the clip that is judged, and what is logged of a batch's breakdowns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from idc.flow.objectives import Advantages, group_advantages
from idc.metrics.base import Clip, Reference
from idc.models.sampling import to_uint8
from idc.rewards.composite import Breakdown, Composite
from idc.types import Sample


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

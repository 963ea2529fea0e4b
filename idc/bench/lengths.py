"""References and VLM tokens whose numbers differ from step to step, as those of a data set do.

A kernel that plans anew for every size of its inputs is as quick as any while sizes stay the same, so that steps on one
sample would hide what it costs. Sizes are drawn around the setup's own, which operations are counted at: references of
about its area and of all shapes between 1:2 and 2:1, and a tenth more or fewer VLM tokens. A step's operations are
within 0.2% of that count at 1.3B and 480p.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from idc.bench.setup import Setup
from idc.models.conditioning import Drop
from idc.types import SPATIAL_MULTIPLE, Sample, Subject

_LONGEST = 1.4  # sides of a reference, times those of a square of its area
_VLM = 0.1  # more or fewer tokens, of their number
_VARIANTS = frozenset(drop.vlm for drop in Drop)


@dataclass(frozen=True)
class Lengths:
    """Of one sample: rows and columns of each reference's tokens, and how many tokens the VLM gives."""

    grids: tuple[tuple[int, int], ...]
    vlm: int


def widest(setup: Setup) -> Setup:
    """The same with references from which any that is drawn can be cut."""
    side = setup.reference // SPATIAL_MULTIPLE
    most = max(max(_rows(side)), *(round(side**2 / rows) for rows in _rows(side)))
    return replace(setup, reference=most * SPATIAL_MULTIPLE)


def drawn(setup: Setup, generator: random.Random) -> Lengths:
    """Lengths around those of the setup."""
    side = setup.reference // SPATIAL_MULTIPLE
    rows = [generator.choice(_rows(side)) for _ in range(setup.subjects)]
    spread = round(_VLM * setup.vlm_tokens)
    return Lengths(
        tuple((each, round(side**2 / each)) for each in rows), setup.vlm_tokens + generator.randint(-spread, spread)
    )


def _rows(side: int) -> range:
    return range(max(1, round(side / _LONGEST)), round(side * _LONGEST) + 1)


def cut(sample: Sample, lengths: Lengths) -> Sample:
    """The sample, of `widest` references, with these lengths: corners of pictures and latents, and of the VLM's tokens
    the first, or the first ones again behind them."""
    pixels = [(rows * SPATIAL_MULTIPLE, columns * SPATIAL_MULTIPLE) for rows, columns in lengths.grids]
    pairs = zip(sample.subjects, pixels, strict=True)
    subjects = tuple(Subject(s.image_CHW[:, :height, :width], s.name) for s, (height, width) in pairs)
    if sample.features is None:
        return replace(sample, subjects=subjects)
    features = dict(sample.features)
    for k, (rows, columns) in enumerate(lengths.grids):
        features[f"reference_{k}"] = features[f"reference_{k}"][:, : 2 * rows, : 2 * columns]
    for name in _VARIANTS & features.keys():
        features[name] = torch.cat([features[name]] * 2)[: lengths.vlm]
    return replace(sample, subjects=subjects, features=features)


def varied(setup: Setup, samples: Sequence[Sample], generator: random.Random) -> Callable[[], list[Sample]]:
    """Gives `samples` with other lengths at every call, the same for all of a batch, which then needs no padding."""

    def batch() -> list[Sample]:
        lengths = drawn(setup, generator)
        return [cut(sample, lengths) for sample in samples]

    return batch

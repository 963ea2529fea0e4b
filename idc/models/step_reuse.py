"""Denoising steps that take over what the layers added in an earlier step: faster, and not exact.

After TeaCache (arXiv 2411.19108): from step to step the layers' input, modulated by the time, changes as their output
does. Its relative changes are added up; while the sum is below a threshold, the residual of the last computed step
stands in for all layers. Departures: the change is not rescaled by a polynomial, which would have to be fitted to each
model's weights, so a threshold means the same for all of them only roughly; measure what it costs (`report_error`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from idc.errors import UserError


@dataclass
class Reuse:
    """When steps are taken over.

    Attributes:
        threshold: of the accumulated relative change; 0 computes every step, bit for bit as without. The larger, the
            faster and the further off: the toy model at 10 steps takes over a sixth of its passes at 0.1 and 0.45 at
            0.2 (tests/benchmarks/LOG.md).
        report_error: `idc generate` also makes every video exactly and records how far this one is from it.
    """

    threshold: float = 0.0
    report_error: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"sampling.reuse.threshold={self.threshold}: must be 0 (exact) or positive; try 0.1")
        if self.report_error and not self.threshold:
            raise UserError(
                "sampling.reuse.report_error=true: nothing is taken over at threshold=0, so there is no error; set "
                "report_error=false, or a threshold such as 0.1"
            )

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.threshold > 0


@dataclass
class Tally:
    """Forward passes so far, and how many of them took over the layers' residual."""

    passes: int = 0
    reused: int = 0

    @property
    def share(self) -> float:
        """In [0, 1]; 0 where there was no pass."""
        return self.reused / self.passes if self.passes else 0.0


@dataclass
class StepReuse:
    """What the steps of one batch under one condition pass on; guidance has one for each of its forward passes.

    Attributes:
        threshold: as in `Reuse`, above 0.
        last: the time (in [0, 1000]) from which on all is computed: that of the last step.
        tally: to which it adds.
    """

    threshold: float
    last: float
    tally: Tally = field(default_factory=Tally)
    _input: Tensor | None = None
    _residual: Tensor | None = None
    _change: float = 0.0

    def residual(self, modulated_BLD: Tensor, timestep: Tensor) -> Tensor | None:
        """What to add to the layers' input in place of running them, `[B, L, D]`; None where they must run.

        Args:
            modulated_BLD: their input as the first one's attention reads it. A batch goes by its largest change.
            timestep: in [0, 1000].
        """
        before, self._input = self._input, modulated_BLD
        self.tally.passes += 1
        if before is not None:
            difference_B = (modulated_BLD.float() - before.float()).abs().mean((1, 2))
            self._change += (difference_B / before.float().abs().mean((1, 2))).max().item()
        # A change that is no number is not below anything: such a step is computed.
        if self._residual is None or timestep.min() <= self.last or not self._change < self.threshold:
            self._change, self._residual = 0.0, None
            return None
        self.tally.reused += 1
        return self._residual

    def keep(self, residual_BLD: Tensor) -> None:
        """What the layers added to their input in this step."""
        self._residual = residual_BLD


def modulated(block: Any, video_BLD: Tensor, modulation: Tensor) -> Tensor:
    """The video as the self-attention of a Wan block reads it; `modulation` `[B, 6, D]`, or `[B, L, 6, D]` by token."""
    shift, scale = (block.scale_shift_table + modulation.float()).unbind(-2)[:2]
    if modulation.ndim == 3:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return (block.norm1(video_BLD.float()) * (1 + scale) + shift).type_as(video_BLD)


def error_of(video: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Mean and largest absolute difference of two uint8 videos of one shape, of 255."""
    difference = np.abs(video.astype(np.int16) - exact.astype(np.int16))
    return {"mean": float(difference.mean()), "max": float(difference.max())}

"""The rectified-flow path, Eq. 1 of the paper: z_t = (1 - t) z_0 + t eps, with t = 1 at noise and t = 0 at data.

Every function takes t as a number, a 0-d tensor, one value a sample `(B,)`, or any shape that broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x, t)`: the field dx/dt at x `[B, ...]`, for a 0-d or `(B,)` t in [0, 1]; a tensor like x."""


def expand_time(t: Tensor | float, x: Tensor) -> Tensor:
    """t as a tensor that broadcasts against x `[B, ...]`: a `(B,)` t gets trailing dimensions, others stay."""
    t = torch.as_tensor(t, device=x.device)
    if t.ndim == 1 and x.ndim > 1:
        return t.reshape(-1, *(1,) * (x.ndim - 1))
    return t


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """z_t = (1 - t) x0 + t noise (Eq. 1); exactly x0 at t = 0 and exactly the noise at t = 1."""
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dz_t/dt = noise - x0, what the network regresses (Eq. 2). It does not depend on t."""
    return noise - x0


def denoised(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """The data that x at time t points to: x - t v. Equals x0 on the path when v is the target."""
    return x - expand_time(t, x) * velocity

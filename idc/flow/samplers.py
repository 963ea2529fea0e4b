"""ODE samplers of one signature, `sample(velocity, x, times)`, and the shifted schedule of times.

Departure from diffusers: the state stays in x's dtype, where diffusers' scheduler rounds it to the model's after
each step. In float32 the two agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from idc.errors import UserError
from idc.flow.path import Velocity
from idc.flow.times import shift as shift_time

OnStep = Callable[[int, Tensor], None]
"""`on_step(i, x)` after step i (from 0), with the state that it reached."""


def shifted_times(steps: int, shift: float = 1.0) -> Tensor:
    """A schedule from noise to data: `steps + 1` float32 values from 1 to 0, strictly falling.

    Uniform times shifted by t' = s t / (1 + (s - 1) t); Wan uses s = 3 at 480p and 5 at 720p. In float32 throughout,
    to give the bits of diffusers' `FlowMatchEulerDiscreteScheduler(shift=s)` with `sigmas=linspace(1, 0, N + 1)[:-1]`
    (left to itself that scheduler shifts the end of its range twice).

    Raises:
        UserError: unless steps >= 1 and shift > 0.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: sampling takes at least 1 step")
    if not shift > 0:
        raise UserError(f"shift={shift}: must be positive; 1.0 is no shift")
    uniform = torch.from_numpy(np.linspace(1, 0, steps + 1).astype(np.float32))
    times = shift_time(uniform, shift)
    times[0] = 1  # exactly pure noise, also where an odd shift rounds
    return times


def sample_euler(velocity: Velocity, x: Tensor, times: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Euler's method for dx/dt = v(x, t), first order, one evaluation a step.

    Args:
        velocity: called with x and a 0-d t on x's device.
        x: the state at `times[0]` (noise at t = 1).
        times: `(steps + 1,)`; rising times run the same ODE from data to noise.

    Returns:
        The state at `times[-1]`, in x's dtype.
    """
    times = _check(times, x)
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t).to(x.dtype)
        if on_step is not None:
            on_step(i, x)
    return x


def sample_heun(velocity: Velocity, x: Tensor, times: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Heun's method (explicit trapezoid), second order, two evaluations a step; arguments as in `sample_euler`."""
    times = _check(times, x)
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t).to(x.dtype)
        slope_next = velocity(x + (t_next - t) * slope, t_next).to(x.dtype)
        x = x + (t_next - t) * (slope + slope_next) / 2
        if on_step is not None:
            on_step(i, x)
    return x


def _check(times: Tensor, x: Tensor) -> Tensor:
    times = torch.as_tensor(times, device=x.device)
    if times.ndim != 1 or len(times) < 2:
        raise UserError(f"times of shape {tuple(times.shape)}: must be one-dimensional with at least 2 values")
    return times

"""Editing without training: a clip enters the sampler's path part of the way (SDEdit, arXiv 2108.01073).

On the rectified-flow path z_t = (1 - t) z_0 + t eps, the state at t = strength is made from the clip's own latents and
integrated to t = 0: strength 0 gives the clip back, strength 1 is generation from the same noise. Departure from
SDEdit: with a mask, what is kept stays on the clip's own path at every step, as RePaint has it (arXiv 2201.09865).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.flow.path import Velocity, interpolate, velocity_target
from idc.flow.samplers import sample_euler

Solve = Callable[[Velocity, Tensor, Tensor], Tensor]


def check_strength(strength: float) -> None:
    """Raise `UserError` unless strength is in [0, 1]."""
    if not 0 <= strength <= 1:
        raise UserError(f"strength={strength}: from 0 (the source as it is) to 1 (nothing of it); 0.8 is usual")


def edit_times(times: Tensor, strength: float) -> Tensor:
    """The part of a falling schedule below `strength`, which comes first; `times` itself at strength 1.

    The noise level is what `strength` names, so a schedule that is shifted towards noise leaves fewer steps to a weak
    edit. At strength 0 only 0 is left: no step.
    """
    check_strength(strength)
    start = torch.full((1,), strength, dtype=times.dtype, device=times.device)
    return torch.cat([start, times[times < start]])


def kept(velocity: Velocity, x0: Tensor, noise: Tensor, mask: Tensor) -> Velocity:
    """`velocity` where `mask` is true; elsewhere the state stays on the path from `noise` to `x0`.

    The wrapped field sees the kept part exactly at its place on the path, whatever rounding the solver has gathered.

    Args:
        x0, noise: `[B, C, T, H, W]`.
        mask: bool, broadcasts against them.
    """
    target = velocity_target(x0, noise)

    def masked(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask, velocity(torch.where(mask, x, interpolate(x0, noise, t)), t), target)

    return masked


def edit(
    velocity: Callable[[], Velocity],
    x0: Tensor,
    noise: Tensor,
    times: Tensor,
    strength: float,
    mask_BTHW: Tensor | None = None,
    solve: Solve = sample_euler,
) -> Tensor:
    """Edit clean latents.

    Args:
        velocity: makes the field dx/dt; not called at strength 0, which needs none.
        x0, noise: `[B, C, T, H, W]`.
        times: the whole schedule from 1 to 0.
        strength: in [0, 1].
        mask_BTHW: of pixels, True where they may change (`latent_mask` makes the latents' own of it), or None.
        solve: `sample_euler` or `sample_heun`.

    Returns:
        Latents like x0: x0 itself at strength 0, and outside the mask at any strength.

    Raises:
        UserError: for a strength outside [0, 1].
    """
    times = edit_times(times, strength)
    if strength == 0:
        return x0
    field = velocity()
    if mask_BTHW is None:
        return solve(field, interpolate(x0, noise, times[0]), times)
    mask = latent_mask(mask_BTHW.to(x0.device), x0)
    x = solve(kept(field, x0, noise, mask), interpolate(x0, noise, times[0]), times)
    return torch.where(mask, x, x0)


def latent_mask(mask_BTHW: Tensor, latents_BCTHW: Tensor) -> Tensor:
    """bool `[B, 1, T, H, W]`, True for each latent cell with a true pixel: the first frame, then four a cell."""
    frames, height, width = latents_BCTHW.shape[2:]
    rows, columns = mask_BTHW.shape[2] // height, mask_BTHW.shape[3] // width
    pixels = mask_BTHW[:, None].float()
    first = F.max_pool3d(pixels[:, :, :1], (1, rows, columns))
    if frames == 1:
        return first > 0
    step = (mask_BTHW.shape[1] - 1) // (frames - 1)
    return torch.cat([first, F.max_pool3d(pixels[:, :, 1:], (step, rows, columns))], 2) > 0

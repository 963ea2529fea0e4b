"""Stochastic steps along the flow, the policies of online RL, behind one signature; rollouts that mix them with ODE.

A step from t to t' with h = t - t' > 0 draws x' = mu + std xi with xi standard normal. With v the velocity:

    flow    s = a sqrt(t / (1 - t))    Flow-GRPO (arXiv 2505.05470); the paper's, with a = 1
    wan     s = a t                    what Flow-GRPO's Wan scripts run, with a = sigma_1, the schedule's SECOND time
    dance   s = a                      DanceGRPO (arXiv 2505.07818), with a from 0.25 to 0.3
    cps     std = t' sin(a pi / 2)     coefficients-preserving sampling (arXiv 2509.05952), with a in [0, 1]
    ode     std = 0                    Euler's step

where a is `noise_level`. The first three have std = s sqrt(h) and the paper's Eq. 4

    mu = x - h [ v + s^2 / (2 t) (x + (1 - t) v) ],

which keeps the marginals of the flow to O(h^2) a step: on Gaussian data the variance is within 0.8% after 400 uniform
steps for a up to 1. Next to t = 1 the k-th step of `flow` has s^2 h = a^2 t / k for any number of steps, so there its
chain converges slower than the others'. `cps` has mu = (1 - t') x0_hat + sqrt(t'^2 - std^2) eps_hat with
x0_hat = x - t v and eps_hat = x + (1 - t) v: it keeps the share of noise, t', exactly and the marginals only where
eps_hat is the noise that was drawn.

Both ends are ODE, and so have no log-probability and are not trained. At t = 1 the `flow` kernel has no bound: public
code puts the second time in the place of 1, which gives the first step a std of a for any number of steps and the
state a variance of 1 + a^4 / 4. Ours is Euler's step there, whose variance is (1 - h)^2 where the marginal has
(1 - h)^2 + h^2 q for data of variance q; the other kernels are finite at t = 1 and may start with a stochastic step.
At t' = 0 whatever is drawn would stay in the latents. `sde_step` raises in both cases; `sample_sde` takes Euler's step.

Replaying a step gives the log-probability bit for bit where x, x_next and the velocity are the rollout's. Latents that
were stored in bfloat16 are not: a shift e of x_next - mu changes the log-probability by at most
rms(xi) r + r^2 / 2 with r = rms(e) / std, and rms(e) <= 2^-8 rms(x_next). For unit latents and std 0.2 that is up to
2e-2, of which about 3e-5 is bias that no number of dimensions averages out: more than a clip range of 1e-5. Records
are therefore float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from idc.errors import UserError, nearest
from idc.flow.path import Velocity, denoised, expand_time
from idc.flow.samplers import OnStep
from idc.flow.times import noise_like

KERNELS = ("flow", "wan", "dance", "cps", "ode")

StepNoise = Callable[[int, Tensor], Tensor]
"""`noise(i, x)`: standard normal noise like x `[B, ...]` for step i of a rollout."""


class SDEStep(NamedTuple):
    """One step from x `[B, ...]`, in float32 (float64 where x is)."""

    x_next: Tensor
    """`[B, ...]`; with a generator or noise it carries the mean's gradient, `log_prob_B` takes it as a constant."""
    log_prob_B: Tensor | None
    """Log density of x_next, the MEAN over a sample's dimensions; None for a deterministic step."""
    mean: Tensor
    """`[B, ...]`."""
    std: Tensor
    """Of t's shape, 0-d or `(B,)`; 0 for a deterministic step."""


class SDERecord(NamedTuple):
    """One stochastic step of a rollout: all that replaying it takes, and what it gave."""

    step: int
    """Its place in the schedule, from 0."""
    t: Tensor
    t_next: Tensor
    x: Tensor
    x_next: Tensor
    log_prob_B: Tensor
    mean: Tensor
    std: Tensor


def sde_step(
    velocity: Tensor,
    x: Tensor,
    t: Tensor | float,
    t_next: Tensor | float,
    *,
    kernel: str,
    noise_level: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> SDEStep:
    """One step of a kernel (see the module's text), in float32 whatever the velocity's dtype.

    A `noise_level` of 0 is the `ode` kernel, bit for bit.

    Args:
        velocity, x: `[B, ...]`; the predicted velocity at x and t.
        t, t_next: 0-d or `(B,)`, with 1 >= t > t_next >= 0, which is checked where x is on the CPU; `sample_sde`
            checks its schedule wherever that is.
        noise_level: the kernel's a, 0 or more.
        generator: draws the noise, on its own device; without it the global one of x's device does.
        noise: standard normal `[B, ...]`, in place of drawing it.
        x_next: `[B, ...]`, the state that a rollout reached: its log-probability is returned, and nothing is drawn.

    Raises:
        UserError: for an unknown kernel, a level or times out of range, a shape that is not x's, more than one of
            generator, noise and x_next, an SDE step to t_next = 0, the `flow` kernel at t = 1, and for the
            log-probability of an x_next that a deterministic step reached, since it has no density.
    """
    if sum(given is not None for given in (generator, noise, x_next)) > 1:
        raise UserError("more than one of generator, noise and x_next: a step either draws its noise or replays x_next")
    for name, tensor in (("velocity", velocity), ("noise", noise), ("x_next", x_next)):
        if tensor is not None and tensor.shape != x.shape:
            raise UserError(f"{name} of shape {tuple(tensor.shape)}: must be like x, {tuple(x.shape)}")
    deterministic = is_deterministic(kernel, noise_level)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    v = velocity.to(x.dtype)
    t, t_next = _times(t, t_next, x)
    std = noise_std(t, t_next, kernel=kernel, noise_level=noise_level)
    if deterministic:
        if x_next is not None:
            raise UserError(
                f"x_next with kernel={kernel!r} and noise_level={noise_level}: a deterministic step has no density, so "
                f"no log-probability to replay; use a kernel of {', '.join(KERNELS[:-1])} with noise_level > 0"
            )
        mean = x - expand_time(t - t_next, x) * v
        return SDEStep(mean, None, mean, std)
    mean = _mean(v, x, t, t_next, std, kernel, noise_level)
    if x_next is None:
        if noise is None:
            device = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        x_next = mean + expand_time(std, x) * noise.to(x)
    else:
        x_next = x_next.to(x)
    return SDEStep(x_next, log_prob(x_next.detach(), mean, std), mean, std)


def is_deterministic(kernel: str, noise_level: float) -> bool:
    """Whether the kernel draws nothing; raises `UserError` for an unknown kernel or a level out of range."""
    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r}: no such SDE kernel{nearest(kernel, KERNELS)}")
    if not 0 <= noise_level < math.inf:
        raise UserError(f"noise_level={noise_level}: must be 0 (ODE) or more; the paper's is 1.0")
    if kernel == "cps" and noise_level > 1:
        raise UserError(f"noise_level={noise_level}: kernel 'cps' takes 0 (ODE) to 1 (all noise is new)")
    return kernel == "ode" or noise_level == 0


def noise_std(t: Tensor, t_next: Tensor, *, kernel: str, noise_level: float) -> Tensor:
    """The std of the noise that a step adds, of the times' shape: s sqrt(h), but t' sin(a pi / 2) for `cps`.

    Divided by sqrt(t - t_next) it is s, as `objectives.one_step_weight` takes it.

    Raises:
        UserError: as `sde_step`, for the kernel, its level and the times.
    """
    deterministic = is_deterministic(kernel, noise_level)
    _check_times(t, t_next, kernel, deterministic)
    if deterministic:
        return torch.zeros_like(t - t_next)
    if kernel == "cps":
        return t_next * math.sin(noise_level * math.pi / 2)
    h = t - t_next
    if kernel == "flow":
        return noise_level * (t / (1 - t) * h).sqrt()
    return noise_level * (t if kernel == "wan" else 1) * h.sqrt()


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_next; mean, std^2), the mean over a sample's dimensions: `(B,)`.

    The mean and not the sum: a ratio of probabilities is then a geometric mean over dimensions and does not grow with
    the clip's size, which is why clip ranges for it are 1e-3 to 1e-5.
    """
    std = expand_time(std, mean)
    return sample_mean(-(((x_next - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2)


def sample_mean(x: Tensor) -> Tensor:
    """The mean of each sample over all its dimensions: `[B, ...]` to `(B,)`."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def seeded_noise(seeds_B: Tensor | Iterable[int]) -> StepNoise:
    """Noise for `sample_sde` that depends on a sample's seed and the step alone, not on its batch, rank or device."""
    seeds = [int(seed) for seed in seeds_B]
    return lambda i, x: noise_like(seeds, x.shape[1:], x.device, x.dtype, stream=f"sde/{i}")


def sde_steps(times: Tensor, kernel: str) -> range:
    """The steps of a schedule that can be stochastic: all but the last, and for `flow` but one that starts at t = 1.

    Args:
        times: `(steps + 1,)`, strictly falling in [0, 1].

    Raises:
        UserError: for an unknown kernel or a schedule that is none.
    """
    if times.ndim != 1 or len(times) < 2:
        raise UserError(f"times of shape {tuple(times.shape)}: must be one-dimensional with at least 2 values")
    _check_times(times[:-1], times[1:], kernel, deterministic=True)
    if is_deterministic(kernel, 1.0):
        return range(0)
    return range(int(kernel == "flow" and times[0].item() == 1), len(times) - 2)


def sample_sde(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    kernel: str,
    noise_level: float,
    noise: StepNoise,
    window: Iterable[int] | None = None,
    on_step: OnStep | None = None,
) -> tuple[Tensor, list[SDERecord]]:
    """A rollout: the steps of `window` by the kernel, the others by Euler's method; the state stays in float32.

    Steps of the window that cannot be stochastic (see `sde_steps`) are Euler's too and leave no record. With an empty
    window, `kernel="ode"` or a noise level of 0 the result is that of `sample_euler`, bit for bit, without records.

    Args:
        velocity: called with x and a 0-d t on x's device, once a step.
        x: `[B, ...]`, the state at `times[0]`.
        times: `(steps + 1,)`, strictly falling.
        noise: `seeded_noise(seeds_B)`, or any function of step and state.
        window: indices of steps, from 0; None is all of them, as in the paper.
        on_step: called after every step.

    Returns:
        The state at `times[-1]`, and a record of each stochastic step, in order. Their gradients are those of the
        caller's mode: roll out under `torch.no_grad`.

    Raises:
        UserError: for a window that names a step outside the schedule or only steps that cannot be stochastic, and
            as `sde_step`.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    schedule = torch.as_tensor(times).cpu()
    possible = sde_steps(schedule, kernel)
    deterministic = is_deterministic(kernel, noise_level)
    stochastic = set() if deterministic else _window(window, possible, len(schedule) - 1, kernel)
    times = schedule.to(x.device)
    records = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t)
        if i in stochastic:
            step = sde_step(v, x, t, t_next, kernel=kernel, noise_level=noise_level, noise=noise(i, x))
            assert step.log_prob_B is not None  # the kernel is stochastic
            records.append(SDERecord(i, t, t_next, x, step.x_next, step.log_prob_B, step.mean, step.std))
        else:
            step = sde_step(v, x, t, t_next, kernel="ode", noise_level=0.0)
        x = step.x_next
        if on_step is not None:
            on_step(i, x)
    return x, records


def _mean(v: Tensor, x: Tensor, t: Tensor, t_next: Tensor, std: Tensor, kernel: str, noise_level: float) -> Tensor:
    h, t, t_next, std = (expand_time(value, x) for value in (t - t_next, t, t_next, std))
    eps_hat = x + (1 - t) * v
    if kernel == "cps":  # sqrt(t'^2 - std^2) = t' cos(a pi / 2)
        return (1 - t_next) * denoised(x, v, t) + t_next * math.cos(noise_level * math.pi / 2) * eps_hat
    return x - h * v - std**2 / (2 * t) * eps_hat


def _times(t: Tensor | float, t_next: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both times in x's dtype and of one shape, 0-d or `(B,)`."""
    times = [torch.as_tensor(time, dtype=x.dtype, device=x.device) for time in (t, t_next)]
    for name, time in zip(("t", "t_next"), times, strict=True):
        if time.ndim and time.shape != x.shape[:1]:
            shape = tuple(time.shape)
            raise UserError(f"{name} of shape {shape}: must be a number or one for each of {len(x)} samples")
    first, second = torch.broadcast_tensors(*times)
    return first, second


def _check_times(t: Tensor, t_next: Tensor, kernel: str, deterministic: bool) -> None:
    if not t.is_cpu:  # to look at them would make each step of a rollout wait for the device
        return
    if not bool(((t <= 1) & (t > t_next) & (t_next >= 0)).all()):
        raise UserError(f"t={t.tolist()}, t_next={t_next.tolist()}: a step falls within [0, 1], 1 >= t > t_next >= 0")
    if deterministic:
        return
    if bool((t_next == 0).any()):
        raise UserError(
            f"kernel={kernel!r} at t_next=0: the noise of an SDE step to 0 would stay in the latents; take the last "
            "step with kernel='ode'"
        )
    if kernel == "flow" and bool((t == 1).any()):
        raise UserError(
            "kernel='flow' at t=1: its noise a sqrt(t / (1 - t)) has no bound there; take the first step with "
            "kernel='ode', or use kernel 'wan' or 'dance'"
        )


def _window(window: Iterable[int] | None, possible: range, steps: int, kernel: str) -> set[int]:
    """The possible steps of a window."""
    if window is None:
        return set(possible)
    wanted = set(window)
    outside = sorted(wanted - set(range(steps)))
    if outside:
        raise UserError(f"window={sorted(wanted)}: no step {outside[0]}; a schedule of {steps} has 0 to {steps - 1}")
    if wanted and not wanted & set(possible):
        choice = f"choose from {possible[0]} to {possible[-1]}" if possible else "take more steps"
        raise UserError(
            f"window={sorted(wanted)}: none of these can be an SDE step of kernel {kernel!r} in a schedule of {steps}, "
            f"whose last step is ODE{' and its first too' if possible.start else ''}; {choice}"
        )
    return wanted & set(possible)

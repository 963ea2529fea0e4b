"""idc.flow.sde: closed forms of every kernel on Gaussian data, densities, replay, a schedule's ends, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from idc.errors import UserError
from idc.flow import path
from idc.flow.samplers import sample_euler, shifted_times
from idc.flow.sde import KERNELS, is_deterministic, noise_std, sample_sde, sde_step, sde_steps, seeded_noise

STOCHASTIC = ("flow", "wan", "dance", "cps")
MARGINAL = ("flow", "wan", "dance")
VARIANCES = torch.tensor([0.25, 1.0, 3.0], dtype=torch.float64)  # of the data, one a sample


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def marginal(t):
    return (1 - t) ** 2 * VARIANCES + t**2


def gaussian_velocity(x, t):
    """E[eps - z_0 | z_t = x] for z_0 ~ N(0, VARIANCES)."""
    return (t - (1 - t) * VARIANCES) / marginal(t) * x


def next_variance(variance, t, t_next, kernel, level):
    """The exact variance after a step: the mean is linear in x, so a step from x = 1 gives its slope."""
    one = torch.ones_like(VARIANCES)
    step = sde_step(gaussian_velocity(one, t), one, t, t_next, kernel=kernel, noise_level=level, noise=0 * one)
    return step.mean**2 * variance + step.std**2


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    conv = torch.nn.Conv3d(4, 4, 3, padding=1).to(dtype)
    return conv, lambda x, t: conv(x.to(dtype)) + t.to(dtype)


# --- the law of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", MARGINAL)
@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
def test_a_chain_of_steps_keeps_the_variance_of_gaussian_data(kernel, level):
    errors = []
    for steps in (100, 400):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        stochastic, variance = sde_steps(times, kernel), torch.ones_like(VARIANCES)
        for i in range(steps):
            ends = times[i].item(), times[i + 1].item()
            variance = next_variance(variance, *ends, kernel if i in stochastic else "ode", level)
        errors.append(((variance - VARIANCES) / VARIANCES).abs().max().item())
    assert errors[1] <= 0.008
    if kernel != "flow" or level == 0:  # first order over the chain; flow's steps next to t = 1 are large for any h
        assert errors[1] < errors[0] / 3.8


@pytest.mark.parametrize("kernel", MARGINAL)
@pytest.mark.parametrize("t", [0.9, 0.5, 0.2])
def test_one_step_from_the_marginal_errs_by_h_squared(kernel, t):
    def error(h):
        return (next_variance(marginal(t), t, t - h, kernel, 0.8) - marginal(t - h)).abs()

    torch.testing.assert_close(error(1e-3) / error(5e-4), torch.full_like(VARIANCES, 4), rtol=0.02, atol=0)


@pytest.mark.parametrize("level", [0.2, 0.5, 1.0])
def test_cps_keeps_the_share_of_noise(level):
    t, t_next = 0.8, 0.6
    x0, noise = torch.randn(2, 1, 5, dtype=torch.float64)
    x, velocity = path.interpolate(x0, noise, t), path.velocity_target(x0, noise)
    step = sde_step(velocity, x, t, t_next, kernel="cps", noise_level=level, noise=0 * x)
    kept = (step.mean - (1 - t_next) * x0) / noise  # on the path eps_hat is the noise, whose share this is
    torch.testing.assert_close(kept**2 + step.std**2, torch.full_like(kept, t_next**2))
    torch.testing.assert_close(step.std, torch.tensor(t_next * math.sin(level * math.pi / 2), dtype=torch.float64))


@pytest.mark.parametrize(
    ("kernel", "s"),
    [("flow", lambda t: 0.7 * math.sqrt(t / (1 - t))), ("wan", lambda t: 0.7 * t), ("dance", lambda t: 0.7)],
)
def test_mean_and_std_are_those_of_equation_4(kernel, s):
    v, x = torch.randn(2, 3, 4, dtype=torch.float64)
    t, t_next = 0.75, 0.6
    h, score = t - t_next, -(x + (1 - t) * v) / t  # grad log p_t of rectified flow
    step = sde_step(v, x, t, t_next, kernel=kernel, noise_level=0.7, noise=0 * x)
    torch.testing.assert_close(step.mean, x - h * (v - s(t) ** 2 / 2 * score))
    torch.testing.assert_close(step.std.item(), s(t) * math.sqrt(h))
    if kernel == "flow":  # the same with the division by t cancelled
        a2 = 0.7**2
        torch.testing.assert_close(step.mean, x * (1 - a2 * h / (2 * (1 - t))) - (1 + a2 / 2) * h * v)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_samples_have_the_mean_and_std_that_a_step_reports(kernel):
    v, x = torch.randn(2, 1, 1).expand(-1, 1, 40_000)
    generator = torch.Generator().manual_seed(0)
    step = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, generator=generator)
    z = (step.x_next - step.mean) / step.std
    assert abs(z.mean()) < 4 / math.sqrt(z.numel())
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / z.numel())
    again = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, generator=generator.manual_seed(0))
    assert torch.equal(again.x_next, step.x_next)


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_no_noise_is_eulers_step_and_little_noise_is_near_it(kernel):
    v, x = torch.randn(2, 3, 4, dtype=torch.float64)
    euler = x + (0.5 - 0.7) * v
    still = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.0)
    assert torch.equal(still.x_next, still.mean)
    torch.testing.assert_close(still.x_next, euler, rtol=1e-15, atol=1e-15)
    assert still.log_prob_B is None
    assert still.std == 0
    moved = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=1e-7, noise=0 * x)
    torch.testing.assert_close(moved.mean, euler, rtol=0, atol=1e-12)


def test_times_may_differ_between_samples():
    v, x, noise = torch.randn(3, 4, 3, 2, 5, 5)
    t_B, t_next_B = torch.tensor([0.9, 0.7, 0.4, 0.3]), torch.tensor([0.8, 0.3, 0.35, 0.1])
    for kernel in KERNELS:
        batch = sde_step(v, x, t_B, t_next_B, kernel=kernel, noise_level=0.5, noise=noise)
        assert batch.std.shape == (4,)
        for i in range(4):
            own = slice(i, i + 1)
            one = sde_step(v[own], x[own], t_B[i], t_next_B[i], kernel=kernel, noise_level=0.5, noise=noise[own])
            torch.testing.assert_close(batch.x_next[i], one.x_next[0])
            if one.log_prob_B is not None:
                torch.testing.assert_close(batch.log_prob_B[i], one.log_prob_B[0])
    mixed = sde_step(v, x, t_B, 0.05, kernel="cps", noise_level=0.5, noise=noise)
    assert mixed.std.shape == (4,)


# --- log-probability and replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("shape", [(3,), (3, 4, 2, 5, 5), (1, 4), (0, 4)])
def test_log_prob_is_that_of_the_normal_distribution(kernel, shape):
    v, x, x_next = torch.randn(3, *shape)
    step = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, x_next=x_next)
    expected = Normal(step.mean, step.std).log_prob(x_next)
    assert step.log_prob_B.dtype == torch.float32
    torch.testing.assert_close(step.log_prob_B, expected.reshape(shape[0], math.prod(shape[1:])).mean(1))


@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_a_rollout_gives_a_ratio_of_exactly_one(kernel, dtype):
    _, velocity = network(dtype=dtype)  # bfloat16 is the network's own, the state stays in float32
    times = shifted_times(6, 3.0)
    with torch.no_grad():
        noise = seeded_noise([1, 2, 3])
        _, records = sample_sde(
            velocity, torch.randn(3, 4, 2, 5, 5), times, kernel=kernel, noise_level=0.6, noise=noise
        )
    assert [record.step for record in records] == list(sde_steps(times, kernel))
    for record in records:
        v = velocity(record.x, record.t)
        x, t, t_next = record.x, record.t, record.t_next
        step = sde_step(v, x, t, t_next, kernel=kernel, noise_level=0.6, x_next=record.x_next)
        assert step.mean.dtype == torch.float32
        assert torch.equal(step.mean, record.mean)
        assert torch.equal(step.log_prob_B, record.log_prob_B)
        assert torch.equal((step.log_prob_B - record.log_prob_B).exp(), torch.ones(3))


@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("keep_x", [True, False])
def test_latents_stored_in_bfloat16_shift_the_log_prob_within_the_stated_bound(kernel, keep_x):
    torch.manual_seed(0)
    x = torch.randn(4, 4, 3, 16, 16)

    def step(x, x_next=None):
        noise = torch.randn_like(x) if x_next is None else None
        return sde_step(0.5 * x, x, 0.8, 0.7, kernel=kernel, noise_level=0.3, noise=noise, x_next=x_next)

    def rms(x):
        return x.flatten(1).square().mean(1).sqrt()

    rollout = step(x)
    stored = rollout.x_next.bfloat16().float()
    replay = step(x if keep_x else x.bfloat16().float(), stored)
    shift = (stored - rollout.x_next) - (replay.mean - rollout.mean)
    r = rms(shift) / rollout.std
    bound = rms((rollout.x_next - rollout.mean) / rollout.std) * r + r**2 / 2
    change = (replay.log_prob_B - rollout.log_prob_B).abs()
    assert (change <= bound * (1 + 1e-3) + 1e-6).all()
    assert (change > 1e-5).all()  # beyond the smallest usual clip range: what the bound is there for
    if keep_x:
        assert (rms(shift) <= 2**-8 * rms(rollout.x_next)).all()


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_the_sampled_state_is_a_constant_to_the_log_prob(kernel):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    v = torch.randn_like(x).requires_grad_()
    drawn = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, noise=torch.randn_like(x))
    replayed = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, x_next=drawn.x_next.detach())
    (expected,) = torch.autograd.grad(replayed.log_prob_B.sum(), v)
    (actual,) = torch.autograd.grad(drawn.log_prob_B.sum(), v)
    assert torch.equal(actual, expected)
    assert expected.abs().min() > 0


def test_math_is_in_float32_whatever_comes_in():
    v, x = torch.randn(2, 2, 3, 4).bfloat16()
    noise = torch.randn(2, 3, 4)
    for kernel in KERNELS:
        given = None if kernel == "ode" else noise
        low = sde_step(v, x, 0.7, 0.5, kernel=kernel, noise_level=0.5, noise=given)
        wide = sde_step(v.float(), x.float(), 0.7, 0.5, kernel=kernel, noise_level=0.5, noise=given)
        assert low.x_next.dtype == low.std.dtype == torch.float32
        assert torch.equal(low.x_next, wide.x_next)


# --- both ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("steps", [4, 50])
def test_the_first_step_of_flow_is_ode_whose_variance_is_below_the_marginal_by_h_squared_q(level, steps):
    def velocity(x, t):
        return gaussian_velocity(x[:, 0], t)[:, None]

    states, x = [], torch.ones(3, 1, dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    kwargs = {"kernel": "flow", "noise_level": level, "noise": lambda i, x: 0 * x}
    sample_sde(velocity, x, times, on_step=lambda i, x: states.append(x[:, 0]), **kwargs)
    h = 1 / steps
    torch.testing.assert_close(states[0] ** 2, marginal(1 - h) - h**2 * VARIANCES)  # the noise has variance 1


def test_public_code_for_the_first_step_would_add_a_quarter_of_a_to_the_fourth():
    """What the t = 1 rule avoids: with s = a sqrt(1 / (1 - t_1)) the first step's variance tends to 1 + a^4 / 4."""
    h, a = 1e-4, 1.0
    one = torch.ones(1, dtype=torch.float64)
    substituted = sde_step(one, one, 1.0, 1 - h, kernel="dance", noise_level=a / math.sqrt(h), noise=0 * one)
    torch.testing.assert_close(substituted.std.item(), a)
    assert abs(substituted.mean.item() ** 2 + a**2 - (1 + a**4 / 4)) < 2 * h


@pytest.mark.parametrize("kernel", ["wan", "dance", "cps"])
def test_the_other_kernels_may_start_at_pure_noise(kernel):
    assert sde_steps(shifted_times(5), kernel) == range(4)
    x = torch.randn(2, 3)
    step = sde_step(x, x, 1.0, 0.8, kernel=kernel, noise_level=0.5, noise=torch.randn_like(x))
    assert step.log_prob_B.isfinite().all()
    assert step.std > 0


def test_which_steps_can_be_stochastic():
    times = shifted_times(5)
    assert sde_steps(times, "flow") == range(1, 4)
    assert sde_steps(times[1:], "flow") == range(3)  # an edit's schedule, from below 1
    assert sde_steps(times, "ode") == range(0)
    assert not sde_steps(shifted_times(1), "wan")
    assert not sde_steps(shifted_times(2), "flow")


# --- rollouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_rollout_without_stochastic_steps_is_the_euler_sampler_bit_for_bit(kernel, steps):
    _, velocity = network()
    x, times = torch.randn(2, 4, 2, 5, 5), shifted_times(steps, 5.0)
    seen, expected_seen = [], []
    expected = sample_euler(velocity, x, times, on_step=lambda i, x: expected_seen.append((i, x)))
    for level, window in ((1.0, ()), (0.0, None), (0.0, range(steps))):
        seen.clear()
        actual, records = sample_sde(
            velocity,
            x,
            times,
            kernel=kernel,
            noise_level=level,
            noise=seeded_noise([1, 2]),
            window=window,
            on_step=lambda i, x: seen.append((i, x)),
        )
        assert torch.equal(actual, expected)
        assert records == []
        assert [i for i, _ in seen] == list(range(steps))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, expected_seen, strict=True))


@pytest.mark.parametrize("window", [{2}, range(1, 4), [5, 3], range(7)])
def test_the_window_is_stochastic_and_the_rest_is_euler(window):
    _, velocity = network()
    x, times, states = torch.randn(2, 4, 2, 3, 3), shifted_times(7, 3.0), []
    noise = seeded_noise([5, 6])
    kwargs = {"kernel": "flow", "noise_level": 0.7, "noise": noise, "window": window}
    last, records = sample_sde(velocity, x, times, on_step=lambda i, x: states.append(x), **kwargs)
    assert [record.step for record in records] == sorted(set(window) & set(range(1, 6)))
    assert torch.equal(states[-1], last)
    stochastic = {record.step: record for record in records}
    for i, (before, after) in enumerate(zip([x, *states[:-1]], states, strict=True)):
        t, t_next = times[i], times[i + 1]
        if i in stochastic:
            step = sde_step(velocity(before, t), before, t, t_next, kernel="flow", noise_level=0.7, noise=noise(i, x))
            record = stochastic[i]
            assert (record.t, record.t_next) == (t, t_next)
            for a, b in zip(step, (record.x_next, record.log_prob_B, record.mean, record.std), strict=True):
                assert torch.equal(a, b)
            assert torch.equal(record.x, before)
            assert torch.equal(record.x_next, after)
        else:
            assert torch.equal(after, before + (t_next - t) * velocity(before, t))


@pytest.mark.parametrize("kernel", STOCHASTIC)
def test_a_rollout_never_looks_at_what_the_device_computes(kernel):
    """On `meta` there is nothing to look at: whoever asks for a value there, as a wait for a GPU does, is refused."""
    x = torch.empty(2, 4, 2, 3, 3, device="meta")
    last, records = sample_sde(
        lambda x, t: x * t, x, shifted_times(7, 3.0), kernel=kernel, noise_level=0.7, noise=lambda i, x: x
    )
    assert last.is_meta
    assert len(records) == (5 if kernel == "flow" else 6)
    for record in records:
        replayed = sde_step(x, record.x, record.t, record.t_next, kernel=kernel, noise_level=0.7, x_next=record.x_next)
        assert replayed.log_prob_B.is_meta
    with pytest.raises(UserError, match=r"within \[0, 1\]"):
        sample_sde(
            lambda x, t: x, x, torch.tensor([0.5, 1.0, 0.0]), kernel=kernel, noise_level=0.7, noise=lambda i, x: x
        )


def test_seeded_noise_depends_on_the_seed_and_the_step_alone():
    x = torch.zeros(3, 4, 2)
    noise = seeded_noise(torch.tensor([7, 8, 9]))
    assert torch.equal(noise(2, x)[1:], seeded_noise([8, 9])(2, x[1:]))
    assert torch.equal(noise(2, x), noise(2, x))
    assert not torch.equal(noise(2, x), noise(3, x))
    assert len(noise(0, x).unique()) == x.numel()


# --- bad input ----------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "flwo"}, "kernel='flwo'.*did you mean 'flow'"),
        ({"noise_level": -0.1}, "noise_level=-0.1: must be 0"),
        ({"noise_level": math.nan}, "noise_level=nan"),
        ({"noise_level": math.inf}, "noise_level=inf"),
        ({"kernel": "cps", "noise_level": 1.5}, "noise_level=1.5: kernel 'cps' takes 0"),
        ({"t": 0.4}, "1 >= t > t_next >= 0"),
        ({"t": 0.5}, "1 >= t > t_next >= 0"),
        ({"t": 1.2}, "1 >= t > t_next >= 0"),
        ({"t": math.nan}, "1 >= t > t_next >= 0"),
        ({"t": torch.tensor([0.9, 0.4])}, "1 >= t > t_next >= 0"),
        ({"t": torch.tensor([0.9, 0.8, 0.7])}, r"t of shape \(3,\).*each of 2 samples"),
        ({"t": 1.0}, "kernel='flow' at t=1.*'wan' or 'dance'"),
        ({"t_next": 0.0}, "kernel='flow' at t_next=0.*last step"),
        ({"kernel": "cps", "t_next": 0.0}, "kernel='cps' at t_next=0"),
        ({"t_next": torch.tensor([0.5, 0.0])}, "at t_next=0"),
        ({"noise": X, "x_next": X}, "more than one of"),
        ({"noise": X, "generator": torch.Generator()}, "more than one of"),
        ({"noise": torch.zeros(3)}, r"noise of shape \(3,\): must be like x, \(2, 3\)"),
        ({"x_next": torch.zeros(1, 3)}, r"x_next of shape \(1, 3\)"),
        ({"velocity": torch.zeros(2, 1)}, r"velocity of shape \(2, 1\)"),
        ({"kernel": "ode", "x_next": X}, "x_next with kernel='ode'.*no density.*flow, wan, dance, cps"),
        ({"noise_level": 0.0, "x_next": X}, "noise_level=0.0: a deterministic step has no density"),
    ],
)
def test_a_bad_step_says_what_is_wrong(change, message):
    arguments = {"velocity": X, "x": X, "t": 0.7, "t_next": 0.5, "kernel": "flow", "noise_level": 0.5, **change}
    with pytest.raises(UserError, match=message):
        sde_step(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": {0}}, "none of these can be an SDE step of kernel 'flow'.*its first too; choose from 1 to 2"),
        ({"window": [3]}, "whose last step is ODE and its first too"),
        ({"window": [1, 4]}, "no step 4; a schedule of 4 has 0 to 3"),
        ({"window": [-1]}, "no step -1"),
        ({"window": [0], "times": shifted_times(2)}, "take more steps"),
        ({"times": torch.tensor([1.0, 0.5, 0.5, 0.0])}, "1 >= t > t_next >= 0"),
        ({"times": torch.tensor([0.0, 1.0])}, "1 >= t > t_next >= 0"),
        ({"times": torch.ones(1)}, "at least 2 values"),
        ({"kernel": "sde"}, "no such SDE kernel"),
    ],
)
def test_a_bad_rollout_says_what_is_wrong_before_it_begins(change, message):
    def velocity(x, t):
        raise AssertionError("called")

    arguments = {"times": shifted_times(4), "kernel": "flow", "noise_level": 0.5, "noise": seeded_noise([1, 2])}
    with pytest.raises(UserError, match=message):
        sample_sde(velocity, X, **{**arguments, **change})


def test_the_std_of_a_kernel_is_the_steps_own():
    t, t_next = torch.tensor(0.7), torch.tensor(0.5)
    for kernel in KERNELS:
        step = sde_step(X, X, t, t_next, kernel=kernel, noise_level=0.5)
        assert torch.equal(noise_std(t, t_next, kernel=kernel, noise_level=0.5), step.std)
        assert is_deterministic(kernel, 0.5) == (step.std == 0)

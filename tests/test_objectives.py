"""idc.flow.objectives: gradients at theta = old, closed forms against torch.distributions, symmetries, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from idc.errors import UserError
from idc.flow import objectives as objective
from idc.flow.path import interpolate, velocity_target
from idc.flow.samplers import shifted_times
from idc.flow.sde import noise_std, sample_sde, sde_step, seeded_noise

DIMS = 24  # of a sample of shape (4, 2, 3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, count=1):
    drawn = torch.randn(count, *(shape or (6, 4, 2, 3)), dtype=torch.float64)
    return drawn if count > 1 else drawn[0]


def grad(loss, *inputs):
    return torch.autograd.grad(loss.sum(), inputs, retain_graph=True)


# --- advantages ---------------------------------------------------------------------------------------------------


def test_advantages_have_mean_0_and_population_std_1_per_group():
    rewards_B = torch.rand(12) * torch.tensor([1.0, 100.0, 1e-3]).repeat(4) + 5
    ids_B = torch.tensor([7, 0, -3]).repeat(4)
    advantages_B, groups = objective.group_advantages(rewards_B, ids_B)
    assert advantages_B.dtype == torch.float32
    assert groups.ids_G.tolist() == [-3, 0, 7]
    assert groups.count_G.tolist() == [4, 4, 4]
    for i, group in enumerate((-3, 0, 7)):
        members, raw = advantages_B[ids_B == group], rewards_B[ids_B == group].double()
        torch.testing.assert_close(members.mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
        shrunk = groups.std_G[i] / (groups.std_G[i] + 1e-8)  # by eps
        torch.testing.assert_close(members.std(correction=0), shrunk)
        torch.testing.assert_close(groups.mean_G[i], raw.mean().float())
        torch.testing.assert_close(groups.std_G[i], raw.std(correction=0).float())


def test_advantages_follow_their_samples_in_any_order_and_mix_of_groups():
    rewards_B, ids_B, order = torch.rand(20), torch.randint(3, (20,)), torch.randperm(20)
    valid_B = torch.rand(20) < 0.7
    whole = objective.group_advantages(rewards_B, ids_B, valid_B)
    shuffled = objective.group_advantages(rewards_B[order], ids_B[order], valid_B[order])
    torch.testing.assert_close(shuffled.advantages_B, whole.advantages_B[order])
    for group in ids_B.unique():
        own = ids_B == group
        alone = objective.group_advantages(rewards_B[own], ids_B[own], valid_B[own])
        assert torch.equal(alone.advantages_B, whole.advantages_B[own])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 24, 1000])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -123.456, 1e-30, 1e30, 0.0])
def test_a_constant_group_gets_exactly_0(size, value):
    """In float32 the mean of three times 0.1 is not 0.1, and what is left over is of the order of eps."""
    for dtype in (torch.float32, torch.float64):
        rewards_B = torch.full((size,), value, dtype=dtype)
        advantages_B, groups = objective.group_advantages(rewards_B, torch.zeros(size, dtype=torch.long))
        assert torch.equal(advantages_B, torch.zeros(size))
        assert groups.std_G.item() == 0


@pytest.mark.parametrize("failed", [0.5, math.nan, math.inf])
def test_a_failed_sample_leaves_its_group(failed):
    rewards_B = torch.tensor([0.2, failed, 0.6, failed, 0.9, failed])
    ids_B = torch.tensor([0, 0, 0, 1, 1, 2])
    valid_B = torch.tensor([True, False, True, False, True, False])
    advantages_B, groups = objective.group_advantages(rewards_B, ids_B, valid_B)
    torch.testing.assert_close(advantages_B, torch.tensor([-1.0, 0, 1.0, 0, 0, 0]))
    assert groups.count_G.tolist() == [2, 1, 0]
    assert advantages_B[4] == 0  # the only valid member of its group
    assert groups.std_G[1] == 0
    assert groups.mean_G[2].isnan()
    assert groups.std_G[2].isnan()


def test_eps_keeps_a_nearly_constant_group_small_and_clip_bounds_an_outlier():
    rewards_B = torch.tensor([0.0] * 99 + [1.0])
    ids_B = torch.zeros(100, dtype=torch.long)
    plain = objective.group_advantages(rewards_B, ids_B).advantages_B
    assert plain.max() > 9
    clipped = objective.group_advantages(rewards_B, ids_B, clip=5.0).advantages_B
    assert torch.equal(clipped, plain.clamp(-5, 5))
    damped = objective.group_advantages(rewards_B, ids_B, eps=10.0).advantages_B
    assert damped.max() < 0.1


def test_no_samples_have_no_advantages():
    advantages_B, groups = objective.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert advantages_B.shape == groups.ids_G.shape == (0,)


# --- GRPO ---------------------------------------------------------------------------------------------------------


def one_step(theta, x_next=None, kernel="flow"):
    """A policy whose velocity is linear in its parameters: one step for each of six samples."""
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 6, 4, 2, 3, generator=generator, dtype=torch.float64)
    velocity = torch.einsum("cd,bdhw->bchw", theta, x)
    noise = noise if x_next is None else None
    return sde_step(velocity, x, 0.8, 0.7, kernel=kernel, noise_level=0.6, noise=noise, x_next=x_next)


@pytest.mark.parametrize("kernel", ["flow", "wan", "dance", "cps"])
def test_at_theta_old_the_gradient_is_the_advantage_times_that_of_the_log_prob(kernel):
    theta = normal(4, 4).requires_grad_()
    rollout = one_step(theta.detach(), kernel=kernel)
    step = one_step(theta, rollout.x_next, kernel)
    advantages_B = normal(6)
    loss_B, ratio_B, clipped_B = objective.clipped_objective(step.log_prob_B, rollout.log_prob_B, advantages_B, 1e-4)
    log_prob_B = Normal(step.mean, step.std).log_prob(rollout.x_next).flatten(1).mean(1)
    (actual,) = grad(loss_B, theta)
    (expected,) = grad(-advantages_B * log_prob_B, theta)
    torch.testing.assert_close(actual, expected)
    assert actual.norm() > 1e-3
    assert torch.equal(ratio_B, torch.ones_like(ratio_B))
    assert torch.equal(loss_B, -advantages_B)
    assert not clipped_B.any()


def test_a_rollout_replayed_before_any_update_clips_nothing_in_float32():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(4, 4, 3, padding=1)
    with torch.no_grad():
        x, times = torch.randn(5, 4, 2, 6, 6), shifted_times(8, 3.0)
        noise = seeded_noise(range(5))
        _, records = sample_sde(lambda x, t: network(x), x, times, kernel="flow", noise_level=1.0, noise=noise)
    for r in records:
        step = sde_step(network(r.x), r.x, r.t, r.t_next, kernel="flow", noise_level=1.0, x_next=r.x_next)
        result = objective.clipped_objective(step.log_prob_B, r.log_prob_B, torch.randn(5), 1e-7)
        assert torch.equal(result.ratio_B, torch.ones(5))
        assert not result.clipped_B.any()
        assert torch.equal(objective.gaussian_kl(step.mean, r.mean, step.std), torch.zeros(5))


def test_the_clip_cuts_the_gradient_where_and_only_where_it_says():
    log_ratio_B = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.05, -0.05, 0.3], dtype=torch.float64, requires_grad=True)
    advantages_B = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    result = objective.clipped_objective(log_ratio_B, torch.zeros_like(log_ratio_B), advantages_B, 0.1)
    assert result.clipped_B.tolist() == [True, False, False, True, False, False, False]
    ratio_B = log_ratio_B.detach().exp()
    unclipped = -ratio_B * advantages_B
    bounds = torch.where(log_ratio_B > 0, 1.1, 0.9)
    torch.testing.assert_close(result.loss_B, torch.where(result.clipped_B, -bounds * advantages_B, unclipped))
    (slope,) = grad(result.loss_B, log_ratio_B)
    torch.testing.assert_close(slope, torch.where(result.clipped_B, 0, unclipped))


def test_a_zero_advantage_keeps_its_place_in_the_graph():
    theta = normal(4, 4).requires_grad_()
    rollout = one_step(theta.detach())
    step = one_step(theta, rollout.x_next)
    loss_B = objective.clipped_objective(step.log_prob_B, rollout.log_prob_B, torch.zeros(6), 1e-4).loss_B
    assert torch.equal(loss_B, torch.zeros_like(loss_B))
    (slope,) = grad(loss_B, theta)
    assert torch.equal(slope, torch.zeros_like(slope))


def test_kl_is_that_of_two_normals_per_dimension():
    mean, mean_ref = normal(count=2)
    for std in (torch.tensor(0.3, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1):
        wide = std.reshape(-1, 1, 1, 1)
        expected = kl_divergence(Normal(mean, wide), Normal(mean_ref, wide)).flatten(1).mean(1)
        torch.testing.assert_close(objective.gaussian_kl(mean, mean_ref, std), expected)
    assert objective.gaussian_kl(mean.bfloat16(), mean_ref.bfloat16(), std.float()).dtype == torch.float32


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_guard_ratio_is_the_noise_against_the_shift_of_the_mean(per_sample):
    """So its expectation over rollouts is 0, where the plain ratio's is -KL."""
    old_mean, shift, noise = normal(count=3)
    std = torch.rand(6, dtype=torch.float64) + 0.1 if per_sample else torch.tensor(0.3, dtype=torch.float64)
    wide = std.reshape(-1, 1, 1, 1)
    x_next, mean = old_mean + wide * noise, old_mean + 0.05 * shift
    log_prob_B, old_log_prob_B = (Normal(m, wide).log_prob(x_next).flatten(1).mean(1) for m in (mean, old_mean))
    guard_B = objective.guard_log_ratio(log_prob_B, old_log_prob_B, mean, old_mean, std)
    torch.testing.assert_close(guard_B, (noise * (mean - old_mean)).flatten(1).mean(1))
    plain_B = log_prob_B - old_log_prob_B
    kl_B = objective.gaussian_kl(mean, old_mean, std)
    torch.testing.assert_close(plain_B, guard_B / std - kl_B)


def test_the_guard_gradient_at_theta_old_is_the_plain_one_times_the_std():
    theta = normal(4, 4).requires_grad_()
    rollout = one_step(theta.detach())
    step = one_step(theta, rollout.x_next)
    advantages_B = normal(6)
    guard_B = objective.guard_log_ratio(step.log_prob_B, rollout.log_prob_B, step.mean, rollout.mean, rollout.std)
    assert torch.equal(guard_B, torch.zeros_like(guard_B))
    guarded = objective.clipped_objective(guard_B, torch.zeros_like(guard_B), advantages_B, 1e-4)
    plain = objective.clipped_objective(step.log_prob_B, rollout.log_prob_B, advantages_B, 1e-4)
    torch.testing.assert_close(grad(guarded.loss_B, theta)[0], rollout.std * grad(plain.loss_B, theta)[0])


@pytest.mark.parametrize("kernel", ["flow", "wan", "dance"])
def test_the_one_step_weight_evens_out_how_the_gradient_answers_to_the_velocity(kernel):
    times = shifted_times(8, 3.0).double()
    t_B, t_next_B = times[1:6], times[2:7]
    std_B = noise_std(t_B, t_next_B, kernel=kernel, noise_level=0.7)
    weight_B = objective.one_step_weight(t_B, t_next_B, std_B / (t_B - t_next_B).sqrt())
    torch.testing.assert_close(weight_B.mean().item(), 1.0)
    x, noise = normal(1, 4).expand(5, -1), normal(1, 4).expand(5, -1)  # the same for all, so that only the step differs
    v = torch.zeros_like(x).requires_grad_()
    drawn = sde_step(v, x, t_B, t_next_B, kernel=kernel, noise_level=0.7, noise=noise)
    (slope,) = grad(drawn.log_prob_B, v)
    assert (slope.norm(dim=1).max() / slope.norm(dim=1).min()) > 1.05
    weighted = weight_B * slope.norm(dim=1)
    torch.testing.assert_close(weighted, weighted[:1].expand(5))


def test_the_one_step_weight_of_one_step_is_1():
    t_B, t_next_B, s_B = torch.full((3,), 0.8), torch.full((3,), 0.7), torch.full((3,), 0.5)
    torch.testing.assert_close(objective.one_step_weight(t_B, t_next_B, s_B), torch.ones(3))
    h = 0.1
    pair = objective.one_step_weight(torch.tensor([0.8, 1.0]), torch.tensor([0.7, 0.9]), torch.tensor([0.5, 0.5]))
    bracket = math.sqrt(h) / 0.5 + 0.5 * math.sqrt(h) * 0.2 / 1.6, math.sqrt(h) / 0.5
    torch.testing.assert_close((pair[0] / pair[1]).item(), bracket[1] / bracket[0], rtol=1e-5, atol=0)


def test_what_the_rollout_left_gets_no_gradient():
    inputs = new, old, mean, old_mean = [normal(6).requires_grad_() for _ in range(4)]
    objective.clipped_objective(new, old, normal(6), 0.1).loss_B.sum().backward()
    objective.guard_log_ratio(new, old, mean, old_mean, torch.tensor(0.5)).sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [False, True, False, True]


# --- DiffusionNFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_theta_old_the_contrast_pulls_to_the_target_by_the_advantage(beta):
    v_old, target = normal(count=2)
    v = v_old.clone().requires_grad_()
    r_B = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0, 0.5], dtype=torch.float64)
    loss = objective.nft_loss(v, v_old, v_old, target, r_B, beta)
    (slope,) = grad(loss.loss_B, v)
    expected = 2 * beta * (2 * r_B - 1).reshape(-1, 1, 1, 1) * (v_old - target) / DIMS
    torch.testing.assert_close(slope, expected)
    assert torch.equal(slope[2], torch.zeros_like(slope[2]))


def test_the_contrast_of_a_sure_positive_at_beta_1_is_the_plain_flow_loss():
    x0, noise, v, v_old = normal(count=4)
    target, ones_B = velocity_target(x0, noise), torch.ones(6, dtype=torch.float64)
    loss = objective.nft_loss(v, v_old, v_old, target, ones_B, 1.0)
    torch.testing.assert_close(loss.contrast_B, ((v - target) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(interpolate(x0, noise, 0.3) - 0.3 * target, x0)  # the target is the path's


def test_the_optimum_of_the_contrast_moves_by_2r_minus_1_over_beta():
    """Setting the gradient to zero gives v = v_old + (2 r - 1) (u - v_old) / beta."""
    v_old, target = normal(count=2)
    r_B, beta = torch.rand(6, dtype=torch.float64), 0.5
    best = v_old + (2 * r_B - 1).reshape(-1, 1, 1, 1) * (target - v_old) / beta
    v = best.clone().requires_grad_()
    (slope,) = grad(objective.nft_loss(v, v_old, v_old, target, r_B, beta, kl_weight=0.0).loss_B, v)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


def test_the_pull_to_the_reference_is_added_with_its_weight():
    v, v_old, v_ref, target = normal(count=4)
    v.requires_grad_()
    r_B = torch.full((6,), 0.5, dtype=torch.float64)
    loss = objective.nft_loss(v, v_old, v_ref, target, r_B, 0.3, kl_weight=0.25)
    torch.testing.assert_close(loss.reference_B, ((v - v_ref) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(loss.loss_B, loss.contrast_B + 0.25 * loss.reference_B)
    (slope,) = grad(loss.loss_B - loss.contrast_B, v)
    torch.testing.assert_close(slope, 0.5 * (v.detach() - v_ref) / DIMS)


def test_the_old_policy_and_the_reference_get_no_gradient():
    inputs = [tensor.requires_grad_() for tensor in normal(count=3)]
    target, r_B = normal(), torch.rand(6, dtype=torch.float64)
    objective.nft_loss(*inputs, target, r_B, 0.5).loss_B.sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [False, True, True]


def test_optimality_is_half_at_0_and_saturates_at_the_bound():
    advantages_B = torch.tensor([-9.0, -5.0, -1.0, 0.0, 1.0, 5.0, 9.0])
    torch.testing.assert_close(objective.optimality(advantages_B), torch.tensor([0, 0, 0.4, 0.5, 0.6, 1, 1]))
    torch.testing.assert_close(objective.optimality(advantages_B[2:5], 2.0), torch.tensor([0.25, 0.5, 0.75]))


def test_errors_of_bfloat16_velocities_are_taken_in_float32():
    v, target = normal(count=2).bfloat16()
    error_B = objective.velocity_error(v, target)
    assert error_B.dtype == torch.float32
    torch.testing.assert_close(error_B, ((v.float() - target.float()) ** 2).flatten(1).mean(1))


# --- DPO ----------------------------------------------------------------------------------------------------------


def pair_loss(theta, winner, loser, beta=100.0, ref=None):
    """Flow DPO of a linear velocity, with the same noise and time for both of a pair."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(winner.shape, generator=generator, dtype=winner.dtype)

    def error(theta, x0):
        return objective.velocity_error(interpolate(x0, noise, 0.6) @ theta, velocity_target(x0, noise))

    ref = theta.detach() if ref is None else ref
    return objective.dpo_loss(error(theta, winner), error(theta, loser), error(ref, winner), error(ref, loser), beta)


def test_dpo_is_ln_2_at_theta_ref_and_swapping_the_pair_flips_the_gradient():
    theta = normal(5, 5).requires_grad_()
    winner, loser = normal(6, 5, count=2)
    loss, swapped = pair_loss(theta, winner, loser), pair_loss(theta, loser, winner)
    torch.testing.assert_close(loss.loss_B, torch.full_like(loss.loss_B, math.log(2)))
    assert torch.equal(loss.accuracy_B, torch.full_like(loss.loss_B, 0.5))
    (slope,), (flipped,) = grad(loss.loss_B, theta), grad(swapped.loss_B, theta)
    torch.testing.assert_close(slope, -flipped)
    assert slope.norm() > 1e-3


def test_away_from_ref_swapping_the_pair_mirrors_margin_accuracy_and_probability():
    theta, ref = normal(5, 5, count=2) * 0.1
    winner, loser = normal(6, 5, count=2)
    one, other = pair_loss(theta, winner, loser, 2.0, ref), pair_loss(theta, loser, winner, 2.0, ref)
    torch.testing.assert_close(one.margin_B, -other.margin_B)
    assert torch.equal(one.accuracy_B, 1 - other.accuracy_B)
    torch.testing.assert_close((-one.loss_B).exp() + (-other.loss_B).exp(), torch.ones_like(one.loss_B))


def test_an_identical_pair_has_zero_gradient_wherever_theta_is():
    theta, ref = normal(5, 5, count=2)
    theta.requires_grad_()
    clip = normal(6, 5)
    (slope,) = grad(pair_loss(theta, clip, clip, ref=ref).loss_B, theta)
    assert torch.equal(slope, torch.zeros_like(slope))


def test_the_errors_of_the_reference_get_no_gradient():
    errors = [normal(6).requires_grad_() for _ in range(4)]
    objective.dpo_loss(*errors, 1.0).loss_B.sum().backward()
    assert [error.grad is None for error in errors] == [False, False, True, True]


def test_a_policy_that_fits_the_winner_better_is_accurate_and_a_huge_margin_stays_finite():
    low, high, same = torch.tensor([0.1]), torch.tensor([5.0]), torch.tensor([1.0])
    right = objective.dpo_loss(low, high, same, same, 1000.0)
    wrong = objective.dpo_loss(high, low, same, same, 1000.0)
    assert right.accuracy_B.item() == 1
    assert wrong.accuracy_B.item() == 0
    assert right.loss_B.item() == 0
    torch.testing.assert_close(wrong.loss_B.item(), 500 * 4.9)  # linear, where exp would overflow
    torch.testing.assert_close(right.margin_B.item(), 500 * 4.9)


# --- bad input ----------------------------------------------------------------------------------------------------

B3, B2, IDS = torch.ones(3), torch.ones(2), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objective.group_advantages(B3, IDS[:2]), r"shapes \(3,\), \(2,\), \(3,\): must all be \(B,\)"),
        (lambda: objective.group_advantages(B3[:, None], IDS[:, None]), r"must all be \(B,\)"),
        (lambda: objective.group_advantages(torch.tensor([1, math.nan, 1]), IDS), "reward nan of sample 1: .*valid_B"),
        (lambda: objective.group_advantages(torch.tensor([math.inf, 1, 1]), IDS), "reward inf of sample 0"),
        (lambda: objective.group_advantages(B3, IDS, clip=0.0), "clip=0.0: must be positive; 5 is usual"),
        (lambda: objective.group_advantages(B3, IDS, eps=0.0), "eps=0.0: must be positive; the paper's is 1e-8"),
        (lambda: objective.clipped_objective(B3, B2, B3, 0.1), r"log_prob \(3,\), old_log_prob \(2,\)"),
        (lambda: objective.clipped_objective(B3, B3, B3[:, None], 0.1), r"advantages \(3, 1\)"),
        (lambda: objective.clipped_objective(B3, B3, B3, 0.0), "clip=0.0: must be positive; 1e-3 to 1e-5"),
        (lambda: objective.gaussian_kl(B3, B2, torch.tensor(1.0)), r"mean \(3,\), mean_ref \(2,\)"),
        (lambda: objective.guard_log_ratio(B3, B3, B3, B2, torch.tensor(1.0)), r"mean \(3,\), old_mean \(2,\)"),
        (lambda: objective.one_step_weight(B3, B3, B3), "1 >= t > t_next >= 0 and s > 0"),
        (lambda: objective.one_step_weight(B3, 0 * B3, 0 * B3), "an ODE step has no weight"),
        (lambda: objective.one_step_weight(B3, B2, B3), r"t_next \(2,\)"),
        (lambda: objective.velocity_error(B3, B2), r"velocity \(3,\), target \(2,\)"),
        (lambda: objective.optimality(B3, 0), "bound=0: must be positive"),
        (lambda: objective.nft_loss(B3, B3, B3, B2, B3, 1.0), r"target \(2,\)"),
        (lambda: objective.nft_loss(B3, B3, B3, B3, 2 * B3, 1.0), r"one value in \[0, 1\] for each of 3 samples"),
        (lambda: objective.nft_loss(B3, B3, B3, B3, B2, 1.0), r"r of shape \(2,\)"),
        (lambda: objective.nft_loss(B3, B3, B3, B3, B3, 0.0), "beta=0.0: must be positive; 1 is usual"),
        (lambda: objective.nft_loss(B3, B3, B3, B3, B3, 1.0, -1.0), "kl_weight=-1.0: must be 0 or more"),
        (lambda: objective.dpo_loss(B3, B3, B3, B2, 1.0), r"ref_l \(2,\)"),
        (lambda: objective.dpo_loss(B3, B3, B3, B3, math.nan), "beta=nan: must be positive; 100 is usual"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()

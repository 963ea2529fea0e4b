"""Objectives of alignment as pure functions: group advantages, clipped GRPO and its variants, DiffusionNFT, flow DPO.

Losses are one value a sample, `(B,)`, to be averaged by the caller: it knows the global batch and who left it. Errors
and log-probabilities are MEANS over a sample's dimensions, computed in float32 or wider. Every loss stays attached to
the graph where its advantage is 0, so that all ranks run the same backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.flow.path import expand_time
from idc.flow.sde import sample_mean


class GroupStats(NamedTuple):
    """Raw rewards by group, float32; the groups in rising order of id."""

    ids_G: Tensor
    mean_G: Tensor
    """NaN for a group without valid members."""
    std_G: Tensor
    """Population (over n); NaN for a group without valid members, 0 for a constant group."""
    count_G: Tensor
    """Valid members, int64."""


class Advantages(NamedTuple):
    advantages_B: Tensor
    groups: GroupStats


def group_advantages(
    rewards_B: Tensor,
    group_ids_B: Tensor,
    valid_B: Tensor | None = None,
    clip: float | None = None,
    eps: float = 1e-8,
) -> Advantages:
    """A = (R - mean R) / (std R + eps) over the valid samples of a group (Eq. 3 of the paper; GRPO, arXiv 2402.03300).

    The std is the population's (over n, not n - 1), as in Flow-GRPO. Call it on the rewards gathered over ranks.
    A constant group, and so a single valid member, gets exactly 0: rewards are taken in float32 and their moments in
    float64, where the mean of equal float32 values is that value.

    Args:
        rewards_B: one a sample, finite where valid.
        group_ids_B: integers; equal for the rollouts of one (prompt, references).
        valid_B: bool; False for a sample whose reward failed: it has no share in its group and an advantage of 0.
        clip: bound of |A| afterwards, or None; 5 is usual.

    Returns:
        float32 advantages `(B,)`, and the groups' statistics.

    Raises:
        UserError: for shapes that differ, a valid reward that is NaN or infinite, or a bound or eps that is no bound.
    """
    valid_B = torch.ones_like(rewards_B, dtype=torch.bool) if valid_B is None else valid_B
    if rewards_B.ndim != 1 or not rewards_B.shape == group_ids_B.shape == valid_B.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (rewards_B, group_ids_B, valid_B))
        raise UserError(f"rewards, group_ids and valid of shapes {shapes}: must all be (B,)")
    if not eps > 0:
        raise UserError(f"eps={eps}: must be positive; the paper's is 1e-8")
    if clip is not None:
        _check_positive("clip", clip, "5 is usual, None is no bound")
    bad = (valid_B & ~rewards_B.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"reward {rewards_B[bad[0]].item()} of sample {bad[0]}: must be finite; a reward that failed is marked in "
            "valid_B, not scored"
        )
    rewards = torch.where(valid_B, rewards_B, 0).float().double()
    ids_G, group_B = group_ids_B.unique(return_inverse=True)

    def total(values_B: Tensor) -> Tensor:
        return values_B.new_zeros(len(ids_G)).index_add(0, group_B, values_B)

    count_G = total(valid_B.long())
    mean_G = total(rewards) / count_G
    centred = torch.where(valid_B, rewards - mean_G[group_B], 0)
    std_G = (total(centred**2) / count_G).sqrt()
    advantages = torch.where(valid_B, centred / (std_G[group_B] + eps), 0).float()
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return Advantages(advantages, GroupStats(ids_G, mean_G.float(), std_G.float(), count_G))


class ClippedObjective(NamedTuple):
    loss_B: Tensor
    ratio_B: Tensor
    clipped_B: Tensor
    """bool: the clip cuts the sample's gradient, that is ratio > 1 + clip with A > 0 or ratio < 1 - clip with A < 0."""


def clipped_objective(
    log_prob_B: Tensor, old_log_prob_B: Tensor, advantages_B: Tensor, clip: float
) -> ClippedObjective:
    """-min(rho A, clip(rho, 1 - e, 1 + e) A) with rho = exp(log_prob - old_log_prob) (Eq. 3; PPO, arXiv 1707.06347).

    At theta = old it is -A, and its gradient -A grad log p. The KL term is `gaussian_kl`'s. For GRPO-Guard give
    `guard_log_ratio`'s result and zeros.

    Args:
        log_prob_B: with the gradient; `sde_step(..., x_next=...)` gives it.
        old_log_prob_B: the rollout's.
        clip: e > 0; 1e-3 to 1e-5 for log-probabilities that are means over dimensions.

    Raises:
        UserError: for shapes that differ or a clip that is not positive.
    """
    _check_same_shape(log_prob=log_prob_B, old_log_prob=old_log_prob_B, advantages=advantages_B)
    _check_positive("clip", clip, "1e-3 to 1e-5 are usual")
    ratio = (log_prob_B - old_log_prob_B.detach()).exp()
    loss = -torch.minimum(ratio * advantages_B, ratio.clamp(1 - clip, 1 + clip) * advantages_B)
    excess = (ratio.detach() - 1) * advantages_B.sign()
    return ClippedObjective(loss, ratio, excess > clip)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(mean_ref, std^2)) = mean((mean - mean_ref)^2) / (2 std^2), `(B,)`.

    With std = s sqrt(h) this is the step's KL in closed form (Flow-GRPO, arXiv 2505.05470), h included. It is a mean
    over dimensions like the log-probability.

    Args:
        mean, mean_ref: `[B, ...]`.
        std: 0-d or `(B,)`, positive.
    """
    _check_same_shape(mean=mean, mean_ref=mean_ref)
    mean, mean_ref = _wide(mean), _wide(mean_ref)
    return sample_mean((mean - mean_ref) ** 2 / (2 * expand_time(std, mean) ** 2))


def guard_log_ratio(log_prob_B: Tensor, old_log_prob_B: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's regulated log ratio (arXiv 2510.22319), `(B,)`, for `clipped_objective` with zeros as the old:

        log rho = std (log_prob - old_log_prob) + mean((mean - old_mean)^2) / (2 std),   std = s sqrt(h).

    Over the rollout's noise xi it equals mean(xi (mean - old_mean)): its expectation is 0 for any policy, where the
    plain ratio's is negative, and its scale does not depend on the step.

    Args:
        log_prob_B, mean: of the policy, with the gradient.
        old_log_prob_B, old_mean: the rollout's.
        std: 0-d or `(B,)`, the step's.
    """
    _check_same_shape(log_prob=log_prob_B, old_log_prob=old_log_prob_B)
    _check_same_shape(mean=mean, old_mean=old_mean)
    shift_B = sample_mean((_wide(mean) - _wide(old_mean.detach())) ** 2)
    return std * (log_prob_B - old_log_prob_B.detach()) + shift_B / (2 * std)


def one_step_weight(t_B: Tensor, t_next_B: Tensor, s_B: Tensor) -> Tensor:
    """Flash-GRPO's rectified weight (arXiv 2605.15980), `(B,)` with mean 1 over the batch:

        w = 1 / ( sqrt(h) / s + s sqrt(h) (1 - t) / (2 t) ),   h = t - t_next.

    The bracket is how strongly the log-probability's gradient answers to the velocity at this step, |d mu / d v| / std
    for the kernels of Eq. 4 (flow, wan, dance; not cps), so that steps of one-step training weigh the same. Give it
    the values of the global batch where ranks train different steps. Not to be combined with `guard_log_ratio`.

    Args:
        t_B, t_next_B: the trained step of each sample.
        s_B: the kernel's s, `noise_std(...) / sqrt(h)`.

    Raises:
        UserError: unless all three are `(B,)` and 1 >= t > t_next >= 0 and s > 0.
    """
    _check_same_shape(t=t_B, t_next=t_next_B, s=s_B)
    if not bool(((t_B <= 1) & (t_B > t_next_B) & (t_next_B >= 0) & (s_B > 0)).all()):
        raise UserError(
            f"t={t_B.tolist()}, t_next={t_next_B.tolist()}, s={s_B.tolist()}: 1 >= t > t_next >= 0 and s > 0; an ODE "
            "step has no weight"
        )
    root_h = (t_B - t_next_B).sqrt()
    weight = 1 / (root_h / s_B + s_B * root_h * (1 - t_B) / (2 * t_B))
    return weight / weight.mean()


def velocity_error(velocity: Tensor, target: Tensor) -> Tensor:
    """mean((v - u)^2) over a sample's dimensions, `(B,)`, in float32 or wider; u = eps - z_0 (`velocity_target`)."""
    _check_same_shape(velocity=velocity, target=target)
    return sample_mean((_wide(velocity) - _wide(target)) ** 2)


def optimality(advantages_B: Tensor, bound: float = 5.0) -> Tensor:
    """r = 1/2 + clip(A, -bound, bound) / (2 bound), in [0, 1]: how far DiffusionNFT takes a sample as a positive."""
    _check_positive("bound", bound, "5 is usual")
    return 0.5 + advantages_B.clamp(-bound, bound) / (2 * bound)


class NFTLoss(NamedTuple):
    loss_B: Tensor
    contrast_B: Tensor
    """The loss without the pull to the reference."""
    reference_B: Tensor
    """mean((v - v_ref)^2), unweighted."""


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor,
    target: Tensor,
    r_B: Tensor,
    beta: float,
    kl_weight: float = 1e-4,
) -> NFTLoss:
    """DiffusionNFT's contrast of implicit positive and negative policies (arXiv 2509.16117), on forward-noised samples:

        v+- = v_old +- beta (v - v_old)
        L = r mean((v+ - u)^2) + (1 - r) mean((v- - u)^2) + kl_weight mean((v - v_ref)^2).

    At v = v_old the contrast's gradient by v is 2 beta (2 r - 1) (v_old - u) / D, with D dimensions a sample: towards
    u for r > 1/2, away from it below, and 0 at 1/2. Away from v_old, r = 1/2 pulls back to it, so samples whose reward
    failed are to be left out and not given r = 1/2. Departure from the paper: errors of velocities in place of its
    self-normalised errors of x_0, which differ from them by weights.

    Args:
        v: `[B, ...]`, the policy's velocity at z_t, with the gradient.
        v_old, v_ref: `[B, ...]`, of the rollout's policy and the reference; taken as constants.
        target: `[B, ...]`, u = eps - z_0 of the same noise.
        r_B: in [0, 1]; `optimality(advantages)`.
        beta: positive; 1 is v+ = v.
        kl_weight: 0 or more.

    Raises:
        UserError: for shapes that differ, r outside [0, 1], or a beta or kl_weight out of range.
    """
    _check_same_shape(v=v, v_old=v_old, v_ref=v_ref, target=target)
    _check_positive("beta", beta, "1 is usual")
    if not 0 <= kl_weight < math.inf:
        raise UserError(f"kl_weight={kl_weight}: must be 0 or more; the default is 1e-4")
    if r_B.shape != v.shape[:1] or not bool(((r_B >= 0) & (r_B <= 1)).all()):
        raise UserError(f"r of shape {tuple(r_B.shape)}: one value in [0, 1] for each of {len(v)} samples")
    v, v_old = _wide(v), _wide(v_old.detach())
    step = beta * (v - v_old)
    contrast = r_B * velocity_error(v_old + step, target) + (1 - r_B) * velocity_error(v_old - step, target)
    reference = velocity_error(v, v_ref.detach())
    return NFTLoss(contrast + kl_weight * reference, contrast, reference)


class DPOLoss(NamedTuple):
    loss_B: Tensor
    margin_B: Tensor
    """The implicit reward of the winner over the loser, (beta / 2) [delta_l - delta_w]."""
    accuracy_B: Tensor
    """1 where the margin is positive, 0 where negative, 1/2 where it is 0 as at theta = ref."""


def dpo_loss(error_w_B: Tensor, error_l_B: Tensor, ref_w_B: Tensor, ref_l_B: Tensor, beta: float) -> DPOLoss:
    """Flow DPO (Diffusion-DPO, arXiv 2311.12908, on velocities as in VideoAlign, arXiv 2501.13918; constant over t):

        L = -log sigmoid( -(beta / 2) [delta_w - delta_l] ),   delta = error - ref error.

    Args:
        error_w_B, error_l_B: `velocity_error` of the policy on the winner and the loser of a pair, both at the SAME
            noise and time.
        ref_w_B, ref_l_B: the reference's on the same; taken as constants.
        beta: positive; about 100 with errors that are means over dimensions.

    Raises:
        UserError: for shapes that differ or a beta that is not positive.
    """
    _check_same_shape(error_w=error_w_B, error_l=error_l_B, ref_w=ref_w_B, ref_l=ref_l_B)
    _check_positive("beta", beta, "100 is usual")
    margin = -beta / 2 * ((error_w_B - ref_w_B.detach()) - (error_l_B - ref_l_B.detach()))
    return DPOLoss(-F.logsigmoid(margin), margin, (margin.detach().sign() + 1) / 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_same_shape(**tensors: Tensor) -> None:
    # A silent broadcast of (B, 1) against (B,) would mix samples.
    if len({x.shape for x in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise UserError(f"shapes differ: {shapes}; they must be equal")


def _check_positive(name: str, value: float, advice: str) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value}: must be positive; {advice}")

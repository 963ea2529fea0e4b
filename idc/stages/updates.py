"""What an optimiser step of alignment minimises over rollouts: clipped policy gradients, or DiffusionNFT's contrast."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from idc.errors import UserError, nearest
from idc.flow import objectives
from idc.flow.path import interpolate, velocity_target
from idc.flow.sde import noise_std, sde_step
from idc.flow.times import LogitNormal, TimeSampler, noise_like
from idc.stages.rollouts import Rollout, Rollouts


class Point(NamedTuple):
    """Where a rollout's policy is trained: the velocity at x `[B, ...]` and t, 0-d or `(B,)`."""

    x: Tensor
    t: Tensor
    number: int
    """Of the rollout's points."""


class Given(NamedTuple):
    """What a loss at a point takes besides the policy's velocity, all of it constant.

    Attributes:
        advantages_B: 0 for a sample without a reward.
        valid_B: bool, False for a sample without a reward: it has no part in the loss.
        old, reference: velocities at the point of the policy before this iteration's updates and of the reference;
            None unless asked for.
        weight: of the point, as `Objective.weights` gives it.
    """

    advantages_B: Tensor
    valid_B: Tensor
    old: Tensor | None
    reference: Tensor | None
    weight: float


class Loss(NamedTuple):
    """A loss `(B,)` and what is logged of it, `(B,)` each, by name."""

    loss_B: Tensor
    logged: dict[str, Tensor]


class Objective(ABC):
    """An objective over rollouts.

    Attributes:
        log_probs: it trains the stochastic steps, so rollouts must have some.
        needs_old, needs_reference: which velocities `Given` must have.
    """

    log_probs: ClassVar[bool] = False
    needs_old: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Whether `Given.reference` is read."""

    @abstractmethod
    def points(self, rollout: Rollout) -> list[Point]:
        """Where the velocity is trained: the same number for every rollout of an iteration."""

    def check_rollouts(self, settings: Rollouts) -> None:
        """Raises `UserError` for rollouts that the objective cannot train on."""
        if self.log_probs and not settings.stochastic:
            raise UserError(
                f"rollouts.kernel={settings.kernel!r}, noise_level={settings.noise_level}: no step of such "
                "rollouts has a log-probability, which this objective trains on; choose kernel flow, noise_level 1.0"
            )

    def weights(self, points: Sequence[tuple[float, float, float]]) -> list[float]:
        """A weight for each of all points of the global batch, given as `describe` gives them."""
        return [1.0] * len(points)

    def describe(self, rollout: Rollout, settings: Rollouts) -> list[tuple[float, float, float]]:
        """What `weights` needs of each point."""
        return [(0.0, 0.0, 0.0)] * len(self.points(rollout))

    @abstractmethod
    def loss(self, velocity: Tensor, rollout: Rollout, point: Point, given: Given, settings: Rollouts) -> Loss:
        """The loss at a point for the policy's velocity, with its gradient."""


@dataclass
class PolicyGradient(Objective):
    """The clipped objective of GRPO over the rollout's stochastic steps (Eq. 3), with the KL to the reference.

    Attributes:
        clip: e; 1e-3 to 1e-5, because a log-probability is a mean over dimensions.
        kl: beta, the weight of the KL; 0 needs no reference.
        ratio: "plain", or "guard" (GRPO-Guard), whose scale and mean do not depend on the step.
        step_weight: "none", or "rectified" (Flash-GRPO), which makes all steps push velocities equally. Not with guard.

    Raises:
        UserError: for a value that breaks its rule.
    """

    clip: float = 1e-3
    kl: float = 0.004
    ratio: Literal["plain", "guard"] = "plain"
    step_weight: Literal["none", "rectified"] = "none"

    log_probs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise UserError(f"objective: clip={self.clip}: must be positive and finite; 1e-3 to 1e-5 are usual")
        if not 0 <= self.kl < math.inf:
            raise UserError(f"objective: kl={self.kl}: must be 0 or more and finite; 0.004 is usual")
        for name, choices in (("ratio", ("plain", "guard")), ("step_weight", ("none", "rectified"))):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"objective: {name}={value!r}{nearest(value, choices)}")
        if self.ratio == "guard" and self.step_weight == "rectified":
            raise UserError("objective: ratio=guard and step_weight=rectified both even out the steps; choose one")

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def check_rollouts(self, settings: Rollouts) -> None:
        super().check_rollouts(settings)
        if self.step_weight == "rectified" and settings.kernel == "cps":
            raise UserError(
                "objective.step_weight='rectified': its formula is that of kernels whose noise enters the mean as in "
                "Eq. 4, and rollouts.kernel='cps' is none; choose step_weight none, or kernel flow, wan or dance"
            )

    def points(self, rollout: Rollout) -> list[Point]:
        return [Point(record.x, record.t, i) for i, record in enumerate(rollout.records)]

    def describe(self, rollout: Rollout, settings: Rollouts) -> list[tuple[float, float, float]]:
        described = []
        for record in rollout.records:
            std = noise_std(record.t, record.t_next, kernel=settings.kernel, noise_level=settings.noise_level)
            s = std / (record.t - record.t_next).sqrt()
            described.append((record.t.item(), record.t_next.item(), s.item()))
        return described

    def weights(self, points: Sequence[tuple[float, float, float]]) -> list[float]:
        if self.step_weight == "none":
            return super().weights(points)
        t, t_next, s = torch.tensor(points, dtype=torch.float64).unbind(1)
        return objectives.one_step_weight(t, t_next, s).tolist()

    def loss(self, velocity: Tensor, rollout: Rollout, point: Point, given: Given, settings: Rollouts) -> Loss:
        record = rollout.records[point.number]
        times = {"t": record.t, "t_next": record.t_next}
        policy = {"kernel": settings.kernel, "noise_level": settings.noise_level}
        step = sde_step(velocity, record.x, **times, **policy, x_next=record.x_next)  # type: ignore[arg-type]
        assert step.log_prob_B is not None  # records are of stochastic steps
        plain = step.log_prob_B, record.log_prob_B
        if self.ratio == "guard":
            guarded = objectives.guard_log_ratio(*plain, step.mean, record.mean, record.std)
            plain = guarded, torch.zeros_like(guarded)
        clipped = objectives.clipped_objective(*plain, given.advantages_B, self.clip)
        loss_B = given.weight * clipped.loss_B
        logged = {
            "policy/ratio_error": (clipped.ratio_B.detach() - 1).abs(),
            "policy/clip_fraction": clipped.clipped_B.float(),
        }
        if given.reference is not None:
            mean_ref = sde_step(given.reference, record.x, **times, **policy, x_next=record.x_next).mean  # type: ignore[arg-type]
            kl_B = objectives.gaussian_kl(step.mean, mean_ref, record.std)
            loss_B = loss_B + self.kl * kl_B
            logged["policy/kl"] = kl_B.detach()
        return Loss(loss_B, logged)


class Contrast(Objective):
    """DiffusionNFT: samples of high reward as positives and of low reward as negatives, on the forward process.

    No log-probabilities, so rollouts may be deterministic and of any solver. The same loss on the parameters of the
    hierarchical attention alone (`GRPO.contrast`) is our reading of the paper's contrastive mechanism, which its
    introduction names and nothing specifies.

    Args:
        beta: how far the positive and the negative policy lie from the old one; 1 is v+ = v.
        kl: weight of the distance to the reference's velocities.
        bound: advantages at which a sample is wholly a positive or a negative.
        draws: times (and noises) a sample and iteration.
        times: how they are drawn.
        shared_noise: a draw's time and noise are the same for a whole group, so that its members differ by their
            videos alone, as the two of a DPO pair do.

    Raises:
        UserError: for a value that breaks its rule.
    """

    needs_old = True

    def __init__(
        self,
        beta: float = 1.0,
        kl: float = 1e-4,
        bound: float = 5.0,
        draws: int = 2,
        times: TimeSampler | None = None,
        shared_noise: bool = True,
    ) -> None:
        rules = {
            "beta": (0 < beta < math.inf, "positive and finite; 1 is usual"),
            "kl": (0 <= kl < math.inf, "0 or more and finite; 1e-4 is usual"),
            "bound": (0 < bound < math.inf, "positive and finite; 5 is usual"),
            "draws": (draws >= 1, "1 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"contrast: {name}={locals()[name]}: must be {rule}")
        self.beta, self.kl, self.bound, self.draws = beta, kl, bound, draws
        self.times, self.shared_noise = times or LogitNormal(), shared_noise

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def points(self, rollout: Rollout) -> list[Point]:
        found = []
        for number in range(self.draws):
            t_B = self.times(_fresh(self._seeds(rollout), number)).to(rollout.latents.device)
            found.append(Point(interpolate(rollout.latents, self._noise(rollout, number), t_B), t_B, number))
        return found

    def _seeds(self, rollout: Rollout) -> Tensor:
        return torch.full_like(rollout.seeds_B, rollout.group_seed) if self.shared_noise else rollout.seeds_B

    def _noise(self, rollout: Rollout, number: int) -> Tensor:
        shape = tuple(rollout.latents.shape[1:])
        return noise_like(self._seeds(rollout), shape, device=rollout.latents.device, stream=f"contrast/{number}")

    def loss(self, velocity: Tensor, rollout: Rollout, point: Point, given: Given, settings: Rollouts) -> Loss:
        assert given.old is not None
        target = velocity_target(rollout.latents, self._noise(rollout, point.number))
        reference = velocity.detach() if given.reference is None else given.reference
        r_B = objectives.optimality(given.advantages_B, self.bound)
        found = objectives.nft_loss(velocity, given.old, reference, target, r_B, self.beta, self.kl)
        logged = {
            "contrast/loss": found.contrast_B.detach(),
            "contrast/old_distance": objectives.velocity_error(velocity.detach(), given.old),
        }
        if given.reference is not None:
            logged["contrast/reference_distance"] = found.reference_B.detach()
        return Loss(found.loss_B, logged)


def _fresh(seeds_B: Tensor, number: int) -> Tensor:
    """Seeds for one draw of several: a time sampler has a single stream a seed."""
    return seeds_B ^ number

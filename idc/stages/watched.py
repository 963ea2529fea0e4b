"""What is watched of an iteration's rollouts: how far a group's videos differ, and how strongly each step is pushed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from idc.data.ranks import of_all_ranks
from idc.flow.sde import SDERecord, sde_step
from idc.stages.rollouts import Rollout, Rollouts

COORDINATES = 65_536  # of a latent that are compared; a latent of 480 x 832 x 81 has 2.1 million


def watch(rollouts: Sequence[Rollout], advantages_B: Tensor, settings: Rollouts) -> dict[str, float]:
    """What is logged of all ranks' rollouts, the same on all of them; all must call it together.

    Args:
        rollouts: this rank's.
        advantages_B: of the global batch.
        settings: that they were sampled with.

    Returns:
        `watch/diversity` (`diversity` of their last latents) and, for each step k that was stochastic in any of them,
        `signal/step_<k>`: mean |A| times `step_signal` over the rollouts that trained it.
    """
    members: dict[int, list[Tensor]] = {}
    pushes: dict[int, list[float]] = {}
    for rollout in rollouts:
        members.setdefault(rollout.group, []).extend(sketch(rollout.latents))
        sizes = advantages_B[rollout.here].abs().tolist()
        for record in rollout.records:
            factor = step_signal(record, settings)
            pushes.setdefault(record.step, []).extend(size * factor for size in sizes)
    groups = _merged({group: torch.stack(rows) for group, rows in members.items()})
    steps = _merged({step: torch.tensor(values) for step, values in pushes.items()})
    signals = {f"signal/step_{step}": steps[step].mean().item() for step in sorted(steps)}
    return {"watch/diversity": diversity(list(groups.values())), **signals}


def diversity(groups: Sequence[Tensor]) -> float:
    """How far apart the members of a group are: the root mean square difference per coordinate of two of them, its
    mean over the pairs of a group and then over groups. 0 or more, in the unit of the coordinates; 0 is a group of
    copies, and sqrt(2) one of independent samples of variance 1.

    Args:
        groups: `[N, D]` each; those of fewer than 2 members are left out, and 0 is the value of none.
    """
    means = []
    for group_ND in groups:
        if len(group_ND) > 1:
            means.append(torch.pdist(group_ND).mean().item() / group_ND.shape[1] ** 0.5)
    return sum(means) / len(means) if means else 0.0


def sketch(latents: Tensor, most: int = COORDINATES) -> Tensor:
    """At most `most` of each sample's coordinates `[B, ...] -> [B, D]`, float32 on the CPU: always the same ones, drawn
    once for a size, because evenly spaced ones would all lie in a few columns."""
    flat_BD = latents.detach().float().flatten(1)
    if flat_BD.shape[1] > most:
        order = torch.randperm(flat_BD.shape[1], generator=torch.Generator().manual_seed(0))
        flat_BD = flat_BD[:, order[:most].to(flat_BD.device)]
    return flat_BD.cpu()


def step_signal(record: SDERecord, settings: Rollouts) -> float:
    """|d mean / d v| / std of a stochastic step: how far one unit of velocity moves the step's mean, in deviations.

    For the kernels of Eq. 4 it is the bracket of `idc.flow.objectives.one_step_weight`, sqrt(h) / s +
    s sqrt(h) (1 - t) / (2 t); the mean is linear in the velocity, so that it is exact for `cps` as well.
    """
    x = torch.zeros(1, 1, dtype=torch.float64)
    t, t_next = record.t.double().cpu(), record.t_next.double().cpu()
    policy = {"kernel": settings.kernel, "noise_level": settings.noise_level}
    step = sde_step(torch.ones_like(x), x, t, t_next, **policy, x_next=x)  # type: ignore[arg-type]
    return (step.mean.abs() / step.std).item()


def _merged(own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The parts of all ranks, joined by key in the order of ranks."""
    found: dict[int, list[Tensor]] = {}
    for part in of_all_ranks(dict(own)):
        for key, values in part.items():
            found.setdefault(key, []).append(values)
    return {key: torch.cat(values) for key, values in found.items()}

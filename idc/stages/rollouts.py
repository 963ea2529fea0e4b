"""Rollouts: the videos of a group as a stochastic policy samples them, with all that training on them takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from idc.errors import UserError, nearest
from idc.flow.path import Velocity
from idc.flow.samplers import shifted_times
from idc.flow.sde import KERNELS, SDERecord, is_deterministic, sample_sde, sde_steps, seeded_noise
from idc.flow.times import noise_like, uniform_like
from idc.models.conditioning import Features
from idc.models.sampling import Sampler, Sampling
from idc.types import Batch, Sample

WINDOWS = ("all", "sliding", "one")


@dataclass
class Rollouts:
    """How a group's videos are sampled in training.

    Attributes:
        steps, shift, scale, image_scale: of the sampler. Guidance is on in training wherever it is on here.
        kernel, noise_level: of the stochastic steps (`idc.flow.sde`); the paper's are `flow` and 1.0. The kernel `ode`
            draws nothing: then only objectives without log-probabilities train.
        window: which steps are stochastic and trained; the others are Euler's. "all" (the paper), "sliding" (MixGRPO:
            `window_size` steps that move on by one every `window_stride` iterations), or "one" (Flash-GRPO: one step of
            the schedule's first half, the same for a whole group).
        batch: how many videos of a group are sampled, and later trained, at once. Both the same, because sizes change
            the bits of a matrix product, and with them the ratio of a policy to itself.
        shared_noise: all members of a group start from the same noise, as in DanceGRPO.
        cache: compute the subject side once a group and not once a video and step. Exact.

    Raises:
        UserError: for a setting out of its range, or a window without a step that can be stochastic.
    """

    steps: int = 20
    shift: float = 3.0
    scale: float = 1.0
    image_scale: float | None = None
    kernel: str = "flow"
    noise_level: float = 1.0
    window: Literal["all", "sliding", "one"] = "all"
    window_size: int = 4
    window_stride: int = 25
    batch: int = 8
    shared_noise: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        Sampling(self.steps, self.scale, self.image_scale, self.shift)  # checks them
        for name in ("window_size", "window_stride", "batch"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"rollouts: {name}={value}: must be 1 or more")
        if self.window not in WINDOWS:
            raise UserError(f"rollouts: window={self.window!r}{nearest(self.window, WINDOWS)}")
        if self.kernel not in KERNELS:
            raise UserError(f"rollouts: kernel={self.kernel!r}{nearest(self.kernel, KERNELS)}")
        if not is_deterministic(self.kernel, self.noise_level) and not self.possible:
            raise UserError(
                f"rollouts: steps={self.steps}: kernel {self.kernel!r} has no stochastic step in them, as the last is "
                "an ODE step (and flow's first); take 3 steps or more"
            )

    @property
    def sampling(self) -> Sampling:
        """The same sampler without noise."""
        return Sampling(self.steps, self.scale, self.image_scale, self.shift)

    @property
    def times(self) -> Tensor:
        return shifted_times(self.steps, self.shift)

    @property
    def possible(self) -> range:
        """The steps that can be stochastic."""
        return sde_steps(self.times, self.kernel)

    @property
    def stochastic(self) -> bool:
        """Whether there are log-probabilities."""
        return not is_deterministic(self.kernel, self.noise_level)

    def chosen(self, iteration: int, group: str) -> list[int]:
        """The stochastic steps of a group's rollouts, the same on all ranks.

        Args:
            iteration: of the training, from 0.
            group: names the group in this iteration.
        """
        steps = list(self.possible) if self.stochastic else []
        if self.window == "all" or not steps:
            return steps
        if self.window == "one":
            first = steps[: -(-len(steps) // 2)]
            digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
            (u,) = uniform_like([int.from_bytes(digest, "little") >> 1], "window").tolist()
            return [first[int(u * len(first))]]
        size = min(self.window_size, len(steps))
        start = (iteration // self.window_stride) % (len(steps) - size + 1)
        return steps[start : start + size]


@dataclass(frozen=True)
class Rollout:
    """Videos of one group that a rank sampled together.

    Attributes:
        sample: the condition that they share.
        features: its encodings.
        first: place of the first of them in the global batch; they follow each other.
        group: number of the group in the global batch.
        seeds_B: of each, on the CPU.
        group_seed: of all that the group shares in this iteration, the same on all ranks.
        latents: `[B, C, T, H, W]` float32, where the rollout ended.
        records: of the stochastic steps, in float32.
    """

    sample: Sample
    features: Features
    first: int
    group: int
    seeds_B: Tensor
    group_seed: int
    latents: Tensor
    records: tuple[SDERecord, ...]

    def __len__(self) -> int:
        return len(self.seeds_B)

    @property
    def keys(self) -> list[int]:
        """Places in the global batch."""
        return list(range(self.first, self.first + len(self)))

    @property
    def here(self) -> slice:
        """The same as a slice."""
        return slice(self.first, self.first + len(self))


def portions(local: int, group_size: int, most: int) -> int:
    """How many videos are sampled at once where a rank has `local` rollouts: equal parts of a group's share.

    Raises:
        UserError: where a rank's rollouts are neither whole groups nor an equal part of one: ranks would make different
            numbers of forward passes, and wait for each other for ever.
    """
    if local % group_size and group_size % local:
        near = max(1, round(local / group_size)) * group_size
        raise UserError(
            f"data.init_args.batch_size: {local} rollouts a rank in groups of {group_size}: must be whole groups or an "
            f"equal part of one; {near} a rank is the nearest"
        )
    share = min(local, group_size)
    return max(size for size in range(1, min(most, share) + 1) if share % size == 0)


class Place(NamedTuple):
    """What a rank samples in an iteration.

    Attributes:
        batch: `group_size` times each sample in a row, this rank's slice.
        rank: whose slice it is.
        iteration: of the training, from 0.
    """

    batch: Batch
    rank: int
    group_size: int
    iteration: int


def roll_out(
    place: Place,
    settings: Rollouts,
    encode: Callable[[Sequence[Sample]], list[dict[str, Tensor]]],
    sampler: Sampler,
    latent_shape: tuple[int, ...],
    done: Callable[[Rollout], None],
) -> list[Rollout]:
    """Sample the rollouts of this rank's part of a batch, group by group.

    Args:
        encode: features of samples; called once for all conditions of the slice.
        done: called with each as soon as it is there, so that rewards can begin.
    """
    batch, rank, group_size, iteration = place
    size = portions(len(batch), group_size, settings.batch)
    offset = rank * len(batch)
    starts = range(0, len(batch), size)
    leaders = {(offset + start) // group_size: batch.samples[start] for start in starts}
    blind = [replace(sample, video_CTHW=None, loser_CTHW=None) for sample in leaders.values()]
    encoded = dict(zip(leaders, encode(blind), strict=True))
    rollouts: list[Rollout] = []
    velocity: Velocity | None = None
    for start in starts:
        group = (offset + start) // group_size
        if velocity is None or rollouts[-1].group != group:
            velocity = sampler.guided_velocity([encoded[group]], settings.sampling, group=size, cached=settings.cache)
        seeds_B = batch.seeds_B[start : start + size]
        name = f"{batch.epoch}/{batch.index}/{group}"
        group_seed = _group_seed(name)
        initial = [group_seed] * size if settings.shared_noise else seeds_B
        latents, records = sample_sde(
            velocity,
            noise_like(initial, latent_shape, device=sampler.device),
            settings.times,
            kernel=settings.kernel,
            noise_level=settings.noise_level,
            noise=seeded_noise(seeds_B),
            window=settings.chosen(iteration, name),
        )
        sample, features = batch.samples[start], encoded[group]
        rollouts.append(Rollout(sample, features, offset + start, group, seeds_B, group_seed, latents, tuple(records)))
        done(rollouts[-1])
    return rollouts


def _group_seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1

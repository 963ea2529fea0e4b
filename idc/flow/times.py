"""Times t in [0, 1] for training, and the per-sample random streams behind them.

Everything is drawn on the CPU from one `torch.Generator` a sample, seeded by (sample seed, stream name): what a
sample gets depends neither on the others in its batch, nor on their order, nor on the rank or device it runs on.
A sample's noise, time and condition dropout come from streams of different names and are independent.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from idc.errors import UserError
from idc.types import to_device


def generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator for one (seed, stream name) pair; any integer will do as a seed."""
    digest = hashlib.blake2b(f"{int(seed)}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_like(
    seeds_B: Tensor | Iterable[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stream: str = "noise",
) -> Tensor:
    """Standard normal noise `[B, *shape]`, one generator a sample (see the module's text).

    Args:
        seeds_B: one integer a sample.
        shape: of one sample, without the batch.
        dtype: drawn in float32 and then cast, so that two dtypes hold the same noise.
    """
    noise = [torch.randn(tuple(shape), generator=generator(seed, stream), device="cpu") for seed in _integers(seeds_B)]
    return to_device(torch.stack(noise).to(dtype), device)


def uniform_like(seeds_B: Tensor | Iterable[int], stream: str) -> Tensor:
    """One float64 draw from [0, 1) a sample, on the CPU: `(B,)`. For condition dropout, for example."""
    draws = [torch.rand((), generator=generator(seed, stream), dtype=torch.float64) for seed in _integers(seeds_B)]
    return torch.stack(draws)


def shift(t: Tensor, factor: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): moves times towards noise for s > 1 (SD3, arXiv 2403.03206, Eq. 23).

    It keeps 0 and 1, is monotone, and `shift(shift(t, s), 1 / s)` is t.
    """
    return factor * t / (1 + (factor - 1) * t)


class TimeSampler(ABC):
    """Draws training times."""

    @abstractmethod
    def __call__(self, seeds_B: Tensor | Iterable[int]) -> Tensor:
        """One time a sample: float32 `(B,)` in [0, 1], on the CPU."""


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """t uniform on [0, 1), then shifted (1: no shift)."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("shift", self.shift)

    def __call__(self, seeds_B: Tensor | Iterable[int]) -> Tensor:
        return shift(uniform_like(seeds_B, "time"), self.shift).float()


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """logit(t) ~ N(mean, std^2), then shifted: SD3's sampling of times (arXiv 2403.03206, section 3.1).

    A shift s adds log(s) to the mean; the two are kept apart because the sampler's schedule has the same shift.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("std", self.std)
        _check_positive("shift", self.shift)

    def __call__(self, seeds_B: Tensor | Iterable[int]) -> Tensor:
        normal_B = noise_like(seeds_B, (), stream="time").double()
        return shift(torch.sigmoid(self.mean + self.std * normal_B), self.shift).float()


def held_out_times(values: Sequence[float] | None) -> list[float]:
    """The times at which held-out samples are evaluated; None is 0.1 to 0.9 in steps of 0.2.

    Raises:
        UserError: unless there is at least one, each above 0 and at most 1.
    """
    times = [0.1, 0.3, 0.5, 0.7, 0.9] if values is None else list(values)
    if not times or not all(0 < t <= 1 for t in times):
        raise UserError(
            f"validation_times={times}: at least one, each above 0 and at most 1 (noise); "
            "the default is [0.1, 0.3, 0.5, 0.7, 0.9]"
        )
    return times


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name}={value}: must be positive; 1.0 is the neutral choice")


def _integers(seeds_B: Tensor | Iterable[int]) -> list[int]:
    return [int(seed) for seed in (seeds_B.tolist() if isinstance(seeds_B, Tensor) else seeds_B)]

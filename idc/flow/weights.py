"""Weights w(t) of the objective, Eq. 2: L = E[ w(t) || v(z_t, t, C) - (eps - z_0) ||^2 ].

Every weight has mean 1 over uniform t, so that a change of weight is not a change of learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from idc.errors import UserError


class Weight(ABC):
    """w(t)."""

    @abstractmethod
    def __call__(self, t_B: Tensor) -> Tensor:
        """The weight of each time in [0, 1]: positive, of t's shape and dtype, with mean 1 over uniform t."""


@dataclass(frozen=True)
class Uniform(Weight):
    """w(t) = 1: the paper does not say more, and logit-normal times already favour the middle."""

    def __call__(self, t_B: Tensor) -> Tensor:
        return torch.ones_like(t_B)


@dataclass(frozen=True)
class Gaussian(Weight):
    """w(t) proportional to exp(-(t - mean)^2 / (2 std^2)): a bell over the middle times, for use with uniform times."""

    mean: float = 0.5
    std: float = 0.25

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"std={self.std}: must be positive; the default is 0.25")

    def __call__(self, t_B: Tensor) -> Tensor:
        scale = self.std * math.sqrt(2)
        mass = math.erf((1 - self.mean) / scale) - math.erf(-self.mean / scale)
        integral = self.std * math.sqrt(math.pi / 2) * mass
        return torch.exp(-(((t_B - self.mean) / scale) ** 2)) / integral


@dataclass(frozen=True)
class CosMap(Weight):
    """w(t) = 2 / (pi (1 - 2t + 2t^2)): SD3's CosMap density (arXiv 2403.03206, section 3.1) as a weight."""

    def __call__(self, t_B: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t_B + 2 * t_B**2))

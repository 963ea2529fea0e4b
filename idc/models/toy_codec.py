"""An analytic codec with Wan's geometry and no weights: what makes toy latents something that can be looked at.

Every 8x8-pixel cell of the first frame, and every cell of four frames by 8x8 pixels after it, becomes 16 channels: the
coefficients of a cosine transform (DCT-II, orthonormal) in an opponent colour space. The coefficients that carry the
most energy in the toy world are kept; the others are dropped. A cell of the first frame has no temporal coefficients
and spends their five channels on spatial detail.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from idc.models.codecs import Codec

# (opponent colour, temporal, vertical, horizontal frequency) and (mean, std) of the coefficient over 2,000 toy clips.
SHARED = [
    (0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0), (1, 0, 0, 1), (2, 0, 1, 0),
    (2, 0, 0, 1), (0, 0, 2, 0), (0, 0, 1, 1),
]  # fmt: skip
FIRST = [*SHARED, (0, 0, 0, 2), (0, 0, 3, 0), (0, 0, 2, 1), (1, 0, 2, 0), (2, 0, 2, 0)]
LATER = [*SHARED, (0, 1, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0), (2, 1, 0, 0)]
# fmt: off
FIRST_MEAN = [4.99, -0.17, 0.14, 0.08, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00]
FIRST_STD = [4.45, 1.80, 2.04, 1.23, 1.08, 0.65, 0.60, 0.69, 0.62, 0.55, 0.49, 0.46, 0.31, 0.24, 0.33, 0.34]
LATER_MEAN = [9.97, -0.35, 0.29, 0.16, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00]
LATER_STD = [8.74, 3.50, 3.99, 2.26, 1.93, 1.14, 1.06, 1.19, 1.10, 0.89, 0.83, 1.60, 0.94, 0.81, 0.81, 0.83]
# fmt: on
MEAN_STD = 1.65  # of the 48 coefficients of a cell of nine frames


class CosineCodec(Codec):
    """Orthonormal block cosines: `decode` is the adjoint of `encode` up to the affine normalisation per channel.

    `encode(decode(z)) == z` to float32 rounding where the decoded pixels need no clamping. Over toy clips of 9 frames
    at 64x64 the round trip has 25.0 dB (28.0 dB at the first frame and for still pictures).

    Normalisation is half a whitening: a coefficient of standard deviation s is divided by sqrt(s x mean s). Latents
    then have unit variance as a whole, and deviations by channel from 0.4 (fine detail) to 2.3 (brightness), so that
    noise hides detail before it hides layout.
    """

    _loaded_on: torch.device | None = None

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Move to `device`; `dtype` is ignored, the transform runs in float32."""
        if self._loaded_on == torch.device(device):
            return self
        self.device = self._loaded_on = torch.device(device)
        self._first = _basis(FIRST, 1).to(self.device)
        self._later = _basis(LATER, 4).to(self.device)
        mean = torch.tensor([FIRST_MEAN, LATER_MEAN], device=self.device)
        std = torch.tensor([FIRST_STD, LATER_STD], device=self.device)
        self._mean = mean.T[None, :, :, None, None]
        self._scale = (std * MEAN_STD).sqrt().T[None, :, :, None, None]
        return self

    def _identity(self) -> dict[str, Any]:
        kept = {"first": FIRST, "later": LATER}
        return kept | {"mean": [FIRST_MEAN, LATER_MEAN], "std": [FIRST_STD, LATER_STD], "mean_std": MEAN_STD}

    def save(self, folder: Path) -> dict[str, Any]:
        return {}

    def _statistics(self, frames: int) -> tuple[Tensor, Tensor]:
        index = [0] + [1] * (frames - 1)
        return self._mean[:, :, index], self._scale[:, :, index]

    def _encode(self, video_BCTHW: Tensor) -> Tensor:
        video = video_BCTHW.float()
        latents = _analyse(video[:, :, :1], self._first)
        if video.shape[2] > 1:
            latents = torch.cat([latents, _analyse(video[:, :, 1:], self._later)], 2)
        mean, scale = self._statistics(latents.shape[2])
        return (latents - mean) / scale

    def _decode(self, latents_BCTHW: Tensor) -> Tensor:
        mean, scale = self._statistics(latents_BCTHW.shape[2])
        latents = latents_BCTHW.float() * scale + mean
        video = _synthesise(latents[:, :, :1], self._first)
        if latents.shape[2] > 1:
            video = torch.cat([video, _synthesise(latents[:, :, 1:], self._later)], 2)
        return video


def _basis(kept: list[tuple[int, int, int, int]], frames: int) -> Tensor:
    """Orthonormal rows `[16, 3, frames, 8, 8]`, one a kept coefficient."""
    colours = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])  # brightness, red-green, yellow-blue
    colours /= colours.norm(dim=1, keepdim=True)
    time, space = _cosines(frames), _cosines(8)
    rows = [torch.einsum("c,t,h,w->cthw", colours[c], time[t], space[y], space[x]) for c, t, y, x in kept]
    return torch.stack(rows)


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II matrix `[n, n]`, frequency by position."""
    angles = math.pi / n * torch.outer(torch.arange(n), torch.arange(n) + 0.5)
    matrix = torch.cos(angles.double()) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _analyse(video_BCTHW: Tensor, basis: Tensor) -> Tensor:
    kernel = basis.shape[2:]
    return torch.nn.functional.conv3d(video_BCTHW, basis, stride=kernel)


def _synthesise(latents_BCTHW: Tensor, basis: Tensor) -> Tensor:
    return torch.nn.functional.conv_transpose3d(latents_BCTHW, basis, stride=basis.shape[2:])

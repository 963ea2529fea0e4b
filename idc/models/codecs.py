"""Codecs: pixels <-> latents. The base class states the contract; `WanVAECodec` is the paper's."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from idc.errors import UserError
from idc.models.frozen import Frozen, aligned, dtype_name, load_diffusers, resolve, torch_dtype, weights_identity
from idc.types import check_frames

_WAN_VAE = "a Wan VAE: config.json and diffusion_pytorch_model.safetensors"


class Codec(Frozen):
    """Pixels in [-1, 1] <-> normalised latents (about zero mean and unit variance) on Wan's 4x8x8 grid.

    A subclass defines `load`, `_identity`, `_encode` and `_decode`; the checks, the dtypes and `no_grad` are here.
    """

    channels: int = 16
    temporal_factor: int = 4
    spatial_factor: int = 8

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip; raises as `encode` does."""
        check_frames(frames)
        for name, side in (("height", height), ("width", width)):
            if side < self.spatial_factor or side % self.spatial_factor:
                below = max(1, side // self.spatial_factor) * self.spatial_factor
                raise UserError(
                    f"{name}={side}: the codec takes multiples of {self.spatial_factor} pixels; "
                    f"the nearest valid sizes are {below} and {below + self.spatial_factor}"
                )
        factor = self.spatial_factor
        return self.channels, (frames - 1) // self.temporal_factor + 1, height // factor, width // factor

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Encode clips of 4n + 1 frames; an image is a clip of one frame.

        Args:
            video_BCTHW: `[B, 3, T, H, W]` in [-1, 1].

        Returns:
            float32 `[B, 16, (T - 1) / 4 + 1, H / 8, W / 8]`, on the codec's device.

        Raises:
            UserError: for another rank, channel count, number of frames or size.
        """
        self._check(video_BCTHW)
        with self.inference():
            return self._encode(video_BCTHW.to(self.device)).float()

    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Decode normalised latents `[B, 16, T, H, W]` to float32 pixels `[B, 3, 4 (T - 1) + 1, 8 H, 8 W]`, clamped
        to [-1, 1].

        Raises:
            UserError: for another rank or channel count.
        """
        if latents_BCTHW.ndim != 5 or latents_BCTHW.shape[1] != self.channels:
            raise UserError(f"latents of shape {tuple(latents_BCTHW.shape)}: must be [B, {self.channels}, T, H, W]")
        with self.inference():
            return self._decode(latents_BCTHW.to(self.device)).float().clamp(-1, 1)

    def _check(self, video_BCTHW: Tensor) -> None:
        if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != 3:
            raise UserError(f"video of shape {tuple(video_BCTHW.shape)}: must be [B, 3, T, H, W]")
        self.latent_shape(*video_BCTHW.shape[2:])

    @abstractmethod
    def _encode(self, video_BCTHW: Tensor) -> Tensor:
        """Checked pixels, on the codec's device, to normalised latents of any float dtype."""

    @abstractmethod
    def _decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Checked normalised latents, on the codec's device, to pixels of any float dtype and range."""


class WanVAECodec(Codec):
    """Wan2.1's causal 3D VAE (diffusers' `AutoencoderKLWan`), normalised by its config's mean and std per channel.

    Args:
        path: a folder in diffusers' layout, or a hub id.
        subfolder: where the VAE lies in it.
        dtype: of weights and activations; Wan's pipelines run the VAE in float32.
        tiling: encode and decode in overlapping tiles: less memory, a slightly different result. `auto` decodes in
            tiles where the memory that is free on the device does not hold the whole, and says so; it never encodes in
            them, so that cached features do not depend on what else ran.
        decode_dtype: decode in this type, weights and activations: with a copy of the decoder, which the first decoding
            makes. None is `dtype`. bfloat16 takes half the memory, and is off by 0.2 of 255 on average and by 1.2 at
            most on a tiny random VAE (15,360 values): less than the rounding to 8 bits in most pixels.
    """

    def __init__(
        self,
        path: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        subfolder: str = "vae",
        dtype: str | torch.dtype = "float32",
        tiling: bool | Literal["auto"] = "auto",
        decode_dtype: str | torch.dtype | None = None,
    ) -> None:
        self._decoder: Any = None  # a VAE without an encoder, of `decode_dtype`
        self.path, self.subfolder, self.dtype, self.tiling = path, subfolder, torch_dtype(dtype), tiling
        self.decode_dtype = self.dtype if decode_dtype is None else torch_dtype(decode_dtype)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            resolve(self.path, self.subfolder, _WAN_VAE)
            from diffusers import AutoencoderKLWan

            self._model = load_diffusers(AutoencoderKLWan, self.path, self.subfolder, _WAN_VAE, self.dtype)
            if self._model.config.z_dim != self.channels:
                z_dim, self._model = self._model.config.z_dim, None
                raise UserError(f"path={self.path!r}: a VAE of {z_dim} latent channels; Wan2.1's has {self.channels}")
            aligned(self._model)
        self._model.to(self.device)
        if self._decoder is not None:
            self._decoder.to(self.device)
        return self

    def unload(self) -> None:
        super().unload()
        self._decoder = None

    def _decoding(self) -> Any:
        """The VAE that decodes: the one that encodes, or one that shares nothing with it but its settings."""
        if self.decode_dtype is self.dtype:
            return self._model
        if self._decoder is None:
            # Weights of the type, rather than autocast over others: the norms would promote to the weights' type, and
            # all but the convolutions, with what these keep, would be of it.
            decoder = copy.copy(self._model)
            parts = ("post_quant_conv", "decoder")
            decoder._modules = {p: copy.deepcopy(getattr(self._model, p)).to(self.decode_dtype) for p in parts}
            self._decoder = decoder
        return self._decoder

    def _identity(self) -> dict[str, Any]:
        weights = weights_identity(self.path, self.subfolder)
        decode = {} if self.decode_dtype is self.dtype else {"decode_dtype": str(self.decode_dtype)}
        return {"weights": weights, "dtype": str(self.dtype), "tiling": self.tiling is True, **decode}

    def save(self, folder: Path) -> dict[str, Any]:
        self.load(self.device)._model.save_pretrained(folder)
        decode = {} if self.decode_dtype is self.dtype else {"decode_dtype": dtype_name(self.decode_dtype)}
        return {"path": ".", "subfolder": "", "dtype": dtype_name(self.dtype), "tiling": self.tiling, **decode}

    def sample(self, video_BCTHW: Tensor, generator: torch.Generator) -> Tensor:
        """As `encode`, but drawn from the posterior, where `encode` takes its mean."""
        self._check(video_BCTHW)
        with self.inference():
            posterior = self._posterior(video_BCTHW.to(self.device))
            noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device)
            return self._normalise(posterior.mean.float() + posterior.std.float() * noise.to(self.device))

    def _posterior(self, video_BCTHW: Tensor) -> Any:
        self._model.use_tiling = self.tiling is True
        return self._model.encode(video_BCTHW.to(self.dtype)).latent_dist

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config = self._model.config
        mean, std = (torch.tensor(values, device=self.device) for values in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _normalise(self, latents_BCTHW: Tensor) -> Tensor:
        mean, std = self._statistics()
        return (latents_BCTHW - mean) / std

    def _encode(self, video_BCTHW: Tensor) -> Tensor:
        return self._normalise(self._posterior(video_BCTHW).mode().float())

    def _decode(self, latents_BCTHW: Tensor) -> Tensor:
        mean, std = self._statistics()
        latents = (latents_BCTHW.float() * std + mean).to(self.decode_dtype)
        if self.tiling != "auto":
            return self._decoded(latents, self.tiling)
        free = free_memory(self.device)
        if free is None or self.decode_bytes(tuple(latents.shape)) <= free:
            try:
                return self._decoded(latents, False)
            except torch.OutOfMemoryError:
                self._decoding().clear_cache()  # after this block, with which the frames of the failed call go
        if free is not None:
            torch.cuda.empty_cache()
        warnings.warn(
            f"{self.path}: too little memory to decode latents of {list(latents.shape)} at once; in tiles, "
            "whose seams differ a little (codec.tiling)",
            stacklevel=2,
        )
        return self._decoded(latents, True)

    def _decoded(self, latents: Tensor, tiled: bool) -> Tensor:
        model = self._decoding()
        model.use_tiling = tiled
        return model.decode(latents).sample

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """Estimated memory to decode latents `[B, C, T, H, W]` at once, above the weights.

        The decoder takes one latent frame at a time: four frames of the widest activations at full size, about six of
        them alive (the norms of bfloat16 pass through float32, which counts as two), two frames that each of about
        eight causal convolutions keeps, and the pixels twice.
        """
        batch, _, frames, height, width = shape
        pixels = batch * height * width * self.spatial_factor**2
        wide = self._model.config.base_dim * (6 * self.temporal_factor + 2 * 8)
        return pixels * (wide * self.decode_dtype.itemsize + 2 * 3 * frames * self.temporal_factor * 4)


def free_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch could still allocate on a CUDA device, its own unused ones included; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

"""Other systems behind one interface, so that they generate from the same items, through the same stage.

VACE is diffusers' own pipeline. Phantom's way (reference latents as further frames of the backbone's self-attention)
needs no class: it is an `IDCrafterTransformer` with `id_blocks: {layers: 0, joint_references: true, use_vlm: false}`,
trained by `idc fit` or given as `transformer.pretrained` (recipes/baselines/).
A system without code enters as a folder of videos.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor

from idc.errors import UserError
from idc.flow.times import generator
from idc.models.frozen import Frozen, load_weights, resolve, torch_dtype, weights_identity
from idc.models.sampling import Sampling
from idc.types import Bucket, Sample


class Baseline(Frozen):
    """A system that makes one video at a time from a prompt and reference pictures."""

    sampling: Sampling

    @abstractmethod
    def video(self, sample: Sample, bucket: Bucket, seed: int, sampling: Sampling) -> Tensor:
        """A video `[3, T, H, W]` in [-1, 1] of the bucket's size.

        Raises:
            UserError: for what the system cannot do.
        """

    @property
    def identity(self) -> dict[str, Any]:
        """What a video depends on through the system, as plain JSON."""
        return {"system": type(self).__name__, "fingerprint": self.fingerprint}


class VACE(Baseline):
    """Wan2.1-VACE by diffusers' `WanVACEPipeline`, with its own scheduler.

    Args:
        path: a folder in diffusers' layout, or a hub id.
        dtype: of transformer and text encoder; the VAE runs in float32, as published.
        negative_prompt: of the unconditional branch.
        conditioning_scale: weight of the side blocks.
        max_length: tokens per prompt.
    """

    # As published: guidance 5; the shift is the scheduler's own.
    sampling = Sampling(steps=50, scale=5.0)

    def __init__(
        self,
        path: str = "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        dtype: str | torch.dtype = "bfloat16",
        negative_prompt: str = "",
        conditioning_scale: float = 1.0,
        max_length: int = 512,
    ) -> None:
        self.path, self.dtype, self.negative_prompt = path, torch_dtype(dtype), negative_prompt
        self.conditioning_scale, self.max_length = conditioning_scale, max_length

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            expected = "Wan2.1-VACE: model_index.json and the folders that it names"
            resolve(self.path, "", expected, marker="model_index.json")
            try:
                self._model = load_weights(self.path, expected, self._pipeline)
            except UserError as error:
                hint = "give a folder in diffusers' layout, or a hub id that can be reached, as the baseline's `path`"
                raise UserError(f"{error}; {hint}") from None
            self._model.set_progress_bar_config(disable=True)
        self._model.to(self.device)
        return self

    def _pipeline(self) -> Any:
        from diffusers import AutoencoderKLWan, WanVACEPipeline

        vae = AutoencoderKLWan.from_pretrained(self.path, subfolder="vae", torch_dtype=torch.float32)
        return WanVACEPipeline.from_pretrained(self.path, vae=vae, torch_dtype=self.dtype)

    def _identity(self) -> dict[str, Any]:
        parts = ("transformer", "vae", "text_encoder")
        return {
            "weights": [weights_identity(self.path, part) for part in parts],
            "dtype": str(self.dtype),
            "negative_prompt": self.negative_prompt,
            "conditioning_scale": self.conditioning_scale,
            "max_length": self.max_length,
        }

    def video(self, sample: Sample, bucket: Bucket, seed: int, sampling: Sampling) -> Tensor:
        if sampling.image_scale is not None or sampling.solver != "euler" or sampling.rescale:
            raise UserError(
                f"sampling {asdict(sampling)}: VACE knows steps and scale; leave image_scale, solver and rescale out"
            )
        with self.inference():
            output = self._model(
                prompt=sample.caption,
                negative_prompt=self.negative_prompt,
                reference_images=[_pil(subject.image_CHW) for subject in sample.subjects] or None,
                conditioning_scale=self.conditioning_scale,
                height=bucket.height,
                width=bucket.width,
                num_frames=bucket.frames,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.scale,
                generator=generator(seed, "noise"),
                max_sequence_length=self.max_length,
                output_type="pt",
            )
        return output.frames[0].movedim(1, 0).float() * 2 - 1


def _pil(image_CHW: Tensor) -> Any:
    from PIL import Image

    from idc.models.sampling import to_uint8

    return Image.fromarray(to_uint8(image_CHW))

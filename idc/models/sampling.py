"""How a video is sampled from a transformer and its encoders: one way, shared by stages, previews and the pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from idc.errors import UserError
from idc.flow import samplers
from idc.flow.editing import check_strength, edit
from idc.flow.guidance import guide, guided, guided_text_image
from idc.flow.path import Velocity
from idc.flow.times import noise_like
from idc.models.conditioning import Drop, Encoders, Features
from idc.models.step_reuse import Reuse, StepReuse, Tally
from idc.models.subject_cache import JoinedCaches, SubjectCache
from idc.types import Bucket, Condition, Sample

REUSE_SHARDED = (
    "sampling.reuse.threshold={}: ranks that share weights must run the same layers; set 0, or take a strategy that "
    "does not shard (auto, ddp)"
)
FEW_TOKENS = 8192  # of the video in one forward; a clip of 480p and 81 frames has 32,760


@dataclass
class Sampling:
    """How a video is sampled: the paper's Euler with 50 steps and guidance 2.5, shift 3 for 480p and 5 for 720p.

    `image_scale` separates the references' scale from the text's (three forwards); None means one scale (two).
    `rescale` draws the guided velocity's standard deviation back to the conditional one's (0 is plain guidance).
    `reuse` lets steps take over what layers computed in earlier ones; it is off, and not exact.
    """

    steps: int = 50
    scale: float = 2.5
    image_scale: float | None = None
    shift: float = 3.0
    solver: Literal["euler", "heun"] = "euler"
    rescale: float = 0.0
    reuse: Reuse = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        if isinstance(self.reuse, dict):  # of a pipeline's saved settings
            self.reuse = Reuse(**self.reuse)
        rules = {
            "steps": (self.steps >= 1, "at least 1; the paper's is 50"),
            "shift": (0 < self.shift < math.inf, "a number above 0 (1 is none)"),
            "rescale": (0 <= self.rescale <= 1, "between 0 (none) and 1"),
        }
        wrong = [f"{name}={getattr(self, name)}: {rule}" for name, (holds, rule) in rules.items() if not holds]
        if wrong:
            raise UserError(f"sampling: {'; '.join(wrong)}")
        for name in ("scale", "image_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"sampling: {name}={value}: must be a finite number; the paper's is 2.5")

    @property
    def identity(self) -> dict[str, Any]:
        """What a video depends on, as plain JSON."""
        settings = asdict(self)
        del settings["reuse"]
        return settings | ({"reuse": {"threshold": self.reuse.threshold}} if self.reuse else {})

    @property
    def drops(self) -> list[Drop]:
        """The conditions that a step evaluates."""
        if self.image_scale is not None and self.image_scale != self.scale:
            return [Drop.NOTHING, Drop.TEXT, Drop.BOTH]
        return [Drop.NOTHING, Drop.BOTH] if self.scale != 1 else [Drop.NOTHING]


@dataclass
class SamplingChanges:
    """Settings of `Sampling` that differ from a run's own; null leaves them as they were."""

    steps: int | None = None
    scale: float | None = None
    image_scale: float | None = None
    shift: float | None = None
    solver: Literal["euler", "heun"] | None = None
    rescale: float | None = None
    reuse: Reuse | None = None

    def over(self, base: Sampling) -> Sampling:
        """`base` with these changes."""
        return replace(base, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class Source:
    """What an edit starts from.

    Attributes:
        video_BCTHW: in [-1, 1].
        strength: in [0, 1]: the noise level at which it enters (`idc.flow.editing`).
        mask_BTHW: bool, True where it may change; None changes all of it. Outside, pixels are those of the source
            after one trip through the codec, bit for bit.
    """

    video_BCTHW: Tensor
    strength: float
    mask_BTHW: Tensor | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        video, mask = self.video_BCTHW.shape, self.mask_BTHW
        if mask is not None and (mask.dtype is not torch.bool or mask.shape != (video[0], *video[2:])):
            raise UserError(
                f"mask of shape {list(mask.shape[1:])} and {mask.dtype}: must be bool [T, H, W] of the source's size, "
                f"{list(video[2:])}"
            )


@dataclass(frozen=True)
class Sampler:
    """A transformer and its encoders. What comes out depends on these, the sample, its seed and the settings alone.

    Attributes:
        transformer: an `IDCrafterTransformer`.
        encoders: they run on their own device; latents and conditions are moved to `device`.
        device: where the transformer computes.
        dtype: `torch.bfloat16` runs the transformer under autocast; its float32 islands stay.
        batch_guidance: in `videos`, run the two forwards of guidance as one of twice the batch. `auto` does on CUDA for
            up to `FEW_TOKENS`, where one forward leaves much of an H100 idle, and where the weights are sharded, since
            each forward gathers them all. Equal to two forwards but for the rounding of other kernels.
        tally: of forward passes where `Sampling.reuse` is on.
    """

    transformer: Any
    encoders: Encoders
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_guidance: bool | Literal["auto"] = False
    tally: Tally = field(default_factory=Tally, compare=False)

    def autocast(self) -> AbstractContextManager:
        if self.dtype is torch.float32:
            return nullcontext()
        # Its cache would hold a copy of every weight until the forward pass ends, FSDP's gathered ones among them (42
        # GB a rank at 14B), to save a second cast of the few weights that a pass reads twice.
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    def predict_velocity(
        self,
        x_BCTHW: Tensor,
        t_B: Tensor,
        condition: Condition,
        cache: Any = None,
        reuse: StepReuse | None = None,
    ) -> Tensor:
        """v(z_t, t, C) in float32; `t_B` in [0, 1]. With `cache`, the subject side is not computed again."""
        with self.autocast():
            (velocity,) = self.transformer(
                hidden_states=x_BCTHW,
                timestep=t_B * 1000.0,
                encoder_hidden_states=condition.text_BLD,
                condition=None if cache is not None else condition,
                subject_cache=cache,
                return_dict=False,
                reuse=reuse,
            )
        return velocity.float()

    def velocity_function(
        self, condition: Condition, group: int | None = None, cached: bool = True, reuse: StepReuse | None = None
    ) -> Velocity:
        """velocity(x, t) for the samplers, with the subject side computed once where that is exact.

        Args:
            group: one condition for that many videos, as GRPO's groups have it: encoded once for all of them.
            cached: False computes the subject side at every call, for every video.
            reuse: of these videos' steps under this condition.
        """
        cache = self._cache(condition) if cached else None
        if group is not None:
            cache, condition = cache and cache.expand(group), condition.expand(group)

        def velocity(x_BCTHW: Tensor, t: Tensor) -> Tensor:
            t_B = torch.as_tensor(t, dtype=torch.float32, device=x_BCTHW.device).expand(x_BCTHW.shape[0])
            return self.predict_velocity(x_BCTHW, t_B, condition, cache, reuse)

        return velocity

    def _cache(self, condition: Condition) -> SubjectCache | None:
        if self.transformer.config["id_joint_references"]:
            return None
        with self.autocast():
            return self.transformer.build_subject_cache(condition)

    def _batches_guidance(self, videos: int, latent_shape: tuple[int, ...]) -> bool:
        if self.transformer.config["id_joint_references"]:  # their tokens follow the video: nothing can be cached
            return False
        if self.batch_guidance != "auto":
            return self.batch_guidance
        if isinstance(self.transformer, FSDPModule):
            return True
        patch = self.transformer.config["patch_size"]
        tokens = math.prod(size // p for size, p in zip(latent_shape[1:], patch, strict=True))
        return self.device.type == "cuda" and videos * tokens <= FEW_TOKENS

    def _batched_velocity(self, features: Sequence[Features], sampling: Sampling) -> Velocity:
        """Two-forward guidance as one forward: the conditional rows, then the unconditional ones."""
        conditions = [
            self.encoders.condition(features, drop).to(self.device, torch.float32) for drop in (Drop.NOTHING, Drop.BOTH)
        ]
        caches = JoinedCaches(tuple(cache for c in conditions if (cache := self._cache(c)) is not None))
        both = Condition(torch.cat([condition.text_BLD for condition in conditions]))

        def velocity(x_BCTHW: Tensor, t: Tensor) -> Tensor:
            x = torch.cat([x_BCTHW, x_BCTHW])
            t_B = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
            v_cond, v_uncond = self.predict_velocity(x, t_B, both, caches.expand(x.shape[0])).chunk(2)
            return guide(v_cond, v_uncond, sampling.scale, sampling.rescale)

        return velocity

    def _step_reuse(self, sampling: Sampling) -> StepReuse | None:
        if not sampling.reuse:
            return None
        # Ranks whose videos differ would run different layers, and wait for each other's weights or tokens for ever.
        if isinstance(self.transformer, FSDPModule) or hasattr(self.transformer.proj_out.weight, "ds_id"):
            raise UserError(REUSE_SHARDED.format(sampling.reuse.threshold))
        last = samplers.shifted_times(sampling.steps, sampling.shift)[-2].item() * 1000.0
        return StepReuse(sampling.reuse.threshold, last, self.tally)

    def _velocity(self, features: Sequence[Features], sampling: Sampling, latent_shape: tuple[int, ...]) -> Velocity:
        two = sampling.drops == [Drop.NOTHING, Drop.BOTH] and not sampling.reuse  # each forward reuses for itself
        if two and self._batches_guidance(len(features), latent_shape):
            return self._batched_velocity(features, sampling)
        return self.guided_velocity(features, sampling)

    def guided_velocity(
        self, features: Sequence[Features], sampling: Sampling, group: int | None = None, cached: bool = True
    ) -> Velocity:
        """The velocity under guidance for the conditions of `features`; `group` and `cached` as above."""

        def branch(drop: Drop) -> Velocity:
            condition = self.encoders.condition(features, drop).to(self.device, torch.float32)
            return self.velocity_function(condition, group, cached, self._step_reuse(sampling))

        velocity = branch(Drop.NOTHING)
        if Drop.TEXT in sampling.drops:
            assert sampling.image_scale is not None
            references, neither = branch(Drop.TEXT), branch(Drop.BOTH)
            return guided_text_image(
                velocity, references, neither, sampling.scale, sampling.image_scale, sampling.rescale
            )
        if Drop.BOTH in sampling.drops:
            return guided(velocity, branch(Drop.BOTH), sampling.scale, sampling.rescale)
        return velocity

    def latents(
        self, features: Sequence[Features], seeds_B: Tensor, latent_shape: tuple[int, ...], sampling: Sampling
    ) -> Tensor:
        """Latents `[B, *latent_shape]` for the conditions of `features`, from noise seeded per sample."""
        noise = noise_like(seeds_B, latent_shape, device=self.device)
        times = samplers.shifted_times(sampling.steps, sampling.shift)
        return _solver(sampling)(self._velocity(features, sampling, latent_shape), noise, times)

    @torch.no_grad()
    def sampled_latents(
        self,
        samples: Sequence[Sample],
        bucket: Bucket,
        seeds_B: Tensor,
        sampling: Sampling,
        source: Source | None = None,
    ) -> Tensor:
        """As `videos`, before the codec decodes."""
        features = self._features(samples, sampling)
        shape = self.encoders.codec.latent_shape(bucket.frames, bucket.height, bucket.width)
        was_training = self.transformer.training
        self.transformer.eval()
        try:
            if source is None:
                return self.latents(features, seeds_B, shape, sampling)
            return edit(
                lambda: self._velocity(features, sampling, shape),
                self.encoders.codec.encode(source.video_BCTHW).to(self.device),
                noise_like(seeds_B, shape, device=self.device),
                samplers.shifted_times(sampling.steps, sampling.shift),
                source.strength,
                source.mask_BTHW,
                solve=_solver(sampling),
            )
        finally:
            self.transformer.train(was_training)

    def videos(
        self,
        samples: Sequence[Sample],
        bucket: Bucket,
        seeds_B: Tensor,
        sampling: Sampling,
        source: Source | None = None,
    ) -> Tensor:
        """Videos `[B, 3, T, H, W]` in [-1, 1] of the bucket's size for the samples' captions and references.

        Args:
            source: edit it in place of generating from noise; its size is the bucket's.

        Raises:
            UserError: for more references than the transformer takes, or a strength outside [0, 1].
        """
        codec = self.encoders.codec
        video = codec.decode(self.sampled_latents(samples, bucket, seeds_B, sampling, source))
        if source is None or source.mask_BTHW is None:
            return video
        # A codec's decoder looks beyond a cell, so kept latents alone would not keep the pixels.
        kept = codec.decode(codec.encode(source.video_BCTHW))
        return torch.where(source.mask_BTHW[:, None].to(video.device), video, kept)

    def _features(self, samples: Sequence[Sample], sampling: Sampling) -> list[Features]:
        blind = [replace(sample, video_CTHW=None, loser_CTHW=None) for sample in samples]
        for drop in sampling.drops:
            encoded = self.encoders.features(blind, [drop] * len(blind))
            blind = [replace(sample, features=f) for sample, f in zip(blind, encoded, strict=True)]
        return [dict(sample.features or {}) for sample in blind]


def _solver(sampling: Sampling) -> Any:
    return {"euler": samplers.sample_euler, "heun": samplers.sample_heun}[sampling.solver]


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[-1, 1] float to uint8, channels last: CTHW -> THWC, CHW -> HWC."""
    scaled = (pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(0, -1).numpy()

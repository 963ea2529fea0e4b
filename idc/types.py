"""The nouns of the kit, and the one legend of shape suffixes.

A tensor's name ends in its shape: `video_BCTHW`, `tokens_BLD`.

    B batch    N subjects    T frames    C channels    H height    W width    L tokens    D width of a token

The same letters serve for pixels and for latents; the name says which (`video_`, `latents_`).
Pixels are float in [-1, 1]. Time t is in [0, 1]; 1 is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from idc.errors import UserError

TEMPORAL_FACTOR = 4  # Wan's VAE: 4n + 1 frames -> n + 1 latent frames
SPATIAL_MULTIPLE = 16  # 8x VAE, then 2x2 patches
PINNED = 64 * 2**20  # bytes: clips are larger, and pinned memory is kept, rounded up to a power of two


class Bucket(NamedTuple):
    """What all samples of one global batch share: frames, height, width in pixels, and the number of subjects."""

    frames: int
    height: int
    width: int
    subjects: int

    def check(self) -> Bucket:
        """Return self, or raise `UserError` naming the value, the rule and the nearest valid choice."""
        check_frames(self.frames)
        check_side("height", self.height)
        check_side("width", self.width)
        if self.subjects < 0:
            raise UserError(f"subjects={self.subjects}: must be 0 or more")
        return self


def check_frames(frames: int, name: str = "frames") -> None:
    """Raise unless frames = 4n + 1 with n >= 0, the counts that Wan's causal VAE encodes without padding."""
    if frames < 1 or frames % TEMPORAL_FACTOR != 1:
        below = max(1, (frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1)
        raise UserError(
            f"{name}={frames}: a clip has 4n + 1 frames; the nearest valid counts are {below} and {below + 4}"
        )


def check_side(name: str, pixels: int) -> None:
    """Raise unless a side is a positive multiple of 16 pixels (8x codec and 2x2 patches)."""
    if pixels < SPATIAL_MULTIPLE or pixels % SPATIAL_MULTIPLE:
        below = max(SPATIAL_MULTIPLE, pixels // SPATIAL_MULTIPLE * SPATIAL_MULTIPLE)
        above = below + SPATIAL_MULTIPLE
        raise UserError(
            f"{name}={pixels}: must be a multiple of 16 pixels; the nearest valid sizes are {below} and {above}"
        )


def to_device(tensor: Tensor, device: torch.device | str, **kwargs: Any) -> Tensor:
    """`tensor.to(device)`. From the CPU to a GPU by pinned memory: nobody waits for what the GPU does."""
    if tensor.is_cpu and torch.device(device).type == "cuda" and tensor.nbytes <= PINNED:
        return tensor.contiguous().pin_memory().to(device, **{**kwargs, "non_blocking": True})
    return tensor.to(device, **kwargs)


@dataclass(frozen=True)
class Subject:
    """One reference: a picture of somebody or something that the video must show, and the words that name it."""

    image_CHW: Tensor
    name: str = ""


@dataclass(frozen=True)
class Sample:
    """One clip with its caption and references, as a source yields it.

    `id` is unique within a source mix and is all that the sample's randomness depends on besides seed and epoch.
    `meta` is plain JSON (the toy world keeps its ground truth there). `features` are cached encoder outputs by name;
    where they are complete, `video_CTHW` may be None. `loser_CTHW` is the worse clip of a preference pair, whose better
    one is `video_CTHW`; None elsewhere.
    """

    id: str
    caption: str
    video_CTHW: Tensor | None
    subjects: tuple[Subject, ...]
    fps: float
    meta: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, Tensor] | None = None
    loser_CTHW: Tensor | None = None


class Failure(NamedTuple):
    """A sample that could not be read: which, why, and which sample of the same bucket took its place."""

    id: str
    reason: str
    replacement: str


@dataclass(frozen=True)
class Batch:
    """What a loader yields: this rank's slice of one global batch, all of one bucket.

    `seeds_B` (int64) are hash(seed, epoch, sample id): noise, times and condition dropout are drawn from them, so
    that they do not depend on ranks, workers or the order of batches. `samples` keeps references of any size.
    The last `padding` samples repeat others so that every rank runs the same batches: means leave them out.
    """

    samples: tuple[Sample, ...]
    seeds_B: Tensor
    bucket: Bucket
    epoch: int = 0
    index: int = 0
    padding: int = 0
    failures: tuple[Failure, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(sample.caption for sample in self.samples)

    @property
    def video_BCTHW(self) -> Tensor | None:
        """The clips stacked, or None where the samples carry cached latents instead."""
        videos = [sample.video_CTHW for sample in self.samples]
        return None if any(video is None for video in videos) else torch.stack(videos)  # type: ignore[arg-type]

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        """Move every tensor that the encoders or the model read (Lightning calls this). Seeds stay on the CPU."""

        def move(sample: Sample) -> Sample:
            video, loser, features = sample.video_CTHW, sample.loser_CTHW, sample.features
            return replace(
                sample,
                video_CTHW=None if video is None else to_device(video, device, **kwargs),
                loser_CTHW=None if loser is None else to_device(loser, device, **kwargs),
                subjects=tuple(
                    replace(subject, image_CHW=to_device(subject.image_CHW, device, **kwargs))
                    for subject in sample.subjects
                ),
                features=None if features is None else {k: to_device(v, device, **kwargs) for k, v in features.items()},
            )

        return replace(self, samples=tuple(map(move, self.samples)))


@dataclass(frozen=True)
class Condition:
    """What the transformer is conditioned on (the paper's C): text tokens, VLM tokens and reference latents.

    Attributes:
        text_BLD: text-encoder tokens, zero-padded; the backbone attends to the padding as Wan does.
        vlm_BLD: VLM tokens for stage 3, or None without a VLM.
        vlm_mask_BL: True where a VLM token is real; None where there is no padding.
        references: N latents `[B, C, H, W]`, one a subject; within a subject the batch is zero-padded at the right
            and the bottom to a common size. N is 0 where references are dropped for the whole batch.
        reference_sizes_BN2: the true latent (H, W) of each reference, (0, 0) for an absent subject; None where
            nothing is padded or absent, so that no attention mask is needed.
    """

    text_BLD: Tensor
    vlm_BLD: Tensor | None = None
    vlm_mask_BL: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    reference_sizes_BN2: Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move or cast the floating-point tensors, as `Tensor.to`; masks and sizes keep their dtype."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            moved = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        return Condition(
            text_BLD=self.text_BLD.to(*args, **kwargs),
            vlm_BLD=move(self.vlm_BLD),
            vlm_mask_BL=move(self.vlm_mask_BL),
            references=tuple(reference.to(*args, **kwargs) for reference in self.references),
            reference_sizes_BN2=move(self.reference_sizes_BN2),
        )

    def expand(self, batch: int) -> Condition:
        """One sample's condition for `batch` videos, as a group shares it: views, no copies."""

        def grow(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(batch, *tensor.shape[1:])

        return Condition(
            text_BLD=self.text_BLD.expand(batch, *self.text_BLD.shape[1:]),
            vlm_BLD=grow(self.vlm_BLD),
            vlm_mask_BL=grow(self.vlm_mask_BL),
            references=tuple(reference.expand(batch, *reference.shape[1:]) for reference in self.references),
            reference_sizes_BN2=grow(self.reference_sizes_BN2),
        )

"""What a forward pass costs, by formula: operations of the matrix products, convolutions and attentions (2 a MAC).

Elementwise work (norms, rotary embedding, gates, modulation) is left out, as torch's `FlopCounterMode` does; the tests
hold the two equal. A training step of all weights costs 3 forwards, or 4 with full activation checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from idc.types import TEMPORAL_FACTOR, check_frames, check_side

CODEC_FACTOR = 8  # pixels a latent, per side


def forward_flops(
    config: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    text_tokens: int = 512,
    subject_tokens: Sequence[int] = (),
    vlm_tokens: int = 0,
    cached: bool = False,
) -> int:
    """Floating-point operations of `IDCrafterTransformer.forward` for one sample.

    Args:
        config: a transformer's config, with or without the `id_*` settings.
        frames, height, width: of the video, in pixels.
        text_tokens: padded length of the text (Wan's 512).
        subject_tokens: tokens of each reference after the patch embedding (1560 for a 832x480 image).
        vlm_tokens: VLM tokens in stage 3.
        cached: with a `SubjectCache`, whose own cost is then left out.

    Raises:
        UserError: for frames that are not 4n + 1, or sides that are not multiples of 16.
    """
    check_frames(frames)
    check_side("height", height)
    check_side("width", width)
    patch = config["patch_size"]
    grid = ((frames - 1) // TEMPORAL_FACTOR + 1, height // CODEC_FACTOR, width // CODEC_FACTOR)
    video = math.prod(size // p for size, p in zip(grid, patch, strict=True))
    joint = sum(subject_tokens) if config.get("id_joint_references") else 0
    dim = _dim(config)
    volume = math.prod(patch)
    total = 2 * video * dim * volume * (config["in_channels"] + config["out_channels"])
    total += 2 * (config["freq_dim"] * dim + dim * dim + 6 * dim * dim)  # time embedding and its six modulations
    total += 2 * text_tokens * (config["text_dim"] * dim + dim * dim)
    total += config["num_layers"] * _wan_layer(dim, config["ffn_dim"], video + joint, text_tokens)
    if not cached:
        total += 2 * sum(subject_tokens) * dim * volume * config["in_channels"]
    return total + id_flops(config, video, subject_tokens, vlm_tokens, cached)


def id_flops(
    config: Mapping[str, Any], video_tokens: int, subject_tokens: Sequence[int], vlm_tokens: int, cached: bool = False
) -> int:
    """Operations of the id blocks and the VLM projector for one sample (arguments as in `forward_flops`)."""
    dim, subjects = _dim(config), sum(subject_tokens)
    if config.get("vlm_dim") is None or not (config["id_use_vlm"] and config["id_cross_modal"]):
        vlm_tokens = 0
    layer = 0
    if not cached and config.get("id_intra_subject"):
        layer += 8 * subjects * dim**2 + 4 * sum(length**2 for length in subject_tokens) * dim
    if not cached and config.get("id_inter_subject") and len(subject_tokens) > 1:
        layer += 10 * subjects * dim**2 + 4 * sum(length * (subjects - length) for length in subject_tokens) * dim
    memory = subjects + vlm_tokens
    if memory and config.get("id_cross_modal"):
        layer += 4 * video_tokens * dim**2 + 4 * video_tokens * memory * dim
        layer += 0 if cached else 4 * memory * dim**2
    layers = config.get("id_layers", 0)
    projector = 2 * vlm_tokens * (config["vlm_dim"] * dim + dim**2) if vlm_tokens and layers and not cached else 0
    return layers * layer + projector


def _dim(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _wan_layer(dim: int, ffn_dim: int, tokens: int, text_tokens: int) -> int:
    """Self-attention, cross-attention to the text, feed-forward."""
    self_attention = 8 * tokens * dim**2 + 4 * tokens**2 * dim
    cross_attention = 4 * (tokens + text_tokens) * dim**2 + 4 * tokens * text_tokens * dim
    return self_attention + cross_attention + 4 * tokens * dim * ffn_dim


class StepFlops(NamedTuple):
    """Operations of a training step: one forward pass, its backward pass, and what checkpointing computes again."""

    forward: int
    backward: int
    recomputed: int

    @property
    def total(self) -> int:
        """All that the device does."""
        return sum(self)

    @property
    def useful(self) -> int:
        """Without recomputation: what shares of a device's peak are counted in."""
        return self.forward + self.backward

    def times(self, count: float) -> StepFlops:
        """Of that many steps."""
        return StepFlops(*(round(count * part) for part in self))


def step_flops(
    config: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    text_tokens: int = 512,
    subject_tokens: Sequence[int] = (),
    vlm_tokens: int = 0,
    cached: bool = False,
    trainable: str = "full",
    checkpointing: str = "none",
) -> StepFlops:
    """Operations of training on one sample.

    A trained product costs as much again for its input's gradient and for its weight's; a frozen one only the former,
    and an attention twice its own. With `full` the count is exact; what adapters add themselves is left out (at rank
    32 below 1%). A fused attention also recomputes its scores, which no formula here counts, as it is usual.

    Args:
        config to cached: as in `forward_flops`.
        trainable: as in `idc.models.trainable.set_trainable`.
        checkpointing: as in `idc.models.speed.Speed`.

    Raises:
        UserError: as `forward_flops`.
    """
    sizes = (frames, height, width, text_tokens, subject_tokens, vlm_tokens)
    forward = forward_flops(config, *sizes, cached=cached)
    patch, dim = config["patch_size"], _dim(config)
    grid = ((frames - 1) // TEMPORAL_FACTOR + 1, height // CODEC_FACTOR, width // CODEC_FACTOR)
    video = math.prod(size // p for size, p in zip(grid, patch, strict=True))
    joint = sum(subject_tokens) if config.get("id_joint_references") else 0
    blocks = id_flops(config, video, subject_tokens, vlm_tokens, cached)
    projector = blocks - id_flops({**config, "vlm_dim": None}, video, subject_tokens, vlm_tokens, cached)
    attending = _id_attention(config, video, subject_tokens, vlm_tokens, cached)
    layer = _wan_layer(dim, config["ffn_dim"], video + joint, text_tokens)
    layers, head = config["num_layers"], 2 * video * dim * math.prod(patch) * config["out_channels"]
    if trainable == "full":
        # No gradient goes to latents, text, times and reference latents.
        volume = math.prod(patch) * config["in_channels"]
        ends = (video + (0 if cached else sum(subject_tokens))) * dim * volume
        ends += config["freq_dim"] * dim + text_tokens * config["text_dim"] * dim
        backward = 2 * forward - 2 * ends
    else:
        attention = 4 * (video + joint) ** 2 * dim + (4 * (video + joint) * text_tokens * dim)
        text = 4 * text_tokens * dim**2 + 4 * (video + joint) * text_tokens * dim  # no gradient goes to the text
        own = layer + attention - text
        reached = layers if trainable != "id_blocks" or joint else layers - 1  # none before the first id block
        backward = reached * own + head + (2 * blocks if trainable != "lora" else blocks - projector + attending)
    recomputed = 0
    if checkpointing != "none":
        recomputed = layers * layer + blocks - projector
        if checkpointing == "attention":
            recomputed -= layers * 4 * (video + joint) * (video + joint + text_tokens) * dim
            recomputed -= attending
    return StepFlops(forward, backward, recomputed)


def _id_attention(
    config: Mapping[str, Any], video_tokens: int, subject_tokens: Sequence[int], vlm_tokens: int, cached: bool
) -> int:
    """Of `id_flops`, what the attentions themselves take."""
    dim, subjects = _dim(config), sum(subject_tokens)
    pairs = 0
    if not cached and config.get("id_intra_subject"):
        pairs += sum(length**2 for length in subject_tokens)
    if not cached and config.get("id_inter_subject"):
        pairs += sum(length * (subjects - length) for length in subject_tokens)
    if config.get("id_cross_modal"):
        reads = config.get("vlm_dim") is not None and config["id_use_vlm"]
        pairs += video_tokens * (subjects + (vlm_tokens if reads else 0))
    return config.get("id_layers", 0) * 4 * pairs * dim

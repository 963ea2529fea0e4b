"""What a forward pass costs, by formula: operations of the matrix products, convolutions and attentions (2 a MAC).

Elementwise work (norms, rotary embedding, gates, modulation) is left out, as torch's `FlopCounterMode` does; the tests
hold the two equal. A training step costs 3 forwards, or 4 with full activation checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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

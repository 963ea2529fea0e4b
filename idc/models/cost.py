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
    video = _video_tokens(config, frames, height, width)
    dim, volume = _dim(config), math.prod(config["patch_size"])
    total = 2 * video * dim * volume * (config["in_channels"] + config["out_channels"])
    total += 2 * (config["freq_dim"] * dim + dim * dim + 6 * dim * dim)  # time embedding and its six modulations
    total += 2 * text_tokens * (config["text_dim"] * dim + dim * dim)
    joined = _joined(config, video, subject_tokens)
    total += config["num_layers"] * _wan_layer(dim, config["ffn_dim"], joined, text_tokens)
    if not cached:
        total += 2 * sum(subject_tokens) * dim * volume * config["in_channels"]
    return total + id_flops(config, video, subject_tokens, vlm_tokens, cached)


def id_flops(
    config: Mapping[str, Any], video_tokens: int, subject_tokens: Sequence[int], vlm_tokens: int, cached: bool = False
) -> int:
    """Operations of the id blocks and the VLM projector for one sample (arguments as in `forward_flops`)."""
    dim, subjects = _dim(config), sum(subject_tokens)
    layer = 0
    if not cached and config.get("id_intra_subject"):
        layer += 8 * subjects * dim**2 + 4 * sum(length**2 for length in subject_tokens) * dim
    if not cached and config.get("id_inter_subject") and len(subject_tokens) > 1:
        layer += 10 * subjects * dim**2 + 4 * sum(length * (subjects - length) for length in subject_tokens) * dim
    memory = subjects + _read_of_vlm(config, vlm_tokens)
    if memory and config.get("id_cross_modal"):
        layer += 4 * video_tokens * dim**2 + 4 * video_tokens * memory * dim
        layer += 0 if cached else 4 * memory * dim**2
    return config.get("id_layers", 0) * layer + _projector(config, vlm_tokens, cached)


def _read_of_vlm(config: Mapping[str, Any], vlm_tokens: int) -> int:
    """So many of its tokens, or none where the model does not read them."""
    reads = config.get("vlm_dim") is not None and config["id_use_vlm"] and config["id_cross_modal"]
    return vlm_tokens if reads and config.get("id_layers") else 0


def _projector(config: Mapping[str, Any], vlm_tokens: int, cached: bool) -> int:
    tokens = 0 if cached else _read_of_vlm(config, vlm_tokens)
    return 2 * tokens * (config["vlm_dim"] * _dim(config) + _dim(config) ** 2) if tokens else 0


def _dim(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _video_tokens(config: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    grid = ((frames - 1) // TEMPORAL_FACTOR + 1, height // CODEC_FACTOR, width // CODEC_FACTOR)
    return math.prod(size // p for size, p in zip(grid, config["patch_size"], strict=True))


def _joined(config: Mapping[str, Any], video_tokens: int, subject_tokens: Sequence[int]) -> int:
    """Tokens of the backbone's self-attention."""
    return video_tokens + (sum(subject_tokens) if config.get("id_joint_references") else 0)


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
    forward = forward_flops(config, frames, height, width, text_tokens, subject_tokens, vlm_tokens, cached)
    tokens = _Tokens(_video_tokens(config, frames, height, width), text_tokens, subject_tokens, vlm_tokens, cached)
    if trainable == "full":
        backward = 2 * (forward - _at_the_ends(config, tokens))
    else:
        backward = _backward_through_frozen(config, tokens, trainable)
    return StepFlops(forward, backward, _recomputed(config, tokens, checkpointing))


class _Tokens(NamedTuple):
    """Of one sample, as in `forward_flops`."""

    video: int
    text: int
    subjects: Sequence[int]
    vlm: int
    cached: bool


def _at_the_ends(config: Mapping[str, Any], tokens: _Tokens) -> int:
    """Half of what the first products take: no gradient goes to latents, text, times and reference latents."""
    dim = _dim(config)
    patches = tokens.video + (0 if tokens.cached else sum(tokens.subjects))
    total = patches * dim * math.prod(config["patch_size"]) * config["in_channels"]
    return total + config["freq_dim"] * dim + tokens.text * config["text_dim"] * dim


def _backward_through_frozen(config: Mapping[str, Any], tokens: _Tokens, trainable: str) -> int:
    """Where the backbone's weights are frozen: the gradients of its inputs alone, and of the blocks as is trained."""
    dim, joined = _dim(config), _joined(config, tokens.video, tokens.subjects)
    blocks, projector, attending = _id_parts(config, tokens)
    attention = 4 * joined**2 * dim + 4 * joined * tokens.text * dim
    text = 4 * tokens.text * dim**2 + 4 * joined * tokens.text * dim  # no gradient goes to the text
    layer = _wan_layer(dim, config["ffn_dim"], joined, tokens.text) + attention - text
    # Without joint references no gradient goes to what is before the first block.
    before = trainable == "id_blocks" and joined == tokens.video
    head = 2 * tokens.video * dim * math.prod(config["patch_size"]) * config["out_channels"]
    ours = blocks + attending if trainable == "lora" else 2 * (blocks + projector)
    return (config["num_layers"] - before) * layer + head + ours


def _recomputed(config: Mapping[str, Any], tokens: _Tokens, checkpointing: str) -> int:
    """The layers, but with `attention` the products of their attentions; the projector is outside them."""
    if checkpointing == "none":
        return 0
    dim, joined, layers = _dim(config), _joined(config, tokens.video, tokens.subjects), config["num_layers"]
    blocks, _, attending = _id_parts(config, tokens)
    total = layers * _wan_layer(dim, config["ffn_dim"], joined, tokens.text) + blocks
    if checkpointing == "attention":
        total -= layers * 4 * joined * (joined + tokens.text) * dim + attending
    return total


def _id_parts(config: Mapping[str, Any], tokens: _Tokens) -> tuple[int, int, int]:
    """Forward operations of the id blocks, of the VLM projector, and of the blocks' attentions themselves."""
    sizes = (tokens.video, tokens.subjects, tokens.vlm, tokens.cached)
    projector = _projector(config, tokens.vlm, tokens.cached)
    return id_flops(config, *sizes) - projector, projector, _id_attention(config, *sizes)


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
        pairs += video_tokens * (subjects + _read_of_vlm(config, vlm_tokens))
    return config.get("id_layers", 0) * 4 * pairs * dim

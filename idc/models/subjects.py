"""From reference latents to subject tokens, their masks and positions, and their place in the backbone's sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor, nn

from idc.errors import UserError
from idc.models.attention import attend
from idc.models.hierarchy import Rotary, SubjectLayout, rotate
from idc.types import Condition


def embed_references(
    patch_embedding: nn.Conv3d, embedding: Tensor, rope: WanRotaryPosEmbed, condition: Condition
) -> tuple[Tensor, SubjectLayout]:
    """Subject tokens F `[B, S, D]`: each reference through the backbone's own patch embedding, as a one-frame video.

    Args:
        embedding: the subject-index embedding `[max subjects, D]`, added to every token of a subject.

    Raises:
        UserError: for a reference whose latent sides are no multiples of the patch, or sizes that do not fit.
    """
    _, p_h, p_w = patch_embedding.kernel_size
    tokens, tables, masks, lengths, grids = [], [], [], [], []
    for k, reference_BCHW in enumerate(condition.references):
        height, width = reference_BCHW.shape[-2:]
        if height % p_h or width % p_w:
            raise UserError(
                f"reference {k} has latents of {height}x{width}: both must be multiples of the patch {p_h}x{p_w}, "
                f"such as {max(1, height // p_h) * p_h}x{max(1, width // p_w) * p_w}"
            )
        frame = reference_BCHW.to(patch_embedding.weight.dtype).unsqueeze(2)
        embedded_BLD = patch_embedding(frame).flatten(2).transpose(1, 2)
        tokens.append(embedded_BLD + embedding[k].type_as(embedded_BLD))
        grid = (height // p_h, width // p_w)
        grids.append(grid)
        tables.append(grid_rotary(rope, 0, *grid))
        lengths.append(grid[0] * grid[1])
        if condition.reference_sizes_BN2 is not None:
            masks.append(_real_tokens(condition.reference_sizes_BN2[:, k], grid, (p_h, p_w), embedded_BLD.device))
    rotary = _concatenate(tables)
    layout = SubjectLayout(tuple(lengths), tuple(grids), rotary, torch.cat(masks, dim=1) if masks else None)
    return torch.cat(tokens, dim=1), layout


def _real_tokens(size_B2: Tensor, grid: tuple[int, int], patch: tuple[int, int], device: torch.device) -> Tensor:
    """True where a token of the padded grid lies inside the reference's own latents."""
    size_B2 = size_B2.to(device)
    rows = torch.arange(grid[0], device=device) * patch[0] < size_B2[:, :1]
    columns = torch.arange(grid[1], device=device) * patch[1] < size_B2[:, 1:]
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def grid_rotary(rope: WanRotaryPosEmbed, frame: int, rows: int, columns: int) -> Rotary:
    """Wan's rotary tables `[1, rows * columns, 1, E]` of one frame's grid, at any frame position."""

    def table(freqs: Tensor) -> Tensor:
        t, h, w = freqs.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)
        parts = (t[frame, None, None], h[:rows, None], w[None, :columns])
        return torch.cat([part.expand(rows, columns, -1) for part in parts], dim=-1).reshape(1, rows * columns, 1, -1)

    return table(rope.get_buffer("freqs_cos")), table(rope.get_buffer("freqs_sin"))


class SubjectSide(NamedTuple):
    """What the id blocks read of a condition.

    Attributes:
        tokens_BSD, layout: F at the first block, and where each subject lies in it; None without references.
        vlm_BMD: projected VLM tokens; None without.
        mask_BM: which keys of S3 are real, subjects first; None where all are, for backends that refuse masks.
    """

    tokens_BSD: Tensor | None = None
    layout: SubjectLayout | None = None
    vlm_BMD: Tensor | None = None
    mask_BM: Tensor | None = None

    @classmethod
    def build(
        cls, tokens_BSD: Tensor | None, layout: SubjectLayout | None, vlm_BMD: Tensor | None, vlm_mask_BL: Tensor | None
    ) -> SubjectSide:
        """With the masks of references and VLM tokens joined."""
        masks = (layout.mask_BS if layout is not None else None, vlm_mask_BL if vlm_BMD is not None else None)
        if all(mask is None for mask in masks):
            return cls(tokens_BSD, layout, vlm_BMD)
        parts = []
        for tokens, mask in zip((tokens_BSD, vlm_BMD), masks, strict=True):
            if tokens is not None:
                full = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
                parts.append(full if mask is None else mask.to(tokens.device, torch.bool))
        return cls(tokens_BSD, layout, vlm_BMD, torch.cat(parts, dim=1))

    @property
    def batch(self) -> int | None:
        """The number of samples, or None where there is nothing to read."""
        some = self.tokens_BSD if self.tokens_BSD is not None else self.vlm_BMD
        return None if some is None else some.shape[0]

    def check_batch(self, videos: int) -> None:
        """Raises `UserError` where there is something to read for another number of videos."""
        if self.batch not in (None, videos):
            raise UserError(f"a condition of {self.batch} samples for {videos} videos: the batch sizes must be equal")


def _concatenate(tables: list[Rotary]) -> Rotary:
    return torch.cat([cos for cos, _ in tables], dim=1), torch.cat([sin for _, sin in tables], dim=1)


def joint_rotary(
    rope: WanRotaryPosEmbed, rotary: Rotary, video_BLD: Tensor, layout: SubjectLayout, timestep: Tensor, frames: int
) -> tuple[Tensor, ...]:
    """Rotary tables of video tokens, then reference tokens, as one sequence of the backbone's self-attention.

    Reference k stands at frame T + k with its own rows and columns. The result is what a Wan block takes, with the
    sequence's key mask as a third element where references are padded (see `VideoAttnProcessor`).

    Args:
        rotary: the video's own.

    Raises:
        UserError: for a time per token, which references have not.
    """
    if timestep.ndim != 1:
        raise UserError("id_joint_references=True needs one timestep a sample, not one a token")
    joint = _concatenate([rotary, *(grid_rotary(rope, frames + k, *grid) for k, grid in enumerate(layout.grids))])
    if layout.mask_BS is None:
        return joint
    video = torch.ones(video_BLD.shape[:2], dtype=torch.bool, device=video_BLD.device)
    return *joint, torch.cat([video, layout.mask_BS], dim=1)[:, None, None]


class VideoAttnProcessor(WanAttnProcessor):
    """Wan's attention in the precision of its values, for every backend, and with a key mask for self-attention.

    Wan's block has no argument for a mask, so it comes with the rotary tables (`joint_rotary`).
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        if rotary_emb is not None and len(rotary_emb) == 3:
            rotary_emb, attention_mask = rotary_emb[:2], rotary_emb[2]
        if attn.add_k_proj is not None or attn.fused_projections:  # image-to-video, and inference that fused them
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source)), attn.to_v(source))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        out = attend(query, key, value, attention_mask, self._attention_backend).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out.type_as(value)))

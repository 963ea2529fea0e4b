"""Hierarchical identity-preserving attention: the paper's three stages as one block (section A.1, Eqs. S.9 to S.11).

    S1  F'_k  = F_k  + O1 Attn(LN F_k)                                             each subject alone
    S2  F''_i = F'_i + sigmoid(Wg LN F'_i + b) * O2 Attn(q = LN F'_i, kv = LN F'_{j != i})
    S3  Z'    = Z    + O3 Attn(q = LN Z, kv = [LN F''_1 .. LN F''_N ; VLM])

F are the subjects' reference tokens, Z the video's; F'' goes on to the next layer's block. Nothing on the right of S1,
S2 and S3's keys and values depends on t or Z, so they can be computed once per video (`idc.models.subject_cache`).
Departures from the paper, which leaves these open: layer norms before each stage, Wan's RMS norm of queries and keys,
RoPE in S1 only (every subject at t = 0 with its own grid), a gate that starts nearly shut, and O3 = 0 at the start.

Shapes as in `idc.types`; besides, S counts the tokens of all subjects together, M the keys of S3 (S + VLM tokens),
A the attention heads and E their size (D = A * E).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from idc.models.attention import attend

KeysValues = tuple[Tensor, Tensor]  # each [B, M, A, E]
Rotary = tuple[Tensor, Tensor]  # cosine and sine, each [1, L, 1, E], every value twice as in Wan's tables


class SubjectLayout(NamedTuple):
    """Where each subject lies in a `[B, S, D]` sequence of reference tokens.

    Attributes:
        lengths: tokens of each subject, padding included; they add up to S.
        grids: rows and columns of each subject; a length is their product.
        rotary: S1's rotary tables, `[1, S, 1, E]`: every subject at t = 0 with its own rows and columns.
        mask_BS: True where a token is real; None where all are, so that attention gets no mask.
    """

    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    rotary: Rotary
    mask_BS: Tensor | None = None

    def split(self, x_BSx: Tensor) -> list[Tensor]:
        """One tensor a subject."""
        return list(x_BSx.split(list(self.lengths), dim=1))

    def split_mask(self) -> list[Tensor | None]:
        """One mask `[B, L_k]` a subject, or None each."""
        return [None] * len(self.lengths) if self.mask_BS is None else [*self.split(self.mask_BS)]


def rotate(x_BLAE: Tensor, rotary: Rotary) -> Tensor:
    """Rotate consecutive pairs of channels by each token's angles, in the tables' precision (RoPE)."""
    even, odd = x_BLAE.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_BLAE)


class SubjectAttention(WanAttention):
    """Wan's attention in three steps, so that keys and values can be computed apart from queries and kept.

    The kernel is diffusers' dispatch: `set_attention_backend` and the `attention_backend` context reach it, as far as
    there is no mask (`idc.models.attention`).
    """

    _supports_qkv_fusion = False  # the steps below read the separate projections
    lengths_vary = True  # from sample to sample: `idc.models.attention` then wants a backend that plans nothing

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim=dim, heads=heads, dim_head=dim // heads, eps=eps, processor=WanAttnProcessor())

    def queries(self, x_BLD: Tensor, rotary: Rotary | None = None) -> Tensor:
        """`[B, L, A, E]`."""
        return self._normalise(self.to_q(x_BLD), self.norm_q, rotary)

    def keys_values(self, x_BMD: Tensor, rotary: Rotary | None = None) -> KeysValues:
        """Two tensors `[B, M, A, E]`."""
        key = self._normalise(self.to_k(x_BMD), self.norm_k, rotary)
        return key, self.to_v(x_BMD).unflatten(-1, (self.heads, -1))

    def attend(self, query_BLAE: Tensor, key_BMAE: Tensor, value_BMAE: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Output-projected attention `[B, L, D]`, exactly 0 for a sample whose mask is False everywhere."""
        mask = blank_B11 = None
        if mask_BM is not None:
            # A softmax over nothing is NaN on some backends: such a sample attends to everything, then is blanked.
            blank_B11 = ~mask_BM.any(dim=1)[:, None, None]
            mask = (mask_BM[:, None, None] | blank_B11[:, None]).contiguous()
        processor: Any = self.processor
        out = attend(query_BLAE, key_BMAE, value_BMAE, mask, processor._attention_backend)
        out = self.to_out[1](self.to_out[0](out.flatten(2, 3).type_as(query_BLAE)))
        return out if blank_B11 is None else out.masked_fill(blank_B11, 0.0)

    def _normalise(self, projected_BLD: Tensor, norm: nn.Module, rotary: Rotary | None) -> Tensor:
        # Autocast may run the norm in float32; the cache should hold what attention reads.
        heads = norm(projected_BLD).type_as(projected_BLD).unflatten(-1, (self.heads, -1))
        return heads if rotary is None else rotate(heads, rotary)


class HierarchyBlock(nn.Module):
    """S1 to S3 of one layer. A stage that is switched off has no modules at all.

    Args:
        dim, heads, eps: the backbone's width, number of heads and norm epsilon.
        intra_subject, inter_subject, cross_modal: S1, S2, S3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        eps: float = 1e-6,
        intra_subject: bool = True,
        inter_subject: bool = True,
        cross_modal: bool = True,
    ) -> None:
        super().__init__()
        self.intra_subject, self.inter_subject, self.cross_modal = intra_subject, inter_subject, cross_modal
        # No parameter is called norm1, norm2 or norm3: diffusers would keep it in float32 by that name alone.
        if intra_subject:
            self.intra_norm = FP32LayerNorm(dim, eps)
            self.intra_attn = SubjectAttention(dim, heads, eps)
        if inter_subject:
            self.inter_norm = FP32LayerNorm(dim, eps)
            self.inter_attn = SubjectAttention(dim, heads, eps)
            self.inter_gate = nn.Linear(dim, dim)
        if cross_modal:
            self.cross_video_norm = FP32LayerNorm(dim, eps)
            self.cross_subject_norm = FP32LayerNorm(dim, eps)
            self.cross_attn = SubjectAttention(dim, heads, eps)

    def forward(
        self,
        video_BLD: Tensor | None,
        subjects_BSD: Tensor | None,
        layout: SubjectLayout | None = None,
        vlm_BMD: Tensor | None = None,
        mask_BM: Tensor | None = None,
        memory: KeysValues | None = None,
    ) -> tuple[Tensor | None, Tensor | None, KeysValues | None]:
        """Z' and F'', or with `video_BLD=None` F'' and S3's keys and values, to be kept.

        One forward for all uses, because FSDP gathers a block's parameters around its forward alone; and tensors as
        plain arguments, because its backward hooks see no others.

        Args:
            video_BLD: Z, or None to compute the subject side alone.
            subjects_BSD: F, described by `layout`; None without references, or with `memory`.
            vlm_BMD: projected VLM tokens, for S3.
            mask_BM: which keys of S3 are real, subjects first; None where all are.
            memory: S3's keys and values from an earlier call; S1 and S2 are then skipped.

        Returns:
            Z', F'' (each None where its input is) and the keys and values (None unless `video_BLD` is None).
        """
        idle = set(self.children())
        if subjects_BSD is not None:
            assert layout is not None
            subjects_BSD = self._between_subjects(self._within_subjects(subjects_BSD, layout, idle), layout, idle)
        if self.cross_modal and memory is None:
            memory = self._memory(subjects_BSD, vlm_BMD, idle)
        if video_BLD is None:
            return None, subjects_BSD, memory
        if memory is not None:
            idle -= {self.cross_video_norm, self.cross_attn}
            query = self.cross_attn.queries(self.cross_video_norm(video_BLD))
            video_BLD = video_BLD + self.cross_attn.attend(query, *memory, mask_BM)
        if self.training and torch.is_grad_enabled():
            # Without S3 the last layer's F'' may lead nowhere: then nothing of the block is sure to get a gradient.
            unused = idle if self.cross_modal else self.children()
            video_BLD = add_idle(video_BLD, (p for module in unused for p in module.parameters()))
        return video_BLD, subjects_BSD, None

    def _within_subjects(self, subjects_BSD: Tensor, layout: SubjectLayout, idle: set[nn.Module]) -> Tensor:
        """S1, Eq. S.9."""
        if not self.intra_subject:
            return subjects_BSD
        idle -= {self.intra_norm, self.intra_attn}
        attention = self.intra_attn
        x = self.intra_norm(subjects_BSD)
        key, value = attention.keys_values(x, layout.rotary)
        each = zip(
            layout.split(attention.queries(x, layout.rotary)),
            layout.split(key),
            layout.split(value),
            layout.split_mask(),
            strict=True,
        )
        return subjects_BSD + torch.cat([attention.attend(q, k, v, mask) for q, k, v, mask in each], dim=1)

    def _between_subjects(self, subjects_BSD: Tensor, layout: SubjectLayout, idle: set[nn.Module]) -> Tensor:
        """S2, Eq. S.10. A single subject has nobody to look at."""
        count = len(layout.lengths)
        if not self.inter_subject or count < 2:
            return subjects_BSD
        idle -= {self.inter_norm, self.inter_attn, self.inter_gate}
        x = self.inter_norm(subjects_BSD)
        queries = layout.split(self.inter_attn.queries(x))
        keys, values = (layout.split(part) for part in self.inter_attn.keys_values(x))
        masks: Any = layout.split_mask()
        outputs = []
        for i in range(count):
            others = [j for j in range(count) if j != i]
            mask = None if layout.mask_BS is None else torch.cat([masks[j] for j in others], dim=1)
            key, value = (torch.cat([part[j] for j in others], dim=1) for part in (keys, values))
            outputs.append(self.inter_attn.attend(queries[i], key, value, mask))
        return subjects_BSD + torch.sigmoid(self.inter_gate(x)) * torch.cat(outputs, dim=1)

    def _memory(self, subjects_BSD: Tensor | None, vlm_BMD: Tensor | None, idle: set[nn.Module]) -> KeysValues | None:
        """S3's keys and values, Eq. S.11, or None where there is nothing to attend to."""
        tokens = []
        if subjects_BSD is not None:
            idle.discard(self.cross_subject_norm)
            tokens.append(self.cross_subject_norm(subjects_BSD))
        if vlm_BMD is not None:
            tokens.append(vlm_BMD)
        return self.cross_attn.keys_values(torch.cat(tokens, dim=1)) if tokens else None


class VLMProjector(nn.Module):
    """The VLM's hidden states `[B, L, vlm_dim]` to tokens of the backbone's width, for S3: LN, Linear, GELU, Linear."""

    def __init__(self, vlm_dim: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.input_norm = FP32LayerNorm(vlm_dim, eps)
        self.linear_in = nn.Linear(vlm_dim, dim)
        self.linear_out = nn.Linear(dim, dim)

    def forward(self, vlm_BLV: Tensor) -> Tensor:
        """`[B, L, D]`."""
        hidden = self.linear_in(self.input_norm(vlm_BLV.to(self.linear_in.weight.dtype)))
        return self.linear_out(nn.functional.gelu(hidden, approximate="tanh"))


def add_idle(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x`, unchanged in value, with a zero gradient for each of `parameters` that is trained.

    A rank whose sample lost its references would otherwise skip gradient reductions in which the other ranks wait
    (DDP and FSDP2 alike).
    """
    zeros = [parameter.flatten()[0].float() * 0 for parameter in parameters if parameter.requires_grad]
    return x + torch.stack(zeros).sum().type_as(x) if zeros else x

"""Looking inside the hierarchical attention: who attends to whom, in each of its three stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from idc.models.hierarchy import HierarchyBlock, SubjectAttention
from idc.models.transformer import IDCrafterTransformer

STAGES = {"intra_attn": "intra", "inter_attn": "inter", "cross_attn": "cross"}


class AttentionMap(NamedTuple):
    """One call of one attention.

    Attributes:
        block: index of the hierarchical block.
        stage: "intra" (within a subject), "inter" (a subject to the others) or "cross" (video to subjects and VLM).
        weights_BALM: softmax over the keys, float32 on the CPU: A heads, L queries, M keys. In "cross" the keys are
            the subjects' tokens in order, then the VLM's; "intra" and "inter" have one call a subject.
    """

    block: int
    stage: str
    weights_BALM: Tensor


@contextmanager
def record_attention(transformer: IDCrafterTransformer) -> Iterator[list[AttentionMap]]:
    """Collect the attention of every call within the context; outputs are what they are without it, bit for bit.

    The subject side runs once a video (`build_subject_cache`), stage "cross" once a denoising step and guidance branch.

    Yields:
        a list that fills in the order of the calls.
    """
    maps: list[AttentionMap] = []
    watched: list[SubjectAttention] = []
    for index, block in enumerate(transformer.id_blocks):
        assert isinstance(block, HierarchyBlock)
        for name, child in block.named_children():
            if name in STAGES:
                assert isinstance(child, SubjectAttention)
                _watch(child, index, STAGES[name], maps)
                watched.append(child)
    try:
        yield maps
    finally:
        for attention in watched:
            del attention.attend


def attention_weights(query_BLAE: Tensor, key_BMAE: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(E)) over the keys `[B, A, L, M]`, float32; 0 for a sample that has no key."""
    scores_BALM = torch.einsum("blae,bmae->balm", query_BLAE.float(), key_BMAE.float()) / query_BLAE.shape[-1] ** 0.5
    if mask_BM is not None:
        scores_BALM = scores_BALM.masked_fill(~mask_BM[:, None, None], -torch.inf)
    return scores_BALM.softmax(-1).nan_to_num(0.0)


def subject_shares(weights_BALM: Tensor, lengths: list[int]) -> Tensor:
    """How much each query of stage "cross" looks at each subject.

    Args:
        weights_BALM: of stage "cross".
        lengths: tokens of each subject, in order; what follows them are the VLM's.

    Returns:
        `[B, L, N + 1]`, mean over heads; the last is the VLM's share. Each query's sum to 1.
    """
    sizes = [*lengths, weights_BALM.shape[-1] - sum(lengths)]
    parts = weights_BALM.mean(1).split(sizes, dim=-1)
    return torch.stack([part.sum(-1) for part in parts], dim=-1)


def _watch(attention: SubjectAttention, block: int, stage: str, maps: list[AttentionMap]) -> None:
    attend = attention.attend

    def recorded(query: Tensor, key: Tensor, value: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        weights = attention_weights(query.detach(), key.detach(), mask_BM)
        maps.append(AttentionMap(block, stage, weights.cpu()))
        return attend(query, key, value, mask_BM)

    attention.attend = recorded  # type: ignore[method-assign, assignment]  # of this instance, until the context ends

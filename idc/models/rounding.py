"""Which weights bfloat16 autocast rounds, matrices and not Wan's float32 islands, and rounding them for good.

One rule for sharding (what travels in bfloat16), generation, exports and the planner. It is autocast's own, so that a
model whose weights are rounded computes, under that autocast, what the whole one does, bit for bit. diffusers' rule
(`_keep_in_fp32_modules`, by names) rounds the norms of queries and keys and the patch embedding as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from idc.models.transformer import IDCrafterTransformer


def units_of(model: IDCrafterTransformer) -> list[nn.Module]:
    """What holds nearly all weights: the embedder of times and texts, and the layers. FSDP gathers each by itself."""
    return [model.condition_embedder, *model.blocks, *model.id_blocks]


def islands(unit: nn.Module) -> list[nn.Parameter]:
    """Parameters that bfloat16 autocast leaves in float32: all but those of linear layers, and the time embedder's."""
    cast = {
        parameter
        for module in _under_autocast(unit)
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    return [parameter for parameter in unit.parameters() if parameter not in cast]


def round_matrices(model: IDCrafterTransformer, dtype: torch.dtype = torch.bfloat16) -> None:
    """Keep in `dtype` what autocast in it converts in every forward pass: outputs stay as they are, bit for bit.

    The few weights outside `units_of` stay in float32. Where weights are trained they must not be rounded.

    Args:
        dtype: float32 leaves all as it is.
    """
    for unit in units_of(model):
        kept = {*islands(unit)}
        for parameter in unit.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.to(dtype)


def _under_autocast(module: nn.Module) -> Iterator[nn.Module]:
    from idc.models.transformer import TimeEmbedding

    if not isinstance(module, TimeEmbedding):
        yield module
        for child in module.children():
            yield from _under_autocast(child)

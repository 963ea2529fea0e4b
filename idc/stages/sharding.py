"""FSDP2: build a transformer sharded over ranks, with its weights loaded on one rank alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from idc.models.transformer import IDCrafterTransformer


def is_sharding(strategy: Any) -> bool:
    """Whether the strategy is Lightning's FSDP2 (`ModelParallelStrategy`)."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    return isinstance(strategy, ModelParallelStrategy)


def build_sharded(build: Callable[[str], IDCrafterTransformer], strategy: Any) -> IDCrafterTransformer:
    """`fully_shard` every layer and the root, then fill the shards from rank 0's weights.

    Args:
        build: makes the model on "cpu" (with weights) or on "meta" (structure alone). Only rank 0 builds with
            weights, so that a 14B model is in host memory once and not once a rank.
        strategy: a `ModelParallelStrategy` whose processes have started.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = strategy.device_mesh["data_parallel"]
    source = build("cpu").state_dict() if dist.get_rank() == 0 else {}
    model = build("meta")
    for layer in [*model.blocks, *model.id_blocks]:
        fully_shard(layer, mesh=mesh)
    # By default the root keeps its gathered weights after a forward without a backward (a preview), and whatever
    # reads or swaps parameters then would see stale ones.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=strategy.root_device)
    model.refresh_rotary_tables()  # in no state dict, and `to_empty` left garbage in them
    set_model_state_dict(model, source, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model

"""What the processes of a run say to each other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank, on all of them, in their order. All must call this together."""
    if not several_ranks():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

"""What the processes of a run say to each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# gloo tells at once of a rank that is gone, and `HangWatchdog` of one that hangs; slow ranks may take what they need.
PATIENCE = timedelta(days=1)
_CPU_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by the group of all ranks


class DataPlace(NamedTuple):
    """Where a process stands among those that get samples of their own.

    Attributes:
        rank, ranks: its data-parallel rank, and how many there are.
        number, together: which of so many neighbouring processes it is that compute the same samples together, as the
            ranks of one sequence do (`idc.models.sequence_parallel`).
    """

    rank: int
    ranks: int
    number: int = 0
    together: int = 1

    @property
    def leads(self) -> bool:
        """Whether it writes what comes out of them."""
        return self.number == 0

    @property
    def alone(self) -> DataPlace:
        """Its place in work that each of them does by itself, such as encoding."""
        return DataPlace(self.rank * self.together + self.number, self.ranks * self.together)


def data_place(trainer: Any) -> DataPlace:
    """Of a trainer's process; the only one without a trainer."""
    strategy = getattr(trainer, "strategy", None)
    given = getattr(strategy, "distributed_sampler_kwargs", None)
    if not given:
        return DataPlace(0, 1)
    rank, ranks = given["rank"], given["num_replicas"]
    together = getattr(strategy, "world_size", ranks) // ranks
    if together < 2:
        return DataPlace(rank, ranks)
    return DataPlace(rank, ranks, trainer.global_rank % together, together)


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank, on all of them, in their order. All must call this together; the first may come hours
    before the last, as where one loads weights for all, which the device's collectives do not wait for."""
    if not several_ranks():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def wait_for_all_ranks() -> None:
    """Until all are here; as `of_all_ranks`."""
    any_rank(False)


def any_rank(told: bool) -> bool:
    """Whether any rank says so. All must call this together.

    Asked in every batch, and so over the CPU: through NCCL, the answer would wait for all that the device has to do.
    """
    if not several_ranks():
        return told
    said = torch.tensor(int(told), device="cpu")
    dist.all_reduce(said, dist.ReduceOp.MAX, group=_cpu_group())
    return bool(said)


def every_rank(told: bool) -> bool:
    """Whether all ranks say so; as `any_rank`."""
    return not any_rank(not told)


def _cpu_group() -> Any:
    everybody = dist.group.WORLD
    if everybody not in _CPU_GROUPS:
        _CPU_GROUPS[everybody] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _CPU_GROUPS[everybody]

"""FSDP2: weights sharded over ranks, replicated over nodes if wanted, and sequences spread over ranks.

    ranks = data_parallel_size x tensor_parallel_size      who gets a batch of its own, and who shares it (a sequence)
    ranks = replicas x shards                              where the weights lie

The two layouts are independent. Weights are sharded over the ranks of a sequence, too: all of them hold a part of every
layer, and FSDP's mean of the gradients over all ranks is the one that `idc.models.sequence_parallel` is made for.
Lightning's tensor-parallel dimension carries the sequence; its weights are not split by tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from idc.data.ranks import of_all_ranks
from idc.errors import UserError, counted
from idc.models.rounding import islands, units_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from idc.models.transformer import IDCrafterTransformer


class FSDP2(ModelParallelStrategy):
    """Lightning's FSDP2 whose sizes follow from the devices and nodes, with hybrid sharding (HSDP).

    Args:
        replicas: copies of the weights, each sharded over the neighbouring `ranks / replicas`; gradients are scattered
            within a copy and averaged between copies. 1 shards over all ranks; "nodes" keeps one copy a node, so that
            weights are gathered within nodes alone.
        data_parallel_size: ranks with batches of their own; "auto" is `ranks / tensor_parallel_size`.
        tensor_parallel_size: neighbouring ranks over which the tokens of one sample are spread (sequence parallelism);
            must divide the transformer's attention heads.
        process_group_backend: of torch.distributed; None takes NCCL on GPUs and gloo on CPUs.
        timeout: after which a collective that waits for another rank fails, whichever ranks it is among.

    Raises:
        UserError: where the sizes do not fit the number of ranks; before any process is started.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        _check_positive(replicas, data_parallel_size, tensor_parallel_size)
        self._replicas = replicas

    @property
    def replicas(self) -> int:
        """Copies of the weights; known once the trainer has told the number of nodes."""
        return self.num_nodes if self._replicas == "nodes" else self._replicas

    def _configure_launcher(self) -> None:
        # Lightning calls it when devices and nodes are known, before it starts processes: one message, not one a rank.
        self._settle(self.num_nodes * self.num_processes)
        super()._configure_launcher()

    def _settle(self, ranks: int) -> None:
        sequence: Any = self._tensor_parallel_size
        check_sizes(self.num_nodes, self.num_processes, self.replicas, self._data_parallel_size, sequence)
        self._data_parallel_size = ranks // sequence


def check_sizes(
    nodes: int,
    devices: int,
    replicas: int | Literal["nodes"] = 1,
    data_parallel_size: int | Literal["auto"] = "auto",
    tensor_parallel_size: int = 1,
) -> None:
    """Whether sizes of `FSDP2` fit that many nodes of so many devices.

    Raises:
        UserError: with the nearest valid choice, where they do not.
    """
    _check_positive(replicas, data_parallel_size, tensor_parallel_size)
    ranks, place = nodes * devices, f"{counted(nodes, 'node')} of {counted(devices, 'device')}"
    copies = nodes if replicas == "nodes" else replicas
    for name, size in (("tensor_parallel_size", tensor_parallel_size), ("replicas", copies)):
        if ranks % size:
            raise UserError(
                f"trainer.strategy.init_args.{name}={size}: must divide the {ranks} ranks ({place}); the "
                f"nearest valid choice is {nearest_divisor(ranks, size)}"
            )
    if data_parallel_size not in ("auto", ranks // tensor_parallel_size):
        raise UserError(
            f"trainer.strategy.init_args.data_parallel_size={data_parallel_size}: {ranks} ranks "
            f"({place}) with tensor_parallel_size={tensor_parallel_size} make {ranks // tensor_parallel_size}; "
            'set that, or "auto"'
        )


def _check_positive(replicas: int | str, data_parallel_size: int | str, tensor_parallel_size: int | str) -> None:
    for name, value in (
        ("replicas", replicas),
        ("data_parallel_size", data_parallel_size),
        ("tensor_parallel_size", tensor_parallel_size),
    ):
        if isinstance(value, int) and value < 1:
            raise UserError(f"trainer.strategy.init_args.{name}={value}: must be 1 or more")


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller of two."""
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: (abs(n - wanted), n))


def is_sharding(strategy: Any) -> TypeGuard[ModelParallelStrategy]:
    """Whether the strategy is Lightning's FSDP2 (`ModelParallelStrategy`)."""
    return isinstance(strategy, ModelParallelStrategy)


def sequence_ranks(strategy: Any) -> int:
    """Over how many ranks the tokens of a sample are spread; 1 where they are not."""
    if not is_sharding(strategy):
        return 1
    size = strategy._tensor_parallel_size
    return strategy.num_processes if size == "auto" else size


def check_sequence(heads: int, strategy: Any) -> None:
    """Raises `UserError` where the transformer's attention heads do not divide over the ranks of a sequence."""
    if (ranks := sequence_ranks(strategy)) > 1:
        from idc.models.sequence_parallel import check_heads

        check_heads(heads, ranks)


def weights_mesh(strategy: ModelParallelStrategy) -> DeviceMesh:
    """Over which ranks parameters are sharded, `("shard",)`, or replicated and sharded, `("replicate", "shard")`.

    A mesh of its own, beside Lightning's: it spans the ranks of a sequence as well. The groups of both wait as long as
    the strategy does.
    """
    from torch.distributed.device_mesh import init_device_mesh

    ranks, replicas = dist.get_world_size(), getattr(strategy, "replicas", 1)
    kind = strategy.root_device.type
    if replicas == 1:
        mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))
    for each in (mesh, strategy.device_mesh):
        for group in each.get_all_groups():  # made with the backend's own limit, which is ten minutes for NCCL
            _set_pg_timeout(strategy._timeout or default_pg_timeout, group)
    return mesh


def shard(model: IDCrafterTransformer, mesh: DeviceMesh, gathered: torch.dtype = torch.float32) -> None:
    """`fully_shard` every layer, the embedder of times and texts, and the root, which has the rest.

    Gathering in bfloat16 for a model that computes under bfloat16 autocast: matrices travel and lie gathered in the
    type in which autocast would use them, at half the bytes and without its copies beside them; gradients are averaged
    over ranks in float32. What autocast leaves in float32 (`islands`) is small, and the root gathers it as it is. So
    outputs and gradients are those of gathering in float32 but for one rounding: of a matrix that a pass uses several
    times (S1 and S2 of the hierarchy, with several subjects), the gradients are summed in bfloat16.

    Args:
        mesh: as `weights_mesh` gives it.
        gathered: float32, or bfloat16 where every forward pass runs under bfloat16 autocast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = units_of(model)
    kept = [parameter for unit in units for parameter in islands(unit)] if gathered is not torch.float32 else []
    policy = MixedPrecisionPolicy()
    if kept:
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=set(kept))
    # A root takes what its units ignored where it owns it, too: for the moment of sharding.
    model.islands = nn.ParameterList(kept)
    # By default the root keeps its gathered weights after a forward without a backward (a preview), and whatever
    # reads or swaps parameters then would see stale ones.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    del model.islands


def build_sharded(
    build: Callable[[str], IDCrafterTransformer],
    strategy: ModelParallelStrategy,
    gathered: torch.dtype = torch.float32,
) -> IDCrafterTransformer:
    """Shard the structure, then fill the shards from rank 0's weights; spread sequences where the strategy does.

    Args:
        build: makes the model on "cpu" (with weights) or on "meta" (structure alone). Only rank 0 builds with
            weights, so that a 14B model is in host memory once and not once a rank.
        strategy: a `ModelParallelStrategy` whose processes have started.
        gathered: of weights, as in `shard`.

    Raises:
        UserError: on all ranks alike, where the attention heads do not divide over the ranks of a sequence, or where
            rank 0 cannot build.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    with torch.random.fork_rng(devices=[]):  # what adapters would draw on meta: rank 0 draws as one rank alone does
        model = build("meta")
    sequence = strategy.device_mesh["tensor_parallel"]
    if sequence.size() > 1:
        from idc.models.sequence_parallel import spread_over

        spread_over(model, sequence.get_group())
    source = _from_rank_0(build)
    shard(model, weights_mesh(strategy), gathered)
    model.to_empty(device=strategy.root_device)
    model.refresh_rotary_tables()  # in no state dict, and `to_empty` left garbage in them
    set_model_state_dict(model, source, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def _from_rank_0(build: Callable[[str], IDCrafterTransformer]) -> dict[str, Any]:
    """The weights on rank 0, nothing elsewhere; what it raises, on all ranks.

    The others wait for its word, and not in a collective of the device, whose limit loading or downloading may exceed.
    """
    source: dict[str, Any] = {}
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            source = build("cpu").state_dict()
        except Exception as error:  # of any kind: the others would wait
            problem = error
    told = of_all_ranks(None if problem is None else str(problem))[0]
    if problem is not None:
        raise problem
    if told is not None:
        raise UserError(told)
    return source

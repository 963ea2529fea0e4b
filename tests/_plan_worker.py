"""A rank that measures what real steps take, for the tests of the planner: by the CPU's allocator and by storages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from _tiny_wan import VLM_DIM, WAN
from torch import Tensor, nn

from idc.models.transformer import IDCrafterTransformer
from idc.plan.measure import allocations
from idc.types import Condition

WIDTH, LAYERS, RANKS = 64, 16, 2
BUCKET = 3 * WIDTH**2
LIVE, PREFETCH = 2 * WIDTH**2, WIDTH**2
# ZeRO's stage, whether the optimiser is offloaded, whether weights are.
LAYOUTS = ((1, False, False), (2, False, False), (3, False, False), (2, True, False), (3, True, True))


def storages(tensors: Iterable[Any]) -> int:
    """Bytes of what holds these tensors, each storage once; step counters left out."""
    held = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def measure_zero(rank: int, port: int, path: str) -> None:
    """Steps of two passes under each of `LAYOUTS`, after a step that made the states, to `<path>-<rank>`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled
    deepspeed.init_distributed("gloo")
    found = [_measured(*layout) for layout in LAYOUTS]
    with open(f"{path}-{rank}", "w") as stream:
        json.dump(found, stream)
    torch.distributed.destroy_process_group()


def _measured(stage: int, offload_optimizer: bool, offload_parameters: bool) -> dict[str, int]:
    import deepspeed

    from idc.stages.zero import DeepSpeedZeRO

    config: Any = DeepSpeedZeRO(stage, offload_optimizer, offload_parameters).config
    settings: dict[str, Any] = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        three = {"param_persistence_threshold": 0, "prefetch_bucket_size": PREFETCH}
        three |= {"max_live_parameters": LIVE, "max_reuse_distance": LIVE}
        settings |= {f"stage3_{name}": value for name, value in three.items()}
    config["zero_optimization"] |= settings
    config["gradient_accumulation_steps"] = 2
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # one that takes nothing beside its states
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def run(last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(torch.ones(1, WIDTH)).square().sum(), scale_wrt_gas=False)

    run(False)
    run(True)
    engine.step()
    peaks, passes, steps = [], [], []
    for _ in range(6):
        with allocations() as first:
            run(False)
        with allocations() as second:
            run(True)
        with allocations() as step:
            engine.step()
        peaks += [first.most, second.most]
        passes.append(max(first.most, first.grown + second.most))
        steps.append(step.most)
    zero = engine.optimizer
    pieces = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    found = {
        "weights": storages(pieces),
        "master copy": storages(masters),
        "optimiser states": storages(v for state in zero.optimizer.state.values() for v in state.values()),
        # What gloo's threads give back, the profiler does not see: all but the least may be too much.
        "least pass": min(peaks),
        "passes": min(passes),
        "step": min(steps),
    }
    if offload_optimizer:
        added = zero.accumulated_grads_in_cpu.values() if stage < 3 else [zero.grad_partitions_flat_buffer]
        found["gradients"] = storages([master.grad for master in masters]) + storages(added)
        found["way back"] = storages(getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []))
    engine.destroy()
    return found


def measure_fsdp(rank: int, port: int, path: str) -> None:
    """Passes through a sharded model: bytes at their peak beside its shards and their gradients, to `<path>-<rank>`."""
    from torch.distributed.device_mesh import init_device_mesh

    from idc.stages.sharding import shard

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    model: Any = wide_model()
    shard(model, init_device_mesh("cpu", (RANKS,)))
    peaks = []
    for _ in range(5):
        with allocations() as passed:
            small_loss(model).backward()
        peaks.append(passed.most)
    with open(f"{path}-{rank}", "w") as stream:
        json.dump(min(peaks[1:]), stream)  # the first makes the gradients
    torch.distributed.destroy_process_group()


def wide_model(layers: int = 3, id_layers: int = 2) -> nn.Module:
    """One whose weights take far more than what a pass through it keeps."""
    settings = {**WAN, "num_attention_heads": 4, "attention_head_dim": 48, "ffn_dim": 768, "num_layers": layers}
    return IDCrafterTransformer(**settings, id_layers=id_layers, vlm_dim=VLM_DIM).train()


def small_loss(model: Any) -> Tensor:
    text, vlm = torch.randn(1, 5, 16), torch.randn(1, 7, VLM_DIM)
    given = Condition(text_BLD=text, references=(torch.randn(1, 4, 4, 4),), vlm_BLD=vlm)
    x = torch.randn(1, 4, 1, 4, 4)
    return model(x, torch.rand(1), text, given, return_dict=False)[0].square().mean()

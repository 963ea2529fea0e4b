"""What a step really takes here, beside what was planned: random weights, two passes, one step of the optimiser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from idc.errors import UserError
from idc.plan.estimate import Plan
from idc.plan.memory import memory
from idc.plan.recipe import Layout
from idc.stages.speed import optimizer_settings

GIB = 2**30


def measure(plan: Plan) -> Table:
    """Predicted and measured bytes of one rank without sharding, at the recipe's largest pass.

    Measured by CUDA's allocator on a GPU, and else by the CPU's, whose every change torch's profiler records.

    Raises:
        UserError: for a recipe that does not fit one device, or this machine's memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    alone = Layout(accumulate=plan.layout.accumulate)
    predicted = memory(
        plan.structure.parameters,
        plan.passed(plan.structure, plan.work.clips, on_gpu=on_gpu),
        plan.optimiser(on_gpu),
        alone,
        on_gpu=on_gpu,
    )
    room = torch.cuda.mem_get_info()[0] if on_gpu else _free()
    if predicted.total > room:
        raise UserError(
            f"--measure: a rank without sharding takes {predicted.total / GIB:.1f} GiB, and {room / GIB:.1f} are free; "
            "measure with fewer layers (transformer.num_layers, id_blocks.layers) or smaller buckets"
        )
    measured = measured_parts(plan, device)
    by = "CUDA" if device.type == "cuda" else "the CPU"
    table = Table("part", "predicted, GiB", f"by {by}'s allocator, GiB", "measured / predicted")
    parts = {
        "weights": predicted.parts["weights"],
        "gradients": predicted.parts["gradients"],
        "optimiser states": predicted.parts.get("optimiser states", 0),
        "kept for the backward pass": sum(
            predicted.parts.get(name, 0) for name in ("activations kept", "weights in bfloat16")
        ),
        "peak": predicted.allocated,
    }
    for name, value in parts.items():
        ratio = f"{measured[name] / value:.3f}" if value else ""
        table.add_row(name, f"{value / GIB:.4f}", f"{measured[name] / GIB:.4f}", ratio)
    return table


def measured_parts(plan: Plan, device: torch.device) -> dict[str, int]:
    """Bytes by part, and the peak of a pass that has gradients and states of an earlier step beside it."""
    stage, run = plan.stage.to(device), plan.structure.loss(plan.work)
    with allocations() as made:
        model: Any = plan.structure.with_weights(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = stage.optimizer_factory(parameters, **optimizer_settings(stage.optimizer_factory, device))
    with torch.device(device):
        if device.type == "cuda":
            return _on_cuda(model, optimizer, run)
        with allocations() as passed:
            run(model).backward()
        with allocations() as stepped:
            optimizer.step()
        with allocations() as forward:
            loss = run(model)
        with allocations() as backward:
            loss.backward()
    static = made.grown + passed.grown + stepped.grown
    return {
        "weights": made.grown,
        "gradients": passed.grown,
        "optimiser states": stepped.grown,
        "kept for the backward pass": forward.grown,
        "peak": static + max(forward.most, forward.grown + backward.most),
    }


def _on_cuda(model: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[nn.Module], Tensor]) -> dict[str, int]:
    run(model).backward()
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    found = {
        "weights": _bytes(model.parameters()),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimiser states": _bytes(value for value in states if value.numel() > 1),
    }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = run(model)
    found["kept for the backward pass"] = torch.cuda.memory_allocated() - before
    loss.backward()
    found["peak"] = torch.cuda.max_memory_allocated()
    return found


@dataclass
class Allocations:
    """Bytes that the CPU's allocator gave out more than it took back: in the end, and the most at any moment."""

    grown: int = 0
    most: int = 0


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Of the block, known when it is over."""
    found = Allocations()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        yield found
    events: Any = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.device_type() == torch.profiler.DeviceType.CPU:
            found.grown += event.nbytes()
            found.most = max(found.most, found.grown)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _free() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

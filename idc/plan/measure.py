"""What a step really takes here, beside what was planned: random weights, two passes, one step of the optimiser."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from idc.errors import UserError
from idc.plan.estimate import Plan
from idc.plan.memory import memory
from idc.plan.recipe import Layout
from idc.plan.trace import Storages
from idc.stages.speed import optimizer_settings

GIB = 2**30


def measure(plan: Plan) -> Table:
    """Predicted and measured bytes of one rank without sharding, at the recipe's largest pass.

    On a GPU by CUDA's allocator; on the CPU by following storages, as far as PyTorch's operators make them.

    Raises:
        UserError: for a recipe that does not fit one device, or this machine's memory.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = Layout(accumulate=plan.layout.accumulate)
    predicted = memory(
        plan.structure.parameters,
        plan.passed(plan.structure, plan.work.clips),
        plan.optimiser(device.type == "cuda"),
        alone,
        on_gpu=device.type == "cuda",
    )
    room = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _free()
    if predicted.total > room:
        raise UserError(
            f"--measure: a rank without sharding takes {predicted.total / GIB:.1f} GiB, and {room / GIB:.1f} are free; "
            "measure with fewer layers (transformer.num_layers, id_blocks.layers) or smaller buckets"
        )
    measured = measured_parts(plan, device)
    table = Table("part", "predicted, GiB", "measured, GiB", "measured / predicted")
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
    stage = plan.stage.to(device)
    model: Any = plan.structure.with_weights(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = stage.optimizer_factory(parameters, **optimizer_settings(stage.optimizer_factory, device))
    run = plan.structure.loss(plan.work)
    with torch.device(device):
        run(model).backward()
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        found = {
            "weights": _bytes(model.parameters()),
            "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
            "optimiser states": _bytes(value for value in states if value.numel() > 1),
        }
        static = sum(found.values())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = run(model)
            found["kept for the backward pass"] = torch.cuda.memory_allocated() - before
            loss.backward()
            found["peak"] = torch.cuda.max_memory_allocated()
            return found
        with Storages(model) as storages:
            loss = run(model)
            found["kept for the backward pass"] = storages.live
            loss.backward()
        found["peak"] = static + storages.peak
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _free() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

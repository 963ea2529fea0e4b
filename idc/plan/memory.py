"""Memory of a rank by part, at the moments of a step that take most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable

from idc.plan.model import Parameters
from idc.plan.recipe import Layout
from idc.plan.trace import Passed
from idc.stages.speed import optimizer_settings

_MASTER = 4  # bytes of a weight: float32 in all recipes, and so are its gradient, its average and its reference
_CONTEXT = 600 * 2**20  # a CUDA context with cuBLAS and cuDNN, about
_NCCL = 900 * 2**20  # NCCL's buffers, about
_FRAGMENTS = 0.05  # of what a pass allocates: what the caching allocator cannot use, about


@dataclass(frozen=True)
class Optimiser:
    """Bytes a trained parameter: of its states, and of what a step allocates beside them."""

    name: str
    states: float
    step: float


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank.

    Attributes:
        parts: by name, in the order in which they are shown; all of them are there during a pass.
        optimiser_step: what is there at the optimiser's step, when the pass is over.
        margin: what is not the model's: the device's context, buffers of communication, fragmentation.
        margin_note: what it is made of.
        host: bytes of a rank's host memory by name.
    """

    parts: dict[str, int]
    optimiser_step: int
    margin: int
    margin_note: str = ""
    host: dict[str, int] = field(default_factory=dict)

    @property
    def allocated(self) -> int:
        """The most that tensors take at any moment."""
        return max(sum(self.parts.values()), self.optimiser_step)

    @property
    def total(self) -> int:
        return self.allocated + self.margin


def optimiser_of(factory: OptimizerCallable, on_gpu: bool = True) -> Optimiser:
    """What the recipe's optimiser takes, by a step of it on one small matrix."""
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = factory([parameter])
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):  # it wants a GPU; the states of Adam's kind in float32
        return Optimiser(type(optimizer).__name__, 8.0, 0.0)
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    states = sum(value.nbytes for value in state if value.numel() > 1) / parameter.numel()
    group = optimizer.param_groups[0] | (optimizer_settings(factory, torch.device("cuda")) if on_gpu else {})
    # Without one kernel for all, a step on a GPU goes over all parameters at once, with a temporary of their size.
    at_once = on_gpu and not group.get("fused") and group.get("foreach") is not False and "foreach" in group
    return Optimiser(type(optimizer).__name__, states, float(_MASTER) if at_once else 0.0)


def memory(
    parameters: Parameters,
    passed: Passed,
    optimiser: Optimiser,
    layout: Layout,
    *,
    average: Literal["none", "device", "host"] = "none",
    reference: bool = False,
    encoders: int = 0,
    rollouts: int = 0,
    on_gpu: bool = True,
) -> Memory:
    """Bytes of a rank.

    Args:
        average: where EMA's averages of the trained weights lie. reference: a copy of them (alignment).
        encoders: bytes of frozen encoders that stay on the device.
        rollouts: bytes of an iteration's rollouts.
    """
    copy = _MASTER * parameters.trained // layout.weights_over
    parts, at_step = _of_training(parameters, optimiser, layout)
    others = {
        "averages (EMA)": copy if average == "device" else 0,
        "reference weights": copy if reference else 0,
        "frozen encoders": encoders,
        "rollouts": rollouts,
    }
    over = layout.sequence  # of the video's tokens, which nearly all of this is
    # DeepSpeed's products of ZeRO-3 keep no such copies, FSDP2 gathers weights in bfloat16.
    has_copies = layout.strategy in ("one", "ddp", "zero1", "zero2")
    during = {
        **_exchanged(parameters, layout),
        "activations kept": passed.kept // over,
        "weights in bfloat16": passed.kept_copies if has_copies else 0,
        "working memory": passed.working // over,
    }
    host: dict[str, int] = {}
    if layout.zero is not None:
        host = layout.zero.host(parameters, optimiser.states, layout.shards, layout.accumulate > 1)
    if average == "host":
        host["averages (EMA)"] = copy
    every = {**parts, **others, **during}
    return Memory(
        {name: size for name, size in every.items() if size},
        at_step + sum(others.values()),
        *(_margin(passed, layout) if on_gpu else (0, "")),
        host,
    )


def _of_training(parameters: Parameters, optimiser: Optimiser, layout: Layout) -> tuple[dict[str, int], int]:
    """Bytes on the device from step to step, by part, and all that is there of them and beside them at the step."""
    trained, shards, zero = parameters.trained, layout.shards, layout.zero
    states = round(optimiser.states * trained / shards)
    parts = {"weights": _MASTER * parameters.total // layout.weights_over}
    temporary = round(optimiser.step * trained / shards)
    if zero is None:
        parts |= {"gradients": _MASTER * trained // shards, "optimiser states": states}
        kept = _MASTER * trained if layout.strategy == "ddp" else 0  # its buckets stay
        return parts, sum(parts.values()) + kept + temporary
    accumulates = layout.accumulate > 1
    own = _MASTER * trained // shards
    if zero.offload_parameters:
        parts["weights"] = 0
    parts["gradients"] = zero.gradients(trained, shards, accumulates)
    if not zero.offload_optimizer:
        parts |= {"DeepSpeed's master copy": own, "optimiser states": states}
    else:
        temporary = 0  # it steps in host memory
    gradients = min(parts["gradients"], own)  # other ranks' are gone
    return parts, sum(parts.values()) - parts["gradients"] + gradients + temporary + zero.step(trained, shards)


def _exchanged(parameters: Parameters, layout: Layout) -> dict[str, int]:
    """Bytes of what a rank has of the others' weights and gradients in a pass, and of buckets."""
    trained, total, zero = parameters.trained, parameters.total, layout.zero
    if layout.strategy == "ddp":
        return {"DDP's buckets of gradients": _MASTER * trained}
    if zero is not None:
        return {
            "gathered layers": zero.gathered(parameters),
            "DeepSpeed's buckets of gradients": zero.buckets(trained, layout.shards),
        }
    if layout.strategy != "fsdp":
        return {}
    # The root's and two layers' weights, of which one comes while the other computes; the gradients of the root, of a
    # layer, and of one that are being scattered.
    each, unit, root = layout.gathered.itemsize, parameters.largest_unit, parameters.root_unit
    gradients = _MASTER * root + (each + _MASTER) * unit
    return {"gathered layers": round(_MASTER * root + 2 * each * unit + trained / total * gradients)}


def _margin(passed: Passed, layout: Layout) -> tuple[int, str]:
    """Bytes on a GPU that are not the model's, and of what."""
    pieces = {"CUDA": _CONTEXT, "NCCL": _NCCL if layout.ranks > 1 else 0}
    pieces["fragmentation"] = round(_FRAGMENTS * passed.peak / layout.sequence)
    return sum(pieces.values()), ", ".join(name for name, size in pieces.items() if size)

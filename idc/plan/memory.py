"""Memory of a rank by part, at the moments of a step that take most."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    parts: dict[str, int]
    optimiser_step: int
    margin: int
    margin_note: str = ""
    notes: tuple[str, ...] = field(default=())

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
    average: bool = False,
    reference: bool = False,
    encoders: int = 0,
    rollouts: int = 0,
    on_gpu: bool = True,
) -> Memory:
    """Bytes of a rank.

    Args:
        average: EMA of the trained weights. reference: a copy of them (alignment).
        encoders: bytes of frozen encoders that stay on the device.
        rollouts: bytes of an iteration's rollouts.
    """
    trained, total = parameters.trained, parameters.total
    states_over = layout.shards
    weights_over = 1 if layout.strategy == "zero2" else layout.shards
    parts = {"weights": _MASTER * total // weights_over, "gradients": _MASTER * trained // states_over}
    parts["optimiser states"] = round(optimiser.states * trained / states_over)
    if average:
        parts["averages (EMA)"] = _MASTER * trained // weights_over
    if reference:
        parts["reference weights"] = _MASTER * trained // weights_over
    if encoders:
        parts["frozen encoders"] = encoders
    if rollouts:
        parts["rollouts"] = rollouts
    static = sum(parts.values())
    if layout.strategy == "ddp":
        parts["DDP's buckets of gradients"] = _MASTER * trained
        static += parts["DDP's buckets of gradients"]
    if layout.strategy in ("fsdp", "zero3"):
        # The root's and two layers' weights, of which one comes while the other computes; the gradients of the root, of
        # a layer, and of one that are being scattered.
        each = layout.gathered.itemsize if layout.strategy == "fsdp" else _MASTER
        unit, root = parameters.largest_unit, parameters.root_unit
        gradients = _MASTER * root + (each + _MASTER) * unit
        parts["gathered layers"] = round(_MASTER * root + 2 * each * unit + trained / total * gradients)
    over = layout.sequence  # of the video's tokens, which nearly all of this is
    parts["activations kept"] = passed.kept // over
    if passed.kept_copies:
        parts["weights in bfloat16"] = passed.kept_copies if layout.strategy in ("one", "ddp", "zero2") else 0
    parts["working memory"] = passed.working // over
    margin, note = 0, ""
    if on_gpu:
        pieces = {"CUDA": _CONTEXT, "NCCL": _NCCL if layout.ranks > 1 else 0}
        pieces["fragmentation"] = round(_FRAGMENTS * passed.peak / over)
        margin = sum(pieces.values())
        note = ", ".join(name for name, size in pieces.items() if size)
    return Memory(
        {name: size for name, size in parts.items() if size},
        static + round(optimiser.step * trained / states_over),
        margin,
        note,
    )

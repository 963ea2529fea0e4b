"""How a repeated layer runs: recomputed in the backward pass or not, compiled or not.

A layer is one of Wan's blocks and the hierarchical block after it (`idc.models.layers`): only what enters it is kept,
and nothing between the two. Under FSDP2 they stay two units of sharding, whose hooks the recomputation calls as well.
It gathers nothing once more: the second block's backward pass has the first's weights fetched ahead, and the
recomputation uses them and leaves them to the first's own backward pass. Names of parameters stay as they are.
Selective checkpointing after torch's `create_selective_checkpoint_contexts`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from idc.models.speed import RECOMPILES, Checkpointing

T = TypeVar("T")
_SDPA = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_SDPA_OPS = frozenset(getattr(torch.ops.aten, name).default for name in _SDPA if hasattr(torch.ops.aten, name))


def is_attention(op: Any) -> bool:
    """Whether an operator computes a whole attention forwards: PyTorch's own, or one that a package registers.

    PyTorch's mathematical fallback is no operator of its own but matrix products, and is recomputed.
    """
    if op in _SDPA_OPS:
        return True
    space, _, name = getattr(op, "_name", "").partition("::")  # "flash_attn_3::fwd", "flash_attn::_flash_attn_forward"
    kind = ("flash" in space or "sage" in space or "aiter" in space or "xformers" in space) and "attn" in space + name
    return kind and ("fwd" in name or "forward" in name) and "bwd" not in name and "backward" not in name


def save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of `checkpointing: attention`: keep what attentions return, recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


class LayerRunner:
    """Runs functions of a layer, recomputed in the backward pass or not, compiled or not; its modules' newest holds.

    Args:
        modules: all blocks that it will run. Sharded ones must be sharded by now.
        checkpointing: as in `idc.models.speed.Speed`.
        compiled: by `torch.compile`, each kind of layer as one graph that all of the kind share.
        apart: each block by itself, as those run that are compiled and sharded; None where they are that.
    """

    def __init__(
        self, modules: Sequence[nn.Module], checkpointing: Checkpointing, compiled: bool, apart: bool | None = None
    ) -> None:
        self.checkpointing, self.compiled = checkpointing, compiled
        # FSDP's hooks are in no graph: there each block is compiled within its hooks, and the layer recomputed around
        # them. Kernels of a graph cannot be told apart from outside, so that keeping attentions' results is inside too.
        if apart is None:
            apart = compiled and any(isinstance(module, FSDPModule) for module in modules)
        inside: Checkpointing = "none"
        if apart:
            self.compiled = False
            if checkpointing == "attention":
                inside, self.checkpointing = checkpointing, "none"
        for module in modules:
            module.__dict__.pop("forward", None)
            if apart:
                module.forward = BlockForward(module, inside, compiled)  # of this instance

    def __call__(self, run: Callable[..., T], *args: Any) -> T:
        """`run(*args)`; a function of a module, whose first arguments are the layer's modules."""
        return _runner(run, self.checkpointing if torch.is_grad_enabled() else "none", self.compiled)(*args)


class BlockForward:
    """The `forward` of one block, in place of its class's own. Copies and pickles with its block."""

    def __init__(self, module: nn.Module, checkpointing: Checkpointing, compiled: bool) -> None:
        self.module, self.checkpointing, self.compiled = module, checkpointing, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        checkpointing = self.checkpointing if torch.is_grad_enabled() else "none"
        return _runner(type(self.module).forward, checkpointing, self.compiled)(self.module, *args, **kwargs)


@functools.cache
def _runner(run: Callable[..., Any], checkpointing: Checkpointing, compiled: bool) -> Callable[..., Any]:
    """One function for all layers of a kind: their modules are its first arguments, and share what it compiled."""
    contexts: dict[str, Any] = {"context_fn": _contexts} if checkpointing == "attention" else {}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, **contexts, **kwargs)

    chosen = run if checkpointing == "none" else recomputed
    if not compiled:
        return chosen
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    return torch.compile(chosen, fullgraph=True)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(save_attention)

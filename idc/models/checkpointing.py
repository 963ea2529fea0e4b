"""How a repeated layer runs: recomputed in the backward pass or not, compiled or not.

Both are put around the layer's `forward` and inside whatever hooks a strategy hangs on the layer, in the order that
FSDP2 needs: gather, then the compiled region, and the recomputation in it. Names of parameters stay as they are.
Selective checkpointing after torch's `create_selective_checkpoint_contexts`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from idc.models.speed import Checkpointing

RECOMPILES = 64  # sizes of video and sets of references that one compiled layer serves before it would fail
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


def run_layers(layers: Iterable[nn.Module], checkpointing: Checkpointing, compiled: bool) -> None:
    """Make each layer run so from now on; the last call holds.

    Args:
        checkpointing: as in `idc.models.speed.Speed`.
        compiled: by `torch.compile`, in one graph; all layers of a kind share it.
    """
    for layer in layers:
        layer.__dict__.pop("forward", None)
        if checkpointing != "none" or compiled:
            layer.forward = LayerForward(layer, checkpointing, compiled)  # of this instance


class LayerForward:
    """The `forward` of one layer, in place of its class's own. Copies and pickles with its layer."""

    def __init__(self, layer: nn.Module, checkpointing: Checkpointing, compiled: bool) -> None:
        self.layer, self.checkpointing, self.compiled = layer, checkpointing, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        checkpointing = self.checkpointing if torch.is_grad_enabled() else "none"
        return _runner(type(self.layer).forward, checkpointing, self.compiled)(self.layer, *args, **kwargs)


@functools.cache
def _runner(forward: Callable[..., Any], checkpointing: Checkpointing, compiled: bool) -> Callable[..., Any]:
    """One function for all layers of a kind: they are its first argument, and share what it compiled."""
    contexts: dict[str, Any] = {"context_fn": _contexts} if checkpointing == "attention" else {}

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    run = forward if checkpointing == "none" else recomputed
    if not compiled:
        return run
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILES)
    return torch.compile(run, fullgraph=True)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(save_attention)

"""The trained weights as they were, in place of the present ones for a while: a reference without a second model.

A copy takes the memory of what is trained alone (with LoRA, the adapters), and each rank copies its own shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class WeightCopy:
    """A copy of the parameters of `module` that require a gradient.

    With adapters that start at zero its outputs are those of the module with its adapters off. Frozen parameters are
    not copied: they must stay what they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = [value.clone() for value in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        reshard(self._module)
        return [local(p.detach()) for p in self._module.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the copy inside the block. Not between a forward and its backward pass, which
        would meet weights that are not those of the forward."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for i, parameter in enumerate(self._parameters()):
            present = parameter.clone()
            parameter.copy_(self._values[i])
            self._values[i] = present  # on the module's device, wherever it was when the copy was made


def reshard(module: nn.Module) -> None:
    """Free gathered weights: FSDP2 keeps the root's after a forward pass without backward. Until then, parameters are
    not the shards, and after a change of the shards the next forward pass would use stale weights."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """The tensor, or this rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

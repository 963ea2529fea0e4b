"""What CUDA keeps where the CPU, whose operators a trace runs, keeps something else: of the models here, `rms_norm`.

CUDA has a kernel for it that keeps its input and one number a row, where the CPU composes it of operators that keep
several copies; and from torch 2.12 on CUDA's autocast runs it in float32, where the CPU's leaves it alone
(ATen/autocast_mode.h, AT_FORALL_FP32; ATen/native/layer_norm.cpp; pytorch/pytorch#167308). The other operators in which
the two autocasts differ and that the models meet, layer norms and exponentials, are given float32 by the models
themselves, and concatenations differ by a moment's copies; a test holds that these are all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Before torch 2.12 False: bfloat16 tokens meet float32 weights, for which CUDA has no kernel either.
IN_FLOAT32 = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
_COMPOSED = functional.rms_norm


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """While it lasts, RMS norms of tensors without content on the CPU take and keep the memory that they do on CUDA.

    A `TorchFunctionMode` would not do: torch leaves it during a backward pass, and with it during recomputation.
    """
    try:
        functional.rms_norm = _rms_norm  # what `nn.RMSNorm` calls
        yield
    finally:
        functional.rms_norm = _COMPOSED


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    if IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
        input, weight = input.float(), None if weight is None else weight.float()
    if weight is not None and weight.dtype != input.dtype:
        return _COMPOSED(input, list(normalized_shape), weight, eps)
    normed: Tensor = _Fused.apply(input, weight, len(normalized_shape))
    return normed


class _Fused(torch.autograd.Function):
    """Makes and keeps what `aten::_fused_rms_norm` does, without content."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        inverse_rms = x.new_empty(*x.shape[:-dims], *[1] * dims, dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return torch.empty_like(x) if needed[0] else None, torch.empty_like(weight) if needed[1] else None, None

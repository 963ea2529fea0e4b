"""Which kernel computes attention: a probe at the start of a run, over the backends of diffusers' dispatcher.

A backend is taken where it runs here, agrees with PyTorch's mathematical attention, has a gradient where one is needed
and is one graph where layers are compiled, and is the fastest of those. Flash and sage backends refuse masks: attention
under a mask is always PyTorch's own.

cuDNN plans anew for every size of queries and keys that it has not met, for tenths of a second (PyTorch keys its plans
by them, in ATen/native/cudnn/MHA.cpp). The video's attentions have the sizes of its bucket, the subjects' those of the
sample's references and of what the VLM says of them: these get a backend of their own that plans nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from idc.errors import UserError
from idc.models.speed import BACKENDS, RECOMPILES

NATIVE = AttentionBackendName.NATIVE
# Of `auto`, in the order in which ties are decided. None of a hub's: those fetch a binary and run it, where named only.
CANDIDATES = ("_native_cudnn", "_flash_3", "flash", "_native_flash", "native")
PLANNED = ("_native_cudnn", "native")  # on an H100 PyTorch's own choice may be cuDNN, as in 2.13
UNPLANNED = ("_flash_3", "flash", "_native_flash", "_native_efficient")  # of `auto` for lengths that vary
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # float32's admits TF32
ROUGH = 0.2  # of a backend that is named: those of 8 bits are inexact by design, and nobody gets one unasked
_PROBE = (2, 160, 96)  # samples, queries, keys: neither equal nor round
_TIMED = (1, 8192, 8)  # samples, tokens, heads: about a millisecond on an H100
_WITHIN = 1.03  # times the fastest's time is as fast


@dataclass(frozen=True)
class Choice:
    """What a probe found.

    Attributes:
        name: of the backend. varying: of that for attentions whose lengths differ from sample to sample; "" is `name`,
            and never stays. error: root mean square of its difference to float32 mathematics, over that of the result
            (the worst of output and gradients); None where it was not measured.
        milliseconds: by backend, forward (and backward, in training) of one attention over 8192 tokens; on CUDA only.
        skipped: why each of the others cannot be taken.
    """

    name: str
    varying: str = ""
    error: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "varying", self.varying or self.name)

    def everywhere(self) -> Choice:
        """For a model in which the lengths of all attentions vary."""
        return self if self.varying == self.name else Choice(self.varying, milliseconds=self.milliseconds)

    def __str__(self) -> str:
        notes = [f"{name} {value:.2f} ms" for name, value in self.milliseconds.items()]
        if self.error is not None:
            notes.append(f"off by {self.error:.1e} of its size from float32")
        elif self.skipped:  # nothing of what was tried can be taken: a run should not hide why
            notes += [f"{name}: {reason}" for name, reason in self.skipped.items()]
        own = f", of subjects {self.varying}" if self.varying != self.name else ""
        return f"attention backend: {self.name}{own}" + (f" ({', '.join(notes)})" if notes else "")


def attend(query_BLAE: Tensor, key_BMAE: Tensor, value_BMAE: Tensor, mask: Tensor | None, backend: Any) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, `[B, L, A, E]` in the value's dtype, to which queries and keys are converted.

    Args:
        mask: True where a key is real, broadcast over `[B, A, L, M]`; None where all are.
        backend: of diffusers' dispatcher, for attention without a mask; None is the active one.
    """
    # Under autocast the norms return float32, which only PyTorch's own backends would convert themselves.
    return dispatch_attention_fn(
        query_BLAE.type_as(value_BMAE),
        key_BMAE.type_as(value_BMAE),
        value_BMAE,
        attn_mask=mask,
        backend=backend if mask is None else NATIVE,
        parallel_config=None,  # diffusers' context parallelism would shard the subjects' tokens, which are replicated
    )


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    setting: str = "auto",
    training: bool = False,
    compiled: bool = False,
) -> Choice:
    """Probe the backends and choose.

    Args:
        dtype: in which attention computes. head_dim: E.
        setting: `auto`, or the name of a backend, which is then checked and taken.
        training: a backend must have gradients, too.
        compiled: on CUDA it must be one graph for `torch.compile`, too.

    Raises:
        UserError: where the named backend cannot run here, or is wrong.
    """
    device = torch.device(device)
    probe = _Probe(device, dtype, head_dim, training, compiled and device.type == "cuda")
    error, auto = None, setting == "auto"
    if not auto:
        name, error = setting, probe.check(setting)
    elif device.type == "cuda" and (found := probe.fastest(CANDIDATES)):
        name, error = found, probe.errors[found]
    else:
        name = NATIVE.value  # needs no probe to be right
    varying = name
    if device.type == "cuda" and name in PLANNED:  # what is PyTorch's by name is not exchanged for a package's
        unplanned = UNPLANNED if auto else [each for each in UNPLANNED if each.startswith("_native")]
        varying = probe.fastest(unplanned) or NATIVE.value
    return Choice(name, varying, error, probe.milliseconds, probe.skipped)


@dataclass
class _Probe:
    """Backends on one device, each tried once.

    Attributes:
        the others: as of `choose_backend` and `Choice`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    training: bool
    compiled: bool
    milliseconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def fastest(self, names: Sequence[str]) -> str | None:
        """Of those that are right and compile where that is needed; the first of equals, None where there is none."""
        for name in names:
            if name not in self.milliseconds and name not in self.skipped:
                self._try(name)
        while left := {name: self.milliseconds[name] for name in names if name in self.milliseconds}:
            limit = _WITHIN * min(left.values())
            name = next(name for name, value in left.items() if value <= limit)
            try:
                if self.compiled:  # takes seconds: asked of what would be taken only
                    check_compiles(name, self.device, self.dtype, self.head_dim, self.training)
                return name
            except Exception as error:  # a compiler fails in its own ways, too
                self.skipped[name] = _reason(error)
                del self.milliseconds[name]
        return None

    def _try(self, name: str) -> None:
        given = name, self.device, self.dtype, self.head_dim, self.training
        try:
            error = self.errors[name] = _error(*given)
            if not error <= TOLERANCE[self.dtype]:  # also where it is NaN
                raise RuntimeError(f"off by {error:.2g}, more than {TOLERANCE[self.dtype]}")
            self.milliseconds[name] = _time(*given)
        except Exception as error:  # a package's own, of any kind: what cannot run is not taken
            self.skipped[name] = _reason(error)

    def check(self, name: str) -> float:
        """The error of a backend that was asked for.

        Raises:
            UserError: where it cannot run here, or is wrong.
        """
        given = name, self.device, self.dtype, self.head_dim, self.training
        try:
            error = _error(*given)
            if self.compiled:
                check_compiles(*given)
        except Exception as problem:  # as in `_try`
            raise _refused(name, _reason(problem)) from None
        if not error <= ROUGH:
            raise _refused(name, f"its results are off by {error:.2g} of their size")
        return error


def check_compiles(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    training: bool,
    compiler: str | Callable[..., Any] = "inductor",
) -> None:
    """Compare `attend` on this backend within one graph, and in training its gradients, with what they should be.

    Args:
        compiler: as `torch.compile` takes it for `backend`.

    Raises:
        RuntimeError: where it does not compile, or loses something on the way, with the first line of what.
    """
    limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)  # one graph for each backend and kind of pass
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            error = _error(name, device, dtype, head_dim, training, compiler)
    except Exception as problem:  # a compiler's own, of any kind
        raise RuntimeError(f"does not compile, and speed.compile is on: {_reason(problem)}") from problem
    if not error <= ROUGH:
        raise RuntimeError(f"compiled, as speed.compile asks for, its results are off by {error:.2g} of their size")


def set_backend(model: nn.Module, name: str, varying: str | None = None) -> None:
    """Make every attention of `model` run on this backend; no other model is touched, unlike in diffusers.

    Args:
        varying: of those that say of themselves that their `lengths_vary`; None is `name`.

    Raises:
        UserError: where it is not installed here.
    """
    backends = {}
    for each in (name, varying or name):
        try:
            backends[each] = _prepared(each)
        except Exception as error:  # as in `choose_backend`
            raise _refused(each, _reason(error)) from None
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            own = varying if getattr(module, "lengths_vary", False) else None
            processor._attention_backend = backends[own or name]


def _refused(name: str, reason: str) -> UserError:
    names = ", ".join(("auto", *BACKENDS))
    return UserError(f"speed.attention={name!r}: {reason}; auto and native run everywhere (all names: {names})")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _prepared(name: str) -> AttentionBackendName:
    backend = AttentionBackendName(name)
    _check_attention_backend_requirements(backend)
    _maybe_download_kernel_for_backend(backend)
    return backend


def _probe_inputs(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Queries, keys and values of two heads, and weights of the output."""
    batch, queries, keys = _PROBE
    generator = torch.Generator().manual_seed(0)
    # Not on a default device: Lightning has the GPU for one while it builds models, and the generator's is the CPU.
    shape: dict[str, Any] = {"generator": generator, "device": "cpu"}
    parts = [torch.randn(batch, n, 2, head_dim, **shape) for n in (queries, keys, keys, queries)]
    return [part.to(device, dtype) for part in parts]


def _error(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    training: bool,
    compiler: str | Callable[..., Any] | None = None,
) -> float:
    """Of output and gradients, relative to float32 mathematics on the same values. Whatever the backend raises.

    Args:
        compiler: makes one graph of it first.
    """
    backend = _prepared(name)
    *inputs, weight = _probe_inputs(device, dtype, head_dim)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, None, backend)

    if compiler is not None:
        run = torch.compile(run, fullgraph=True, backend=compiler)

    def results(attention: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(to).requires_grad_(training) for x in inputs]
        with torch.set_grad_enabled(training):
            out = attention(*leaves)
        if not training:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(to))]

    with torch.autocast(device.type, enabled=False):
        found = results(run, dtype)
        expected = results(_mathematics, torch.float32)
    ratios = [
        ((ours.float() - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True)
    ]
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)


def _mathematics(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _time(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> float:
    """Milliseconds of one attention, the median of five after two that warm up."""
    batch, tokens, heads = _TIMED
    shape: dict[str, Any] = {"size": (batch, tokens, heads, head_dim), "device": device, "dtype": dtype}
    query, key, value = leaves = [torch.randn(**shape, requires_grad=training) for _ in range(3)]
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        with torch.set_grad_enabled(training):
            out = attend(query, key, value, None, AttentionBackendName(name))
        if training:
            torch.autograd.grad(out, leaves, out.detach())
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])

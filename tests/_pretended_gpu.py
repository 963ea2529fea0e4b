"""A GPU that is not there: tensors "on" it lie in host memory under a mark, and mixing them with others raises.

What runs under `pretended_gpu` computes on the CPU and meets CUDA's rules of where things lie: operands on one device
(numbers and indices may come from the host), generators of the device that they fill, no `numpy()` of a GPU's tensor.
It says nothing of kernels, of CUDA's autocast or of streams; a backward pass, with what it recomputes, runs without it,
and so would a compiled graph.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
# Copies, and indices on the host, may meet tensors of another device.
_MAY_MIX = ("copy_", "to", "type_as", "set_", "swap_tensors", "_has_compatible_shallow_copy_type")
_INDEX = ("__getitem__", "__setitem__", "index_put_")
_LOOKS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu")


class PretendedGPU(TorchFunctionMode):
    """Marks and checks the tensors of this thread.

    Attributes:
        looks: how often the host waited for the GPU, by the functions of the kit that were running, innermost first.
    """

    def __init__(self, looks: Counter[tuple[str, ...]] | None = None) -> None:
        super().__init__()
        self.looks: Counter[tuple[str, ...]] = Counter() if looks is None else looks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ("__get__", "__set__"):
            return _property(func, *args)
        first = args[0] if args else None
        if name in ("pin_memory", "record_stream"):
            return first
        if _marked(first) and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if _marked(first) and name in _LOOKS:
            self.looks[_who()] += 1
        target, args, kwargs = _target(name, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marked = _marked(first) if name in (*_INDEX, *_MAY_MIX) else any(map(_marked, tensors))
        lies_there = marked if target is None else target
        _check(name, tensors, lies_there, target, kwargs.get("generator"))
        kwargs.pop("pin_memory", None)
        out = (Tensor.cpu if name == "cuda" else func)(*args, **kwargs)
        if out is first and isinstance(out, Tensor) and _marked(out) != lies_there:
            out = out.clone()  # `to` another device
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in tensors):
                _mark(leaf, lies_there)
        return out


def _marked(x: Any) -> bool:
    return isinstance(x, Tensor) and getattr(x, "_gpu", False)


def _mark(x: Any, lies_there: bool) -> None:
    x._gpu = lies_there


def _property(func: Any, tensor: Tensor, *value: Any) -> Any:
    name = func.__self__.__name__
    if value:
        func(tensor, *value)
        if name == "data":
            _mark(tensor, _marked(value[0]))
        return None
    out = func(tensor)
    if isinstance(out, Tensor):
        _mark(out, _marked(tensor))
    if not _marked(tensor):
        return out
    return {"device": GPU, "is_cuda": True, "is_cpu": False}.get(name, out)


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[bool | None, Any, dict[str, Any]]:
    """Whether the call names the GPU (None: it names no device), and the call that it is on the host."""
    if name in ("cpu", "cuda"):
        return name == "cuda", args[:1], {}
    target = _marked(args[1]) if name == "type_as" else None
    if name == "to":
        host = []
        for arg in args[1:]:
            if isinstance(arg, str | torch.device):
                target, arg = _is_gpu(arg), _on_host(arg)
            elif isinstance(arg, Tensor):
                target = _marked(arg)
            host.append(arg)
        args = (args[0], *host)
    if kwargs.get("device") is not None:
        target = _is_gpu(kwargs["device"])
        kwargs["device"] = _on_host(kwargs["device"])
    return target, args, kwargs


def _is_gpu(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def _on_host(device: Any) -> Any:
    return torch.device("cpu") if _is_gpu(device) else device


def _check(name: str, tensors: list[Tensor], lies_there: bool, target: bool | None, generator: Any) -> None:
    if isinstance(generator, torch.Generator) and lies_there != getattr(generator, "on_gpu", False):
        raise RuntimeError(f"{name}: a generator of the other device")
    on_host = [x for x in tensors if not _marked(x) and x.device.type == "cpu" and x.dim()]
    if name == "__getitem__" and not lies_there and any(_marked(x) and x.dim() for x in tensors):
        raise RuntimeError("indices on the GPU into a tensor that is not there")
    if target is None and name not in (*_INDEX, *_MAY_MIX) and on_host and any(map(_marked, tensors)):
        where = [(tuple(x.shape), "cuda:0" if _marked(x) else "cpu") for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {where}")


def _who() -> tuple[str, ...]:
    """The functions of the kit that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    names = []
    while frame is not None:
        if "/idc/" in frame.f_code.co_filename:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return tuple(names)


class _Generator(torch.Generator):
    on_gpu = False

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        made.on_gpu = _is_gpu(device)
        return made

    @property
    def device(self) -> torch.device:
        return GPU if self.on_gpu else torch.device("cpu")


class _Anything:
    """A stream, an event, a context: whatever is asked of it, it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __int__(self) -> int:
        return 0

    def elapsed_time(self, _: Any) -> float:
        return 1.0


def _cuda() -> dict[str, Any]:
    """What is asked of `torch.cuda`."""
    card = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": card.name,
        "get_device_capability": (9, 0),
        "get_device_properties": card,
        "mem_get_info": (70 << 30, 80 << 30),
        "get_rng_state_all": [],
        "memory_stats": {},
    }
    answers |= dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"), 1 << 30
    )
    quiet = ("set_device", "empty_cache", "synchronize", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    answers |= dict.fromkeys((*quiet, "set_rng_state", "set_rng_state_all", "init", "_lazy_init", "ipc_collect"), None)
    fakes: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in answers.items()}
    fakes |= dict.fromkeys(("Event", "Stream", "stream", "device"), _Anything)
    fakes |= dict.fromkeys(("current_stream", "default_stream", "cudart"), lambda *_: _Anything())
    return fakes | {"get_rng_state": lambda *_: torch.zeros(8, dtype=torch.uint8)}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """This process, all of its threads, has a GPU while it lasts."""
    mode = PretendedGPU()
    enter_autocast, make_parameter, run = torch.autocast.__init__, torch.nn.Parameter.__new__, threading.Thread.run

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        enter_autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def parameter(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = make_parameter(cls, data, requires_grad)
        if _marked(data):
            _mark(made, True)
        return made

    def run_in_mode(self: threading.Thread) -> None:
        with PretendedGPU(mode.looks):
            run(self)

    with (
        patch.multiple(torch.cuda, **_cuda()),
        patch.object(torch, "Generator", _Generator),
        patch.object(torch.autocast, "__init__", autocast),
        patch.object(torch.nn.Parameter, "__new__", parameter),
        patch.object(threading.Thread, "run", run_in_mode),
        patch.object(torch, "is_autocast_enabled", lambda *_, ask=torch.is_autocast_enabled: ask("cpu")),
        patch.object(torch, "get_autocast_dtype", lambda *_, ask=torch.get_autocast_dtype: ask("cpu")),
        mode,
    ):
        yield mode

"""A copy of a training state in host memory, from which it is written while training goes on.

One copy, whatever the device: tensors go straight into pinned memory of the state's size, which is kept from save to
save, because to pin it takes longer than to fill it. DTensors keep their layout and take this rank's shards alone.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Snapshot:
    """Host memory for one copy of a state; the next copy overwrites it.

    Storages are copied whole and once each, so that tensors which share one still do: what is saved of the copy has
    the bytes of what would be saved of the state (on a GPU but for the name of the device).
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []  # uint8, in the order in which a state's storages are met
        self.held = 0  # bytes of the arenas that they are parts of

    def take(self, state: Mapping[str, Any]) -> Any:
        """A copy of `state`, which may change from now on: containers too, tensors in host memory.

        Raises:
            MemoryError, RuntimeError: there is no room for it.
        """
        tensors = [tensor for tensor in _tensors(state) if _is_copied_whole(tensor)]
        sources = {(storage := _local(tensor).untyped_storage())._cdata: storage for tensor in tensors}
        self._make_room([source.nbytes() for source in sources.values()])
        hosts = {}
        for (key, source), piece in zip(sources.items(), self._pieces, strict=True):
            on_device = torch.empty(0, dtype=torch.uint8, device=source.device)
            piece.copy_(on_device.set_(source, 0, (source.nbytes(),), (1,)), non_blocking=piece.is_pinned())
            hosts[key] = piece.untyped_storage()
        taken = copy.deepcopy(state, {id(tensor): _copied(tensor, hosts) for tensor in tensors})
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory were only queued
        return taken

    def _make_room(self, sizes: list[int]) -> None:
        """Pieces of these bytes: those there are as far as the sizes are the same, and the others in one arena."""
        kept = 0
        while kept < min(len(sizes), len(self._pieces)) and len(self._pieces[kept]) == sizes[kept]:
            kept += 1
        if 2 * sum(sizes[:kept]) < self.held:  # an arena stays as long as any part of it
            kept = 0
        del self._pieces[kept:]
        if not kept:
            self.held = 0
        missing = sizes[kept:]
        bounds = list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in missing), initial=0))
        self.held += bounds[-1]
        arena = _allocate(bounds[-1])
        # Through numpy: a torch view would share the whole arena's storage, and be saved with it.
        self._pieces += [
            torch.from_numpy(arena[begin : begin + size]) for begin, size in zip(bounds, missing, strict=False)
        ]


_ALIGNED = 64  # bytes


def _allocate(size: int) -> np.ndarray:
    """So many bytes of host memory, pinned where there is a GPU and no limit on locked memory.

    Registered, not asked of torch's allocator, which rounds every buffer up to a power of two.
    """
    arena = np.empty(size + _ALIGNED, np.uint8)
    if size and torch.cuda.is_available():
        cudart: Any = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(arena.ctypes.data, arena.nbytes, 0)) == 0:
            weakref.finalize(arena, cudart.cudaHostUnregister, arena.ctypes.data).atexit = False
        else:  # slower, and it works
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # takes the error, which the next kernel would raise
    start = -arena.ctypes.data % _ALIGNED
    return arena[start : start + size]


def _local(tensor: Tensor) -> Tensor:
    return _local(tensor._local_tensor) if isinstance(tensor, DTensor) else tensor


def _copied(tensor: Tensor, hosts: Mapping[int, torch.UntypedStorage]) -> Tensor:
    """The tensor with its bytes in `hosts`, by the address of its storage."""
    if isinstance(tensor, DTensor):
        # Not `from_local`, which would move the copy back to the mesh's device.
        return DTensor(_copied(tensor._local_tensor, hosts), tensor._spec, requires_grad=False)
    host = hosts[tensor.untyped_storage()._cdata]
    return torch.empty(0, dtype=tensor.dtype).set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())


def _is_copied_whole(tensor: Tensor) -> bool:
    """Whether a copy of bytes is a copy of the tensor; others (sparse ones, subclasses) are left to `copy.deepcopy`."""
    if isinstance(tensor, DTensor):
        return not tensor.requires_grad and _is_copied_whole(tensor._local_tensor)
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    return plain and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg() or tensor.__dict__)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)

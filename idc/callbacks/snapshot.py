"""A copy of a training state in host memory, from which it is written while training goes on.

One copy, whatever the device: tensors go straight into pinned memory, which is kept from save to save, because to pin
it takes longer than to fill it. DTensors keep their layout and take this rank's shards alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Snapshot:
    """Host memory for one copy of a state; the next copy overwrites it.

    Storages are copied whole and once each, so that tensors which share one still do: what is saved of the copy has
    the bytes of what would be saved of the state (on a GPU but for the name of the device).
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # uint8, in the order in which a state's storages are met
        self._used = 0

    def take(self, state: Mapping[str, Any]) -> Any:
        """A copy of `state`, which may change from now on: containers too, tensors in host memory.

        Raises:
            MemoryError, RuntimeError: there is no room for it.
        """
        self._used = 0
        storages: dict[int, torch.UntypedStorage] = {}
        known = {id(tensor): self._copy(tensor, storages) for tensor in _tensors(state) if _is_copied_whole(tensor)}
        del self._buffers[self._used :]
        taken = copy.deepcopy(state, known)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory were only queued
        return taken

    def _copy(self, tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        if isinstance(tensor, DTensor):
            # Not `from_local`, which would move the copy back to the mesh's device.
            spec = tensor._spec
            return DTensor(self._copy(tensor._local_tensor, storages), spec, requires_grad=False)
        source = tensor.untyped_storage()
        key = source._cdata
        if key not in storages:
            storages[key] = self._host(source)
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _host(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        size = source.nbytes()
        if self._used == len(self._buffers) or len(self._buffers[self._used]) != size:
            self._buffers[self._used :] = [_allocate(size)]
        buffer = self._buffers[self._used]
        self._used += 1
        on_device = torch.empty(0, dtype=torch.uint8, device=source.device)
        buffer.copy_(on_device.set_(source, 0, (size,), (1,)), non_blocking=buffer.is_pinned())
        return buffer.untyped_storage()


def _allocate(size: int) -> Tensor:
    pinned = torch.cuda.is_available() and size > 0
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        if not pinned:
            raise
        return torch.empty(size, dtype=torch.uint8)  # a limit on locked memory: slower, and it works


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

"""Averages in host memory, moved in a thread while the device goes on to the next batch.

Between two optimiser steps weights only are read, so that a thread may read them, too. On CUDA they pass through two
small pinned buffers: while one is filled, on a stream of its own, the CPU works on the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from idc.callbacks.background import Background


class HostLerp:
    """average <- average + weight (parameter - average), one update at a time."""

    def __init__(self) -> None:
        self._running: Background | None = None
        self._buffers: list[Tensor] = []  # two, pinned, of bytes
        self._stream: torch.cuda.Stream | None = None

    def start(self, averages: Sequence[Tensor], parameters: Sequence[Tensor], weight: float) -> None:
        """Begin an update; until `wait` returns, nothing else may change the parameters, or read the averages.

        Args:
            averages: float32, in host memory.
            parameters: of the averages' shapes, on one device and in any dtype; plain tensors.
            weight: in [0, 1].
        """
        self.wait()
        device = parameters[0].device if parameters else torch.device("cpu")
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def update() -> None:
            with torch.no_grad():
                copies = iter(parameters) if ready is None else self._copied(parameters, ready)
                for average, copy in zip(averages, copies, strict=True):
                    average.lerp_(copy.to(average.dtype), weight)

        self._running = Background("averages in host memory", update)

    def wait(self) -> None:
        """Wait for the update that is under way.

        Raises:
            RuntimeError: it failed, and the averages are those of no step.
        """
        if (running := self._running) is None:
            return
        running.wait()
        self._running = None
        if running.error is not None:
            raise RuntimeError("The averages in host memory could not be updated") from running.error

    def _copied(self, parameters: Sequence[Tensor], ready: torch.cuda.Event) -> Iterator[Tensor]:
        """Each parameter in host memory, valid until the next but one is asked for; the next is under way already."""
        device = parameters[0].device
        size = max(parameter.nbytes for parameter in parameters)
        if not self._buffers or self._buffers[0].nbytes < size:
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        with torch.cuda.device(device):
            self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_event(ready)

        def copy(index: int) -> tuple[Tensor, torch.cuda.Event]:
            parameter = parameters[index]
            target = self._buffers[index % 2][: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            with torch.cuda.device(device), torch.cuda.stream(self._stream):
                target.copy_(parameter, non_blocking=True)
                return target, torch.cuda.current_stream(device).record_event()

        following = copy(0)
        for index in range(len(parameters)):
            (present, arrived), last = following, index + 1 == len(parameters)
            if not last:
                following = copy(index + 1)
            arrived.synchronize()
            yield present

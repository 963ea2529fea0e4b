"""Work in a thread that the process waits for, however it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch


class Background:
    """Runs `work` in a thread, from the start on. The interpreter does not exit before it has ended (`sys.exit` and
    unhandled exceptions included).

    Attributes:
        error: what `work` raised, once it is done.
        seconds: how long it took, once it is done.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._work: Callable[[], None] | None = work
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, `timeout` seconds at most; whether it is."""
        self._thread.join(timeout)
        return self.done

    def _run(self) -> None:
        began = time.monotonic()
        try:
            assert self._work is not None
            if self._device is not None:  # a new thread's is the first one, on which it would take memory
                torch.cuda.set_device(self._device)
            self._work()
        except BaseException as error:  # told by whoever waits for it
            self.error = error
        finally:
            self._work = None  # and the state that it holds
            self.seconds = time.monotonic() - began

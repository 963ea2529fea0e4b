"""A signal to any one rank ends all of them cleanly, with a checkpoint and exit status 0.

Lightning's own handler communicates inside the signal handler, and hangs when only one rank is told. Here the handler
sets a flag; the ranks agree on it at the end of a training step, save one checkpoint and stop there. Validation and
sampling (through `requested`) are cut short, after which one more training step is taken and saved.

A preempted run logs a line and leaves `preempted.json` beside its checkpoints until it is gone on with. Under SLURM
(`--signal=SIGTERM@120`) it says which start of which job it was, as "JOB_ID.RESTART_COUNT": a job is queued again whose
present start is found in a marker, not for one that another job or an earlier start has left (README, "Many GPUs").
Lightning's own automatic requeue is replaced. Signals before training starts have their usual effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from idc.callbacks.checkpoint import Checkpoint, is_dry_run
from idc.data.ranks import any_rank
from idc.errors import UserError, nearest

MARKER = "preempted.json"


class Preemption(Callback):
    """Ends training after the current step when a signal has come.

    Args:
        signals: names of the signals to listen to. A second SIGINT (Ctrl-C) stops at once, without a save.

    Raises:
        UserError: an unknown signal.
    """

    def __init__(self, signals: Sequence[str] = ("SIGINT", "SIGTERM", "SIGUSR1")) -> None:
        for name in signals:
            if name not in signal.Signals.__members__:
                raise UserError(f"signals: there is no {name!r}{nearest(name, signal.Signals.__members__)}")
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.received: signal.Signals | None = None  # by this rank
        self.agreed = False  # by all ranks
        self.stopped = False  # the run was ended for it
        self._previous: dict[signal.Signals, Any] = {}
        self._undo = contextlib.ExitStack()

    def agree(self, trainer: Trainer) -> bool:
        """Whether any rank has been told to stop. Collective: all ranks call it equally often."""
        if not self.agreed:
            self.agreed = any_rank(self.received is not None)
        return self.agreed

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.received, self.agreed, self.stopped = None, False, False
        # Lightning registers its handlers after all set-up hooks, then fetches data before the next hook: ours take
        # the place of its registration, so that no signal meets its handler in between.
        connector = trainer._signal_connector
        connector.register_signal_handlers = self._install  # type: ignore[method-assign]  # of this instance
        self._undo.callback(connector.__dict__.pop, "register_signal_handlers", None)
        if _checkpoint(trainer) is None:
            rank_zero_warn("Preemption without idc.callbacks.checkpoint.Checkpoint: a preempted run saves nothing")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and (marker := _marker(trainer)):
            marker.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # In the middle of an accumulation the gradients would be lost: go on to the optimiser step.
        if trainer.fit_loop._should_accumulate() or not self.agree(trainer):
            return
        rank_zero_info(f"Preempted at step {trainer.global_step}: saving and stopping")
        if checkpoint := _checkpoint(trainer):
            checkpoint.request()  # it runs after this callback, in the same hook
        self._stop(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._previous and self.agree(trainer):
            raise StopIteration  # the loop takes it as the end of the data

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopped and trainer.is_global_zero and (marker := _marker(trainer)):
            names = [self.received.name] if self.received else []
            content = {"step": trainer.global_step, "signal": names, "slurm": _slurm_start()}
            marker.write_text(json.dumps(content) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    # Signals

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {number: signal.signal(number, self._handle) for number in self.signals}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received is not None:
                raise KeyboardInterrupt
            os.write(2, b"\nInterrupted: finishing the step and saving; Ctrl-C again stops at once\n")
        self.received = signal.Signals(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self._undo.close()

    def _stop(self, trainer: Trainer) -> None:
        """Leave the loops now: no validation, which Lightning runs on `should_stop`, and no minimum of steps."""
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        for owner, name, value in (
            (trainer, "limit_val_batches", 0),
            (loop, "min_epochs", None),
            (epoch_loop, "min_steps", None),
        ):
            self._undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        trainer.should_stop = self.stopped = True


def requested(trainer: Trainer) -> bool:
    """Whether the run is to stop: for long work between training steps, such as sampling previews.

    Collective until the answer is yes: all ranks must call it equally often. Without `Preemption`, False.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return any(callback.agree(trainer) for callback in callbacks if isinstance(callback, Preemption))


def _checkpoint(trainer: Trainer) -> Checkpoint | None:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, Checkpoint)), None)


def _marker(trainer: Trainer) -> Path | None:
    checkpoint = _checkpoint(trainer)
    return None if checkpoint is None or is_dry_run(trainer) else checkpoint.directory / MARKER


def _slurm_start() -> str | None:
    """This start of this job; None outside SLURM, which sets the count from the first restart on."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and f"{job}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"

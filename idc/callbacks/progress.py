"""A progress bar over the whole run, not over an epoch; plain lines where there is no terminal.

Validation, previews, test and predict are shown, too: at scale each takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from idc.callbacks.hang import alive
from idc.progress import EVERY, Lines


class Progress(ProgressBar):
    """Step of steps, time left, and the numbers that a stage logs with `prog_bar=True`.

    Args:
        every_n_seconds: how often a line is printed where standard output is not a terminal.
    """

    def __init__(self, every_n_seconds: float = EVERY) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bar: Any = None
        self._task: Any = None
        self._console: Any = None  # where there is something to show: on rank 0, within a loop
        self._fitting = False
        self._lines: Lines | None = None
        self._work: tuple[str, int | None] = "", None  # the running evaluation and its batches
        self._done = 0  # of them
        self._began = (0.0, 0)
        self._printed = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._fitting = True
        self._began = (time.monotonic(), trainer.global_step)
        self._printed = time.monotonic()
        self._open(trainer, "fit", self._total(trainer), trainer.global_step)

    def _open(self, trainer: Trainer, what: str, total: int | None, done: int = 0) -> None:
        if not (self._enabled and trainer.is_global_zero):
            return
        from rich.console import Console

        self._console = Console(soft_wrap=True)
        if self._console.is_terminal:
            self._bar = self._make_bar()
            self._task = self._bar.add_task(what, total=total, completed=done, text="")
            self._bar.start()

    def show(self, what: str, done: int, total: int | None) -> None:
        """`done` of `total` pieces of some work are finished; call it with 0 when the work begins."""
        if self._console is None:
            return
        if self._bar is None:
            if self._lines is None or done == 0:
                self._lines = Lines(what, total, self._console, self.every_n_seconds)
            self._lines.update(done)
        elif self._fitting:  # the bar itself counts steps
            self._bar.update(self._task, description=f"{what} {done}/{total or '?'}")
        else:
            self._bar.update(self._task, description=what, completed=done, total=total)

    def _make_bar(self) -> Any:
        from rich import progress

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=self._console,
        )

    @staticmethod
    def _total(trainer: Trainer) -> int | None:
        total = trainer.estimated_stepping_batches
        return int(total) if total != float("inf") else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, text=self._text(trainer, pl_module))
        elif self._console is not None and time.monotonic() - self._printed > self.every_n_seconds:
            self._line(trainer, pl_module)

    def _start_evaluation(self, trainer: Trainer, what: str, batches: Sequence[int | float]) -> None:
        total = sum(batches)
        self._work = what, int(total) if total != float("inf") else None
        self._done = 0
        if trainer.state.fn != TrainerFn.FITTING:
            self._open(trainer, *self._work)
        self.show(what, 0, self._work[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, "validating", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, "testing", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, "predicting", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._done += 1
        self.show(self._work[0], self._done, self._work[1])

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fitting:
            self._close()
        elif self._bar is not None:
            self._bar.update(self._task, description="fit", text=self._text(trainer, pl_module))
        elif self._console is not None:
            self._line(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._console = self._lines = None
        self._fitting = False

    def _text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        return "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = time.monotonic()
        began, first = self._began
        done, total = trainer.global_step - first, self._total(trainer)
        rate = (self._printed - began) / max(done, 1)
        left = f"  {rate * (total - trainer.global_step):.0f} s left" if total else ""
        self._console.print(
            f"step {trainer.global_step}/{total or '?'}  {self._text(trainer, pl_module)}  {rate:.2f} s/step{left}",
            highlight=False,
        )


def show(trainer: Trainer, what: str, done: int, total: int | None) -> None:
    """`Progress.show` of the trainer's progress bar, if it is ours, and a sign of life for `HangWatchdog`: for long
    work within a hook, such as previews."""
    alive(trainer, f"{done} of {total or '?'}, {what}")
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, Progress):
            callback.show(what, done, total)

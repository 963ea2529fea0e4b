"""A progress bar over the whole run, not over an epoch; plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


class Progress(ProgressBar):
    """Step of steps, time left, and the numbers that a stage logs with `prog_bar=True`.

    Args:
        every_n_seconds: how often a line is printed where standard output is not a terminal.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._enabled = True
        self._bar: Any = None
        self._task: Any = None
        self._console: Any = None
        self._began = (0.0, 0)
        self._printed = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not (self._enabled and trainer.is_global_zero):
            return
        from rich.console import Console

        self._console = Console(soft_wrap=True)
        self._began = (time.monotonic(), trainer.global_step)
        self._printed = time.monotonic()
        if self._console.is_terminal:
            self._bar = self._make_bar()
            self._task = self._bar.add_task("fit", total=self._total(trainer), completed=trainer.global_step, text="")
            self._bar.start()

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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._bar is not None:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._bar is not None:
            self._bar.update(self._task, description="fit", text=self._text(trainer, pl_module))
        elif self._console is not None:
            self._line(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._console = None

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

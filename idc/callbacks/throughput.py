"""Throughput: clips and steps a second, and the share of the time that training waited for data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from idc.data.ranks import data_place
from idc.types import Batch


class Throughput(Callback):
    """Logs `perf/clips_per_second`, `perf/steps_per_second` and `perf/data_wait_share` over each logging interval.

    Steps are queued on a GPU without waiting for it; over an interval the clock on the host is right all the same.
    Time spent in validation, previews and checkpoints is left out.
    """

    def __init__(self) -> None:
        self._step = 0
        self._reset(None)

    def _reset(self, now: float | None) -> None:
        self._clips = 0
        self._busy = self._waited = 0.0
        self._batch_ended = now
        self._batch_started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset(None)
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._batch_started = time.perf_counter()
        if self._batch_ended is not None:
            self._waited += self._batch_started - self._batch_ended

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._busy += now - self._batch_started
        self._batch_ended = now
        self._clips += len(batch) * data_place(trainer).ranks
        steps = trainer.global_step - self._step
        every = trainer.log_every_n_steps  # 0 logs nothing
        if steps < 0:  # rolled back
            self._reset(now)
            self._step = trainer.global_step
        elif steps and every and trainer.global_step % every == 0:
            total = max(self._busy + self._waited, 1e-9)
            metrics = {
                "perf/clips_per_second": self._clips / total,
                "perf/steps_per_second": steps / total,
                "perf/data_wait_share": self._waited / total,
            }
            if torch.cuda.is_available():
                metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            self._reset(now)
            self._step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch_ended = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batch_ended = time.perf_counter()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._batch_ended = None

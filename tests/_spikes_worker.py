"""A run whose loss is spoiled in chosen batches, and a record of the state before and after each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Poison(Callback):
    """Multiplies the loss of batches by number (from 0 on, over epochs) on the last rank, and records every batch.

    Args:
        log: the file of the record without its rank.
        factors: by batch number; "nan" too.
        per_epoch: batches of an epoch.
    """

    def __init__(self, log: str, factors: dict[str, str], per_epoch: int = 6) -> None:
        self.path, self.per_epoch = log, per_epoch  # `log` is Lightning's
        self.factors = {int(number): float(factor) for number, factor in factors.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        original: Any = pl_module.training_step

        def spoiled(batch: Any, batch_idx: int) -> Tensor:
            last = trainer.global_rank == trainer.world_size - 1
            return original(batch, batch_idx) * (self.factors.get(self.number(batch), 1.0) if last else 1.0)

        if self.factors:
            pl_module.training_step = spoiled  # type: ignore[method-assign]

    def number(self, batch: Any) -> int:
        return batch.epoch * self.per_epoch + batch.index

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "start", batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(trainer, "end", batch, **({"loss": float(outputs["loss"])} if outputs else {}))

    def _write(self, trainer: Trainer, place: str, batch: Any, **more: Any) -> None:
        record = {
            "place": place,
            "step": trainer.global_step,
            "batch": self.number(batch),
            "ids": list(batch.ids),
            "state": fingerprint(trainer.lightning_module.state_dict()),
            "optimizer": fingerprint([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            **more,
        }
        with open(f"{self.path}-{trainer.global_rank}", "a") as stream:
            stream.write(json.dumps(record) + "\n")


def fingerprint(value: Any) -> str:
    """A hash of all tensors in nested containers; of a DTensor this rank's shard."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for item in part.values():
                add(item)
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            own = part.to_local() if hasattr(part, "to_local") else part
            digest.update(own.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    add(value)
    return digest.hexdigest()[:16]

"""Back to the newest checkpoint within a run, without meeting the same batches again.

Weights, averages, the optimiser, the schedule, the callbacks' states and the count of optimiser steps are the
checkpoint's; the data and the loops' counts of batches and epochs go on from where the run is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from idc.callbacks.checkpoint import Checkpoint, CheckpointError, is_dry_run
from idc.callbacks.resume import resolve_together
from idc.errors import UserError
from idc.models.checkpoints import step_directories
from idc.models.weight_copy import reshard


def no_checkpoint(trainer: Trainer) -> str | None:
    """Why this run cannot be rolled back now, or None; the same on all ranks, which ask together."""
    checkpoint = _callback(trainer)
    if checkpoint is None or is_dry_run(trainer):
        return "there is no idc.callbacks.checkpoint.Checkpoint to roll back with"
    checkpoint.settle(trainer)
    found = bool(step_directories(checkpoint.directory)) if trainer.is_global_zero else None
    return None if trainer.strategy.broadcast(found) else "there is no checkpoint yet to roll back to"


def roll_back(trainer: Trainer, pl_module: LightningModule) -> Path:
    """Load the newest valid checkpoint of this run; the path that was loaded. All ranks call it together, at the end of
    a training batch whose step was not taken.

    Raises:
        CheckpointError: there is none, on all ranks alike.
    """
    checkpoint = _callback(trainer)
    assert checkpoint is not None
    checkpoint.settle(trainer)
    try:
        path = resolve_together(checkpoint.directory, checkpoint.directory.parent, trainer.strategy)
    except UserError as error:
        raise CheckpointError(f"Rolling back from step {trainer.global_step}: {error}") from None
    assert path is not None  # a folder's: there is one, or an error
    reshard(pl_module)
    connector = trainer._checkpoint_connector
    connector.resume_start(path, weights_only=True)
    loops = connector._loaded_checkpoint["loops"]["fit_loop"]
    connector.restore_model()
    connector.restore_callbacks()
    connector.restore_precision_plugin_state()
    connector.restore_optimizers_and_schedulers()
    _count_steps_as(trainer, loops)
    connector.resume_end()
    return Path(path)


def _count_steps_as(trainer: Trainer, loops: dict[str, Any]) -> None:
    """Take the counts of optimiser steps from a checkpoint, and no others of `loops`."""
    loop = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.load_state_dict(
        loops["epoch_loop.automatic_optimization.optim_progress"]
    )
    loop.manual_optimization.optim_step_progress.load_state_dict(
        loops["epoch_loop.manual_optimization.optim_step_progress"]
    )
    # The steps of Lightning's curves. The loop adds this batch's, as it did for the last one before the save.
    loop._batches_that_stepped = loops["epoch_loop.state_dict"]["_batches_that_stepped"]


def _callback(trainer: Trainer) -> Checkpoint | None:
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, Checkpoint)), None)

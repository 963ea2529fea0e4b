"""Checkpoints that exist entirely or not at all, sharded ones too, written while training goes on.

A save goes into a new directory `step-00001234.tmp-<nonce>/`; when all ranks have written and hashed their files,
rank 0 writes the manifest and renames the directory. A kill at any moment leaves the older checkpoints as they were.
Resume looks only at `step-*/` directories that match their manifest (`idc.callbacks.resume`).

    <dirpath>/step-00001234/state.ckpt       one file, or a directory of shards under FSDP2 and DeepSpeed
    <dirpath>/step-00001234/manifest.json
    <dirpath>/last -> step-00001234          for people; resume does not depend on it
    <dirpath>/converted/                     shards consolidated for one device (`resume.consolidate`)

All ranks must see the same file system.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from idc.callbacks.background import Background
from idc.callbacks.ema import original_name, tolerate
from idc.callbacks.plain import plain
from idc.callbacks.resume import CHECKPOINTS
from idc.callbacks.snapshot import Snapshot
from idc.callbacks.writing import CheckpointError, Save, describe
from idc.data.ranks import any_rank, every_rank
from idc.errors import StoppedError, UserError

__all__ = ["Checkpoint", "CheckpointError", "is_dry_run"]

_GROUP_TIMEOUT = timedelta(hours=2)  # a rank may wait so long for the slowest one's files


class Checkpoint(lightning_callbacks.Checkpoint):
    """Saves every so many optimiser steps or minutes, at the end of training, on request (`request`), and where a stage
    stops its run (`idc.errors.StoppedError`), which keeps the last complete step.

    Saves happen at the end of a training batch that stepped the optimiser, after all other callbacks (Lightning moves
    subclasses of its `Checkpoint` to the end), so the state is one from which training continues exactly. The
    LightningModule's own `on_train_batch_end` runs after it.

    With `asynchronous`, training waits while the state is copied to host memory (`idc.callbacks.snapshot`), and for the
    save before if that is still being written; the rest happens in a thread. A save that fails there ends the run at
    the end of the next step, on all ranks with one message. However a run ends, but for kill -9, it waits for the save
    that is under way. Logged for each save, at its step: `perf/checkpoint_stall_seconds`, which training waited for
    it, and `perf/checkpoint_write_seconds`, which its writing took.

    Args:
        dirpath: where checkpoints go; None for `checkpoints` in the run's folder (the logger's).
        every_n_steps: optimiser steps between saves; None for no saves by steps.
        every_n_minutes: minutes since the last save, by the clock of any rank; None for no saves by time.
        keep_last: how many of the newest checkpoints stay; a save needs room for one more.
        save_on_end: save at the last step of the run too, also of one that was stopped.
        asynchronous: write in the background. Takes host memory for one copy of what is saved (on one GPU and with DDP
            on rank 0 alone; under FSDP2 each rank's shards). DeepSpeed's own saves stay synchronous.

    Raises:
        UserError: bad arguments, another run writes to the same directory, or hyperparameters that could not be
            loaded back safely (anything but primitives, tensors and containers of them).
        CheckpointError: a save failed, on all ranks alike.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = 500,
        every_n_minutes: float | None = None,
        keep_last: int = 2,
        save_on_end: bool = True,
        asynchronous: bool = False,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}: must be more than 0, or null to turn it off")
        if keep_last < 1:
            raise UserError(f"keep_last={keep_last}: at least 1 checkpoint must stay")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.save_on_end = save_on_end
        self.asynchronous = asynchronous
        self.last_saved: Path | None = None
        self._snapshot = Snapshot()
        self._under_way: tuple[Save, Background] | None = None
        self._stalled = 0.0  # seconds that training has waited for the save that is under way
        self._group: Any = None
        self._directory: Path | None = None
        self._lock: IO[str] | None = None
        self._requested = False
        self._seen_step = self._saved_step = 0
        self._saved_at = 0.0
        self._loops: tuple[int, dict[str, Any]] | None = None  # at the end of a step, and which

    @property
    def directory(self) -> Path:
        """Where the checkpoints of the current run are; known from `setup` on."""
        if self._directory is None:
            raise RuntimeError("Checkpoint.directory is known once the trainer has called setup()")
        return self._directory

    def request(self) -> None:
        """Save at the end of this training step. To be called on all ranks (see `idc.callbacks.preemption`)."""
        self._requested = True

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        tolerate(pl_module)  # a run without EMA resumes from one with it
        if stage != "fit" or is_dry_run(trainer):
            return
        for owner in (pl_module, getattr(trainer, "datamodule", None)):
            plain(dict(getattr(owner, "hparams", {})), f"the hyperparameters of {type(owner).__name__}")
        if isinstance(trainer.strategy, ModelParallelStrategy) and not trainer.strategy._save_distributed_checkpoint:
            raise UserError(
                "save_distributed_checkpoint=False: ModelParallelStrategy must save shards (true, its default); "
                "resuming on one device consolidates them"
            )
        run_dir = trainer.log_dir or trainer.default_root_dir  # a collective: all ranks ask
        self._directory = Path(trainer.strategy.broadcast(self.dirpath or Path(run_dir, CHECKPOINTS)))
        problem = self._open_directory() if trainer.is_global_zero else None
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)
        if self._in_background(trainer) and trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # accumulating gradients: they are not part of a checkpoint
            return
        self._look(trainer)
        due = self.every_n_steps is not None and step // self.every_n_steps > self._seen_step // self.every_n_steps
        self._seen_step = step
        if getattr(pl_module, "can_stop", False):
            # When the next batch stops the run, the loops and the loader have already counted it.
            self._loops = step, copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        if self.every_n_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
            due |= any_rank(late)
        if self._requested or due or (self.save_on_end and _is_ending(trainer)):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_on_end and trainer.global_step > self._saved_step:
            self.save(trainer)
        self.settle(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the save that is under way, and save the last complete step of a run that `StoppedError`; the error
        of the run is what the user sees, not a save's."""
        try:
            if isinstance(exception, StoppedError) and not is_dry_run(trainer):
                step, loops = self._loops or (0, None)
                if self.save_on_end and loops and step == trainer.global_step > self._saved_step:
                    self.save(trainer, loops)
            self.settle(trainer)
            if isinstance(exception, StoppedError) and self._saved_step:
                rank_zero_info(f"--ckpt_path last goes on from step {self._saved_step}")
        except CheckpointError as error:
            rank_zero_warn(str(error))
        finally:
            self._close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint loadable with `weights_only` and by any strategy.

        Optimisers number parameters in their own order, FSDP2 names them; names fit both, because torch matches a
        saved state by position and accepts any key.
        """
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if key in checkpoint:
                checkpoint[key] = plain(dict(checkpoint[key]), key)
                checkpoint.pop("hparams_type", None)
        names = {id(parameter): original_name(name) for name, parameter in pl_module.named_parameters()}
        for optimizer, state in zip(trainer.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            if not state:  # DeepSpeed writes its own
                continue
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if all(isinstance(key, int) for group in state["param_groups"] for key in group["params"]) and all(
                id(parameter) in names for parameter in parameters
            ):
                by_index = [names[id(parameter)] for parameter in parameters]
                state["state"] = {by_index[index]: value for index, value in state["state"].items()}
                for group in state["param_groups"]:
                    group["params"] = [by_index[index] for index in group["params"]]

    # Saving

    def save(self, trainer: Trainer, loops: dict[str, Any] | None = None) -> Path | None:
        """Save now; all ranks call it together. Returns the new directory, or None in a fast_dev_run.

        When it returns, an asynchronous save is under way and its directory is not there yet: see `settle`.

        Args:
            loops: state of the loops and loaders in place of the present one.

        Raises `CheckpointError` on all ranks if any rank failed, in this save or in the one that was under way; the
        unfinished directory is removed.
        """
        if is_dry_run(trainer):
            return None
        began = time.monotonic()
        background = self._in_background(trainer)
        self._wait(trainer)
        save = self._new_save(trainer)
        state: dict[str, Any] = {}

        def copy_state() -> None:
            if trainer.is_global_zero:
                save.unfinished.mkdir(exist_ok=True)
            with _on_device(trainer) if background else contextlib.nullcontext():
                state.update(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))
            state["loops"] = loops or state["loops"]
            if not background:
                return
            if save.kind == "sharded" or trainer.is_global_zero:
                state.update(self._snapshot.take(state))
            else:
                state.clear()  # rank 0 alone writes it

        save.agree(describe(copy_state))
        self._saved_step, self._saved_at, self._requested = save.step, time.monotonic(), False
        if background:
            self._under_way = save, Background(f"checkpoint of step {save.step}", lambda: save.write(state))
            self._stalled = time.monotonic() - began
        else:
            save.write(state, trainer.strategy.save_checkpoint if save.kind == "deepspeed" else None)
            self._stalled = time.monotonic() - began
            self._tell(trainer, save, self._stalled)
        return save.final

    def settle(self, trainer: Trainer) -> Path | None:
        """Wait for the save that is under way; the directory of the newest save of this run. Every rank waits for its
        own part, so that one may call it alone.

        Raises:
            CheckpointError: it failed, on all ranks alike.
        """
        self._wait(trainer)
        return self.last_saved

    def wait_for_write(self, seconds: float) -> None:
        """Give the save that is under way so long to end; for whoever is about to end the process."""
        if (under_way := self._under_way) is not None:
            under_way[1].wait(seconds)

    def _look(self, trainer: Trainer) -> None:
        """Take note of a finished save, on all ranks in the same step: what failed on one must end all of them."""
        if self._under_way is not None:
            began = time.monotonic()
            done = every_rank(self._under_way[1].done)
            self._stalled += time.monotonic() - began
            if done:
                self._wait(trainer)

    def _wait(self, trainer: Trainer) -> None:
        if self._under_way is None:
            return
        began = time.monotonic()
        save, background = self._under_way
        background.wait()  # interrupted by Ctrl-C, it stays under way
        self._under_way = None
        self._stalled += time.monotonic() - began
        if background.error is not None:
            if isinstance(background.error, CheckpointError):
                raise background.error
            raise CheckpointError(f"Saving step {save.step} to {self.directory} failed ({background.error})")
        self._tell(trainer, save, background.seconds)

    def _tell(self, trainer: Trainer, save: Save, seconds: float) -> None:
        self.last_saved = save.final
        for logger in trainer.loggers:
            values = {"perf/checkpoint_stall_seconds": self._stalled, "perf/checkpoint_write_seconds": seconds}
            logger.log_metrics(values, step=save.step)
        rank_zero_info(f"Saved {save.final}")

    def _in_background(self, trainer: Trainer) -> bool:
        return self.asynchronous and _kind(trainer) != "deepspeed"

    def _new_save(self, trainer: Trainer) -> Save:
        name = f"step-{trainer.global_step:08d}.tmp-{secrets.token_hex(4)}"
        return Save(
            directory=self.directory,
            unfinished=self.directory / trainer.strategy.broadcast(name),
            kind=_kind(trainer),
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            strategy=type(trainer.strategy).__name__,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            keep_last=self.keep_last,
            group=self._group,
        )

    def _open_directory(self) -> str | None:
        """Rank 0: create the directory, claim it for this run, remove unfinished saves. Returns the problem, if any."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / ".lock").open("a")
        except OSError as error:
            return f"dirpath={str(self.directory)!r}: cannot be written ({error})"
        try:
            # A POSIX lock dies with the process and is not inherited by data workers, which outlive a kill -9.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._close()
            return (
                f"dirpath={str(self.directory)!r}: another run is writing its checkpoints there; give each run its own"
            )
        except OSError as error:
            rank_zero_warn(f"{self.directory} cannot be locked ({error}): make sure that no other run writes there")
        for path in self.directory.glob("*.tmp-*"):
            rank_zero_warn(f"Removing the unfinished {path}")
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        return None

    def _close(self) -> None:
        if self._under_way is not None:  # an error or Ctrl-C came between: the process does not end before it
            self._under_way[1].wait()
            self._under_way = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_dry_run(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _is_ending(trainer: Trainer) -> bool:
    """Whether this batch is the last of the run. The state at the end of training would count as an ended epoch."""
    last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return (
        trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or (trainer.is_last_batch and last_epoch)
    )


def _kind(trainer: Trainer) -> str:
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return "sharded"
    return "deepspeed" if isinstance(trainer.strategy, DeepSpeedStrategy) else "file"


@contextlib.contextmanager
def _on_device(trainer: Trainer) -> Iterator[None]:
    """FSDP2's state as it lies on the device, within the block: Lightning copies it to pageable host memory, from where
    a snapshot would copy it once more."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        yield
        return
    strategy: Any = trainer.strategy
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    strategy.lightning_module_state_dict = lambda: get_model_state_dict(strategy.model)
    strategy.optimizer_state = lambda optimizer: get_optimizer_state_dict(strategy.model, optimizer)
    try:
        yield
    finally:
        del strategy.lightning_module_state_dict, strategy.optimizer_state

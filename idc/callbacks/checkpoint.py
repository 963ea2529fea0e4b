"""Checkpoints that exist entirely or not at all, sharded ones too.

A save goes into a new directory `step-00001234.tmp-<nonce>/`; when all ranks have written and hashed their files,
rank 0 writes the manifest and renames the directory. A kill at any moment leaves the older checkpoints as they were.
Resume looks only at `step-*/` directories that match their manifest (`idc.callbacks.resume`).

    <dirpath>/step-00001234/state.ckpt       one file, or a directory of shards under ModelParallelStrategy
    <dirpath>/step-00001234/manifest.json
    <dirpath>/last -> step-00001234          for people; resume does not depend on it
    <dirpath>/converted/                     shards consolidated for one device (`resume.consolidate`)

All ranks must see the same file system.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

import idc
from idc.callbacks.ema import original_name, tolerate
from idc.callbacks.plain import plain
from idc.callbacks.resume import CHECKPOINTS, CONVERTED
from idc.errors import StoppedError, UserError
from idc.models.checkpoints import step_directories
from idc.models.manifest import STATE, FileRecord, Manifest, fsync_directory, fsync_file, hash_files, list_files


class CheckpointError(RuntimeError):
    """A save failed; the message says why and which older checkpoint is left."""


class Checkpoint(lightning_callbacks.Checkpoint):
    """Saves every so many optimiser steps or minutes, at the end of training, on request (`request`), and where a stage
    stops its run (`idc.errors.StoppedError`), which keeps the last complete step.

    Saves happen at the end of a training batch that stepped the optimiser, after all other callbacks (Lightning moves
    subclasses of its `Checkpoint` to the end), so the state is one from which training continues exactly. The
    LightningModule's own `on_train_batch_end` runs after it.

    Args:
        dirpath: where checkpoints go; None for `checkpoints` in the run's folder (the logger's).
        every_n_steps: optimiser steps between saves; None for no saves by steps.
        every_n_minutes: minutes since the last save, by the clock of any rank; None for no saves by time.
        keep_last: how many of the newest checkpoints stay; a save needs room for one more.
        save_on_end: save at the last step of the run too, also of one that was stopped.

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
        self.last_saved: Path | None = None
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # accumulating gradients: they are not part of a checkpoint
            return
        due = self.every_n_steps is not None and step // self.every_n_steps > self._seen_step // self.every_n_steps
        self._seen_step = step
        if getattr(pl_module, "can_stop", False):
            # When the next batch stops the run, the loops and the loader have already counted it.
            self._loops = step, copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        if self.every_n_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
            due |= trainer.strategy.reduce_boolean_decision(late, all=False)
        if self._requested or due or (self.save_on_end and _is_ending(trainer)):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_on_end and trainer.global_step > self._saved_step:
            self.save(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last complete step of a run that `StoppedError`; its error is what the user sees, not the save's."""
        try:
            if isinstance(exception, StoppedError) and not is_dry_run(trainer):
                step, loops = self._loops or (0, None)
                if self.save_on_end and loops and step == trainer.global_step > self._saved_step:
                    self.save(trainer, loops)
                if self._saved_step:
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

        Args:
            loops: state of the loops and loaders in place of the present one.

        Raises `CheckpointError` on all ranks if any rank failed; the unfinished directory is removed.
        """
        if is_dry_run(trainer):
            return None
        step, strategy = trainer.global_step, trainer.strategy
        final = self.directory / f"step-{step:08d}"
        unfinished = final.with_name(strategy.broadcast(f"{final.name}.tmp-{secrets.token_hex(4)}"))
        problem, records = None, {}
        # Whatever fails on one rank is told to all, or the others would wait for it.
        try:
            if trainer.is_global_zero:
                unfinished.mkdir()
            # Trainer.save_checkpoint ends in a barrier, where the others would wait for a rank that failed; here the
            # exchange of errors below is that barrier.
            state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            state["loops"] = loops or state["loops"]
            _write(trainer, state, unfinished / STATE)
            del state
        except Exception as error:
            problem = _describe(error)
        self._raise_together(trainer, problem, unfinished)
        try:
            records = _seal_own_files(unfinished, trainer.global_rank)
        except Exception as error:
            problem = _describe(error)
        shares = self._raise_together(trainer, problem, unfinished, records)
        try:
            if trainer.is_global_zero:
                _check_loadable(unfinished / STATE)
                self._manifest(trainer, shares).write(unfinished)
                _publish(unfinished, final)
                self._prune()
        except Exception as error:
            problem = _describe(error)
        self._raise_together(trainer, problem, unfinished)
        self.last_saved, self._saved_step, self._saved_at = final, step, time.monotonic()
        self._requested = False
        rank_zero_info(f"Saved {final}")
        return final

    def _raise_together(
        self, trainer: Trainer, problem: str | None, unfinished: Path, records: Mapping[str, FileRecord] | None = None
    ) -> dict[str, FileRecord]:
        """Exchange errors and hashes between the ranks: all go on, with all hashes, or all raise."""
        mine = (problem, dict(records or {}))
        everyone = [mine]
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            everyone = [mine] * trainer.world_size
            dist.all_gather_object(everyone, mine)
        problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(everyone) if text]
        if not problems:
            return {name: record for _, share in everyone for name, record in share.items()}
        if trainer.is_global_zero:
            shutil.rmtree(unfinished, ignore_errors=True)
        left = self.last_saved or next((path for _, path in reversed(step_directories(self.directory))), None)
        raise CheckpointError(
            f"Saving step {trainer.global_step} to {self.directory} failed ({'; '.join(problems)}). "
            + (f"The newest checkpoint is still {left}" if left else "There is no older checkpoint")
        )

    def _manifest(self, trainer: Trainer, files: Mapping[str, FileRecord]) -> Manifest:
        return Manifest(
            kind=_kind(trainer),
            serial=1 + max((manifest.serial for manifest, _ in step_directories(self.directory)), default=0),
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            world_size=trainer.world_size,
            strategy=type(trainer.strategy).__name__,
            versions={"idc": idc.__version__, "torch": str(torch.__version__), "lightning": lightning.__version__},
            files=files,
        )

    def _prune(self) -> None:
        """Remove all but the newest `keep_last`; a directory is renamed before its files go."""
        shutil.rmtree(self.directory / CONVERTED, ignore_errors=True)
        for _, path in step_directories(self.directory)[: -self.keep_last]:
            doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

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
    return "deepspeed" if "DeepSpeed" in type(trainer.strategy).__name__ else "file"


def _write(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    if _kind(trainer) != "file":
        trainer.strategy.save_checkpoint(state, path)
    elif trainer.is_global_zero:
        # Lightning's writer makes two copies in memory and a third in the system's temporary folder.
        torch.save(state, path)


def _seal_own_files(directory: Path, rank: int) -> dict[str, FileRecord]:
    """Flush to disk and hash the files that this rank wrote; DCP's are named `__<rank>_<n>.distcp`, others rank 0's."""

    def writer(name: str) -> int:
        match = re.match(r"__(\d+)_", Path(name).name)
        return int(match[1]) if match else 0

    own = [name for name in list_files(directory) if writer(name) == rank]
    for name in own:
        fsync_file(directory / name)
    return hash_files(directory, own)


def _check_loadable(state: Path) -> None:
    """Load what a resume will load with `weights_only`: a checkpoint that cannot be loaded is none."""
    path = state / "meta.pt" if state.is_dir() else state
    if path.is_file():
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _publish(unfinished: Path, final: Path) -> None:
    """Make a complete directory visible under its name, then move the `last` link."""
    fsync_directory(unfinished)
    if final.exists():  # this step again, after a rewind
        replaced = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        final.rename(replaced)
        unfinished.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        unfinished.rename(final)
    fsync_directory(final.parent)
    link = final.parent / f"last.tmp-{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # not every file system has links, and nothing but people follows this one
        link.symlink_to(final.name)
        os.replace(link, final.parent / "last")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"

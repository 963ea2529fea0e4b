"""A run that hangs ends, with every rank's Python stacks in `<run>/stacks/rank-N.txt` and in the log.

A collective that one rank never joins is not an error: the others wait, for torch's own timeout or for ever, and nobody
knows where. Here each rank's own thread sees that nothing ends any more (`idc.callbacks.watch`), all of them dump, and
all processes end with status 75, so that an elastic launcher or a scheduler starts them again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.torch_version import TorchVersion

from idc.callbacks.checkpoint import Checkpoint, is_dry_run
from idc.callbacks.watch import Watch
from idc.errors import UserError

STACKS = "stacks"
# torch's record of the last collectives, which its own timeout writes too. Read when the process group starts.
_RENAMED = TorchVersion(torch.__version__) >= "2.9"  # from which on torch warns of the older names
_BUFFER = "TORCH_FR_BUFFER_SIZE" if _RENAMED else "TORCH_NCCL_TRACE_BUFFER_SIZE"
_RECORDER = {_BUFFER: "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


class HangWatchdog(Callback):
    """Ends all ranks when no step, held-out batch, rollout or preview has ended for `timeout` seconds.

    It watches from `setup` on, when the data have been prepared and their indexes read, to the end. Until the first
    step (or batch of validate, test and predict), `first_timeout` holds: weights are loaded and sharded, features are
    encoded, held-out batches are tried. Where a step has been seen to take longer than a fifth of `timeout`, it waits
    for five times that. A process that torch's own timeout aborts leaves its stacks there, too.

    Args:
        timeout: seconds; more than any step, held-out batch or preview takes, and less than the process group's own
            timeout (half an hour in Lightning), which ends each rank by itself.
        first_timeout: seconds for what loads or compiles: each part of the start, the first step, the first held-out
            batch, the last save.

    Raises:
        UserError: for a time that is not positive, or a first one that is the shorter.
    """

    def __init__(self, timeout: float = 1200.0, first_timeout: float = 7200.0) -> None:
        if not 0 < timeout <= first_timeout:
            raise UserError(
                f"timeout={timeout}, first_timeout={first_timeout}: must be positive seconds, and the first, which "
                "compiles and loads, not shorter; 1200 and 7200 are usual"
            )
        self.timeout, self.first_timeout = timeout, first_timeout
        self._watch: Watch | None = None
        self._running = False  # steps are taken; before, all may take long
        for name, value in _RECORDER.items():
            os.environ.setdefault(name, value)

    def alive(self, what: str) -> None:
        """There is progress: `what` has ended. For long work within a hook or step."""
        self._beat(what)

    # Hooks ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if is_dry_run(trainer):
            return
        folder = Path(trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir), STACKS)
        run = trainer.strategy.broadcast(secrets.token_hex(4))
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "nccl_timeout_rank_"))
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_timeout_rank_"))
        stage_module: Any = pl_module
        stage_module.on_progress = self.alive
        with contextlib.suppress(OSError):  # without a folder, stacks go to the log alone
            folder.mkdir(parents=True, exist_ok=True)
        place = trainer.global_rank, trainer.world_size
        saves = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, Checkpoint)]

        def finish_saves(seconds: float) -> None:
            for checkpoint in saves:
                checkpoint.wait_for_write(seconds)

        self._running = False
        self._watch = Watch(folder, place, run, self.timeout, self.first_timeout, finish_saves).start()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _beat(self, what: str, long: bool = False) -> None:
        if self._watch is not None:
            self._watch.beat(what, long or not self._running)

    def _run(self, what: str) -> None:
        self._running = True
        self._beat(what, long=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run("the start of training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._beat(f"step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("the last step", long=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._beat("the start of the sanity check")
        else:
            self._run("the start of an evaluation")

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._beat(f"held-out batch {batch_idx}")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]  # of like arguments

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("an evaluation")

    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._beat(f"the copy of step {trainer.global_step}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()


def alive(trainer: Any, what: str) -> None:
    """`HangWatchdog.alive` of the trainer's watchdog, if it has one."""
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, HangWatchdog):
            callback.alive(what)

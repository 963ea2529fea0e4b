"""torchrun in a process forked from the server of `_server`: the agent, and the ranks that it starts.

The agent runs torchrun's own `main`, and has it fork ranks (`--run-path --start-method fork`) where it would start
Python once more for each: they meet, die and are started again alike, at a fifth of the time.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.run import main as torchrun

from idc.cli import main


class Killed(Callback):
    """SIGKILL ends the last rank of torchrun's first attempt in step `step`, before its gradients are known."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and trainer.global_step + 1 == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def agent(folder: Path, ranks: int, restarts: int, command: list[str], environment: dict[str, str]) -> None:
    """`torchrun --standalone ... -m idc COMMAND`, output to `<folder>/agent.err`; leads a process group of its own."""
    os.setsid()
    torch.set_num_threads(1)
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(folder / "agent.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(Path(__file__).parent.parent)
    settings = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    torchrun([*settings, "--run-path", "--start-method=fork", __file__, *command])


def rank(command: list[str]) -> None:
    """One rank. It ends by returning: of processes that it forked, torchrun takes no exit with status 0 for an end."""
    if code := main(command):
        sys.exit(code)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank(sys.argv[1:])

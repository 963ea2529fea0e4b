"""Videos of a model, made by `idc generate` before they are judged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from idc.data.benchmark import ITEMS, Item, read_items
from idc.errors import UserError

# Of a launcher that has started this process: the generating one starts ranks of its own.
_LAUNCHED = (
    "LOCAL_RANK",
    "NODE_RANK",
    "RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Generated:
    """Runs `idc generate` into the folder of the videos, in a process that has ended, and freed its card, before a
    metric is loaded. It goes on where it was stopped, and makes what is there already only where it would differ.

    Args:
        config: its recipes, in order.
        args: further arguments, such as [--model.init_args.checkpoint, runs/sft/version_0].
        system: name of the model, as tables print it.
    """

    def __init__(self, config: list[str], args: list[str] | None = None, system: str = "generated") -> None:
        self.config, self.args, self.system = config, args or [], system

    def items(self, folder: str | Path) -> list[Item]:
        """Make the videos, all of them, on rank 0 (which may start more ranks for it).

        Raises:
            UserError: if generation ends without a folder of videos; those that failed are judged as missing.
        """
        files = [argument for path in self.config for argument in ("--config", path)]
        command = ["generate", *files, *self.args, "--model.init_args.out", str(folder)]
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        done = subprocess.run([sys.executable, "-m", "idc", *command], env=environment)
        if done.returncode not in (0, 3) or not (Path(folder) / ITEMS).is_file():
            raise UserError(f"source: idc {' '.join(command)} ended with status {done.returncode}; it says why above")
        return read_items(Path(folder) / ITEMS)

    def make(self, folder: str | Path, ids: list[str]) -> None:
        """Nothing is left to make."""

"""What the server of `_server` does once for all of its processes, after its other imports.

The classes that a recipe names are read by the parser, whose memory of them the processes inherit. And what is there
by now is set aside from garbage collection: a full one would walk through some million objects of imported libraries,
and write to their memory, which the processes share.
"""

from __future__ import annotations

import gc
from pathlib import Path

from idc.lightning_cli import CLI, command_line

RECIPE = Path(__file__).parent.parent / "recipes" / "sft.yaml"


class Reading(CLI):
    """The command line up to the parser: no seed is set, nothing is made and nothing runs."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


command_line(Reading, "fit", ["--config", str(RECIPE)])
gc.collect()
gc.freeze()

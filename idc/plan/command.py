"""`idc plan`: what a run of `idc fit` would take, told without weights and before anything is started."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from idc.errors import UserError, check_file
from idc.recipes import check_command_line, check_recipe_given, check_stage

if TYPE_CHECKING:
    from idc.plan.devices import Device
    from idc.plan.estimate import Plan

_USAGE = (
    "idc plan --config RECIPE [--config OVERLAY ...] [--KEY VALUE ...] [--device NAME ...] [--share X] [--strict] "
    "[--json FILE] [--measure] [--sizes-of RECIPE]"
)
_SHARE = (
    "of the device's stated peak that training's forward and backward passes reach, recomputation counted as work, in "
    "place of the assumed: the `planner's share` that idc bench train prints, and not its share of the matrix ceiling"
)
_SHOWN = 4  # changes that would make a run fit


def main(args: Sequence[str]) -> int:
    """Run the command. Returns 0; with `--strict` 1 where a device's memory does not suffice."""
    from idc.plan.devices import DEVICES, device

    parser = argparse.ArgumentParser("idc plan", usage=_USAGE, allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    names = ", ".join([*DEVICES, "cpu"])
    add("--device", action="append", metavar="NAME", help=f"to plan for; may be repeated (default: h100): {names}")
    add("--share", type=float, metavar="X", help=_SHARE)
    add("--strict", action="store_true", help="exit with status 1 where the memory does not suffice")
    add("--json", type=Path, metavar="FILE", help="write the plan there, too")
    add("--measure", action="store_true", help="run one step here with random weights and compare its memory")
    add(
        "--sizes-of",
        type=Path,
        metavar="RECIPE",
        help="of the run that an alignment will start from, in place of model.init_args.checkpoint; where that is not "
        "there yet, those of recipes/scale/wan1.3b.yaml if left out",
    )
    own, rest = parser.parse_known_args(list(args))
    if own.share is not None and not 0 < own.share <= 1:
        raise UserError(f"--share {own.share}: must be above 0 and at most 1; 0.4 is usual for a GPU")
    if own.json is not None:
        check_file(own.json, "--json")
    devices = [device(name) for text in own.device or ["h100"] for name in text.split(",")]
    check_recipe_given(rest, "plan")
    check_command_line(rest)
    check_stage(rest, "plan")
    with _uncollected():
        from idc.plan.estimate import Plan
        from idc.plan.recipe import read

        plan = Plan(read(rest, own.sizes_of), own.share)
    _show(plan, devices)
    if own.json is not None:
        from idc.plan.tables import as_json

        own.json.write_text(json.dumps(as_json(plan, devices), indent=1) + "\n", encoding="utf-8")
    if own.measure:
        from rich.console import Console

        from idc.plan.measure import measure

        Console().print(measure(plan), highlight=False)
    short = [device for device in devices if not _fits(plan, device)]
    for device_ in short:
        _warn(plan, device_)
    return 1 if short and own.strict else 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which takes a fifth of the time of imports that leave hardly any garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _show(plan: Plan, devices: Sequence[Device]) -> None:
    from rich.console import Console

    from idc.plan.tables import tables

    console = Console()
    if not console.is_terminal:
        console.width = 140
    for table in tables(plan, devices):
        console.print(table, markup=not isinstance(table, str), highlight=False)


def _fits(plan: Plan, device: Device) -> bool:
    from idc.plan.tables import on_gpu

    return plan.memory(on_gpu(device)).total <= device.memory * 2**30


def _warn(plan: Plan, device: Device) -> None:
    from idc.plan.tables import GIB, on_gpu

    room = device.memory * GIB
    peak = plan.memory(on_gpu(device)).total
    lines = [f"idc plan: warning: out of memory on {device.name}: {peak / GIB:.1f} GiB of {device.memory:.1f}"]
    changes = list(islice(plan.changes(room), _SHOWN))
    lines += [f"  {change.setting}: {change.memory.total / GIB:.1f} GiB, fits" for change in changes]
    if not changes:
        lines.append("  no single change of the settings known here makes it fit: fewer frames, or more ranks")
    print("\n".join(lines), file=sys.stderr)

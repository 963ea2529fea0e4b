"""Time from the command to the end of the first training step of recipes/sft.yaml, cold and warm, with its parts.

    python tests/benchmarks/bench_start.py [--rounds 5] [--clips 4096] [--json]

Cold: no shards and no cached features (but a warm page cache). Warm: both are there. Each start is a process of its
own in a temporary folder, runs the command as `python -m idc fit --config recipes/sft.yaml` does, and notes the time at
milestones through a callback. It ends after the first step. Aim: below 20 s warm, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MILESTONES = {
    "python": "interpreter",
    "imported": "imports of torch, Lightning and the kit",
    "instantiated": "recipe parsed, objects made",
    "data": "shards (cold) and indexes",
    "model": "features (cold) and model",
    "train_start": "optimiser, loader, loggers",
    "batch": "first batch",
    "step": "first step",
}
OVERLAY = """
trainer: {callbacks+: [{class_path: bench_start.Milestones}]}
"""


def note(name: str) -> None:
    with open(os.environ["IDC_BENCH_FILE"], "a") as file:
        file.write(json.dumps([name, time.time()]) + "\n")


def child(args: list[str]) -> None:
    """What the subprocess runs: the command line, with the time noted after its imports."""
    note("python")
    from idc import lightning_cli  # noqa: F401
    from idc.cli import main as idc

    note("imported")
    raise SystemExit(idc(args))


def __getattr__(name: str) -> Any:
    """`Milestones` is made on demand: importing Lightning at the top would hide its time."""
    if name != "Milestones":
        raise AttributeError(name)
    from lightning.pytorch import Callback

    class Milestones(Callback):
        def __init__(self) -> None:
            note("instantiated")

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            note("data")

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            note("model")

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            note("train_start")

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            note("batch")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            note("step")
            os._exit(0)  # what comes after the first step is not measured

    Milestones.__module__ = __name__
    globals()[name] = Milestones
    return Milestones


def start(folder: Path, clips: int, extra: list[str]) -> dict[str, float]:
    """Seconds of each part of one start."""
    marks, overlay = folder / "marks.jsonl", folder / "milestones.yaml"
    marks.unlink(missing_ok=True)
    overlay.write_text(OVERLAY)
    recipe = folder / "sft.yaml"
    recipe.write_text((ROOT / "recipes/sft.yaml").read_text().replace("count: 4096", f"count: {clips}"))
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "IDC_BENCH_FILE": str(marks), "PYTHONPATH": paths}
    command = [sys.executable, "-c", "import sys, bench_start; bench_start.child(sys.argv[1:])", "fit"]
    began = time.time()
    done = subprocess.run(
        [*command, "--config", str(recipe), "--config", str(overlay), *extra],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if not marks.exists() or '"step"' not in marks.read_text():
        raise SystemExit(f"the run ended before its first step:\n{done.stderr[-3000:]}")
    times = dict(json.loads(line) for line in marks.read_text().splitlines())
    parts, last = {}, began
    for name in MILESTONES:
        parts[name], last = times[name] - last, times[name]
    return {**parts, "total": last - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="warm starts; there is one cold start")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--json", action="store_true")
    options, extra = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        cold = start(Path(folder), options.clips, extra)
        warm = [start(Path(folder), options.clips, extra) for _ in range(options.rounds)]
    if options.json:
        print(json.dumps({"clips": options.clips, "cold": cold, "warm": warm}))
        return
    from rich.console import Console
    from rich.table import Table

    title = f"seconds to the first step, {options.clips} clips, {len(warm)} warm starts"
    table = Table("", "warm: median (min to max)", "cold, one start", title=title)
    for name, text in {**MILESTONES, "total": "command to first step"}.items():
        values = [round_[name] for round_ in warm]
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        table.add_row(text, spread, f"{cold[name]:.2f}", style="bold" if name == "total" else None)
    Console().print(table)


if __name__ == "__main__":
    main()

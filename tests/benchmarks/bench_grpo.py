"""Seconds of a GRPO iteration and its parts: all steps against one, with the subject cache on and off.

    python tests/benchmarks/bench_grpo.py [--rounds 3] [--iterations 6] [--batch 32] [--group 8] [--threads 2] [--json]
        [--config FILE ...]

Runs of `idc fit` with recipes/grpo.yaml at its scale, each in a process of its own with the same groups of the same
conditions; rounds take turns. A value is the median over iterations and rounds, without each run's first iteration.
Encoding, rollouts, rewards and training are the parts that the stage itself logs (`perf/*_seconds`); "trained" are the
forward passes with a gradient, in samples per iteration, and "sampled" those without. `--config` puts further recipes
over it, such as recipes/alignment/wan1.3b.yaml. The machine's other load counts; give it an idle one.
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

import torch
import yaml
from lightning.pytorch import Callback

ROOT = Path(__file__).parents[2]
PARTS = ("encode", "rollout", "reward", "train")
OVERLAYS: dict[str, tuple[str, ...]] = {"all steps": (), "one step": ("recipes/alignment/one_step.yaml",)}
KINDS = [(way, cache) for way in OVERLAYS for cache in (True, False)]


class Meter(Callback):
    """A line of JSON per iteration in `path`: the stage's parts, the whole, and samples through the transformer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.passes = {"trained": 0, "sampled": 0}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def count(module: Any, arguments: Any, keywords: Any) -> None:
            latents = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            if latents is not None:  # None builds the subject cache
                self.passes["trained" if torch.is_grad_enabled() else "sampled"] += len(latents)

        pl_module.transformer.register_forward_pre_hook(count, with_kwargs=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.passes = dict.fromkeys(self.passes, 0)
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        line = {"whole": time.perf_counter() - self.began, **self.passes}
        line |= {part: float(trainer.callback_metrics[f"perf/{part}_seconds"]) for part in PARTS}
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line) + "\n")


def run(way: str, cache: bool, arguments: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The iterations of one run but the first."""
    log = folder / "meter.jsonl"
    log.unlink(missing_ok=True)
    overlay = {
        "trainer": {
            "max_steps": arguments.iterations + 1,
            "limit_val_batches": 0,
            "logger": False,
            "callbacks": [{"class_path": "bench_grpo.Meter", "init_args": {"path": str(log)}}],
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
        "model": {"init_args": {"rollouts": {"cache": cache}, "rollouts_a_step": None}},
        "data": {"init_args": {"batch_size": arguments.batch, "group_size": arguments.group}},
    }
    own = folder / "overlay.yaml"
    own.write_text(yaml.safe_dump(overlay))
    files = ["recipes/grpo.yaml", *arguments.config, *OVERLAYS[way], str(own)]
    command = [sys.executable, "-m", "idc", "fit", *(word for file in files for word in ("--config", file))]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return [json.loads(line) for line in log.read_text().splitlines()][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=6, help="of a run, beside the first, which is not counted")
    parser.add_argument("--batch", type=int, default=32, help="rollouts an iteration")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", nargs="*", default=[], help="recipes over recipes/grpo.yaml")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.config = [str(Path(file).resolve()) for file in arguments.config]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for way, cache in KINDS[:: 1 if number % 2 == 0 else -1]:
                found[way, cache] += run(way, cache, arguments, Path(folder))
    names = ("whole", *PARTS, "trained", "sampled")
    rows = [
        {"way": way, "subject cache": cache, "n": len(lines)}
        | {name: statistics.median(line[name] for line in lines) for name in names}
        for (way, cache), lines in found.items()
    ]
    if arguments.json:
        print(json.dumps({"settings": {**vars(arguments), "torch": torch.__version__}, "rows": rows}, indent=1))
        return
    print(f"{'':26}{'n':>4}" + "".join(f"{name:>10}" for name in names))
    for row in rows:
        label = f"{row['way']}, cache {'on' if row['subject cache'] else 'off'}"
        print(f"{label:26}{row['n']:>4}" + "".join(f"{row[name]:10.3f}" for name in names))
    whole = {(row["way"], row["subject cache"]): row["whole"] for row in rows}
    for cache in (True, False):
        ratio = whole["all steps", cache] / whole["one step", cache]
        print(f"one step is {ratio:.2f} times as fast as all steps with the cache {'on' if cache else 'off'}")


if __name__ == "__main__":
    main()

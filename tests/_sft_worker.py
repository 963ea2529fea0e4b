"""The SFT recipe at a size for tests: small overlays, runs through the command line here or in processes of their own.

Runs are observed by a callback that the overlay adds, so that everything between the command and the loss is what a
user runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.tensorboard
import yaml
from _server import free_port, join, launch
from _survival_worker import place_kill
from lightning.pytorch import Callback, LightningModule, Trainer

from idc.cli import main

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "sft.yaml"
BUCKET = [5, 32, 32]
WORLD = {"frames": 5, "height": 32, "width": 32, "reference_size": 16}
TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "freq_dim": 32}


def toy(path: str, count: int, seed: int, **settings: Any) -> dict[str, Any]:
    """A source of toy clips, as a recipe writes it."""
    arguments = {"path": path, "count": count, "seed": seed, **WORLD, **settings}
    return {"class_path": "idc.data.sources.ToyShards", "init_args": arguments}


def shards(path: str) -> dict[str, Any]:
    """A source of finished shards, as a recipe writes it."""
    return {"class_path": "idc.data.sources.ShardSource", "init_args": {"path": path}}


def tiny_overlay(data: str | Path, runs: str | Path, features: bool = True) -> dict[str, Any]:
    """Two layers of width 32 on 48 clips of 5 frames of 32x32 pixels; a step takes hundredths of a second."""
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 8,
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(runs), "name": "sft"},
            },
        },
        "model": {
            "init_args": {
                "transformer": {**TRANSFORMER, "id_blocks": {"layers": 1}},
                "text": {"class_path": "idc.models.conditioners.ToyTextConditioner", "init_args": {"dim": 32}},
                "vlm": {"class_path": "idc.models.vlm.ToyVLM", "init_args": {"dim": 32}},
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 3.0e-3, "betas": [0.9, 0.99], "weight_decay": 0.01},
                },
                "schedule": {"warmup_steps": 3, "decay": "cosine", "final": 0.1},
                "sampling": {"steps": 2, "scale": 2.5, "shift": 1.0},
            }
        },
        "data": {
            "init_args": {
                "sources": [toy(f"{data}/train", 48, 0)],
                "val_sources": [toy(f"{data}/held_out", 8, 1_000_000)],
                "buckets": [BUCKET],
                "batch_size": 8,
                "features": f"{data}/features" if features else None,
                "quarantine": f"{runs}/quarantine.jsonl",
            }
        },
    }


def merge(base: dict[str, Any], *changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes put over it, deeply, as later `--config` files are; lists are replaced."""
    for change in changes:
        merged = dict(base)
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else value
        base = merged
    return base


def written(path: Path, content: dict[str, Any]) -> Path:
    """`content` as the YAML file `path`."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Recorder(Callback):
    """Appends to `<log>-<rank>`: a line per training step and one per validation, losses as they are, to the bit.

    Args:
        log: the file without its rank.
        kill_step, kill_after: this many seconds after that step (before it is saved) an alarm ends this process,
            whatever it is doing then.
        signal_step: the last rank sends itself SIGTERM in that step.
    """

    def __init__(self, log: str, kill_step: int = 0, kill_after: float = 0.0, signal_step: int = 0) -> None:
        self.path, self.kill_step, self.signal_step = log, kill_step, signal_step  # `log` is Lightning's
        self.kill_after = kill_after

    def _write(self, trainer: Trainer, **record: Any) -> None:
        with open(f"{self.path}-{trainer.global_rank}", "a") as stream:
            stream.write(json.dumps({"step": trainer.global_step, **record}) + "\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(trainer, loss=float(outputs["loss"]), ids=batch.ids, seeds=batch.seeds_B.tolist())
        if self.kill_step and trainer.global_step == self.kill_step:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(self.kill_after, 1e-6))
        if (
            self.signal_step
            and trainer.global_step == self.signal_step
            and trainer.global_rank == trainer.world_size - 1
        ):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self._write(trainer, validation=values)


class SignalInValidation(Callback):
    """This process sends itself SIGTERM before held-out batch `batch` of the validation at step `step`."""

    def __init__(self, batch: int, step: int) -> None:
        self.batch, self.step = batch, step

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if (batch_idx, trainer.global_step) == (self.batch, self.step):
            os.kill(os.getpid(), signal.SIGTERM)


def observed(overlay: dict[str, Any], log: str, **faults: Any) -> dict[str, Any]:
    """`overlay` with the recorder among its callbacks, or, if it names none, added to the recipe's."""
    entry = {"class_path": "_sft_worker.Recorder", "init_args": {"log": log, **faults}}
    named = overlay["trainer"].get("callbacks")
    # `callbacks+` beside `callbacks` in one file would replace them.
    return merge(overlay, {"trainer": {"callbacks+": [entry]} if named is None else {"callbacks": [*named, entry]}})


def callbacks(save_every: int = 3, ema: float = 0.9, count: int = 2) -> dict[str, Any]:
    """The recipe's callbacks, with other numbers and without the ones that only draw."""
    return {
        "trainer": {
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "idc.callbacks.ema.EMA", "init_args": {"decay": ema}},
                {"class_path": "idc.callbacks.previews.Previews", "init_args": {"count": count}},
                {
                    "class_path": "idc.callbacks.checkpoint.Checkpoint",
                    "init_args": {"every_n_steps": save_every, "keep_last": 2},
                },
                {"class_path": "idc.callbacks.preemption.Preemption"},
            ],
        }
    }


@dataclass(frozen=True)
class Fit:
    """A run of `idc fit`: its folder, what lies over the recipe, how many processes, and the fault that it meets."""

    folder: Path
    overlay: dict[str, Any]
    args: tuple[str, ...] = ()
    ranks: int = 1
    overlays: tuple[Path, ...] = ()  # further files, between the recipe and ours
    kill_place: str | None = None  # "step", or one of `_survival_worker.PLACES` within the save of `kill_step`
    kill_step: int = 0
    kill_after: float = 0.0
    signal_step: int = 0
    log: str = "log"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run's folder as TensorBoard's logger makes it."""
        return self.folder / "runs" / "sft" / "version_0"

    def command(self) -> list[str]:
        """The arguments of `idc`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        faults: dict[str, Any] = {"signal_step": self.signal_step}
        if self.kill_place == "step":
            faults |= {"kill_step": self.kill_step, "kill_after": self.kill_after}
        content = observed(self.overlay, str(self.folder / self.log), **faults)
        own = written(self.folder / f"{self.log}.yaml", content)
        files = [argument for path in (*self.overlays, own) for argument in ("--config", str(path))]
        return ["fit", "--config", str(RECIPE), *files, *self.args]

    def finish(self, timeout: float = 90) -> list[int | None]:
        """Run in processes of their own to the end; the exit codes of all ranks."""
        command, port = self.command(), free_port()
        return join(launch(_rank, [(self, command, rank, port) for rank in range(self.ranks)]), timeout)

    def errors(self) -> str:
        """The end of what the ranks wrote to their standard error, for a failed assertion."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.err")))

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """All that a rank has recorded, over all starts."""
        path = self.folder / f"{self.log}-{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self, rank: int = 0) -> dict[int, dict[str, Any]]:
        """Loss, ids and seeds by step; a step that was taken twice must have been the same to the bit."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.lines(rank):
            if "loss" in line:
                step = line.pop("step")
                assert found.setdefault(step, line) == line, f"step {step} was not repeated exactly"
        return found

    def losses(self) -> list[float]:
        """The global batch's loss by step: the mean over ranks."""
        ranks = [self.steps(rank) for rank in range(self.ranks)]
        return [sum(r[step]["loss"] for r in ranks) / self.ranks for step in sorted(ranks[0])]

    def validation(self) -> dict[int, dict[str, float]]:
        """Held-out losses by step, as logged (equal on all ranks)."""
        return {line["step"]: line["validation"] for line in self.lines() if "validation" in line}


def _rank(fit: Fit, command: list[str], rank: int, port: int) -> None:
    """One process of a run; its exit status is the command's, its output goes to files beside the run."""
    torch.set_num_threads(1)
    os.environ.update(fit.environment)
    if fit.ranks > 1:  # so told, Lightning takes this process as a rank and starts no others
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(fit.ranks)
    if fit.kill_place not in (None, "step"):
        place_kill(SimpleNamespace(folder=fit.run, kill_place=fit.kill_place, kill_step=fit.kill_step))  # type: ignore[arg-type]
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(fit.folder / f"{fit.log}-{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    code = main(command)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.exit(code)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, for runs in this process that are compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_here(fit: Fit, extra: Sequence[str] = ()) -> int:
    """Run `idc fit` in this process; its exit status."""
    with one_thread():
        return main([*fit.command(), *extra])


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag over all event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

"""Time of a toy training step through the kit against a bare PyTorch loop on the same model.

    python tests/benchmarks/bench_overhead.py [--rounds 5] [--steps 40] [--batch 32] [--threads 2] [--json]

The kit's step is all of recipes/sft.yaml between two steps: Lightning's loop, our loader on cached features, the stage,
AdamW, clipping, the schedule, logging every 10 steps, and the callbacks EMA, Throughput, Progress and the learning-rate
monitor. The bare step has its batch as finished tensors (latents, noise, times, condition) and does what no loop can
leave out: forward, loss, backward, clipping, AdamW, the average of the weights. Both take turns, step by step, in one
process, on the same batches and on copies of one model; the overhead is the median over these pairs. The process's own
CPU time is given beside the wall clock: other processes disturb it less (with `--threads 1`; waiting threads of OpenMP
count as busy). `--profile` sends the kit's steps through cProfile instead. Run it where `python -m idc` is run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from idc.callbacks.ema import EMA
from idc.flow.path import interpolate, velocity_target
from idc.flow.times import noise_like

ROOT = Path(__file__).parents[2]
WARM_UP = 5  # steps of each kind that are not counted


class BareStep:
    """The loop that somebody would write by hand, on tensors that are ready."""

    def __init__(self, stage: Any, decay: float = 0.998) -> None:
        self.transformer = copy.deepcopy(stage.transformer)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = stage.optimizer_factory(self.parameters)
        self.decay = decay
        self.losses: list[float] = []

    @staticmethod
    def tensors(stage: Any, batch: Any) -> tuple[Any, ...]:
        drops = stage.dropout.draw(batch.seeds_B)
        features = stage.encoders.features(batch.samples, drops)
        x0 = torch.stack([f["latents"] for f in features]).float()
        noise = noise_like(batch.seeds_B, tuple(x0.shape[1:]))
        t_B = stage.times(batch.seeds_B)
        condition = stage.encoders.condition(features, drops).to("cpu", torch.float32)
        return interpolate(x0, noise, t_B), velocity_target(x0, noise), t_B, condition

    def __call__(self, z_t: Any, target: Any, t_B: Any, condition: Any) -> None:
        (velocity,) = self.transformer(
            hidden_states=z_t,
            timestep=t_B * 1000,
            encoder_hidden_states=condition.text_BLD,
            condition=condition,
            return_dict=False,
        )
        loss = (velocity - target).square().flatten(1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(self.average, self.decay)
            torch._foreach_add_(self.average, self.parameters, alpha=1 - self.decay)
        self.losses.append(float(loss.detach()))


class Watch:
    """Seconds since it was made: (wall, CPU of this process)."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


class TakeTurns(Callback):
    """The last callback: after each of the kit's steps, one bare step on the same batch."""

    def __init__(self) -> None:
        self.kit: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._step = BareStep(pl_module)
        self._watch = Watch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kit.append(self._watch.read())
        tensors = BareStep.tensors(pl_module, batch)
        watch = Watch()
        self._step(*tensors)
        self.bare.append(watch.read())
        self._watch = Watch()


def trainer_of_recipe(folder: str, steps: int, batch: int, extra: list[Any], args: tuple[str, ...] = ()) -> Any:
    """recipes/sft.yaml without previews, validation and checkpoints, as the command line would make it."""
    from idc.data.module import VideoDataModule
    from idc.lightning_cli import CLI, Parser
    from idc.stages.base import Stage

    command = CLI(
        Stage,
        VideoDataModule,
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=[
            *("--config", str(ROOT / "recipes/sft.yaml")),
            *("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0"),
            *("--trainer.accelerator", "cpu", "--trainer.logger.init_args.save_dir", folder),
            *("--data.batch_size", str(batch)),
            *args,
        ],
    )
    left_out = ("Previews", "Checkpoint", "Preemption")
    callbacks = [c for c in command.trainer.callbacks if type(c).__name__ not in left_out]
    command.trainer.callbacks = [*callbacks, *extra]
    assert any(isinstance(callback, EMA) for callback in callbacks)
    return command


def one_round(steps: int, batch: int, args: tuple[str, ...]) -> dict[str, Any]:
    """Medians in milliseconds and the overheads of one run, in wall time and in CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        turns = TakeTurns()
        command = trainer_of_recipe(folder, steps + WARM_UP, batch, [turns], args)
        command.trainer.fit(command.model, datamodule=command.datamodule)
    result: dict[str, Any] = {"n": steps}
    for clock, name in enumerate(("wall", "cpu")):
        kit, bare = ([times[clock] * 1e3 for times in side[WARM_UP:]] for side in (turns.kit, turns.bare))
        ratios = [ours / theirs for ours, theirs in zip(kit, bare, strict=True)]
        result[name] = {
            "kit_ms": statistics.median(kit),
            "bare_ms": statistics.median(bare),
            "overhead": statistics.median(ratios) - 1,
        }
    return result


def profile(steps: int, batch: int, args: tuple[str, ...]) -> None:
    import cProfile
    import pstats

    with tempfile.TemporaryDirectory() as folder:
        command = trainer_of_recipe(folder, steps, batch, [], args)
        profiler = cProfile.Profile()
        fit: Callable[..., None] = command.trainer.fit
        profiler.runcall(fit, command.model, datamodule=command.datamodule)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(250)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="counted steps of each kind in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.profile:
        return profile(options.steps, options.batch, tuple(rest))
    rounds = [one_round(options.steps, options.batch, tuple(rest)) for _ in range(options.rounds)]
    if options.json:
        print(json.dumps({"threads": options.threads, "batch": options.batch, "rounds": rounds}))
        return None
    from rich.console import Console
    from rich.table import Table

    title = f"batch {options.batch}, {options.threads} threads, {options.steps} pairs of steps a round"
    table = Table("round", "kit, ms", "bare, ms", "overhead", "in CPU time", title=title)
    for number, r in enumerate(rounds, 1):
        steps_ms = (f"{r['wall'][side]:.1f}" for side in ("kit_ms", "bare_ms"))
        table.add_row(str(number), *steps_ms, *(f"{r[clock]['overhead']:+.1%}" for clock in ("wall", "cpu")))
    console = Console()
    console.print(table)
    for clock in ("wall", "cpu"):
        values = [r[clock]["overhead"] for r in rounds]
        spread = f"{statistics.median(values):+.1%} ({min(values):+.1%} to {max(values):+.1%})"
        console.print(f"overhead in {clock} time: {spread} over {len(rounds)} rounds; aim: below +5%", highlight=False)
    return None


if __name__ == "__main__":
    main()

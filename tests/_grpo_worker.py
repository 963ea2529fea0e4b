"""GRPO on a tiny model, through Lightning's trainer, here or in processes of its own; killed at a given place.

All that tests look at goes through what the stage calls anyway: objectives that keep what they were given, rewards with
known values, and a callback that keeps gradients and writes a line per iteration.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _server import free_port, join, launch
from _sft_worker import TRANSFORMER, one_thread, toy
from _tiny_wan import randomise
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from idc.callbacks import writing
from idc.callbacks.checkpoint import Checkpoint
from idc.callbacks.resume import resolve_ckpt_path
from idc.data.module import VideoDataModule
from idc.data.sources import ToyShards
from idc.metrics.base import Clip, Score
from idc.rewards.base import Reward
from idc.rewards.composite import Composite, Term
from idc.rewards.runner import RewardRunner
from idc.stages.grpo import GRPO
from idc.stages.rollouts import Rollout, Rollouts
from idc.stages.updates import Contrast, Given, Loss, Point, PolicyGradient

GROUP, BATCH, STEPS = 4, 8, 5


def save_start(folder: Path, joint: bool = False, seed: int = 0) -> Path:
    """A random model with every path at work, as the folder of a pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from idc.models.conditioners import ToyTextConditioner
    from idc.models.conditioning import Encoders
    from idc.models.pipeline import IDCrafterPipeline
    from idc.models.sampling import Sampling
    from idc.models.spec import IDBlocks, TransformerSpec
    from idc.models.toy_codec import CosineCodec
    from idc.models.vlm import ToyVLM

    text, vlm = ToyTextConditioner(dim=32), ToyVLM(dim=32)
    model = TransformerSpec(**TRANSFORMER, id_blocks=IDBlocks(layers=1, joint_references=joint)).build(32, 32)
    randomise(model, seed)
    sampling = Sampling(steps=STEPS, scale=1.0, shift=1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    IDCrafterPipeline(model, scheduler, Encoders(CosineCodec(), text, vlm), sampling).save_pretrained(folder)
    return folder


# What is observed ---------------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """One call of an objective's loss."""

    iteration: int
    rollout: Rollout
    point: Point
    given: Given
    velocity: Tensor
    logged: dict[str, Tensor]
    gradient: Tensor | None = None
    """Of the pass's share of the loss by the velocity."""


class _Keeps:
    """Keeps what it is given, and the gradient that each velocity gets."""

    passes: list[Pass]
    calls = 0

    def points(self, rollout: Rollout) -> list[Point]:
        self.calls += 1
        return super().points(rollout)  # type: ignore[misc]

    def loss(self, velocity: Tensor, rollout: Rollout, point: Point, given: Given, settings: Rollouts) -> Loss:
        found: Loss = super().loss(velocity, rollout, point, given, settings)  # type: ignore[misc]
        kept = Pass(len(self.passes), rollout, point, given, velocity.detach().clone(), found.logged)
        if velocity.requires_grad:
            velocity.register_hook(lambda gradient: setattr(kept, "gradient", gradient.detach().clone()))
        self.passes.append(kept)
        return found


class KeepingPolicy(_Keeps, PolicyGradient):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.passes = []


class KeepingContrast(_Keeps, Contrast):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.passes = []


class Kept(Callback):
    """Gradients before each optimiser step (before clipping changes them if the norm is large), metrics by iteration,
    and weights after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.modes: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.modes.append(all(module.training for module in pl_module.transformer.modules()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(gathered(pl_module.transformer, gradients=True))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = logged(trainer)
        self.metrics.append(values)
        self.weights.append(gathered(pl_module.transformer))


def logged(trainer: Trainer) -> dict[str, float]:
    """What an iteration logged, without seconds, and without steps that it may not have trained: Lightning keeps the
    last value of each name."""
    values = trainer.callback_metrics.items()
    return {name: float(value) for name, value in values if not name.startswith(("perf/", "lr", "signal/"))}


def gathered(module: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Trained parameters or their gradients by name, whole ones of sharded ones."""
    from idc.models.weight_copy import reshard

    reshard(module)
    found = {}
    for name, parameter in module.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        if parameter.requires_grad and value is not None:
            found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return found


class Recorder(Callback):
    """Appends a line per iteration to `<log>-<rank>`: what was logged and a hash of the weights."""

    def __init__(self, log: str) -> None:
        self.path = log

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        values = logged(trainer)
        digest = hashlib.sha256()
        for name, value in gathered(pl_module.transformer).items():
            digest.update(name.encode() + value.numpy().tobytes())
        line = {"step": trainer.global_step, "ids": batch.ids, "weights": digest.hexdigest(), **values}
        with open(f"{self.path}-{trainer.global_rank}", "a") as stream:
            stream.write(json.dumps(line) + "\n")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Path(f"{self.path}-{trainer.global_rank}.error").write_text(f"{type(exception).__name__}: {exception}")


# Rewards ------------------------------------------------------------------------------------------------------------


class Contrasty(Reward):
    """Standard deviation of the pixels, in [0, 1]: differs between members of a group."""

    name = "contrasty"
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        return Score(float(clip.frames_THWC.std()) / 255)


@dataclass
class ByPlace(Reward):
    """As `Contrasty`, but for some places of the global batch (the number after # in the clip's id).

    Attributes:
        failing: places without a reward.
        nan: places whose value is NaN.
        raising: places whose scorer fails at every call.
        constant: places that all get one value.
        kill_after: this process kills itself (-9) in the call of that number, from 1.
        dead_after: no reward after so many calls of this process.
    """

    failing: tuple[int, ...] = ()
    nan: tuple[int, ...] = ()
    raising: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    kill_after: int = 0
    dead_after: int | None = None
    name: str = "by_place"
    models: tuple[str, ...] = ("a network",)
    calls: int = 0
    thread_safe = True

    def score(self, clip: Clip) -> Score:
        self.calls += 1
        if self.calls == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.dead_after is not None and self.calls > self.dead_after:
            return Score.failed("the judge is gone")
        # Held-out clips have no place.
        place = int(clip.id.rpartition("#")[2]) if "#" in clip.id else -1
        if place in self.failing:
            return Score.failed("cannot be judged")
        if place in self.raising:
            raise RuntimeError("lost")
        if place in self.nan:
            return Score(float("nan"))
        return Score(0.5) if place in self.constant else Contrasty().score(clip)


def runner(reward: Reward | None = None, **settings: Any) -> RewardRunner:
    """One reward, computed in the caller's thread."""
    settings = {"where": "process", "retries": 0, "pause": 0.0, **settings}
    return RewardRunner(Composite([Term(reward or Contrasty())]), **settings)


# Runs ---------------------------------------------------------------------------------------------------------------


def stage(start: str | Path | None, **settings: Any) -> GRPO:
    """A stage with SGD, whose step is the gradient, and without clipping."""
    settings = {"checkpoint": start and str(start), "reward": None, "rollouts": None, **settings}
    settings["reward"] = settings["reward"] or runner()
    settings["rollouts"] = settings["rollouts"] or rollouts()
    settings.setdefault("objective", KeepingPolicy())
    settings.setdefault("optimizer", functools.partial(torch.optim.SGD, lr=1.0))
    settings.setdefault("gradient_norm", 1e9)
    return GRPO(**settings)


def rollouts(**settings: Any) -> Rollouts:
    return Rollouts(**{"steps": STEPS, "shift": 1.0, "batch": GROUP, **settings})


def data(folder: str | Path, **settings: Any) -> VideoDataModule:
    sources = [ToyShards(**toy(f"{folder}/{name}", count, seed)["init_args"]) for name, count, seed in SPLITS]
    settings = {"batch_size": BATCH, "group_size": GROUP, "decode_clips": False, "val_batch_size": 8, **settings}
    return VideoDataModule([sources[0]], [[5, 32, 32]], val_sources=[sources[1]], **settings)


SPLITS = (("train", 48, 0), ("held_out", 8, 1_000_000))
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": -1,
    "log_every_n_steps": 1,
}


def fit(module: GRPO, module_data: VideoDataModule, steps: int = 1, **trainer: Any) -> Kept:
    """Train here, on one thread."""
    kept = Kept()
    settings = {**QUIET, "devices": 1, "max_steps": steps, **trainer}
    with one_thread():
        Trainer(callbacks=[kept], **settings).fit(module, datamodule=module_data)
    return kept


@dataclass(frozen=True)
class Run:
    """A run in processes of its own.

    Attributes:
        folder: for checkpoints; `log` for its record.
        strategy: "ddp" or "fsdp2" where there are several ranks.
        kill: (place, number): "rollout": in that reward call, "update": before that rollout's points are made, "saved":
            after the save of that step.
    """

    folder: str
    data: str
    start: str
    log: str = "log"
    ranks: int = 1
    strategy: str = "ddp"
    steps: int = 4
    save_every: int | None = None
    ckpt_path: str | None = None
    kill: tuple[str, int] | None = None
    reward: dict[str, Any] = field(default_factory=dict)
    runner: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    batches: dict[str, Any] = field(default_factory=dict)

    def path(self, rank: int = 0, end: str = "") -> Path:
        return Path(self.folder, f"{self.log}-{rank}{end}")

    def finish(self, timeout: float = 60) -> list[int | None]:
        """Run to the end; exit codes by rank (-9 killed, None hung)."""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        port = free_port()
        return join(launch(train, [(self, rank, port) for rank in range(self.ranks)]), timeout)

    def lines(self, rank: int = 0) -> dict[int, dict[str, Any]]:
        """The record by step, over all starts; a step that was taken twice must have been the same to the bit."""
        found: dict[int, dict[str, Any]] = {}
        for text in self.path(rank).read_text().splitlines():
            line = json.loads(text)
            step = line.pop("step")
            assert found.setdefault(step, line) == line, f"step {step} was not repeated exactly"
        return found

    def kept(self, rank: int = 0) -> dict[str, Any]:
        return torch.load(self.path(rank, ".pt"), weights_only=True)

    def error(self, rank: int = 0) -> str:
        path = self.path(rank, ".error")
        return path.read_text() if path.exists() else self.path(rank, ".err").read_text()[-3000:]


def train(run: Run, rank: int, port: int) -> None:
    """One rank of a run: 0 at the end, 2 for bad input."""
    from idc.errors import UserError

    torch.set_num_threads(1)
    os.dup2(os.open(run.path(rank, ".err"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if run.ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(run.ranks)
    place, number = run.kill or ("", 0)
    reward = ByPlace(**run.reward, kill_after=number if place == "rollout" else 0)
    settings = {"objective": KeepingPolicy(), **run.model, "reward": runner(reward, **run.runner)}
    kept, callbacks = Kept(), [Recorder(str(run.path())[:-2])]
    if run.save_every:
        callbacks.append(Checkpoint(dirpath=f"{run.folder}/checkpoints", every_n_steps=run.save_every))
    try:
        module = stage(run.start, **settings)
        if place in PLACES:
            PLACES[place](module, number)
        trainer = Trainer(
            **{**QUIET, "enable_checkpointing": bool(run.save_every), "default_root_dir": run.folder},
            devices=run.ranks,
            strategy=strategy(run),
            max_steps=run.steps,
            callbacks=[kept, *callbacks],
        )
        path = resolve_ckpt_path(run.ckpt_path, run.folder, trainer.strategy)
        trainer.fit(module, datamodule=data(run.data, **run.batches), ckpt_path=path, weights_only=True)
    except UserError as error:
        run.path(rank, ".error").write_text(str(error))
        os._exit(2)  # other ranks end by themselves, or the test that waits for them fails
    torch.save({"gradients": kept.gradients, "weights": kept.weights, "metrics": kept.metrics}, run.path(rank, ".pt"))
    if run.ranks > 1:
        torch.distributed.destroy_process_group()
    sys.exit(0)


def strategy(run: Run) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    if run.ranks == 1:
        return "auto"
    return ModelParallelStrategy(run.ranks, 1, process_group_backend="gloo") if run.strategy == "fsdp2" else "ddp"


def _before_update(module: GRPO, number: int) -> None:
    """Kill this process between the rewards of a rollout and its update."""
    objective: Any = module.objective
    points = objective.points

    def deadly(rollout: Rollout) -> list[Point]:
        if objective.calls + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return points(rollout)

    objective.points = deadly


def _after_save(module: GRPO, number: int) -> None:
    """Kill this process when the checkpoint of that step is in its place, before anything else."""
    prune = writing._prune

    def deadly(directory: Path, keep_last: int) -> None:
        if (directory / f"step-{number:08d}").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        prune(directory, keep_last)

    writing._prune = deadly


PLACES: dict[str, Callable[[GRPO, int], None]] = {"update": _before_update, "saved": _after_save}

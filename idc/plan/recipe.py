"""A recipe read as `idc fit` reads it, with its model and data made and its trainer left as settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from idc.data.module import VideoDataModule
from idc.errors import UserError
from idc.lightning_cli import CLI, command_line
from idc.plan.start import is_there, stand_in
from idc.plan.zero import ZeRO, zero_of
from idc.stages.base import Stage, check_precision
from idc.stages.sharding import FSDP2, check_sizes

# What a trainer would make of its settings is not needed, and may need devices that are elsewhere.
_NOT_MADE = {"callbacks": None, "logger": False, "strategy": "auto", "plugins": None, "profiler": None}


class _Reading(CLI):
    """Parses and checks as `idc fit`; makes the stage and its data, and runs nothing."""

    replaces_start = False  # whether a checkpoint that is there is left alone, too
    has_stand_in = False  # whether the settings say what a checkpoint would

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        check_precision(config.trainer.precision)
        if self.has_stand_in:
            config.model.init_args.checkpoint = None  # not sooner: other settings refer to it
        _check_start(config.model, self.replaces_start)
        self.trainer_settings = config.trainer.clone()
        for name, value in _NOT_MADE.items():
            config.trainer[name] = value

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _ReadingAnew(_Reading):
    replaces_start = True


class _ReadingStandIn(_Reading):
    has_stand_in = True


class _NoStartError(Exception):
    """The run that an alignment starts from is not there, or not wanted; holds the settings of the stage."""


def _check_start(model: Any, anew: bool) -> None:
    settings = getattr(model, "init_args", None) or {}
    checkpoint = settings.get("checkpoint")
    if isinstance(checkpoint, str) and (anew or not is_there(checkpoint)):
        raise _NoStartError(settings)


@dataclass(frozen=True)
class Layout:
    """How a run spreads over ranks.

    Attributes:
        strategy: "one", "ddp", "fsdp", "zero1", "zero2" or "zero3".
        ranks, nodes: processes in all, and the machines they are on.
        shards: ranks that the optimiser's states are spread over; 1 where each has all of them.
        sequence: ranks that share one sample's tokens.
        accumulate: passes a step.
        gathered: the type in which FSDP2's ranks send matrices to each other (`idc.stages.sharding.shard`).
        zero: DeepSpeed's settings; None with other strategies.
    """

    strategy: str = "one"
    ranks: int = 1
    nodes: int = 1
    shards: int = 1
    sequence: int = 1
    accumulate: int = 1
    gathered: torch.dtype = torch.float32
    zero: ZeRO | None = None

    @property
    def weights_over(self) -> int:
        """Ranks that a copy of the weights is spread over."""
        return self.shards if self.zero is None else self.zero.weights_over(self.shards)

    def with_zero(self, zero: ZeRO) -> Layout:
        """With these settings of DeepSpeed over the same ranks."""
        return replace(self, strategy=zero.name, shards=self.ranks, zero=zero)


@dataclass(frozen=True)
class Recipe:
    """What a command line says: the stage and its data, and the trainer's settings as they were parsed."""

    stage: Stage
    data: VideoDataModule
    trainer: Any
    layout: Layout
    notes: tuple[str, ...]

    def callback(self, name: str) -> Any:
        """The settings of the callback of that class name; None where the recipe has none."""
        for callback in self.trainer.callbacks or []:
            if str(callback.class_path).rpartition(".")[2] == name:
                return callback
        return None


def read(args: Sequence[str], sizes_of: Path | None = None) -> Recipe:
    """Parse a command line as that of `idc fit`.

    Args:
        sizes_of: the recipe of the run that an alignment starts from, in place of model.init_args.checkpoint; None
            takes a usual one where that is not there yet.

    Raises:
        UserError: as `idc fit` does, and for ranks that the batch does not fit.
    """
    taken: list[str] = []
    try:
        cli: Any = command_line(_ReadingAnew if sizes_of else _Reading, "fit", args, "plan")
    except _NoStartError as missing:
        (settings,) = missing.args
        words, file = stand_in(args, settings, sizes_of)
        why = "was not looked at" if sizes_of else "is not there yet"
        taken.append(
            f"model.init_args.checkpoint={settings.checkpoint} {why}: sizes, encoders and speed are those of {file}"
            + ("" if sizes_of else "; --sizes-of names another recipe")
        )
        cli = command_line(_ReadingStandIn, "fit", [*args, *words], "plan")
    if sizes_of and not taken:
        raise UserError(f"--sizes-of {sizes_of}: this recipe starts from no checkpoint; lay it over by --config")
    layout, notes = _layout(cli.trainer_settings)
    # As the trainer would have them: stages ask its strategy for the ranks of a sequence.
    strategy = FSDP2(tensor_parallel_size=layout.sequence)
    cli.model.check_run(SimpleNamespace(**{**vars(cli.trainer_settings), "strategy": strategy}), cli.datamodule)
    layout = replace(layout, gathered=cli.model.compute_dtype)
    batch, groups = cli.datamodule.batch_size, layout.ranks // layout.sequence
    if batch % groups:
        raise UserError(
            f"data.init_args.batch_size={batch}: must be a multiple of the {groups} ranks that have batches of their "
            f"own; the nearest is {max(1, round(batch / groups)) * groups}"
        )
    return Recipe(cli.model, cli.datamodule, cli.trainer_settings, layout, (*taken, *notes))


def _layout(trainer: Any) -> tuple[Layout, list[str]]:
    devices, notes = _devices(trainer)
    nodes = int(trainer.num_nodes or 1)
    ranks, strategy = devices * nodes, trainer.strategy
    name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]
    settings = getattr(strategy, "init_args", None) or {}
    kind, shards, sequence, zero = "one" if ranks == 1 else "ddp", 1, 1, None
    if name in ("ModelParallelStrategy", "FSDP2"):
        kind, sequence = "fsdp", settings.get("tensor_parallel_size", 1)
        sequence = devices if sequence == "auto" else sequence
        replicas = settings.get("replicas", 1)
        if name == "FSDP2":
            check_sizes(nodes, devices, replicas, settings.get("data_parallel_size", "auto"), sequence)
        shards = ranks // (nodes if replicas == "nodes" else replicas)
    elif "deepspeed" in name.lower():
        zero = zero_of(name, settings)
        kind, shards = zero.name, ranks
    elif name not in ("auto", "ddp", "DDPStrategy", "SingleDeviceStrategy"):
        notes.append(f"trainer.strategy={name}: not known here; counted as DDP")
    return Layout(kind, ranks, nodes, shards, sequence, int(trainer.accumulate_grad_batches or 1), zero=zero), notes


def _devices(trainer: Any) -> tuple[int, list[str]]:
    """Processes a node."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices), []
    if str(devices) in ("auto", "-1", "None"):
        return 1, [f"trainer.devices={devices}: counted as one device; say how many with --trainer.devices"]
    return int(devices), []

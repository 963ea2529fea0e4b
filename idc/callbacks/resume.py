"""Finding the checkpoint to resume from, and handing it over in the form that the strategy loads.

A sharded (FSDP2) run loads both forms as they are: shards of any number of ranks, or a single file. A single device
or DDP loads a single file, so a sharded checkpoint is consolidated once, beside the checkpoints. Optimiser states
are keyed by parameter names in both forms (see `idc.callbacks.checkpoint`), which is what makes them interchangeable.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from idc.errors import UserError, counted, nearest
from idc.models.checkpoints import STEP_DIRECTORY, WHOLE_WEIGHTS, step_directories
from idc.models.manifest import STATE, Manifest, fsync_file, read_valid

CHECKPOINTS = "checkpoints"
CONVERTED = "converted"


Damage = Callable[[Path], str | None]  # what is wrong with a checkpoint, if anything


def damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None: all names and sizes, and the hashes of every `ranks`-th file."""
    try:
        read_valid(path, share=(rank, ranks))
    except (ValueError, OSError) as reason:
        return str(reason)
    return None


def misses_files(path: Path) -> str | None:
    """What is wrong with a checkpoint by names and sizes, or None; takes no longer for a large one."""
    try:
        read_valid(path, hashes=False)
    except (ValueError, OSError) as reason:
        return str(reason)
    return None


def find_resume(directory: str | Path, damage: Damage = damage, quiet: bool = False) -> Path | None:
    """The newest checkpoint in `directory` in which there is no `damage`, or None.

    A damaged one is reported with its reason, unless `quiet`, and skipped; unfinished saves (`*.tmp-*`) are not looked
    at.
    """

    def report(path: Path, reason: str | None) -> None:
        if reason is not None and not quiet:
            rank_zero_warn(f"Skipping the checkpoint {path}: {reason}")

    directory = Path(directory)
    complete = step_directories(directory)
    for path in sorted(directory.glob("step-*")):
        if STEP_DIRECTORY.fullmatch(path.name) and path not in [p for _, p in complete]:
            report(path, misses_files(path))
    for _, path in reversed(complete):
        reason = damage(path)
        if reason is None:
            return path
        report(path, reason)
    return None


def resolve_ckpt_path(value: str | Path | None, run_dir: str | Path, strategy: Strategy) -> str | None:
    """What to give to `trainer.fit(ckpt_path=...)` for what the user asked for.

    Args:
        value: None (start afresh); "last", the newest valid checkpoint of `run_dir`, or None where there is none yet,
            so that one command starts and resumes; or a path: a run directory, a `checkpoints` directory, a
            `step-*` directory, the `state.ckpt` in it, or any single-file checkpoint.
        run_dir: the run's directory; its checkpoints are in `<run_dir>/checkpoints`.
        strategy: the trainer's strategy; it decides about the conversion.

    Raises:
        UserError: there is nothing at `value`, it is damaged, or this strategy cannot load it.
    """
    found = _find(value, run_dir)
    return None if found is None else _usable(found, strategy)


def _find(value: str | Path | None, run_dir: str | Path, damage: Damage = damage, quiet: bool = False) -> Path | None:
    """The `step-*` directory or the single file that `value` means (`resolve_ckpt_path`)."""
    if value is None:
        return None
    if str(value) == "last":
        found = find_resume(Path(run_dir) / CHECKPOINTS, damage, quiet)
        if found is None and not quiet:
            rank_zero_info(f"No checkpoint in {Path(run_dir) / CHECKPOINTS} yet: starting from step 0")
        return found
    path = Path(value)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"ckpt_path={str(value)!r}: there is no such checkpoint{nearest(path.name, ['last', *siblings], 2)}"
        )
    path = path.resolve()  # `last` is a link that the new run moves on
    if path.name == STATE:
        path = path.parent
    if path.is_file():
        return path
    if not STEP_DIRECTORY.fullmatch(path.name):
        inner = path / CHECKPOINTS
        found = find_resume(inner if inner.is_dir() else path, damage, quiet)
        if found is None:
            raise UserError(f"ckpt_path={str(value)!r}: there is no valid checkpoint (step-*/manifest.json) in it")
        return found
    if (reason := damage(path)) is not None:
        other = find_resume(path.parent, damage, quiet)
        hint = f"; the newest valid one is {other}" if other else ""
        raise UserError(f"ckpt_path={str(value)!r}: not a valid checkpoint, {reason}{hint}")
    return path


def resolve_together(value: str | Path | None, run_dir: str | Path, strategy: Strategy) -> str | None:
    """`resolve_ckpt_path` with rank 0's arguments and its view of the folders; every rank of the process group calls it
    together, and hashes its share of the files.

    A checkpoint in which any rank finds damage, or which it does not see, is damaged for all of them.

    Raises:
        UserError: as `resolve_ckpt_path`, on all ranks alike.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return resolve_ckpt_path(value, run_dir, strategy)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def tell(*message: Any) -> tuple[Any, ...]:
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def damage_anywhere(path: Path) -> str | None:
        if rank == 0:
            tell("check", path)
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, damage(path, rank, ranks))
        return next((reason for reason in found if reason is not None), None)

    if rank == 0:
        try:
            answer = tell("found", _find(value, run_dir, damage_anywhere))
        except (UserError, OSError) as error:  # the others wait for an answer
            answer = tell("refused", str(error))
    else:
        while (answer := tell())[0] == "check":
            damage_anywhere(answer[1])
    word, found = answer
    if word == "refused":
        raise UserError(found)
    return None if found is None else _usable(found, strategy)


class ResumeTogether(_CheckpointConnector):
    """Lightning's reader of checkpoints, whose first one is agreed on by all ranks (`resolve_together`): it is asked
    once the process group is there, and `Trainer.fit` wants a path before."""

    def __init__(self, trainer: Trainer, value: str | Path, run_dir: str | Path) -> None:
        super().__init__(trainer)
        self._wanted: tuple[str | Path, str | Path] | None = (value, run_dir)

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        if self._wanted is not None:
            checkpoint_path = resolve_together(*self._wanted, self.trainer.strategy)
            self._wanted = None
        super().resume_start(checkpoint_path, weights_only)


def prepare_resume(value: str | Path | None, run_dir: str | Path, trainer: Trainer) -> str | None:
    """What to give to `ckpt_path` of the next call of `trainer.fit` (or validate) for what the user asked for.

    With several ranks it is what this one sees by names and sizes; when they have met, they replace it by what they
    agree on. Arguments and errors as in `resolve_ckpt_path`.
    """
    if value is None or trainer.world_size == 1:
        return resolve_ckpt_path(value, run_dir, trainer.strategy)
    found = _find(value, run_dir, misses_files, quiet=True)
    if found is not None:
        _check_kind(found, trainer.strategy)
    trainer._checkpoint_connector = ResumeTogether(trainer, value, run_dir)
    return None if found is None else str(found)


def _check_kind(checkpoint: Path, strategy: Strategy) -> str | None:
    """How a checkpoint was saved, None for another's single file.

    Raises:
        UserError: this strategy cannot load it.
    """
    if checkpoint.is_file():
        return None
    manifest = Manifest.read(checkpoint)
    kind = manifest.kind
    deepspeed = isinstance(strategy, DeepSpeedStrategy)
    if (kind == "deepspeed") != deepspeed:
        raise UserError(
            f"{checkpoint}: a {kind} checkpoint cannot be loaded by {type(strategy).__name__}; "
            + ("resume with DeepSpeed" if kind == "deepspeed" else "resume on one device, with DDP or with FSDP2")
        )
    if kind == "deepspeed":
        _check_same_pieces(checkpoint, manifest, strategy)
    return kind


def _check_same_pieces(checkpoint: Path, manifest: Manifest, strategy: Any) -> None:
    """DeepSpeed's checkpoints are loaded by as many ranks, and by a stage that shards the same."""
    if manifest.world_size != strategy.world_size:
        raise UserError(
            f"{checkpoint}: DeepSpeed's checkpoint of {counted(manifest.world_size, 'rank')} is loaded by as many; "
            f"this run has {strategy.world_size} (trainer.devices, trainer.num_nodes)"
        )
    sharded = f"{STATE}/{WHOLE_WEIGHTS}" not in manifest.files
    if sharded != strategy.zero_stage_3:
        raise UserError(
            f"{checkpoint}: its weights were {'sharded by ZeRO-3' if sharded else 'whole, as ZeRO-2 has them'}; set "
            f"trainer.strategy.init_args.stage={3 if sharded else 2}"
        )


def _usable(checkpoint: Path, strategy: Strategy) -> str:
    kind = _check_kind(checkpoint, strategy)
    if kind is None:
        return str(checkpoint)
    if kind == "sharded" and not isinstance(strategy, ModelParallelStrategy):
        return str(consolidate(checkpoint))
    return str(checkpoint / STATE)


def consolidate(checkpoint: Path) -> Path:
    """Turn a sharded checkpoint into a single file, `<checkpoints>/converted/<step>.ckpt`, and return its path.

    Needs the memory of the whole state. Done once: later calls, and other ranks that call at the same time, get the
    finished file. Every new save of a run removes the converted files.
    """
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = checkpoint.parent / CONVERTED
    folder.mkdir(exist_ok=True)
    target = folder / f"{checkpoint.name}-{Manifest.read(checkpoint).serial}.ckpt"
    with _exclusive(folder / "lock"):
        if target.exists():
            return target
        rank_zero_info(f"Consolidating the shards of {checkpoint} into {target}")
        temporary = target.with_suffix(".tmp")
        shards = checkpoint / STATE
        dcp_to_torch_save(shards, temporary)
        state: dict[str, Any] = torch.load(temporary, map_location="cpu", weights_only=True)
        state["optimizer_states"] = [state.pop(f"optimizer_{i}") for i in range(_count_optimizers(state))]
        state.update(torch.load(shards / "meta.pt", map_location="cpu", weights_only=True))
        torch.save(state, temporary)
        fsync_file(temporary)
        os.replace(temporary, target)
    return target


def _count_optimizers(state: dict[str, Any]) -> int:
    return sum(bool(re.fullmatch(r"optimizer_\d+", key)) for key in state)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        yield

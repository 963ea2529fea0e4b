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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from idc.errors import UserError, nearest
from idc.models.checkpoints import STEP_DIRECTORY, step_directories
from idc.models.manifest import STATE, Manifest, fsync_file, read_valid

CHECKPOINTS = "checkpoints"
CONVERTED = "converted"


def find_resume(directory: str | Path) -> Path | None:
    """The newest checkpoint in `directory` whose sizes and hashes are right, or None.

    A damaged one is reported with its reason and skipped; unfinished saves (`*.tmp-*`) are not looked at.
    """
    directory = Path(directory)
    complete = step_directories(directory)
    for path in sorted(directory.glob("step-*")):
        if STEP_DIRECTORY.fullmatch(path.name) and path not in [p for _, p in complete]:
            _report_damage(path)
    for _, path in reversed(complete):
        if not _report_damage(path):
            return path
    return None


def _report_damage(path: Path) -> bool:
    try:
        read_valid(path)
    except ValueError as reason:
        rank_zero_warn(f"Skipping the checkpoint {path}: {reason}")
        return True
    return False


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
    if value is None:
        return None
    if str(value) == "last":
        found = find_resume(Path(run_dir) / CHECKPOINTS)
        if found is None:
            rank_zero_info(f"No checkpoint in {Path(run_dir) / CHECKPOINTS} yet: starting from step 0")
            return None
        return _usable(found, strategy)
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
        return str(path)
    if not STEP_DIRECTORY.fullmatch(path.name):
        inner = path / CHECKPOINTS
        found = find_resume(inner if inner.is_dir() else path)
        if found is None:
            raise UserError(f"ckpt_path={str(value)!r}: there is no valid checkpoint (step-*/manifest.json) in it")
        return _usable(found, strategy)
    try:
        read_valid(path)
    except ValueError as reason:
        other = find_resume(path.parent)
        hint = f"; the newest valid one is {other}" if other else ""
        raise UserError(f"ckpt_path={str(value)!r}: not a valid checkpoint, {reason}{hint}") from None
    return _usable(path, strategy)


def _usable(checkpoint: Path, strategy: Strategy) -> str:
    kind = Manifest.read(checkpoint).kind
    deepspeed = "DeepSpeed" in type(strategy).__name__
    if (kind == "deepspeed") != deepspeed:
        raise UserError(
            f"{checkpoint}: a {kind} checkpoint cannot be loaded by {type(strategy).__name__}; "
            + ("resume with DeepSpeed" if kind == "deepspeed" else "resume on one device, with DDP or with FSDP2")
        )
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

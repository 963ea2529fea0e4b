"""A checkpoint on its way to disk: written, hashed, given its manifest, renamed; by all ranks together.

The same steps whether training waits for them or they run in a thread beside it. In a thread the ranks exchange errors
and hashes over a gloo group of their own: two threads in one group could meet there in another order on each rank, and
a collective would then take part of a save for gradients.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist

import idc
from idc.callbacks.resume import CONVERTED
from idc.errors import UserError
from idc.models.checkpoints import step_directories
from idc.models.manifest import STATE, FileRecord, Manifest, fsync_directory, fsync_file, hash_files, list_files

FULL = 1 << 20  # bytes that are left of a disk on which a save has found no room
_WITHOUT_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM = re.compile(
    r"inline_container|unexpected pos|PytorchStreamWriter|"  # PyTorch's writer, which does not say why
    + "|".join(rf"\[Errno {number}\]|{re.escape(os.strerror(number))}" for number in _WITHOUT_ROOM)
)


class CheckpointError(UserError):
    """A save failed; the message says why and which older checkpoint is left."""


@dataclass(frozen=True)
class Save:
    """One save, the same on all ranks but for `rank`.

    Attributes:
        directory: where the checkpoints are.
        unfinished: its folder until it is complete.
        kind: as in `Manifest`.
        group: of the ranks' exchanges; None for the default one.
        keep_last: how many of the newest checkpoints stay.
    """

    directory: Path
    unfinished: Path
    kind: str
    step: int
    epoch: int
    strategy: str
    rank: int
    world_size: int
    keep_last: int
    group: Any = field(default=None, repr=False)

    @property
    def final(self) -> Path:
        """Its folder once it is complete."""
        return self.directory / f"step-{self.step:08d}"

    def agree(self, problem: str | None, records: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
        """Exchange errors and hashes between the ranks: all go on, with all hashes, or all raise the same.

        Raises:
            CheckpointError: a rank has a problem; the unfinished folder is removed.
        """
        mine = (problem, dict(records or {}))
        everyone = [mine]
        if self.world_size > 1 and dist.is_available() and dist.is_initialized():
            everyone = [mine] * self.world_size
            dist.all_gather_object(everyone, mine, group=self.group)
        problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(everyone) if text]
        if not problems:
            return {name: record for _, share in everyone for name, record in share.items()}
        if self.rank == 0:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        left = next((path for _, path in reversed(step_directories(self.directory))), None)
        raise CheckpointError(
            f"Saving step {self.step} to {self.directory} failed ({'; '.join(problems)}). "
            + (f"The newest checkpoint is still {left}" if left else "There is no older checkpoint")
        )

    def write(self, state: Any, writer: Callable[[Any, Path], None] | None = None) -> None:
        """Write `state`, check it, publish it and remove older ones. All ranks call it together.

        Args:
            writer: what writes the state to a path; None for this kind's own.

        Raises:
            CheckpointError: on all ranks alike if any rank failed.
        """
        # Whatever fails on one rank is told to all, or the others would wait for it.
        self._agree_on(lambda: (writer or self._write)(state, self.unfinished / STATE))
        records: dict[str, FileRecord] = {}
        shares = self._agree_on(lambda: records.update(_seal_own_files(self.unfinished, self.rank)), records)
        self._agree_on(lambda: self._finish(shares) if self.rank == 0 else None)

    def _agree_on(
        self, action: Callable[[], Any], records: Mapping[str, FileRecord] | None = None
    ) -> dict[str, FileRecord]:
        problem = describe(action)
        return self.agree(problem and problem + _no_room(problem, self.directory), records)

    def _write(self, state: Any, path: Path) -> None:
        if self.kind == "sharded":
            write_shards(state, path, self.rank, self.group)
        elif self.rank == 0:
            # Lightning's writer makes two copies in memory and a third in the system's temporary folder.
            torch.save(state, path)

    def _finish(self, files: Mapping[str, FileRecord]) -> None:
        _check_loadable(self.unfinished / STATE)
        Manifest(
            kind=self.kind,
            serial=1 + max((manifest.serial for manifest, _ in step_directories(self.directory)), default=0),
            step=self.step,
            epoch=self.epoch,
            world_size=self.world_size,
            strategy=self.strategy,
            versions={"idc": idc.__version__, "torch": str(torch.__version__), "lightning": lightning.__version__},
            files=files,
        ).write(self.unfinished)
        _publish(self.unfinished, self.final)
        _prune(self.directory, self.keep_last)


def write_shards(state: dict[str, Any], path: Path, rank: int, group: Any = None) -> None:
    """A sharded checkpoint as Lightning's `ModelParallelStrategy` writes and loads it, over a group of one's own.

    Raises this rank's own error; what fails on other ranks alone, they tell (`Save.agree`).
    """
    from lightning.fabric.utilities.load import _METADATA_FILENAME
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    path.mkdir(parents=True, exist_ok=True)
    state = dict(state)
    tensors = {"state_dict": state.pop("state_dict")}
    tensors.update({f"optimizer_{i}": s for i, s in enumerate(state.pop("optimizer_states", []))})
    # Nothing is copied ahead: the loader that does so waits for the training's stream, even where all is on the CPU.
    try:
        save(tensors, storage_writer=FileSystemWriter(path, per_thread_copy_ahead=0), process_group=group)
    except CheckpointException as error:  # a BaseException, with the errors of all ranks and their tracebacks
        if rank in error.failures:
            raise error.failures[rank][0] from None
        return
    if rank == 0:
        torch.save(state, path / _METADATA_FILENAME)


def describe(action: Callable[[], Any]) -> str | None:
    """Run `action`; what went wrong, in a line, or None."""
    try:
        action()
    except Exception as error:  # of any kind: all ranks are told, and end with it
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return None


def _no_room(problem: str, directory: Path) -> str:
    """Why there was no room for what a save wrote, most likely, where that is its `problem`; PyTorch does not say."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError:
        return ""
    if free < FULL:
        return "; the disk is full"
    if not _NO_ROOM.search(problem):
        return ""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited = "" if limit == resource.RLIM_INFINITY else f", here {limit / 2**20:,.1f} MiB"
    return (
        "; most likely the disk was full, or a quota or the limit on the size of a file (ulimit -f"
        f"{limited}) is reached: {directory} has {free / 2**30:,.1f} GiB free"
    )


def _prune(directory: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last`; a folder is renamed before its files go."""
    shutil.rmtree(directory / CONVERTED, ignore_errors=True)
    for _, path in step_directories(directory)[:-keep_last]:
        doomed = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _seal_own_files(directory: Path, rank: int) -> dict[str, FileRecord]:
    """Flush to disk and hash the files that this rank wrote; DCP's are named `__<rank>_<n>.distcp`, others rank 0's."""

    def writer(name: str) -> int:
        match = re.match(r"__(\d+)_", Path(name).name)
        return int(match[1]) if match else 0

    own = [name for name in list_files(directory) if writer(name) == rank]
    for name in own:
        fsync_file(directory / name)
    return hash_files(directory, own)


def _check_loadable(state: Path) -> None:
    """Load what a resume will load with `weights_only`: a checkpoint that cannot be loaded is none."""
    path = state / "meta.pt" if state.is_dir() else state
    if path.is_file():
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _publish(unfinished: Path, final: Path) -> None:
    """Make a complete directory visible under its name, then move the `last` link."""
    fsync_directory(unfinished)
    if final.exists():  # this step again, after a rewind
        replaced = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        final.rename(replaced)
        unfinished.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        unfinished.rename(final)
    fsync_directory(final.parent)
    link = final.parent / f"last.tmp-{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # not every file system has links, and nothing but people follows this one
        link.symlink_to(final.name)
        os.replace(link, final.parent / "last")

"""The loader: this rank's slice of the plan's global batches, read ahead by worker processes, resumed by a seek.

Its state is the same on all ranks and says which global batch comes next, so a run continues exactly on another number
of ranks or workers. It counts batches handed to the trainer, not batches read ahead.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from idc.data.images import to_float
from idc.data.plan import HeldOutPlan, Plan
from idc.data.quarantine import CorruptRate, Quarantine, Record
from idc.data.reader import BatchReader, Parcel, ReadSettings, Slot, Task
from idc.data.sources import Catalogue
from idc.errors import UserError
from idc.types import Batch, Failure, Sample


class PlanLoader:
    """Iterate over the `Batch`es of one rank.

    `for batch in loader` goes from where the loader stands to the end of the virtual epoch; the next `for` takes the
    next epoch. `len(loader)` is the epoch's length, also after a seek (as Lightning counts). Held-out plans always
    start at their first batch.

    Args:
        plan: which samples in which order.
        catalogue: the entries that the plan's refs count.
        settings: how samples are read.
        rank, world: this process's place among the data-parallel ones; the global batch must be a multiple of `world`.
        num_workers: processes that read; 0 reads in this one. The batches are the same.
        prefetch: batches that each worker reads ahead.
        quarantine: the known-bad samples; they are passed over without decoding.
        max_corrupt_rate: the run stops above this share of unreadable samples, counted on this rank from 5 on.
        limit: batches of each epoch that the trainer uses (its `limit_train_batches`), if fewer than all.
        overfit: give the batches of epoch 0 at every epoch.
        allow_mix_change: accept a state of other data, weights, buckets or batch size: epoch and number of the next
            batch are kept.
        agree: called at every batch with the error that it met or None, on all ranks alike; it raises on all of them
            where one has an error. By default an error is raised where it is.

    Raises:
        UserError: a global batch that the ranks cannot share.
    """

    def __init__(
        self,
        plan: Plan | HeldOutPlan,
        catalogue: Catalogue,
        settings: ReadSettings | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        quarantine: Quarantine | None = None,
        max_corrupt_rate: float = 0.02,
        limit: int | None = None,
        overfit: bool = False,
        allow_mix_change: bool = False,
        agree: Callable[[UserError | None], None] | None = None,
    ) -> None:
        if isinstance(plan, Plan):
            check_divisible(plan.global_batch, world)
        self.plan, self.catalogue = plan, catalogue
        self.quarantine = (quarantine or Quarantine()).load()
        self.allow_mix_change = allow_mix_change
        self._agree = agree or _raise
        self._held_out = isinstance(plan, HeldOutPlan)
        self._limit = len(plan) if limit is None else min(limit, len(plan))
        self._rate = CorruptRate(len(catalogue), max_corrupt_rate)
        self._epoch = self._next = 0
        group_size = plan.group_size if isinstance(plan, Plan) else 1
        reader = BatchReader(catalogue, plan.buckets, plan.pools, plan.seed, settings or ReadSettings(), group_size)
        self._tasks = _Tasks(plan, catalogue, (rank, world), self.quarantine, self._limit, overfit)
        self._reader = DataLoader(
            reader,
            batch_size=None,
            sampler=self._tasks,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            persistent_workers=num_workers > 0,
            collate_fn=_same,
            worker_init_fn=_ignore_preemption,
            # A generator of its own: torch draws the workers' seeds from it, and the run's own stream stays untouched.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def epoch(self) -> int:
        """The virtual epoch of the next batch."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._held_out:
            self._epoch = self._next = 0
        elif self._next >= self._limit:
            self._epoch, self._next = self._epoch + 1, 0
        epoch, start = self._epoch, self._next
        self._tasks.epoch, self._tasks.start = epoch, start
        for parcel in self._reader:
            batch = self._agreed(parcel, epoch)
            done = parcel.task.number + 1
            self._epoch, self._next = (epoch, done) if done < self._limit else (epoch + 1, 0)
            yield batch

    def close(self) -> None:
        """Stop the workers; the next iteration starts new ones."""
        iterator, self._reader._iterator = self._reader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on all ranks: plain numbers, strings, lists and dicts."""
        self.quarantine.load()
        return {
            "seed": self.plan.seed,
            "epoch": self._epoch,
            "global_batch": self._next,
            "index_hash": self.catalogue.hash,
            "mix_hash": self.plan.mix_hash,
            "mix": self.plan.mix,
            "skip_list": dict(sorted(self.quarantine.reasons.items())),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; nothing is read to get there.

        Raises:
            UserError: the state belongs to other data or another plan, unless `allow_mix_change`.
        """
        changes = self._changes(state)
        if changes and not self.allow_mix_change:
            raise UserError(
                "the checkpoint's data order cannot be continued: "
                + "; ".join(changes)
                + ". Restore what the checkpoint had, or set allow_mix_change=true to go on with the new data"
            )
        self._epoch, self._next = int(state["epoch"]), int(state["global_batch"])
        if self._next >= self._limit:
            self._epoch, self._next = self._epoch + 1, 0
        self.quarantine.know(state["skip_list"])

    def _changes(self, state: dict[str, Any]) -> list[str]:
        changes = []
        if state["seed"] != self.plan.seed:
            changes.append(f"seed is {self.plan.seed}, was {state['seed']}")
        for name in sorted(set(self.plan.mix) | set(state["mix"])):
            now, then = self.plan.mix.get(name), state["mix"].get(name)
            if now != then:
                changes.append(f"{name} is {now}, was {then}")
        if state["index_hash"] != self.catalogue.hash:
            changes.append(f"the shards' content is {self.catalogue.hash}, was {state['index_hash']} (index_hash)")
        return changes

    def _agreed(self, parcel: Parcel, epoch: int) -> Batch:
        """This rank's batch, if all ranks have theirs: one that stopped alone would leave the others waiting for it."""
        batch, error = None, None
        try:
            batch = self._batch(parcel, epoch)
        except UserError as found:
            error = found
        self._agree(error)
        assert batch is not None
        return batch

    def _batch(self, parcel: Parcel, epoch: int) -> Batch:
        task = parcel.task
        bucket = self.plan.buckets[task.part.bucket]
        self._record(parcel, epoch)
        slots, padding = list(parcel.slots), task.part.padding
        if self._held_out:
            # A replacement has been counted at its own place: it goes to the padding, which means leave out.
            own = slots[: len(slots) - padding]
            good = [slot for slot in own if not slot.failed]
            slots = good + [slot for slot in own if slot.failed] + slots[len(own) :]
            padding = len(slots) - len(good)
        return Batch(
            samples=tuple(_finish(slot.sample) for slot in slots if slot.sample is not None),
            seeds_B=torch.tensor([slot.seed for slot in slots], dtype=torch.int64),
            bucket=bucket,
            epoch=0 if self._held_out else epoch,
            index=task.number,
            padding=padding,
            failures=tuple(self._failures(slots)),
        )

    def _failures(self, slots: list[Slot]) -> Iterator[Failure]:
        for slot in slots:
            for ref, reason in slot.failed:
                yield Failure(self.catalogue[ref][1].id, reason, self.catalogue[slot.ref][1].id)

    def _record(self, parcel: Parcel, epoch: int) -> None:
        """Quarantine what failed, and raise above the rate or where a bucket has nothing that can be read."""
        failed = {ref: reason for slot in parcel.slots for ref, reason in slot.failed}
        self._rate.count([*parcel.task.part.refs.tolist(), *(slot.ref for slot in parcel.slots), *failed], failed)
        if failed:
            self._put_aside(failed, epoch)
        self._rate.check(self.quarantine, epoch_ends=parcel.task.number + 1 == self._limit)
        if any(slot.sample is None for slot in parcel.slots):
            bucket = self.plan.buckets[parcel.task.part.bucket]
            reason = list(failed.values())[-1]
            raise UserError(f"no readable sample found in bucket {tuple(bucket)} ({len(failed)} failed; {reason})")

    def _put_aside(self, failed: dict[int, str], epoch: int) -> None:
        entries = {ref: self.catalogue[ref][1] for ref in failed}
        self.quarantine.add(
            Record(entries[ref].id, entries[ref].shard, entries[ref].key, reason, epoch)
            for ref, reason in failed.items()
        )


class _Tasks:
    """The sampler of the inner DataLoader: this rank's part of each batch of `epoch`, from batch `start` on.

    It must not refer to the loader: workers of a DataLoader that dies in a reference cycle miss their notice to stop
    (the queue's finalizer runs first) and are waited for, five seconds each.
    """

    def __init__(
        self,
        plan: Plan | HeldOutPlan,
        catalogue: Catalogue,
        place: tuple[int, int],
        quarantine: Quarantine,
        limit: int,
        overfit: bool,
    ) -> None:
        self.plan, self.catalogue, self.quarantine = plan, catalogue, quarantine
        self.place, self.limit, self.overfit = place, limit, overfit
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.limit - self.start

    def __iter__(self) -> Iterator[Task]:
        epoch = 0 if self.overfit else self.epoch
        batches = self.plan.batches(epoch)
        seeds_epoch = self.plan.seeds_epoch(epoch)
        for index in range(self.start, self.limit):
            part = batches[index].part(*self.place)
            yield Task(index, seeds_epoch, part, self._known_bad(part.refs.tolist()))

    def _known_bad(self, refs: list[int]) -> dict[str, str]:
        reasons = self.quarantine.reasons
        if not reasons:
            return {}
        ids = (self.catalogue[ref][1].id for ref in refs)
        return {sample_id: reasons[sample_id] for sample_id in ids if sample_id in reasons}


def check_divisible(global_batch: int, world: int, name: str = "batch_size") -> None:
    """Raise `UserError` with the nearest valid sizes unless all ranks get the same number of samples."""
    if global_batch % world:
        below = global_batch // world * world
        sizes = f"{below} and {below + world}" if below else f"{world}"
        raise UserError(
            f"{name}={global_batch} (of all ranks together) does not divide among {world} ranks; "
            f"the nearest valid: {sizes}"
        )


def _raise(error: UserError | None) -> None:
    if error is not None:
        raise error


def _finish(sample: Sample) -> Sample:
    """Video uint8 `[T, C, H, W]` -> float `[C, T, H, W]` in [-1, 1]; uint8 until here travels at a quarter."""

    def floats(video_TCHW: Tensor | None) -> Tensor | None:
        return None if video_TCHW is None else to_float(video_TCHW.permute(1, 0, 2, 3)).contiguous()

    return replace(sample, video_CTHW=floats(sample.video_CTHW), loser_CTHW=floats(sample.loser_CTHW))


def _same(parcel: Any) -> Any:
    return parcel


def _ignore_preemption(worker: int) -> None:
    """A scheduler, or Ctrl-C, signals the whole process group: the run wants its readers alive until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

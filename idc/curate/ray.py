"""Working on a Ray cluster: the same steps by Ray Data, light ones in tasks, heavy ones in actors that hold networks.

A row is a chunk. It goes through three runs of steps: light ones, those from the first heavy one to the last, by actors
that hold all the networks as a local worker does, and light ones again. Between them it travels through Ray's object
store in the form in which parts are written, so that it comes out as it does on one machine. The last run encodes the
clips and writes the part itself: nothing large comes back to where it was started. Put `Cut` behind the last heavy
step: pixels travel as they are.

The folder of the parts must be reached by all machines: a shared file system, or a URL.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import torch

from idc.curate.candidate import Step
from idc.curate.chunks import Work, died, one_line
from idc.curate.executors import BEGUN, Done, Executor, finish
from idc.curate.films import remove_films
from idc.curate.parts import Count, Outcomes, Part, write_part
from idc.curate.plan import Task
from idc.data import storage
from idc.errors import UserError

LEAVING = 60.0  # seconds that the other machines have to remove films
GONE = "ray: the worker process died, or its machine was lost"


@dataclass
class RayExecutor(Executor):
    """On a Ray cluster, or on this machine by a cluster of its own.

    Attributes:
        address: of the cluster: "auto" is the one that this machine belongs to; null starts one here and ends it.
        actors: how many take chunks through the heavy steps; null is one a GPU of the cluster, one without GPUs.
        gpus_per_actor: share of a GPU that a heavy actor asks for; 0 runs networks on CPUs.
        cpus_per_actor, cpus_per_task: CPUs that heavy actors and light tasks ask for.
        attempts: how often a chunk is begun whose worker dies; then its units are dropped.
        num_cpus: of a cluster that is started here; null is all of the machine's.
    """

    address: str | None = None
    actors: int | None = None
    gpus_per_actor: float = 1.0
    cpus_per_actor: float = 1.0
    cpus_per_task: float = 1.0
    attempts: int = 2
    num_cpus: int | None = None

    def __post_init__(self) -> None:
        for name in ("actors", "attempts", "num_cpus"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        for name in ("gpus_per_actor", "cpus_per_actor", "cpus_per_task"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must be 0 or more")

    def check(self) -> None:
        """Raise `UserError` where Ray Data is not installed."""
        if importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None:
            raise UserError("RayExecutor: Ray Data is not installed; pip install 'idc[ray]'")

    def run(self, work: Work, tasks: Sequence[Task], folder: str) -> Iterator[Done]:
        if not tasks:
            return
        with _Cluster(self):
            yield from self._run(work, tasks, folder)

    def _run(self, work: Work, tasks: Sequence[Task], folder: str) -> Iterator[Done]:
        import ray

        rows = [
            {"task": json.dumps(task), "counts": "[]", "state": b"", "fault": "", "kept": 0, "done": 0, "error": ""}
            for task in tasks
        ]
        data = ray.data.from_arrow([_table(row) for row in rows])
        run = uuid4().hex
        for number, (steps, heavy) in enumerate(groups := grouped(work.steps)):
            stage = {
                "run": run,
                "work": work,
                "folder": folder,
                "steps": steps,
                "number": number,
                "last": number == len(groups) - 1,
                "attempts": self.attempts,
            }
            data = self._heavy(data, stage) if heavy else self._light(data, stage)
        batch: Any
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for row in batch.to_pylist():
                    yield _done(row)
        finally:
            if storage.is_url(folder):
                _remove_elsewhere(folder)

    def _light(self, data: Any, stage: Mapping[str, Any]) -> Any:
        return data.map_batches(
            _light_stage,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_kwargs={"stage": stage},
            num_cpus=self.cpus_per_task,
            max_calls=0,  # as by default; said (from 2.51 on), it keeps Ray from making these part of the actors
        )

    def _heavy(self, data: Any, stage: Mapping[str, Any]) -> Any:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0)
        if self.gpus_per_actor and gpus < self.gpus_per_actor:
            raise UserError(
                f"gpus_per_actor={self.gpus_per_actor:g}: the cluster has {gpus:g} GPUs; 0 runs networks on CPUs"
            )
        actors = self.actors or (max(1, int(gpus / self.gpus_per_actor)) if self.gpus_per_actor else 1)
        return data.map_batches(
            _HeavyStage,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_kwargs={"stage": stage, "device": "cuda" if self.gpus_per_actor else "cpu"},
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=self.cpus_per_actor,
            num_gpus=self.gpus_per_actor or None,
        )


def no_cluster(address: str | None, error: Exception) -> str:
    """What to do where no cluster answers at `address`."""
    here = "--executor.init_args.address null --executor.init_args.gpus_per_actor 0"
    if address in (None, "auto"):
        return (
            f"address={address}: this machine belongs to no Ray cluster; start one by ray start --head, "
            f"or for this machine alone write {here}"
        )
    return (
        f"address={address}: no Ray cluster answers there ({one_line(error)}); ray start --head prints the address "
        f"of the one that it starts; for this machine alone write {here}"
    )


def _done(row: Mapping[str, Any]) -> Done:
    if row["error"]:
        kind = UserError if row["done"] == REFUSED else RuntimeError
        raise kind(row["error"])
    counts = [Count(**count) for count in json.loads(row["counts"])]
    task = Task(*json.loads(row["task"]))
    return Done(task.part, task.units, counts, row["kept"], row["fault"])


def _remove_elsewhere(folder: str) -> None:
    """Remove the films from the temporary folders of the other machines; from this one's the run does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    remove = ray.remote(num_cpus=0, max_retries=0)(remove_films)
    removing = [
        remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(folder)
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here
    ]
    if removing:
        ray.wait(removing, num_returns=len(removing), timeout=LEAVING)


DONE, REFUSED, BROKEN = 1, 2, 3  # how a chunk ended: its part is written; the user is at fault; the kit is


def grouped(steps: Sequence[Step]) -> list[tuple[tuple[Step, ...], bool]]:
    """The steps in three runs, (steps, heavy): light ones, which open the units; from the first heavy one to the last,
    with the light ones between them; light ones, which write the part. Without a heavy step there is one run."""
    heavy = [number for number, step in enumerate(steps) if step.heavy]
    if not heavy:
        return [(tuple(steps), False)]
    first, end = heavy[0], heavy[-1] + 1
    return [(tuple(steps[:first]), False), (tuple(steps[first:end]), True), (tuple(steps[end:]), False)]


class _Cluster:
    """Ray started or joined, quietly, and ended or left alone."""

    def __init__(self, executor: RayExecutor) -> None:
        self._executor, self._started = executor, False

    def __enter__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if not ray.is_initialized():
            own = self._executor.address is None
            try:
                ray.init(
                    self._executor.address,
                    num_cpus=self._executor.num_cpus if own else None,
                    include_dashboard=False if own else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except ConnectionError as error:
                raise UserError(no_cluster(self._executor.address, error)) from None
            self._started = True
        logger, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
        self._before = logger.level, context.enable_progress_bars, context.print_on_execution_start
        logger.setLevel(logging.ERROR)
        context.enable_progress_bars = context.print_on_execution_start = False

    def __exit__(self, *_: object) -> None:
        import ray

        context = ray.data.DataContext.get_current()
        level, context.enable_progress_bars, context.print_on_execution_start = self._before
        logging.getLogger("ray.data").setLevel(level)
        if self._started:
            ray.shutdown()


def _table(row: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    # Said here, since numpy would take the bytes for text and cut what ends in zeros.
    kinds = {"state": pa.large_binary(), "kept": pa.int64(), "done": pa.int64()}
    return pa.table({name: pa.array([value], kinds.get(name, pa.string())) for name, value in row.items()})


def _run(table: Any, stage: Mapping[str, Any]) -> Any:
    """Take a row through a stage. Whatever goes wrong is told in the row: what Ray sees fail, and begins again as often
    as it fails, is a worker that dies."""
    (row,) = table.to_pylist()
    if row["done"]:
        return table
    try:
        with _begun(row, stage) as before, stage["work"].here(stage["folder"]):
            if before >= stage["attempts"]:
                return _table({**row, **_died(row, stage)})
            return _table({**row, **_through(row, stage)})
    except UserError as error:
        return _ended(row, REFUSED, str(error))
    except OSError as error:
        return _ended(row, REFUSED, f"{stage['folder']}: {one_line(error)}")
    except Exception:  # a fault of the kit's own: the driver shows it
        return _ended(row, BROKEN, traceback.format_exc())


def _ended(row: Mapping[str, Any], how: int, error: str) -> Any:
    return _table({**row, "state": b"", "done": how, "error": error})


@contextmanager
def _begun(row: Mapping[str, Any], stage: Mapping[str, Any]) -> Iterator[int]:
    """Leave word among the parts that a chunk is begun, until it is done. Yields how often it was before, each time by
    a worker that has died of it: those that only waited for such a worker have not begun."""
    part = Task(*json.loads(row["task"])).part
    marks = [
        storage.join(stage["folder"], f"{part}.{stage['number']}-{attempt}{BEGUN}")
        for attempt in range(stage["attempts"])
    ]
    before = next((number for number, mark in enumerate(marks) if not _is_there(mark)), len(marks))
    if before < len(marks):
        with storage.open_atomic(marks[before]):
            pass
    yield before
    for mark in marks:
        storage.remove(mark)


def _is_there(path: str) -> bool:
    try:
        storage.size_and_time(path)
    except FileNotFoundError:
        return False
    return True


def _died(row: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    detail = f"{GONE} ({stage['attempts']} times); a lack of memory is the usual reason"
    task, folder = Task(*json.loads(row["task"])), stage["folder"]
    done = finish(task, died(stage["work"], task, folder, detail), folder)
    return _told(done)


def _through(row: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    work: Work = stage["work"]
    task, folder = Task(*json.loads(row["task"])), stage["folder"]
    outcomes = work.opened(task, folder) if stage["number"] == 0 else _unpacked(row)
    outcomes = work.through(stage["steps"], outcomes)
    if stage["last"]:
        done = finish(task, work.encoded(outcomes), folder)
        return _told(done)
    buffer = io.BytesIO()
    write_part(buffer, outcomes)
    return {"counts": _counts(outcomes.counts), "state": buffer.getvalue()}


def _told(done: Done) -> dict[str, Any]:
    return {"counts": _counts(done.counts), "state": b"", "kept": done.kept, "fault": done.fault, "done": DONE}


def _unpacked(row: Mapping[str, Any]) -> Outcomes:
    outcomes = Part(row["state"]).outcomes()
    outcomes.counts = [Count(**count) for count in json.loads(row["counts"])]  # with their seconds
    return outcomes


def _counts(counts: Sequence[Count]) -> str:
    return json.dumps([asdict(count) for count in counts])


_loaded: dict[tuple[str, int], Sequence[Step]] = {}  # of this worker process: (run, stage) -> steps that are loaded


def _light_stage(table: Any, stage: Mapping[str, Any]) -> Any:
    """A task: nothing but the loaded steps is kept from one to the next."""
    name = stage["run"], stage["number"]
    if name not in _loaded:
        for run, number in list(_loaded):  # a process outlives the run that began it
            if run != stage["run"]:
                for step in _loaded.pop((run, number)):
                    step.unload()
        try:
            stage["work"].load(stage["steps"], "cpu")
        except UserError as error:
            return _refused(table, error)
        _loaded[name] = stage["steps"]
    return _run(table, {**stage, "steps": _loaded[name]})


class _HeavyStage:
    """An actor: its networks are loaded once."""

    def __init__(self, stage: Mapping[str, Any], device: str) -> None:
        self._stage = stage
        self._error: UserError | None = None
        try:
            stage["work"].load(stage["steps"], device if torch.cuda.is_available() else "cpu")
        except UserError as error:  # told with the first row: an actor that cannot be made is made again and again
            self._error = error

    def __call__(self, table: Any) -> Any:
        return _run(table, self._stage) if self._error is None else _refused(table, self._error)


def _refused(table: Any, error: UserError) -> Any:
    (row,) = table.to_pylist()
    return _ended(row, REFUSED, str(error))

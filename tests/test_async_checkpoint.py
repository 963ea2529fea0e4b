"""Saves in the background: the bytes of a synchronous one, whole or not there, and waited for however a run ends."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _server import join, launch
from _sft_worker import scalars
from _survival_worker import SAVE_EVERY, Run, Stage, Stream, end, finish, make_trainer, records
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.distributed.checkpoint import CheckpointException, load

from idc.callbacks import writing
from idc.callbacks.background import Background
from idc.callbacks.checkpoint import Checkpoint, CheckpointError
from idc.callbacks.resume import find_resume
from idc.callbacks.snapshot import Snapshot
from idc.callbacks.writing import write_shards
from idc.models.manifest import MANIFEST, list_files, read_valid

LIMIT = 60  # seconds after which a wait has failed


# The copy -----------------------------------------------------------------------------------------------------------


def saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def a_state() -> dict[str, Any]:
    """Every kind of thing that a checkpoint holds, and tensors that share memory."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    whole = torch.arange(12.0).view(3, 4)
    return {
        "state_dict": module.state_dict(),  # an OrderedDict with an attribute of its own
        "views": [whole, whole[1:, ::2], whole.t()],
        "kinds": (torch.zeros(0), torch.tensor(3), torch.ones(2, dtype=torch.bfloat16), torch.eye(2).to_sparse()),
        "optimizer_states": [
            {"state": {"a": {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.1, "params": []}]}
        ],
        "loops": {"count": 3, "names": ["a", "b"], "none": None},
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_a_copy_saves_as_the_same_bytes_and_keeps_them_when_the_state_moves_on() -> None:
    state, snapshot = a_state(), Snapshot()
    expected = saved(state)
    taken = snapshot.take(state)
    assert saved(taken) == expected
    for tensor in (*state["state_dict"].values(), *state["views"][:1], *state["kinds"][:3]):
        tensor.zero_()
    state["optimizer_states"][0]["state"]["a"]["step"].add_(1)
    state["loops"]["count"] = 4
    state["loops"]["names"].append("c")
    state["parameter"].data.zero_()
    assert saved(taken) == expected
    assert isinstance(taken["state_dict"], OrderedDict)
    assert taken["views"][1].data_ptr() - taken["views"][0].data_ptr() == 16, "views share memory as they did"


def test_the_next_copy_takes_the_same_memory_and_another_shape_only_what_it_needs() -> None:
    snapshot = Snapshot()
    first = snapshot.take({"a": torch.ones(1000), "b": torch.ones(10)})
    places = [first[name].data_ptr() for name in "ab"]
    second = snapshot.take({"a": torch.zeros(1000), "b": torch.zeros(10)})
    assert [second[name].data_ptr() for name in "ab"] == places
    third = {"a": torch.full((1000,), 2.0), "b": torch.full((11,), 3.0), "c": torch.full((5,), 4.0)}
    taken = snapshot.take(third)
    assert taken["a"].data_ptr() == places[0]
    assert all(torch.equal(taken[name], third[name]) for name in third)
    assert snapshot.take({}) == {}


def test_a_copy_takes_the_memory_of_the_state_also_when_the_state_changes_its_shape() -> None:
    snapshot = Snapshot()
    states = [
        {str(i): torch.full((n,), float(i), dtype=torch.float64) for i, n in enumerate(sizes)}
        for sizes in ([1025] * 40, [1025] * 4 + [2049] * 8, [1025] * 4 + [2049] * 9, [0, 3], [4097, 0, 1])
    ]
    for state in states:
        taken = snapshot.take(state)
        assert all(torch.equal(taken[name], value) for name, value in state.items())
        assert [value.untyped_storage().nbytes() for value in taken.values()] == [
            value.untyped_storage().nbytes() for value in state.values()
        ]
        places = sorted((value.data_ptr(), value.nbytes) for value in taken.values() if len(value))
        assert all(place % 16 == 0 for place, _ in places)
        assert all(place + size <= following for (place, size), (following, _) in pairwise(places))
        needed = sum(value.nbytes for value in state.values())
        assert snapshot.held <= needed + 64 * len(state) + needed // 2


# Whole runs ---------------------------------------------------------------------------------------------------------


def content(run: Run) -> dict[str, Any]:
    """The files of a run's checkpoints; of DCP's metadata what does not name one save."""
    found: dict[str, Any] = {}
    for step in sorted(Path(run.folder, "checkpoints").glob("step-*")):
        read_valid(step)
        for name in list_files(step):
            data = (step / name).read_bytes()
            if Path(name).name == ".metadata":
                metadata = pickle.loads(data)
                found[f"{step.name}/{name}"] = metadata.state_dict_metadata, metadata.storage_data
            else:
                found[f"{step.name}/{name}"] = data
    return found


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("synchronous")
    run = Run(str(folder / "run"), str(folder / "log"), steps=8)
    assert finish(run) == [0]
    return run


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_bytes_are_those_of_a_synchronous_run(ranks: int, synchronous: Run, tmp_path: Path) -> None:
    runs = [
        Run(
            str(tmp_path / kind), str(tmp_path / f"{kind}-log"), ranks, ranks > 1, steps=8, asynchronous=kind == "async"
        )
        for kind in ("sync", "async")
    ]
    if ranks == 1:
        runs[0] = synchronous
    for run in runs[ranks == 1 :]:
        assert finish(run) == [0] * ranks
    plain, background = map(content, runs)
    # Under FSDP2: the shards, DCP's metadata and Lightning's.
    assert len(plain) == 2 * (1 if ranks == 1 else 4)
    assert background == plain
    assert end(runs[0]) == end(runs[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_in_the_background_leave_what_resumes_as_the_undisturbed_run(
    ranks: int, synchronous: Run, tmp_path: Path
) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks, ranks > 1, steps=8, asynchronous=True)
    places = {"state": 4, "manifest": 8, "publish": 8} if ranks == 1 else {"manifest": 8}
    for place, step in places.items():
        fault = {"kill_place": place, "kill_step": step}
        codes = finish(Run(run.folder, run.log, ranks, ranks > 1, steps=8, asynchronous=True, **fault))  # type: ignore[arg-type]
        assert -9 in codes, place
        assert None not in codes, "the other rank hung"
        found = find_resume(Path(run.folder, "checkpoints"))
        assert (found and found.name) == (None if step == 4 else "step-00000004")
    assert finish(run) == [0] * ranks
    if ranks == 1:
        assert records(run) == records(synchronous)
        assert all(end(run)[part] == end(synchronous)[part] for part in ("step", "weights", "ema"))
    else:
        assert sorted(records(run)) == list(range(1, 9))


def test_a_signal_waits_for_the_save_that_it_asked_for(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), 2, True, signal_step=6, asynchronous=True)
    assert finish(run) == [0, 0]
    found = find_resume(Path(run.folder, "checkpoints"))
    assert found is not None
    assert found.name == "step-00000006"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_all_ranks_at_a_later_step_with_one_message(ranks: int, tmp_path: Path) -> None:
    fault = {"kill_place": "full", "kill_step": 8, "asynchronous": True}
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks, ranks > 1, **fault)  # type: ignore[arg-type]
    assert finish(run) == [1] * ranks
    assert [path.name for path in Path(run.folder, "checkpoints").glob("step-*")] == ["step-00000004"]
    errors = {Path(f"{run.log}-{rank}.error").read_text() for rank in range(ranks)}
    (error,) = errors
    assert error.startswith("CheckpointError: Saving step 8")
    assert "rank 0: OSError: [Errno 28] No space left on device" in error
    assert f"The newest checkpoint is still {run.folder}/checkpoints/step-00000004" in error


# One run here, whose writer is held -----------------------------------------------------------------------------------


class Gate(Callback):
    """Holds every background write until `open` is set; `at_step` sets it at the end of that step's batch."""

    def __init__(self, at_step: int = 0, error: BaseException | None = None) -> None:
        self.open, self.at_step, self.error = threading.Event(), at_step, error
        self.waiting = 0

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> Gate:
        write = writing.Save.write

        def held(save: writing.Save, *args: Any) -> None:
            self.waiting += 1
            assert self.waiting == 1, "one save at a time"
            assert self.open.wait(LIMIT)
            self.waiting -= 1
            write(save, *args)

        monkeypatch.setattr(writing.Save, "write", held)
        return self

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.at_step and trainer.global_step == self.at_step:
            if self.error is not None:
                raise self.error
            self.open.set()

    def on_exception(self, *_: Any) -> None:
        self.open.set()


def fit(tmp_path: Path, gate: Gate, steps: int, logger: Any = False) -> Checkpoint:
    trainer = make_trainer(Run(str(tmp_path / "run"), "", steps=steps, asynchronous=True), [gate])
    trainer.logger = logger or None
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, Checkpoint)
    trainer.fit(Stage(), Stream(0, 1))
    return checkpoint


def test_what_is_written_is_the_state_of_its_step_however_far_training_has_gone(
    synchronous: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = TensorBoardLogger(str(tmp_path / "tb"))
    checkpoint = fit(tmp_path, Gate(at_step=SAVE_EVERY + 3).hold(monkeypatch), 8, logger)
    files = [Path(root, "checkpoints/step-00000004/state.ckpt") for root in (synchronous.folder, logger.log_dir)]
    states = [torch.load(path, weights_only=True) for path in files]
    assert saved(states[0]["state_dict"]) == saved(states[1]["state_dict"])
    assert saved(states[0]["optimizer_states"]) == saved(states[1]["optimizer_states"])
    assert checkpoint.last_saved == Path(logger.log_dir, "checkpoints/step-00000008")
    curves = scalars(Path(logger.log_dir))
    for name in ("stall", "write"):
        assert [step for step, _ in curves[f"perf/checkpoint_{name}_seconds"]] == [4, 8]
    assert all(value >= 0 for _, value in curves["perf/checkpoint_stall_seconds"])


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate().hold(monkeypatch)
    wait = Background.wait

    def waits(background: Background, *args: Any) -> bool:
        assert not background.done, "the second save comes while the first is written"
        gate.open.set()
        return wait(background, *args)

    monkeypatch.setattr(Background, "wait", waits)
    monkeypatch.setattr(Checkpoint, "_look", lambda *_: None)
    trainer = make_trainer(Run(str(tmp_path), "", steps=5, asynchronous=True), [gate])
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, Checkpoint)
    checkpoint.every_n_steps, checkpoint.keep_last, checkpoint.save_on_end = 4, 3, True
    trainer.fit(Stage(), Stream(0, 1))
    found = {path.name: read_valid(path).serial for path in (tmp_path / "checkpoints").glob("step-*")}
    assert found == {"step-00000004": 1, "step-00000005": 2}


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
def test_a_run_that_ends_in_the_middle_of_a_save_finishes_it(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((type(error), SystemExit)):
        fit(tmp_path, Gate(at_step=SAVE_EVERY + 1, error=error).hold(monkeypatch), 8)
    found = find_resume(tmp_path / "run/checkpoints")
    assert found is not None
    assert found.name == "step-00000004"


def test_a_writer_that_does_not_say_that_the_disk_is_full_is_helped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(state: Any, path: Path) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 64")

    for left, says in (
        (100, r"unexpected pos 128 vs 64; the disk is full\)"),
        (3 << 40, rf"vs 64; .* full, or a quota or the limit .*: {tmp_path} has 3,072\.0 GiB free\)"),
    ):
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda path, left=left: SimpleNamespace(free=left))
        save = writing.Save(tmp_path, tmp_path / "step.tmp", "file", 8, 0, "one", 0, 1, 2)
        with pytest.raises(CheckpointError, match=says):
            save.write({}, no_room)


def _save_what_is_too_large(folder: str, kind: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    save = writing.Save(Path(folder), Path(folder, "step.tmp"), kind, 8, 0, "one", 0, 1, 2)
    save.unfinished.mkdir()
    try:
        save.write({"state_dict": {f"w{i}": torch.zeros(1 << 17) for i in range(4)}})
    except CheckpointError as error:
        Path(folder, "error").write_text(str(error))


@pytest.mark.parametrize("kind", ["file", "sharded"])
def test_a_file_beyond_a_limit_ends_the_save_with_one_line_that_says_so(kind: str, tmp_path: Path) -> None:
    assert join(launch(_save_what_is_too_large, [(str(tmp_path), kind)])) == [0]
    error = (tmp_path / "error").read_text()
    assert re.match(rf"Saving step 8 to {tmp_path} failed \(rank 0: \w+Error: [^;]+; most likely .*\)\. There", error)
    assert "(ulimit -f, here 1.0 MiB)" in error
    assert f"{tmp_path} has " in error
    assert "Traceback" not in error
    assert not (tmp_path / "step.tmp").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_what_is_no_lack_of_room_is_not_explained_as_one(number: int, tmp_path: Path) -> None:
    def fails(state: Any, path: Path) -> None:
        raise OSError(number, os.strerror(number))

    save = writing.Save(tmp_path, tmp_path / "step.tmp", "file", 8, 0, "one", 0, 1, 2)
    with pytest.raises(CheckpointError, match=rf"\[Errno {number}\]") as error:
        save.write({}, fails)
    assert ("quota or the limit" in str(error.value)) == (number != errno.EACCES)


def test_a_rank_leaves_another_ranks_error_to_that_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointException("write", {1: (OSError(errno.EIO, "no"), StackSummary())})

    monkeypatch.setattr("torch.distributed.checkpoint.save", fails)
    with pytest.raises(OSError, match="no"):
        write_shards({"state_dict": {}}, tmp_path / "step", 1)
    write_shards({"state_dict": {}}, tmp_path / "step", 0)
    assert not list((tmp_path / "step").iterdir())


FAULTS: dict[str, Callable[..., Any]] = {"_seal_own_files": OSError, "_publish": PermissionError, "_prune": OSError}


@pytest.mark.parametrize("place", FAULTS)
def test_a_write_that_fails_ends_the_run_and_leaves_nothing_half_done(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(writing, place)

    def fails(path: Path, *args: Any) -> Any:
        if (path.parent / "step-00000004").exists() or (path / "step-00000008").exists():
            raise FAULTS[place]("no")
        return original(path, *args)

    monkeypatch.setattr(writing, place, fails)
    gate = Gate()
    gate.open.set()
    with pytest.raises(CheckpointError, match=rf"Saving step 8 .*rank 0: {FAULTS[place].__name__}: no"):
        fit(tmp_path, gate, 12)
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert left[0] == "step-00000004"
    assert all((tmp_path / "run/checkpoints" / name / MANIFEST).exists() for name in left)


def test_shards_of_what_is_on_the_cpu_are_written_without_a_word_to_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's loader that copies ahead would wait for the training's stream from the thread that writes."""

    def waits(*_: Any, **__: Any) -> None:
        raise AssertionError("asks for the current stream")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._OverlappingCpuLoader", waits)
    state = {"state_dict": {f"w{i}": torch.full((7,), float(i)) for i in range(3)}, "epoch": 1}
    write_shards(state, tmp_path / "step", 0)
    found = {name: torch.zeros(7) for name in state["state_dict"]}
    monkeypatch.undo()
    load({"state_dict": found}, checkpoint_id=tmp_path / "step")
    assert all(torch.equal(found[name], tensor) for name, tensor in state["state_dict"].items())

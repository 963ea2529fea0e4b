"""A hang of one rank ends all of them, with the stacks of each on file."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from _server import join, launch
from _survival_worker import (
    SAVE_EVERY,
    STEPS,
    Run,
    Stage,
    Stream,
    end,
    finish,
    make_trainer,
    stop_answering,
    validation_batches,
)
from lightning.pytorch import Callback, Trainer

from idc.callbacks import watch as watch_module
from idc.callbacks.hang import STACKS, HangWatchdog
from idc.callbacks.progress import show
from idc.callbacks.resume import find_resume
from idc.callbacks.watch import EXIT_STATUS, SLOWER, Watch
from idc.errors import UserError

# The times ----------------------------------------------------------------------------------------------------------


def test_the_silence_that_is_allowed_follows_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now[0])
    watch = Watch(tmp_path / "none", (0, 1), "run", timeout=10.0, first_timeout=50.0)

    def after(seconds: float, *beat: Any) -> float:
        now[0] += seconds
        watch.beat(*beat)
        return watch.allowed

    assert watch.allowed == 50.0, "before anything has ended"
    assert after(40.0, "step 1") == 10.0, "compilation is not what later steps are measured by"
    assert after(1.0, "step 2") == 10.0
    assert after(4.0, "step 3") == SLOWER * 4.0
    assert after(1.0, "the start of an evaluation", True) == 50.0
    assert after(49.0, "held-out batch 0") == SLOWER * 4.0
    assert after(19.0, "step 4") == SLOWER * 19.0


@pytest.mark.parametrize("times", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_wrong_times_are_user_errors(times: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=rf"timeout={times[0]}"):
        HangWatchdog(*times)


# Processes that hang --------------------------------------------------------------------------------------------------


def _wait_for_ever(folder: str, rank: int, timeout: float) -> None:
    Watch(Path(folder), (rank, 2), "now", timeout, timeout).start()
    threading.Event().wait()


def test_a_rank_that_is_silent_makes_another_dump_and_end_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "request-before.json").write_text("{}")  # of an earlier start
    assert join(launch(_wait_for_ever, [(str(tmp_path), 0, 0.5), (str(tmp_path), 1, 1e6)])) == [EXIT_STATUS] * 2
    for rank in (0, 1):
        stacks = (tmp_path / f"rank-{rank}.txt").read_text()
        assert f"rank {rank} of 2" in stacks
        assert "_wait_for_ever" in stacks
        assert "hang watchdog" in stacks or "_look" in stacks, "of all threads"
    assert json.loads((tmp_path / "request-now.json").read_text())["rank"] == 0
    assert not (tmp_path / "request-before.json").exists()


def _hold_the_interpreter(folder: str) -> None:
    watch_module._MARGIN = 0.5
    Watch(Path(folder), (0, 1), "now", 0.5, 0.5).start()
    started = threading.Event()
    threading.Timer(0.3, started.set).start()  # the watchdog has looked once
    started.wait()
    ctypes.PyDLL(None).sleep(600)


def test_a_process_whose_interpreter_is_held_is_dumped_all_the_same(tmp_path: Path) -> None:
    (code,) = join(launch(_hold_the_interpreter, [(str(tmp_path),)]))
    assert code == 1
    assert "_hold_the_interpreter" in (tmp_path / "rank-0.txt").read_text()


def _end_without_the_others(folder: str) -> None:
    def stale(*_: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    watch = Watch(Path(folder), (0, 2), "now", 0.2, 0.2, lambda seconds: (Path(folder) / "saved").touch())
    watch_module._GRACE = 0.2
    with patch.object(Path, "is_dir", stale):
        watch.start()
        threading.Event().wait()


def test_a_file_system_that_does_not_answer_keeps_no_save_from_its_end(tmp_path: Path) -> None:
    assert join(launch(_end_without_the_others, [(str(tmp_path),)])) == [EXIT_STATUS]
    assert (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watchdog_that_fails_takes_its_timer_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: timer.append("set"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timer.append("taken away"))
    watch = Watch(tmp_path, (0, 1), "now", 0.2, 0.2)
    monkeypatch.setattr(watch, "_is_asked", lambda: 1 // 0)
    watch.start()
    watch._thread.join()
    assert timer == ["set", "taken away"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_request_that_cannot_be_read_is_none_and_is_looked_for_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = threading.Semaphore(0)

    def fails(path: Path) -> bool:
        looks.release()
        raise OSError(number, os.strerror(number))

    watch = Watch(tmp_path, (0, 1), "now", 60.0, 60.0)
    watch._poll = 0.01
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", fails)
        watch.start()
        try:
            assert all(looks.acquire(timeout=20) for _ in range(3))
        finally:
            watch.stop()


def test_a_folder_that_cannot_be_written_leaves_a_watch_without_files(tmp_path: Path) -> None:
    (tmp_path / "rank-0.txt").mkdir()  # what cannot be opened, whoever asks
    (tmp_path / "request-before.json").mkdir()  # nor removed
    Watch(tmp_path, (0, 1), "now", 60.0, 60.0).start().stop()


def _abort(folder: str) -> None:
    Watch(Path(folder), (0, 1), "now", 60.0, 60.0).start()
    os.abort()


def test_a_process_that_torch_aborts_leaves_its_stacks(tmp_path: Path) -> None:
    assert join(launch(_abort, [(str(tmp_path),)])) == [-signal.SIGABRT]
    assert "_abort" in (tmp_path / "rank-0.txt").read_text()


def test_a_rank_that_stops_answering_ends_the_run_which_resumes(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks=2, sharded=True, asynchronous=True)
    hanging = Run(run.folder, run.log, ranks=2, sharded=True, asynchronous=True, hang_step=SAVE_EVERY + 2)
    assert finish(hanging) == [EXIT_STATUS] * 2
    stacks = [(Path(run.folder) / STACKS / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "stop_answering" in stacks[1]
    assert "stop_answering" not in stacks[0]
    assert "training_epoch_loop.py" in stacks[0], "where it waits for the other"
    found = find_resume(Path(run.folder, "checkpoints"))
    assert found is not None
    assert found.name == f"step-{SAVE_EVERY:08d}"
    assert finish(run) == [0, 0]
    assert end(run)["step"] == STEPS


class NeverBuilt(Stage):
    def configure_model(self) -> None:
        stop_answering()


def _hang_before_training(folder: str) -> None:
    make_trainer(Run(folder, ""), [HangWatchdog(0.2, 0.5)]).fit(NeverBuilt(), Stream(0, 1))


def test_a_hang_while_the_model_is_built_ends_the_run_too(tmp_path: Path) -> None:
    assert join(launch(_hang_before_training, [(str(tmp_path),)])) == [EXIT_STATUS]
    stacks = (tmp_path / STACKS / "rank-0.txt").read_text()
    assert "s since the start" in stacks
    assert "stop_answering" in stacks


# Runs that do not -----------------------------------------------------------------------------------------------------


class Beats(Callback):
    """What the watchdog of a trainer has heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> Beats:
        beat = Watch.beat
        monkeypatch.setattr(
            Watch, "beat", lambda watch, what, long=False: (self.heard.append(what), beat(watch, what, long))
        )
        return self

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        show(trainer, "sampling previews", 1, 2)


def test_a_healthy_run_is_heard_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = Beats().listen(monkeypatch)
    before = threading.active_count()
    trainer = make_trainer(Run(str(tmp_path), "", steps=6), [HangWatchdog(60.0, 60.0), beats])
    trainer.fit(Stage(), Stream(0, 1), validation_batches(0, 1))
    assert [what for what in beats.heard if what.startswith("step")] == [f"step {n}" for n in range(1, 7)]
    assert beats.heard[:2] == ["the start of the sanity check", "held-out batch 0"]
    assert {
        "the start of training",
        "1 of 2, sampling previews",
        "held-out batch 0",
        "held-out batch 2",
        "an evaluation",
    } <= set(beats.heard)
    assert not (tmp_path / STACKS).exists()
    assert threading.active_count() == before


def test_what_comes_before_the_first_step_may_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Watch.beat
    allowed: dict[str, float] = {}
    monkeypatch.setattr(Watch, "beat", lambda w, *of: (beat(w, *of), allowed.setdefault(of[0], w.allowed)))
    watchdog = HangWatchdog(60.0, 600.0)

    class Encodes(Stage):
        def setup(self, stage: str) -> None:
            self.on_progress("encoding: batch 1")

    make_trainer(Run(str(tmp_path), "", steps=1), [watchdog]).fit(Encodes(), Stream(0, 1), validation_batches(0, 1))
    early = ["encoding: batch 1", "the start of the sanity check", "held-out batch 0", "the start of training"]
    assert [allowed[what] for what in early] == [600.0] * 4
    assert allowed["step 1"] == 60.0


@pytest.mark.parametrize("hook", ["setup", "on_train_batch_end"])
def test_a_run_that_fails_stops_its_watchdog(hook: str, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    fails = type("Fails", (Callback,), {hook: fail})
    trainer = make_trainer(Run(str(tmp_path), "", steps=6), [HangWatchdog(60.0, 60.0), fails()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Stage(), Stream(0, 1))
    assert not (tmp_path / STACKS).exists()
    assert not any(thread.name == "hang watchdog" for thread in threading.enumerate())

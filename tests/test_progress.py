"""Progress where there is no terminal: lines that say what runs and how far it is; and in one: a single bar."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _sft_worker import Fit, callbacks, fit_here, merge, one_thread, tiny_overlay
from rich.console import Console

from idc import progress as lines_module
from idc.callbacks.progress import Progress
from idc.cli import main
from idc.progress import Lines, track


class Clock:
    """A clock that goes on by a second whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(lines_module, "time", SimpleNamespace(monotonic=Clock()))
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_line_comes_now_and_then_and_says_what_is_left(console: Console) -> None:
    lines = Lines("cutting", 100, console, every=10)
    for done in range(1, 31):
        lines.update(done)
    assert printed(console) == [f"cutting {n}0/100  1.0/s  {10 - n}0 s left" for n in (1, 2, 3)]


def test_an_unknown_total_or_a_slow_first_piece_is_no_division_by_zero(console: Console) -> None:
    Lines("reading", None, console, every=1).update(5)
    Lines("reading", 7, console, every=1).update(0)
    Lines("reading", 0, console, every=1).update(0)
    assert printed(console) == ["reading 5/?  5.0/s", "reading 0/7", "reading 0/?"]


def test_tracking_yields_everything_and_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "letters", 3)) == list("abc")
    assert list(track(iter("abc"), "letters", 3, shown=False)) == list("abc")
    assert capsys.readouterr().err == ""  # quicker than the first line


def test_a_log_shows_validation_previews_and_predict(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = merge(tiny_overlay(toy_data, tmp_path / "runs"), callbacks(save_every=100, count=4))
    overlay["trainer"] |= {"max_steps": 4, "enable_progress_bar": True}
    overlay["data"]["init_args"]["val_batch_size"] = 2
    overlay["trainer"]["callbacks"].append(
        {"class_path": "idc.callbacks.progress.Progress", "init_args": {"every_n_seconds": 0.0}}
    )
    run = Fit(tmp_path, overlay)
    assert fit_here(run) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"validating 1/(\d+).*validating \1/\1.*sampling previews 2/4.*step 4/4 .*val/loss", text, re.DOTALL
    )
    with one_thread():
        assert main(["predict", *replace(run, log="predict").command()[1:], "--ckpt_path", "last"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"predicting 1/(\d+).*predicting \1/\1", text, re.DOTALL)
    assert not re.search("validating|previews|step", text)


class Terminal(Console):
    """rich's console as if its file were a terminal."""

    def __init__(self, **_: Any) -> None:
        super().__init__(file=io.StringIO(), force_terminal=True, width=120)


def test_in_a_terminal_one_bar_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console", Terminal)
    trainer: Any = SimpleNamespace(is_global_zero=True, state=SimpleNamespace(fn="predict"), num_predict_batches=[3])
    bar = Progress()
    bar.on_predict_start(trainer, None)  # type: ignore[arg-type]
    bar.on_predict_batch_end(trainer)
    (task,) = bar._bar.tasks
    assert (task.description, task.completed, task.total) == ("predicting", 1, 3)
    bar.on_predict_end(trainer, None)  # type: ignore[arg-type]
    assert bar._bar is None

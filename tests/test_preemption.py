from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _server import free_port, join, launch
from _survival_worker import (
    STEPS,
    Run,
    Stage,
    Stream,
    command,
    end,
    finish,
    make_trainer,
    mean_losses,
    mean_validation,
    records,
)
from lightning.pytorch import Callback, Trainer

from idc.callbacks.preemption import MARKER, Preemption
from idc.callbacks.resume import find_resume
from idc.errors import UserError
from idc.models.manifest import Manifest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(str(folder / "run"), str(folder / "log"))
    assert finish(run) == [0]
    return run


def saved_step(run: Run) -> int:
    found = find_resume(Path(run.folder, "checkpoints"))
    assert found is not None
    return Manifest.read(found).step


def check_preempted_at(run: Run, step: int) -> None:
    assert [end(run, rank)["step"] for rank in range(run.ranks)] == [step] * run.ranks
    assert all(end(run, rank)["handler_restored"] for rank in range(run.ranks))
    assert saved_step(run) == step
    assert json.loads(Path(run.folder, "checkpoints", MARKER).read_text())["step"] == step


def check_resumes_as(undisturbed: Run, preempted: Run, tolerance: float) -> None:
    stopped, expected = end(preempted)["step"], mean_losses(undisturbed)
    resumed = replace(preempted, signal_step=None, signal_batch=None, log=f"{preempted.log}-resumed")
    assert finish(resumed) == [0] * resumed.ranks
    assert not Path(resumed.folder, "checkpoints", MARKER).exists()
    losses = {**mean_losses(preempted), **mean_losses(resumed)}
    assert sorted(mean_losses(resumed)) == list(range(stopped + 1, STEPS + 1))
    assert all(abs(losses[step] - expected[step]) <= tolerance for step in range(1, STEPS + 1))


def test_signal_to_one_rank_of_two_ends_both_with_a_checkpoint_of_that_step(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks=2, sharded=True, signal_step=10)
    assert finish(run) == [0, 0]
    check_preempted_at(run, 10)
    check_resumes_as(undisturbed, run, tolerance=1e-5)


def test_signal_on_the_last_batch_of_an_epoch_skips_the_validation_that_is_due(
    undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), signal_step=12)
    assert finish(run) == [0]
    check_preempted_at(run, 12)
    assert end(run)["validation"] == end(undisturbed)["validation"][: 1 + 3]  # the sanity check and the one at step 6
    check_resumes_as(undisturbed, run, tolerance=0)


def test_signal_in_a_validation_cuts_it_short_and_saves_the_next_step(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks=2, sharded=True, signal_batch=1)
    assert finish(run) == [0, 0]
    check_preempted_at(run, 7)
    assert mean_validation(run) == pytest.approx(mean_validation(undisturbed)[: 1 + 2], abs=1e-5)
    check_resumes_as(undisturbed, run, tolerance=1e-5)


def test_signal_amid_accumulation_waits_for_the_optimizer_step(tmp_path: Path) -> None:
    whole = Run(str(tmp_path / "whole"), str(tmp_path / "whole-log"), accumulate=3, steps=6)
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), accumulate=3, steps=6, signal_step=3)
    assert finish(whole) == [0]
    assert finish(run) == [0]
    check_preempted_at(run, 3)
    resumed = replace(run, signal_step=None)
    assert finish(resumed) == [0]
    assert records(resumed) == records(whole)


def test_signal_at_the_last_step_does_not_requeue_a_finished_run_for_ever(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), steps=4, signal_step=4)
    assert finish(run) == [0]
    check_preempted_at(run, 4)
    assert finish(replace(run, signal_step=None)) == [0]
    assert not Path(run.folder, "checkpoints", MARKER).exists()


def test_minimum_of_steps_does_not_delay_a_preemption(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), steps=10, min_steps=9, signal_step=2)
    assert finish(run) == [0]
    check_preempted_at(run, 2)


def test_under_lightnings_launcher_the_whole_command_ends_with_status_0(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks=2, sharded=True, signal_step=3)
    errors = tmp_path / "stderr"
    assert join(launch(command, [(run, free_port(), str(errors))]), 120) == [0], errors.read_text()[-2000:]
    assert "Preempted at step 3" in errors.read_text()
    check_preempted_at(run, 3)


class Signalled(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("restarts", "start"), [(None, "71.0"), ("2", "71.2")])
def test_a_marker_says_which_start_of_which_job_was_preempted(
    restarts: str | None, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    make_trainer(Run(str(tmp_path), "", steps=4), [Signalled()]).fit(Stage(), Stream(0, 1))
    marker = json.loads((tmp_path / "checkpoints" / MARKER).read_text())
    assert marker == {"step": 2, "signal": ["SIGTERM"], "slurm": start}


# The lines of README for SLURM, with markers as above ------------------------------------------------------------

IDC = """
srun() { mkdir -p runs/sft/$RUN/checkpoints; rm -f runs/sft/$RUN/checkpoints/preempted.json; eval "$DOES"; }
scontrol() { echo "$@" >> queued; }
"""
SAVES = """echo '{"step": 2, "signal": ["SIGTERM"], "slurm": "71.%s"}' > runs/sft/$RUN/checkpoints/preempted.json"""


@pytest.mark.parametrize(
    ("restarts", "older", "does", "queued", "status"),
    [
        ("", None, SAVES % "0", True, 0),
        ("3", "71.2", SAVES % "3", True, 0),
        ("", None, "true", False, 0),
        ("", "70.0", "true", False, 0),
        ("2", "71.1", "true", False, 0),
        ("", "171.0", "true", False, 0),
        ("1", "71.10", "true", False, 0),
        ("", "null", "true", False, 0),
        ("", "70.0", "return 3", False, 3),
        ("", None, f"{SAVES % '0'}; return 75", False, 75),
    ],
)
def test_slurm_queues_a_job_again_whose_own_run_was_preempted_now(
    restarts: str, older: str | None, does: str, queued: bool, status: int, tmp_path: Path
) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)
    (script,) = re.findall(r"--wrap \\\n\s*'([^']*)'", "".join(blocks))
    if older is not None:
        marker = tmp_path / "runs/sft/version_0/checkpoints" / MARKER
        marker.parent.mkdir(parents=True)
        marker.write_text(json.dumps({"step": 5, "signal": [], "slurm": None if older == "null" else older}) + "\n")
    names = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    job = {"SLURM_JOB_ID": "71", **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
    environment = {**names, **job, "RUN": "version_1", "DOES": does}
    done = subprocess.run(["sh", "-c", IDC + script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 71\n"


def test_unknown_signal_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"'SIGTREM'.*SIGTERM"):
        Preemption(signals=["SIGTREM"])


def test_one_interrupt_asks_and_a_second_one_stops_at_once() -> None:
    callback = Preemption()
    callback._install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert callback.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        callback._restore()

"""torchrun starts a run again when one of its ranks dies, and the run ends as one that is left alone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from _four_steps import check_equal, make_run
from _restart_worker import agent
from _server import join, launch
from _sft_worker import Fit

LIMIT = 180.0  # seconds: ten times what it takes on a busy machine


def under_torchrun(run: Fit, restarts: int) -> int | None:
    """torchrun's status; None where it did not end in time. Nothing that it started is left."""
    # As the README has it: else torch 2.13 keeps one store over all attempts, and ranks may look for dead ones.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    (process,) = launch(agent, [(run.folder, run.ranks, restarts, run.command(), environment)])
    try:
        return join([process], LIMIT)[0]
    finally:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_run_one_of_whose_ranks_is_killed_goes_on_and_ends_as_one_that_is_left_alone(
    one_rank: Fit, toy_data: Path, tmp_path: Path
) -> None:
    """Two ranks, the second killed in step 4 with step 2 saved. What was repeated was the same to the bit."""
    extra = (
        {"class_path": "idc.callbacks.hang.HangWatchdog"},
        {"class_path": "_restart_worker.Killed", "init_args": {"step": 4}},
    )
    run = make_run(tmp_path, toy_data, 2, {}, extra, args=("--ckpt_path", "auto"))
    assert under_torchrun(run, restarts=1) == 0, run.errors()
    for rank in range(2):
        assert [line["step"] for line in run.lines(rank) if "loss" in line] == [1, 2, 3, 3, 4]
    assert run.losses() == pytest.approx(one_rank.losses(), rel=1e-5)
    assert run.validation()[4] == pytest.approx(one_rank.validation()[4], rel=1e-5)
    check_equal(run, one_rank)
    assert [path.name for path in run.run.parent.iterdir()] == ["version_0"]

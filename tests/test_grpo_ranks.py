"""GRPO over ranks, killed and resumed: rewards, advantages and updates are those of one undisturbed process."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _grpo_worker import BATCH, GROUP, KeepingPolicy, Run, rollouts, save_start

from idc.models.spec import Lora
from idc.stages.updates import Contrast

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
TOLERANCE = 1e-5
GRADIENTS = 1e-3  # of float32 advantages, whose groups have deviations of thousandths


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_start(tmp_path_factory.mktemp("start") / "model"))


def make(folder: Path, toy_data: Path, start: str, **settings: Any) -> Run:
    return Run(str(folder), str(toy_data), start, **settings)


# Ranks --------------------------------------------------------------------------------------------------------------


def check_equal(run: Run, alone: Run) -> None:
    """What was logged, and gradient and weights of the first update, on every rank."""
    expected, lines = alone.kept(), alone.lines()
    for rank in range(run.ranks):
        kept = run.kept(rank)
        for step, line in lines.items():
            found = run.lines(rank)[step]
            for name in (n for n in line if n.startswith(("train/", "watch/", "signal/")) and n != "train/loss"):
                assert found[name] == pytest.approx(line[name], rel=1e-3, abs=1e-6), name
        assert len(kept["gradients"]) == len(expected["gradients"])
        for gradients, others in zip(kept["gradients"], expected["gradients"], strict=True):
            check_close(gradients, others, GRADIENTS)
        check_close(kept["weights"][0], expected["weights"][0], TOLERANCE)


def check_close(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor], tolerance: float) -> None:
    assert some.keys() == others.keys()
    scale = max(value.abs().max().item() for value in others.values())
    for name, value in others.items():
        assert (some[name] - value).abs().max().item() <= tolerance * scale, name


CASES: dict[str, dict[str, Any]] = {
    "whole-groups-ddp": {"strategy": "ddp"},
    "split-group-ddp": {"strategy": "ddp", "batches": {"batch_size": GROUP}},
    "no-rewards-on-one-ddp": {"strategy": "ddp", "reward": {"failing": tuple(range(GROUP, BATCH))}},
    "split-group-updates-contrast-fsdp2": {
        "strategy": "fsdp2",
        "batches": {"batch_size": GROUP},
        "model": {"rollouts": rollouts(batch=1, window="one"), "contrast": Contrast(), "updates": 2},
    },
    "constant-on-one-lora-fsdp2": {
        "strategy": "fsdp2",
        "reward": {"constant": tuple(range(GROUP, BATCH)), "failing": (1,)},
        "model": {"trainable": "lora", "lora": Lora(rank=2, alpha=4)},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_updates_of_one(case: str, toy_data: Path, start: str, tmp_path: Path) -> None:
    """Whole groups on each rank, a group split over both, and a rank whose rewards are all equal or all missing: its
    advantages are zero, and it takes part in every pass all the same."""
    settings = dict(CASES[case])
    strategy = settings.pop("strategy")
    alone = make(tmp_path / "alone", toy_data, start, steps=2, **settings)
    assert alone.finish() == [0], alone.error()
    both = replace(alone, folder=str(tmp_path / "both"), ranks=2, strategy=strategy)
    assert both.finish() == [0, 0], both.error()
    check_equal(both, alone)
    step = min(alone.lines())
    assert both.lines(0)[step]["ids"] + both.lines(1)[step]["ids"] == alone.lines()[step]["ids"]
    assert sum(value.abs().sum().item() for value in alone.kept()["gradients"][0].values()) > 0


# Killed and resumed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, start: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = lasting(tmp_path_factory.mktemp("uninterrupted"), toy_data, start)
    assert run.finish() == [0], run.error()
    assert sorted(run.lines()) == [1, 2, 3, 4, 5]
    assert run.lines()[5]["policy/kl"] > 1e-5
    return run


def lasting(folder: Path, toy_data: Path, start: str, **settings: Any) -> Run:
    """With a pull to the reference, and optimiser state that matters."""
    model = {"objective": KeepingPolicy(kl=1.0), "optimizer": ADAM, "rollouts": rollouts(window="sliding", **SLIDING)}
    return make(folder, toy_data, start, steps=5, save_every=1, model=model, **settings)


SLIDING = {"window_size": 1, "window_stride": 2}  # another step from the third iteration on


def test_killed_anywhere_and_resumed_a_run_has_the_curve_of_one_that_was_not(
    uninterrupted: Run, toy_data: Path, start: str, tmp_path: Path
) -> None:
    """Between rewards and update, in the middle of a group's rewards, and right after a save. The distance to the
    reference goes on from the start's weights, to the bit."""
    run = lasting(tmp_path, toy_data, start)
    last = replace(run, ckpt_path="last")
    assert replace(run, kill=("update", 4)).finish() == [-9], run.error()
    assert sorted(run.lines()) == [1]
    assert replace(last, kill=("rollout", BATCH + 3)).finish() == [-9], run.error()
    assert sorted(run.lines()) == [1, 2]
    assert replace(last, kill=("saved", 4)).finish() == [-9], run.error()
    assert last.finish() == [0], run.error()
    assert run.lines() == uninterrupted.lines()


def test_a_run_goes_on_over_two_sharded_ranks(uninterrupted: Run, toy_data: Path, start: str, tmp_path: Path) -> None:
    run = lasting(tmp_path, toy_data, start)
    assert replace(run, kill=("saved", 3)).finish() == [-9], run.error()
    both = replace(run, ckpt_path="last", ranks=2, strategy="fsdp2", log="both")
    assert both.finish() == [0, 0], both.error()
    assert sorted(both.lines()) == sorted(both.lines(1)) == [4, 5]
    for step, line in both.lines().items():
        for name in ("train/reward", "policy/kl", "train/grad_norm"):
            assert line[name] == pytest.approx(uninterrupted.lines()[step][name], rel=1e-3), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_dead_rewards_stop_a_run_at_its_last_complete_step_from_which_it_goes_on(
    ranks: int, uninterrupted: Run, toy_data: Path, start: str, tmp_path: Path
) -> None:
    """No other save is due; the iteration without rewards is taken again, with the very samples that it had."""
    run = replace(lasting(tmp_path, toy_data, start), save_every=100, ranks=ranks, strategy="fsdp2")
    stopped = replace(run, reward={"dead_after": BATCH // ranks})
    assert stopped.finish() == [2] * ranks, stopped.error()
    assert "8 of 8 samples have no reward" in stopped.error()
    assert sorted(run.lines()) == [1]
    assert (tmp_path / "checkpoints" / "last").readlink().name == "step-00000001"
    last = replace(run, ckpt_path="last", steps=3)
    assert last.finish() == [0] * ranks, last.error()
    assert sorted(run.lines()) == [1, 2, 3]
    for step, line in run.lines().items():
        expected = uninterrupted.lines()[step]
        if ranks == 1:
            assert line == expected
        else:
            assert line["ids"] + run.lines(1)[step]["ids"] == expected["ids"]
            assert line["train/reward"] == pytest.approx(expected["train/reward"], rel=1e-3)


def test_resuming_from_another_start_is_refused(uninterrupted: Run, toy_data: Path, start: str, tmp_path: Path) -> None:
    other = save_start(tmp_path / "other", seed=1)
    checkpoint = str(Path(uninterrupted.folder, "checkpoints", "step-00000005"))
    run = lasting(tmp_path / "run", toy_data, str(other), ckpt_path=checkpoint)
    assert run.finish() == [2], run.error()
    assert run.error().startswith("model.init_args.checkpoint: other weights than those that the resumed run started")
    assert "\n" not in run.error()


# Failing rewards ----------------------------------------------------------------------------------------------------


def test_too_many_failures_end_the_run_on_all_ranks_with_one_message(
    toy_data: Path, start: str, tmp_path: Path
) -> None:
    """All failures are on one rank, where they are every second sample, and one in four over both."""
    failing = {"failing": (0, 2)}
    allowed = make(tmp_path / "allowed", toy_data, start, ranks=2, steps=1, reward=failing)
    allowed = replace(allowed, runner={"max_failure_rate": 0.25})
    assert allowed.finish() == [0, 0], allowed.error()
    assert [allowed.lines(rank)[1]["train/without_reward"] for rank in range(2)] == [0.25, 0.25]
    ended = replace(allowed, folder=str(tmp_path / "ended"), runner={"max_failure_rate": 0.2})
    assert ended.finish() == [2, 2], ended.error()
    message = (
        "rewards: 2 of 8 samples have no reward, more than max_failure_rate=0.2 allows: by_place: cannot be judged"
    )
    assert [ended.error(rank) for rank in range(2)] == [message, message]

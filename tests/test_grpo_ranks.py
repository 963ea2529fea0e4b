"""GRPO over ranks, killed and resumed: rewards, advantages and updates are those of one undisturbed process."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _grpo_worker import BATCH, GROUP, KeepingPolicy, Run, rollouts, save_start

from idc.callbacks.ema import EMA
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
            for name in (name for name in line if name.startswith("train/") and name != "train/loss"):
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

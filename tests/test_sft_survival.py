"""The SFT stage through `idc fit`, killed, preempted, resumed and moved between ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _sft_worker import ROOT, TRANSFORMER, Fit, callbacks, merge, tiny_overlay
from diffusers import WanTransformer3DModel

STEPS, SAVE_EVERY = 9, 2  # 6 steps an epoch: the run goes over the end of one
TOLERANCE = 1e-5
FSDP2 = ROOT / "recipes" / "hardware" / "cpu2.yaml"


def make_run(folder: Path, toy_data: Path, features: bool = True, num_workers: int = 0) -> Fit:
    changes = {
        "trainer": {"max_steps": STEPS, "val_check_interval": 3},
        "data": {"init_args": {"num_workers": num_workers}},
    }
    overlay = merge(tiny_overlay(toy_data, folder / "runs", features), callbacks(SAVE_EVERY, count=1), changes)
    return Fit(folder, overlay)


@pytest.fixture(scope="module")
def uninterrupted(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The run that all others must equal: one process, cached features, nothing in its way."""
    run = make_run(tmp_path_factory.mktemp("uninterrupted"), toy_data)
    assert run.finish() == [0], run.errors()
    assert sorted(run.steps()) == list(range(1, STEPS + 1))
    return run


@pytest.mark.parametrize(("seed", "features", "num_workers"), [(0, True, 0), (1, False, 2), (2, False, 0)])
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(
    seed: int, features: bool, num_workers: int, uninterrupted: Fit, toy_data: Path, tmp_path: Path
) -> None:
    """At a random moment after a random step, then at a random place of a random save. Losses, held-out losses, ids
    and seeds are the same to the bit; nothing is repeated but what a kill had undone, and nothing is left out."""
    chance = random.Random(seed)
    run = replace(make_run(tmp_path, toy_data, features, num_workers), args=("--ckpt_path", "auto"))
    first = replace(run, kill_place="step", kill_step=chance.randint(3, 5), kill_after=0.03 * chance.random())
    # -14: the alarm that the run set itself ends it as SIGKILL does, without a line of Python, but at any moment.
    assert first.finish() == [-14], first.errors()
    place = chance.choice(["state", "seal", "manifest", "publish", "prune"])
    second = replace(run, kill_place=place, kill_step=chance.choice([6, 8]))
    assert second.finish() == [-9], second.errors()
    assert run.finish() == [0], run.errors()
    assert run.steps() == uninterrupted.steps()
    assert run.validation() == uninterrupted.validation()
    assert [path.name for path in (tmp_path / "runs" / "sft").iterdir()] == ["version_0"]


def test_a_run_that_is_killed_before_its_first_checkpoint_starts_again(
    uninterrupted: Fit, toy_data: Path, tmp_path: Path
) -> None:
    run = replace(make_run(tmp_path, toy_data), args=("--ckpt_path", "auto"))
    assert replace(run, kill_place="step", kill_step=1).finish() == [-14], run.errors()
    assert run.finish() == [0], run.errors()
    assert run.steps() == uninterrupted.steps()


def check_close(run: Fit, other: Fit) -> None:
    """Losses and held-out losses within the tolerance; the global batches hold the same samples."""
    assert run.losses() == pytest.approx(other.losses(), rel=TOLERANCE)
    assert run.validation().keys() == other.validation().keys()
    for step, values in run.validation().items():
        assert values == pytest.approx(other.validation()[step], rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_give_the_curve_of_one(strategy: str, uninterrupted: Fit, toy_data: Path, tmp_path: Path) -> None:
    run = replace(make_run(tmp_path, toy_data), ranks=2)
    if strategy == "fsdp2":
        run = replace(run, overlays=(FSDP2,))
    else:
        run = replace(run, args=("--trainer.devices", "2", "--trainer.strategy", "ddp"))
    assert run.finish() == [0, 0], run.errors()
    check_close(run, uninterrupted)
    parts = [run.steps(rank) for rank in range(2)]
    for step, whole in uninterrupted.steps().items():
        assert sorted(parts[0][step]["ids"] + parts[1][step]["ids"]) == sorted(whole["ids"])


@pytest.mark.parametrize("mode", ["id_blocks", "id_blocks+lora"])
def test_a_part_of_the_weights_trains_on_two_sharded_ranks_as_on_one(mode: str, toy_data: Path, tmp_path: Path) -> None:
    """Frozen weights are sharded beside trained ones. One rank goes on from the checkpoint of two, with its average."""
    torch.manual_seed(1)
    wan = {**TRANSFORMER, "in_channels": 16, "out_channels": 16, "text_dim": 32}
    WanTransformer3DModel(**wan).save_pretrained(tmp_path / "wan" / "transformer")
    spec = {**TRANSFORMER, "pretrained": str(tmp_path / "wan"), "id_blocks": {"layers": 1}}
    part = {"transformer": spec, "trainable": mode, "lora": {"rank": 2, "alpha": 4}}
    changes = {"trainer": {"max_steps": 4, "val_check_interval": 2}, "model": {"init_args": part}}

    def run(name: str, **settings: Any) -> Fit:
        overlay = tiny_overlay(toy_data, tmp_path / name / "runs")
        made = Fit(tmp_path / name, merge(overlay, callbacks(save_every=2, count=1), changes), **settings)
        assert made.finish() == [0] * made.ranks, made.errors()
        return made

    alone, both = run("alone"), run("both", ranks=2, overlays=(FSDP2,))
    check_close(both, alone)
    assert len(set(alone.losses())) == 4
    checkpoint = str(both.run / "checkpoints" / "step-00000002")
    back = run("back", args=("--ckpt_path", checkpoint))
    assert back.losses() == pytest.approx(alone.losses()[2:], rel=TOLERANCE)
    assert back.validation()[4] == pytest.approx(alone.validation()[4], rel=TOLERANCE)


def test_a_run_moves_from_one_rank_to_two_and_back_and_a_signal_to_one_rank_ends_both(
    uninterrupted: Fit, toy_data: Path, tmp_path: Path
) -> None:
    """Killed on one rank after step 3, resumed from 2 by two with FSDP2, whose second is sent SIGTERM after step 5;
    both end with status 0 and a checkpoint, from which one rank goes on. The average goes with the weights."""
    alone = make_run(tmp_path, toy_data)
    assert replace(alone, kill_place="step", kill_step=3).finish() == [-14], alone.errors()
    last = ("--ckpt_path", "last")
    both = replace(alone, ranks=2, overlays=(FSDP2,), args=last, log="both")
    assert replace(both, signal_step=5).finish() == [0, 0], both.errors()
    assert sorted(both.steps()) == sorted(both.steps(1)) == [3, 4, 5, 6]
    assert (alone.run / "checkpoints" / "last").resolve().name == "step-00000006"
    assert (alone.run / "checkpoints" / "preempted.json").exists()
    back = replace(alone, args=last, log="back")
    assert back.finish() == [0], back.errors()
    assert sorted(back.steps()) == [7, 8, 9]
    found = [alone.steps()[step]["loss"] for step in (1, 2)] + both.losses() + back.losses()
    assert found == pytest.approx(uninterrupted.losses(), rel=TOLERANCE)
    for run, step in ((both, 3), (back, 9)):
        assert run.validation()[step] == pytest.approx(uninterrupted.validation()[step], rel=TOLERANCE)

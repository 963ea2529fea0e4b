"""NaN and spikes: found by their definition, and acted upon by all ranks alike without a trace in the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _grpo_worker import QUIET, data, save_start, stage
from _sft_worker import ROOT, Fit, callbacks, fit_here, merge, one_thread, scalars, tiny_overlay
from _spikes_worker import Poison
from lightning.pytorch import Trainer
from scipy.stats import median_abs_deviation
from test_refused_runs import Broken

from idc.callbacks.spikes import INCIDENTS, LossGuard, Usual
from idc.errors import UserError

FSDP2 = ROOT / "recipes" / "hardware" / "cpu2.yaml"
SAVE_EVERY = 3


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# Finding ------------------------------------------------------------------------------------------------------------


def test_centre_and_spread_are_the_median_and_the_scaled_deviation_of_the_last_values() -> None:
    values = np.random.default_rng(0).lognormal(size=75)
    usual = Usual(window=50)
    for value in values:
        usual.add(float(value))
    assert usual.centre == pytest.approx(np.median(values[-50:]))
    assert usual.spread == pytest.approx(median_abs_deviation(values[-50:], scale="normal"), rel=1e-4)


def test_a_spike_is_above_the_limit_after_the_warm_up_and_outliers_do_not_move_it() -> None:
    guard = LossGuard(threshold=5.0, window=20, warm_up=10)
    loss = guard.usual["loss"]
    for number in range(9):
        loss.add(1.0 + 0.1 * (number % 3))
    assert guard.judge({"loss": 1e9}) is None, "still warming up"
    loss.add(1.0)
    limit = 1.1 + 5 * 1.4826 * 0.1
    assert guard.judge({"loss": limit - 1e-6, "gradient_norm": 1e9}) is None
    found = guard.judge({"loss": limit + 1e-6, "gradient_norm": 1.0})
    assert found is not None
    assert (found.kind, found.signal, found.limit) == ("spike", "loss", pytest.approx(limit))
    assert guard.judge({"loss": -1e9}) is None, "a low loss is none"
    loss.values = [2.0] * 20
    assert loss.spread == pytest.approx(0.02), "a curve that does not vary still has a limit above it"
    for value in (math.nan, math.inf, -math.inf):
        broken = guard.judge({"loss": 1.0, "gradient_norm": value})
        assert broken is not None
        assert (broken.kind, broken.signal) == ("nan", "gradient_norm")


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_nan": "ignore"},
        {"on_spike": "rollback"},
        {"threshold": 0.0},
        {"threshold": math.nan},
        {"window": 5},
        {"warm_up": 9},
        {"warm_up": 300},
        {"watch": ["losss"]},
        {"max_skips": 0},
        {"max_roll_backs": 0},
    ],
)
def test_wrong_arguments_are_user_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        LossGuard(**wrong)


# Acting -------------------------------------------------------------------------------------------------------------


def guarded(
    folder: Path, toy_data: Path, factors: dict[int, float], guard: dict[str, Any], steps: int, **changes: Any
) -> Fit:
    """A tiny SFT whose batches of `factors` are spoiled; the rate does not depend on the number of steps."""
    entries = [
        {"class_path": "idc.callbacks.spikes.LossGuard", "init_args": guard},
        {
            "class_path": "_spikes_worker.Poison",
            "init_args": {"log": str(folder / "states"), "factors": {str(k): str(v) for k, v in factors.items()}},
        },
    ]
    base = merge(tiny_overlay(toy_data, folder / "runs"), callbacks(SAVE_EVERY, count=1))
    base["trainer"]["callbacks"] += entries
    own = {
        "trainer": {"max_steps": steps, "limit_val_batches": 0},
        "model": {"init_args": {"schedule": {"warmup_steps": 6, "decay": "constant"}}},
    }
    return Fit(folder, merge(base, own, changes))


def states(run: Fit, rank: int = 0, place: str = "end") -> list[dict[str, Any]]:
    lines = (run.folder / f"states-{rank}").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["place"] == place]


def samples(*records: dict[str, Any]) -> list[str]:
    """Ids of batches, each once: a small source is drawn from more than once."""
    return list(dict.fromkeys(id for record in records for id in record["ids"]))


def incidents(run: Fit) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run / INCIDENTS).read_text().splitlines()]


NAN_THEN_SPIKE = {2: math.nan, 13: 1e6}
SKIP_THEN_BACK = {"on_nan": "skip", "on_spike": "roll_back", "threshold": 20.0, "window": 20, "warm_up": 10}
# Batch 2 is skipped; at batch 13 (step 14) the run goes back to step 12, which goes on with batch 14.
ORDER = [(n + 1, n) for n in range(13)] + [(12, 13), (13, 14), (14, 15), (15, 16), (16, 17)]


@pytest.fixture(scope="module")
def alone(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    run = guarded(tmp_path_factory.mktemp("alone"), toy_data, NAN_THEN_SPIKE, SKIP_THEN_BACK, 16)
    assert run.finish() == [0], run.errors()
    return run


def test_a_skipped_step_changes_nothing_and_a_roll_back_is_the_checkpoint_with_the_data_after_it(alone: Fit) -> None:
    begins, ends = states(alone, place="start"), states(alone)
    assert [(record["step"], record["batch"]) for record in ends] == ORDER
    before, after = begins[2], ends[2]
    assert (after["step"], after["state"], after["optimizer"]) == (3, before["state"], before["optimizer"])
    assert begins[3]["rate"] > before["rate"], "the warm-up goes on"
    assert all(ends[i]["state"] != begins[i]["state"] for i in (0, 1, 3, 4)), "other steps are taken"

    saved, rolled_back = ends[11], ends[13]
    assert rolled_back["batch"] == 13
    for part in ("step", "state", "optimizer", "rate"):
        assert rolled_back[part] == saved[part], part
    assert begins[14]["state"] == saved["state"]


def test_every_incident_is_told_with_its_samples_and_counted(alone: Fit) -> None:
    begins = states(alone, place="start")
    nan, spike = incidents(alone)
    assert (nan["step"], nan["kind"], nan["action"], nan["value"]) == (3, "nan", "skip", "nan")
    assert (spike["step"], spike["kind"], spike["action"], spike["signal"]) == (14, "spike", "roll_back", "loss")
    assert spike["value"] > spike["limit"] > spike["median"]
    assert [record["samples"] for record in (nan, spike)] == [[samples(begins[2])], [samples(begins[13])]]
    said = alone.errors()
    assert f"step 3: the loss is nan: the step is skipped; its batch holds {', '.join(samples(begins[2]))}" in said
    assert "Rolled back from step 14 to" in said
    curves = scalars(alone.run)
    assert curves["incidents/nan"] == [(3, 1.0), (14, 1.0)]
    assert curves["incidents/roll_back"] == [(3, 0.0), (14, 1.0)]
    # Lightning counts from 0; the roll-back's own batch is logged where the run went back to.
    assert [step for step, _ in curves["train/loss"]] == [*range(13), 11, 12, 13, 14, 15]


def test_a_resumed_run_meets_what_the_undisturbed_one_met(alone: Fit, toy_data: Path, tmp_path: Path) -> None:
    run = guarded(tmp_path, toy_data, NAN_THEN_SPIKE, SKIP_THEN_BACK, 12)
    assert fit_here(run) == 0
    for steps in ("15", "16"):  # before the roll-back, and after it
        assert fit_here(run, ["--ckpt_path", "last", "--trainer.max_steps", steps]) == 0
    assert states(run) == states(alone)
    assert incidents(run) == incidents(alone)


def test_two_sharded_ranks_of_which_one_is_spoiled_do_as_one(alone: Fit, toy_data: Path, tmp_path: Path) -> None:
    run = guarded(tmp_path, toy_data, {2: math.nan, 13: 2e6}, SKIP_THEN_BACK, 16)
    both = Fit(run.folder, run.overlay, ranks=2, overlays=(FSDP2,))
    assert both.finish() == [0, 0], both.errors()
    for rank in (0, 1):
        ends = states(both, rank)
        assert [(record["step"], record["batch"]) for record in ends] == ORDER
        assert ends[13]["state"] == ends[11]["state"]
    ours = zip(states(both, 0), states(both, 1), states(alone), strict=True)
    for one, two, expected in ours:
        if expected["batch"] not in NAN_THEN_SPIKE:
            assert (one["loss"] + two["loss"]) / 2 == pytest.approx(expected["loss"], abs=1e-5)
    for found, expected in zip(incidents(both), incidents(alone), strict=True):
        assert len(found["samples"]) == 2, "a list of each rank"
        assert {id for own in found["samples"] for id in own} == set(expected["samples"][0])


@pytest.mark.parametrize(
    ("guard", "factors", "says"),
    [
        ({}, {1: math.nan}, "step 2: the loss is nan, and no weight was changed; its last batch holds train/"),
        (
            {"on_nan": "skip", "max_skips": 2},
            {1: math.nan, 2: math.inf, 3: math.nan},
            "step 4: the loss is nan, after 2 skipped steps in a row (max_skips=2), and no weight was changed",
        ),
        (
            {"on_nan": "roll_back"},
            {1: math.nan},
            "step 2: the loss is nan, and there is no checkpoint yet to roll back to",
        ),
        (
            {"on_nan": "roll_back", "max_roll_backs": 1},
            {4: math.nan, 6: math.nan},
            "step 5: the loss is nan, after 1 roll-backs (max_roll_backs)",
        ),
    ],
)
def test_limits_stop_the_run(
    guard: dict[str, Any],
    factors: dict[int, float],
    says: str,
    toy_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = guarded(tmp_path, toy_data, factors, guard, 8)
    assert fit_here(run) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert incidents(run)[-1]["action"] == "stop"


def test_the_samples_of_a_step_are_those_of_all_its_micro_batches(toy_data: Path, tmp_path: Path) -> None:
    run = guarded(tmp_path, toy_data, {3: math.nan}, {"on_nan": "skip"}, 2, trainer={"accumulate_grad_batches": 2})
    assert fit_here(run) == 0
    begins = states(run, place="start")
    (incident,) = incidents(run)
    assert incident["samples"] == [samples(begins[2], begins[3])]
    assert states(run)[-1]["state"] == begins[2]["state"]


def test_grpo_skips_steps_that_are_nan_and_its_weights_stay(toy_data: Path, tmp_path: Path) -> None:
    start = save_start(tmp_path / "model")
    module = stage(start, objective=Broken(), gradient_norm=1.0)
    guard, poison = LossGuard(on_nan="skip", max_skips=9), Poison(str(tmp_path / "states"), {})
    with one_thread():
        trainer = Trainer(
            callbacks=[guard, poison], **{**QUIET, "devices": 1, "max_steps": 2, "default_root_dir": tmp_path}
        )
        trainer.fit(module, datamodule=data(toy_data))
    records = [json.loads(line) for line in (tmp_path / "states-0").read_text().splitlines()]
    assert [record["step"] for record in records if record["place"] == "end"] == [1, 2]
    assert len({record["state"] for record in records}) == 1
    assert guard.counts == {"nan": 2, "spike": 0, "skip": 2, "roll_back": 0}
    assert all(parameter.isfinite().all() for parameter in module.parameters())

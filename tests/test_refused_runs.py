"""Runs that must not be: each ends as one line, before it can spoil what it was given or made before."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from _grpo_worker import GROUP, Run, data, fit, rollouts, save_start, stage
from _sft_worker import ROOT, Fit, callbacks, fit_here, merge, one_thread, tiny_overlay, written
from test_grpo_recipe import overlay

from idc.cli import main
from idc.data.module import VideoDataModule
from idc.errors import UserError
from idc.explain import explain, finish
from idc.models.spec import Lora
from idc.stages.base import check_precision
from idc.stages.rollouts import Rollout, Rollouts
from idc.stages.updates import Contrast, Given, Loss, Point, PolicyGradient

GRPO, SFT, DPO = ("recipes/grpo.yaml", "recipes/sft.yaml", "recipes/dpo.yaml")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "model")


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The last line of a command that ends with status 2 and without a traceback."""
    capsys.readouterr()
    with one_thread():
        assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("idc: error: "), err
    return last


# Resuming -----------------------------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith("events."))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_refused_resume_changes_no_file_of_the_run_and_one_that_is_taken_writes_its_settings(
    start: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config.yaml is what generation and export read the model from."""
    short = {"trainer": {"max_steps": 1, "limit_val_batches": 0}}
    quick = merge(overlay(tmp_path / "runs", toy_data, start), callbacks(save_every=1, count=1), short)
    command = ["fit", "--config", GRPO, "--config", str(written(tmp_path / "own.yaml", quick))]
    with one_thread():
        assert main(command) == 0
    (run,) = (tmp_path / "runs").glob("**/version_0")
    before = contents(run)
    assert yaml.safe_load(before["config.yaml"])["model"]["init_args"]["checkpoint"] == str(start)

    other = save_start(tmp_path / "other", seed=1)
    refused = {
        "model.init_args.checkpoint": (str(other), "other weights than those that the resumed run started from"),
        "data.init_args.seed": ("7", "seed"),
        "data.init_args.batch_size": ("16", "batch_size"),
    }
    for setting, (value, says) in refused.items():
        message = complaint(capsys, *command, "--ckpt_path", "last", f"--{setting}", value)
        assert says in message
        assert contents(run) == before, setting
        if value == str(other):
            assert str(other) in message
            assert str(start) in message
            assert len(message) < 700

    with one_thread():
        assert main([*command, "--ckpt_path", "last", "--trainer.max_steps", "2"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2


# Gradients that are not finite --------------------------------------------------------------------------------------


class Broken(PolicyGradient):
    """Its KL has an infinite weight, as once could be set: 0 at the reference, and NaN in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.kl = math.inf


def test_a_gradient_of_nan_ends_a_run_of_grpo_before_it_reaches_the_weights(start: Path, toy_data: Path) -> None:
    module = stage(start, objective=Broken(), gradient_norm=1.0)
    with pytest.raises(UserError, match=r"^step 1: the gradient's norm is nan, and no weight was changed; .* train/"):
        fit(module, data(toy_data))
    assert module.transformer is not None
    assert all(parameter.isfinite().all() for parameter in module.transformer.parameters())


class BrokenOnTheSecondRank(PolicyGradient):
    """The loss of the second group, which is another rank's where there are two, is NaN."""

    def loss(self, velocity: torch.Tensor, rollout: Rollout, point: Point, given: Given, settings: Rollouts) -> Loss:
        found = super().loss(velocity, rollout, point, given, settings)
        return found._replace(loss_B=found.loss_B * (math.nan if rollout.first >= GROUP else 1.0))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_gradient_of_nan_on_one_rank_ends_all_of_them_with_the_same_words(
    strategy: str, start: Path, toy_data: Path, tmp_path: Path
) -> None:
    model = {"objective": BrokenOnTheSecondRank(), "gradient_norm": 1.0}
    run = Run(str(tmp_path / "run"), str(toy_data), str(start), ranks=2, strategy=strategy, model=model)
    assert run.finish() == [2, 2], run.error()
    assert run.error().startswith("step 1: the gradient's norm is nan")
    assert run.error(0) == run.error(1)
    assert run.error().count("train/") == 2, "a condition of each rank"


def test_a_run_of_sft_that_diverges_stops_with_finite_weights_in_its_checkpoints(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {
        "trainer": {"max_steps": 4, "limit_val_batches": 0},
        "model": {"init_args": {"optimizer": {"init_args": {"lr": 1e30}}, "schedule": {"warmup_steps": 0}}},
    }
    run = Fit(tmp_path, merge(tiny_overlay(toy_data, tmp_path / "runs"), callbacks(save_every=1), changes))
    assert fit_here(run) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 2: the gradient's norm is " in last
    assert "its last batch holds train/" in last
    (saved,) = run.run.glob("checkpoints/step-*")
    weights = torch.load(saved / "state.ckpt", map_location="cpu", weights_only=True)["state_dict"].values()
    assert all(value.isfinite().all() for value in weights if value.is_floating_point())


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (PolicyGradient, {"kl": math.inf}, "objective: kl=inf: must be 0 or more and finite"),
        (PolicyGradient, {"clip": math.inf}, "objective: clip=inf: must be positive and finite"),
        (Contrast, {"beta": math.inf}, "contrast: beta=inf: must be positive and finite"),
        (Contrast, {"kl": math.inf}, "contrast: kl=inf: must be 0 or more and finite"),
        (Contrast, {"bound": math.inf}, "contrast: bound=inf: must be positive and finite"),
        (Lora, {"rank": 0}, "lora.rank=0: must be 1 or more"),
    ],
)
def test_numbers_that_are_not_finite_are_named_with_their_rule(make: Any, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_clip": math.inf}, "advantage_clip=inf: must be positive and finite"),
        ({"gradient_norm": math.inf}, "gradient_norm=inf: must be positive and finite"),
        ({"gradient_norm": math.nan}, "gradient_norm=nan: must be positive and finite"),
        (
            {"objective": PolicyGradient(step_weight="rectified"), "rollouts": Rollouts(kernel="cps", noise_level=0.5)},
            "step_weight='rectified': its formula .*'cps' is none; choose step_weight none, or kernel flow",
        ),
        ({"optimizer": functools.partial(torch.optim.AdamW, lr=math.inf)}, "optimizer.init_args.lr=inf: must be fin"),
    ],
)
def test_settings_of_grpo_that_cannot_work_are_refused(settings: dict[str, Any], message: str, start: Path) -> None:
    with pytest.raises(UserError, match=message):
        stage(start, **settings)


def test_the_rectified_weight_goes_with_the_kernels_of_its_formula(start: Path) -> None:
    for kernel in ("flow", "wan", "dance"):
        stage(start, objective=PolicyGradient(step_weight="rectified"), rollouts=rollouts(kernel=kernel))
    stage(start, objective=PolicyGradient(), rollouts=rollouts(kernel="cps", noise_level=0.5))


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        (SFT, ["--data.init_args.group_size", "4"], "group_size=4: SFT would train on every sample 4 times"),
        (DPO, ["--data.init_args.group_size", "4"], "group_size=4: DPO would train on every sample 4 times"),
        (GRPO, ["--data.init_args.group_size", "1"], "group_size=1: advantages are relative to a group of 2 or more"),
        (GRPO, ["--data.init_args.batch_size", "30"], "batch_size=30: must be a multiple of group_size=8"),
        (GRPO, ["--trainer.accumulate_grad_batches", "2"], "leave it out and set model.init_args.updates"),
        (GRPO, ["--trainer.gradient_clip_val", "1"], "leave it out and set model.init_args.gradient_norm"),
        (SFT, ["--model.init_args.optimizer.init_args.lr", "-1"], "model.init_args.optimizer: Invalid learning rate"),
        (
            GRPO,
            ["--model.init_args.optimizer.init_args.lr", ".nan"],
            "model.init_args.optimizer: Invalid learning rate",
        ),
        (SFT, ["--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"], "trainer.precision='16-mixed'"),
        (SFT, ["--trainer.accumulate_grad_batches", "0"], "batches=0: a step takes 1 pass or more; the nearest valid"),
        (DPO, ["--trainer.accumulate_grad_batches=-2"], "batches=-2: a step takes 1 pass or more; the nearest valid"),
        (SFT, ["--trainer.gradient_clip_algorithm", "value"], "trainer.gradient_clip_algorithm='value': only 'norm'"),
        (GRPO, ["--trainer.gradient_clip_algorithm", "value"], "trainer.gradient_clip_algorithm='value': only 'norm'"),
        (
            GRPO,
            ["--trainer.callbacks+", "{class_path: idc.callbacks.hacking.HackingMonitor, init_args: {window: 3}}"],
            "trainer.callbacks: HackingMonitor is there twice",
        ),
    ],
)
def test_settings_that_training_cannot_work_with_are_one_line_before_any_data_is_read(
    recipe: str, args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"trainer": {"accelerator": "cpu", "logger": {"init_args": {"save_dir": str(tmp_path / "runs")}}}}
    own = written(tmp_path / "own.yaml", nothing)
    assert message in complaint(capsys, "fit", "--config", recipe, "--config", str(own), *args)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", [None, 32, "32", "32-true", "bf16", "bf16-mixed"])
def test_precisions_that_stages_keep_pass_under_all_their_names(precision: Any) -> None:
    check_precision(precision)
    for other in (16, "16", "16-mixed", "16-true", "bf16-true", "64-true", 64):
        with pytest.raises(UserError, match="take '32-true' or 'bf16-mixed'"):
            check_precision(other)


def test_a_trainer_of_a_library_user_is_checked_too(toy_data: Path, start: Path) -> None:
    with pytest.raises(UserError, match="group_size=1: advantages"):
        fit(stage(start), data(toy_data, group_size=1))


# Held-out data ------------------------------------------------------------------------------------------------------


def test_held_out_samples_that_are_trained_on_are_told(toy_data: Path, recwarn: pytest.WarningsRecorder) -> None:
    apart = data(toy_data)
    apart.setup("fit")
    assert not [w for w in recwarn if "val_sources" in str(w.message)]
    same = VideoDataModule(apart.val_sources, [[5, 32, 32]], 4, val_sources=apart.val_sources)
    with pytest.warns(
        UserWarning, match="val_sources: 8 of 8 held-out samples are in sources too, byte for byte, such"
    ):
        same.setup("fit")


# Overlays over the wrong recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "file"),
    [
        (DPO, "recipes/rewards/lambda_0.25.yaml"),
        (DPO, "recipes/alignment/one_step.yaml"),
        (SFT, "recipes/rewards/no_quality.yaml"),
    ],
)
def test_overlays_of_alignment_and_rewards_lie_over_grpo_alone(
    recipe: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, "fit", "--config", recipe, "--config", file)
    folder = Path(file).parent
    assert f"--config {file}: files of {folder}/ lie over recipes/grpo.yaml and not over {recipe}; " in message
    assert f"write idc fit --config recipes/grpo.yaml --config {file}" in message


def test_no_second_mistake_is_suggested_in_place_of_the_first() -> None:
    tree = {
        "model": {
            "class_path": "idc.stages.dpo.DPO",
            "init_args": {"rollouts": {"window": "one"}, "rollouts_a_step": 96, "beta": 1.0},
        }
    }
    unknown = explain("Parser key \"model\":\n  Option 'rollouts' is not accepted", ["beta", "sft_weight"])
    message = finish(unknown, "fit", tree, ["model.init_args.beta", "model.init_args.sft_weight"])
    assert message.startswith("there is no setting 'model.init_args.rollouts'")
    assert "rollouts_a_step" not in message
    assert "rollouts.window" not in message

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _survival_worker import SAMPLES, Run, Stage, Stream, make_trainer, validation_batches
from lightning.pytorch import Callback, Trainer

from idc.callbacks import host_averages
from idc.callbacks.background import Background
from idc.callbacks.checkpoint import CheckpointError
from idc.callbacks.ema import EMA, attach, ema_state_dict, swapped
from idc.errors import UserError
from idc.models.manifest import STATE

BATCH = list(range(SAMPLES, SAMPLES + 4))


class Watch(Callback):
    """Keeps the weights after each optimiser step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: p.detach().double().clone() for name, p in pl_module.transformer.named_parameters()})


def fit(tmp_path: Path, **settings: Any) -> tuple[Trainer, Stage, EMA, Watch]:
    stage, watch = Stage(), Watch()
    settings = {"steps": 8, "ckpt_path": None, **settings}
    ckpt_path = settings.pop("ckpt_path")
    every, offload = settings.pop("every_n_steps", 1), settings.pop("offload", False)
    trainer = make_trainer(Run(str(tmp_path), "unused", **settings), [watch])
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), EMA())
    ema.every_n_steps, ema.offload = every, offload
    trainer.fit(stage, Stream(0, 1), validation_batches(0, 1), ckpt_path=ckpt_path)
    return trainer, stage, ema, watch


def saved(tmp_path: Path, step: int) -> str:
    return str(tmp_path / "checkpoints" / f"step-{step:08d}" / STATE)


def test_averages_follow_the_formula_and_frozen_weights_have_none(tmp_path: Path) -> None:
    _, stage, _, watch = fit(tmp_path)
    expected = dict(watch.weights[0])
    for step, weights in enumerate(watch.weights[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    found = ema_state_dict(stage, "transformer")
    assert found.keys() == stage.transformer.state_dict().keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-7)
    averaged = {name.replace("/", ".") for name, _ in stage.ema.named_buffers()}
    assert averaged == {name for name, p in stage.named_parameters() if p.requires_grad}
    assert any(not p.requires_grad for p in stage.parameters())


def test_updates_every_n_steps_keep_the_horizon(tmp_path: Path) -> None:
    _, stage, ema, watch = fit(tmp_path, every_n_steps=3)
    assert ema.updated_at == 6
    expected = watch.weights[0]["head.weight"]
    for step in (3, 6):
        decay = ((1 + step) / (10 + step)) ** 3
        expected = decay * expected + (1 - decay) * watch.weights[step]["head.weight"]
    found = ema_state_dict(stage, "transformer")["head.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_decay_warms_up_to_its_limit() -> None:
    ema = EMA(decay=0.999)
    decays = [ema.decay_at(step) for step in range(1, 20_000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.999


@pytest.mark.parametrize("dtype", ["32-true", "bf16-true"])
def test_swapped_computes_with_the_averages_and_gives_both_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    trainer, stage, ema, _ = fit(tmp_path, dtype=dtype)
    before = copy.deepcopy(stage.state_dict())
    assert all(value.dtype == torch.float32 for name, value in before.items() if name.startswith("ema."))
    exported = ema_state_dict(stage, "transformer")
    reference = copy.deepcopy(stage)
    reference.transformer.load_state_dict(exported)

    def work() -> None:
        with swapped(trainer):
            assert torch.equal(stage.loss(BATCH), reference.loss(BATCH))
            with ema.swapped():  # already: stays as it is
                assert torch.equal(stage.loss(BATCH), reference.loss(BATCH))
            assert torch.equal(stage.loss(BATCH), reference.loss(BATCH))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not torch.equal(stage.loss(BATCH), reference.loss(BATCH))
    after = stage.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_resumes_bit_for_bit(tmp_path: Path) -> None:
    _, whole, _, _ = fit(tmp_path / "whole", dtype="bf16-true")
    _, resumed, _, _ = fit(tmp_path / "resumed", dtype="bf16-true", ckpt_path=saved(tmp_path / "whole", 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_validation_from_a_checkpoint_runs_on_its_averages(tmp_path: Path) -> None:
    _, trained, _, _ = fit(tmp_path)
    stage = Stage()
    trainer = make_trainer(Run(str(tmp_path), "unused"), [])
    trainer.validate(stage, validation_batches(0, 1), ckpt_path=saved(tmp_path, 8), verbose=False)
    trained.transformer.load_state_dict(ema_state_dict(trained, "transformer"))
    expected = [float(trained.loss(batch)) for batch in validation_batches(0, 1)]
    assert stage.validation == expected


def test_turning_ema_on_or_off_at_a_resume(tmp_path: Path) -> None:
    _, plain, _, _ = fit(tmp_path / "plain", ema=False, steps=4)
    with pytest.warns(UserWarning, match="EMA starts from its weights"):
        _, stage, ema, watch = fit(tmp_path / "on", ckpt_path=saved(tmp_path / "plain", 4), steps=5)
    assert ema.updated_at == 5
    decay = (1 + 5) / (10 + 5)
    start, last = plain.transformer.state_dict()["head.weight"], watch.weights[-1]["head.weight"]
    expected = decay * start.double() + (1 - decay) * last
    torch.testing.assert_close(ema_state_dict(stage, "transformer")["head.weight"].double(), expected)
    trainer, stage, _, _ = fit(tmp_path / "off", ckpt_path=saved(tmp_path / "on", 5), ema=False, steps=6)
    assert trainer.global_step == 6
    assert not hasattr(stage, "ema")


def test_saving_while_swapped_is_refused(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step:
                trainer.checkpoint_callback.save(trainer)

    trainer = make_trainer(Run(str(tmp_path), "unused", steps=7), [Saver()])
    with pytest.raises(CheckpointError, match="averages stand in for the weights"):
        trainer.fit(Stage(), Stream(0, 1), validation_batches(0, 1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000004"]


def test_names_are_the_original_ones_under_torch_compile() -> None:
    stage = Stage()
    stage.transformer = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 2)))
    weights = attach(stage)
    assert [name for name, _ in weights.named_buffers()] == ["transformer/0/weight", "transformer/0/bias"]
    with torch.no_grad():
        for _, parameter, average in weights.pairs(stage):
            average.copy_(parameter + 1)
    exported = ema_state_dict(stage, "transformer")
    assert exported.keys() == {"0.weight", "0.bias"}
    original = dict(zip(("0.weight", "0.bias"), stage.transformer.parameters(), strict=True))
    assert all(torch.equal(exported[name], parameter + 1) for name, parameter in original.items())


def test_without_averages_swapped_and_export_leave_the_weights(tmp_path: Path) -> None:
    trainer, stage, _, _ = fit(tmp_path, ema=False, steps=2)
    before = stage.loss(BATCH)
    with swapped(trainer):
        assert torch.equal(stage.loss(BATCH), before)
    exported = ema_state_dict(stage, "transformer")
    assert all(torch.equal(exported[name], value) for name, value in stage.transformer.state_dict().items())


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}])
def test_wrong_arguments_are_user_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        EMA(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_follow_weights_that_change_in_place_and_a_new_training_lists_them_anew(dtype: torch.dtype) -> None:
    """The list of parameters is kept during a training: it must not go stale by anything that happens in one."""
    ema = EMA(decay=0.5)
    for _ in range(2):
        stage = Stage()
        stage.transformer = torch.nn.Linear(3, 2).to(dtype)
        ema.on_train_start(SimpleNamespace(global_step=0), stage)
        expected = {name: value.double() for name, value in stage.state_dict().items()}
        for step in (9, 10, 11):
            with torch.no_grad():
                for parameter in stage.transformer.parameters():
                    parameter.add_(torch.randn_like(parameter))
            if step == 10:  # a validation in between
                with ema.swapped():
                    pass
            ema.update(stage, step)
            weights = stage.transformer.state_dict()
            for name, value in weights.items():
                old = expected[f"transformer.{name}"]
                expected[f"transformer.{name}"] = 0.5 * old + 0.5 * value.double()
        for name, average in stage.ema.named_buffers():
            torch.testing.assert_close(average.double(), expected[name.replace("/", ".")], rtol=1e-6, atol=1e-6)
        ema.updated_at = 0
        ema.on_train_end(SimpleNamespace(), stage)


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_averages_in_host_memory_are_the_same_bit_for_bit(every_n_steps: int, tmp_path: Path) -> None:
    """Validation, checkpoints and a resume as well; a run may turn it on or off on its way."""
    settings: dict[str, Any] = {"every_n_steps": every_n_steps}
    _, plain, _, _ = fit(tmp_path / "plain", **settings)
    _, offloaded, ema, _ = fit(tmp_path / "host", offload=True, **settings)
    _, on, _, _ = fit(tmp_path / "on", offload=True, ckpt_path=saved(tmp_path / "plain", 4), **settings)
    _, off, _, _ = fit(tmp_path / "off", ckpt_path=saved(tmp_path / "host", 4), **settings)
    expected = plain.state_dict()
    assert ema.updated_at == 8 // every_n_steps * every_n_steps
    assert any(name.startswith("ema.") for name in expected)
    for stage in (offloaded, on, off):
        assert stage.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in stage.state_dict().items())
        assert stage.validation == plain.validation[-len(stage.validation) :]
    for step in (4, 8):
        states = [torch.load(saved(tmp_path / name, step), weights_only=True) for name in ("plain", "host")]
        assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())


class _Held(Background):
    """Work that ends when it is waited for, not before."""

    def __init__(self, name: str, work: Any) -> None:
        self.awaited = threading.Event()
        super().__init__(name, lambda: (self.awaited.wait(10), work()))

    def wait(self, timeout: float | None = None) -> bool:
        self.awaited.set()
        return super().wait(timeout)


@pytest.mark.parametrize("what", ["save", "swap", "load", "optimiser", "reference", "export", "next update"])
def test_whatever_reads_averages_or_changes_weights_waits_for_an_update(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_averages, "Background", _Held)
    ema, stage = EMA(decay=0.5, offload=True), Stage()
    stage.transformer = torch.nn.Linear(3, 2)
    trainer = SimpleNamespace(global_step=0, strategy=None)
    ema.setup(trainer, stage, "fit")
    ema.on_train_start(trainer, stage)
    old = copy.deepcopy(stage.state_dict())
    with torch.no_grad():
        stage.transformer.weight.add_(1.0)
    ema.update(stage, 100)
    stage.reference = object()
    running = stage.ema.host._running
    assert not running.awaited.is_set()  # training goes on

    def other() -> None:
        with ema.swapped():
            pass

    reads = {
        "save": stage.state_dict,
        "swap": other,
        "load": lambda: stage.load_state_dict(old),
        "optimiser": lambda: ema.on_before_optimizer_step(trainer, stage, None),
        "reference": lambda: ema.on_train_batch_start(trainer, stage, None, 0),
        "export": lambda: ema_state_dict(stage, "transformer"),
        "next update": lambda: ema.update(stage, 101),
    }
    reads[what]()
    assert running.awaited.is_set()
    assert running.done
    found = stage.state_dict()["ema.transformer/weight"]
    shift = {"load": 0.0, "next update": 0.75}.get(what, 0.5)
    torch.testing.assert_close(found, old["transformer.weight"] + shift)


def test_a_failed_update_in_host_memory_is_told() -> None:
    ema, stage = EMA(offload=True), Stage()
    stage.transformer = torch.nn.Linear(3, 2)
    ema.on_train_start(SimpleNamespace(global_step=0), stage)
    stage.ema.host.start([torch.zeros(2)], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="could not be updated"):
        ema.on_train_end(SimpleNamespace(), stage)

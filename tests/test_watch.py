"""What is watched beside the reward, and the alarm: measures in closed form, one alarm for one cause, resumed alike."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _grpo_worker import QUIET, data, runner, save_start, stage
from _rewards import Fixed
from _sft_worker import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from idc.callbacks.checkpoint import Checkpoint
from idc.callbacks.hacking import HackingMonitor, Trend
from idc.errors import UserError
from idc.flow.objectives import one_step_weight
from idc.flow.sde import noise_std, sample_sde, seeded_noise
from idc.metrics.base import Clip, Score
from idc.rewards.base import Reward, call
from idc.rewards.composite import Composite, PaperReward, Term
from idc.rewards.watch import Motion, Saturation, Sharpness
from idc.stages.rollouts import Rollout, Rollouts
from idc.stages.watched import diversity, sketch, step_signal, watch
from idc.types import Sample


def clip(frames: Any, fps: float = 16.0) -> Clip:
    return Clip("a", np.asarray(frames, np.uint8), fps=fps)


def fixed(name: str, value: float | str) -> Fixed:
    return Fixed({"*": value}, name)


def textured(frames: int, step: int) -> np.ndarray:
    """A smooth random picture that moves right by `step` pixels a frame, round about."""
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (96, 96, 3)).astype(np.float32)
    picture = cv2.GaussianBlur(np.tile(noise, (1, 3, 1)), (0, 0), 3)[:, 96:192]
    picture = (picture - picture.min()) / np.ptp(picture) * 255
    return np.stack([np.roll(picture, step * t, axis=1) for t in range(frames)]).astype(np.uint8)


# Measures -----------------------------------------------------------------------------------------------------------


def test_sharpness_is_the_variance_of_the_laplacian_in_closed_form() -> None:
    """A wave of amplitude a and frequency w along x has the Laplacian (2 cos w - 2) a cos(w x)."""
    x = np.arange(64)
    w = 2 * np.pi / 8
    wave = 0.5 + 0.4 * np.cos(w * x)
    frames = np.round(np.broadcast_to(wave[None, None, :, None], (2, 64, 64, 3)) * 255)
    inner = 0.4 * (2 * math.cos(w) - 2) * np.cos(w * x[1:-1])
    assert call(Sharpness(), clip(frames)).value == pytest.approx(inner.var(), rel=0.01)


def test_sharpness_agrees_with_opencv_and_falls_with_blur() -> None:
    import cv2

    frames = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 3)).astype(np.uint8)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64) / 255 for frame in frames]
    expected = np.mean([cv2.Laplacian(picture, cv2.CV_64F)[1:-1, 1:-1].var() for picture in grey])
    value = call(Sharpness(), clip(frames)).value
    assert value == pytest.approx(expected, rel=0.01)  # OpenCV's grey is rounded
    blurred = call(Sharpness(), clip([cv2.GaussianBlur(frame, (0, 0), 1) for frame in frames])).value
    assert blurred is not None
    assert value is not None
    assert blurred < 0.1 * value


def test_saturation_is_0_for_grey_and_1_for_pure_colours() -> None:
    for colour, expected in (((90, 90, 90), 0.0), ((255, 0, 128), 1.0), ((51, 0, 0), 0.2)):
        frames = np.broadcast_to(np.array(colour), (2, 4, 4, 3))
        assert call(Saturation(), clip(frames)).value == pytest.approx(expected)


def test_motion_is_in_widths_per_second_whatever_the_rate() -> None:
    """1 and 2 pixels a frame of 96 at 16 frames a second; twice the rate is twice the motion."""
    one, two = (call(Motion(), clip(textured(4, step))).value for step in (1, 2))
    assert one == pytest.approx(16 / 96, rel=0.15)
    assert two == pytest.approx(2 * 16 / 96, rel=0.15)
    assert call(Motion(), clip(textured(4, 1), fps=32.0)).value == pytest.approx(2 * one)
    assert call(Motion(), clip(textured(4, 0))).value == pytest.approx(0, abs=1e-3)


def test_what_cannot_be_measured_fails_with_a_reason() -> None:
    dot = clip(np.zeros((1, 2, 2, 3)))
    for reward in (Motion(), Sharpness()):
        found = call(reward, dot)
        assert found.value is None
        assert found.reason
    assert call(Saturation(), dot).value == 0.0


def test_watched_measures_stand_in_the_breakdown_and_change_no_reward() -> None:
    parts = [fixed("face", 0.2), fixed("subject", 0.4), fixed("aesthetics", 0.6), fixed("natural", 0.8)]
    plain = PaperReward(*parts)
    failing = fixed("lost", "cannot be told")
    watching = PaperReward(*parts, watched=[Saturation(), failing], extra=[Term(fixed("more", 1.0), 0.5)])
    assert watching.watched == ("saturation", "lost")
    found = watching.breakdown(clip(np.zeros((1, 4, 4, 3))))
    expected = plain.breakdown(clip(np.zeros((1, 4, 4, 3)))).total
    assert expected is not None
    assert found.total == pytest.approx(expected + 0.5)
    assert found.values["saturation"] == 0.0
    assert found.values["lost"] is None
    assert found.weights["saturation"] == 0.0
    assert PaperReward(*parts, fidelity=0.0, monitor=True).watched == ("face", "subject")
    with pytest.raises(UserError, match="face"):
        PaperReward(*parts, watched=[fixed("face", 0.0)])


# Diversity and the signal -------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_of_the_pairs_of_a_group() -> None:
    near, far = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    one, two = 5 / math.sqrt(2), (2 + 2 + 0) / 3 / math.sqrt(2)
    assert diversity([near, far]) == pytest.approx((one + two) / 2)
    assert diversity([torch.zeros(4, 7)]) == 0.0
    assert diversity([torch.ones(1, 7)]) == diversity([]) == 0.0
    normal = torch.randn(6, 50_000, generator=torch.Generator().manual_seed(0))
    assert diversity([normal]) == pytest.approx(math.sqrt(2), rel=0.01)


def test_a_sketch_keeps_distances_and_is_always_the_same() -> None:
    latents = torch.randn(3, 4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sketch(latents), latents.flatten(1))
    small = sketch(latents, most=400)
    assert small.shape == (3, 400)
    assert torch.equal(small, torch.cat([sketch(latent[None], most=400) for latent in latents]))
    assert diversity([small]) == pytest.approx(diversity([latents.flatten(1)]), rel=0.1)


def rollout(first: int, group: int, settings: Rollouts, window: list[int] | None = None) -> Rollout:
    start = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(first))
    chosen = list(settings.possible) if window is None else window
    latents, records = sample_sde(
        lambda x, t: 0.1 * x,
        start,
        settings.times,
        kernel=settings.kernel,
        noise_level=settings.noise_level,
        noise=seeded_noise([first, first + 1]),
        window=chosen,
    )
    sample = Sample(id="a", caption="", video_CTHW=None, subjects=(), fps=8.0)
    return Rollout(sample, {}, first, group, torch.tensor([0, 1]), 5, latents, tuple(records))


@pytest.mark.parametrize("kernel", ["flow", "wan", "dance"])
def test_the_signal_is_the_bracket_of_the_one_step_weight(kernel: str) -> None:
    """Up to the batch's mean, by which the weight is divided."""
    chosen = Rollouts(steps=8, kernel=kernel, noise_level=0.7)
    records = rollout(0, 0, chosen).records
    t, t_next = (torch.stack([getattr(r, name) for r in records]).double() for name in ("t", "t_next"))
    std = torch.stack([noise_std(a, b, kernel=kernel, noise_level=0.7) for a, b in zip(t, t_next, strict=True)])
    signals = torch.tensor([step_signal(record, chosen) for record in records], dtype=torch.float64)
    products = signals * one_step_weight(t, t_next, std / (t - t_next).sqrt())
    assert torch.allclose(products, products.mean().expand_as(products), rtol=1e-5)
    h, s = t - t_next, std / (t - t_next).sqrt()
    assert torch.allclose(signals, h.sqrt() / s + s * h.sqrt() * (1 - t) / (2 * t), rtol=1e-5)


def test_the_signal_of_cps_is_the_mean_s_derivative() -> None:
    chosen = Rollouts(steps=6, kernel="cps", noise_level=0.5)
    for record in rollout(0, 0, chosen).records:
        t, t_next, std = float(record.t), float(record.t_next), float(record.std)
        slope = -(1 - t_next) * t + math.sqrt(t_next**2 - std**2) * (1 - t)
        assert step_signal(record, chosen) == pytest.approx(abs(slope) / std, rel=1e-4)


def test_an_iteration_is_watched_by_group_and_step() -> None:
    chosen = Rollouts(steps=6)
    one, two, three = rollout(0, 0, chosen, [1]), rollout(2, 0, chosen, [1]), rollout(4, 1, chosen, [2])
    advantages_B = torch.tensor([1.0, -1.0, 3.0, -1.0, 0.0, 0.5])
    found = watch([one, two, three], advantages_B, chosen)
    groups = [torch.cat([one.latents, two.latents]).flatten(1), three.latents.flatten(1)]
    assert found.pop("watch/diversity") == pytest.approx(diversity(groups))
    assert found == pytest.approx(
        {
            "signal/step_1": 1.5 * step_signal(one.records[0], chosen),
            "signal/step_2": 0.25 * step_signal(three.records[0], chosen),
        }
    )
    assert watch([], advantages_B, chosen) == {"watch/diversity": 0.0}


# The alarm ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), max_size=12), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_a_trend_compares_its_first_window_with_its_last(values: list[float], window: int) -> None:
    trend = Trend(window)
    for value in [*values, math.nan, math.inf]:
        trend.add(value)
    assert trend.first == values[:window]
    assert trend.last == values[-window:]
    if len(values) < window:
        assert trend.change == 0.0
    elif window == 1:
        assert trend.change == values[-1] - values[0]


def test_noise_without_a_trend_is_no_change_and_a_step_is_one() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 20))
    changes = []
    for row in noise:
        trend = Trend(10)
        for value in row:
            trend.add(float(value))
        changes.append(trend.change)
    assert np.mean(np.array(changes) != 0) < 0.12  # 5% but for the deviation's own error
    trend = Trend(10)
    for value in [*noise[0][:10], *(noise[0][10:] - 5)]:
        trend.add(float(value))
    assert trend.change == pytest.approx(-5, abs=1.5)


class Curves:
    """A trainer and a stage whose logged values are given, iteration by iteration."""

    def __init__(self, monitor: HackingMonitor, watched: tuple[str, ...] = ("motion", "saturation")) -> None:
        terms = [Term(fixed("face", 0.0)), *(Term(fixed(name, 0.0), 0, monitor=True) for name in watched)]
        self.module: Any = SimpleNamespace(runner=SimpleNamespace(composite=Composite(terms)), log=self.log)
        self.trainer: Any = SimpleNamespace(callback_metrics={}, loggers=[], global_step=0, should_stop=False)
        self.monitor, self.alarms = monitor, []
        monitor.setup(self.trainer, self.module, "fit")

    def log(self, name: str, value: float) -> None:
        assert name == "watch/alarm"
        self.alarms.append(value)

    def train(self, **values: float) -> None:
        self.trainer.global_step += 1
        tags = {"reward": "train/reward", "diversity": "watch/diversity", "kl": "policy/kl"}
        tags |= {"ratio": "policy/first_ratio_error", "flat": "train/zero_variance_groups"}
        for name, value in values.items():
            self.trainer.callback_metrics[tags.get(name, f"train/reward/{name}")] = torch.tensor(value)
        self.monitor.on_train_batch_end(self.trainer, self.module, None, None, 0)

    def validate(self, **values: float) -> None:
        self.monitor.on_validation_start(self.trainer, self.module)
        for name, value in values.items():
            self.trainer.callback_metrics["val/reward" if name == "reward" else f"val/reward/{name}"] = value
        self.monitor.on_validation_end(self.trainer, self.module)


def monitor(**arguments: Any) -> HackingMonitor:
    return HackingMonitor(**{"rise": 0.1, "fall": 0.3, "window": 2, **arguments})


def run_curves(curves: Curves, steps: range, motion: float = -0.06, reward: float = 0.05) -> None:
    for i in steps:
        values = {"motion": 1.0 + motion * i, "saturation": 0.5, "diversity": 1.0}
        curves.train(reward=0.2 + reward * i, kl=0.0, ratio=0.0, flat=0.0, **values)


def test_an_alarm_when_the_reward_rises_and_a_measure_falls_and_only_then() -> None:
    curves = Curves(monitor())
    with pytest.warns(UserWarning, match=r"train/reward/motion.*fallen") as caught:
        run_curves(curves, range(10))
    assert len(caught) == 1  # once, though the cause stays
    assert curves.alarms == [0.0] * 6 + [1.0] * 4
    for change in ({"motion": 0.0}, {"reward": 0.0}, {"reward": -0.05}, {"motion": 0.06}):
        curves = Curves(monitor())
        run_curves(curves, range(10), **change)
        assert curves.alarms == [0.0] * 10, change


def test_saturation_alarms_both_ways_and_measures_have_shares_of_their_own() -> None:
    for value, count in ((0.9, 1.0), (0.1, 1.0), (0.55, 0.0)):
        curves = Curves(monitor())
        for i in range(4):
            curves.train(reward=float(i), saturation=0.5 if i < 2 else value, motion=1.0)
        assert curves.alarms[-1] == count
    curves = Curves(monitor(falls={"diversity": 0.05}))
    for i in range(4):
        curves.train(reward=float(i), diversity=1.0 if i < 2 else 0.9, motion=1.0 if i < 2 else 0.9)
    assert curves.alarms[-1] == 1.0
    assert curves.monitor.reported == ["train/diversity"]


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"ratio": 1e-7}, "policy/first_ratio_error"),
        ({"ratio": math.nan}, "policy/first_ratio_error"),
        ({"kl": 0.2}, "policy/kl"),
        ({"kl": math.inf}, "policy/kl"),
        ({"flat": 0.75}, "train/zero_variance_groups"),
    ],
)
def test_training_that_is_unsound_alarms_and_can_stop(values: dict[str, float], cause: str) -> None:
    curves = Curves(monitor(on_alarm="stop"))
    sound = {"reward": 0.5, "motion": 1.0, "kl": 0.0, "ratio": 0.0, "flat": 0.0}
    for _ in range(3):
        curves.train(**sound)
    assert curves.monitor.reported == []
    assert not curves.trainer.should_stop
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            curves.train(**{**sound, **values})
    (warning,) = caught
    assert re.search(f"ALARM.*{cause}.*stops here", str(warning.message))
    assert curves.monitor.reported == [cause]
    assert curves.trainer.should_stop
    curves = Curves(monitor(max_kl=None, max_ratio_error=None, max_zero_variance=None))
    for _ in range(4):
        curves.train(**{**sound, **values})
    assert curves.monitor.reported == []


def test_held_out_rewards_are_judged_against_their_first_validation() -> None:
    curves = Curves(monitor())
    curves.validate(reward=0.2, motion=1.0)
    curves.validate(reward=0.5, motion=0.9)
    assert curves.monitor.reported == []
    curves.validate()  # cut short by a signal: what the last one logged is not taken again
    assert len(curves.monitor.trends["val/reward"].last) == 1
    assert "val/reward" not in curves.trainer.callback_metrics
    with pytest.warns(UserWarning, match="val/reward/motion"):
        curves.validate(reward=0.5, motion=0.5)
    assert curves.monitor.reported == ["val/motion"]
    curves.train()  # of DPO, whose iterations have no reward of their own
    assert curves.alarms == [1.0]


def test_a_resumed_monitor_alarms_as_the_undisturbed_one() -> None:
    whole = Curves(monitor())
    with pytest.warns(UserWarning, match="ALARM"):
        run_curves(whole, range(12))
    for cut in range(1, 11):
        before, after = Curves(monitor()), Curves(monitor())
        run_curves(before, range(cut))
        state = json.loads(json.dumps(before.monitor.state_dict()))  # plain values
        after.monitor.load_state_dict(state)
        run_curves(after, range(cut, 12))
        assert before.alarms + after.alarms == whole.alarms
        assert after.monitor.state_dict() == whole.monitor.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fall": 1.5}, "fall=1.5"),
        ({"falls": {"motion": 0.0}}, "falls.motion=0.0"),
        ({"rise": -0.1}, "rise=-0.1"),
        ({"rise": math.nan}, "rise=nan"),
        ({"window": 0}, "window=0"),
        ({"max_kl": -1.0}, "policy/kl is -1.0"),
        ({"on_alarm": "stpo"}, "stop"),
        ({"falls": {"motoin": 0.2}}, "falls.motoin: the run does not watch it; .*did you mean 'motion'"),
        ({"both_ways": ["saturatoin"]}, "both_ways: saturatoin: the run does not watch it; .*'saturation'"),
        ({"both_ways": ["saturation", "sharpness"]}, "both_ways: sharpness: the run does not watch it"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Curves(monitor(**arguments))


def test_a_stage_without_rewards_is_refused() -> None:
    with pytest.raises(UserError, match="no rewards to watch"):
        monitor().setup(SimpleNamespace(), SimpleNamespace(), "fit")  # type: ignore[arg-type]


class Fading(Reward):
    """Falls with every clip that it sees."""

    name = "fading"

    def __init__(self) -> None:
        self.seen = 0

    def score(self, clip: Clip) -> Score:
        self.seen += 1
        return Score(1 / (1 + self.seen))


class Rising(Fading):
    name = "rising"

    def score(self, clip: Clip) -> Score:
        self.seen += 1
        return Score(1 - 1 / (1 + self.seen))


def test_a_run_stops_at_the_alarm_with_a_checkpoint_and_a_text(toy_data: Path, tmp_path: Path) -> None:
    module = stage(save_start(tmp_path / "start"), reward=runner())
    module.runner.composite = Composite([Term(Rising()), Term(Fading(), 0, monitor=True)])
    guard = HackingMonitor(window=1, on_alarm="stop")
    logger = TensorBoardLogger(str(tmp_path), name="run", version=0)
    callbacks = [guard, Checkpoint(dirpath=str(tmp_path / "checkpoints"), every_n_steps=100)]
    quiet = {**QUIET, "logger": logger, "enable_checkpointing": True, "max_steps": 9, "devices": 1}
    trainer, module_data = Trainer(**quiet, callbacks=callbacks), data(toy_data)
    with one_thread(), pytest.warns(UserWarning, match=r"ALARM at step 2: reward hacking\? train/reward has risen"):
        trainer.fit(module, datamodule=module_data)
    assert trainer.global_step == 2
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
    state = torch.load(tmp_path / "checkpoints/step-00000002/state.ckpt", weights_only=True)
    assert state["callbacks"]["HackingMonitor"] == guard.state_dict()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert [event.value for event in events.Scalars("watch/alarm")] == [0.0, 1.0]
    (text,) = events.Tensors("watch/alarm/text_summary")
    assert b"fading" in text.tensor_proto.string_val[0]
    assert all(event.value >= 0 for event in events.Scalars("watch/diversity"))

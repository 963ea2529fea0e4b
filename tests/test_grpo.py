"""GRPO through its stage: ratios, gradients, failing rewards, the reference, windows, settings, and what it learns."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from _grpo_worker import (
    BATCH,
    GROUP,
    QUIET,
    ByPlace,
    Contrasty,
    KeepingContrast,
    KeepingPolicy,
    Kept,
    Pass,
    data,
    fit,
    gathered,
    rollouts,
    runner,
    save_start,
    stage,
)
from _sft_worker import one_thread
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributions import Normal

from idc.callbacks.checkpoint import Checkpoint
from idc.callbacks.ema import EMA
from idc.errors import StoppedError, UserError
from idc.metrics.base import Clip
from idc.models.sampling import to_uint8
from idc.models.spec import Lora
from idc.models.speed import Speed
from idc.models.system import open_system
from idc.models.weight_copy import WeightCopy
from idc.rewards.composite import Composite, Term
from idc.rewards.measures import Brightness
from idc.rewards.runner import RewardRunner
from idc.stages import aligned
from idc.stages.grpo import GRPO
from idc.stages.rollouts import Rollouts, portions
from idc.stages.updates import Contrast, PolicyGradient

SLOW = functools.partial(torch.optim.SGD, lr=0.0)
ADAM = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "model")


def passes(module: GRPO) -> list[Pass]:
    return module.objective.passes  # type: ignore[attr-defined]


# The ratio of a policy to itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": "sliding", "window_size": 2, "scale": 2.5},
        {"window": "one", "scale": 2.5, "image_scale": 1.5},
        {"cache": False, "scale": 2.5},
        {"batch": 2, "kernel": "dance", "noise_level": 0.3},
        {"bfloat16": True, "scale": 2.5, "checkpointing": True},
        {"bfloat16": True, "cache": False, "batch": 1, "window": "one"},
        {"lora": True, "scale": 2.5, "kernel": "wan"},
        {"checkpointing": True, "cache": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_before_an_update_the_ratio_is_one_to_the_bit(settings: dict[str, Any], start: Path, toy_data: Path) -> None:
    """In the second iteration, too, when the policy is the reference no longer."""
    settings = dict(settings)
    checkpointing = settings.pop("checkpointing", False)
    model: dict[str, Any] = {"compute_dtype": "bfloat16" if settings.pop("bfloat16", False) else "float32"}
    if settings.pop("lora", False):
        model |= {"trainable": "lora", "lora": Lora(rank=2, alpha=4)}
    if checkpointing:
        model["speed"] = Speed(checkpointing="attention")
    module = stage(start, rollouts=rollouts(**settings), **model, optimizer=ADAM)
    kept = fit(module, data(toy_data), 2)
    assert module.transformer.gradient_checkpointing == checkpointing
    steps = len(module.rollouts.chosen(0, ""))
    assert len(passes(module)) == 2 * steps * BATCH // module.rollouts.batch
    for each in passes(module):
        assert each.logged["policy/ratio_error"].tolist() == [0.0] * module.rollouts.batch
    for metrics in kept.metrics:
        assert metrics["policy/first_ratio_error"] == metrics["policy/clip_fraction"] == 0
    assert kept.metrics[0]["policy/kl"] == 0 < kept.metrics[1]["policy/kl"]
    assert kept.modes == [True, True], "every module trains from the first batch on"


def test_a_compiled_policy_is_refused_where_its_ratio_counts(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graphs with and without gradients round differently. What the start was trained with is no wish."""
    with pytest.raises(UserError, match=r"speed.compile=true.*ratio.*model.init_args.speed.compile=false"):
        stage(start, speed=Speed(compile=True))
    assert stage(start, speed=Speed(compile=True), objective=Contrast()).speed.compile
    with pytest.raises(UserError, match=r"speed\.compile=true"):
        stage(start, speed=Speed(compile=True), contrast=Contrast())
    trained = Speed(checkpointing="full", compile=True)
    monkeypatch.setattr(aligned, "open_system", lambda *given: replace(open_system(*given), speed=trained))
    assert stage(start).speed == Speed(checkpointing="full")


def test_with_joint_references_there_is_no_cache_and_the_ratio_is_one(tmp_path: Path, toy_data: Path) -> None:
    module = stage(save_start(tmp_path / "joint", joint=True), rollouts=rollouts(scale=2.5))
    kept = fit(module, data(toy_data))
    assert kept.metrics[0]["policy/first_ratio_error"] == 0


def test_cached_and_uncached_rollouts_are_the_same(start: Path, toy_data: Path) -> None:
    found = []
    for cache in (True, False):
        module = stage(start, rollouts=rollouts(scale=2.5, cache=cache))
        kept = fit(module, data(toy_data))
        found.append((passes(module), kept))
    (cached, kept), (plain, again) = found
    for one, other in zip(cached, plain, strict=True):
        assert torch.allclose(one.rollout.latents, other.rollout.latents, atol=2e-5, rtol=0)
        assert torch.allclose(one.given.advantages_B, other.given.advantages_B, atol=1e-3)
    close(kept.gradients[0], again.gradients[0], 1e-3)


# The first update ---------------------------------------------------------------------------------------------------


def close(some: dict[str, Tensor], others: dict[str, Tensor], tolerance: float) -> None:
    """Equal within a share of the largest value of each, and of rounding where one is next to nothing: subjects of a
    single token attend to themselves alone, so that their queries have no gradient."""
    assert some.keys() == others.keys()
    floor = 1e-3 * max(value.abs().max().item() for value in some.values())
    for name, value in some.items():
        scale = max(value.abs().max().item(), floor)
        assert (value - others[name]).abs().max().item() <= tolerance * scale, name


def by_hand(module: GRPO, rewards: dict[int, float]) -> dict[str, Tensor]:
    """-mean A grad log p over samples and steps, from the records' states alone: no cache, no clip, no ratio. A is 0
    for a place that has no reward.

    The mean of Eq. 4 in its second form (at a = 1): mu = x (1 - h / (2 (1 - t))) - 3/2 h v.
    """
    advantages = dict.fromkeys(range(BATCH), 0.0)
    for group in range(BATCH // GROUP):
        own = {key: reward for key, reward in rewards.items() if key // GROUP == group}
        advantages |= {key: (own[key] - fmean(own.values())) / pstdev(own.values()) for key in own}
    module.transformer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for each in passes(module):
        rollout, record = each.rollout, each.rollout.records[each.point.number]
        condition = module.encoders.condition([rollout.features] * len(rollout)).to(module.device, torch.float32)
        t, h = record.t.item(), (record.t - record.t_next).item()
        v = module.predict_velocity(record.x, record.t.expand(len(rollout)), condition).double()
        mu = record.x.double() * (1 - h / (2 * (1 - t))) - 1.5 * h * v
        log_p = Normal(mu, math.sqrt(t / (1 - t) * h)).log_prob(record.x_next.double()).flatten(1).mean(1)
        A_B = torch.tensor([advantages[key] for key in rollout.keys], dtype=torch.float64)
        total = total - (A_B * log_p).mean() / len(passes(module))
    total.backward()
    return gathered(module.transformer, gradients=True)


def judged(module: GRPO) -> dict[int, float]:
    """Rewards of the rollouts by place, from their latents."""
    found = {}
    for rollout in {id(each.rollout): each.rollout for each in passes(module)}.values():
        for key, video in zip(rollout.keys, module.encoders.codec.decode(rollout.latents), strict=True):
            found[key] = Contrasty().score(Clip("", to_uint8(video))).value
    return found


@pytest.mark.parametrize("batch", [4, 2])
def test_the_first_gradient_is_minus_the_mean_of_advantage_times_score(batch: int, start: Path, toy_data: Path) -> None:
    module = stage(start, rollouts=rollouts(batch=batch), optimizer=SLOW)
    kept = fit(module, data(toy_data))
    with one_thread():
        expected = by_hand(module, judged(module))
    assert all(value.abs().max() > 0 for name, value in expected.items() if "to_q.weight" in name)
    close(kept.gradients[0], {name: expected[name] for name in kept.gradients[0]}, 1e-4)


def test_the_distance_to_the_reference_has_no_gradient_at_the_reference(start: Path, toy_data: Path) -> None:
    gradients = []
    for kl in (0.0, 100.0):
        module = stage(start, objective=KeepingPolicy(kl=kl))
        kept = fit(module, data(toy_data), 2)
        assert (module.reference is None) == (kl == 0)
        gradients.append(kept.gradients)
    close(gradients[0][0], gradients[1][0], 1e-6)
    away = [kept[1]["proj_out.weight"] for kept in gradients]
    assert (away[0] - away[1]).norm() > 0.1 * away[0].norm(), "after an update it has one"


def test_the_gradient_is_clipped_to_the_norm_and_logged_before(start: Path, toy_data: Path) -> None:
    kept = fit(stage(start, gradient_norm=1e-3), data(toy_data))
    norm = math.sqrt(sum(value.square().sum().item() for value in kept.gradients[0].values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert kept.metrics[0]["train/grad_norm"] > 1e-2


def test_two_updates_an_iteration_train_on_their_own_parts_and_the_second_is_off_policy(
    start: Path, toy_data: Path
) -> None:
    module = stage(start, updates=2)
    kept = fit(module, data(toy_data), 4)
    assert len(kept.gradients) == 4
    assert len(kept.metrics) == 2
    once = stage(start)
    fit(once, data(toy_data), 1)
    steps = len(module.rollouts.possible)
    first, second = passes(module)[:steps], passes(module)[steps : 2 * steps]
    assert {each.rollout.first for each in first} == {0}
    assert {each.rollout.first for each in second} == {GROUP}
    for each, other in zip([*first, *second], passes(once), strict=True):
        assert torch.equal(each.rollout.latents, other.rollout.latents), "both updates have the old policy's rollouts"
        assert torch.equal(each.given.advantages_B, other.given.advantages_B)
    assert all(each.logged["policy/ratio_error"].max() == 0 for each in first)
    assert all(each.logged["policy/ratio_error"].min() > 0 for each in second)
    for metrics in kept.metrics:
        assert metrics["policy/first_ratio_error"] == 0 < metrics["policy/ratio_error"]


@pytest.mark.parametrize("objective", [{"ratio": "guard"}, {"step_weight": "rectified"}])
def test_variants_of_the_objective_weigh_steps_as_they_say(
    objective: dict[str, Any], start: Path, toy_data: Path
) -> None:
    """At the rollouts' policy their gradients by the velocity are the plain one's times a number a step: the step's
    std for GRPO-Guard, and for the rectified weight one that gives all steps the same |d mu / d v| / std."""
    plain = stage(start, objective=KeepingPolicy(kl=0.0))
    other = stage(start, objective=KeepingPolicy(kl=0.0, **objective))
    for module in (plain, other):
        fit(module, data(toy_data))
    pushes = []
    for one, two in zip(passes(plain), passes(other), strict=True):
        record = one.rollout.records[one.point.number]
        factor = record.std.item() if "ratio" in objective else two.given.weight
        assert torch.allclose(two.gradient, factor * one.gradient, rtol=1e-3, atol=1e-10)
        h = (record.t - record.t_next).item()
        pushes.append(two.given.weight * 1.5 * h / record.std.item())
    if "ratio" not in objective:
        assert pushes == pytest.approx([pushes[0]] * len(pushes), rel=1e-5)
        assert sum(two.given.weight for two in passes(other)) / len(pushes) == pytest.approx(1, rel=1e-5)


# Failing rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "lost"),
    [
        ({"failing": (1,)}, {1}),
        ({"nan": (6,), "raising": (0,)}, {0, 6}),
        ({"failing": tuple(range(GROUP))}, set(range(GROUP))),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_sample_without_a_reward_leaves_its_group(
    reward: dict[str, Any], lost: set[int], start: Path, toy_data: Path
) -> None:
    """The update is that of the other members alone, with their own mean and deviation, and KL weighs nothing on it."""
    module = stage(start, reward=runner(ByPlace(**reward)), optimizer=SLOW)
    kept = fit(module, data(toy_data))
    rewards = {key: value for key, value in judged(module).items() if key not in lost}
    with one_thread():
        expected = by_hand(module, rewards)
    close(kept.gradients[0], {name: expected[name] for name in kept.gradients[0]}, 1e-4)
    assert kept.metrics[0]["train/without_reward"] == len(lost) / BATCH
    assert kept.metrics[0]["train/reward"] == pytest.approx(fmean(rewards.values()))
    for each in passes(module):
        for place, A, valid, push in zip(
            each.rollout.keys, each.given.advantages_B, each.given.valid_B, each.gradient.flatten(1), strict=True
        ):
            assert (place in lost) == (not valid) == (A == 0) == (push.abs().max() == 0)


def test_without_any_reward_nothing_is_learned_and_nothing_breaks(start: Path, toy_data: Path) -> None:
    """Not even by the pull to the reference, since nothing is known of these samples."""
    reward = runner(ByPlace(nan=tuple(range(BATCH))), max_failure_rate=1.0)
    module = stage(start, reward=reward, objective=KeepingPolicy(kl=1.0))
    before = gathered(module.system.build_transformer("cpu").requires_grad_(True))
    kept = fit(module, data(toy_data))
    assert all(torch.equal(value, before[name]) for name, value in kept.weights[0].items())
    assert kept.metrics[0]["train/without_reward"] == 1
    assert "train/reward" not in kept.metrics[0]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"max_failure_rate": 0.1}, "2 of 8 samples have no reward, more than max_failure_rate=0.1 allows"),
        ({"on_failure": "stop"}, r"2 of 8 samples have no reward: by_place: .*on_failure='stop'"),
    ],
)
def test_a_run_ends_above_the_rate_of_failures(
    settings: dict[str, Any], rule: str, start: Path, toy_data: Path
) -> None:
    module = stage(start, reward=runner(ByPlace(failing=(0, 5)), **settings))
    with pytest.raises(UserError, match=rule):
        fit(module, data(toy_data))


def test_a_run_that_stops_in_validation_saves_its_weights_and_not_the_averages_that_stand_in_for_them(
    start: Path, toy_data: Path, tmp_path: Path
) -> None:
    module, kept = stage(start, reward=runner(ByPlace(dead_after=BATCH)), optimizer=ADAM), Kept()
    callbacks = [kept, EMA(decay=0.5), Checkpoint(dirpath=str(tmp_path), every_n_steps=None)]
    settings = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 1}
    with one_thread(), pytest.raises(StoppedError, match="the judge is gone"):
        Trainer(callbacks=callbacks, devices=1, max_steps=9, **settings).fit(module, datamodule=data(toy_data))
    saved = torch.load(tmp_path / "step-00000001" / "state.ckpt", weights_only=True)["state_dict"]
    averages = 0
    for name, value in kept.weights[0].items():
        assert torch.equal(saved[f"transformer.{name}"], value)
        averages += any(not torch.equal(other, value) for key, other in saved.items() if "ema" in key and name in key)
    assert averages  # they were others


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rollouts_that_overflow_end_the_run_before_they_reach_the_weights(start: Path, toy_data: Path) -> None:
    module = stage(start, rollouts=Rollouts(steps=5, noise_level=1e30, batch=2))
    with pytest.raises(UserError, match="hold NaN or infinity: the policy has diverged"):
        fit(module, data(toy_data))
    assert module.transformer is not None
    assert all(parameter.isfinite().all() for parameter in module.transformer.parameters())


# The reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "id_blocks", "lora"])
def test_with_the_copy_applied_the_model_is_the_start(trainable: Any, start: Path) -> None:
    """Bit for bit, twice, and after an exception; with adapters it is the model with its adapters off."""
    module = stage(start, trainable=trainable, lora=Lora(rank=2, alpha=4))
    module.configure_model()
    transformer = module.transformer
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=g), torch.randn(2, 5, 32, generator=g)

    @torch.no_grad()
    def output() -> Tensor:
        return transformer(x, torch.tensor([300.0, 900.0]), text, return_dict=False)[0]

    with one_thread():
        first = output()
        copy = WeightCopy(transformer)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
        present = output()
        if trainable != "id_blocks":  # which do nothing without references
            assert not torch.allclose(first, present)
        weights = gathered(transformer)
        for _ in range(2):
            with copy.applied():
                assert torch.equal(output(), first)
            assert torch.equal(output(), present)
        with pytest.raises(ZeroDivisionError), copy.applied():
            raise ZeroDivisionError
        assert all(torch.equal(value, weights[name]) for name, value in gathered(transformer).items())
        if trainable == "lora":
            transformer.disable_adapters()
            assert torch.equal(output(), first)


# Windows and settings -----------------------------------------------------------------------------------------------


def test_one_step_is_drawn_from_the_first_half_alike_for_a_group() -> None:
    settings = Rollouts(steps=10, window="one")
    found = Counter(settings.chosen(0, f"0/0/{group}")[0] for group in range(2000))
    assert sorted(found) == [1, 2, 3, 4]  # of the steps 1 to 8 that can be stochastic
    assert all(400 < count < 600 for count in found.values())
    assert all(settings.chosen(7, f"a{i}") == settings.chosen(0, f"a{i}") for i in range(50)), "the name has it all"
    assert Rollouts(steps=3, window="one").chosen(0, "") == [1]
    assert {s for i in range(99) for s in Rollouts(steps=4, window="one", kernel="wan").chosen(0, str(i))} == {0, 1}


def test_a_sliding_window_moves_over_all_steps_and_stays_within_them() -> None:
    settings = Rollouts(steps=10, window="sliding", window_size=3, window_stride=5)
    windows = [settings.chosen(iteration, "any") for iteration in range(60)]
    assert windows[:6] == [[1, 2, 3]] * 5 + [[2, 3, 4]]
    assert windows[29:31] == [[6, 7, 8], [1, 2, 3]], "after the end it starts again"
    assert {step for window in windows for step in window} == set(settings.possible) == set(range(1, 9))
    wide = Rollouts(steps=4, window="sliding", window_size=99)
    assert wide.chosen(10**6, "") == [1, 2]
    assert Rollouts(steps=4).chosen(3, "") == [1, 2]
    for window in ("all", "sliding", "one"):
        assert Rollouts(steps=4, kernel="ode", window=window).chosen(0, "") == []
        assert Rollouts(steps=4, noise_level=0.0, window=window).chosen(0, "") == []


def test_members_of_a_group_share_step_and_condition_and_differ_in_noise(start: Path, toy_data: Path) -> None:
    module = stage(start, rollouts=rollouts(window="one", batch=2, shared_noise=True))
    fit(module, data(toy_data), 3)
    by_group: dict[tuple[int, int], list[Any]] = {}
    for i, each in enumerate(passes(module)):
        by_group.setdefault((i // (BATCH // 2), each.rollout.group), []).append(each.rollout)
    assert len(by_group) == 6
    for chunks in by_group.values():
        assert len(chunks) == 2
        assert len({(chunk.sample.id, *(record.step for record in chunk.records)) for chunk in chunks}) == 1
        states = torch.cat([chunk.records[0].x for chunk in chunks])
        assert torch.equal(states, states[:1].expand_as(states)), "one noise for the group, and Euler's steps so far"
        ends = torch.cat([chunk.latents for chunk in chunks]).flatten(1)
        assert torch.pdist(ends).min() > 0.1, "the stochastic step tells them apart"


def test_rollouts_are_sampled_in_equal_parts_of_a_group() -> None:
    assert [portions(16, 8, 8), portions(16, 8, 5), portions(16, 8, 1), portions(16, 8, 99)] == [8, 4, 1, 8]
    assert [portions(4, 8, 8), portions(4, 8, 3), portions(1, 8, 8), portions(6, 6, 4)] == [4, 2, 1, 3]
    with pytest.raises(UserError, match=r"12 rollouts a rank in groups of 8: .* 16 a rank is the nearest"):
        portions(12, 8, 8)
    with pytest.raises(UserError, match=r"3 rollouts a rank in groups of 8: .* 8 a rank is the nearest"):
        portions(3, 8, 8)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Rollouts, {"window": "slidin"}, r"rollouts: window='slidin'.*sliding"),
        (Rollouts, {"kernel": "flwo"}, r"rollouts: kernel='flwo'.*flow"),
        (Rollouts, {"noise_level": -1.0}, r"noise_level=-1.0: must be 0 \(ODE\) or more; the paper's is 1.0"),
        (Rollouts, {"noise_level": math.nan}, "noise_level=nan"),
        (Rollouts, {"kernel": "cps", "noise_level": 1.5}, "noise_level=1.5: kernel 'cps' takes 0"),
        (Rollouts, {"batch": 0}, "rollouts: batch=0: must be 1 or more"),
        (Rollouts, {"window_size": 0}, "rollouts: window_size=0: must be 1 or more"),
        (Rollouts, {"window_stride": -1}, "rollouts: window_stride=-1: must be 1 or more"),
        (Rollouts, {"steps": 2}, "rollouts: steps=2: kernel 'flow' has no stochastic step .* take 3 steps or more"),
        (Rollouts, {"steps": 0}, "steps=0: at least 1"),
        (Rollouts, {"shift": 0.0}, "shift=0.0: a number above 0"),
        (PolicyGradient, {"clip": 0.0}, "objective: clip=0.0: must be positive and finite; 1e-3 to 1e-5"),
        (PolicyGradient, {"clip": math.nan}, "clip=nan: must be positive and finite"),
        (PolicyGradient, {"kl": -0.1}, "objective: kl=-0.1: must be 0 or more and finite; 0.004"),
        (PolicyGradient, {"ratio": "gaurd"}, r"objective: ratio='gaurd'.*guard"),
        (PolicyGradient, {"step_weight": "rectify"}, r"objective: step_weight='rectify'.*rectified"),
        (PolicyGradient, {"ratio": "guard", "step_weight": "rectified"}, "both even out the steps; choose one"),
        (Contrast, {"beta": 0.0}, "contrast: beta=0.0: must be positive"),
        (Contrast, {"kl": -1.0}, "contrast: kl=-1.0: must be 0 or more"),
        (Contrast, {"bound": math.nan}, "contrast: bound=nan: must be positive"),
        (Contrast, {"draws": 0}, "contrast: draws=0: must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_named_with_their_rule(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates=0: must be 1 or more optimiser steps"),
        ({"gradient_norm": 0.0}, "gradient_norm=0.0: must be positive and finite; the paper's is 1"),
        ({"advantage_clip": -1.0}, "advantage_clip=-1.0: must be positive and finite, or null"),
        ({"contrast": Contrast(), "contrast_weight": -1.0}, "contrast_weight=-1.0: must be 0 or more"),
        ({"rollouts_a_step": 0}, "rollouts_a_step=0: must be 1 or more"),
        ({"rollouts": Rollouts(kernel="ode")}, "kernel='ode', noise_level=1.0: no step .* choose kernel flow"),
        ({"rollouts": Rollouts(noise_level=0.0)}, "kernel='flow', noise_level=0.0: no step .* choose kernel flow"),
        ({"checkpoint": None}, "checkpoint=null: give a run of idc fit"),
        ({"checkpoint": "toyy"}, "checkpoint='toyy': no such file or folder.*'toy'"),
    ],
)
def test_settings_of_the_stage_are_checked_before_anything_runs(
    settings: dict[str, Any], message: str, start: Path
) -> None:
    with pytest.raises(UserError, match=message):
        stage(settings.pop("checkpoint", start), **settings)


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({}, {"group_size": 1}, "group_size=1: advantages are relative to a group of 2 or more"),
        ({"updates": 5}, {}, "updates=5: a rank samples 4 times 2 rollouts, which cannot be split so; 4 is possible"),
        ({"updates": 3}, {}, "updates=3: a rank samples 4 times 2 rollouts, which cannot be split so; 2 is possible"),
    ],
)
def test_what_does_not_divide_is_named_before_training(
    settings: dict[str, Any], batches: dict[str, Any], message: str, start: Path, toy_data: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(stage(start, rollouts=rollouts(batch=2), **settings), data(toy_data, **batches))


def test_a_batch_that_the_recipe_was_not_tuned_for_is_named(start: Path, toy_data: Path) -> None:
    with pytest.warns(UserWarning, match="4 rollouts an optimiser step, and the recipe was tuned for 32: keep"):
        fit(stage(start, rollouts_a_step=32, updates=2), data(toy_data), 0)


def test_the_networks_of_the_reward_are_named(start: Path) -> None:
    assert stage(start, reward=runner(ByPlace())).rewards_used == ["a network"]


# The contrast -------------------------------------------------------------------------------------------------------


def test_the_contrast_pushes_towards_good_samples_and_away_from_bad_ones(start: Path, toy_data: Path) -> None:
    """By the velocity its gradient is 2 beta (2 r - 1) (v_old - u) / D, with r = 1/2 + A / 10 and u = eps - z_0."""
    objective = KeepingContrast(beta=0.5, kl=0.0, draws=2)
    reward = runner(ByPlace(failing=(2,)))
    module = stage(start, objective=objective, reward=reward, rollouts=rollouts(kernel="ode"), optimizer=SLOW)
    kept = fit(module, data(toy_data))
    assert len(objective.passes) == 2 * BATCH // GROUP
    assert len({each.point.t for each in objective.passes}) == len(objective.passes)
    for each in objective.passes:
        assert torch.equal(each.velocity, each.given.old)
        latents, t = each.rollout.latents, each.point.t.view(-1, 1, 1, 1, 1)
        eps = (each.point.x - (1 - t) * latents) / t
        A, valid = (x.view(-1, 1, 1, 1, 1) for x in (each.given.advantages_B, each.given.valid_B))
        expected = 2 * 0.5 * (A / 5) * (each.given.old - (eps - latents)) / latents[0].numel() * valid
        assert torch.allclose(each.gradient, expected / GROUP / len(objective.passes), rtol=1e-3, atol=1e-8)
    assert "policy/ratio_error" not in kept.metrics[0]
    assert kept.metrics[0]["contrast/old_distance"] == 0


def test_a_contrast_beside_the_policy_gradient_moves_the_hierarchy_alone(start: Path, toy_data: Path) -> None:
    """All else has the policy gradient's own gradients to the bit, and the hierarchy the sum of both."""
    beside = Contrast(kl=0.0, draws=1)
    settings: list[dict[str, Any]] = [{}, {"contrast": beside, "contrast_weight": 3.0}, {"objective": beside}]
    plain, both, alone = (fit(stage(start, **more), data(toy_data)).gradients[0] for more in settings)
    for name, value in both.items():
        if not name.startswith("id_"):
            assert torch.equal(value, plain[name]), name
    hierarchy = {name: value for name, value in both.items() if name.startswith("id_")}
    assert any((value - plain[name]).norm() > 0.1 * value.norm() for name, value in hierarchy.items())
    close(hierarchy, {name: plain[name] + 3.0 * alone[name] for name in hierarchy}, 1e-4)


# Learning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sign"),
    [
        ({"window": "one", "scale": 2.0}, -1.0),
        ({"kernel": "ode"}, 1.0),
    ],
    ids=["darker-one-step", "brighter-contrast"],
)
def test_an_easy_reward_rises_on_held_out_conditions_within_15_iterations(
    settings: dict[str, Any], sign: float, start: Path, toy_data: Path
) -> None:
    objective = Contrast() if "kernel" in settings else PolicyGradient()
    reward = RewardRunner(Composite([Term(Brightness(), sign)]), where="process")
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    model = {"objective": objective, "optimizer": optimizer, "gradient_norm": 1.0, "rollouts": rollouts(**settings)}
    module, batches = stage(start, reward=reward, **model), data(toy_data)
    before = held_out(module, batches)
    fit(module, batches, 15)
    assert held_out(module, batches) - before > 0.1


def held_out(module: GRPO, batches: Any) -> float:
    with one_thread():
        trainer = Trainer(**{**QUIET, "limit_val_batches": 1.0, "devices": 1})
        (found,) = trainer.validate(module, datamodule=batches, verbose=False)
    assert found["val/without_reward"] == 0
    return found["val/reward"]

"""GRPO through its stage: ratios, gradients, failing rewards, the reference, windows, settings, and what it learns."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _grpo_worker import (
    BATCH,
    GROUP,
    STEPS,
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
from torch import Tensor
from torch.distributions import Normal

from idc.errors import UserError
from idc.metrics.base import Clip
from idc.models.sampling import Sampling, to_uint8
from idc.models.spec import IDBlocks, Lora, TransformerSpec
from idc.models.weight_copy import WeightCopy
from idc.rewards.measures import Brightness
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": "sliding", "window_size": 2, "scale": 2.5},
        {"window": "one", "scale": 2.5, "image_scale": 1.5},
        {"cache": False, "scale": 2.5},
        {"batch": 2, "kernel": "dance", "noise_level": 0.3},
        {"bfloat16": True, "scale": 2.5},
        {"bfloat16": True, "cache": False, "batch": 1},
        {"lora": True, "scale": 2.5, "kernel": "wan"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "plain",
)
def test_before_an_update_the_ratio_is_one_to_the_bit(
    settings: dict[str, Any], checkpointing: bool, start: Path, toy_data: Path
) -> None:
    """In the second iteration, too, when the policy is the reference no longer."""
    settings = dict(settings)
    model: dict[str, Any] = {"compute_dtype": "bfloat16" if settings.pop("bfloat16", False) else "float32"}
    if settings.pop("lora", False):
        model |= {"trainable": "lora", "lora": Lora(rank=2, alpha=4)}
    if checkpointing:
        blocks = IDBlocks(layers=1)
        model["transformer"] = TransformerSpec(str(start), gradient_checkpointing=True, id_blocks=blocks)
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
    """-mean A grad log p over samples and steps, from the records' states alone: no cache, no clip, no ratio.

    The mean of Eq. 4 in its second form (at a = 1): mu = x (1 - h / (2 (1 - t))) - 3/2 h v.
    """
    mean = {g: sum(rewards[g * GROUP + i] for i in range(GROUP)) / GROUP for g in range(BATCH // GROUP)}
    std = {
        g: math.sqrt(sum((rewards[g * GROUP + i] - m) ** 2 for i in range(GROUP)) / GROUP) for g, m in mean.items()
    }
    module.transformer.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for each in passes(module):
        rollout, record = each.rollout, each.rollout.records[each.point.number]
        condition = module.encoders.condition([rollout.features] * len(rollout)).to(module.device, torch.float32)
        t, h = record.t.item(), (record.t - record.t_next).item()
        v = module.predict_velocity(record.x, record.t.expand(len(rollout)), condition).double()
        mu = record.x.double() * (1 - h / (2 * (1 - t))) - 1.5 * h * v
        log_p = Normal(mu, math.sqrt(t / (1 - t) * h)).log_prob(record.x_next.double()).flatten(1).mean(1)
        advantages = [(rewards[key] - mean[key // GROUP]) / std[key // GROUP] for key in rollout.keys]
        total = total - (torch.tensor(advantages, dtype=torch.float64) * log_p).mean() / len(passes(module))
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
def test_the_first_gradient_is_minus_the_mean_of_advantage_times_score(
    batch: int, start: Path, toy_data: Path
) -> None:
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
    assert len(kept.gradients) == 4 and len(kept.metrics) == 2
    once = stage(start)
    fit(once, data(toy_data), 1)
    steps = len(module.rollouts.possible)
    first, second = passes(module)[:steps], passes(module)[steps : 2 * steps]
    assert {each.rollout.first for each in first} == {0} and {each.rollout.first for each in second} == {GROUP}
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
    plain, other = stage(start, objective=KeepingPolicy(kl=0.0)), stage(start, objective=KeepingPolicy(kl=0.0, **objective))
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

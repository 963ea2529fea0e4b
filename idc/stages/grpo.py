"""Online alignment: groups of rollouts, rewards relative to the group, updates. GRPO, and DiffusionNFT by objective.

The paper's equations 3 and 4 as `idc.flow.sde` and `idc.flow.objectives` recover them. Departures: at t = 1 the policy
takes Euler's step (its noise has no bound there), and the last step is Euler's as well. All ranks make the same number
of forward and backward passes whatever the rewards are, as sharded training needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from idc.data.ranks import of_all_ranks
from idc.errors import UserError
from idc.flow.path import Velocity
from idc.models.weight_copy import reshard
from idc.rewards.composite import Breakdown
from idc.rewards.runner import RewardRunner
from idc.stages.aligned import Aligned
from idc.stages.held_out import HeldOutRewards
from idc.stages.rewarded import Drops, advantages_of, clip_of_sample, means
from idc.stages.rollouts import Place, Rollout, Rollouts, portions, roll_out
from idc.stages.sharding import sequence_ranks
from idc.stages.updates import Contrast, Given, Objective, Point, PolicyGradient
from idc.stages.watched import watch
from idc.types import Batch, Sample

PARTS = ("encode", "rollout", "reward", "train")


class Job(NamedTuple):
    """One forward and backward pass of an update."""

    rollout: Rollout
    objective: Objective
    point: Point
    given: Given


class GRPO(Aligned):
    """Aligns a trained model with rewards, online.

    An iteration (a training batch) samples `batch_size` videos over all ranks, `group_size` for each condition, and
    makes `updates` optimiser steps on them; Lightning's steps are optimiser steps.

    Args:
        reward: what judges the videos, and where.
        rollouts: how they are sampled.
        objective: `PolicyGradient` (GRPO) or `Contrast` (DiffusionNFT).
        contrast: a second objective, for the parameters of the hierarchical attention alone: the group contrast that
            the paper's introduction names. None leaves it out.
        contrast_weight: of the second objective.
        advantage_clip: bound of the advantages; None for none.
        updates: optimiser steps an iteration, each on an equal part of the rollouts.
        rollouts_a_step: what `batch_size / updates` was tuned for; a warning says when an overlay changes it.
        aligned_args: of `Aligned`.

    Raises:
        UserError: for settings out of range or that contradict each other, such as a compiled policy of which an
            objective needs log-probabilities. (Where the start was compiled in its training, this one is not.)
    """

    can_stop = True  # `idc.errors.StoppedError`
    groups = True

    def __init__(
        self,
        *,
        reward: RewardRunner,
        rollouts: Rollouts | None = None,
        objective: Objective | None = None,
        contrast: Contrast | None = None,
        contrast_weight: float = 1.0,
        advantage_clip: float | None = 5.0,
        updates: int = 1,
        rollouts_a_step: int | None = None,
        **aligned_args: Any,
    ) -> None:
        self.rollouts, self.objective = rollouts or Rollouts(), objective or PolicyGradient()
        self.contrast, self.contrast_weight = contrast, contrast_weight
        self.objectives = [self.objective] if contrast is None else [contrast, self.objective]
        super().__init__(**aligned_args)
        rules = {
            "updates": (updates >= 1, "1 or more optimiser steps an iteration"),
            "contrast_weight": (0 <= contrast_weight < math.inf, "0 or more"),
            "advantage_clip": (
                advantage_clip is None or 0 < advantage_clip < math.inf,
                "positive and finite, or null for none; 5 is usual",
            ),
            "rollouts_a_step": (rollouts_a_step is None or rollouts_a_step >= 1, "1 or more, or null for no warning"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UserError(f"{name}={locals()[name]}: must be {rule}")
        for objective in self.objectives:
            objective.check_rollouts(self.rollouts)
        if self.speed.compile and any(objective.log_probs for objective in self.objectives):
            asked = aligned_args.get("speed")
            if asked is not None and asked.compile:
                raise UserError(
                    "speed.compile=true: a policy's ratio to itself must be 1, and compiled layers round otherwise in "
                    "updates, which have gradients, than in rollouts; set model.init_args.speed.compile=false "
                    "(idc.stages.updates.Contrast, without log-probabilities, can be compiled)"
                )
            self.speed = replace(self.speed, compile=False)  # as the start was trained
        self.automatic_optimization = False
        self.runner, self.advantage_clip = reward, advantage_clip
        self.updates, self.rollouts_a_step = updates, rollouts_a_step
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.held_out = HeldOutRewards(reward)
        self._validated = 0  # held-out batches of the running validation
        self._drops = Drops()

    @property
    def needs_reference(self) -> bool:
        return any(objective.needs_reference for objective in self.objectives)

    @property
    def own_rewards(self) -> tuple[str, ...]:
        return tuple(self.runner.composite.models)

    def check_run(self, trainer: Any, datamodule: Any) -> None:
        super().check_run(trainer, datamodule)
        for setting, given, ours in (
            ("accumulate_grad_batches", trainer.accumulate_grad_batches != 1, "updates"),
            ("gradient_clip_val", bool(trainer.gradient_clip_val), "gradient_norm"),
        ):
            if given:
                raise UserError(
                    f"trainer.{setting}={getattr(trainer, setting)}: GRPO makes its optimiser steps itself; leave it "
                    f"out and set model.init_args.{ours}"
                )
        if (ranks := sequence_ranks(trainer.strategy)) > 1:
            raise UserError(
                f"trainer.strategy.init_args.tensor_parallel_size={ranks}: a rank makes GRPO's rollouts alone; "
                "set it to 1 (recipes/hardware/fsdp_grpo.yaml); sequences over ranks are for SFT, DPO and generation"
            )
        if datamodule.group_size < 2:
            raise UserError("data.init_args.group_size=1: advantages are relative to a group of 2 or more")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        world = self.trainer.world_size
        if stage == "fit":
            size, batch = data.group_size, data.batch_size
            at_once = portions(batch // world, size, self.rollouts.batch)
            chunks = batch // world // at_once
            if chunks % self.updates:
                near = max(n for n in range(1, chunks + 1) if chunks % n == 0 and n <= self.updates)
                raise UserError(
                    f"updates={self.updates}: a rank samples {chunks} times {at_once} rollouts, which cannot be split "
                    f"so; {near} is possible"
                )
        self.runner.load(self.trainer.strategy.root_device)
        if stage == "fit":
            self._announce(batch, size, world, at_once)  # a reward elsewhere has told its networks by now

    def _announce(self, batch: int, size: int, world: int, at_once: int) -> None:
        step = batch // self.updates
        rank_zero_info(
            f"an iteration: {batch // size} groups of {size} = {batch} rollouts on {world} rank{'s' * (world > 1)}, "
            f"{at_once} at once; {self.updates} optimiser step{'s' * (self.updates > 1)} on {step} rollouts each"
        )
        if self.rewards_used:
            rank_zero_info(
                f"the reward stands on {', '.join(self.rewards_used)}: a report flags the metrics that do, too"
            )
        if self.rollouts_a_step not in (None, step):
            rank_zero_warn(
                f"{step} rollouts an optimiser step, and the recipe was tuned for {self.rollouts_a_step}: keep "
                f"batch_size / updates = {self.rollouts_a_step}, or tune the learning rate and set "
                f"model.init_args.rollouts_a_step={step}"
            )

    # An iteration ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        rollouts = self._roll_out(batch)
        with self._clock("reward"):
            own = self.runner.collect(check=False)
            broken = [rollout.sample.id for rollout in rollouts if not rollout.latents.isfinite().all()]
            names = {key: rollout.sample.id for rollout in rollouts for key in rollout.keys}
            parts = of_all_ranks((own, broken, names))
        _check_finite([id for _, ids, _ in parts for id in ids])
        gathered: dict[int, Breakdown] = {k: v for part, _, _ in parts for k, v in part.items()}
        breakdowns = [gathered[key] for key in sorted(gathered)]
        self._drops.tell(self.trainer, gathered, {k: id for *_, part in parts for k, id in part.items()})
        failures = [breakdown for breakdown in breakdowns if breakdown.total is None]
        self.runner.check(len(failures), len(breakdowns), failures[0].reason if failures else "")
        size = self._group_size
        groups = [place // size for place in range(len(breakdowns))]
        advantages, valid_B = advantages_of(breakdowns, groups, self.runner.composite, self.advantage_clip)
        self._log_rewards(breakdowns, advantages.groups.std_G, advantages.advantages_B)
        self.log_dict(watch(rollouts, advantages.advantages_B, self.rollouts))
        with self._clock("train"):
            self._train_on(rollouts, advantages.advantages_B, valid_B)
        for part, seconds in self._seconds.items():
            self.log(f"perf/{part}_seconds", seconds)

    @property
    def _group_size(self) -> int:
        data: Any = getattr(self.trainer, "datamodule", None)
        return data.group_size

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - began

    @torch.no_grad()
    def _roll_out(self, batch: Batch) -> list[Rollout]:
        """Sample this rank's rollouts; each goes to the rewards as soon as its pixels are there."""

        def encode(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
            encoded = [dict(sample.features or {}) for sample in samples]
            with self._clock("encode"):
                for drop in self.rollouts.sampling.drops:
                    known = [replace(s, features=f) for s, f in zip(samples, encoded, strict=True)]
                    encoded = self.encoders.features(known, [drop] * len(known), ("text", "vlm", "references"))
            return encoded

        def judge(rollout: Rollout) -> None:
            with self._clock("reward"):
                for key, video in zip(rollout.keys, self.encoders.codec.decode(rollout.latents), strict=True):
                    self.runner.submit(key, clip_of_sample(rollout.sample, video, f"{rollout.sample.id}#{key}"))
            self.on_progress("a rollout")

        bucket = batch.bucket
        shape = self.encoders.codec.latent_shape(bucket.frames, bucket.height, bucket.width)
        assert self.transformer is not None
        self.transformer.eval()
        began, before = time.perf_counter(), sum(self._seconds.values())
        try:
            iteration = self.trainer.global_step // self.updates
            place = Place(batch, self.trainer.global_rank, self._group_size, iteration)
            return roll_out(place, self.rollouts, encode, self.sampler, shape, judge)
        finally:
            others = sum(self._seconds.values()) - before
            self._seconds["rollout"] = time.perf_counter() - began - others
            self.transformer.train()

    def _train_on(self, rollouts: list[Rollout], advantages_B: Tensor, valid_B: Tensor) -> None:
        optimizer: Any = self.optimizers()
        jobs = self._jobs(rollouts, advantages_B, valid_B)
        sums: dict[str, Tensor] = {}
        for update in range(self.updates):
            part = rollouts[update :: self.updates]  # over any number of ranks the same samples
            optimizer.zero_grad()
            for objective in self.objectives:
                own = [job for rollout in part for job in jobs[rollout.first] if job.objective is objective]
                weight = self.contrast_weight if objective is self.contrast else 1.0
                for job in own:
                    logged = self._backward(job, weight / len(own))
                    if update == 0 and "policy/ratio_error" in logged:
                        worst = logged["policy/ratio_error"].max()
                        sums["policy/first_ratio_error"] = torch.maximum(
                            worst, sums.get("policy/first_ratio_error", torch.zeros_like(worst))
                        )
                    for name, value_B in logged.items():
                        sums[name] = sums.get(name, 0) + value_B.mean() / (len(own) * self.updates)
                if objective is self.contrast:
                    self._keep_hierarchy_alone()
            self.clip_to_norm(optimizer, self.gradient_norm)
            optimizer.step()
            scheduler: Any = self.lr_schedulers()
            scheduler.step()
        for name, value in sums.items():
            self.log(name, value, sync_dist=True, reduce_fx="max" if name.endswith("first_ratio_error") else "mean")

    def _backward(self, job: Job, share: float) -> dict[str, Tensor]:
        """One pass; returns what is logged of it."""
        velocity = self._velocity(job.rollout)(job.point.x, job.point.t)
        loss = job.objective.loss(velocity, job.rollout, job.point, job.given, self.rollouts)
        # A mean over all samples, as ranks with different numbers of failures must weigh their samples equally.
        total = (loss.loss_B * job.given.valid_B).mean()
        self.manual_backward(share * total)
        name = "train/loss" if job.objective is self.objective else "contrast/total"
        return {name: total.detach().reshape(1), **loss.logged}

    def _velocity(self, rollout: Rollout) -> Velocity:
        settings = self.rollouts
        return self.sampler.guided_velocity(
            [rollout.features], settings.sampling, group=len(rollout), cached=settings.cache
        )

    def _jobs(self, rollouts: list[Rollout], advantages_B: Tensor, valid_B: Tensor) -> dict[int, list[Job]]:
        """The passes of each rollout by its first place, with all that is constant over the updates."""
        jobs: dict[int, list[Job]] = {rollout.first: [] for rollout in rollouts}
        for objective in self.objectives:
            points = [objective.points(rollout) for rollout in rollouts]
            old: list[list[Tensor]] | None = self._velocities(rollouts, points) if objective.needs_old else None
            reference: list[list[Tensor]] | None = None
            if objective.needs_reference:
                assert self.reference is not None
                with self.reference.applied():
                    reference = self._velocities(rollouts, points)
            weights = iter(self._weights(objective, rollouts))
            for i, rollout in enumerate(rollouts):
                A_B, v_B = (x[rollout.here].to(self.device) for x in (advantages_B, valid_B))
                for j, point in enumerate(points[i]):
                    at_old, at_reference = (None if each is None else each[i][j] for each in (old, reference))
                    given = Given(A_B, v_B, at_old, at_reference, next(weights))
                    jobs[rollout.first].append(Job(rollout, objective, point, given))
        return jobs

    def _weights(self, objective: Objective, rollouts: list[Rollout]) -> list[float]:
        """Of this rank's points, out of those of all ranks."""
        own = [point for rollout in rollouts for point in objective.describe(rollout, self.rollouts)]
        every = of_all_ranks(own)
        before = sum(map(len, every[: self.trainer.global_rank]))
        return objective.weights([point for part in every for point in part])[before : before + len(own)]

    @torch.no_grad()
    def _velocities(self, rollouts: list[Rollout], points: list[list[Point]]) -> list[list[Tensor]]:
        found = []
        for rollout, places in zip(rollouts, points, strict=True):
            velocity = self._velocity(rollout)
            found.append([velocity(point.x, point.t) for point in places])
        assert self.transformer is not None
        reshard(self.transformer)
        return found

    def _keep_hierarchy_alone(self) -> None:
        """Drop the gradients of all that is not the hierarchical attention's."""
        assert self.transformer is not None
        for name, parameter in self.transformer.named_parameters():
            if parameter.grad is not None and not name.startswith("id_"):
                parameter.grad.zero_()

    # Held-out conditions --------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample the held-out conditions without noise in the steps, always from the same start, for their rewards."""
        self.held_out.judge(self, batch)
        self._validated += 1

    def on_validation_epoch_end(self) -> None:
        complete = self._validated == sum(self.trainer.num_val_batches)
        self._validated = 0
        self.held_out.end(self, "val", complete)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._validated = 0
        self.held_out.end(self, "test", complete=True)

    # Logging --------------------------------------------------------------------------------------------------------

    def _log_rewards(self, breakdowns: list[Breakdown], std_G: Tensor, advantages_B: Tensor) -> None:
        for name, mean in means(breakdowns).items():
            self.log(f"train/reward/{name}" if name else "train/reward", mean, prog_bar=not name)
        spread = std_G[std_G.isfinite()]
        self.log("train/reward_std", spread.mean() if len(spread) else 0.0)
        self.log("train/zero_variance_groups", (std_G == 0).float().mean())
        self.log("train/advantage", advantages_B.abs().mean())
        self.log("train/without_reward", sum(b.total is None for b in breakdowns) / len(breakdowns))
        self.log("train/reward_retried", float(sum(b.retried for b in breakdowns)))

    def teardown(self, stage: str) -> None:
        self.runner.close()


def _check_finite(broken: Sequence[str]) -> None:
    """On all ranks alike: one update on such rollouts would make every weight NaN."""
    if broken:
        raise UserError(
            f"rollouts of {broken[0]}{f' and {len(broken) - 1} more' if broken[1:] else ''} hold NaN or infinity: the "
            "policy has diverged; go on from the last checkpoint with a lower learning rate or noise_level"
        )

"""Flow DPO on preference pairs: the offline baseline of alignment (Diffusion-DPO, arXiv 2311.12908).

    L = -log sigmoid( -(beta / 2) [delta_w - delta_l] ),   delta = mean|v - u|^2 - mean|v_ref - u|^2,   u = eps - z_0

with the same noise and the same time for both clips of a pair, as `idc.flow.objectives.dpo_loss` has it. Departure:
the paper says no more of its offline baseline than that it is DPO; beta, times and data are choices of the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from idc.data.pairs import check_pairs, rewards_of_pairs
from idc.errors import UserError
from idc.flow.objectives import dpo_loss, velocity_error
from idc.flow.path import interpolate, velocity_target
from idc.flow.times import LogitNormal, TimeSampler, held_out_times, noise_like
from idc.models.conditioning import ConditionDropout, Drop, Features
from idc.rewards.runner import RewardRunner
from idc.stages.aligned import Aligned
from idc.stages.held_out import HeldOutRewards
from idc.types import Batch

LOGGED = ("dpo", "accuracy", "margin", "delta_winner", "delta_loser")


class PairLosses(NamedTuple):
    """What a batch of pairs gives, one value a pair; with the gradient, but for `accuracy_B`."""

    dpo_B: Tensor
    accuracy_B: Tensor
    """1 where the policy prefers the winner more than its reference does, 1/2 where just as much."""
    margin_B: Tensor
    delta_winner_B: Tensor
    """Error on the winner less the reference's: below 0 where the policy has come nearer to it."""
    delta_loser_B: Tensor
    error_winner_B: Tensor


class DPO(Aligned):
    """Raises the likelihood of winners over losers, measured against the model that training starts from.

    Args:
        beta: how far the policy may leave its reference; errors are means over dimensions, for which 100 is usual.
        sft_weight: of the winner's own error, beside the preference; it holds the policy on the winners where both
            likelihoods would fall. 0 is plain DPO.
        times: how training draws t, once a pair.
        dropout: probabilities of dropping conditions, as in SFT; pairs say which clip fits its condition, so by
            default none is dropped.
        validation_times: the t at which every held-out pair is evaluated, each with its own fixed noise.
        reward: what judges, at every validation, the present model's videos for the conditions of the held-out pairs,
            a condition once: for the curve (`val/reward`) alone, and nothing is trained on it. None samples none.
        aligned_args: of `Aligned`.

    Raises:
        UserError: for a number out of its range.
    """

    can_stop = True  # `idc.errors.StoppedError`, of held-out rewards

    def __init__(
        self,
        *,
        beta: float = 100.0,
        sft_weight: float = 0.0,
        times: TimeSampler | None = None,
        dropout: ConditionDropout | None = None,
        validation_times: list[float] | None = None,
        reward: RewardRunner | None = None,
        **aligned_args: Any,
    ) -> None:
        if not 0 < beta < math.inf:
            raise UserError(f"beta={beta}: must be positive; 100 is usual")
        if not 0 <= sft_weight < math.inf:
            raise UserError(f"sft_weight={sft_weight}: must be 0 (plain DPO) or more")
        chosen = held_out_times(validation_times)
        super().__init__(**aligned_args)
        self.beta, self.sft_weight = beta, sft_weight
        self.times = times or LogitNormal()
        self.dropout = dropout or ConditionDropout(0.0, 0.0, 0.0)
        self.validation_times = chosen
        self.runner = reward
        self.held_out_rewards = None if reward is None else HeldOutRewards(reward, once=True)
        self._validated = 0  # held-out batches of the running validation
        self.held_out = torch.nn.ModuleDict({name: MeanMetric() for name in LOGGED})

    def _check(self, datamodule: Any) -> None:
        super()._check(datamodule)
        if datamodule is not None:
            settings = {"train": "sources", "held out": "val_sources"}
            for split, name in settings.items():
                check_pairs((entry for kept, entry in datamodule.kept() if kept == split), name)

    @property
    def own_rewards(self) -> tuple[str, ...]:
        """Of what chose between the clips of the pairs, where the data module had them chosen."""
        sources = getattr(getattr(self.trainer, "datamodule", None), "sources", ())
        rewards = [source.reward for source in sources if hasattr(source, "reward")]
        told = [model for source in sources for model in rewards_of_pairs(source.path)]
        return tuple(dict.fromkeys([*told, *(model for reward in rewards for model in reward.models)]))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.runner is not None and stage != "predict":
            self.runner.load(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        if self.runner is not None:
            self.runner.close()

    # The objective ----------------------------------------------------------------------------------------------

    def errors(self, features: Sequence[Features], noise: Tensor, t_B: Tensor, drops: list[Drop] | Drop) -> Tensor:
        """`velocity_error` of the present weights on winners and losers, `(2, B)`: one forward for both."""
        both = [torch.stack([f[name] for f in features]) for name in ("latents", "loser_latents")]
        x0 = torch.cat(both).to(self.device, torch.float32)
        noise, t = torch.cat([noise, noise]), torch.cat([t_B, t_B])
        twice = drops if isinstance(drops, Drop) else [*drops, *drops]
        condition = self.encoders.condition([*features, *features], twice).to(self.device, torch.float32)
        velocity = self.predict_velocity(interpolate(x0, noise, t), t, condition)
        return velocity_error(velocity, velocity_target(x0, noise)).view(2, -1)

    def losses(
        self,
        features: Sequence[Features],
        seeds_B: Tensor,
        t_B: Tensor,
        drops: list[Drop] | Drop = Drop.NOTHING,
        stream: str = "noise",
    ) -> PairLosses:
        """The objective on pairs, each with the noise of its seed at its time for both clips.

        Args:
            features: with `latents` of the winner and `loser_latents`.
        """
        noise = noise_like(seeds_B, tuple(features[0]["latents"].shape), device=self.device, stream=stream)
        assert self.reference is not None
        # Before the policy's own forward, whose backward pass must meet the weights that it was made with.
        with torch.no_grad(), self.reference.applied():
            ref_winner_B, ref_loser_B = self.errors(features, noise, t_B, drops)
        winner_B, loser_B = self.errors(features, noise, t_B, drops)
        found = dpo_loss(winner_B, loser_B, ref_winner_B, ref_loser_B, self.beta)
        deltas = winner_B - ref_winner_B, loser_B - ref_loser_B
        return PairLosses(found.loss_B, found.accuracy_B, found.margin_B, *deltas, winner_B)

    # Training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        drops = self.dropout.draw(self.drop_seeds(batch.seeds_B))
        features = self.encoders.features(batch.samples, drops)
        losses = self.losses(features, batch.seeds_B, self.times(batch.seeds_B).to(self.device), drops)
        loss = losses.dpo_B.mean() + self.sft_weight * losses.error_winner_B.mean()
        self._log_training(torch.stack([loss, *(values_B.mean() for values_B in losses[: len(LOGGED)])]), len(batch))
        return loss

    def _log_training(self, values: Tensor, size: int) -> None:
        # One exchange between the ranks for all of them.
        means = cast(Tensor, self.trainer.strategy.reduce(self.mean_of_step(values), reduce_op="mean"))
        for name, value in zip(("loss", *LOGGED), means, strict=True):
            self.log(f"train/{name}", value, prog_bar=name in ("loss", "accuracy"), batch_size=size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = self.gradient_norm if gradient_clip_val is None else gradient_clip_val
        super().configure_gradient_clipping(optimizer, norm, gradient_clip_algorithm)

    # Held-out pairs ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        features = self.encoders.features(batch.samples, [Drop.NOTHING] * len(batch))
        real = len(batch) - batch.padding
        self._validated += 1
        for t in self.validation_times:
            t_B = torch.full((len(batch),), t, device=self.device)
            losses = self.losses(features, batch.seeds_B, t_B, stream=f"validation_noise_{t:g}")
            if real:
                for name, values_B in zip(LOGGED, losses, strict=False):
                    cast(MeanMetric, self.held_out[name]).update(values_B[:real])
        if self.held_out_rewards is not None:
            self.held_out_rewards.judge(self, batch)

    def on_validation_epoch_end(self) -> None:
        # A validation that a signal cut short would log the accuracy of some buckets, or of nothing.
        self._end_held_out("val", complete=self._validated == sum(self.trainer.num_val_batches))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._end_held_out("test", complete=True)

    def _end_held_out(self, split: str, complete: bool) -> None:
        if complete:
            self._log_held_out(split)
        self._reset_held_out()
        if self.held_out_rewards is not None:
            self.held_out_rewards.end(self, split, complete)

    def _log_held_out(self, split: str) -> None:
        for name in LOGGED:
            mean = cast(MeanMetric, self.held_out[name]).compute()  # equal on all ranks already
            tag = "loss" if name == "dpo" else name
            self.log(f"{split}/{tag}", mean, prog_bar=name in ("dpo", "accuracy"), sync_dist=True)

    def _reset_held_out(self) -> None:
        self._validated = 0
        for name in LOGGED:
            cast(MeanMetric, self.held_out[name]).reset()

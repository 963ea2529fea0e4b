"""Rectified-flow supervised fine-tuning: the paper's equations 1 and 2.

Departures: w(t) is a choice of the recipe (the paper names none), and so is how t is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from idc.flow.path import interpolate, velocity_target
from idc.flow.times import LogitNormal, TimeSampler, held_out_times, noise_like
from idc.flow.weights import Uniform, Weight
from idc.models.conditioning import ConditionDropout, Drop, Features
from idc.stages.base import Stage
from idc.types import Batch


class SFT(Stage):
    """Trains v(z_t, t, C) towards eps - z_0.

    Args:
        times: how training draws t, per sample.
        weight: w(t) of equation 2.
        dropout: probabilities of dropping conditions, for guidance.
        validation_times: the t at which every held-out clip is evaluated, each with its own fixed noise; the
            held-out loss is their mean, and each is logged beside it.
        stage_args: of `Stage`.
    """

    def __init__(
        self,
        *,
        times: TimeSampler | None = None,
        weight: Weight | None = None,
        dropout: ConditionDropout | None = None,
        validation_times: list[float] | None = None,
        **stage_args: Any,
    ) -> None:
        super().__init__(**stage_args)
        self.times = times or LogitNormal()
        self.weight = weight or Uniform()
        self.dropout = dropout or ConditionDropout()
        self.validation_times = held_out_times(validation_times)
        self._validated = 0  # held-out batches of the running validation
        self.held_out = torch.nn.ModuleDict({self._name(t): MeanMetric() for t in self.validation_times})

    def _held_out(self, t: float) -> MeanMetric:
        return cast(MeanMetric, self.held_out[self._name(t)])

    @staticmethod
    def _name(t: float) -> str:
        return f"t{t:g}".replace(".", "_")  # a module's name has no dots

    def losses(
        self,
        features: Sequence[Features],
        seeds_B: Tensor,
        t_B: Tensor,
        drops: list[Drop] | Drop,
        stream: str = "noise",
    ) -> Tensor:
        """|| v(z_t, t, C) - (eps - z_0) ||^2 per sample, a mean over dimensions, unweighted: float32 (B,)."""
        x0 = torch.stack([f["latents"] for f in features]).to(self.device, torch.float32)
        noise = noise_like(seeds_B, tuple(x0.shape[1:]), device=self.device, stream=stream)
        condition = self.encoders.condition(features, drops).to(self.device, torch.float32)
        velocity = self.predict_velocity(interpolate(x0, noise, t_B), t_B, condition)
        return (velocity - velocity_target(x0, noise)).square().flatten(1).mean(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        drops = self.dropout.draw(self.drop_seeds(batch.seeds_B))
        features = self.encoders.features(batch.samples, drops)
        t_B = self.times(batch.seeds_B).to(self.device)
        loss_B = self.losses(features, batch.seeds_B, t_B, drops)
        loss = (self.weight(t_B) * loss_B).mean()
        self.log("train/loss", self.mean_of_step(loss), prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        features = self.encoders.features(batch.samples, [Drop.NOTHING] * len(batch))
        real = len(batch) - batch.padding
        self._validated += 1
        for t in self.validation_times:
            t_B = torch.full((len(batch),), t, device=self.device)
            loss_B = self.losses(features, batch.seeds_B, t_B, Drop.NOTHING, stream=f"validation_noise_{t:g}")
            if real:
                self._held_out(t).update(loss_B[:real])

    def on_validation_epoch_end(self) -> None:
        # A validation that a signal cut short would log the loss of some buckets, or of nothing.
        if self._validated == sum(self.trainer.num_val_batches):
            self._log_held_out("val")
        self._reset_held_out()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")
        self._reset_held_out()

    def _log_held_out(self, split: str) -> None:
        means = {t: self._held_out(t).compute() for t in self.validation_times}
        for t, mean in means.items():
            self.log(f"{split}/loss_t{t:g}", mean, sync_dist=True)  # equal on all ranks already
        self.log(f"{split}/loss", torch.stack(list(means.values())).mean(), prog_bar=True, sync_dist=True)

    def _reset_held_out(self) -> None:
        self._validated = 0
        for t in self.validation_times:
            self._held_out(t).reset()

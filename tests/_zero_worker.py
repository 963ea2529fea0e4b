"""Strategies, a fault and a witness of the tests of DeepSpeed, as recipes name them."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from idc.stages.zero import DeepSpeedZeRO


class SameLayers(DDPStrategy):
    """DDP whose ranks drop the conditions that rank 0 drops, as `DeepSpeedZeRO`'s do."""

    same_layers = True


class Scattered(DeepSpeedZeRO):
    """ZeRO-3 that keeps nothing gathered: it would keep all of a tiny model."""

    def __init__(self) -> None:
        super().__init__(stage=3)
        settings = {"param_persistence_threshold": 0, "max_live_parameters": 1000, "prefetch_bucket_size": 1000}
        assert isinstance(self.config, dict)
        self.config["zero_optimization"].update({f"stage3_{name}": value for name, value in settings.items()})


class OneNaN(Callback):
    """In step 2 the last rank's gradient of the last trained weights, which that rank steps, is NaN, and no other."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def spoil(gradient: Tensor) -> Tensor | None:
            return gradient * float("nan") if trainer.global_step == 1 else None

        if trainer.global_rank == trainer.world_size - 1:
            stage: Any = pl_module
            [weight for weight in stage.transformer.parameters() if weight.requires_grad][-1].register_hook(spoil)


class Traced(Callback):
    """Layers are compiled without inductor, whose C++ takes minutes; how many graphs there are is logged by step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("graphs", float(torch._dynamo.utils.counters["stats"]["unique_graphs"]))

"""Strategies of the tests of DeepSpeed, as recipes name them."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

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

"""DeepSpeed's ZeRO through Lightning's strategy: CUDA alone, one optimiser, checkpoints that are directories.

Not yet run on a GPU: written after the sources of Lightning 2.6.6 and DeepSpeed, and tested only in that recipes parse
and a CPU is refused. FSDP2 (`idc.stages.sharding`) does the same and is what the tests cover.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from idc.errors import UserError

_CPU = (
    "trainer.strategy: DeepSpeed runs on CUDA GPUs alone; recipes/hardware/cpu2.yaml shards weights over CPU "
    "processes, and fsdp.yaml over GPUs"
)


class DeepSpeedZeRO(DeepSpeedStrategy):
    """ZeRO-2 (optimiser and gradients sharded) or ZeRO-3 (weights as well, for SFT and generation).

    With ZeRO-3 each rank first holds the whole model in host memory: DeepSpeed's own sharded construction knows nothing
    of how the blocks take over Wan's weights. FSDP2 needs that memory on one rank alone.

    Args:
        stage: of ZeRO.
        offload_optimizer: keep the optimiser's state in host memory.
        offload_parameters: keep weights there, too; ZeRO-3.

    Raises:
        UserError: without CUDA or DeepSpeed, or for what ZeRO-3 cannot train.
    """

    def __init__(
        self, stage: Literal[1, 2, 3] = 2, offload_optimizer: bool = False, offload_parameters: bool = False
    ) -> None:
        if not torch.cuda.is_available():
            raise UserError(_CPU)
        if offload_parameters and stage != 3:
            raise UserError(
                f"trainer.strategy.init_args.offload_parameters: stage={stage} shards no weights; set stage 3"
            )
        try:
            super().__init__(stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
        except MisconfigurationException as error:
            raise UserError(
                "trainer.strategy: DeepSpeed (CUDA only) is not installed: pip install 'idc[gpu]'"
            ) from error

    def _configure_launcher(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise UserError(_CPU)
        super()._configure_launcher()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build whole: `deepspeed.initialize` shards what `deepspeed.zero.Init` has not."""
        self._init_config_if_needed()
        yield

    def setup(self, trainer: Trainer) -> None:
        if self.zero_stage_3:
            self._prepare_sharded()
        super().setup(trainer)

    def _prepare_sharded(self) -> None:
        """Let ZeRO-3 gather weights that are read outside the forward pass of their own module.

        Those of a block whose sample has no references get a zero gradient (`idc.models.hierarchy.add_idle`), which
        ranks with references wait for.
        """
        import deepspeed

        from idc.models.hierarchy import HierarchyBlock

        model: Any = getattr(self.lightning_module, "transformer", None)
        if model is None or hasattr(self.lightning_module, "reference"):
            raise UserError(
                f"trainer.strategy.init_args.stage=3: {type(self.lightning_module).__name__} keeps a copy of the "
                "weights, which ZeRO-3 hides; take stage 2, or recipes/hardware/fsdp.yaml"
            )
        if len(model.id_blocks):
            deepspeed.utils.set_z3_leaf_modules(model, [HierarchyBlock])
        if model.id_vlm_projector is not None:
            for parameter in model.id_vlm_projector.parameters():
                deepspeed.zero.register_external_parameter(model, parameter)

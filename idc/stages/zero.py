"""DeepSpeed's ZeRO through Lightning's strategy: one optimiser, checkpoints that are directories.

Lightning lets it run on CUDA alone. DeepSpeed has a CPU back end of its own (gloo, and PyTorch's optimisers), which
this strategy lets through: on two CPU processes it is what the tests run. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from idc.errors import UserError

class ZeROPrecision(DeepSpeedPrecision):
    """float32 weights; batches as they are, where Lightning's looks for tensors in them, which typed batches refuse.

    DeepSpeed clips within its step, and only then is the gradient's norm known: it is judged after the step, which
    DeepSpeed itself leaves out where the norm is not finite.
    """

    def convert_input(self, data: Any) -> Any:
        return data

    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
        engine = model.trainer.model
        ends = engine.is_gradient_accumulation_boundary  # it counts on in its step
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        return result


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

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning gives one; the strategy's own would hide the precision that the trainer was asked for.
        if isinstance(plugin, DeepSpeedPrecision):
            if plugin.precision != "32-true":
                raise UserError(
                    f"trainer.precision={plugin.precision!r}: DeepSpeed makes all weights bfloat16, which stages keep "
                    "in float32; take '32-true', and model.init_args.compute_dtype=bfloat16 for a network in it"
                )
            plugin = ZeROPrecision(plugin.precision)
        self._precision_plugin = plugin

    def _configure_launcher(self) -> None:
        from deepspeed.accelerator import get_accelerator

        name = get_accelerator().device_name()
        kinds = {"cuda": CUDAAccelerator, "cpu": CPUAccelerator}
        if not isinstance(self.accelerator, kinds.get(name, ())):
            raise UserError(
                f"trainer.accelerator: DeepSpeed runs on {name} here; to have it run on "
                "CPU processes, set trainer.accelerator to cpu and the environment variable DS_ACCELERATOR=cpu"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        # Lightning's own refuses all but CUDA, and then does what those of its bases do.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        import deepspeed

        # A C++ extension for exchanges between CPU processes, which DeepSpeed would compile for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed compares the index with numbers

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build whole: `deepspeed.initialize` shards what `deepspeed.zero.Init` has not."""
        self._init_config_if_needed()
        yield

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}  # the engine saves each rank's part

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

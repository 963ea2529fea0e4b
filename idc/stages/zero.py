"""DeepSpeed's ZeRO through Lightning's strategy: one optimiser, one backward pass a step, checkpoints in directories.

Lightning lets it run on CUDA alone. DeepSpeed has a CPU back end as well (gloo, PyTorch's optimisers), which this
strategy lets through: the tests run it on two CPU processes. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from packaging.version import Version
from torch import Tensor

from idc.errors import UserError
from idc.stages.sft import SFT

_DEVICES = {"cuda": CUDAAccelerator, "cpu": CPUAccelerator}
_SHM = "deepspeed_shm_comm"
# The first release whose ZeRO-2 never takes a float32 step on a gradient that is not finite. Before it, a rank's NaN
# norm became -1, which with the other ranks' gave a finite one: the step was taken, and nobody could tell.
OLDEST = "0.19.8"


def _check_version() -> None:
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise UserError("trainer.strategy: DeepSpeed is not installed: pip install 'idc[deepspeed]'") from None
    if Version(found) < Version(OLDEST):
        raise UserError(
            f"trainer.strategy: DeepSpeed {found} takes steps on gradients that are not finite; it must be {OLDEST} "
            "or later: pip install 'idc[deepspeed]'"
        )


def _differentiable(block: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The inputs with a gradient for the first, where no gradient would reach any, as with LoRA in the first block.

    ZeRO-3 takes a block's gradients when those of its inputs are done, or, where inputs need none, before they are.
    """
    if not torch.is_grad_enabled() or any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return None
    return (args[0].detach().requires_grad_(), *args[1:]) if any(p.requires_grad for p in block.parameters()) else None


class ZeROPrecision(DeepSpeedPrecision):
    """Weights and batches in float32, and steps that are judged.

    DeepSpeed clips within its step, and only then is the gradient's norm known, so that a stage judges the step after
    it (`idc.stages.base.Stage.judge_step`).
    """

    def convert_input(self, data: Any) -> Any:
        """As it is: a stage takes its typed batch's tensors as float32 itself, and Lightning cannot look into one."""
        return data

    def backward(  # type: ignore[override]  # as Lightning's
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning has divided the loss by the number of micro-batches; without a word DeepSpeed would do so, too."""
        engine: Any = model.trainer.model
        engine.set_gradient_accumulation_boundary(not model.trainer.fit_loop._should_accumulate())
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]  # as Lightning's
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        engine = model.trainer.model
        model.judge_step(float(engine.get_global_grad_norm()), engine.was_step_applied())
        return result


class DeepSpeedZeRO(DeepSpeedStrategy):
    """ZeRO-2 (optimiser and gradients sharded) or ZeRO-3 (weights as well, for SFT).

    Ranks exchange gradients (and with ZeRO-3 weights) in the order in which they meet them, without a check that it is
    the same one. So all ranks drop the conditions that rank 0 drops: each sample's are dropped as often as ever, but
    no longer independently of the other ranks'. Without dropout, losses are those of DDP.

    With ZeRO-3 each rank first holds the whole model in host memory: DeepSpeed's own sharded construction knows nothing
    of how the blocks take over Wan's weights. FSDP2 needs that memory on one rank alone.

    A checkpoint is loaded by as many ranks as saved it. DeepSpeed unpickles what it loads: resume from runs of your own
    alone (sampling and export unpickle nothing).

    Args:
        stage: of ZeRO.
        offload_optimizer: keep the optimiser's state in host memory, and step there, with the recipe's own optimiser.
        offload_parameters: keep weights there, too; ZeRO-3.

    Raises:
        UserError: without DeepSpeed or with one older than `OLDEST`, on devices other than those that DeepSpeed found,
            for trainer.precision other than 32-true, for a stage that steps by itself (GRPO), or for what ZeRO-3 cannot
            train.
    """

    same_layers = True  # of all ranks, in every pass: see `idc.stages.base.Stage.drop_seeds`

    def __init__(
        self, stage: Literal[1, 2, 3] = 2, offload_optimizer: bool = False, offload_parameters: bool = False
    ) -> None:
        if offload_parameters and stage != 3:
            raise UserError(
                f"trainer.strategy.init_args.offload_parameters: stage={stage} shards no weights; set stage 3"
            )
        _check_version()
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            logging_batch_size_per_gpu=1,  # of DeepSpeed's own log; else Lightning opens training data to validate
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # or the recipe's optimiser would be refused

    # Devices, processes and precision -------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Not given at construction: a strategy's own hides what the trainer was asked for.
        if isinstance(plugin, DeepSpeedPrecision):
            if plugin.precision != "32-true":
                raise UserError(
                    f"trainer.precision={plugin.precision!r}: DeepSpeed makes all weights bfloat16, and stages keep "
                    "them in float32; take '32-true', and model.init_args.compute_dtype=bfloat16 for a network in it"
                )
            plugin = ZeROPrecision(plugin.precision)
        self._precision_plugin = plugin

    def _configure_launcher(self) -> None:
        from deepspeed.accelerator import get_accelerator

        name = get_accelerator().device_name()
        if not isinstance(self.accelerator, _DEVICES.get(name, ())):
            raise UserError(
                f"trainer.accelerator: DeepSpeed runs on {name} here; for CPU processes set trainer.accelerator=cpu, "
                "and where there is a GPU the environment variable DS_ACCELERATOR=cpu"
            )
        super()._configure_launcher()

    def setup_environment(self) -> None:
        # Lightning's own refuses all but CUDA, and does what those of its bases do.
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        import deepspeed

        # A C++ extension for exchanges within a machine, which would be compiled for a minute.
        deepspeed.ops.__compatible_ops__[_SHM] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks for a number

    @property
    def handles_gradient_accumulation(self) -> bool:
        # Lightning counts micro-batches and ends a step with an epoch, as with its other strategies; the engine is told
        # (`ZeROPrecision.backward`). It would count on over epochs, and Lightning would not.
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        yield  # ZeRO has no room for gradients that are not reduced

    # Model and optimiser --------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        if not model.automatic_optimization:
            raise UserError(
                f"trainer.strategy: {type(model).__name__} makes several passes and steps of a batch, and DeepSpeed "
                "steps after each pass; take recipes/hardware/fsdp_grpo.yaml"
            )
        if self.zero_stage_3 and not isinstance(model, SFT):
            raise UserError(
                f"trainer.strategy.init_args.stage=3: is for SFT; {type(model).__name__} copies weights, which ZeRO-3 "
                "hides, or its ranks run different layers; take stage 2, or recipes/hardware/fsdp.yaml"
            )
        super().connect(model)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build whole: `deepspeed.initialize` shards what `deepspeed.zero.Init` has not."""
        self._init_config_if_needed()
        yield

    def _format_batch_size_and_grad_accum_config(self) -> None:
        module: Any = self.lightning_module
        if module is not None and module.trainer.gradient_clip_val is None:
            assert isinstance(self.config, dict)
            self.config["gradient_clipping"] = getattr(module, "gradient_norm", None) or 0.0  # alignment has its own
        super()._format_batch_size_and_grad_accum_config()

    def setup(self, trainer: Trainer) -> None:
        if self.zero_stage_3:
            self._prepare_sharded()
        super().setup(trainer)

    def _prepare_sharded(self) -> None:
        """Let ZeRO-3 gather weights block by block, and with them those that are read outside the forward pass of their
        own module: they get a zero gradient because no sample has references (`idc.models.hierarchy.add_idle`).

        Gathered linear layer by linear layer, weights would come and go in the midst of what a backward pass computes
        again, other than in the forward pass: selective checkpointing refuses that, which counts each operation.
        And a compiled block is one graph within those hooks, which meets its weights only while they are whole.
        """
        import deepspeed

        module: Any = self.lightning_module
        model, speed = module.transformer, module.speed
        blocks = (*model.blocks, *model.id_blocks)
        deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in blocks}))
        for block in blocks:
            block.register_forward_pre_hook(_differentiable)
        model.run_layers(speed.checkpointing, speed.compile, apart=True)
        if model.id_vlm_projector is not None:
            for parameter in model.id_vlm_projector.parameters():
                deepspeed.zero.register_external_parameter(model, parameter)

    def _initialize_deepspeed_inference(self, model: torch.nn.Module) -> None:
        # Lightning drops all hooks; this one lets averaged weights be loaded (`idc.callbacks.ema`).
        hooks = model._load_state_dict_pre_hooks
        super()._initialize_deepspeed_inference(model)
        model._load_state_dict_pre_hooks = hooks

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}  # the engine saves each rank's part

"""An exponential moving average of the trained weights that stays sharded where they are.

The averages are float32 buffers of a small module attached to the LightningModule as `ema`, with each parameter's
own sharding: they are saved and loaded as part of the model, by any number of ranks. Frozen parameters have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from idc.callbacks.host_averages import HostLerp
from idc.errors import UserError
from idc.models.weight_copy import local, reshard

ATTRIBUTE = "ema"
_PREFIX = f"{ATTRIBUTE}."


class EMAWeights(nn.Module):
    """One float32 buffer per trainable parameter of a module, under the parameter's name with `/` for `.`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.host = HostLerp()
        reshard(module)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                name = original_name(name).replace(".", "/")
                self.register_buffer(name, parameter.detach().to(torch.float32, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMAWeights:
        """Follow the module to its device, but stay float32 where it is cast to half precision."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def to_host(self) -> None:
        """Into host memory, until the module is moved."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            self._buffers[name] = buffer.to("cpu")

    def _save_to_state_dict(self, *args: Any) -> None:
        self.host.wait()
        super()._save_to_state_dict(*args)

    def pairs(self, module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, parameter, average), whole tensors or this rank's shards of both."""
        for (parameter, average), name in zip(self.trained(module), self._buffers, strict=True):
            yield name.replace("/", "."), local(parameter.detach()), local(average)

    def trained(self, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """The parameters themselves (under FSDP2 the sharded ones) and their averages."""
        self.host.wait()
        reshard(module)
        parameters = {original_name(name): parameter for name, parameter in module.named_parameters()}
        return [(parameters[name.replace("/", ".")], average) for name, average in self.named_buffers()]


class EMA(Callback):
    """Keeps the averages after every optimiser step; validation, test and predict run on them.

    average <- d^n average + (1 - d^n) weight, with n = `every_n_steps` and d = min(decay, (1 + s) / (10 + s)) after s
    optimiser steps, so that early averages forget the initial weights.

    It can be turned off, and (except under FSDP2, which loads only what a module has) turned on at a resume.

    Args:
        decay: d, in [0, 1): the decay per optimiser step.
        every_n_steps: optimiser steps between updates; the decay is raised to this power, so the horizon stays.
        offload: keep the averages in host memory while it trains, 4 bytes a trained parameter (of a rank's shard) that
            the device does not take. They are updated in a thread beside the next forward and backward pass, and the
            next optimiser step waits for it. Averages are those of `offload=False`: on a CPU bit for bit, on CUDA but
            for the last bit of a multiplication and addition (2^-23 of the value an update). What computes with them
            (validation, previews) swaps weights and averages through the bus, and back.

    Raises:
        UserError: `decay` outside [0, 1) or `every_n_steps` below 1; to train with ZeRO-3, whose pieces of weights have
            no averages.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1, offload: bool = False) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay={decay}: must be at least 0 and less than 1; 0.999 is usual")
        if every_n_steps < 1:
            raise UserError(f"every_n_steps={every_n_steps}: must be 1 or more")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.updated_at = 0  # the optimiser step of the last update; 0: the averages are not in use yet
        self.is_swapped = False
        self._module: LightningModule | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []  # parameters and averages of the running training
        self._validation = contextlib.ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return {"updated_at": self.updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updated_at = state_dict["updated_at"]

    def decay_at(self, step: int) -> float:
        """The factor of the old average in the update at optimiser step `step` (from 1)."""
        return float(min(self.decay, (1 + step) / (10 + step)) ** self.every_n_steps)

    # Hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and getattr(trainer.strategy, "zero_stage_3", False):
            raise UserError(
                "trainer.callbacks: EMA keeps no averages of what ZeRO-3 has cut in pieces; leave it out "
                "(recipes/hardware/deepspeed_zero3.yaml), or take stage 2, or recipes/hardware/fsdp.yaml"
            )
        if self._module is not pl_module:
            self._module = pl_module
            # One device restores weights before any hook of callbacks: attach when a state with averages comes in.
            pl_module.register_load_state_dict_pre_hook(_attach_for)
            tolerate(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        attach(pl_module)  # under FSDP2: after sharding, before the checkpoint is loaded

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = []
        if not self.updated_at:  # pretrained weights may have been loaded since on_fit_start
            if trainer.global_step:
                rank_zero_warn("The checkpoint has no averaged weights: EMA starts from its weights")
            with torch.no_grad():
                for _, parameter, average in attach(pl_module).pairs(pl_module):
                    average.copy_(parameter)
        if self.offload:  # not before: to load a whole checkpoint into shards, FSDP2 wants all of them on one device
            attach(pl_module).to_host()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.offload and getattr(pl_module, "reference", None) is not None:
            attach(pl_module).host.wait()  # such a stage puts other weights in place within a batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.offload:
            attach(pl_module).host.wait()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if getattr(pl_module, "took_step", None) is False:  # a guard refused it: the weights are those of the last one
            return
        if step // self.every_n_steps > self.updated_at // self.every_n_steps:
            self.update(pl_module, step)

    @torch.no_grad()
    def update(self, pl_module: LightningModule, step: int) -> None:
        """Move the averages towards the weights after optimiser step `step`."""
        # Listed at a training's first update, when FSDP2 has settled which tensors are its shards, and kept: listing
        # takes as long as the update of a small model. From an optimiser step to the next only their values change.
        self._pairs = self._pairs or attach(pl_module).trained(pl_module)
        parameters = [local(parameter.detach()) for parameter, _ in self._pairs]
        averages = [local(average) for _, average in self._pairs]
        weight = 1 - self.decay_at(step)
        if self.offload:
            attach(pl_module).host.start(averages, parameters, weight)
        elif {parameter.dtype for parameter in parameters} == {torch.float32}:
            torch._foreach_lerp_(averages, parameters, weight)
        else:  # one after another, so that there is no second copy of the weights in float32
            for average, parameter in zip(averages, parameters, strict=True):
                average.lerp_(parameter.to(average.dtype), weight)
        self.updated_at = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = []
        if self.offload:
            attach(pl_module).host.wait()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.enter_context(self.swapped())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._validation.close()
        self._pairs = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.is_swapped:
            raise RuntimeError("A checkpoint must not be saved while the averages stand in for the weights")

    # For evaluation, previews and export

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The module computes with the averages inside the block; nothing happens before the first update.

        Each rank exchanges its own shards: no communication, and no second copy where the weights are float32.
        """
        module = self._module
        if module is None or not self.updated_at or self.is_swapped or not hasattr(module, ATTRIBUTE):
            yield
            return
        backup = _exchange(module, {})
        self.is_swapped = True
        try:
            yield
        finally:
            _exchange(module, backup)
            self.is_swapped = False


def swapped(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    """`EMA.swapped()` of the trainer's EMA callback, or a context that does nothing where it has none."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, EMA):
            return callback.swapped()
    return contextlib.nullcontext()


def attach(module: LightningModule) -> EMAWeights:
    """The module's averages, created from its weights on the first call."""
    weights = getattr(module, ATTRIBUTE, None)
    if weights is None:
        weights = EMAWeights(module)
        module.add_module(ATTRIBUTE, weights)
        # DDP would broadcast all buffers before every forward pass.
        ignored = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ())}
        ignored.update(_PREFIX + name for name, _ in weights.named_buffers())
        module._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]  # what DDP reads
    assert isinstance(weights, EMAWeights)
    return weights


def ema_state_dict(module: nn.Module, submodule: str = "") -> dict[str, Tensor]:
    """The state dict of `module`, or of one of its submodules, with averages in place of weights; for export.

    Args:
        module: a LightningModule that `EMA` has trained (without averages, its weights are returned).
        submodule: such as "transformer"; names are relative to it.

    Returns:
        Whole tensors on the CPU in the parameters' dtypes, frozen parameters and buffers included. Under FSDP2 all
        ranks must call it, and each gets everything.
    """
    weights = getattr(module, ATTRIBUTE, None)
    averages = {} if weights is None else {name.replace("/", "."): value for name, value in weights.named_buffers()}
    prefix = f"{submodule}." if submodule else ""
    exported = {}
    reshard(module)
    for name, value in module.state_dict().items():
        name = original_name(name)
        if name.startswith(prefix) and not name.startswith(_PREFIX):
            # An average that lies in host memory goes where its ranks can exchange it.
            tensor = averages.get(name, value).detach().to(value.device)
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            exported[name.removeprefix(prefix)] = tensor.to("cpu", value.dtype, copy=True)
    return exported


@torch.no_grad()
def _exchange(module: LightningModule, backup: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swap weights and averages in place. Where dtypes differ, a swap would round the averages: weights are backed up
    (returned) on the way in and restored from `backup` on the way out."""
    kept = {}
    for name, parameter, average in attach(module).pairs(module):
        if name in backup:
            parameter.copy_(backup[name])
        elif parameter.dtype != average.dtype:
            kept[name] = parameter.to(average.device, copy=True)
            parameter.copy_(average)
        else:
            weight = parameter.clone()
            parameter.copy_(average)
            average.copy_(weight)
    return kept


def original_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _attach_for(module: LightningModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if any(key.startswith(prefix + _PREFIX) for key in state_dict):
        attach(module)
    if isinstance(weights := getattr(module, ATTRIBUTE, None), EMAWeights):
        weights.host.wait()  # before weights or averages change


def tolerate(module: nn.Module) -> None:
    """Let the module load checkpoints with or without averages, whether or not it has any (see `EMA` for FSDP2)."""
    if _settle_averages not in module._load_state_dict_post_hooks.values():
        module.register_load_state_dict_post_hook(_settle_averages)


def _settle_averages(module: nn.Module, incompatible: Any) -> None:
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [key for key in keys if not key.startswith(_PREFIX)]

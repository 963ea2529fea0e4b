"""What a stage does with `Speed`: the same on all ranks, said once, and written beside the other hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from idc.data.ranks import of_all_ranks
from idc.errors import UserError, counted
from idc.models.speed import Speed

if TYPE_CHECKING:
    from idc.models.attention import Choice


def apply_speed(model: Any, speed: Speed, strategy: Any, dtype: torch.dtype, training: bool) -> dict[str, str]:
    """Make an `IDCrafterTransformer` run as `speed` says, before or after it is sharded.

    Args:
        strategy: of the trainer, started; None outside of one, on the CPU.
        dtype: in which the transformer computes.
        training: whether a backward pass comes.

    Returns:
        what was chosen, for a logger: the attention backends that `auto` stands for, and the rest as it was set.

    Raises:
        UserError: on all ranks, for an attention backend that rank 0 cannot run, or that another one lacks.
    """
    names = _chosen_by_rank_0(model, speed, strategy, dtype, training)
    chosen, problem = {}, None
    try:
        chosen = run_as(model, speed, names, training)
    except UserError as error:
        problem = str(error)
    _raise_on_all_ranks(problem, strategy)
    return chosen


def run_as(model: Any, speed: Speed, backends: tuple[str, str], training: bool) -> dict[str, str]:
    """`apply_speed` for attention backends that were chosen, as `backends_for` gives them.

    Raises:
        UserError: where one of them is not installed here.
    """
    from idc.models.attention import set_backend

    torch.set_float32_matmul_precision(speed.matmul_precision)
    set_backend(model, *backends)
    checkpointing = speed.checkpointing if training else "none"
    model.run_layers(checkpointing, speed.compile)
    return {
        "attention": backends[0],
        "attention_of_subjects": backends[1],
        "checkpointing": checkpointing,
        "compile": str(speed.compile).lower(),
        "matmul_precision": speed.matmul_precision,
    }


def backends_for(model: Any, choice: Choice) -> tuple[str, str]:
    """Those of the video's attentions and of the subjects'."""
    if model.config["id_joint_references"]:  # the video's attentions have the subjects' tokens in them, too
        choice = choice.everywhere()
    return choice.name, choice.varying


def computes_in(trainer: Any, dtype: torch.dtype) -> torch.dtype:
    """In what a stage's transformer computes: its own `dtype`, or bfloat16 under the trainer's autocast.

    Args:
        trainer: None outside of one.
    """
    return torch.bfloat16 if trainer is not None and "bf16" in str(trainer.precision) else dtype


def _chosen_by_rank_0(model: Any, speed: Speed, strategy: Any, dtype: torch.dtype, training: bool) -> tuple[str, str]:
    """The backends of the video's attentions and of the subjects'."""
    from idc.models.attention import choose_backend

    device = torch.device("cpu") if strategy is None else strategy.root_device
    rank_0 = strategy is None or strategy.is_global_zero
    names, problem = ("native", "native"), None
    if rank_0:
        try:
            head_dim = model.config["attention_head_dim"]
            choice = choose_backend(device, dtype, head_dim, speed.attention, training, speed.compile)
            names = backends_for(model, choice)
            if device.type == "cuda" or speed.attention != "auto":  # else there was no choice
                rank_zero_info(str(choice))
        except UserError as error:
            problem = str(error)
    if strategy is not None:
        names, problem = strategy.broadcast((names, problem))
    if problem is not None:
        raise UserError(problem)
    return names


def _raise_on_all_ranks(problem: str | None, strategy: Any) -> None:
    """Where some ranks have a problem, all of them raise the same and none waits for another. Without a strategy this
    process works by itself, which others may be waiting for, as where rank 0 mines pairs."""
    told = [problem] if strategy is None else of_all_ranks(problem)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
    if failed:
        others = f" (and on {counted(len(failed) - 1, 'rank')} more)" if failed[1:] else ""
        raise UserError(failed[0] + others)


def optimizer_settings(factory: Any, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for an optimiser on `device`: `fused=True` on CUDA, where its class takes it and the recipe
    does not say otherwise. (PyTorch's fused steps take DTensors.)"""
    if device.type != "cuda":
        return {}
    defaults = factory([torch.nn.Parameter(torch.zeros(1, 1))]).defaults
    free = defaults.get("fused", False) is None and not defaults.get("foreach") and not defaults.get("differentiable")
    return {"fused": True} if free else {}


def keep_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let a state that comes from another kind of device not change whether this optimiser is fused."""
    own = [group.get("fused") for group in optimizer.param_groups]

    def as_here(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [
            {**group, "fused": fused} if "fused" in group else group
            for group, fused in zip(state["param_groups"], own, strict=True)
        ]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(as_here)

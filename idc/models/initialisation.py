"""Initial weights of the transformer: the backbone from scratch, and our blocks from the backbone's layers.

Every draw depends on (seed, parameter name) alone: switching a stage off, or sharding the model, changes no other
parameter. Values are written by tensor methods, because diffusers turns most of `torch.nn.init` into no-ops while it
loads a checkpoint; parameters on the meta device are left alone.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from idc.models.hierarchy import HierarchyBlock, SubjectAttention

if TYPE_CHECKING:
    from idc.models.transformer import IDCrafterTransformer

OURS = "id_"  # every parameter that Wan does not have starts with this


def draw_seed(seed: int | None) -> int:
    """`seed`, or one drawn from torch's global generator."""
    return int(torch.randint(2**31, (), device="cpu")) if seed is None else seed


@torch.no_grad()
def initialise_backbone(model: IDCrafterTransformer, seed: int) -> None:
    """For training from scratch, which at toy scale learns faster from this than from Wan's own Xavier recipe with an
    output of 0: uniform weights within 1 / sqrt(fan-in), and residual gates that start open, at 1 (tests/benchmarks/
    LOG.md has the figures)."""
    for name, parameter in model.named_parameters():
        if name.startswith(OURS) or parameter.is_meta:
            continue
        if name.endswith("scale_shift_table"):
            table = _normal(name, parameter, seed, parameter.shape[-1] ** -0.5)
            if parameter.shape[1] == 6:
                table[:, [2, 5]] = 1.0  # shift, scale, gate of self-attention, then of the feed-forward part
            _fill(parameter, table)
        elif parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            _fill(parameter, _uniform(name, parameter, seed))


@torch.no_grad()
def initialise_id_blocks(model: IDCrafterTransformer, seed: int, gate_bias: float) -> None:
    """Our blocks, from the backbone's current weights, such that the model's output is the backbone's, bit for bit.

    S1 and S2 copy attn1 of their layer, S3 its query from attn2 and its keys and values from attn1 (its keys are
    visual tokens). Only O3 is zero: with O2 or the gate zero as well, the gradient could not leave that point.
    """
    for index, (block, layer) in enumerate(zip(model.id_blocks, model.blocks, strict=False)):
        assert isinstance(block, HierarchyBlock)
        _initialise_block(block, layer, f"id_blocks.{index}.", seed, gate_bias)
    if model.id_subject_embedding is not None:
        model.id_subject_embedding.zero_()
    if model.id_vlm_projector is not None:
        for name, parameter in model.id_vlm_projector.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name == "input_norm.weight" else 0.0)
            else:
                _fill(parameter, _uniform(f"id_vlm_projector.{name}", parameter, seed))


def _initialise_block(block: HierarchyBlock, layer: nn.Module, name: str, seed: int, gate_bias: float) -> None:
    for child_name, child in block.named_children():
        if child_name.endswith("_norm"):
            child.get_parameter("weight").fill_(1.0)
            child.get_parameter("bias").zero_()
        elif isinstance(child, SubjectAttention):
            _copy(child, layer.get_submodule("attn1"))
    if block.inter_subject:
        weight = block.inter_gate.weight
        if not weight.is_meta:
            _fill(weight, _normal(name + "inter_gate.weight", weight, seed, 0.02))
        block.inter_gate.bias.fill_(gate_bias)
    if block.cross_modal:
        for part in ("to_q", "norm_q"):
            _copy(getattr(block.cross_attn, part), getattr(layer.attn2, part))
        for parameter in block.cross_attn.to_out.parameters():
            parameter.zero_()


def _copy(target: nn.Module, source: nn.Module) -> None:
    """Copy the parameters that the target has; LoRA on the source has its base weights elsewhere."""
    originals = {name.replace(".base_layer", ""): parameter for name, parameter in source.named_parameters()}
    for name, parameter in target.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(originals[name])


def _generator(name: str, seed: int) -> torch.Generator:
    # 32 bits, because torch's CPU generator ignores all higher ones of a seed.
    return torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


def _normal(name: str, like: Tensor, seed: int, std: float) -> Tensor:
    return torch.randn(like.shape, generator=_generator(name, seed), device="cpu") * std


def _uniform(name: str, like: Tensor, seed: int) -> Tensor:
    """Within 1 / sqrt(fan-in), all dimensions but the first counting (a patch embedding counts as a linear layer)."""
    bound = 1 / math.sqrt(math.prod(like.shape[1:]))
    return (torch.rand(like.shape, generator=_generator(name, seed), device="cpu") * 2 - 1) * bound


def _fill(parameter: Tensor, value: Tensor) -> None:
    """Write a full tensor into a parameter, sharded (DTensor) or not."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)

"""Operations and seconds of a step of each stage, per rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idc.models.conditioning import Drop
from idc.models.cost import StepFlops, forward_flops, step_flops
from idc.plan.devices import Device
from idc.plan.encoders import vlm_tokens
from idc.plan.memory import Optimiser
from idc.plan.model import Parameters, Structure
from idc.plan.recipe import Layout
from idc.stages.dpo import DPO
from idc.stages.grpo import GRPO
from idc.stages.updates import Contrast
from idc.types import Bucket


@dataclass(frozen=True)
class Operations:
    """Operations of one sample in a training step (of a pair in DPO, of a rollout in GRPO).

    Attributes:
        trained: forward and backward passes. frozen: forward passes without a backward pass, by purpose.
    """

    trained: StepFlops
    frozen: dict[str, int]

    @property
    def total(self) -> int:
        return self.trained.total + sum(self.frozen.values())


def operations(structure: Structure, bucket: Bucket, reference_tokens: int, words: float) -> Operations:
    """Of one sample of a bucket with all its conditions."""
    stage = structure.stage

    def sizes(drop: Drop = Drop.NOTHING) -> dict[str, Any]:
        subjects = bucket.subjects if drop.references else 0
        said = words if drop in (Drop.NOTHING, Drop.REFERENCES) else 0
        return {
            "frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
            "text_tokens": stage.encoders.text.max_length,
            "subject_tokens": (reference_tokens,) * subjects,
            "vlm_tokens": vlm_tokens(stage.encoders, subjects, said),
        }

    trains = {"trainable": structure.trainable, "checkpointing": structure.checkpointing}
    config = structure.config
    if isinstance(stage, GRPO):
        return _of_a_rollout(stage, config, sizes, trains)
    once = step_flops(config, **sizes(), **trains)
    if isinstance(stage, DPO):
        return Operations(once.times(2), {"reference": 2 * once.forward})
    return Operations(once, {})


def _of_a_rollout(
    stage: GRPO, config: dict[str, Any], sizes: Callable[[Drop], dict[str, Any]], trains: dict[str, str]
) -> Operations:
    rollouts = stage.rollouts
    drops, cached = rollouts.sampling.drops, rollouts.cache and not config["id_joint_references"]
    forward = sum(forward_flops(config, **sizes(drop), cached=cached) for drop in drops)
    each = [step_flops(config, **sizes(drop), cached=cached, **trains) for drop in drops]  # type: ignore[arg-type]
    point = StepFlops(*map(sum, zip(*each, strict=True)))
    trained, frozen = point.times(0), {"rollout": rollouts.steps * forward}
    for objective in stage.objectives:
        points = points_of(stage, objective)
        trained = StepFlops(*map(sum, zip(trained, point.times(points), strict=True)))
        for name, wanted in (("reference", objective.needs_reference), ("old policy", objective.needs_old)):
            if wanted:
                frozen[name] = frozen.get(name, 0) + points * forward
    return Operations(trained, frozen)


def points_of(stage: GRPO, objective: Any) -> int:
    """Trained velocities a rollout."""
    if isinstance(objective, Contrast):
        return objective.draws
    return len(stage.rollouts.chosen(0, "plan"))


def sequence_bytes(structure: Structure, bucket: Bucket, reference_tokens: int, ranks: int) -> float:
    """Bytes that a rank sends to the others of its sequence for one sample of a training step (a pair in DPO).

    After `idc.models.sequence_parallel`: around the self-attention of each layer an all-to-all of the queries, keys and
    values of the rank's own tokens, and one of what it attended to; at the end its outputs, whole, to each other rank.
    Each goes back in the backward pass; recomputed layers exchange once more. Of an all-to-all a rank keeps its own
    part. Reference tokens that are joined to the video's are on all ranks, and only their attention's results travel.

    Args:
        reference_tokens: of one reference.
        ranks: of a sequence; 1 sends nothing.
    """
    config, codec = structure.config, structure.stage.encoders.codec
    shape, volume = codec.latent_shape(bucket.frames, bucket.height, bucket.width), math.prod(config["patch_size"])
    own = -(-math.prod(shape[1:]) // volume // ranks)
    joins = config["id_joint_references"]
    tokens = 4 * own + (bucket.subjects * reference_tokens if joins else 0)
    each = structure.stage.compute_dtype.itemsize * (ranks - 1)
    layer = each * tokens * config["num_attention_heads"] * config["attention_head_dim"] / ranks
    outputs = each * own * volume * config["out_channels"]
    layers = config["num_layers"]
    # Where only the id blocks are trained, no gradient goes to what is before the first of them.
    backward = layers - (structure.trainable == "id_blocks" and not joins)
    recomputed = 0 if structure.checkpointing == "none" else layers
    trained = (layers + backward + recomputed) * layer + 2 * outputs
    if isinstance(structure.stage, DPO):
        return 2 * (trained + layers * layer + outputs)  # and the reference's forward pass
    return trained


@dataclass(frozen=True)
class Seconds:
    """Of an optimiser step on one rank.

    Attributes:
        compute: of the transformer's products. optimiser: of weights, states and averages through the memory.
        communication: of weights and gradients between ranks, most of which runs beside the computing.
        sequence: of tokens between the ranks that share a sample; each layer's computing waits for it.
    """

    compute: float
    optimiser: float
    communication: float
    sequence: float = 0.0

    @property
    def total(self) -> float:
        return max(self.compute, self.communication) + self.sequence + self.optimiser


def seconds(
    flops: float,
    parameters: Parameters,
    optimiser: Optimiser,
    layout: Layout,
    device: Device,
    *,
    dtype: str,
    matmul_precision: str,
    average: bool,
    passes: int,
    sent: float = 0.0,
    share: float | None = None,
) -> Seconds:
    """Expected seconds of an optimiser step.

    Args:
        flops: of the step, of one rank.
        passes: forward and backward passes in it.
        sent: bytes in it that a rank sends to the others of its sequence.
        share: of the device's peak that is reached, in place of the assumed one.
    """
    compute = flops / (device.peak(dtype, matmul_precision) * (device.share if share is None else share))
    own = parameters.trained / layout.shards
    # Read weight and gradient, read and write the states, write the weight; the same for the averages.
    moved = own * (12 + 2 * optimiser.states + (12 if average else 0))
    on_one_node = layout.ranks // layout.nodes % layout.sequence == 0
    sequence = sent / (1e9 * (device.link if on_one_node else device.network))
    communication = _communication(parameters, layout, device, passes)
    return Seconds(compute, moved / (1e9 * device.bandwidth), communication, sequence)


def _communication(parameters: Parameters, layout: Layout, device: Device, passes: int) -> float:
    if layout.ranks == 1:
        return 0.0
    inside = layout.shards * layout.nodes <= layout.ranks  # a copy of the weights lies on one node
    between = 1e9 * (device.link if layout.nodes == 1 else device.network)
    within = 1e9 * device.link if inside else between
    each = layout.gathered.itemsize if layout.strategy == "fsdp" else 4
    units = parameters.total - parameters.root_unit  # the root travels in float32
    weights, gradients = each * units + 4 * parameters.root_unit, 4 * parameters.trained
    part = (layout.shards - 1) / layout.shards
    replicas = layout.ranks // layout.shards
    reduced = 2 * (replicas - 1) / replicas * gradients / layout.shards / between
    if layout.strategy in ("fsdp", "zero3"):
        return passes * (2 * weights * part + gradients * part) / within + reduced * passes
    if layout.zero is not None:
        exchanges = passes if layout.zero.stage == 2 else 1
        return (exchanges * gradients * part + weights * part) / within
    return reduced

"""The plan of a run: everything that `idc plan` prints, as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isqrt
from typing import Any, Literal

import torch

from idc.models.cost import StepFlops
from idc.models.sequence_parallel import check_heads
from idc.plan.devices import Device
from idc.plan.encoders import CAPTION_WORDS, Encoder, cached_bytes, encoders_of
from idc.plan.memory import Memory, Optimiser, memory, optimiser_of
from idc.plan.model import Structure, Work, clips_a_pass
from idc.plan.recipe import Layout, Recipe
from idc.plan.samples import Samples, samples_of
from idc.plan.trace import Passed
from idc.plan.work import Operations, Seconds, operations, points_of, seconds, sequence_bytes
from idc.stages.dpo import DPO
from idc.stages.grpo import GRPO
from idc.stages.rollouts import portions
from idc.types import Bucket


@dataclass(frozen=True)
class Change:
    """A change of the settings, and what a rank would take with it."""

    setting: str
    memory: Memory


_A_NODE = 8  # GPUs of a node in recipes/hardware/fsdp.yaml

Tried = tuple[str, dict[str, Any]]  # a change in words, and what it gives to `Plan.memory`


class Plan:
    """What a recipe's run takes on a device.

    Args:
        recipe: as `idc.plan.recipe.read` gives it.
        share: of a device's peak that is assumed to be reached, in place of the device's own.

    Raises:
        UserError: where the transformer's attention heads do not divide over the ranks of a sequence.
    """

    def __init__(self, recipe: Recipe, share: float | None = None) -> None:
        self.recipe, self.stage, self.layout = recipe, recipe.stage, recipe.layout
        self.share = share
        self.structure = Structure(recipe.stage)
        if self.layout.sequence > 1:
            check_heads(self.structure.config["num_attention_heads"], self.layout.sequence)

    # The model and its data -----------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> Samples:
        return samples_of(self.recipe.data)

    @cached_property
    def encoders(self) -> list[Encoder]:
        return encoders_of(self.stage.encoders)

    @cached_property
    def words(self) -> float:
        """Of a caption."""
        return self.samples.words or CAPTION_WORDS

    @cached_property
    def reference_side(self) -> int:
        """Of a reference, in tokens, were it a square: as the toy world draws it, or at the cap of its area."""
        most = isqrt(self.recipe.data.reference_area // 256)
        return min(most, self.samples.reference_side or most)

    @property
    def buckets(self) -> dict[Bucket, float]:
        """Shares of the training batches."""
        return self.samples.shares

    # Batches --------------------------------------------------------------------------------------------------

    @property
    def clips_a_rank(self) -> int:
        """Samples of a rank in a pass; of GRPO, its rollouts in an iteration."""
        return self.recipe.data.batch_size * self.layout.sequence // self.layout.ranks

    @cached_property
    def work(self) -> Work:
        """The pass that takes most memory: the bucket with most tokens."""
        side = self.reference_side

        def size(bucket: Bucket) -> tuple[int, int]:
            shape = self.stage.encoders.codec.latent_shape(bucket.frames, bucket.height, bucket.width)
            return shape[1] * shape[2] * shape[3] // 4 + bucket.subjects * side**2, bucket.subjects

        return Work(max(self.buckets, key=size), self._clips(self.clips_a_rank), side, self.words)

    def _clips(self, samples: int) -> int:
        if isinstance(self.stage, GRPO):
            return portions(samples, self.recipe.data.group_size, self.stage.rollouts.batch)
        return clips_a_pass(self.stage, samples)

    @property
    def passes(self) -> int:
        """Forward and backward passes of an optimiser step."""
        if not isinstance(self.stage, GRPO):
            return self.layout.accumulate
        points = sum(points_of(self.stage, objective) for objective in self.stage.objectives)
        return max(1, self.clips_a_rank // self.work.clips // self.stage.updates) * points

    @property
    def samples_a_step(self) -> float:
        """Over all ranks, in an optimiser step."""
        per_pass = self.recipe.data.batch_size
        return per_pass / self.stage.updates if isinstance(self.stage, GRPO) else per_pass * self.layout.accumulate

    # Memory ---------------------------------------------------------------------------------------------------

    @cached_property
    def averages(self) -> Literal["none", "device", "host"]:
        """Where EMA's averages lie."""
        callback = self.recipe.callback("EMA")
        if callback is None:
            return "none"
        return "host" if getattr(callback, "init_args", {}).get("offload") else "device"

    @property
    def snapshot_bytes(self) -> int:
        """Of a node's host memory that an asynchronous save's copy takes: weights, states and averages, each rank's
        under FSDP2, else once, on the first node. DeepSpeed's saves are not asynchronous."""
        callback, layout = self.recipe.callback("Checkpoint"), self.layout
        if callback is None or layout.zero is not None or not getattr(callback, "init_args", {}).get("asynchronous"):
            return 0
        parameters = self.structure.parameters
        averages = 0 if self.averages == "none" else 4
        whole = 4 * parameters.total + (self.optimiser(on_gpu=False).states + averages) * parameters.trained
        ranks = layout.ranks // layout.nodes if layout.strategy == "fsdp" else 1
        return round(ranks * whole / layout.shards)

    @cached_property
    def keeps_reference(self) -> bool:
        return bool(getattr(self.stage, "needs_reference", False))

    @cached_property
    def resident(self) -> list[Encoder]:
        """Encoders that stay on the device while it trains: all that no cache makes superfluous."""
        cached = self.recipe.data.features is not None
        if isinstance(self.stage, GRPO):
            return [e for e in self.encoders if e.part == "codec" or not cached]
        return [] if cached else self.encoders

    @cached_property
    def rollout_bytes(self) -> int:
        """Of the latents and the recorded steps of an iteration, float32."""
        if not isinstance(self.stage, GRPO):
            return 0
        bucket = self.work.bucket
        channels, frames, height, width = self.stage.encoders.codec.latent_shape(
            bucket.frames, bucket.height, bucket.width
        )
        steps = len(self.stage.rollouts.chosen(0, "plan"))
        return 4 * channels * frames * height * width * self.clips_a_rank * (1 + 3 * steps)

    def optimiser(self, on_gpu: bool) -> Optimiser:
        return optimiser_of(self.stage.optimizer_factory, on_gpu)

    @lru_cache(maxsize=16)  # noqa: B019 - a plan lives as long as the command
    def passed(
        self,
        structure: Structure,
        clips: int,
        gathered: torch.dtype = torch.float32,
        apart: bool = False,
        on_gpu: bool = True,
    ) -> Passed:
        return structure.passed(replace(self.work, clips=clips), gathered, apart, on_gpu)

    def memory(
        self,
        on_gpu: bool = True,
        structure: Structure | None = None,
        clips: int | None = None,
        layout: Layout | None = None,
        averages: Literal["none", "device", "host"] | None = None,
    ) -> Memory:
        """Of a rank; arguments stand in for the recipe's own settings."""
        structure, layout = structure or self.structure, layout or self.layout
        sharded = layout.strategy == "fsdp"
        gathered = layout.gathered if sharded else torch.float32
        apart = layout.strategy == "zero3" or (sharded and self.stage.speed.compile)
        return memory(
            structure.parameters,
            self.passed(structure, self.work.clips if clips is None else clips, gathered, apart, on_gpu),
            self.optimiser(on_gpu),
            layout,
            average=averages or self.averages,
            reference=self.keeps_reference,
            encoders=sum(encoder.bytes for encoder in self.resident),
            rollouts=self.rollout_bytes,
            on_gpu=on_gpu,
        )

    def changes(self, room: float) -> Iterator[Change]:
        """Changes of the settings that make it fit into `room` bytes, the nearest first; of a kind the smallest."""
        kinds = (
            self._recomputing(), self._fewer_clips(), self._averages_to_host(), self._offloaded(), self._spread(),
            self._sharded(),
        )  # fmt: skip
        for kind in (*kinds, *([change] for change in self._smaller_sets())):
            for setting, settings in kind:
                structure = settings.get("structure")
                if structure is not None and structure.checkpointing != self.structure.checkpointing:
                    setting += f"model.init_args.speed.checkpointing={structure.checkpointing}"
                changed = self.memory(**settings)
                if changed.total <= room:
                    yield Change(setting.removesuffix(" and "), changed)
                    break

    @cached_property
    def _lightest(self) -> Structure:
        """The same with all layers recomputed."""
        full = self.structure.checkpointing == "full"
        return self.structure if full else Structure(self.stage, checkpointing="full")

    def _recomputing(self) -> Iterator[Tried]:
        if self.structure.checkpointing == "none":
            yield "", {"structure": Structure(self.stage, checkpointing="attention")}
        if self.structure.checkpointing != "full":
            yield "", {"structure": self._lightest}

    def _fewer_clips(self) -> Iterator[Tried]:
        samples = self.clips_a_rank
        if self._clips(1) == self.work.clips:
            return
        text = (
            f"data.init_args.batch_size={self.recipe.data.batch_size // samples} with "
            f"trainer.accumulate_grad_batches={samples * self.layout.accumulate}"
        )
        if isinstance(self.stage, GRPO):
            text = "model.init_args.rollouts.batch=1"
        yield text, {"clips": self._clips(1)}
        yield f"{text} and ", {"clips": self._clips(1), "structure": self._lightest}

    def _averages_to_host(self) -> Iterator[Tried]:
        if self.averages == "device":
            yield "the EMA callback's init_args.offload=true", {"averages": "host"}

    def _offloaded(self) -> Iterator[Tried]:
        """What DeepSpeed can keep in host memory."""
        zero = self.layout.zero
        if zero is None or (zero.offload_optimizer and (zero.offload_parameters or zero.stage < 3)):
            return
        text = "trainer.strategy.init_args.offload_optimizer=true and "
        optimiser = replace(zero, offload_optimizer=True)
        if not zero.offload_optimizer:
            yield text, {"layout": self.layout.with_zero(optimiser)}
        if zero.stage == 3 and not zero.offload_parameters:
            text += "trainer.strategy.init_args.offload_parameters=true and "
            weights = self.layout.with_zero(replace(optimiser, offload_parameters=True))
            yield text, {"layout": weights}
            yield text, {"layout": weights, "structure": self._lightest}

    def _spread(self) -> Iterator[Tried]:
        """Each sample's tokens over several ranks."""
        groups = self.layout.ranks // self.layout.sequence
        for more in (2, 4, 8):
            ranks = self.layout.sequence * more
            heads = self.structure.config["num_attention_heads"]
            if self.layout.strategy != "fsdp" or heads % ranks or groups % more or self.clips_a_rank > 1:
                continue
            text = (
                f"trainer.strategy.init_args.tensor_parallel_size={ranks} with "
                f"data.init_args.batch_size={groups // more} and "
                f"trainer.accumulate_grad_batches={self.layout.accumulate * more} and "
            )
            yield text, {"layout": replace(self.layout, sequence=ranks), "structure": self._lightest}

    def _sharded(self) -> Iterator[Tried]:
        """Over as many ranks where the weights are not all FSDP2's yet, then over more."""
        for ranks in (self.layout.ranks * more for more in (1, 2, 4, 8, 16)):
            if ranks == 1 or (self.layout.zero is None and ranks <= self.layout.shards):
                continue
            layout = replace(self.layout, strategy="fsdp", ranks=ranks, shards=ranks, zero=None)
            text = f"FSDP2 over {ranks} ranks ({self._how_to_shard(ranks)}) and "
            if self.layout.zero is not None:
                yield text, {"layout": layout}
            yield text, {"layout": layout, "structure": self._lightest}

    def _how_to_shard(self, ranks: int) -> str:
        """The settings of FSDP2 over so many ranks, each with as many samples as now."""
        is_grpo = isinstance(self.stage, GRPO)
        file = f"recipes/hardware/fsdp{'_grpo' * is_grpo}.yaml"
        own = ranks if self.layout.nodes == 1 and ranks < _A_NODE else self.layout.ranks // self.layout.nodes
        a_node = own if ranks % _A_NODE else _A_NODE
        batch, nodes = self.clips_a_rank * ranks // self.layout.sequence, ranks // a_node
        settings = [f"trainer.devices={a_node}"] * (a_node != _A_NODE)
        settings += [f"trainer.num_nodes={nodes}"] * (nodes > 1)
        if settings:
            settings.append(f"data.init_args.batch_size={batch}")
        if settings and not is_grpo and self.samples_a_step % batch == 0:
            settings.append(f"trainer.accumulate_grad_batches={self.samples_a_step // batch:g}")
        if nodes > 1:
            settings[-1] += f": {nodes} nodes of {a_node}"
        if self.layout.strategy != "fsdp":
            return f"{file} with {', '.join(settings)}" if settings else file
        copies = self.layout.shards < self.layout.ranks
        return ", ".join([*["trainer.strategy.init_args.replicas=1"] * copies, *settings])

    def _smaller_sets(self) -> Iterator[Tried]:
        for trainable in ("id_blocks+lora", "id_blocks", "lora"):
            fewer = Structure(self.stage, trainable=trainable, checkpointing="full")
            if trainable != self.structure.trainable and (fewer.config["id_layers"] or trainable == "lora"):
                yield f"model.init_args.trainable={trainable} and ", {"structure": fewer}

    # Operations and time --------------------------------------------------------------------------------------

    @cached_property
    def operations(self) -> dict[Bucket, Operations]:
        """Of a sample of each bucket."""
        tokens = self.reference_side**2
        return {bucket: operations(self.structure, bucket, tokens, self.words) for bucket in self.buckets}

    @cached_property
    def sample(self) -> Operations:
        """Of a sample on average over the buckets."""
        shares = self.buckets
        trained = [
            sum(share * self.operations[bucket].trained[part] for bucket, share in shares.items()) for part in range(3)
        ]
        frozen: dict[str, int] = {}
        for bucket, share in shares.items():
            for name, flops in self.operations[bucket].frozen.items():
                frozen[name] = frozen.get(name, 0) + round(share * flops)
        return Operations(StepFlops(*map(round, trained)), frozen)

    @cached_property
    def sent(self) -> float:
        """Bytes of an optimiser step that a rank sends to the others of its sequence."""
        tokens, ranks = self.reference_side**2, self.layout.sequence
        each = sum(
            share * sequence_bytes(self.structure, bucket, tokens, ranks) for bucket, share in self.buckets.items()
        )
        return each * self.samples_a_step * ranks / self.layout.ranks

    def seconds(self, device: Device) -> Seconds:
        """Of an optimiser step."""
        dtype = str(self.stage.compute_dtype).removeprefix("torch.")
        return seconds(
            self.sample.total * self.samples_a_step / self.layout.ranks,
            self.structure.parameters,
            self.optimiser(device.name.startswith("NVIDIA")),
            self.layout,
            device,
            dtype=dtype,
            matmul_precision=self.stage.speed.matmul_precision,
            average=self.averages == "device",
            passes=self.passes,
            sent=self.sent,
            share=self.share,
        )

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the run; None where the recipe does not say."""
        steps = self.recipe.trainer.max_steps
        return steps if steps is not None and steps > 0 else None

    # Disk -----------------------------------------------------------------------------------------------------

    def cache_of(self, bucket: Bucket) -> int:
        """Bytes of a sample of this bucket in the features cache."""
        pair = isinstance(self.stage, DPO)
        return cached_bytes(self.stage.encoders, bucket, self.reference_side**2, pair, self.words)

    @property
    def cache(self) -> int | None:
        """Bytes of the features cache for all samples; None where it is not known how many they are."""
        if self.samples.assignment is None:
            return None
        every = self.samples.kept + (self.samples.held_out or type(self.samples.kept)())
        return sum(count * self.cache_of(bucket) for bucket, count in every.items())

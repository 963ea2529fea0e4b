"""The model of a recipe without weights: its parameters by part, and the memory of a pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from idc.models.conditioning import Drop
from idc.models.frozen import resolve
from idc.models.rounding import islands, round_matrices, units_of
from idc.models.spec import TransformerSpec
from idc.models.trainable import set_trainable
from idc.plan.encoders import text_tokens, vlm_tokens
from idc.plan.trace import Passed, trace
from idc.stages.base import Stage
from idc.stages.dpo import DPO
from idc.stages.grpo import GRPO
from idc.types import Bucket


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        parts: by name, in all and trained.
        largest_unit: of the largest layer that FSDP2 gathers, as far as its weights travel in the compute dtype.
        root_unit: of what it gathers in float32 for a whole pass.
    """

    parts: dict[str, tuple[int, int]]
    largest_unit: int
    root_unit: int

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.parts.values())

    @property
    def trained(self) -> int:
        return sum(count for _, count in self.parts.values())


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass works on.

    Attributes:
        clips: that it takes at once; pairs count twice.
        reference_side: of a reference, in tokens of 16 pixels: its tokens are the square.
        words: of a caption.
    """

    bucket: Bucket
    clips: int
    reference_side: int
    words: float

    @property
    def reference_tokens(self) -> int:
        return self.reference_side**2


class Structure:
    """The transformer of a stage, as it is trained, without weights.

    Args:
        stage: its settings; nothing of it is changed.
        trainable, checkpointing: in place of its own.
    """

    def __init__(self, stage: Stage, trainable: str | None = None, checkpointing: str | None = None) -> None:
        self.stage = stage
        self.trainable: Any = trainable or stage.trainable_set
        self.checkpointing: Any = checkpointing or stage.speed.checkpointing
        self.config: dict[str, Any] = dict(self._whole.config)

    @cached_property
    def from_recipe(self) -> bool:
        """Whether sizes are the recipe's own, since the weights are a hub's, which nothing is asked of."""
        spec = self.stage.spec
        return (
            spec.pretrained is not None and resolve(spec.pretrained, spec.subfolder, "", marker="config.json") is None
        )

    @property
    def _spec(self) -> TransformerSpec:
        return replace(self.stage.spec, pretrained=None) if self.from_recipe else self.stage.spec

    @property
    def _vlm_dim(self) -> int | None:
        vlm = self.stage.encoders.vlm
        return None if vlm is None else vlm.dim

    @cached_property
    def _whole(self) -> Any:
        return self._spec.build(self.stage.encoders.text.dim, self._vlm_dim, "meta")

    def _trained(self, model: Any) -> Any:
        set_trainable(model, self.trainable, **vars(self.stage.lora))
        return model

    def _build(self, layers: int, id_layers: int, gathered: torch.dtype, apart: bool) -> nn.Module:
        with torch.device("meta"):
            model: Any = type(self._whole).from_config({**self.config, "num_layers": layers, "id_layers": id_layers})
        self._trained(model).run_layers(self.checkpointing, apart=apart)
        round_matrices(model, gathered)
        return model.train()

    @cached_property
    def parameters(self) -> Parameters:
        """Parts and units of the whole model."""
        model = self._trained(self._whole)
        parts: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            part = "adapters (LoRA)" if ".lora_" in name else "hierarchy" if name.startswith("id_") else "backbone"
            counts = parts.setdefault(part, [0, 0])
            counts[0] += parameter.numel()
            counts[1] += parameter.numel() * parameter.requires_grad
        units = [_numel(unit.parameters()) - _numel(islands(unit)) for unit in units_of(model)]
        total = sum(count for count, _ in parts.values())
        return Parameters({name: (a, b) for name, (a, b) in parts.items()}, max(units), total - sum(units))

    def passed(
        self, work: Work, gathered: torch.dtype = torch.float32, apart: bool = False, on_gpu: bool = True
    ) -> Passed:
        """Memory of a pass with these settings, besides weights and their gradients; `gathered` as in
        `idc.stages.sharding.shard`, `apart` as in `idc.models.checkpointing.LayerRunner`, `on_gpu` as in `trace`."""
        build = partial(self._build, gathered=gathered, apart=apart)
        return trace(build, len(self._whole.blocks), len(self._whole.id_blocks), self.loss(work), on_gpu)

    def with_weights(self, device: torch.device) -> nn.Module:
        """The whole model with random weights, ready to be trained."""
        model = self._spec.build(self.stage.encoders.text.dim, self._vlm_dim, device)
        self._trained(model).run_layers(self.checkpointing)
        return model.train()

    def loss(self, work: Work) -> Callable[[nn.Module], Tensor]:
        """The forward pass of the stage: velocities for clips of one size, and their error, on tensors that it makes
        on the default device."""
        stage = self.stage
        shape = stage.encoders.codec.latent_shape(work.bucket.frames, work.bucket.height, work.bucket.width)

        def loss(model: nn.Module) -> Tensor:
            features = self._features(work)
            x_BCTHW, t_B = torch.empty(work.clips, *shape), torch.empty(work.clips)
            stage.transformer = model
            try:
                if isinstance(stage, GRPO):
                    rollouts = stage.rollouts
                    velocity = stage.sampler.guided_velocity(
                        [features], rollouts.sampling, group=work.clips, cached=rollouts.cache
                    )(x_BCTHW, t_B)
                else:
                    condition = stage.encoders.condition([features] * work.clips, Drop.NOTHING).to(torch.float32)
                    velocity = stage.predict_velocity(x_BCTHW, t_B, condition)
            finally:
                stage.transformer = None
            return (velocity - x_BCTHW).square().flatten(1).mean(1).mean()

        return loss

    def _features(self, work: Work) -> dict[str, Tensor]:
        """A sample's features, as the cache has them, without content."""
        encoders, subjects = self.stage.encoders, work.bucket.subjects
        side = 2 * work.reference_side
        features = {f"reference_{k}": torch.empty(encoders.codec.channels, side, side) for k in range(subjects)}
        features["text"] = torch.empty(text_tokens(encoders, work.words), encoders.text.dim, dtype=torch.bfloat16)
        features["text_null"] = features["text"][:1]
        if encoders.vlm is not None:
            for drop in Drop:
                words = 0 if drop in (Drop.TEXT, Drop.BOTH) else work.words
                tokens = vlm_tokens(encoders, subjects if drop.references else 0, words)
                features[drop.vlm] = torch.empty(max(1, tokens), encoders.vlm.dim, dtype=torch.bfloat16)
        return features


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def clips_a_pass(stage: Stage, clips: int) -> int:
    """How many clips go through the transformer at once where a rank has `clips` samples of a pass."""
    if isinstance(stage, DPO):
        return 2 * clips
    return clips

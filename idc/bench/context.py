"""What every command of `idc bench` works with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from idc.bench.setup import WIDE, Setup
from idc.models.attention import Choice, choose_backend
from idc.models.cost import StepFlops, forward_flops, step_flops
from idc.models.speed import Checkpointing, Speed
from idc.stages.speed import backends_for, run_as


@dataclass(frozen=True)
class Bench:
    """A run's sizes, device and settings.

    Attributes:
        dtype: that the transformer computes in.
        speed: how ours runs; the other modes are measured beside it.
        rounds, repeats, warm_up: of `idc.bench.cases.run`.
        recipe: of `--config`, an `idc.plan.recipe.Recipe`; None without.
        options: of the command alone.
        checks: filled while cases are built: what makes the comparison fair.
    """

    setup: Setup
    device: torch.device
    dtype: torch.dtype
    speed: Speed
    rounds: int
    repeats: int
    warm_up: int
    recipe: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """Whether the model is as wide as a published one, and not a toy's."""
        return self.setup.spec.num_attention_heads * self.setup.spec.attention_head_dim >= WIDE

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def with_steps(self, most: int) -> Bench:
        """The same with no more steps of a sampler than these."""
        setup, asked = self.setup, self.options.get("steps")
        sampling = replace(setup.sampling, steps=min(most, setup.sampling.steps))
        return replace(
            self, setup=replace(setup, sampling=sampling), options={**self.options, "steps": min(most, asked or most)}
        )

    def forward_flops(self, model: Any, subjects: int = 0, cached: bool = False) -> int:
        """Of one forward of one video with that many references, and with the VLM's tokens where there are any.

        A model without blocks, and one of diffusers, reads neither.
        """
        return forward_flops(model.config, **self._sizes(model, subjects), cached=cached)

    def step_flops(
        self, model: Any, subjects: int, trainable: str = "full", checkpointing: str = "none", cached: bool = False
    ) -> StepFlops:
        """Of one video's forward and backward pass, as `idc plan` counts them."""
        sizes = self._sizes(model, subjects)
        return step_flops(model.config, **sizes, cached=cached, trainable=trainable, checkpointing=checkpointing)

    def _sizes(self, model: Any, subjects: int) -> dict[str, Any]:
        setup = self.setup
        has_blocks = bool(model.config.get("id_layers"))
        return {
            "frames": setup.frames,
            "height": setup.height,
            "width": setup.width,
            "text_tokens": setup.text_length,
            "subject_tokens": (setup.subject_tokens,) * subjects if has_blocks else (),
            "vlm_tokens": setup.vlm_tokens if has_blocks and setup.vlm_dim is not None else 0,
        }


def apply_speed(bench: Bench, model: Any, speed: Speed, training: bool) -> dict[str, str]:
    """Make a transformer of ours run so, as a stage does; what came of it, in words.

    Raises:
        UserError: for an attention backend that cannot run here.
    """
    head_dim = bench.setup.spec.attention_head_dim
    choice = _choice(bench.device, bench.dtype, head_dim, speed.attention, training, speed.compile)
    chosen = told(run_as(model, speed, backends_for(model, choice), training))
    if not training:
        del chosen["checkpointing"]
    return chosen


def check_attention(bench: Bench, training: bool) -> None:
    """What `apply_speed` would raise for ours, before anything has run."""
    speed = bench.speed
    _choice(bench.device, bench.dtype, bench.setup.spec.attention_head_dim, speed.attention, training, speed.compile)


def told(chosen: Mapping[str, str]) -> dict[str, str]:
    """What `idc.stages.speed.apply_speed` says, in the words of the tables."""
    names = ("attention", "attention_of_subjects", "checkpointing")
    return {**{name: chosen[name] for name in names}, "compile": {"true": "on", "false": "off"}[chosen["compile"]]}


@functools.cache
def _choice(
    device: torch.device, dtype: torch.dtype, head_dim: int, setting: str, training: bool, compiled: bool
) -> Choice:
    return choose_backend(device, dtype, head_dim, setting, training, compiled)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `theirs`."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def default_speed(device: torch.device, recipe: Any, options: Any) -> Speed:
    """What the command line asks for; beyond that the recipe's own, and without one what the recipe for one GPU has: a
    CPU then compiles nothing and recomputes nothing.

    Args:
        recipe: as in `Bench`.
    """
    cuda = device.type == "cuda"
    own = recipe.stage.speed if recipe else Speed(checkpointing="attention" if cuda else "none", compile=cuda)
    return replace(
        own,
        attention=options.attention[0] if options.attention else own.attention,
        checkpointing=cast(Checkpointing, options.checkpointing or own.checkpointing),
        compile=own.compile if options.compile == "auto" else options.compile == "on",
    )


def quiet() -> None:
    """Leave out what diffusers says about itself at every model."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

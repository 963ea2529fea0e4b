"""What every command of `idc bench` works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from idc.bench.setup import Setup
from idc.models.cost import forward_flops
from idc.models.speed import Speed


@dataclass(frozen=True)
class Bench:
    """A run's sizes, device and settings.

    Attributes:
        dtype: that the transformer computes in.
        speed: how ours runs; the other modes are measured beside it.
        rounds, repeats, warm_up: of `idc.bench.cases.run`.
        recipe: tree of the settings of `--config`; empty without.
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
    recipe: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def forward_flops(self, model: Any, subjects: int = 0, cached: bool = False) -> int:
        """Of one forward of one video with that many references, and with the VLM's tokens where there are any.

        A model without blocks, and one of diffusers, reads neither.
        """
        setup = self.setup
        has_blocks = bool(model.config.get("id_layers"))
        return forward_flops(
            model.config,
            setup.frames,
            setup.height,
            setup.width,
            setup.text_length,
            (setup.subject_tokens,) * subjects if has_blocks else (),
            setup.vlm_tokens if has_blocks and setup.vlm_dim is not None else 0,
            cached,
        )


def apply_speed(model: Any, speed: Speed, training: bool) -> dict[str, str]:
    """Make a transformer of ours run so; what came of it, in words."""
    checkpointing = speed.checkpointing if training else "none"
    model.run_layers(checkpointing, speed.compile)
    attention = "native" if speed.attention == "auto" else speed.attention
    model.set_attention_backend(attention)
    settings = {"attention": attention, "compile": "on" if speed.compile else "off"}
    return settings | ({"checkpointing": checkpointing} if training else {})


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `theirs`."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def default_speed(device: torch.device, setup: Setup, options: Any) -> Speed:
    """What the command line asks for, or what the recipe for one GPU has; a CPU compiles nothing by itself."""
    cuda = device.type == "cuda"
    checkpointing = options.checkpointing or ("attention" if cuda else "none")
    return Speed(
        attention=options.attention[0] if options.attention else "auto",
        checkpointing=checkpointing,
        compile=cuda if options.compile == "auto" else options.compile == "on",
    )


def quiet() -> None:
    """Leave out what diffusers says about itself at every model."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

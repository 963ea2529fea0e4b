"""Detectors and a segmenter of the real classes at tiny random sizes, saved as the published weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idc.models.tiny import save_grounding_dino, save_sam

__all__ = ["counted", "noise", "save_all", "save_grounding_dino", "save_owlv2", "save_sam"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_all(root: Path) -> Path:
    """The three of them as `dino`, `owl` and `sam` in `root`."""
    save_grounding_dino(root / "dino")
    save_owlv2(root / "owl")
    save_sam(root / "sam")
    return root


def save_owlv2(root: Path) -> str:
    """OWLv2 that sees pictures of 32 x 32 pixels in 16 patches."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config={**sizes, "vocab_size": 30},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    model.box_head.dense2.weight.data.mul_(0.05)  # or its boxes would be slivers
    model.save_pretrained(root)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root)
    return str(root)


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """How many pictures go through a module at each pass."""
    rows: list[int] = []
    hook = module.register_forward_hook(lambda _, inputs, output: rows.append(_first(output).shape[0]))
    try:
        yield rows
    finally:
        hook.remove()


def _first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output

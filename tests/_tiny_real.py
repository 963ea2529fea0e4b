"""The real classes at tiny random sizes, saved as the published weights are: VAE, UMT5, Qwen2.5-VL, transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from idc.models.tiny import TEXT_DIM, VLM_DIM, WORDS, save_qwen, save_tokenizer, save_umt5

__all__ = ["TEXT_DIM", "VLM_DIM", "WORDS", "save_qwen", "save_tokenizer", "save_umt5", "save_wan", "tiny_vae"]


def tiny_vae() -> Any:
    """Wan's VAE with its 16 channels and 4x8x8 geometry."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def save_wan(root: Path) -> None:
    """All that a Wan checkpoint holds: `vae`, `text_encoder`, `tokenizer`, `transformer`."""
    from diffusers import WanTransformer3DModel

    tiny_vae().save_pretrained(root / "vae")
    save_umt5(root)
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "freq_dim": 32}
    model = WanTransformer3DModel(**sizes, in_channels=16, out_channels=16, text_dim=TEXT_DIM)
    model.save_pretrained(root / "transformer")

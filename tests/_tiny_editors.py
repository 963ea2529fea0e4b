"""Editing pipelines of the real classes at tiny random sizes, saved as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from _tiny_real import save_qwen, save_tokenizer

ROLES = {"pad_token": "<pad>", "eos_token": "</s>"}
SPECIAL = ["<pad>", "<unk>", "</s>"]


def save_kontext(root: Path) -> Path:
    """Flux Kontext with its 16 latent channels and 8x codec; answers are noise, but each seed's own."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    size = save_tokenizer(root / "clip", SPECIAL, end="</s>", model_max_length=12, **ROLES)
    save_tokenizer(root / "t5", SPECIAL, end="</s>", model_max_length=64, **ROLES)
    torch.manual_seed(0)
    small: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = CLIPTextConfig(vocab_size=size, hidden_size=16, max_position_embeddings=12, eos_token_id=2, **small)
    t5 = T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    channels = {"block_out_channels": [4] * 4, "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 16}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**channels, **blocks, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=AutoTokenizer.from_pretrained(root / "clip"),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=AutoTokenizer.from_pretrained(root / "t5"),
        transformer=transformer,
    ).save_pretrained(root / "kontext")
    return root / "kontext"


def save_qwen_edit(root: Path) -> Path:
    """Qwen-Image-Edit (the class that takes several pictures) around a tiny Qwen2.5-VL, in `root`."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    save_qwen(root / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(root / "text_encoder")
    for part in ("tokenizer", "processor"):
        tokenizer.save_pretrained(root / part)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}
    Qwen2VLImageProcessorPil(size=pixels).save_pretrained(root / "processor")
    torch.manual_seed(0)
    AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(root / "vae")
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    QwenImageTransformer2DModel(**sizes, axes_dims_rope=(4, 6, 6)).save_pretrained(root / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(root / "scheduler")
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    }
    index = {"_class_name": "QwenImageEditPlusPipeline", "_diffusers_version": "0.42.0", **classes}
    (root / "model_index.json").write_text(json.dumps(index))
    return root

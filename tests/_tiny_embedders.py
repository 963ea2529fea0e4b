"""Image and text embedders of the real classes at tiny random sizes, saved as the published weights are."""

from __future__ import annotations

from pathlib import Path

import torch

from idc.models.tiny import save_clip, save_tokenizer

__all__ = ["CHAT", "aesthetic_head", "save_clip", "save_gme", "save_siglip"]

CHAT = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


def save_siglip(root: Path) -> Path:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    size = save_tokenizer(root, ["<pad>", "<unk>", "</s>"], end="</s>", pad_token="<pad>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": size, "max_position_embeddings": 12, "projection_size": 16, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(root)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root)
    return root


def save_gme(root: Path) -> Path:
    """Qwen2-VL with vectors of 32 and its tokenizer."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    special = ["<pad>", "<unk>", *CHAT]
    size = save_tokenizer(root, special, pad_token="<pad>", extra_special_tokens=CHAT)
    text = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    roles = {"image": "image_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {f"{role}_token_id": special.index(f"<|{name}|>") for role, name in roles.items()}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=0, **ids)
    Qwen2VLForConditionalGeneration(config).save_pretrained(root)
    return root


def aesthetic_head(seed: int = 0) -> torch.nn.Module:
    """LAION's head as it was trained, dropouts and all; its state dict is the published file's."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Linear(768, 1024),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )
    torch.nn.init.constant_(layers[-1].bias, 5.0)
    return torch.nn.ModuleDict({"layers": layers}).eval()

"""The real classes at tiny random sizes, saved as the published weights are: VAE, UMT5, Qwen2.5-VL, transformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "red", "blue", "ball", "cube", "and", "the", "cat", "meets", "another", "on", "green", "floor"]
NUMBERS = ["Subject", "1", "2", "3", ":"]
TEXT_DIM, VLM_DIM = 16, 32


def save_tokenizer(
    folder: Path, special: list[str], end: str | None = None, words: Sequence[str] = (), **roles: Any
) -> int:
    """Save a word-level tokenizer as a real one is saved; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*special, *WORDS, *NUMBERS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end is not None:
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", special_tokens=[(end, vocabulary[end])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **roles)
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_umt5(root: Path) -> None:
    """`text_encoder` and `tokenizer` under `root`; tokens are 16 wide."""
    from transformers import UMT5Config, UMT5EncoderModel

    special = ["<pad>", "</s>", "<unk>"]
    size = save_tokenizer(root / "tokenizer", special, end="</s>", pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=size, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(root / "text_encoder")


def save_qwen(root: Path, words: Sequence[str] = ()) -> None:
    """Model and tokenizer (which also knows `words`) in `root`; tokens are 32 wide."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    chat = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    special = ["<pad>", "<unk>", *chat]
    size = save_tokenizer(root, special, words=words, pad_token="<pad>", extra_special_tokens=chat)
    roles = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    text = {
        "vocab_size": size,
        "hidden_size": VLM_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": VLM_DIM,
        "fullatt_block_indexes": [1],
    }
    ids = {f"{role}_token_id": special.index(f"<|{name}|>") for role, name in roles.items()}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(root)


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

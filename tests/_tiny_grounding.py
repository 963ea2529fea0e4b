"""Detectors and a segmenter of the real classes at tiny random sizes, saved as the published weights are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from _tiny_real import save_tokenizer


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_all(root: Path) -> Path:
    """The three of them as `dino`, `owl` and `sam` in `root`."""
    save_grounding_dino(root / "dino")
    save_owlv2(root / "owl")
    save_sam(root / "sam")
    return root


def save_grounding_dino(root: Path) -> str:
    """GroundingDINO with 8 queries; pictures are enlarged to a short side of 64 pixels."""
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    # The model knows its separators by BERT's numbers: 101, 102, 1012 (.) and 1029 (?).
    special = ["[PAD]", "<unk>", *(f"[unused{i}]" for i in range(2, 101)), "[CLS]", "[SEP]"]
    fill = [f"[unused{i}]" for i in range(103, 1012)]
    roles = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    save_tokenizer(root, [*special, *fill, "."], words=[], **roles)
    _wrap(root)
    size = 1100
    text = BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=8, encoder_layers=1, decoder_layers=2, d_model=32,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=16,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(root)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(root)
    return str(root)


def _wrap(root: Path) -> None:
    """Make the saved tokenizer put [CLS] and [SEP] around a text, as BERT's does."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root)
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save_pretrained(root)


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


def save_sam(root: Path) -> str:
    """SAM that sees pictures of 64 x 64 pixels."""
    from transformers import SamConfig, SamModel
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 8, "mlp_dim": 16, "num_pos_feats": 8, "window_size": 4, "global_attn_indexes": [1],
    }  # fmt: skip
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        "attention_downsample_rate": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(root)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(root)
    return str(root)

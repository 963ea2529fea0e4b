"""Image-text models at tiny random sizes, saved as published ones are, with a chat template: Qwen2.5-VL, LLaVA and
LLaVA-NeXT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from idc.models.judges import ImageTextJudge
from idc.models.tiny import JUDGE_WORDS as WORDS
from idc.models.tiny import LEVELS, QWEN_TEMPLATE, TURN, save_qwen_judge, save_tokenizer

__all__ = [
    "ANSWER", "LEVELS", "QUESTION", "QWEN_TEMPLATE", "WORDS", "loud", "noise", "save_llava_judge",
    "save_llava_next_judge", "save_qwen_judge",
]  # fmt: skip

QUESTION, ANSWER = "How would you rate the quality of this video?", "The quality of the video is"

LLAVA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: "
    + TURN.replace("IMAGE", "<image>\n")
    + "{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)


_PIXELS = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    """Other pixels at every call."""
    return _PIXELS.integers(0, 256, shape, dtype=np.uint8)


def save_llava_judge(root: Path) -> str:
    """LLaVA in `root`: pictures of 28 x 28 pixels make four tokens each; the tokenizer adds a beginning of its own."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = _save_llava_parts(root, LlavaProcessor, CLIPImageProcessorPil(**_SIDE))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(**sizes)).save_pretrained(root)
    return str(root)


def save_llava_next_judge(root: Path) -> str:
    """LLaVA-NeXT in `root`: as LLaVA, and tiles of 28 x 28 pixels beside each picture, two or four by its shape."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    grids = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    sizes = _save_llava_parts(root, LlavaNextProcessor, LlavaNextImageProcessorPil(**_SIDE, **grids))
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(LlavaNextConfig(**sizes, **grids)).save_pretrained(root)
    return str(root)


_SIDE: Any = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def _save_llava_parts(root: Path, processor: Any, pictures: Any) -> dict[str, Any]:
    """Save tokenizer and processor of a model of LLaVA's kind; its configuration."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = [*WORDS, *LEVELS, "USER", "ASSISTANT"]
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<image>"]}
    size = save_tokenizer(root, special, words=words, **roles)
    tokenizer = AutoTokenizer.from_pretrained(root)
    start = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.backend_tokenizer.post_processor = start
    processor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(root)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **narrow},
        "text_config": {"model_type": "llama", "vocab_size": size, "num_key_value_heads": 2, **narrow},
        "image_token_index": special.index("<image>"),
    }


def loud(judge: ImageTextJudge) -> ImageTextJudge:
    """The judge with weights so large that its answers depend on the question, by wide margins, and with a seventh of
    its words to end them."""
    model = judge.load()._model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    model.generation_config.eos_token_id = list(range(14, len(model.get_input_embeddings().weight), 7))
    return judge

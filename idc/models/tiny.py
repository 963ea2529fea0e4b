"""Networks of the real classes at tiny random sizes, saved as the published weights are.

What they say means nothing. They run the real loading code and the real steps where there are no weights to be had:
the tests' models, and those of recipes/curate.yaml as it stands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from idc.errors import make_folder
from idc.models.aesthetic import AestheticPredictor
from idc.models.embedders import CLIPEmbedder
from idc.models.grounding import GroundingDino, Sam
from idc.models.judges import ImageTextJudge

FOLDER = "data_shards/practice/models"
HEAD = "head.safetensors"
WORDS = ["a", "red", "blue", "ball", "cube", "and", "the", "cat", "meets", "another", "on", "green", "floor"]
NUMBERS = ["Subject", "1", "2", "3", ":"]
TEXT_DIM, VLM_DIM = 16, 32
JUDGE_WORDS = ["How", "would", "you", "rate", "quality", "aesthetics", "of", "this", "video", "image", "?", "The", "is"]
LEVELS = ["excellent", "good", "fair", "poor", "bad"]

TURN = """{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}\
{% endfor %}"""
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    + TURN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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
        "bos_token_id": special.index("<|im_end|>"),  # the published ones lie beyond this vocabulary
        "eos_token_id": special.index("<|im_end|>"),
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
    ids: dict[str, Any] = {f"{role}_token_id": special.index(f"<|{name}|>") for role, name in roles.items()}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(root)


def save_qwen_judge(root: Path, talkative: bool = False) -> str:
    """Qwen2.5-VL in `root`, in the layout of the published one (preprocessor_config.json, no processor_config.json),
    with a chat template.

    Args:
        talkative: its answers depend on the pictures, and some of them end; else it repeats a word for ever.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    save_qwen(root, words=[*JUDGE_WORDS, *LEVELS])
    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(root)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}).save_pretrained(root)
    if talkative:
        _make_talkative(root)
    return str(root)


def _make_talkative(root: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(root)
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]  # a tensor, whatever its module may be
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    model.generation_config.eos_token_id = list(range(0, size, 3))
    model.save_pretrained(root)


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
    stages: Any = {"out_features": ["stage1", "stage2", "stage3"]}  # mypy does not see it among the fields
    text = BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, **stages
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


def save_clip(root: Path, width: int = 768) -> Path:
    """CLIP with 32 x 32 pictures and vectors of `width`; in `root`, as openai/clip-vit-large-patch14 is laid out."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    size = save_tokenizer(root, ["<pad>", "<unk>", "</s>"], end="</s>", pad_token="<pad>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["projection_dim"] = width
    text = {**sizes, "vocab_size": size, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 2}
    text["pad_token_id"] = 0
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)).save_pretrained(root)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root)
    return root


def save_aesthetic_head(root: Path) -> Path:
    """LAION's head at two layers, for the vectors of `save_clip`, as a file in the folder `root`."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    sizes = (768, 16, 1)
    state = {}
    for layer, (before, behind) in enumerate(pairwise(sizes)):
        state[f"layers.{layer}.weight"] = torch.randn(behind, before, generator=generator)
        state[f"layers.{layer}.bias"] = torch.zeros(behind)
    state["layers.1.bias"] += 5  # about the middle of LAION's scale
    root.mkdir(parents=True)
    save_file(state, root / HEAD)
    return root


# In a recipe ---------------------------------------------------------------------------------------------------------


def grounding_dino(folder: str = FOLDER, threshold: float = 0.25, nms: float = 0.7) -> GroundingDino:
    """A tiny GroundingDINO under `folder`, made there the first time."""
    return GroundingDino(_made(folder, "grounding_dino", save_grounding_dino), threshold, nms)


def sam(folder: str = FOLDER) -> Sam:
    """A tiny SAM under `folder`, made there the first time."""
    return Sam(_made(folder, "sam", save_sam))


def clip(folder: str = FOLDER) -> CLIPEmbedder:
    """A tiny CLIP under `folder`, made there the first time."""
    return CLIPEmbedder(_made(folder, "clip", save_clip))


def qwen(folder: str = FOLDER, max_tokens: int = 64) -> ImageTextJudge:
    """A tiny Qwen2.5-VL under `folder` that answers in random words, made there the first time."""
    return ImageTextJudge(_made(folder, "qwen", partial(save_qwen_judge, talkative=True)), "float32", max_tokens)


def aesthetic(folder: str = FOLDER) -> AestheticPredictor:
    """LAION's predictor on the tiny CLIP under `folder`, made there the first time."""
    return AestheticPredictor(str(Path(_made(folder, "aesthetic", save_aesthetic_head)) / HEAD), clip(folder))


def _made(folder: str, name: str, save: Callable[[Path], Any]) -> str:
    """The folder of a network, complete: another process may be making it, too."""
    place = Path(folder) / name
    if not place.is_dir():
        make_folder(place.parent, "folder")
        with _quiet(), tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-") as making:
            save(Path(making) / name)
            with suppress(OSError):  # somebody else was faster, with the same weights
                (Path(making) / name).rename(place)
    return str(place)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of defaults that are beyond so small a vocabulary."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()

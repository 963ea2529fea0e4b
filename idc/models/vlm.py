"""VLM conditioners: caption and reference images together -> C_txt = VLM(C, I), the f_txt of stage 3.

`QwenVLConditioner` is the paper's; `ToyVLM` is a training-free stand-in of the same interface.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.flow.times import generator
from idc.models.conditioners import ToyTextConditioner, clean_caption, sinusoidal
from idc.models.frozen import (
    Frozen,
    aligned,
    check_width,
    dtype_name,
    load_model,
    load_weights,
    resolve,
    token_width,
    torch_dtype,
    weights_identity,
)
from idc.pictures import MOST_ASPECT, resize


class VLMConditioner(Frozen):
    """(Caption, its reference images) -> a sequence of tokens that mixes the two."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the width of a token."""

    def encode(self, captions: Sequence[str], references: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Encode each sample by itself, so that nothing depends on the batch, and pad with zeros on the right.

        Args:
            captions: "" is the null caption.
            references: per sample, float images `[3, H, W]` in [-1, 1] of any sizes, in the order of its subjects;
                an empty sequence is the null variant.

        Returns:
            tokens_BLD and mask_BL (bool, True where a token is real), on the conditioner's device; L is the longest
            sample's length and at least 1.

        Raises:
            UserError: where the two lengths differ or an image is not `[3, H, W]`.
        """
        if len(captions) != len(references):
            raise UserError(f"{len(captions)} captions but {len(references)} lists of references: one each is needed")
        for image in (image for images in references for image in images):
            if image.ndim != 3 or image.shape[0] != 3:
                raise UserError(f"reference image of shape {tuple(image.shape)}: must be [3, H, W]")
        with self.inference():
            samples = self._encode_each(captions, references)
        lengths_B = torch.tensor([len(tokens) for tokens in samples], device=self.device)
        tokens_BLD = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
        return tokens_BLD, torch.arange(tokens_BLD.shape[1], device=self.device) < lengths_B[:, None]

    @abstractmethod
    def _encode_each(self, captions: Sequence[str], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The tokens `[L, D]` of each sample, on the conditioner's device, as if it came alone."""


SYSTEM = "Describe each reference subject, and how the text asks it to look, act and meet the others in the video."
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen_prompt(caption: str, references: int) -> tuple[str, str]:
    """The prompt in Qwen's chat format, as (head, body), with one `<|image_pad|>` an image:

        head: <|im_start|>system\\n{SYSTEM}<|im_end|>\\n<|im_start|>user\\n
        body: Subject 1: {image}\\n ... Subject N: {image}\\n{caption}<|im_end|>\\n<|im_start|>assistant\\n

    The head is the same for all samples, and causal attention keeps its states so: they are not conditions.
    """
    subjects = "".join(f"Subject {k + 1}: {_IMAGE}\n" for k in range(references))
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    return head, f"{subjects}{clean_caption(caption)}<|im_end|>\n<|im_start|>assistant\n"


class QwenVLConditioner(VLMConditioner):
    """Qwen2.5-VL's last hidden states (3584 wide at 7B, after the final norm) over `qwen_prompt`'s body.

    The paper names the model and not the prompt: the prompt is ours. A reference of which one side is more than 200
    times the other is squeezed to that, the most that the model's image processor takes.

    Args:
        path: a folder saved with save_pretrained (model, tokenizer), or a hub id.
        max_pixels: area cap of a reference, in pixels; 28 x 28 of them make one token.
        min_pixels: smaller references are enlarged to it.
        dtype: of weights, activations and output.
        dim: width of a token; None takes it from the local config.json, or the 7B model's 3584 for a hub id.
    """

    weights = "Qwen2.5-VL: config.json, model*.safetensors and the tokenizer"

    def __init__(
        self,
        path: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        max_pixels: int = 256 * 28 * 28,
        min_pixels: int = 4 * 28 * 28,
        dtype: str | torch.dtype = "bfloat16",
        dim: int | None = None,
    ) -> None:
        if not 0 < min_pixels <= max_pixels:
            raise UserError(f"min_pixels={min_pixels}: must be positive and at most max_pixels={max_pixels}")
        self.path, self.max_pixels, self.min_pixels = path, max_pixels, min_pixels
        self.dtype, self._dim = torch_dtype(dtype), dim
        self._tokenizer: Any = None
        self._images: Any = None

    @cached_property
    def dim(self) -> int:
        return self._dim or token_width(self.path, "", self.weights, "hidden_size", published=3584)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            resolve(self.path, "", self.weights)
            resolve(self.path, "", "Qwen2.5-VL's tokenizer", marker="tokenizer_config.json")
            from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

            def small() -> tuple[Any, Any]:
                return AutoConfig.from_pretrained(self.path), AutoTokenizer.from_pretrained(self.path)

            config, self._tokenizer = load_weights(self.path, self.weights, small)
            check_width(self.path, self.dim, config.text_config.hidden_size)
            self._model = load_model(Qwen2_5_VLForConditionalGeneration, self.path, self.weights, self.dtype).model
            aligned(self._model)
            self._images = self._image_processor()
        self._model.to(self.device)
        return self

    def _image_processor(self) -> Any:
        """Qwen's image processor over PIL: the default one, and the whole `Qwen2_5_VLProcessor`, want torchvision."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vision = self._model.config.vision_config
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "weights": weights_identity(self.path),
            "pixels": [self.min_pixels, self.max_pixels],
            "dtype": str(self.dtype),
            "prompt": qwen_prompt("caption", 1),
        }

    def save(self, folder: Path) -> dict[str, Any]:
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.load(self.device)
        # As published: the language head, which only the conditioner leaves out, comes back from the weights' origin.
        whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.path, dtype=self.dtype)
        whole.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        pixels = {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        return {"path": ".", **pixels, "dtype": dtype_name(self.dtype), "dim": self.dim}

    def inputs(self, caption: str, references: Sequence[Tensor]) -> tuple[dict[str, Tensor], int]:
        """The model's keyword arguments for one sample, and the number of tokens in the prompt's head."""
        head, body = qwen_prompt(caption, len(references))
        inputs: dict[str, Tensor] = {}
        if references:
            images = [((_widened(image).clamp(-1, 1) + 1) * 127.5).round().byte() for image in references]
            inputs = dict(self._images(images=[image.numpy() for image in images], return_tensors="pt"))
            merge = self._images.merge_size**2
            head_and_tail = body.split("<|image_pad|>")
            counts = [int(grid.prod()) // merge for grid in inputs["image_grid_thw"]]
            body = "".join(
                part + "<|image_pad|>" * count for part, count in zip(head_and_tail, [*counts, 0], strict=True)
            )
        head_ids, body_ids = (self._tokenizer(text, add_special_tokens=False).input_ids for text in (head, body))
        inputs["input_ids"] = torch.tensor([[*head_ids, *body_ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        # Without these the model takes image tokens for text and gives them no two-dimensional positions.
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._model.config.image_token_id).int()
        return inputs, len(head_ids)

    def _encode_each(self, captions: Sequence[str], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [self._encode_one(*sample) for sample in zip(captions, references, strict=True)]

    def _encode_one(self, caption: str, references: Sequence[Tensor]) -> Tensor:
        inputs, head = self.inputs(caption, references)
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self._model(**inputs, use_cache=False).last_hidden_state[0, head:]


def _widened(image_CHW: Tensor) -> Tensor:
    """The reference in float32 on the CPU; a sliver, which Qwen's processor refuses, with its short side enlarged."""
    longest = max(image_CHW.shape[1:])
    height, width = (max(side, math.ceil(longest / MOST_ASPECT)) for side in image_CHW.shape[1:])
    return resize(image_CHW[None].float().cpu(), height, width)[0]


class ToyVLM(VLMConditioner):
    """A stand-in for a VLM at the toy scale: deterministic, training-free, with the real one's interface.

    The sequence is, per reference, `grid` x `grid` tokens, then the caption's words (`ToyTextConditioner`). A
    reference's token is a fixed random projection of the mean colours of a 4x4 grid inside its cell, plus its cell's
    position, plus a fixed vector of the subject's index. It sees colours and coarse texture, and nothing it says was
    learned.
    """

    cells = 4

    def __init__(self, dim: int = 128, max_words: int = 48, grid: int = 2) -> None:
        if grid < 1:
            raise UserError(f"grid={grid}: must be at least 1; the default is 2")
        self._dim, self.grid = dim, grid
        self._words = ToyTextConditioner(dim, max_words)

    @property
    def dim(self) -> int:
        return self._dim

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        return self

    def _identity(self) -> dict[str, Any]:
        return {"dim": self.dim, "grid": self.grid, "cells": self.cells, "words": self._words.fingerprint, "version": 1}

    def save(self, folder: Path) -> dict[str, Any]:
        return {"dim": self.dim, "max_words": self._words.max_length, "grid": self.grid}

    def _encode_each(self, captions: Sequence[str], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        # The variants of a sample (with and without its text) share their pictures: each is summarised once.
        places = {(k, id(image)): image for images in references for k, image in enumerate(images)}
        summaries = dict(zip(places, self._summaries([k for k, _ in places], list(places.values())), strict=True))
        samples = []
        for caption, images in zip(captions, references, strict=True):
            pictures = [summaries[k, id(image)] for k, image in enumerate(images)]
            samples.append(torch.cat([*pictures, self._words.tokens(caption)]).to(self.device))
        return samples

    def _summaries(self, indexes: Sequence[int], images: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of picture i as subject `indexes[i]`, `[grid * grid, dim]` each, bfloat16."""
        if not images:
            return []
        side = self.grid * self.cells
        pooled = torch.stack([F.adaptive_avg_pool2d(image.float().cpu(), side) for image in images])
        patches_NLD = F.unfold(pooled, self.cells, stride=self.cells).mT
        count, _, width = patches_NLD.shape
        projection = _fixed_normal(f"patch/{width}/{self.dim}", width, self.dim)
        subjects = torch.stack([_fixed_normal(f"subject/{index}", self.dim) for index in indexes])
        offsets = 0.5 * (sinusoidal(self.grid**2, self.dim) + subjects[:, None])
        # One small product a picture (bmm), so that no result depends on the others in the batch. About half the power
        # to the picture; an average pixel has a mean square of about 0.5.
        projected = torch.bmm(math.sqrt(2 / width) * patches_NLD, projection.expand(count, -1, -1))
        return list(((projected + offsets) / math.sqrt(1.5)).bfloat16())


@lru_cache(maxsize=64)
def _fixed_normal(stream: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(0, stream))

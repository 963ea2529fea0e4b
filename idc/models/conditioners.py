"""Text conditioners: captions -> tokens for the backbone's own cross-attention.

`UMT5Conditioner` is Wan's; `ToyTextConditioner` is a training-free encoder of the same interface for the toy scale.
"""

from __future__ import annotations

import html
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from idc.errors import UserError
from idc.flow.times import generator
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


class TextConditioner(Frozen):
    """Captions -> `[B, L, D]` with a fixed L, zero-padded on the right; the backbone attends to the padding."""

    max_length: int

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the width of a token."""

    @abstractmethod
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Encode each caption by itself; "" is the null caption.

        Returns:
            text_BLD `[B, max_length, dim]` on the conditioner's device. A caption's tokens do not depend on the
            other captions (up to the rounding of batched matrix products).
        """


def clean_caption(caption: str) -> str:
    """Wan's cleaning of prompts: ftfy, HTML entities resolved twice, runs of white space made one blank."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5Conditioner(TextConditioner):
    """UMT5 as Wan uses it: encoded with its attention mask, cut to the real length, then zero-padded.

    Args:
        path: a folder in diffusers' layout, or a hub id.
        text_encoder, tokenizer: the subfolders.
        max_length: tokens per caption. Wan was trained with 512 (diffusers' pipeline defaults to 226).
        dtype: of weights, activations and output; Wan's is bfloat16.
        dim: width of a token; None takes it from the local config.json, or UMT5-XXL's 4096 for a hub id.
    """

    weights = "a UMT5 encoder: config.json and model*.safetensors"

    def __init__(
        self,
        path: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        text_encoder: str = "text_encoder",
        tokenizer: str = "tokenizer",
        max_length: int = 512,
        dtype: str | torch.dtype = "bfloat16",
        dim: int | None = None,
    ) -> None:
        if max_length < 1:
            raise UserError(f"max_length={max_length}: must be at least 1; Wan's is 512")
        self.path, self.text_encoder, self.tokenizer = path, text_encoder, tokenizer
        self.max_length, self.dtype, self._dim = max_length, torch_dtype(dtype), dim
        self._tokenizer: Any = None

    @cached_property
    def dim(self) -> int:
        return self._dim or token_width(self.path, self.text_encoder, self.weights, "d_model", published=4096)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            resolve(self.path, self.text_encoder, self.weights)
            resolve(self.path, self.tokenizer, "UMT5's tokenizer", marker="tokenizer_config.json")
            from transformers import AutoConfig, AutoTokenizer, UMT5EncoderModel

            def small() -> tuple[Any, Any]:
                config = AutoConfig.from_pretrained(self.path, subfolder=self.text_encoder)
                return config, AutoTokenizer.from_pretrained(self.path, subfolder=self.tokenizer)

            config, self._tokenizer = load_weights(self.path, self.weights, small)
            check_width(self.path, self.dim, config.d_model)
            self._model = load_model(UMT5EncoderModel, self.path, self.weights, self.dtype, subfolder=self.text_encoder)
            aligned(self._model)
        self._model.to(self.device)
        return self

    def _identity(self) -> dict[str, Any]:
        weights = weights_identity(self.path, self.text_encoder)
        return {
            "weights": weights,
            "tokenizer": self.tokenizer,
            "max_length": self.max_length,
            "dtype": str(self.dtype),
        }

    def save(self, folder: Path) -> dict[str, Any]:
        self.load(self.device)._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder / "tokenizer")
        settings = {"text_encoder": "", "tokenizer": "tokenizer", "max_length": self.max_length, "dim": self.dim}
        return {"path": ".", "dtype": dtype_name(self.dtype), **settings}

    def encode(self, captions: Sequence[str]) -> Tensor:
        with self.inference():
            return self._encode([clean_caption(caption) for caption in captions])

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = self._tokenizer(
            captions,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        mask_BL = tokens.attention_mask
        text_BLD = self._model(tokens.input_ids, mask_BL).last_hidden_state
        # Wan keeps the first n tokens, n the number of real ones, and zeroes the rest.
        kept_BL = torch.arange(self.max_length, device=self.device) < mask_BL.sum(1, keepdim=True)
        return torch.where(kept_BL[..., None], text_BLD, 0)


class ToyTextConditioner(TextConditioner):
    """A deterministic, training-free text encoder: any word has a token, the same in every process.

    A token is the sum of a fixed random vector of its word, of weaker ones of the words up to `context` places away
    (one set of vectors per place, so that "red ball, blue cube" binds red to ball), and of a sinusoidal position;
    each about unit variance. An end mark follows the last word, so that the null caption is not all zeros.

    Args:
        dim: width of a token, even.
        max_length: tokens per caption, the end mark included; a longer caption loses its end.
        context: how many neighbours on either side a token knows of.
    """

    def __init__(self, dim: int = 128, max_length: int = 48, context: int = 2) -> None:
        if dim < 2 or dim % 2:
            raise UserError(f"dim={dim}: must be even and positive; the nearest valid width is {max(2, dim + dim % 2)}")
        if max_length < 1:
            raise UserError(f"max_length={max_length}: must be at least 1; the default is 48")
        self._dim, self.max_length, self.context = dim, max_length, context

    @property
    def dim(self) -> int:
        return self._dim

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        return self

    def _identity(self) -> dict[str, Any]:
        return {"dim": self.dim, "max_length": self.max_length, "context": self.context, "version": 1}

    def save(self, folder: Path) -> dict[str, Any]:
        return {"dim": self.dim, "max_length": self.max_length, "context": self.context}

    def encode(self, captions: Sequence[str]) -> Tensor:
        text_BLD = torch.zeros(len(captions), self.max_length, self.dim, dtype=torch.bfloat16)
        for text_LD, caption in zip(text_BLD, captions, strict=True):
            tokens = self.tokens(caption)
            text_LD[: len(tokens)] = tokens
        return text_BLD.to(self.device)

    def tokens(self, caption: str) -> Tensor:
        """The tokens of one caption without padding, bfloat16 as Wan's, `[L, D]`, on the CPU."""
        words = re.findall(r"\w+|[^\w\s]", caption.lower())[: self.max_length - 1]
        return _toy_tokens((*words, "</s>"), self.dim, self.context)


@lru_cache(maxsize=4096)
def _toy_tokens(words: tuple[str, ...], dim: int, context: int) -> Tensor:
    length, power = len(words), 1.0
    tokens = sinusoidal(length, dim)
    for offset in range(-context, context + 1):
        weight = 1 / (1 + abs(offset))
        power += weight**2
        first, last = max(0, -offset), min(length, length - offset)
        if first < last:
            neighbours = [_word_vector(word, offset, dim) for word in words[first + offset : last + offset]]
            tokens[first:last] += weight * torch.stack(neighbours)
    return (tokens / math.sqrt(power)).bfloat16()


@lru_cache(maxsize=256)
def _positions(length: int, dim: int) -> Tensor:
    frequencies = torch.exp(-math.log(1000 / (2 * math.pi)) * torch.arange(dim // 2) / max(1, dim // 2 - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)


def sinusoidal(length: int, dim: int) -> Tensor:
    """Sinusoidal positions `[length, dim]` of about unit variance, with wavelengths from 2 pi to 1000."""
    return _positions(length, dim).clone()


@lru_cache(maxsize=16384)
def _word_vector(word: str, offset: int, dim: int) -> Tensor:
    return torch.randn(dim, generator=generator(0, f"word/{offset}/{word}"))

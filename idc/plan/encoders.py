"""The frozen encoders of a recipe: their weights, and what they leave on disk for a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from idc.models.codecs import WanVAECodec
from idc.models.conditioners import UMT5Conditioner
from idc.models.conditioning import Encoders
from idc.models.vlm import QwenVLConditioner, ToyVLM
from idc.types import Bucket

# Of the published weights that recipes name by a hub id; a test builds their structures.
PUBLISHED = {"codec": 126_892_531, "text": 5_680_910_336, "vlm": 7_747_169_280}
CAPTION_WORDS = 80  # of a caption, where no index says; the paper's are dense descriptions
TOKENS_A_WORD = 1.4
PROMPT = 20  # tokens of the VLM's prompt around caption and references, about


@dataclass(frozen=True)
class Encoder:
    """One frozen encoder: `parameters` is None where nothing is known of it, `bytes` is of its weights."""

    part: str
    name: str
    parameters: int | None
    bytes: int


def encoders_of(encoders: Encoders) -> list[Encoder]:
    """What is known of a recipe's encoders without loading them."""
    parts = {"codec": encoders.codec, "text": encoders.text, "vlm": encoders.vlm}
    return [_encoder(part, encoder) for part, encoder in parts.items() if encoder is not None]


def _encoder(part: str, encoder: Any) -> Encoder:
    name = type(encoder).__name__
    if not isinstance(encoder, WanVAECodec | UMT5Conditioner | QwenVLConditioner):
        return Encoder(part, name, 0, 0)  # the toy scale's are functions without weights
    subfolder = getattr(encoder, "subfolder", "") or getattr(encoder, "text_encoder", "")
    folder = Path(encoder.path).expanduser() / subfolder
    parameters = sum(_stored(folder)) if folder.is_dir() else PUBLISHED[part]
    return Encoder(part, f"{name} {encoder.path}", parameters, parameters * encoder.dtype.itemsize)


def _stored(folder: Path) -> Iterator[int]:
    """Numbers in each tensor of a folder's safetensors, from their headers; a language head is not loaded."""
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        yield from (
            prod(entry["shape"]) for name, entry in header.items() if name not in ("__metadata__", "lm_head.weight")
        )


def vlm_tokens(encoders: Encoders, subjects: int, words: float = CAPTION_WORDS) -> int:
    """Tokens that stage 3 reads of the VLM for a sample, 0 without one; about, where the length is the tokenizer's."""
    vlm = encoders.vlm
    if vlm is None:
        return 0
    if isinstance(vlm, ToyVLM):
        return vlm.grid**2 * subjects + min(round(words) + 1, vlm._words.max_length)
    most = getattr(vlm, "max_pixels", 256 * 28 * 28) // (28 * 28)
    return (most + 6) * subjects + round(words * TOKENS_A_WORD) + PROMPT


def text_tokens(encoders: Encoders, words: float = CAPTION_WORDS) -> int:
    """Tokens of a caption before padding, about."""
    rate = TOKENS_A_WORD if isinstance(encoders.text, UMT5Conditioner) else 1
    return min(encoders.text.max_length, round(words * rate) + 1)


def cached_bytes(
    encoders: Encoders, bucket: Bucket, reference_tokens: int, pair: bool = False, words: float = CAPTION_WORDS
) -> int:
    """Bytes of a sample in the features cache: clean latents and references in float32, tokens in bfloat16.

    Args:
        reference_tokens: transformer tokens of a reference, of 16 x 16 pixels.
        pair: it holds a worse clip, too.
    """
    codec, subjects = encoders.codec, bucket.subjects
    clip = prod(codec.latent_shape(bucket.frames, bucket.height, bucket.width))
    numbers = 4 * (clip * (2 if pair else 1) + subjects * codec.channels * reference_tokens * 4)
    text = 2 * encoders.text.dim * (text_tokens(encoders, words) + 1)
    if encoders.vlm is None:
        return numbers + text
    variants = ((subjects, words), (subjects, 0.0), (0, words), (0, 0.0))  # with and without references and text
    return numbers + text + 2 * encoders.vlm.dim * sum(vlm_tokens(encoders, *variant) for variant in variants)

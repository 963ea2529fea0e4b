"""From samples to what the transformer reads: clean latents and a `Condition`, encoded now or taken from the cache.

Both ways go through the same per-sample dictionary of features, so that training from cached features is training:

    latents [C, T, H, W]      the clip's clean latents
    loser_latents             those of a preference pair's worse clip
    reference_k [C, H, W]     latents of reference k
    text, text_null [L, D]    text-encoder tokens of the caption, and of the empty caption, without padding
    vlm, vlm_no_text, vlm_no_references, vlm_null [L, D]
                              VLM tokens of caption and references, and with either or both left out

Condition dropout for guidance drops the text, the references or both (facts: 0.1 each; "both" is the unconditional
branch). A dropped text is the empty caption; dropped references are absent, not blank pictures, so they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from idc.errors import UserError
from idc.flow.times import uniform_like
from idc.types import Condition, Sample

if TYPE_CHECKING:
    from idc.models.codecs import Codec
    from idc.models.conditioners import TextConditioner
    from idc.models.vlm import VLMConditioner

Features = Mapping[str, Tensor]


class Drop(Enum):
    """What is left out of a sample's condition."""

    NOTHING = "nothing"
    TEXT = "text"
    REFERENCES = "references"
    BOTH = "both"

    @property
    def text(self) -> str:
        return "text_null" if self in (Drop.TEXT, Drop.BOTH) else "text"

    @property
    def vlm(self) -> str:
        return {
            Drop.NOTHING: "vlm",
            Drop.TEXT: "vlm_no_text",
            Drop.REFERENCES: "vlm_no_references",
            Drop.BOTH: "vlm_null",
        }[self]

    @property
    def references(self) -> bool:
        """Whether the references are kept."""
        return self in (Drop.NOTHING, Drop.TEXT)


@dataclass(frozen=True)
class ConditionDropout:
    """Probabilities, per training sample, of leaving out the text, the references, or both."""

    text: float = 0.1
    references: float = 0.1
    both: float = 0.1

    def __post_init__(self) -> None:
        parts = (self.text, self.references, self.both)
        if min(parts) < 0 or sum(parts) > 1:
            raise UserError(f"condition dropout {parts}: each probability is at least 0 and their sum at most 1")

    def draw(self, seeds_B: Tensor) -> list[Drop]:
        """One `Drop` a sample, from the sample's own seed."""
        bounds = ((self.text, Drop.TEXT), (self.references, Drop.REFERENCES), (self.both, Drop.BOTH))
        drops = []
        for u in uniform_like(seeds_B, "condition_dropout").tolist():
            below = 0.0
            for probability, drop in bounds:
                below += probability
                if u < below:
                    drops.append(drop)
                    break
            else:
                drops.append(Drop.NOTHING)
        return drops


class Encoders:
    """The frozen encoders of one recipe: codec, text and (optionally) VLM.

    A plain object on purpose: frozen encoders in a LightningModule's tree would be sharded, checkpointed and
    averaged. They load at first use, which never comes when all features are cached.
    """

    def __init__(self, codec: Codec, text: TextConditioner, vlm: VLMConditioner | None = None) -> None:
        self.codec, self.text, self.vlm = codec, text, vlm
        self._parts = tuple(part for part in (codec, text, vlm) if part is not None)

    @property
    def fingerprints(self) -> dict[str, str]:
        """By part of the features (`latents`, `references`, `text`, `vlm`): the fingerprint of its encoder."""
        encoders = {"latents": self.codec, "references": self.codec, "text": self.text, "vlm": self.vlm}
        return {part: encoder.fingerprint for part, encoder in encoders.items() if encoder is not None}

    def place(self, device: torch.device) -> None:
        """Say where the encoders shall run; each loads at its first use."""
        for part in self._parts:
            part.device = device

    def unload(self) -> None:
        """Free the encoders' memory, as when everything that training needs is cached."""
        for part in self._parts:
            part.unload()

    @torch.no_grad()
    def features(
        self,
        samples: Sequence[Sample],
        drops: Sequence[Drop] | None = None,
        parts: Sequence[str] = ("text", "vlm", "references", "latents"),
    ) -> list[dict[str, Tensor]]:
        """Per-sample features: cached ones as they are, missing ones encoded.

        Args:
            samples: what to encode; a sample without a clip gets no `latents`.
            drops: encode only the variants that these need; None encodes every variant, for the cache.
            parts: encode only these, with their encoders alone.
        """
        features: list[dict[str, Tensor]] = [dict(sample.features or {}) for sample in samples]
        wanted = [None] * len(samples) if drops is None else list(drops)
        if "text" in parts:
            self._add_text(features, samples, wanted)
        if "vlm" in parts and self.vlm is not None:
            self._add_vlm(features, samples, wanted)
        if "references" in parts:
            self._add_references(features, samples, wanted)
        if "latents" in parts:
            self._add_latents(features, samples)
        return features

    def _add_text(
        self, features: list[dict[str, Tensor]], samples: Sequence[Sample], drops: Sequence[Drop | None]
    ) -> None:
        names = ["text", "text_null"]
        todo = [
            (i, name, samples[i].caption if name == "text" else "")
            for i, drop in enumerate(drops)
            for name in (names if drop is None else [drop.text])
            if name not in features[i]
        ]
        if not todo:
            return
        captions = sorted({caption for _, _, caption in todo})
        encoded = dict(zip(captions, self.text.encode(captions), strict=True))
        for i, name, caption in todo:
            features[i][name] = _without_padding(encoded[caption])

    def _add_vlm(
        self, features: list[dict[str, Tensor]], samples: Sequence[Sample], drops: Sequence[Drop | None]
    ) -> None:
        assert self.vlm is not None
        todo = [
            (i, choice)
            for i, drop in enumerate(drops)
            for choice in (list(Drop) if drop is None else [drop])
            if choice.vlm not in features[i]
        ]
        if not todo:
            return
        captions = ["" if choice in (Drop.TEXT, Drop.BOTH) else samples[i].caption for i, choice in todo]
        references = [[s.image_CHW for s in samples[i].subjects] if choice.references else [] for i, choice in todo]
        tokens_BLD, mask_BL = self.vlm.encode(captions, references)
        for (i, choice), tokens, mask in zip(todo, tokens_BLD, mask_BL, strict=True):
            features[i][choice.vlm] = tokens[mask.bool()]

    def _add_references(
        self, features: list[dict[str, Tensor]], samples: Sequence[Sample], drops: Sequence[Drop | None]
    ) -> None:
        by_size: dict[tuple[int, ...], list[tuple[int, int, Tensor]]] = {}
        for i, (sample, drop) in enumerate(zip(samples, drops, strict=True)):
            for k, subject in enumerate(sample.subjects):
                if f"reference_{k}" not in features[i] and (drop is None or drop.references):
                    by_size.setdefault(tuple(subject.image_CHW.shape), []).append((i, k, subject.image_CHW))
        for group in by_size.values():
            images_BCTHW = torch.stack([image for _, _, image in group]).unsqueeze(2)
            for (i, k, _), latents_CTHW in zip(group, self.codec.encode(images_BCTHW), strict=True):
                features[i][f"reference_{k}"] = latents_CTHW[:, 0]

    def _add_latents(self, features: list[dict[str, Tensor]], samples: Sequence[Sample]) -> None:
        todo = {
            (i, name): clip
            for i, sample in enumerate(samples)
            for name, clip in (("latents", sample.video_CTHW), ("loser_latents", sample.loser_CTHW))
            if name not in features[i] and clip is not None
        }
        if not todo:
            return
        video_BCTHW = torch.stack(list(todo.values()))
        for (i, name), latents_CTHW in zip(todo, self.codec.encode(video_BCTHW), strict=True):
            features[i][name] = latents_CTHW

    def condition(self, features: Sequence[Features], drops: Sequence[Drop] | Drop = Drop.NOTHING) -> Condition:
        """Assemble the batch's condition; `drops` is one for all or one a sample."""
        each = [drops] * len(features) if isinstance(drops, Drop) else list(drops)
        text_BLD = _pad_tokens([f[drop.text] for f, drop in zip(features, each, strict=True)], self.text.max_length)
        vlm_BLD, vlm_mask_BL = None, None
        if self.vlm is not None:
            vlm_BLD, vlm_mask_BL = _stack_tokens([f[drop.vlm] for f, drop in zip(features, each, strict=True)])
        references, sizes = _stack_references(
            [_references(f) if drop.references else [] for f, drop in zip(features, each, strict=True)]
        )
        return Condition(text_BLD, vlm_BLD, vlm_mask_BL, references, sizes)


def _references(features: Features) -> list[Tensor]:
    found: list[Tensor] = []
    while (latents_CHW := features.get(f"reference_{len(found)}")) is not None:
        found.append(latents_CHW)
    return found


def _without_padding(tokens_LD: Tensor) -> Tensor:
    """Drop the zero rows at the end (the padding that Wan's backbone attends to is put back at its full length)."""
    real = tokens_LD.abs().sum(-1).nonzero()
    return tokens_LD[: int(real[-1]) + 1 if len(real) else 1]


def _pad_tokens(tokens: Sequence[Tensor], length: int) -> Tensor:
    """`[L, D]` of several lengths to zero-padded `[B, length, D]`."""
    padded_BLD = tokens[0].new_zeros(len(tokens), length, tokens[0].shape[1])
    for padded_LD, tokens_LD in zip(padded_BLD, tokens, strict=True):
        padded_LD[: len(tokens_LD)] = tokens_LD
    return padded_BLD


def _stack_tokens(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Zero-pad to the longest; the mask is None where there is nothing to mask."""
    lengths = [t.shape[0] for t in tokens]
    longest = max(lengths)
    stacked = _pad_tokens(tokens, longest)
    if min(lengths) == longest:
        return stacked, None
    positions = torch.arange(longest, device=stacked.device)
    return stacked, positions < torch.tensor(lengths, device=stacked.device)[:, None]


def _stack_references(references: Sequence[Sequence[Tensor]]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Per subject, zero-pad the batch's latents to a common size; absent subjects are (0, 0) in the sizes."""
    subjects = max(map(len, references), default=0)
    if subjects == 0:
        return (), None
    example = next(r[0] for r in references if r)
    # In plain numbers: this runs at every training step, and one small tensor a reference would cost a millisecond.
    sizes = [[tuple(r.shape[-2:]) for r in row] + [(0, 0)] * (subjects - len(row)) for row in references]
    stacked, ragged = [], False
    for k in range(subjects):
        each = [row[k] for row in sizes]
        if min(map(min, each)) > 0 and len(set(each)) == 1:
            stacked.append(torch.stack([row[k] for row in references]))
            continue
        ragged = True
        height, width = (max(size[axis] for size in each) for axis in (0, 1))
        padded = example.new_zeros(len(references), example.shape[0], height, width)
        for b, row in enumerate(references):
            if k < len(row):
                padded[b, :, : row[k].shape[-2], : row[k].shape[-1]] = row[k]
        stacked.append(padded)
    return tuple(stacked), torch.tensor(sizes, device=example.device) if ragged else None


def feature_names(subjects: int, vlm: bool) -> Iterable[str]:
    """The names that a complete cache entry holds."""
    yield from ("latents", "text", "text_null", *(f"reference_{k}" for k in range(subjects)))
    if vlm:
        yield from (drop.vlm for drop in Drop)

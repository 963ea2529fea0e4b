"""What the denoising steps of one video share: the subject side of the hierarchical attention, computed once.

S1, S2 and the keys and values of S3 depend on neither t nor the video (see `idc.models.hierarchy`), so every step, and
every member of a GRPO group, reuses them. This is exact: the same operations in the same order, only not again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from idc.errors import UserError


@dataclass(frozen=True)
class SubjectCache:
    """Keys and values of S3, from `IDCrafterTransformer.build_subject_cache`.

    Attributes:
        layers: one (key, value) a block, each `[B, M, heads, head size]`; empty where there is nothing to attend to.
        mask_BM: True where a key is real; None where all are.
        batch: B, the number of conditions.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    mask_BM: Tensor | None
    batch: int

    def expand(self, batch: int) -> SubjectCache:
        """The cache for `batch` videos: each condition serves batch / B consecutive ones.

        A single condition, as a GRPO group shares it, is expanded without a copy; for B videos it is itself.

        Raises:
            UserError: unless `batch` is a positive multiple of B.
        """
        if batch < 1 or batch % self.batch:
            raise UserError(
                f"batch={batch}: must be a multiple of the cache's {self.batch} conditions; the nearest valid choice "
                f"is {max(1, round(batch / self.batch)) * self.batch}"
            )

        if batch == self.batch:
            return self

        def grow(tensor: Tensor) -> Tensor:
            if self.batch == 1:
                return tensor.expand(batch, *tensor.shape[1:])
            return tensor.repeat_interleave(batch // self.batch, dim=0)

        return replace(
            self,
            layers=tuple((grow(key), grow(value)) for key, value in self.layers),
            mask_BM=None if self.mask_BM is None else grow(self.mask_BM),
            batch=batch,
        )

    def bytes(self) -> int:
        """Memory that the keys and values hold (an expanded view counts once)."""
        return sum(tensor.untyped_storage().nbytes() for pair in self.layers for tensor in pair)

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through it to the blocks, as they do not from one built under `no_grad`."""
        return any(tensor.requires_grad for pair in self.layers for tensor in pair)


def memories_of(
    cache: SubjectCache | None, id_blocks: nn.ModuleList, batch: int, training: bool
) -> Sequence[tuple[Tensor, Tensor] | None]:
    """The cached keys and values of each block for that many videos; None where they are computed inline.

    Raises:
        UserError: for a cache of another size, and for one without gradients where the blocks train.
    """
    if cache is None or not cache.layers:
        return [None] * len(id_blocks)
    if cache.batch != batch or len(cache.layers) != len(id_blocks):
        raise UserError(
            f"subject_cache of {cache.batch} samples and {len(cache.layers)} blocks for {batch} videos and "
            f"{len(id_blocks)} blocks: use .expand({batch}), on a cache from this model"
        )
    trained = training and any(parameter.requires_grad for parameter in id_blocks.parameters())
    if torch.is_grad_enabled() and trained and not cache.requires_grad:
        raise UserError("subject_cache was built without gradients, but id_blocks are trained: pass the condition")
    return cache.layers


@dataclass(frozen=True)
class JoinedCaches:
    """The caches of conditions that are evaluated in one batch, such as the two of guidance.

    They may differ in everything, also in having references at all: each is read by its own rows of the batch, so that
    nothing is padded or masked.

    Attributes:
        parts: one a condition, in the order of the rows.
    """

    parts: tuple[SubjectCache, ...]

    def expand(self, batch: int) -> JoinedCaches:
        """For `batch` videos, shared out equally; raises as `SubjectCache.expand` does."""
        count = len(self.parts)
        if batch < 1 or batch % count:
            raise UserError(f"batch={batch}: must be a multiple of the {count} conditions that are joined")
        return JoinedCaches(tuple(part.expand(batch // count) for part in self.parts))

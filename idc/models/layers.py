"""One layer of the transformer, Wan's block and the hierarchical block that follows it, as one function; and them all.

A layer is what is recomputed and compiled as a whole (`idc.models.checkpointing`): between the two nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from idc.models.hierarchy import KeysValues, SubjectLayout


class LayerInputs(NamedTuple):
    """What all layers read alike.

    Attributes:
        text_BLD, modulation: as Wan's block takes them.
        rotary: of the video's tokens; with `joint` of the reference tokens after them, too, and their key mask.
        joint: whether the reference tokens go through Wan's block behind the video's.
        layout, vlm_BMD: as `HierarchyBlock` takes them.
        masks: S3's `mask_BM` of each condition in the batch, which are for as many consecutive rows.
    """

    text_BLD: Tensor
    modulation: Tensor
    rotary: tuple[Any, ...]
    joint: bool
    layout: SubjectLayout | None
    vlm_BMD: Tensor | None
    masks: tuple[Tensor | None, ...]


def run_layer(
    block: nn.Module,
    follow: nn.Module | None,
    video_BLD: Tensor,
    subjects_BSD: Tensor | None,
    given: LayerInputs,
    memories: tuple[KeysValues | None, ...] | None,
) -> tuple[Tensor, Tensor | None]:
    """Z and F of the next layer.

    Args:
        block, follow: Wan's block and the `HierarchyBlock` after it, None where none follows.
        video_BLD, subjects_BSD: Z and F, the latter None without references or with memories.
        memories: S3's keys and values for each of `given.masks`, None where they are computed; None without `follow`.
    """
    if given.joint:
        assert subjects_BSD is not None
        sizes = [video_BLD.shape[1], subjects_BSD.shape[1]]
        sequence = torch.cat([video_BLD, subjects_BSD], dim=1)
        video_BLD, subjects_BSD = block(sequence, given.text_BLD, given.modulation, given.rotary).split(sizes, dim=1)
    else:
        video_BLD = block(video_BLD, given.text_BLD, given.modulation, given.rotary)
    if follow is None:
        return video_BLD, subjects_BSD
    assert memories is not None
    videos = []
    # A block with nothing to read is called as well: FSDP's ranks gather the same layers in step.
    for part, mask_BM, memory in zip(video_BLD.chunk(len(given.masks)), given.masks, memories, strict=True):
        part, subjects_BSD, _ = follow(part, subjects_BSD, given.layout, given.vlm_BMD, mask_BM, memory)
        videos.append(part)
    return videos[0] if len(videos) == 1 else torch.cat(videos), subjects_BSD


def run_all(
    run: Callable[..., Any],
    blocks: Iterable[nn.Module],
    follows: Iterable[nn.Module],
    video_BLD: Tensor,
    subjects_BSD: Tensor | None,
    given: LayerInputs,
    memories: Sequence[Sequence[KeysValues | None]],
) -> Tensor:
    """Z after the last layer.

    Args:
        run: calls a layer's function with its modules and tensors (`idc.models.checkpointing.LayerRunner`).
        blocks, follows: Wan's, and those after the first of them.
        memories: for each of `given.masks`, those of each of `follows`.
    """
    for block, follow, memory in zip_longest(blocks, follows, zip(*memories, strict=True)):
        video_BLD, subjects_BSD = run(run_layer, block, follow, video_BLD, subjects_BSD, given, memory)
    return video_BLD


def run_subjects(
    follow: nn.Module, subjects_BSD: Tensor | None, layout: SubjectLayout | None, vlm_BMD: Tensor | None
) -> tuple[Tensor | None, KeysValues | None]:
    """F of the next layer, and S3's keys and values to be kept; the subject side of `run_layer` alone."""
    _, subjects_BSD, memory = follow(None, subjects_BSD, layout, vlm_BMD)
    return subjects_BSD, memory

"""Fill the features cache: every encoder runs once per sample, before training, and never again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from idc.data.cache import FeatureCache
from idc.data.features import feature_key
from idc.data.ranks import any_rank, wait_for_all_ranks
from idc.models.conditioning import Encoders
from idc.progress import track
from idc.types import Batch, Sample

CHUNK = 256  # samples a file: what a kill can cost


def fill_cache(trainer: Trainer, encoders: Encoders, on_progress: Callable[[str], None]) -> None:
    """Encode what the data module's cache misses, each rank its share, and make the loaders read from it.

    Only the encoders of missing parts are loaded. Interrupted, it continues with the next chunk of 256 samples.

    Args:
        on_progress: told of every batch that is encoded.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    cache: FeatureCache = data.feature_cache(encoders.fingerprints)
    if any_rank(data.missing(cache) > 0):
        for parts, loader in data.encode_dataloaders(cache):
            what = f"encoding {', '.join(parts)}"
            batches = track(_told(loader, what, on_progress), what, len(loader), trainer.is_global_zero)
            encode(batches, parts, encoders, cache, trainer.strategy.root_device)
        wait_for_all_ranks()  # which encode for hours, and need not end together
        encoders.unload()
    data.attach_features(cache)
    _show_unused(cache)


def encode(
    batches: Iterable[Batch],
    parts: Sequence[str],
    encoders: Encoders,
    cache: FeatureCache,
    device: torch.device | str = "cpu",
) -> None:
    """Encode these parts of the batches' samples into the cache, 256 samples a chunk; padding is left out."""
    chunk: dict[str, dict[str, dict[str, Tensor]]] = {}
    bucket: Any = None
    for batch in batches:
        if chunk and (len(chunk) >= CHUNK or batch.bucket != bucket):
            cache.write(bucket, chunk)
            chunk = {}
        bucket = batch.bucket
        samples = batch.to(device).samples[: len(batch) - batch.padding]
        for part in parts:
            for sample, features in zip(samples, encoders.features(samples, parts=[part]), strict=True):
                on_cpu = {name: tensor.cpu() for name, tensor in features.items()}
                chunk.setdefault(_key(sample), {})[part] = on_cpu
    if chunk:
        cache.write(bucket, chunk)


def _told(batches: Iterable[Batch], what: str, on_progress: Callable[[str], None]) -> Iterator[Batch]:
    for done, batch in enumerate(batches, 1):
        yield batch
        on_progress(f"{what}: batch {done}")


def _key(sample: Sample) -> str:
    return feature_key(sample.id, sample.meta["sha256"])


@rank_zero_only
def _show_unused(cache: FeatureCache) -> None:
    """One line about folders that nobody may need any more."""
    from rich.console import Console

    unused = cache.unused()
    if unused:
        folders = ", ".join(f"{path.name} ({size / 1e6:.1f} MB)" for path, size in unused.items())
        Console(stderr=True, soft_wrap=True).print(
            f"{cache.root} also holds features that this run does not read: {folders}; delete what no other run needs",
            highlight=False,
        )

"""Fill the features cache: every encoder runs once per sample, before training, and never again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from idc.data.features import FeatureStore, feature_key
from idc.models.conditioning import Encoders
from idc.types import Sample

CHUNK = 256  # samples a file: what a kill can cost


def fill_cache(trainer: Trainer, encoders: Encoders) -> None:
    """Encode what the data module's cache misses, each rank its share, and make the loaders read from it.

    Interrupted, it continues with the next chunk of 256 samples.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    store = FeatureStore(data.features, {"encoders": encoders.fingerprint, **data.fingerprint()})
    if trainer.strategy.reduce_boolean_decision(data.missing(store) > 0, all=False):
        for loader in data.encode_dataloaders(store):
            _encode(trainer, loader, encoders, store)
        trainer.strategy.barrier("features")
        encoders.unload()
    data.attach_features(store)


def _encode(trainer: Trainer, loader: Any, encoders: Encoders, store: FeatureStore) -> None:
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(elapsed_when_finished=True))
    chunk: dict[str, dict[str, Tensor]] = {}
    with Progress(*columns, console=console, disable=not trainer.is_global_zero) as progress:
        for batch in progress.track(loader, total=len(loader), description="encoding features"):
            samples = batch.to(trainer.strategy.root_device).samples[: len(batch) - batch.padding]
            for sample, features in zip(samples, encoders.features(samples), strict=True):
                chunk[_key(sample)] = {name: tensor.cpu() for name, tensor in features.items()}
            if len(chunk) >= CHUNK:
                store.write(chunk)
                chunk = {}
    if chunk:
        store.write(chunk)


def _key(sample: Sample) -> str:
    return feature_key(sample.id, sample.meta["sha256"])

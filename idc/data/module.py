"""The DataModule: sources -> buckets -> plan -> loaders, for training, validation and filling the features cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from idc.data.buckets import Assignment, BucketRule, assign
from idc.data.cache import FeatureCache
from idc.data.features import feature_key
from idc.data.index import Entry
from idc.data.loader import PlanLoader, check_divisible
from idc.data.plan import HeldOutPlan, MixSource, Plan, groups_of
from idc.data.quarantine import CorruptRate, Quarantine
from idc.data.ranks import DataPlace, any_rank, data_place, of_all_ranks
from idc.data.reader import ReadSettings
from idc.data.sources import Catalogue, Source, source_name
from idc.errors import UserError
from idc.types import Bucket


class Split:
    """The sources of one split, read: their catalogue and the bucket of each entry."""

    def __init__(self, sources: Sequence[Source], rule: BucketRule) -> None:
        indexes = [source.index() for source in sources]
        names = [source_name(source) for source in sources]
        self.catalogue = Catalogue(indexes)
        pairs = [(name, (entry.bucket for entry in index.entries)) for name, index in zip(names, indexes, strict=True)]
        self.assignment: Assignment = assign(pairs, rule)
        self.sources = [
            MixSource(name, buckets, source.weight)
            for name, buckets, source in zip(names, self.assignment.indices, sources, strict=True)
        ]

    def kept(self) -> Iterator[tuple[int, Entry, Bucket]]:
        """(ref, entry, its bucket) of every kept entry."""
        buckets = np.concatenate([source.buckets for source in self.sources]).tolist()
        for ref, bucket in enumerate(buckets):
            if bucket >= 0:
                yield ref, self.catalogue[ref][1], self.assignment.buckets[bucket]

    def only(self, refs: Sequence[int]) -> list[MixSource]:
        """The sources with every other entry dropped."""
        keep = np.zeros(len(self.catalogue), bool)
        keep[list(refs)] = True
        parts = np.split(keep, np.cumsum([len(source.buckets) for source in self.sources])[:-1])
        return [
            replace(source, buckets=np.where(part, source.buckets, -1))
            for source, part in zip(self.sources, parts, strict=True)
        ]


class VideoDataModule(LightningDataModule):
    """Stream shards in the order of a plan.

    Light to construct: what can be checked without data is checked here.

    Args:
        sources: where training samples come from.
        val_sources: held-out samples, also those of `test` and `predict`.
        buckets: [frames, height, width] of each: 4n + 1 frames, sides in multiples of 16 pixels.
        batch_size: samples of a training step over all ranks.
        val_batch_size: the same for held-out samples; `batch_size` by default.
        num_workers: reading processes a rank.
        prefetch: batches that each of them reads ahead.
        seed: of the order and of every sample's noise, time and window.
        epoch_size: samples of a virtual epoch; by default all that fit a bucket.
        group_size: a training batch has every sample that many times in a row, for GRPO's groups of rollouts;
            `batch_size` counts the rollouts.
        decode_clips: False leaves out the training clips themselves, for stages that read captions and references.
        reference_area: cap of a reference's area in pixels; n transformer tokens cover 256 n pixels.
        max_subjects: references of a sample beyond these are left out, the first stay.
        max_upscale, max_crop: see `BucketRule`.
        random_window: draw the window and the crop of clips larger than their bucket; otherwise the first frames and
            the centre. A features cache implies the latter.
        features: folder of the features cache; the stage computes what is missing and calls `attach_features`.
        decode_references: with cached features, decode the training samples' reference pictures all the same (those
            of held-out samples are: previews show them).
        quarantine: file of the samples that could not be read; None keeps no file.
        max_corrupt_rate: the run stops above this share of them.
        allow_mix_change: resume although data, weights, buckets or batch size are not the checkpoint's.

    Raises:
        UserError: for a value that breaks its rule.
    """

    def __init__(
        self,
        sources: list[Source],
        buckets: list[list[int]],
        batch_size: int,
        val_sources: list[Source] | None = None,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        prefetch: int = 2,
        seed: int = 0,
        epoch_size: int | None = None,
        group_size: int = 1,
        decode_clips: bool = True,
        reference_area: int = 1024 * 256,
        max_subjects: int = 4,
        max_upscale: float = 1.1,
        max_crop: float = 0.5,
        random_window: bool = True,
        features: str | None = None,
        decode_references: bool = True,
        quarantine: str | None = None,
        max_corrupt_rate: float = 0.02,
        allow_mix_change: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 1),
            ("seed", seed, 0),
            ("epoch_size", epoch_size, 1),
            ("group_size", group_size, 1),
            ("reference_area", reference_area, 256),
        ):
            if value is not None and value < least:
                raise UserError(f"{name}={value}: must be {least} or more")
        groups_of(batch_size, group_size)
        CorruptRate(0, max_corrupt_rate)
        self.rule = BucketRule(tuple(map(tuple, buckets)), max_subjects, max_upscale, max_crop)
        self.sources, self.val_sources = list(sources), list(val_sources or ())
        _check_names(self.sources, self.val_sources)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.prefetch, self.seed = num_workers, prefetch, seed
        self.epoch_size, self.random_window = epoch_size, random_window
        self.group_size, self.decode_clips = group_size, decode_clips
        self.reference_area, self.decode_references = reference_area, decode_references
        self.features, self.quarantine = features, Quarantine(quarantine)
        self.max_corrupt_rate, self.allow_mix_change = max_corrupt_rate, allow_mix_change
        self._splits: dict[str, Split] = {}
        self._cache: FeatureCache | None = None
        self._loaders: list[PlanLoader] = []

    # Preparation ----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make toy shards that are missing (once a node)."""
        for source in (*self.sources, *self.val_sources):
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the indexes, assign buckets, and print on rank 0 what was kept and what was dropped and why.

        Raises:
            UserError: a source without index or usable samples, or an epoch that does not fill one batch. It is raised
                here so that it comes before the stage fills the features cache, which may take hours.
        """
        if stage in (None, "fit"):
            check_divisible(self.batch_size, data_place(self.trainer).ranks)
            self._read("train", self.sources)
            self.plan()
        if self.val_sources:
            self._read("held out", self.val_sources)
            if "train" in self._splits:
                self._warn_of_the_same_samples()
        elif stage not in (None, "fit"):
            raise UserError(f"val_sources=[]: {stage} runs on held-out data; name at least one source")

    def _read(self, name: str, sources: Sequence[Source]) -> None:
        if name not in self._splits:
            self._splits[name] = Split(sources, self.rule)
            self.show_buckets(name)

    @rank_zero_only
    def _warn_of_the_same_samples(self) -> None:
        """Of those that a run trains on and is validated on: its held-out curves would only show what it has learned by
        heart. A warning, because an overfitting run is a wanted thing."""
        held_out = {entry.sha256: entry.id for _, entry, _ in self._splits["held out"].kept()}
        both = {entry.sha256 for _, entry, _ in self._splits["train"].kept() if entry.sha256 in held_out}
        if both:
            first = min(held_out[sha256] for sha256 in both)
            rank_zero_warn(
                f"data.init_args.val_sources: {len(both)} of {len(held_out)} held-out samples are in sources too, byte "
                f"for byte, such as {first}: what is measured on them is not held out; split them apart"
            )

    @rank_zero_only
    def show_buckets(self, name: str) -> None:
        """Print what the buckets keep and drop of the samples "train" or "held out"; on rank 0."""
        from rich.console import Console

        size = self.batch_size if name == "train" else 1
        table = self._splits[name].assignment.table(size)
        table.title = f"{name}: {table.title}"
        Console(stderr=True).print(table)

    def kept(self) -> Iterator[tuple[str, Entry]]:
        """("train" or "held out", entry) of every kept sample (after `setup`)."""
        for name, split in self._splits.items():
            for _, entry, _ in split.kept():
                yield name, entry

    # Features -------------------------------------------------------------------------------------------------

    def feature_cache(self, encoders: Mapping[str, str]) -> FeatureCache:
        """The cache in the folder `features` for encoders of these fingerprints, by part."""
        if self.features is None:
            raise UserError("data.init_args.features=null: name a folder for the features cache")
        return FeatureCache(self.features, encoders, self.reference_area)

    def missing(self, cache: FeatureCache) -> int:
        """How many kept samples of all splits, quarantined ones apart, lack features."""
        return sum(len(refs) for split in self._splits.values() for refs in self._missing(split, cache).values())

    def encode_dataloaders(self, cache: FeatureCache) -> list[tuple[tuple[str, ...], PlanLoader]]:
        """(parts, loader over the samples that lack just these, each once, with the window that is cached).

        The last `padding` samples of a batch are to be left out; keys come from `feature_key`. With a trainer, all its
        processes must call this together: they take rank 0's list of what is missing, as their own listings of a shared
        folder may differ, and ranks with different numbers of batches would wait for each other for ever.
        """
        missing = {name: self._missing(split, cache) for name, split in self._splits.items()}
        if self.trainer is not None:
            missing = self.trainer.strategy.broadcast(missing)
        loaders, place = [], data_place(self.trainer).alone
        for name, split in self._splits.items():
            for parts, refs in missing[name].items():
                size = self.batch_size if name == "train" else self.val_batch_size
                settings = ReadSettings(self.reference_area, random_window=False, decode_video="latents" in parts)
                loaders.append((parts, self._held_out_loader(split, size, split.only(refs), settings, place)))
        return loaders

    def attach_features(self, cache: FeatureCache) -> None:
        """Read features from `cache` instead of decoding clips, from the next loader on.

        Raises:
            UserError: samples are missing in it.
        """
        cache.refresh()
        for reasons in of_all_ranks(dict(self.quarantine.reasons)):
            self.quarantine.know(reasons)  # without a file, each rank has met its own
        missing = self.missing(cache)
        lacking = f"{cache.root}: {missing} samples lack cached features; let the stage compute them"
        self._agree(UserError(lacking) if missing else None)
        self._cache = cache

    def _missing(self, split: Split, cache: FeatureCache) -> dict[tuple[str, ...], list[int]]:
        """Refs by the parts that they lack."""
        bad = self.quarantine.load().reasons
        found: dict[tuple[str, ...], list[int]] = {}
        for ref, entry, bucket in split.kept():
            parts = cache.missing(bucket, feature_key(entry.id, entry.sha256))
            if parts and entry.id not in bad:
                found.setdefault(parts, []).append(ref)
        return found

    # Loaders --------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The training plan (after `setup`)."""
        split = self._splits["train"]
        return Plan(
            split.sources, split.assignment.buckets, self.batch_size, self.seed, self.epoch_size, self.group_size
        )

    def train_dataloader(self) -> PlanLoader:
        """This rank's training batches; its state is in Lightning's checkpoints."""
        plan = self.plan()
        trainer = self.trainer
        keep_references = self._cache is None or self.decode_references
        return self._loader(
            plan,
            self._splits["train"].catalogue,
            replace(
                self._settings(self.random_window),
                decode_references=keep_references,
                decode_video=self.decode_clips,
            ),
            limit=None if trainer is None else batches_of(trainer.limit_train_batches, len(plan)),
            overfit=bool(getattr(trainer, "overfit_batches", 0)),
            allow_mix_change=self.allow_mix_change,
        )

    def val_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """Every held-out sample once, in fixed order and with fixed seeds; the same number of batches on all ranks."""
        if "held out" not in self._splits:
            return []
        split = self._splits["held out"]
        return self._held_out_loader(split, self.val_batch_size, split.sources, self._settings(random_window=False))

    def test_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """The held-out samples."""
        return self.val_dataloader()

    def predict_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """The held-out samples."""
        return self.val_dataloader()

    def _settings(self, random_window: bool) -> ReadSettings:
        return ReadSettings(self.reference_area, random_window and self._cache is None, self._cache)

    def _held_out_loader(
        self,
        split: Split,
        size: int,
        sources: Sequence[MixSource],
        settings: ReadSettings,
        place: DataPlace | None = None,
    ) -> PlanLoader:
        place = place or data_place(self.trainer)
        plan = HeldOutPlan(sources, split.assignment.buckets, size, self.seed, place.ranks)
        return self._loader(plan, split.catalogue, settings, place)

    def _loader(
        self,
        plan: Plan | HeldOutPlan,
        catalogue: Catalogue,
        settings: ReadSettings,
        place: DataPlace | None = None,
        **kwargs: Any,
    ) -> PlanLoader:
        place = place or data_place(self.trainer)
        loader = PlanLoader(
            plan,
            catalogue,
            settings,
            rank=place.rank,
            world=place.ranks,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            quarantine=self.quarantine,
            max_corrupt_rate=self.max_corrupt_rate,
            agree=self._agree,
            **kwargs,
        )
        self._loaders.append(loader)
        return loader

    def _agree(self, error: UserError | None) -> None:
        """Raise an error on all ranks where one of them has met it. All must call this together."""
        if any_rank(error is not None):
            texts = of_all_ranks(error and str(error))
            raise error or UserError(next(text for text in texts if text))

    def teardown(self, stage: str | None = None) -> None:
        """Stop all reading processes."""
        while self._loaders:
            self._loaders.pop().close()

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown()


def batches_of(limit: float | int | None, batches: int) -> int | None:
    """How many of an epoch's batches Lightning's `limit_train_batches` leaves: a share (float) or a number (int)."""
    if limit is None:
        return None
    return int(batches * limit) if isinstance(limit, float) else min(limit, batches)


def _check_names(train: Sequence[Source], held_out: Sequence[Source]) -> None:
    """Ids start with the source's name: two sources with one name would mix up quarantine and features."""
    if not train:
        raise UserError("sources=[]: name at least one source of training samples")
    for sources in (train, held_out):
        names = [source_name(source) for source in sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two sources are called {twice!r}: give one of them another name=")
    paths = {source_name(source): source.path for source in train}
    for source in held_out:
        name = source_name(source)
        if paths.get(name, source.path) != source.path:
            raise UserError(
                f"the name {name!r} stands for {paths[name]} in sources and for {source.path} in val_sources: "
                f"give one of them another name="
            )

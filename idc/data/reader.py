"""What a loader's worker does: read the samples of a task, replace those that cannot be read, pack them to travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from idc.data.cache import FeatureCache
from idc.data.features import feature_key
from idc.data.images import cover_crop, fit_reference
from idc.data.index import Entry
from idc.data.plan import GlobalBatch, draw, seed_for
from idc.data.scan import is_clip, reference_number
from idc.data.shards import LOSER, SampleError, clip_ext, parse_sample, read_members
from idc.data.sources import Catalogue
from idc.types import Bucket, Sample, Subject

ATTEMPTS = 64  # replacements tried before a bucket counts as unreadable
_ALIGN = 16  # bytes; every dtype's size divides it


@dataclass(frozen=True)
class ReadSettings:
    """How samples are read.

    Attributes:
        reference_area: cap of a reference's area in pixels; n transformer tokens cover 256 n pixels.
        random_window: where a clip is longer or wider than its bucket, draw the window and the crop from the sample's
            seed; False takes the first frames and the centre (held-out data, and whatever is cached).
        features: a cache that has every sample: the clip is then neither read nor decoded.
        decode_video: False leaves out the clip, whose bytes are still compared with the index.
        decode_references: False leaves out the reference pictures (with features only, where their latents and the
            VLM's tokens take their place).
        verify: compare each sample's bytes with the index's sha256.
    """

    reference_area: int = 1024 * 256
    random_window: bool = True
    features: FeatureCache | None = None
    decode_video: bool = True
    decode_references: bool = True
    verify: bool = True


def read_for_bucket(root: str, entry: Entry, bucket: Bucket, seed: int, settings: ReadSettings) -> Sample:
    """One sample as its bucket wants it.

    Returns:
        the sample with video uint8 `[T, C, H, W]` (or None), references float in [-1, 1] at most
        `reference_area` large, and the first `bucket.subjects` of them.

    Raises:
        SampleError: anything wrong with it.
    """
    if settings.features is not None:
        return _read_cached(root, entry, bucket, settings)
    files = read_members(root, entry, settings.verify)
    sample = parse_sample(files, entry, decode_video=False)
    video_TCHW = loser_TCHW = None
    if settings.decode_video:
        video_TCHW = _window(files, entry, bucket, seed, settings.random_window)
        if clip_ext(files, LOSER):  # the same window as the winner's
            loser_TCHW = _window(files, entry, bucket, seed, settings.random_window, LOSER)
    return replace(
        sample,
        video_CTHW=video_TCHW,
        loser_CTHW=loser_TCHW,
        subjects=_subjects(sample, bucket, settings),
        meta={**sample.meta, "sha256": entry.sha256},
    )


def _read_cached(root: str, entry: Entry, bucket: Bucket, settings: ReadSettings) -> Sample:
    """Caption, references and cached features; the bytes of the clip are not touched."""
    assert settings.features is not None
    keep = [
        member
        for member in entry.members
        if not is_clip(member.ext) and (settings.decode_references or reference_number(member.ext) < 0)
    ]
    light = replace(entry, layout=Entry.pack(keep))
    if not settings.decode_references:
        light = replace(light, bucket=entry.bucket._replace(subjects=0))
    sample = parse_sample(read_members(root, light, verify=False), light, decode_video=False)
    try:
        features = settings.features.read(bucket, feature_key(entry.id, entry.sha256))
    except KeyError:
        raise SampleError("no cached features") from None
    meta = {**sample.meta, "sha256": entry.sha256}
    return replace(sample, subjects=_subjects(sample, bucket, settings), features=features, meta=meta)


def _subjects(sample: Sample, bucket: Bucket, settings: ReadSettings) -> tuple[Subject, ...]:
    return tuple(
        replace(subject, image_CHW=fit_reference(subject.image_CHW, settings.reference_area))
        for subject in sample.subjects[: bucket.subjects]
    )


def _window(
    files: Mapping[str, bytes], entry: Entry, bucket: Bucket, seed: int, random: bool, prefix: str = ""
) -> Tensor:
    """The bucket's frames of the clip, scaled and cropped: uint8 `[T, C, H, W]`."""
    from idc.data.video import VideoError, decode_video

    ext = clip_ext(files, prefix)
    if ext is None:
        raise SampleError("missing member: no clip (.mp4 or .webm)")
    spare = entry.bucket.frames - bucket.frames
    start = draw(seed, "window", spare + 1) if random else 0
    try:
        video_THWC = decode_video(files[ext], start, bucket.frames)
    except VideoError as error:
        raise SampleError(f"broken {ext}: {error}") from error
    if video_THWC.shape[1:3] != (entry.bucket.height, entry.bucket.width):
        got = f"{video_THWC.shape[1]}x{video_THWC.shape[2]}"
        raise SampleError(f"wrong size: the clip is {got}, the index says {entry.bucket.height}x{entry.bucket.width}")
    offset = (draw(seed, "top", 1001) / 1000, draw(seed, "left", 1001) / 1000) if random else (0.5, 0.5)
    return cover_crop(torch.from_numpy(video_THWC).permute(0, 3, 1, 2), bucket.height, bucket.width, offset)


class Task(NamedTuple):
    """Batch `number` of an epoch; `epoch` enters the seeds, `bad` (id -> reason) are known-bad ones of the refs."""

    number: int
    epoch: int
    part: GlobalBatch
    bad: Mapping[str, str]


class Slot(NamedTuple):
    """What came of one place of a batch; `failed` are (ref, reason) of the samples that could not be read for it."""

    sample: Sample | None
    ref: int
    seed: int
    failed: Sequence[tuple[int, str]]


class Parcel:
    """The slots of a task. Pickling moves all tensors into one buffer: a single segment of shared memory a batch."""

    def __init__(self, task: Task, slots: Sequence[Slot]) -> None:
        self.task, self.slots = task, slots

    def __getstate__(self) -> dict[str, Any]:
        tensors: list[Tensor] = []
        light = [slot._replace(sample=slot.sample and _strip(slot.sample, tensors)) for slot in self.slots]
        buffer, layout = _pack(tensors)
        return {"task": self.task, "slots": light, "buffer": buffer, "layout": layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = iter(_unpack(state["buffer"], state["layout"]))
        self.task = state["task"]
        self.slots = [slot._replace(sample=slot.sample and _fill(slot.sample, tensors)) for slot in state["slots"]]


class BatchReader(Dataset[Parcel]):
    """Reads tasks. A sample that cannot be read is replaced by another of its bucket.

    Which one depends on (seed, epoch, sample id, attempt) alone, so a resumed run, which knows the bad ones already and
    does not decode them again, sees the same order.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        buckets: Sequence[Bucket],
        pools: Sequence[np.ndarray],
        seed: int,
        settings: ReadSettings,
        group_size: int = 1,
    ) -> None:
        self.catalogue, self.buckets, self.pools, self.seed = catalogue, buckets, pools, seed
        self.settings, self.group_size = settings, group_size
        self._bad: dict[str, str] = {}

    def __getitem__(self, task: Task) -> Parcel:
        self._bad.update(task.bad)
        part = task.part
        return Parcel(
            task,
            [
                self._slot(int(ref), part.bucket, task.epoch, int(repeat))
                for ref, repeat in zip(part.refs, part.repeats, strict=True)
            ],
        )

    def _slot(self, ref: int, bucket: int, epoch: int, repeat: int) -> Slot:
        name = self.catalogue[ref][1].id
        seed = seed_for(self.seed, epoch, name, repeat)
        # The members of a group are repeats of one sample: what takes its place must be one sample, too.
        shared = seed if self.group_size == 1 else seed_for(self.seed, epoch, name, repeat // self.group_size)
        failed: dict[int, str] = {}
        for attempt in range(ATTEMPTS + 1):
            root, entry = self.catalogue[ref]
            reason = self._bad.get(entry.id)
            if reason is None:
                try:
                    sample = read_for_bucket(root, entry, self.buckets[bucket], seed, self.settings)
                    return Slot(sample, ref, seed, tuple(failed.items()))
                except SampleError as error:
                    reason = self._bad[entry.id] = error.reason
            failed[ref] = reason
            pool = self.pools[bucket]
            ref = int(pool[draw(shared, f"replacement {attempt}", len(pool))])
        return Slot(None, ref, seed, tuple(failed.items()))


def _strip(sample: Sample, tensors: list[Tensor]) -> Sample:
    """The sample without its tensors, which are appended in the order in which `_fill` takes them."""
    empty = torch.empty(0)
    tensors.extend(clip for clip in (sample.video_CTHW, sample.loser_CTHW) if clip is not None)
    tensors.extend(subject.image_CHW for subject in sample.subjects)
    tensors.extend((sample.features or {}).values())
    return replace(
        sample,
        video_CTHW=None if sample.video_CTHW is None else empty,
        loser_CTHW=None if sample.loser_CTHW is None else empty,
        subjects=tuple(replace(subject, image_CHW=empty) for subject in sample.subjects),
        features=None if sample.features is None else dict.fromkeys(sample.features, empty),
    )


def _fill(sample: Sample, tensors: Any) -> Sample:
    return replace(
        sample,
        video_CTHW=None if sample.video_CTHW is None else next(tensors),
        loser_CTHW=None if sample.loser_CTHW is None else next(tensors),
        subjects=tuple(replace(subject, image_CHW=next(tensors)) for subject in sample.subjects),
        features=None if sample.features is None else {key: next(tensors) for key in sample.features},
    )


def _pack(tensors: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, torch.dtype, tuple[int, ...]]]]:
    layout, size = [], 0
    for tensor in tensors:
        layout.append((size, tensor.dtype, tuple(tensor.shape)))
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8)
    for tensor, place in zip(tensors, layout, strict=True):
        _view(buffer, *place).copy_(tensor)
    return buffer, layout


def _unpack(buffer: Tensor, layout: Sequence[tuple[int, torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    return [_view(buffer, *place) for place in layout]


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return buffer[offset : offset + size].view(dtype).view(shape)

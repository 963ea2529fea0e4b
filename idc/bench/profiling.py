"""`--profile`: where the device's time goes in one repeat of a case, by kernel, and a trace to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from idc.bench.cases import Case, Group, free, reason

TOP = 12  # kernels of a case
CASES = 2  # of a group: ours and its peer
STEPS = 3  # of a sampler: a trace of fifty is too long to look at


def profile_groups(
    groups: Sequence[Group], device: torch.device, folder: Path, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Profile the first cases of each group: one repeat, after one of the same turn that warms up.

    Args:
        folder: that is there.

    Returns:
        the top kernels (on a CPU: operators) of each: `case`, `name`, `seconds`, `share` of all such time, `calls`. The
        traces are `<folder>/<case>.json.gz`, for chrome://tracing or ui.perfetto.dev.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        try:
            with group.open() as cases:
                for case in cases[:CASES]:
                    found += _profile_case(case, f"{group.title}: {case.name}", device, folder, tell)
        except Exception as error:  # as in `idc.bench.cases.run`
            tell(f"no profile of {group.title}: {reason(error)}")
        free(device)
    return found


def _profile_case(
    case: Case, name: str, device: torch.device, folder: Path, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    tell(f"profile of {name}")
    profiler = profile(activities=_activities(device))
    try:
        case.turn(1, 1, profiler)
        profiler.export_chrome_trace(str(folder / f"{_file_name(name)}.json.gz"))
    except Exception as error:  # as in `idc.bench.cases.run`
        tell(f"no profile of {name}: {reason(error)}")
        return []
    return top_kernels(profiler.key_averages(), name, device)


def top_kernels(
    averages: Iterable[FunctionEventAvg], name: str, device: torch.device, count: int = TOP
) -> list[dict[str, Any]]:
    """The kernels that took longest in all their calls together; on a CPU the operators, each without what it calls.

    Args:
        averages: `key_averages()` of a profiler.
        name: of the case.
    """
    cuda = device.type == "cuda"
    events = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in averages
        if not cuda or _is_kernel(event)
    ]
    total = sum(seconds for _, seconds, _ in events) or 1.0
    events.sort(key=lambda event: -event[1])
    return [
        {"case": name, "name": key, "seconds": seconds, "share": seconds / total, "calls": calls}
        for key, seconds, calls in events[:count]
    ]


def _is_kernel(event: FunctionEventAvg) -> bool:
    """On a GPU's time line are also annotations (an optimiser's step), which span the kernels under them; the operators
    that start kernels are listed with the kernels' time, too. torch's own total leaves out both."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

"""The device and what it can do at best: a sweep of large matrix products in the same run; versions and the commit."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from idc.bench.cases import Clock, free
from idc.errors import UserError
from idc.plan.devices import DEVICES
from idc.plan.devices import device as named

PACKAGES = ("torch", "diffusers", "transformers", "lightning", "triton", "flash-attn", "webdataset", "av")
SIDES = {"cuda": (4096, 8192, 12288, 16384), "cpu": (256, 512, 1024)}
SECONDS = 1.0  # of each side, about


def find_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one.

    Raises:
        UserError: for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; --device cpu measures ratios")
    return torch.device(name)


def matrix_ceiling(device: torch.device, sides: Sequence[int] = (), repeats: int = 5) -> dict[str, Any]:
    """The most operations a second of a square matrix product: bfloat16 on a GPU, full float32 on a CPU.

    On normal random numbers: zeros draw less power and clock higher. Each size runs warm and for about a second, so
    that a short boost of the clock does not count.

    Returns:
        `tflops`, `dtype`, `side` of the best, and `sweep` with TFLOP/s by side.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # whatever the cases before have set
    try:
        sweep = _sweep(device, dtype, sides or SIDES[device.type], repeats)
    finally:
        torch.set_float32_matmul_precision(precision)
    if not sweep:
        raise UserError("the device has no memory left for a matrix product; see what else runs on it")
    best = max(sweep, key=lambda side: sweep[side])
    return {"tflops": sweep[best], "dtype": str(dtype).removeprefix("torch."), "side": best, "sweep": sweep}


def larger_ceiling(start: dict[str, Any], end: dict[str, Any] | None) -> dict[str, Any]:
    """Both measurements of a run as one: the larger, and what each gave as `tflops_start` and `tflops_end`.

    Other load and heat can only lower a ceiling, so the larger is nearer to the device's own, and no share of it is
    flattered. A case beside which something ran has still too low a share.

    Args:
        end: None where there is none, as after an interrupt.
    """
    best = start if end is None or start["tflops"] >= end["tflops"] else end
    return {**best, "tflops_start": start["tflops"], "tflops_end": end["tflops"] if end else None}


def _sweep(device: torch.device, dtype: torch.dtype, sides: Sequence[int], repeats: int) -> dict[int, float]:
    """TFLOP/s by side, up to the first that does not fit."""
    sweep: dict[int, float] = {}
    for side in sides:
        generator = torch.Generator(device).manual_seed(side)
        try:
            sweep[side] = _tflops(side, dtype, generator, repeats)
        except torch.OutOfMemoryError:  # a card that others use, too
            break
        free(device)
    return sweep


def _tflops(side: int, dtype: torch.dtype, generator: torch.Generator, repeats: int) -> float:
    device, flops = generator.device, 2 * side**3
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = a @ b
    clock = Clock(device)
    torch.mm(a, b, out=out)
    once = max(clock.read()["whole"], 1e-6)
    times = max(1, round(SECONDS / repeats / once))
    rates = []
    for _ in range(repeats):
        clock = Clock(device)
        for _ in range(times):
            torch.mm(a, b, out=out)
        rates.append(flops * times / clock.read()["whole"] / 1e12)
    return statistics.median(rates)


def known_device(device: torch.device) -> dict[str, Any]:
    """What `idc plan` takes this device for: `planner_device`, its name there, and `stated_tflops`, the peak that it
    counts shares of (in bfloat16, as the maker states it; of a CPU in float32). {} of a card that it does not know: a
    card's PCIe, NVL, laptop or partitioned (MIG) form is another card."""
    if device.type != "cuda":
        return {"planner_device": "cpu", "stated_tflops": named("cpu").peak("float32") / 1e12}
    name = torch.cuda.get_device_name(device)
    key = next((key for key, entry in DEVICES.items() if name == entry.cuda_name), None)
    return {} if key is None else {"planner_device": key, "stated_tflops": DEVICES[key].bf16}


def environment(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    """What a figure must be told with."""
    return {
        "device": _described(device),
        "versions": {**_versions(), "python": platform.python_version(), "cuda": torch.version.cuda},
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "command": "idc bench " + " ".join(arguments),
        "commit": _commit(),
    }


def _described(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": facts.name,
            "memory_gib": facts.total_memory / 2**30,
            "capability": f"{facts.major}.{facts.minor}",
            "processors": facts.multi_processor_count,
        }
    return {"type": "cpu", "name": _processor(), "cores": torch.get_num_threads()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _commit() -> str | None:
    """Of the source tree that runs, with a + where it was changed; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")

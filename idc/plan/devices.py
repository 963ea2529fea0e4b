"""Named devices: what their makers state, and the share of it that training is assumed to reach.

Peaks are of dense matrix products (no sparsity), from the makers' data sheets: NVIDIA H100, H200, A100, L40S and B200
data sheets, NVIDIA's Ada GPU architecture paper for the RTX 4090. Memory is what CUDA reports as usable in all. The
share is an assumption, not a measurement: about half of the matrix ceiling that large products reach in practice, which
is 75 to 80% of the stated peak. It counts recomputation as work and leaves the optimiser's time out; `idc bench train`
measures it so for a device at hand (its planner's share), to be given as `idc plan --share`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from idc.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: in full. cuda_name: what CUDA calls it; cards with other limits and memories share its first words.
        bf16, tf32, float32: dense peaks in TFLOP/s of products in bfloat16, in TF32 and in plain float32.
        memory: GiB that programs can use.
        bandwidth: of its memory, GB/s.
        link: GB/s that a device sends (and at once receives) to the others of its node.
        network: GB/s a device between nodes, as usual for such nodes.
        share: of the peak that a training step is assumed to reach.
    """

    name: str
    cuda_name: str
    bf16: float
    tf32: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    share: float = 0.4

    def peak(self, dtype: str, matmul_precision: str = "highest") -> float:
        """Dense peak in FLOP/s of products of this compute dtype ("float32" or "bfloat16"); `matmul_precision` as in
        `torch.set_float32_matmul_precision`."""
        if dtype == "bfloat16":
            return 1e12 * self.bf16
        return 1e12 * (self.float32 if matmul_precision == "highest" else self.tf32)


_CORE = 0.08  # TFLOP/s of a core with AVX2 at 2.5 GHz: two fused multiply-adds of eight floats a cycle

DEVICES = {
    "h100": Device("NVIDIA H100 SXM 80GB", "NVIDIA H100 80GB HBM3", 989, 495, 67, 79.1, 3350, 450, 50),
    "h200": Device("NVIDIA H200 SXM 141GB", "NVIDIA H200", 989, 495, 67, 139.8, 4800, 450, 50),
    "b200": Device("NVIDIA B200 180GB", "NVIDIA B200", 2250, 1125, 75, 178.3, 8000, 900, 50),
    "a100": Device("NVIDIA A100 SXM 80GB", "NVIDIA A100-SXM4-80GB", 312, 156, 19.5, 79.1, 2039, 300, 25),
    "a100-40gb": Device("NVIDIA A100 SXM 40GB", "NVIDIA A100-SXM4-40GB", 312, 156, 19.5, 39.4, 1555, 300, 25),
    "l40s": Device("NVIDIA L40S 48GB", "NVIDIA L40S", 362, 183, 91.6, 44.4, 864, 32, 25),
    "rtx4090": Device("NVIDIA GeForce RTX 4090 24GB", "NVIDIA GeForce RTX 4090", 165, 82.6, 82.6, 23.5, 1008, 32, 12),
}


def device(name: str) -> Device:
    """The device of that name; `cpu` is this machine's.

    Raises:
        UserError: for another name.
    """
    key = name.lower().replace("_", "-").removeprefix("nvidia-").replace(" ", "")
    key = {"a100-80gb": "a100", "h100-80gb": "h100", "4090": "rtx4090", "rtx-4090": "rtx4090"}.get(key, key)
    if key == "cpu":
        return _cpu()
    if key not in DEVICES:
        raise UserError(f"--device {name}: no such device{nearest(key, [*DEVICES, 'cpu'])}")
    return DEVICES[key]


def _cpu() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    peak = _CORE * cores
    plural = "s" * (cores > 1)
    return Device(f"this machine's CPU ({cores} core{plural})", "", peak, peak, peak, memory, 20, 5, 1, share=0.25)

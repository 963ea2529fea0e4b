"""What DeepSpeed's ZeRO keeps on a device and in host memory beside a model's own tensors.

Read from DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`) and Lightning's defaults for it; a test compares
it with the CPU allocator over real steps of two processes. Here T is the number of trained parameters.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy

from idc.plan.model import Parameters

_BYTES = 4  # of a number: stages keep weights and gradients in float32
_GIVEN = inspect.signature(DeepSpeedStrategy.__init__).parameters  # Lightning's defaults, not DeepSpeed's own


@dataclass(frozen=True)
class ZeRO:
    """Settings of DeepSpeed that memory depends on.

    Attributes:
        stage: 1, 2 or 3.
        offload_optimizer: the master copy, the optimiser's states and the gradients of a rank are in host memory.
        offload_parameters: its part of the weights, too (ZeRO-3).
        bucket: numbers of gradients that are reduced at once.
        overlap: it reduces while the backward pass goes on.
        live, prefetch: ZeRO-3's: numbers of weights that stay gathered, and that are gathered ahead.
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = _GIVEN["reduce_bucket_size"].default
    overlap: bool = _GIVEN["overlap_comm"].default
    live: int = 1_000_000_000  # Lightning leaves both to DeepSpeed: `stage3_max_live_parameters` and ...
    prefetch: int = 50_000_000  # ... `stage3_prefetch_bucket_size`

    @property
    def name(self) -> str:
        return f"zero{self.stage}"

    @property
    def is_offloaded(self) -> bool:
        return self.offload_optimizer or self.offload_parameters

    def weights_over(self, ranks: int) -> int:
        return ranks if self.stage == 3 else 1

    def gradients(self, trained: int, ranks: int, accumulates: bool) -> int:
        """Bytes on the device: ZeRO-1 has them whole; of several passes, ZeRO-2 adds one's part to that of those
        before it."""
        if self.stage == 1:
            return _BYTES * trained
        if self.offload_optimizer:
            return 0
        return _BYTES * trained // ranks * (2 if self.stage == 2 and accumulates else 1)

    def buckets(self, trained: int, ranks: int) -> int:
        """Bytes on the device: buckets of full size, whatever the model's, and a flat copy of one in the exchange."""
        flat = min(self.bucket, trained)
        if self.stage == 3:
            return _BYTES * (self.bucket + flat + flat // ranks)
        return _BYTES * (self.bucket * (2 if self.overlap else 1) + flat)

    def gathered(self, parameters: Parameters) -> int:
        """Bytes on the device, at most: weights that are soon used again, a layer's beyond that limit, and the pieces
        of those that are gathered ahead; 0 before ZeRO-3."""
        if self.stage < 3:
            return 0
        total = parameters.total
        return _BYTES * (min(total, self.live + parameters.largest_unit) + min(total, self.prefetch))

    def step(self, trained: int, ranks: int) -> int:
        """Bytes on the device at the optimiser's step beside weights, master copy, states and a rank's gradients: a
        flat copy of these, and ZeRO-3's bucket."""
        flat = 0 if self.offload_optimizer else _BYTES * trained // ranks
        return flat + (_BYTES * self.bucket if self.stage == 3 else 0)

    def host(self, parameters: Parameters, states: float, ranks: int, accumulates: bool) -> dict[str, int]:
        """Bytes of a rank's host memory by part; `states` are the optimiser's bytes a trained parameter."""
        found: dict[str, int] = {}
        if self.offload_parameters:
            found["weights"] = _BYTES * parameters.total // ranks
        if self.offload_optimizer:
            part = _BYTES * parameters.trained // ranks
            found["master copy"] = part
            # What the step reads and what passes are added up in, which ZeRO-3 always has.
            found["gradients"] = part * (2 if self.stage == 3 or (self.stage == 2 and accumulates) else 1)
            found["optimiser states"] = round(states * parameters.trained / ranks)
            if self.stage < 3:
                found["stepped weights, on their way to the device"] = part
        return found


def zero_of(name: str, settings: Any) -> ZeRO:
    """Of a strategy: Lightning's name of one, such as "deepspeed_stage_3_offload", or a class with its init_args."""
    stage = re.search(r"stage_(\d)", name)
    offload = "offload" in name
    number = int(settings.get("stage") or (stage.group(1) if stage else ZeRO.stage))
    return ZeRO(
        stage=number,
        offload_optimizer=bool(settings.get("offload_optimizer", offload)),
        offload_parameters=number == 3 and bool(settings.get("offload_parameters", offload)),
        bucket=int(settings.get("reduce_bucket_size") or ZeRO.bucket),
        overlap=bool(settings.get("overlap_comm", ZeRO.overlap)),
    )

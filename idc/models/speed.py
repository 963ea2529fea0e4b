"""Settings of speed, as a recipe writes them: they change how fast and in how much memory a model runs, not what it is.

Light on purpose, as `idc.models.spec`: the command line instantiates it before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from idc.errors import UserError, nearest

RECOMPILES = 64  # sizes of video and sets of references that one compiled layer serves before it would fail
Checkpointing = Literal["none", "attention", "full"]
# Of diffusers' dispatcher, as far as they compute plain dense attention. Those of `auto` are in `idc.models.attention`.
BACKENDS = (
    *("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math"),
    *("flash", "flash_hub", "_flash_3", "_flash_3_hub", "flash_4_hub", "aiter_fa2_hub"),
    *("sage", "sage_hub", "xformers"),
)


@dataclass
class Speed:
    """How the transformer runs.

    Attributes:
        attention: `auto` takes the fastest of diffusers' backends that agrees with PyTorch's own (a start-up probe;
            always `native`, PyTorch's SDPA, on the CPU), of those whose package is installed; a name takes that one,
            and `..._hub` fetches a binary from the model hub and runs it. Attention under a padding mask is `native`.
            `_native_cudnn` and `native` serve the video's attentions alone on CUDA: cuDNN would plan anew for the
            subjects of nearly every sample, so that theirs take one that does not (`idc.models.attention`).
        checkpointing: what the backward pass recomputes of each layer: `none` of it (3 forwards a step), all but the
            outputs of its attentions (`attention`), or all (`full`, 4 forwards and the least memory).
        compile: compile the repeated layers with `torch.compile`, each kind once. The first step of every size of video
            takes a minute or more.
        batch_guidance: run the two forwards of guidance as one of twice the batch; `auto` does where a forward alone
            leaves the device idle (`idc.models.sampling`).
        matmul_precision: of float32 matrix products, as in `torch.set_float32_matmul_precision`; `high` is TF32.

    Raises:
        UserError: for an attention backend of another name.
    """

    attention: str = "auto"
    checkpointing: Checkpointing = "none"
    compile: bool = False
    batch_guidance: bool | Literal["auto"] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"

    def __post_init__(self) -> None:
        names = ("auto", *BACKENDS)
        if self.attention not in names:
            hint = nearest(self.attention, names)  # of a name like none of them it lists them all, as is done here
            hint = hint if "did you mean" in hint else ""
            raise UserError(f"speed.attention={self.attention!r}: must be one of {', '.join(names)}{hint}")

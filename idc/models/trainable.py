"""Which parameters a run trains: all, our blocks alone, our blocks and adapters on the backbone, or adapters alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from torch import nn

from idc.errors import UserError, nearest
from idc.models.spec import Trainable

if TYPE_CHECKING:
    from idc.models.transformer import IDCrafterTransformer

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def set_trainable(
    model: IDCrafterTransformer,
    mode: Trainable = "full",
    rank: int = 32,
    alpha: int = 64,
    targets: Sequence[str] = ATTENTION_TARGETS,
) -> dict[str, nn.Parameter]:
    """Set `requires_grad` throughout the model, adding LoRA where the mode has it; returns `trainable_parameters`.

    Args:
        mode: `full`, `id_blocks` (all that Wan does not have, the subject-index embedding and VLM projector included),
            `id_blocks+lora`, or `lora`, which leaves all weights as they are.
        rank, alpha, targets: of the adapter, which is put on these modules of the backbone's layers, with `lora` of our
            blocks as well (by the end of their names, e.g. `to_q`, `attn1.to_out.0`, `ffn.net.2`), and can be saved by
            `save_lora_adapter`.

    Raises:
        UserError: for an unknown mode or target, a rank below 1, or a model with nothing to train in that mode.
    """
    if mode not in get_args(Trainable):
        raise UserError(f"trainable={mode!r}{nearest(mode, get_args(Trainable))}")
    if mode.startswith("id_blocks") and len(model.id_blocks) == 0:
        raise UserError(f"trainable={mode!r}: this model has no id blocks (id_layers=0); choose 'full'")
    if mode.endswith("lora") and "default" not in getattr(model, "peft_config", {}):
        _add_lora(model, rank, alpha, targets, everywhere=mode == "lora")
    for name, parameter in model.named_parameters():
        ours = name.startswith("id_")
        lora = ".lora_" in name
        chosen = lora if mode == "lora" else ours or (lora and mode == "id_blocks+lora")
        parameter.requires_grad_(mode == "full" or chosen)
    return trainable_parameters(model)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _add_lora(model: IDCrafterTransformer, rank: int, alpha: int, targets: Sequence[str], everywhere: bool) -> None:
    from peft import LoraConfig

    if rank < 1:
        raise UserError(f"lora.rank={rank}: must be 1 or more")
    linear = [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linear):
            known = {name.split(".", 1)[1] for name in linear} | {re.sub(r"^\d+\.\w+\.", "", name) for name in linear}
            raise UserError(f"lora.targets: {target!r} is no linear layer of the backbone{nearest(target, known)}")
    # A pattern that must match the whole name: where our blocks (`id_blocks.*`) are trained themselves, they get none.
    prefix, ends = "(?:id_)?" if everywhere else "", "|".join(map(re.escape, targets))
    pattern = rf"{prefix}blocks\.\d+\.(?:.+\.)?(?:{ends})"
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=True))

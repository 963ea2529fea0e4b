"""Tiny random Wan transformers and conditions for the model tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from idc.models.transformer import IDCrafterTransformer
from idc.types import Condition

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}
VLM_DIM = 10


def tiny_wan(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**WAN).eval()


def tiny_model(seed: int = 0, disturb: bool = True, **settings: Any) -> IDCrafterTransformer:
    """Around `tiny_wan(seed)`; `disturb` gives all our parameters random values, so that every path counts."""
    model = IDCrafterTransformer.from_wan(tiny_wan(seed), **{"id_layers": 2, "vlm_dim": VLM_DIM, **settings})
    if disturb:
        randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: IDCrafterTransformer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("id_"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def inputs(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text tokens."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 3, 4, 6, generator=g)
    return latents, torch.rand(batch, generator=g) * 1000, torch.randn(batch, 5, 16, generator=g)


def condition(
    sizes: tuple[tuple[int, int], ...] = ((4, 4), (2, 6)), batch: int = 2, vlm_tokens: int = 7, seed: int = 2
) -> Condition:
    """References of these latent sizes and, unless `vlm_tokens` is 0, VLM tokens; no masks."""
    g = torch.Generator().manual_seed(seed)
    return Condition(
        text_BLD=torch.zeros(batch, 5, 16),
        references=tuple(torch.randn(batch, 4, h, w, generator=g) for h, w in sizes),
        vlm_BLD=torch.randn(batch, vlm_tokens, VLM_DIM, generator=g) if vlm_tokens else None,
    )


def run(model: WanTransformer3DModel, condition: Condition | None = None, batch: int = 2, **kwargs: Any) -> Tensor:
    """The model's output on `inputs(batch)`, in its own dtype."""
    latents, timestep, text = inputs(batch)
    dtype = model.patch_embedding.weight.dtype
    if condition is not None:
        kwargs["condition"] = condition
    return model(latents.to(dtype), timestep, text.to(dtype), **kwargs).sample

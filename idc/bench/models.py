"""Random models of the real sizes, made where they run, and inputs for them: the same on every call with a seed.

Every weight is random, also those that our blocks start at zero: products with zeros draw less power, and a card that
draws less runs faster than it ever will in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from idc.bench.setup import Setup
from idc.models.codecs import WanVAECodec
from idc.models.conditioners import TextConditioner
from idc.models.conditioning import Encoders
from idc.models.initialisation import OURS
from idc.models.rounding import round_matrices
from idc.models.spec import TransformerSpec
from idc.models.vlm import VLMConditioner
from idc.types import Sample, Subject


@torch.no_grad()
def fill_randomly(module: nn.Module, seed: int) -> None:
    """Weights of standard deviation 1 / sqrt(fan-in), norms around 1, biases around 0: activations stay near 1."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        small = parameter.ndim == 1 or name.endswith("gamma")
        scale = 0.02 if small else 1 / math.sqrt(math.prod(parameter.shape[1:]))
        value = torch.empty(parameter.shape, device=device).normal_(0, scale, generator=generators[device])
        if small and name.endswith(("weight", "gamma")):
            value += 1
        parameter.copy_(value)


@dataclass
class RandomSpec(TransformerSpec):
    """A spec whose model is random on the device at once, without a detour over host memory.

    Attributes:
        device: where it is built, whatever `build` is told (but "meta"). dtype: in which it computes; bfloat16 rounds
            its weights as generation does. seed: of the weights.
    """

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pretrained = "random weights"  # stages that start from trained weights ask whether there are any

    @classmethod
    def like(cls, spec: TransformerSpec, device: torch.device, dtype: torch.dtype, seed: int, **changes: Any) -> Self:
        """`spec` with `changes`, on `device`."""
        given = {f.name: getattr(spec, f.name) for f in fields(TransformerSpec)}
        where = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "seed": seed}
        return cls(**{**given, "pretrained": None, **where, **changes})

    def build(self, text_dim: int, vlm_dim: int | None, device: torch.device | str = "cpu") -> Any:
        sizes = {f.name: getattr(self, f.name) for f in fields(TransformerSpec)} | {"pretrained": None}
        model = TransformerSpec(**sizes).build(text_dim, vlm_dim, "meta")
        if torch.device(device).type == "meta":
            return model
        round_matrices(model, getattr(torch, self.dtype))
        model.to_empty(device=self.device)
        model.refresh_rotary_tables()
        fill_randomly(model, self.seed)
        return model


def cast_as_diffusers(model: Any, dtype: torch.dtype) -> None:
    """As its `from_pretrained(torch_dtype=...)`: what `_keep_in_fp32_modules` names stays float32. What has the dtype
    already is shared with whatever else holds it."""
    islands = set(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not islands & {*name.split("."), own}:
                setattr(module, own, nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad))


def plain_wan(model: Any) -> Any:
    """diffusers' own `WanTransformer3DModel` on the very weights of `model`'s backbone: no copy, common gradients."""
    from diffusers import WanTransformer3DModel

    return _backbone(model, WanTransformer3DModel)


def without_blocks(model: Any) -> Any:
    """Our class without blocks, on the very weights of `model`'s backbone."""
    from idc.models.transformer import IDCrafterTransformer

    return _backbone(model, IDCrafterTransformer, id_layers=0)


def _backbone(model: Any, kind: Any, **settings: Any) -> Any:
    from idc.models.transformer import WAN_SETTINGS

    with torch.device("meta"):
        wan = kind(**{name: model.config[name] for name in WAN_SETTINGS}, **settings)
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(OURS)}
    wan.load_state_dict(own, assign=True)
    wan.rope = model.rope
    return wan.train(model.training)


class RandomVAE(WanVAECodec):
    """`WanVAECodec` over random weights of the setup's sizes."""

    def __init__(self, setup: Setup, **settings: Any) -> None:
        super().__init__("random weights", **settings)
        self.config = {"z_dim": setup.spec.in_channels, **setup.vae}
        self.seed = setup.seed
        self.channels = setup.spec.in_channels

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            from diffusers import AutoencoderKLWan

            with torch.device("meta"):
                model: Any = AutoencoderKLWan(**self.config)
            model = model.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
            fill_randomly(model, self.seed)
            self._model = model
        self._model.to(self.device)
        return self

    def _identity(self) -> dict[str, Any]:
        return {"random": self.seed, "config": self.config}


class RandomText(TextConditioner):
    """Random tokens in place of a text encoder: `real` of them, then zeros up to `max_length`."""

    def __init__(self, dim: int, max_length: int, real: int) -> None:
        self._dim, self.max_length, self._real = dim, max_length, min(real, max_length)

    @property
    def dim(self) -> int:
        return self._dim

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        return self

    def encode(self, captions: Sequence[str]) -> Tensor:
        tokens = torch.zeros(len(captions), self.max_length, self._dim)
        for place, caption in enumerate(captions):
            tokens[place, : self._real] = _normal(len(caption), self._real, self._dim)
        return tokens.to(self.device)

    def _identity(self) -> dict[str, Any]:
        return {"random": [self._dim, self.max_length, self._real]}


class RandomVLM(VLMConditioner):
    """Random tokens in place of a VLM, equally many for every variant."""

    def __init__(self, dim: int, tokens: int) -> None:
        self._dim, self._tokens = dim, tokens

    @property
    def dim(self) -> int:
        return self._dim

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        return self

    def _encode_each(self, captions: Sequence[str], references: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [
            _normal(len(caption) + 7 * len(images), self._tokens, self._dim).to(self.device)
            for caption, images in zip(captions, references, strict=True)
        ]

    def _identity(self) -> dict[str, Any]:
        return {"random": [self._dim, self._tokens]}


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_encoders(setup: Setup, device: torch.device, **codec: Any) -> Encoders:
    """A codec, a text conditioner and, where the setup has one, a VLM conditioner; `codec` are settings of the VAE."""
    vlm = None if setup.vlm_dim is None else RandomVLM(setup.vlm_dim, setup.vlm_tokens)
    text = RandomText(setup.text_dim, setup.text_length, setup.text_tokens)
    encoders = Encoders(RandomVAE(setup, **codec), text, vlm)
    encoders.place(device)
    return encoders


def random_sample(setup: Setup, subjects: int | None = None, number: int = 0, clip: bool = False) -> Sample:
    """A sample of noise, without features; with its clip where that is asked for."""
    count = setup.subjects if subjects is None else subjects
    generator = torch.Generator().manual_seed(1000 * setup.seed + number)

    def noise(*shape: int) -> Tensor:
        return torch.rand(3, *shape, generator=generator) * 2 - 1

    side = setup.reference
    references = tuple(Subject(noise(side, side), f"subject {k}") for k in range(count))
    video = noise(setup.frames, setup.height, setup.width) if clip else None
    return Sample(f"sample {number}", f"caption {number}", video, references, fps=16.0)


def with_features(sample: Sample, encoders: Encoders) -> Sample:
    """The sample with all that training and generation read of it, as the features cache has it."""
    (features,) = encoders.features([sample])
    return replace(sample, features=features, video_CTHW=None)

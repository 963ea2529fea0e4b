"""The transformer's settings as a recipe writes them, and the way from settings to a model.

Light on purpose: the command line instantiates it before anything heavy is imported. (Not even under `TYPE_CHECKING`:
the command line's parser resolves those imports, too.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from idc.errors import UserError
from idc.models.frozen import load_weights, resolve

_WEIGHTS = "a Wan transformer: config.json and .safetensors"
Trainable = Literal["full", "id_blocks", "id_blocks+lora", "lora"]


@dataclass
class IDBlocks:
    """The hierarchical identity-preserving attention and its ablations (paper, section A.1 and table S.5).

    Attributes:
        layers: the block follows each of the first `layers` backbone layers (the paper's 20); 0 attaches none.
        intra_subject: stage 1. inter_subject: stage 2. cross_modal: stage 3; without it `joint_references` must be
            on, since no other path leads from the subjects to the video.
        joint_references: reference tokens also join the backbone's self-attention, as in Phantom.
        use_vlm: VLM tokens enter stage 3.
        max_subjects: size of the subject-index embedding.
        gate_bias: stage 2's gate starts at sigmoid(gate_bias).
    """

    layers: int = 20
    intra_subject: bool = True
    inter_subject: bool = True
    cross_modal: bool = True
    joint_references: bool = False
    use_vlm: bool = True
    max_subjects: int = 4
    gate_bias: float = -2.0

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `IDCrafterTransformer`, without `use_vlm`, which the VLM's width expresses."""
        return {f"id_{name}": value for name, value in vars(self).items() if name != "use_vlm"}


@dataclass
class Lora:
    """Low-rank adapters, for `trainable: id_blocks+lora` (on the backbone) and `lora` (on our blocks, too).

    Raises:
        UserError: for a rank or an alpha below 1.
    """

    rank: int = 32
    alpha: int = 64
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"lora.{name}={value}: must be 1 or more")


@dataclass
class TransformerSpec:
    """Sizes of the transformer, or where its weights are.

    Attributes:
        pretrained: a folder or hub name of Wan (the blocks are attached and initialised from its layers) or of an
            `IDCrafterTransformer` (loaded as it was saved, its own sizes and blocks winning over the ones here);
            None trains from scratch.
        subfolder: where in `pretrained` the transformer lies, "" for the top.
        num_layers, num_attention_heads, attention_head_dim, ffn_dim, patch_size, freq_dim, in_channels: of the
            backbone; read only where `pretrained` is None. The defaults are Wan2.1-1.3B's.
        id_blocks: the hierarchical attention.
        init_seed: seeds a from-scratch initialisation and that of new blocks, the same on every rank.

    Raises:
        UserError: for settings that contradict each other, or a local `pretrained` without a transformer in it.
    """

    pretrained: str | None = None
    subfolder: str = "transformer"
    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    in_channels: int = 16
    id_blocks: IDBlocks = field(default_factory=IDBlocks)
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.pretrained is None and self.id_blocks.layers > self.num_layers:
            raise UserError(
                f"id_blocks.layers={self.id_blocks.layers}: the backbone has num_layers={self.num_layers}; "
                f"the nearest valid choice is {self.num_layers}"
            )
        if not (self.id_blocks.cross_modal or self.id_blocks.joint_references or self.id_blocks.layers == 0):
            raise UserError(
                "id_blocks.cross_modal=false leaves no path from the subjects to the video; "
                "set id_blocks.joint_references=true with it"
            )
        if self.pretrained is not None:
            resolve(self.pretrained, self.subfolder, _WEIGHTS, setting="transformer.pretrained")
        if self.attention_head_dim % 2:
            raise UserError(f"attention_head_dim={self.attention_head_dim}: must be even, for the rotary embedding")

    def build(self, text_dim: int, vlm_dim: int | None, device: torch.device | str = "cpu") -> Any:
        """The `IDCrafterTransformer` in float32 on `device` ("meta" for the structure alone).

        Raises:
            UserError: where the weights of `pretrained` are missing, incomplete, broken or of other settings.
        """
        from idc.models.transformer import IDCrafterTransformer

        settings = self.id_blocks.settings()
        settings["vlm_dim"] = vlm_dim if self.id_blocks.use_vlm else None
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(self.init_seed)
            if self.pretrained is not None:
                model = self._load({**settings, "text_dim": text_dim})
            else:
                model = IDCrafterTransformer(
                    patch_size=tuple(self.patch_size),
                    num_attention_heads=self.num_attention_heads,
                    attention_head_dim=self.attention_head_dim,
                    in_channels=self.in_channels,
                    out_channels=self.in_channels,
                    text_dim=text_dim,
                    freq_dim=self.freq_dim,
                    ffn_dim=self.ffn_dim,
                    num_layers=self.num_layers,
                    **settings,
                )
                model.init_weights(self.init_seed)
        return model

    def _load(self, settings: dict[str, Any]) -> Any:
        from idc.models.transformer import IDCrafterTransformer

        blocks = {name: value for name, value in settings.items() if name != "text_dim"}
        path = str(self.pretrained)
        folder = resolve(path, self.subfolder, _WEIGHTS, setting="transformer.pretrained")
        if folder is not None and torch.get_default_device().type != "meta" and not any(folder.glob("*.safetensors")):
            raise UserError(f"transformer.pretrained={path!r}: {folder} has no .safetensors; give {_WEIGHTS}")
        where = {"subfolder": self.subfolder or None, "torch_dtype": torch.float32}
        model = load_weights(
            path,
            _WEIGHTS,
            lambda: IDCrafterTransformer.from_wan_pretrained(path, **where, **blocks),
            setting="transformer.pretrained",
        )
        for name, value in settings.items():
            if (saved := model.config[name]) != value:
                raise UserError(
                    f"{name}={value}: {self.pretrained} was saved with {name}={saved}, which cannot be changed; "
                    "make the recipe say so, or start from other weights"
                )
        return model

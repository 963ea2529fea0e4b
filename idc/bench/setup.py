"""What a benchmark runs on: sizes of the model and of the video, from a name or from a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from idc.errors import UserError, nearest
from idc.models.frozen import resolve
from idc.models.sampling import Sampling
from idc.models.spec import IDBlocks, TransformerSpec
from idc.types import SPATIAL_MULTIPLE, Bucket

PAPER: dict[str, Any] = {"frames": 81, "height": 480, "width": 832}
WIDE = 1024  # of a model that is a real one
SMALL_VAE = {"base_dim": 8, "num_res_blocks": 1}


@dataclass(frozen=True)
class Setup:
    """Sizes and settings that all cases of a run share.

    Attributes:
        size: a name of `SIZES`, or "recipe".
        spec: of the transformer; its `pretrained` is never read.
        frames, height, width: of the video. subjects: references of a video. batch: videos of a training step.
        reference: side of a reference's picture in pixels (512 is 1024 tokens).
        text_dim, text_length, text_tokens: width, padded length, and how many are real.
        vlm_dim, vlm_tokens: None and 0 without a VLM.
        vae: of diffusers' `AutoencoderKLWan` where it differs from Wan's.
        sampling: of generation. seed: of weights and inputs.
    """

    size: str
    spec: TransformerSpec
    frames: int
    height: int
    width: int
    subjects: int = 3
    batch: int = 1
    reference: int = 512
    text_dim: int = 4096
    text_length: int = 512
    text_tokens: int = 128
    vlm_dim: int | None = 3584
    vlm_tokens: int = 512
    vae: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0

    def check(self) -> Setup:
        """Raises `UserError` for sizes that the model or the codec do not take."""
        Bucket(self.frames, self.height, self.width, self.subjects).check()
        most = self.spec.id_blocks.max_subjects
        if not 0 <= self.subjects <= most:
            raise UserError(f"--subjects {self.subjects}: the transformer takes 0 to {most}")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: must be 1 or more")
        return self

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width, self.subjects)

    @property
    def subject_tokens(self) -> int:
        """Of one reference."""
        return (self.reference // SPATIAL_MULTIPLE) ** 2

    @property
    def is_papers(self) -> bool:
        """Whether the aims are meant for it: the 1.3B model at 480p."""
        sizes = {"frames": self.frames, "height": self.height, "width": self.width}
        return sizes == PAPER and (self.spec.num_layers, self.spec.num_attention_heads) == (30, 12)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; a CPU's bfloat16 is slower than its float32, which is then the ceiling's, too."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _small(name: str, heads: int, head: int, ffn: int, layers: int, size: tuple[int, int, int], **more: Any) -> Setup:
    spec = TransformerSpec(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head,
        ffn_dim=ffn,
        freq_dim=128,
        id_blocks=IDBlocks(layers=max(1, layers * 2 // 3)),
    )
    return Setup(name, spec, *size, reference=32, text_dim=64, text_length=32, text_tokens=16, vlm_dim=64,
                 vlm_tokens=24, vae=SMALL_VAE, **more)  # fmt: skip


def _sizes() -> dict[str, Setup]:
    wan14b = TransformerSpec(num_layers=40, num_attention_heads=40, ffn_dim=13824)
    return {
        "tiny": _small("tiny", 2, 32, 128, 3, (9, 32, 32), sampling=Sampling(steps=4, scale=2.5)),
        "toy": _small("toy", 4, 48, 512, 4, (9, 64, 64), sampling=Sampling(steps=10, scale=2.5)),
        "1.3b": Setup("1.3b", TransformerSpec(), **PAPER),
        "14b": Setup("14b", wan14b, **PAPER),
    }


SIZES = ("tiny", "toy", "1.3b", "14b")


def named(size: str) -> Setup:
    """The setup of that name.

    Raises:
        UserError: for another name.
    """
    if size not in SIZES:
        raise UserError(f"--size {size}: no such size{nearest(size, SIZES)}")
    return _sizes()[size]


def default_size(device: torch.device) -> str:
    """What the machine can run in a minute (CPU) or has memory for."""
    if device.type == "cpu":
        return "tiny"
    return "1.3b" if torch.cuda.get_device_properties(device).total_memory > 70 * 2**30 else "toy"


def from_recipes(arguments: Sequence[str]) -> tuple[Setup, Any]:
    """The model, video and sampler of a recipe with its overlays, and the recipe as `idc plan` reads it.

    Weights that it names are not read; those of a local folder say what their sizes are.

    Args:
        arguments: `--config FILE` and `--KEY VALUE`, as `idc fit` takes them.

    Raises:
        UserError: as `idc fit` does.
    """
    from idc.plan.recipe import read

    recipe = read(arguments)
    stage, data = recipe.stage, recipe.data
    spec = _sizes_of(stage)
    text, vlm = stage.encoders.text, stage.encoders.vlm
    base = named("1.3b" if spec.num_attention_heads * spec.attention_head_dim >= WIDE else "toy")
    frames, height, width = map(int, data.rule.shapes[0])
    setup = replace(
        base,
        size="recipe",
        spec=spec,
        frames=frames,
        height=height,
        width=width,
        text_dim=text.dim,
        text_length=text.max_length,
        text_tokens=min(base.text_tokens, text.max_length),
        vlm_dim=None if vlm is None else vlm.dim,
        vlm_tokens=0 if vlm is None else base.vlm_tokens,
        subjects=min(base.subjects, spec.id_blocks.max_subjects),
        sampling=stage.sampling,
        batch=max(1, data.batch_size // data.group_size),
    )
    return setup, recipe


def _sizes_of(stage: Any) -> TransformerSpec:
    """Of the stage's transformer: those of its saved config, where it lies here; otherwise the recipe's own."""
    spec = stage.spec
    if spec.pretrained is None or resolve(spec.pretrained, spec.subfolder, "a Wan transformer") is None:
        return replace(spec, pretrained=None)
    config = stage.build_transformer("meta").config
    own = {f.name: config[f.name] for f in fields(TransformerSpec) if f.name in config}
    blocks = {name: config[f"id_{name}"] for name in vars(IDBlocks()) if f"id_{name}" in config}
    return TransformerSpec(**own, id_blocks=IDBlocks(**blocks))

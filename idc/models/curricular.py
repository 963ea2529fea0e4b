"""The IR-101 network of CurricularFace (Huang et al., CVPR 2020), with the names of its published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from idc.errors import UserError
from idc.models.frozen import misfit

STAGES = ((64, 3), (128, 13), (256, 30), (512, 3))  # width, number of blocks
SIDE = 112
WIDTH = 512  # of the embedding


class Block(nn.Module):
    """A residual block of the "improved" kind: normalised input, two 3 x 3 convolutions, the second one strided.

    `inner_norm`: a batch norm between the first convolution and the PReLU. TFace, which trained the checkpoint that
    OpenS2V-Eval uses, has it; the code of the paper has not.
    """

    def __init__(self, inside: int, outside: int, stride: int, inner_norm: bool) -> None:
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inside),
            nn.Conv2d(inside, outside, 3, 1, 1, bias=False),
            *([nn.BatchNorm2d(outside)] if inner_norm else []),
            nn.PReLU(outside),
            nn.Conv2d(outside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.res_layer(x_BCHW) + self.shortcut_layer(x_BCHW)


class IR101(nn.Module):
    """RGB faces `[B, 3, 112, 112]` in [-1, 1], aligned as ArcFace's -> embeddings `[B, 512]`, not normalised.

    `inner_norm`: see `Block`. `affine`: whether the last batch norm has weights.
    """

    def __init__(self, inner_norm: bool = True, affine: bool = False) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, width = [], 64
        for outside, count in STAGES:
            for index in range(count):
                blocks.append(Block(width, outside, 2 if index == 0 else 1, inner_norm))
                width = outside
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(width * (SIDE // 16) ** 2, WIDTH),
            nn.BatchNorm1d(WIDTH, affine=affine),
        )

    def forward(self, faces_BCHW: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(faces_BCHW)))


def load_ir101(path: str | Path) -> IR101:
    """An IR-101 in eval mode with the weights of a file: .safetensors, or a pickled state dict of tensors alone.

    Which of the two published layouts it has is read from the names of its tensors.

    Raises:
        UserError: for a file that is missing, is no state dict, or lacks tensors or has others than the network's.
    """
    state = _read(Path(path).expanduser())
    with torch.device("meta"):
        network = IR101("body.0.res_layer.2.running_mean" in state, "output_layer.4.weight" in state)
    wanted = network.state_dict()
    # Old checkpoints do not count their batches; the count is not used for inference.
    state = {**{k: torch.tensor(0) for k in wanted if k.endswith("num_batches_tracked")}, **state}
    if fault := misfit(wanted, state):
        raise UserError(f"{path}: no IR-101 of CurricularFace: {fault}")
    network.load_state_dict(state, assign=True)
    return network.float().eval().requires_grad_(False)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; CurricularFace needs glint360k_curricular_face_r101_backbone.bin")
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a damaged file, KeyError and IndexError among them
        raise UserError(f"{path}: cannot be read as weights: {(str(error) or repr(error)).splitlines()[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return state

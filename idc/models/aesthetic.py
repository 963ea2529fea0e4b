"""LAION's aesthetic predictor: a linear head of several layers on CLIP ViT-L/14's normalised picture vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from idc.errors import UserError
from idc.models.embedders import CLIPEmbedder, ImageTextEmbedder, Picture
from idc.models.frozen import Frozen
from idc.models.hub import offline_without_a_network

_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.+-]+)")
_KEY = re.compile(r"layers\.(\d+)\.(weight|bias)")


class AestheticPredictor(Frozen):
    """How much people like a picture, on LAION's scale of about 1 to 10 (trained on SAC, logos and AVA ratings).

    Args:
        head: the head's weights, `layers.<n>.weight` and `.bias` of 768-1024-128-64-16-1 (no activations, dropouts
            between): a .safetensors or the published .pth file, or such a file in a hub repository as
            `owner/name/file`.
        clip: the picture encoder that it was trained on.
    """

    def __init__(
        self, head: str = "BestWishYsh/OpenS2V-Weight/aesthetic-model.pth", clip: ImageTextEmbedder | None = None
    ) -> None:
        self.head, self.clip = head, clip if clip is not None else CLIPEmbedder()

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            layers = read_head(self.head)  # small, and so checked before the encoder is loaded
            self.clip.load(device)
            if layers[0][0].shape[1] != self.clip.dim:
                width = layers[0][0].shape[1]
                raise UserError(
                    f"head={self.head!r} takes vectors of {width}, {self.clip.name!r} gives {self.clip.dim}; "
                    "LAION's head goes with openai/clip-vit-large-patch14"
                )
            self._model = layers
        self.clip.load(device)
        self._model = [(weight.to(self.device), bias.to(self.device)) for weight, bias in self._model]
        return self

    def unload(self) -> None:
        super().unload()
        self.clip.unload()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_model"}

    def _identity(self) -> dict[str, Any]:
        file = Path(self.head).expanduser()
        return {
            "head": [self.head, file.stat().st_size if file.is_file() else None],
            "clip": self.clip.fingerprint,
        }

    def predict(self, pictures: Sequence[Picture]) -> Tensor:
        """Scores, float32 `[N]` on the CPU, of RGB uint8 pictures `[H, W, 3]`."""
        with self.inference():
            values = self.clip.embed_images(pictures).to(self.device)
            for weight, bias in self._model:
                values = F.linear(values, weight, bias)
        return values[:, 0].cpu()


def read_head(head: str) -> list[tuple[Tensor, Tensor]]:
    """The head's layers as (weight, bias), float32, in order. Nothing but tensors is unpickled.

    Raises:
        UserError: for a file that is missing or is not such a head.
    """
    path = _file(head)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"head={head!r}: cannot be read: {reason}") from None
    matches = {key: _KEY.fullmatch(key) for key in state} if isinstance(state, dict) else {}
    numbers = sorted({int(match[1]) for match in matches.values() if match})
    names = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if not numbers or names != set(matches):
        odd = sorted(set(matches) ^ names)
        raise UserError(f"head={head!r}: not LAION's aesthetic head of layers.<n>.weight and .bias; see {odd[:3]}")
    layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    outs, ins = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    if outs[:-1] != ins[1:] or outs[-1] != 1:
        raise UserError(f"head={head!r}: layers of shapes {shapes} do not lead to one score")
    return layers


def _file(head: str) -> Path:
    path = Path(head).expanduser()
    if path.is_file():
        return path
    hub = _HUB_FILE.fullmatch(head)
    if hub is None:
        raise UserError(
            f"head={head!r}: no such file; give LAION's sac+logos+ava1-l14-linearMSE.pth (or .safetensors), "
            "or 'BestWishYsh/OpenS2V-Weight/aesthetic-model.pth' from the hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        with offline_without_a_network(hub[1]):
            return Path(hf_hub_download(hub[1], hub[2]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"head={head!r}: no such file here, and the hub does not give it: {reason}") from None

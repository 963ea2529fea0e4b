"""What the judging models that transformers saves share: a folder or hub id, late loading, light copies, and how
pictures enter.

A picture of which one side is more than 200 times the other is a sliver: image processors would make a side of 0 of
it, or gigabytes, and what is left of it tells nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from idc.errors import UserError
from idc.models.frozen import Frozen, load_weights, model_name, resolve, weights_identity
from idc.pictures import MOST_ASPECT

Picture = NDArray[np.uint8]


def sliver(picture: Picture) -> str:
    """That a picture is one, in words with its size; "" where it is none.

    Raises:
        UserError: for what is no RGB picture uint8 `[H, W, 3]`, such as a grey one or one with alpha.
    """
    if wrong := not_rgb(picture):
        raise UserError(wrong)
    height, width = picture.shape[:2]
    if max(height, width) <= MOST_ASPECT * min(height, width):
        return ""
    return f"picture of {width} x {height} pixels: its aspect ratio is more than {MOST_ASPECT}"


def not_rgb(picture: Picture) -> str:
    """Why something is no RGB picture uint8 `[H, W, 3]`; "" where it is one."""
    if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and 0 not in picture.shape:
        return ""
    return f"picture: {picture.dtype} of shape {picture.shape}; must be uint8 [H, W, 3]"


def for_processor(pictures: Sequence[Picture]) -> list[Any]:
    """PIL's images of RGB pictures uint8 `[H, W, 3]`: of arrays, transformers guesses the axis of the channels, and
    takes a height of 1, 3 or 4 for it."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in pictures]


class Pretrained(Frozen):
    """A model of transformers that loads at its first use and may be unloaded.

    Copies and pickles leave the weights behind and load their own.

    Attributes:
        path: a folder saved with save_pretrained, or a hub id.
        dtype: of weights and activations.
        weights: what `path` should contain, for messages.
    """

    path: str
    dtype: torch.dtype
    weights: str
    _heavy: ClassVar[tuple[str, ...]] = ("_model", "_images", "_tokenizer")  # what `unload` frees and copies leave
    _images: Any = None
    _tokenizer: Any = None

    @property
    def name(self) -> str:
        """As a report shows it."""
        return model_name(self.path)

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        self.device = torch.device(device)
        if self._model is None:
            resolve(self.path, "", self.weights)
            self._build()
        self._model.to(self.device)
        return self

    @abstractmethod
    def _build(self) -> None:
        """Fill `_model`, and what else there is of `_heavy`."""

    def unload(self) -> None:
        for part in self._heavy:
            setattr(self, part, None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in self._heavy}

    def _pixels(self, pictures: Sequence[Picture], **settings: Any) -> Any:
        """What the image processor makes of pictures that are no slivers."""
        return self._images(images=for_processor(pictures), return_tensors="pt", **settings)

    def _needs(self, what: str, marker: str) -> None:
        """Raise `UserError` where a local `path` lacks the file `marker`, which comes with `what`."""
        resolve(self.path, "", what, marker=marker)

    def _saved(self, cls: Any, **settings: Any) -> Any:
        """`cls.from_pretrained(path)` for what is no model: a processor or a tokenizer."""
        return load_weights(self.path, self.weights, lambda: cls.from_pretrained(self.path, **settings))

    def _identity(self) -> dict[str, Any]:
        return {"weights": weights_identity(self.path), "dtype": str(self.dtype)}

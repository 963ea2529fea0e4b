"""What the judging models that transformers saves share: a folder or hub id, late loading, light copies."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch

from idc.models.frozen import Frozen, load_weights, model_name, resolve, weights_identity


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

    def _needs(self, what: str, marker: str) -> None:
        """Raise `UserError` where a local `path` lacks the file `marker`, which comes with `what`."""
        resolve(self.path, "", what, marker=marker)

    def _saved(self, cls: Any, **settings: Any) -> Any:
        """`cls.from_pretrained(path)` for what is no model: a processor or a tokenizer."""
        return load_weights(self.path, self.weights, lambda: cls.from_pretrained(self.path, **settings))

    def _identity(self) -> dict[str, Any]:
        return {"weights": weights_identity(self.path), "dtype": str(self.dtype)}

"""The interface of what makes a picture from pictures and words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from idc.curate.candidate import Pixels
from idc.curate.describing import plain_settings
from idc.errors import UserError

LEAST_SIDE, MOST_SIDE = 16, 8192  # pixels


class EditError(RuntimeError):
    """No picture for this request: refused, failed, or no picture that can be used. Other requests may do.

    Attributes:
        reason: one of a few phrases without numbers, to be counted; the message has the details.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _edit_error, (self.reason, str(self))


class ImageEditor(ABC):
    """Makes pictures. Light to construct; used by one thread unless `concurrency` says more.

    Attributes:
        backend: short name of the kind of editor.
        origin: what references say of where they come from.
        max_pictures: how many pictures a request may have; more go onto one sheet.
        concurrency: requests that gain from being under way at once.
        copies: it only moves and tints the pixels it is given: its pictures are copies by intent, exempt from the caps
            on copies of `ReferenceCheck`.
    """

    backend: ClassVar[str]
    copies: ClassVar[bool] = False
    max_pictures: int = 1
    concurrency: int = 1

    @property
    def origin(self) -> str:
        return f"generated:{self.backend}"

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name, as provenance shows it."""

    @property
    @abstractmethod
    def version(self) -> str:
        """What tells this model apart from another of the name: a hash, a date; "" where nothing is known."""

    def load(self, device: torch.device | str = "cpu") -> None:  # noqa: B027  # most load nothing
        """Load what is heavy; idempotent.

        Raises:
            UserError: for weights that are missing or of a kind that edits nothing.
        """

    def unload(self) -> None:  # noqa: B027
        """Free it."""

    @abstractmethod
    def edit(self, pictures: Sequence[Pixels], prompt: str, seed: int, size: tuple[int, int]) -> Pixels:
        """A picture that follows `prompt` and `pictures`, RGB uint8 `[H, W, 3]`; the same for the same arguments.

        Args:
            pictures: RGB uint8 `[H, W, 3]` of any sizes, at least one and at most `max_pictures`, in the order in which
                the prompt speaks of them.
            seed: in [0, 2^63).
            size: (height, width) in pixels that is wanted; an editor comes as near as it can.

        Raises:
            EditError: for no picture.
            UnreachedError: where another time may give one.
            UserError: for what every request would meet.
        """

    def describe(self) -> Mapping[str, Any]:
        """Settings that decide what comes out, plain JSON."""
        return plain_settings(self)

    def remark(self) -> str:
        """As `idc.curate.candidate.Step.remark`."""
        return ""


def check_request(editor: ImageEditor, pictures: Sequence[Pixels], prompt: str, size: tuple[int, int]) -> None:
    """Raise `UserError` for what no editor takes: no picture, too many, other arrays than pixels, no words, no size."""
    if not 1 <= len(pictures) <= editor.max_pictures:
        raise UserError(f"{len(pictures)} pictures: {editor.name} takes 1 to {editor.max_pictures}")
    for picture in pictures:
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise UserError(f"picture: {picture.dtype} of shape {picture.shape}; must be uint8 [H, W, 3]")
    if not prompt.strip():
        raise UserError("prompt: must not be empty")
    check_size(size)


def check_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) itself.

    Raises:
        UserError: unless both are between 16 and 8192 pixels.
    """
    if len(size) != 2 or not all(LEAST_SIDE <= side <= MOST_SIDE for side in size):
        raise UserError(f"size={size}: must be (height, width), each from {LEAST_SIDE} to {MOST_SIDE} pixels")
    return int(size[0]), int(size[1])


def sheet(pictures: Sequence[Pixels], area: int = 1024 * 1024, gap: int = 8) -> Pixels:
    """Pictures side by side on white, for editors that take one: rows of equal cells, filled from the top left, each
    picture whole and in its aspect ratio. `area` in pixels is about that of the sheet.

    Raises:
        UserError: for no picture.
    """
    import cv2

    if not pictures:
        raise UserError("a sheet needs at least one picture")
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    side = max(LEAST_SIDE, int(math.sqrt(area / (rows * columns))) - gap)
    whole = np.full((rows * (side + gap) + gap, columns * (side + gap) + gap, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        height, width = picture.shape[:2]
        scale = side / max(height, width)
        fitted = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(picture, fitted, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top = gap + row * (side + gap) + (side - fitted[1]) // 2
        left = gap + column * (side + gap) + (side - fitted[0]) // 2
        whole[top : top + fitted[1], left : left + fitted[0]] = small
    return whole


def _edit_error(reason: str, message: str) -> EditError:
    """What pickling brings back: worker processes hand errors over."""
    return EditError(reason, message.removeprefix(reason).removeprefix(": "))

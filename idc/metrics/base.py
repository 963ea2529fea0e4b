"""What every metric shares: one clip in, one score or a named failure out; the mean over clips is exact over ranks.

A metric is a pure function of one clip (`score`) inside a thin torchmetrics shell (`update`, `compute`). A failure is a
failure with its reason, never a number: `compute` is the mean over scored clips, and `scored` and `expected` stand
beside it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from idc.data.video import VideoError
from idc.errors import UserError

SLACK = 1e-3  # of the range of a metric's bounds, for rounding in a network's half precision


@dataclass(frozen=True)
class Reference:
    """A reference picture of a clip that is judged.

    Attributes:
        image_HWC: RGB uint8 `[H, W, 3]`.
        name: what it shows in a word or two (the benchmark's class label).
        kind: of `idc.data.benchmark.KINDS`; a "human" shows more than the face.
        mask_HW: bool `[H, W]`, True on the subject; None where there is none.

    Raises:
        UserError: for pixels or a mask of another type or shape, such as floats in [-1, 1].
    """

    image_HWC: NDArray[np.uint8]
    name: str = ""
    kind: str = "object"
    mask_HW: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        _check_pixels(self.image_HWC, f"reference {self.name!r}", "[H, W, 3]", 3)
        if self.mask_HW is not None:
            _check_masks(self.mask_HW, f"mask of reference {self.name!r}", self.image_HWC.shape[:2])


@dataclass(frozen=True)
class Clip:
    """A video that is judged, with what it was asked to show.

    Attributes:
        id: unique within a run.
        frames_THWC: RGB uint8 `[T, H, W, 3]`, all of them or those that `VideoMetric.frames` asks for.
        prompt: what was asked for, in words.
        references: in the prompt's order.
        fps: of the video, in frames per second (of the whole video, also where only some frames are kept).
        category: the benchmark's item type such as "singlehuman"; "" where there is none.
        masks_TNHW: bool, where each reference's subject is seen in each frame; None where that is not known.
        meta: plain JSON (the toy world keeps its ground truth under "toy").

    Raises:
        UserError: for a clip without frames, and for pixels or masks of another type or shape, such as the floats in
            [-1, 1] that models use.
    """

    id: str
    frames_THWC: NDArray[np.uint8]
    prompt: str = ""
    references: tuple[Reference, ...] = ()
    fps: float = 16.0
    category: str = ""
    masks_TNHW: NDArray[np.bool_] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_pixels(self.frames_THWC, f"clip {self.id!r}", "[T, H, W, 3]", 4)
        if self.masks_TNHW is not None:
            frames, height, width, _ = self.frames_THWC.shape
            shape = frames, len(self.references), height, width
            _check_masks(self.masks_TNHW, f"masks of clip {self.id!r}", shape)


def _check_pixels(pixels: Any, what: str, shape: str, dimensions: int) -> None:
    if getattr(pixels, "dtype", None) != np.uint8:
        found = getattr(pixels, "dtype", type(pixels).__name__)
        raise UserError(
            f"{what} holds {found}: judged pixels are uint8 in 0 to 255; from [-1, 1]: (x + 1) * 127.5, rounded"
        )
    if pixels.ndim != dimensions or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(f"{what} has shape {tuple(pixels.shape)}: must be {shape} with at least one of each")


def _check_masks(masks: Any, what: str, shape: tuple[int, ...]) -> None:
    if getattr(masks, "dtype", None) != np.bool_ or masks.shape != shape:
        found = f"{getattr(masks, 'dtype', type(masks).__name__)} of shape {getattr(masks, 'shape', None)}"
        raise UserError(f"{what}: {found}; must be bool of shape {shape}")


@dataclass(frozen=True)
class Score:
    """A clip's score, or None with the reason. `details` is plain JSON: per frame, per subject, per run of a judge.

    Raises:
        ValueError: for a value that is not finite: what could not be computed is a failure.
    """

    value: float | None
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a score of {self.value}: must be finite; Score.failed(reason) is for what has none")

    @classmethod
    def failed(cls, reason: str, **details: Any) -> Score:
        """No score, because of `reason`."""
        return cls(None, reason, details)


class VideoMetric(Metric):
    """Base of all metrics. A subclass sets the class attributes and writes `score`.

    Attributes:
        name: key in results, in recipes and in `idc.metrics.total`.
        frames: how many frames `score` looks at (`sample_frames`), or None for all of them at native size.
        bounds: lowest and highest value that `score` can return.
        models: names of the networks that the score stands on; a report flags one that a training reward used too.
        held: the attributes whose networks `load` loads and `unload` frees; one that is None is passed over.
    """

    name: str
    frames: int | None = 32
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    models: tuple[str, ...] = ()
    held: ClassVar[tuple[str, ...]] = ()

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    values: list[Tensor]
    asked: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A rank without values joins the others with an empty tensor of the metric's own dtype: it must be theirs.
        self.set_dtype(torch.float64)
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("asked", default=torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the networks that `score` needs; idempotent. One metric is loaded at a time, so that one card does.

        Raises:
            UserError: for weights that are missing or incomplete, naming the file.
        """
        for part in self._parts():
            part.load(device)

    def unload(self) -> None:
        """Free what `load` loaded."""
        for part in self._parts():
            part.unload()

    def _parts(self) -> list[Any]:
        return [part for name in self.held if (part := getattr(self, name)) is not None]

    def applies(self, clip: Clip) -> bool:
        """Whether the protocol scores such an item at all; where not, it is not expected either.

        Asked before the video is decoded: `clip.frames_THWC` is one black pixel, and no reference's picture is read.
        """
        return True

    @abstractmethod
    def score(self, clip: Clip) -> Score:
        """Judge one clip; the same clip always gets the same score, whatever was judged before."""

    def add(self, score: Score) -> None:
        """Count a score that was computed elsewhere, e.g. read back from a results file."""
        self.update(score)

    def update(self, clips: Clip | Score | Sequence[Clip | Score]) -> None:
        """Judge the clips that the metric applies to and count them; what is a score already is only counted."""
        for item in [clips] if isinstance(clips, Clip | Score) else clips:
            if isinstance(item, Clip) and not self.applies(item):
                continue
            score = item if isinstance(item, Score) else self.score(item)
            self.asked += 1
            if score.value is not None:
                self.values.append(torch.tensor([score.value], dtype=torch.float64, device=self.device))

    def compute(self) -> Tensor:
        """Mean over the scored clips, float64 scalar; NaN where no clip was scored. Independent of their order."""
        values = self._all_values()
        return torch.tensor(math.fsum(values) / len(values) if values else math.nan, dtype=torch.float64)

    @property
    def scored(self) -> int:
        """How many clips have a score: on this rank, or on all of them within `sync_context()`."""
        return len(self._all_values())

    @property
    def expected(self) -> int:
        """How many clips should have a score, counted where `scored` is."""
        return int(self.asked)

    def _all_values(self) -> list[float]:
        # After a sync over ranks the list is one tensor.
        states = self.values if isinstance(self.values, list) else [self.values]
        return [value for state in states for value in state.flatten().tolist()]


def sample_frames(total: int, count: int | None) -> NDArray[np.int64]:
    """Which frames of `total` a metric looks at: linspace(0, total - 1, count) cut to integers (OpenS2V-Eval's rule).

    A video with fewer frames repeats some, as the benchmark does; None takes every frame once.
    """
    if count is None:
        return np.arange(total)
    return np.linspace(0, total - 1, count).astype(np.int64)


def sampled(clip: Clip, count: int | None) -> NDArray[np.uint8]:
    """The frames of `clip` that a metric looks at, `[count, H, W, 3]`."""
    return clip.frames_THWC[sample_frames(len(clip.frames_THWC), count)]


def checked(score: Score, bounds: tuple[float, float]) -> Score:
    """The score with plain details, or a failure where the value is no number or lies outside of `bounds`."""
    details = plain(score.details)
    if score.value is None:
        return Score(None, score.reason or "no reason given", details)
    value, (low, high) = float(score.value), bounds
    slack = SLACK * (high - low) if math.isfinite(high - low) else 0.0
    if not math.isfinite(value):
        return Score(None, f"the score is {value}", details)
    if not low - slack <= value <= high + slack:
        return Score(None, f"the score {value:.6g} is outside of its bounds {low:g} to {high:g}", details)
    return Score(value, score.reason, details)


def reason_of(error: Exception) -> str:
    """One line for a results file or a failed score."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else text[:397] + "..."
    known = isinstance(error, UserError | VideoError)
    return text if known and text else f"{type(error).__name__}: {text}".rstrip(": ")


def plain(value: Any) -> Any:
    """Details of a score as plain JSON: NumPy's and torch's numbers and arrays as lists, what is not finite as None.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    raise TypeError(f"a detail is a {type(value).__name__}, which is no JSON")

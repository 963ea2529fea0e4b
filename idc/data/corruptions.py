"""Worse copies of a real clip, as losers of preference pairs: structure stays, one thing is wrong.

After DenseDPO (arXiv 2506.03517), which regenerates clips from partly noised real ones; `idc.stages.pairs.Regenerate`
does that with a model. Those here need none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idc.data.plan import draw
from idc.errors import UserError
from idc.types import Sample


class Corruption(ABC):
    """Makes the loser of a pair. Light to construct.

    Attributes:
        name: what a pair says prefers its winner.
    """

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the losers depend on besides clip and seed, as plain JSON."""
        return {"name": self.name, **{k: v for k, v in vars(self).items() if not k.startswith("_")}}

    def load(self, device: torch.device | str = "cpu") -> None:  # noqa: B027  # most load nothing
        """Load what is heavy; idempotent."""

    @abstractmethod
    def corrupt(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        """A worse copy, uint8 `[T, H, W, 3]` of the clip's size, the same for the same sample and seed.

        Args:
            sample: with its whole clip.

        Raises:
            UserError: for a clip of which there is no such copy.
        """


class ShuffledFrames(Corruption):
    """The frames in another order: what is seen stays, how it moves is lost."""

    name = "shuffled_frames"

    def corrupt(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        frames_THWC = frames_of(sample)
        count = len(frames_THWC)
        if count < 2:
            raise UserError("one frame has no other order")
        # Fisher-Yates on the sample's own stream, until it is another order.
        for attempt in range(64):
            order = list(range(count))
            for last in range(count - 1, 0, -1):
                other = draw(seed, f"shuffle {attempt} {last}", last + 1)
                order[last], order[other] = order[other], order[last]
            if order != list(range(count)):
                break
        return frames_THWC[order]


class TurnedColours(Corruption):
    """Red, green and blue change places: shapes and motion stay, colours are not those of references and caption."""

    name = "turned_colours"

    def corrupt(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        return np.roll(frames_of(sample), 1 + draw(seed, "colours", 2), axis=-1)


class SwappedSubjects(Corruption):
    """Toy clips alone: every subject has the looks of the next one, and goes its own way."""

    name = "swapped_subjects"

    def corrupt(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        from idc.data.toy import ToySpec, render_clip

        if "toy" not in sample.meta:
            raise UserError("no toy clip: what its subjects look like is not known")
        spec = ToySpec.from_json(sample.meta["toy"])
        looks = [(subject.shape, subject.texture, subject.colour) for subject in spec.subjects]
        if len(set(looks)) < 2:
            raise UserError("no two subjects that look different")
        turned = [
            replace(subject, shape=shape, texture=texture, colour=colour)
            for subject, (shape, texture, colour) in zip(spec.subjects, looks[1:] + looks[:1], strict=True)
        ]
        return render_clip(replace(spec, subjects=tuple(turned)))


def frames_of(sample: Sample) -> NDArray[np.uint8]:
    """A sample's clip as uint8 `[T, H, W, 3]`."""
    assert sample.video_CTHW is not None
    scaled_CTHW = (sample.video_CTHW.clamp(-1, 1) + 1) * 127.5
    return scaled_CTHW.round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
